"""The dtypes: that every list of them names the same ones, and that the compiler finds what a new one still lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import support_cases
import torch
from riformer_cli import _arguments
from support_compiler import compiled
from support_paths import ROOT

from riformer_kernels import dtypes, numerics

# Names of dtypes that the native ops take and no backend serves, see "A dtype" in DEVELOPING.md. They have the last
# numbers.
OPS_ALONE: tuple[str, ...] = ()
HEADER = ROOT / "csrc" / "common" / "dtypes.h"

# A fourth dtype, which only the CPU library serves: the file of each piece, what it stands before, and the piece.
PIECES = {
    "struct": ("common/dtypes.h", "struct bf16 {", "struct f64 {\n  double value;\n};\n"),
    "DType": ("common/dtypes.h", " };\nconstexpr DType kDTypes", ", f64 = 3"),
    "kDTypes": ("common/dtypes.h", "};\nconstexpr int kDTypeCount", ", DType::f64"),
    "ElementTraits": ("common/dtypes.h", "template <>\nstruct ElementTraits<float> {", """\
template <>
struct ElementTraits<f64> {
  static constexpr DType kDType = DType::f64;
  static constexpr const char* kName = "float64";
};
"""),
    "with_dtype": ("common/dtypes.h", "case DType::f32: return f(", "case DType::f64: return f(f64{});\n"),
    "widen": ("common/dtypes.h", "static inline float widen(bf16", """\
static inline float widen(f64 value) { return static_cast<float>(value.value); }
"""),
    "narrow": ("common/dtypes.h", "static inline void narrow(float value, bf16", """\
