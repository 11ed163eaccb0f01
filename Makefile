# Two commands do everything on a fresh machine, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A CPU-capable torch; any torch from 2.10 on works, this is the one that the results were measured with.
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml CMakeLists.txt riformer_kernels/__init__.py \
  $(wildcard csrc/*/CMakeLists.txt csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.def)
# Threads that wait in a busy loop make tests several times slower on a machine that does something else as well.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

.PHONY: demo test test-fast arm-tools ptx bench compare sanitize memcheck lint format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test sanitize
	$(PYTEST)

test-fast: $(VENV)/.test
	$(PYTEST) -x -m "not slow"

# Debian's cross compiler and emulator for Arm, where they are missing. tests/install/test_aarch64.py skips without them.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
arm-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { $(AS_ROOT) apt-get update -qq && $(AS_ROOT) env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user; }

# The conformance suite on the PTX of the GPU kernels, interpreted. The part of it that `make test` runs is in
# tests/gpu/test_ptx_*.py. Needs nvcc for the CUDA kernels, and no GPU.
ptx: $(VENV)/.test
	$(PYTEST) tests/conformance/test_conformance.py --target=ptx-cuda --target=ptx-triton

bench: $(VENV)/.test
	$(PYTEST) bench --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

# About an hour and a half on two cores, on a machine that does nothing else; COMPARE="--quick" for a few minutes.
compare: $(VENV)/.peers
	$(BIN)/python bench/compare.py $(COMPARE)

# The op tests once more under AddressSanitizer and UndefinedBehaviorSanitizer, on a second build of the library.
# `pytest` and not `python -m pytest`, which would put this folder, and with it the normal library, first. -s, because the
# report of a sanitizer would be lost in pytest's capture when the process is aborted.
sanitize: $(VENV)/.test
	RIFORMER_CUDA=off CMAKE_ARGS="-DRIFORMER_SANITIZE=address,undefined" $(PIP) install --quiet --no-build-isolation --no-deps \
	  --upgrade --target build/sanitized .
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized OMP_WAIT_POLICY=passive \
	  $(BIN)/pytest -q -s -p no:cacheprovider tests/install/test_sanitized.py

# The CUDA kernels under NVIDIA's checkers: accesses, races, barriers, memory that nobody wrote. Needs a GPU, a CUDA build
# of torch (TORCH=...) and the CUDA toolkit, and long: kernels run some hundred times slower there. Without PyTorch's cache of
# memory, so that an access beside a tensor is one beside an allocation.
MEMCHECK := compute-sanitizer --error-exitcode=1 --target-processes=all
MEMCHECK_TESTS := tests/conformance/test_conformance.py -m gpu -k "cuda and not triton"
memcheck: $(VENV)/.test
	@$(BIN)/python -c "import sys; from riformer_kernels.backends import cuda; reason = cuda.unusable(); \
	  sys.exit(f'memcheck: no GPU to check the CUDA kernels on: {reason}' if reason else 0)"
	@command -v compute-sanitizer >/dev/null || \
	  { echo "memcheck: compute-sanitizer was not found; install the CUDA toolkit" >&2; exit 1; }
	for tool in memcheck racecheck synccheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_WAIT_POLICY=passive $(MEMCHECK) --tool=$$tool \
	    $(BIN)/python -m pytest -x -q -p no:cacheprovider --timeout=0 $(MEMCHECK_TESTS) || exit 1; done

# Style, formatting and types. The C++ files that .clang-format-ignore names are left out by clang-format itself.
PYTHON_FILES := riformer_kernels python csrc tests bench examples setup.py
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu bench/*.cpp tests/*/*.cpp tests/*/*/*.cpp tests/*/*/*.h)
lint: $(VENV)/.test
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# Puts right what `make lint` finds and a tool can mend.
format: $(VENV)/.test
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build riformer_kernels/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77" wheel cmake ninja numpy
	$(PIP) install --quiet "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.base $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/.peers: $(VENV)/.base $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable ".[peers]"
	touch $@

# mmpretrain and what it needs go in without their dependencies: torchvision's and mmcv's would replace torch.
$(VENV)/.test: $(VENV)/.base $(SOURCES) tests/requirements-mmpretrain.txt
	$(PIP) install --quiet --no-build-isolation --editable ".[test,lint]"
	$(PIP) install --quiet --no-deps -r tests/requirements-mmpretrain.txt
	touch $@
