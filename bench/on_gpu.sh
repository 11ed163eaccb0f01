#!/usr/bin/env bash
# Builds, tests and times the GPU kernels where nothing can be installed and a command may run for ten minutes: three
# steps, each of them a call of its own. A CUDA build of torch with Triton, nvcc, cmake, ninja and pytest have to be there.
#
#     STEPS=build bench/on_gpu.sh [FOLDER]    Triton's variants and the CUDA library, side by side
#     STEPS=check bench/on_gpu.sh [FOLDER]    the tests, what only hardware can settle first
#     STEPS=time  bench/on_gpu.sh [FOLDER]    bench/gpu.py
#
# What was said and measured goes to FOLDER (default: bench/results) as it comes. Without STEPS all three run. A step that
# fails does not keep the next from running: Triton's kernels are tested and timed where nvcc's build has failed.
#
#     BUILT=480 CHECKED=480 TIMED=480         seconds for each step; when they are up, what has failed so far is printed
#     RIFORMER_CUDA_ARCHITECTURES=90a         for which GPUs nvcc compiles (default: the one that is there)
#     LIBRARY=libriformer_cuda.so             a library that was built elsewhere, in place of building one
#     TESTS="tests/gpu/test_gpu.py ..."       what check runs
#     ARCHITECTURE=90                         the compute capability, where building is done without a GPU
#     JOBS=14                                 processes that compile Triton's variants
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-bench/results}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONPATH="$PWD:$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export RIFORMER_RESULTS="$folder/gpu-tests.jsonl"
failed=0

# SIGINT, because Python then prints what it knows; SIGKILL for what does not listen.
within() {
  timeout --signal=INT --kill-after=20 "$@"
}

architecture() {
  [ -z "${ARCHITECTURE:-}" ] || { echo "$ARCHITECTURE"; return; }
  "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
}

variants() {
  within "${BUILT:-480}" "$python" bench/triton_cache.py "$(architecture)" ${JOBS:+--jobs "$JOBS"}
}

library() {
  mkdir -p riformer_kernels/lib
  if [ -n "${LIBRARY:-}" ]; then
    cp "$LIBRARY" riformer_kernels/lib/libriformer_cuda.so
    return
  fi
  command -v nvcc >/dev/null || export CUDACXX="${CUDACXX:-/usr/local/cuda/bin/nvcc}"
  local torch name=${RIFORMER_CUDA_ARCHITECTURES:-}
  torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
  if [ -z "$name" ]; then
    name=$(architecture) || return 1
    [ "$name" = 90 ] && name=90a  # wgmma and the copy engine's instructions are of sm_90a alone
  fi
  cmake -S . -B build/gpu -G Ninja -DTORCH_ROOT="$torch" -DRIFORMER_CUDA=ON "-DRIFORMER_CUDA_ARCHITECTURES=$name" \
    -DRIFORMER_NVCC_JOBS=4 &&
    within "${BUILT:-480}" cmake --build build/gpu --target riformer_cuda &&
    cp build/gpu/libriformer_cuda.so riformer_kernels/lib/
}

build() {
  local status=0 beside
  variants >"$folder/gpu-variants.log" 2>&1 &
  beside=$!
  library || { echo "on_gpu.sh: the CUDA library was not built; Triton's kernels do not need it" >&2; status=1; }
  wait "$beside" || { echo "on_gpu.sh: not all of Triton's variants were compiled; they are when called" >&2; status=1; }
  cat "$folder/gpu-variants.log"
  return "$status"
}

check() {
  local hang=()
  "$python" -c 'import pytest_timeout' 2>/dev/null && hang=(--timeout=60)
  : >"$RIFORMER_RESULTS"
  "$python" -m riformer_kernels info
  # shellcheck disable=SC2086  # several tests
  within "${CHECKED:-480}" "$python" -m pytest -p gpu_order -m gpu -q -p no:cacheprovider "${hang[@]}" \
    ${TESTS:-tests/gpu/test_gpu.py tests/conformance}
}

measure() {
  # The benchmark ends by itself; the rest is for the case that a kernel hangs.
  within "$((${TIMED:-480} + 20))" "$python" bench/gpu.py --seconds "${TIMED:-480}" --output "$folder/gpu.jsonl"
}

step() {
  local start=$SECONDS
  echo "== $1"
  "$2" 2>&1 | tee "$folder/gpu-$1.log"
  local status=${PIPESTATUS[0]}
  echo "== $1: exit $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed=1
}

for name in ${STEPS:-build check time}; do
  case $name in
    build) step build build ;;
    check) step check check ;;
    time) step time measure ;;
    *) echo "on_gpu.sh: unknown step '$name', expected build, check or time" >&2; exit 2 ;;
  esac
done
exit "$failed"