static inline void narrow(float value, f64& out) { out.value = value; }
"""),
    "kernels_serve": ("cuda/kernels.h", "  }\n  return false;", "case DType::f64: return false;\n"),
}  # fmt: skip

# Says for every dtype what the CUDA launchers do with it.
PROGRAM = """
#include "common/dtypes.h"
#include "cuda/device.h"
using namespace riformer;
int main() {
  for (const DType dtype : kDTypes) {
    const float there = with_dtype(dtype, [](auto element) {
      narrow(1.5f, element);
      return widen(element);
    });
    std::string what = "served";
    try {
      cuda::with_served_dtype(dtype, [](auto) {});
    } catch (const std::exception& error) {
      what = error.what();
    }
    std::printf("%d %g %s\\n", int(size_of(dtype)), there, what.c_str());
  }
}
"""


def with_pieces(folder: Path, names: set[str], program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    """Compile ``program`` with those pieces of a fourth dtype, to ``folder / "program"``."""
    for part in ("common", "cuda", "emulator"):
        shutil.copytree(ROOT / "csrc" / part, folder / part)
    for name in names:
        file, place, text = PIECES[name]
        source = (folder / file).read_text()
        assert source.count(place) == 1, (name, place)
        (folder / file).write_text(source.replace(place, text + place))
    (folder / "program.cpp").write_text(program)
    return compiled("-Wall", "-Werror=switch", "-I", folder, "-o", folder / "program", folder / "program.cpp")


@pytest.mark.parametrize("names", [set(), set(PIECES)], ids=["as_it_is", "one_more"])
def test_a_dtype_of_the_cpu_alone_is_refused_by_name(tmp_path, names):
    built = with_pieces(tmp_path, names)
    assert built.returncode == 0, built.stderr
    said = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:3] == ["4 1.5 served", "2 1.5 served", "2 1.5 served"]
    assert said[3:] == (["8 1.5 riformer: the CUDA kernels do not serve float64"] if names else [])


@pytest.mark.parametrize("missing", PIECES)
def test_what_a_new_dtype_lacks_does_not_compile(tmp_path, missing):
    built = with_pieces(tmp_path, set(PIECES) - {missing})
    assert built.returncode != 0, f"{missing} was not missed"
    assert "f64" in built.stderr, built.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("served", [False, True], ids=["refused", "served"])
def test_no_dtype_is_read_as_the_last_one_on_a_gpu(tmp_path, served):
    """A kernel has no path for an unknown dtype: one that is served without a line of its own does not compile."""
    kernel = (
        '#include "cuda/device.h"\nusing namespace riformer;\n'
        "__global__ void sizes(DType dtype, int* out) {\n"
        "  cuda::with_dtype_on_device(dtype, [=](auto element) { *out = sizeof(element); });\n}\n"
    )
    with_pieces(tmp_path, set(PIECES))
    if served:
        header = tmp_path / "cuda" / "kernels.h"
        header.write_text(header.read_text().replace("case DType::f64: return false;", "case DType::f64: return true;"))
    (tmp_path / "kernel.cu").write_text(kernel)
    command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-arch=compute_80", "-ptx", "-I", tmp_path]
    built = subprocess.run([*command, "-o", tmp_path / "kernel.ptx", tmp_path / "kernel.cu"], capture_output=True)
    said = (built.stdout + built.stderr).decode()
    assert (built.returncode != 0) == served, said
    assert ("would be read as the last one" in said) == served, said


@pytest.mark.parametrize("call", ["widen(1.0)", "widen(int8_t{1})", "narrow(1.f, wide)", "widen(1.f)"])
def test_no_element_is_converted_without_a_word(tmp_path, call):
    """To float, which has an overload, from a built-in type that has none."""
    program = tmp_path / "convert.cpp"
    program.write_text(f'#include "dtypes.h"\nint main() {{ double wide = 0; riformer::{call}; return wide != 0; }}\n')
    built = compiled("-fsyntax-only", "-I", HEADER.parent, program)
    assert ("deleted" in built.stderr) == (built.returncode != 0) == (call != "widen(1.f)"), built.stderr


@pytest.mark.parametrize("element", ["1.0", "int8_t{1}", "1.f"])
def test_no_element_takes_the_name_of_another(tmp_path, element):
    program = tmp_path / "name.cpp"
    program.write_text(
        f'#include "arguments.h"\nint main() {{ return int(riformer::scalar_type_of_element({element})); }}\n'
    )
    torch_headers = ("-isystem", Path(torch.__file__).parent / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    built = compiled("-fsyntax-only", "-I", HEADER.parent, *torch_headers, program)
    assert ("deleted" in built.stderr) == (built.returncode != 0) == (element != "1.f"), built.stderr


def test_every_list_names_the_same_dtypes():
    text = HEADER.read_text()
    numbers = re.search(r"enum class DType : int \{(.*)\};", text)[1]
    found = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", numbers)}
    listed = re.findall(r"DType::(\w+)", re.search(r"kDTypes\[\] = \{(.*)\};", text)[1])
    traits = dict(re.findall(r"kDType = DType::(\w+);\n.* kName = \"(\w+)\";", text))
    assert list(found) == listed == list(traits) and list(found.values()) == list(range(len(found)))
    assert tuple(traits.values()) == dtypes.NAMES + OPS_ALONE and _arguments.DTYPES == dtypes.NAMES
    assert [dtypes.number_of(dtype) for dtype in dtypes.DTYPES] == list(found.values())[: len(dtypes.DTYPES)]
    assert support_cases.DTYPES == dtypes.DTYPES


def test_a_dtype_without_a_number_is_named():
    with pytest.raises(ValueError, match=r"float64 has no number .* expected float32, bfloat16 or float16"):
        dtypes.number_of(torch.float64)


def test_every_dtype_has_limits_and_another_is_named():
    """float64 has them too, as the reference backend serves it."""
    for dtype in (*dtypes.DTYPES, torch.float64):
        assert numerics.limits_for(dtype).rms == (2.0 if dtype == torch.float32 else 1.25)
    with pytest.raises(ValueError, match="no limits for int16"):
        numerics.limits_for(torch.int16)
