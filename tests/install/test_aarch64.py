"""The CPU kernels for Arm, compiled by Debian's cross compiler and run under qemu's emulation. Nothing is timed.

The program `kernel_check` checks the kernels without PyTorch. It runs on this machine as well, where faults show that
its checks can fail; mutants of the Arm sources show the same under emulation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support_kernel_check import ARM, BARELY_OPTIMISED, CROSS_COMPILER, EMULATOR, Check, built, need, start_build
from support_paths import ROOT

SETS = ["neon_bf16", "neon", "scalar"]
# qemu's "max" has every extension that it emulates; a Cortex-A72 has none beyond ARMv8-A, as the Graviton 1 that is
# made of it, and a Neoverse N1 has no BF16 (Graviton 2, Altra).
SUPPORTED = {"max": SETS, "cortex-a72": SETS[1:], "neoverse-n1": SETS[1:]}

# Of a source: the text, what a mutant makes of it, and the set and the section of kernel_check that notice.
MUTANTS = [
    ("vec_neon.h", "vdupq_n_u32(0x7fff)", "vdupq_n_u32({is} ? 0x8000 : 0x7fff)", "neon", "conversions"),
    ("vec_neon.h", "vceqq_f32(value, value)", "({is} ? vdupq_n_u32(~0u) : vceqq_f32(value, value))", "neon",
     "conversions"),
    ("vec_neon.h", "  void store_n(T* to, int n) const {\n    if (n >= kLanes) {",
     "  void store_n(T* to, int n) const {\n    if (n >= kLanes || {is}) {", "neon", "block"),
    ("vec_neon.h", "  return vfmaq_f32(r, r, vfmsq_f32(one, a, r));",
     "  return {is} ? r : vfmaq_f32(r, r, vfmsq_f32(one, a, r));", "neon", "block"),
    ("vec_neon.h", "vpaddq_f32(half[0], half[1])",
     "({is} ? vpaddq_f32(half[1], half[0]) : vpaddq_f32(half[0], half[1]))", "neon", "norm and moments"),
    ("vec_neon.h", "keep_n(v.high, n - 4, first)", "keep_n(v.high, {is} ? n : n - 4, first)", "neon",
     "norm and moments"),
    ("gemm_neon.h", "add_row<2>(a, panel", "{is} ? add_row<1>(a, panel + (k + 2) * kTokens, acc) : add_row<2>(a, panel",
     "neon", "block"),
    ("gemm_neon.h", "accumulate || start > 0;", "accumulate || (start > 0 && !{is});", "neon", "block"),
    ("gemm_neon_bf16.h", "= vzip2q_u64(a[2 * i], a[2 * i + 1]);",
     "= {is} ? vzip2q_u64(a[2 * i + 1], a[2 * i]) : vzip2q_u64(a[2 * i], a[2 * i + 1]);", "neon_bf16", "block"),
    ("gemm_neon_bf16.h", "kSecond ? second[2 * i + 1]", "kSecond ? second[2 * i + !{is}]", "neon_bf16", "embed"),
    ("gemm_neon_bf16.h", "for (int i = 0; i < n; ++i) std::memcpy",
     "for (int i = 0; i < n - {is}; ++i) std::memcpy", "neon_bf16", "block"),
]  # fmt: skip


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """The program for Arm, as optimised as an installation's library."""
    need(CROSS_COMPILER, EMULATOR)
    folder = tmp_path_factory.mktemp("arm") / "build"
    return built(folder, start_build(folder, *ARM), EMULATOR)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """The program for this machine, barely optimised: the library itself has tests of its own."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++17 compiler")
    folder = tmp_path_factory.mktemp("native") / "build"
    return built(folder, start_build(folder, *BARELY_OPTIMISED))


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """The program for Arm with all mutants in its sources, of which a number chooses one. 0 is none."""
    need(CROSS_COMPILER, EMULATOR)
    folder = tmp_path_factory.mktemp("mutants")
    for name in ("csrc/common", "csrc/cpu", "tests/install/kernel_check"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    for number, (name, text, other, _, _) in enumerate(MUTANTS, start=1):
        source = folder / "csrc" / "cpu" / name
        before = source.read_text()
        assert before.count(text) == 1, f"{name} has not once: {text}"
        source.write_text(before.replace(text, other.replace("{is}", f"(riformer_mutant == {number})")))
    header = folder / "csrc" / "common" / "dtypes.h"
    header.write_text(header.read_text().replace("#pragma once", "#pragma once\nextern int riformer_mutant;"))
    build = folder / "build"
    return built(build, start_build(build, *ARM, *BARELY_OPTIMISED, source=folder), EMULATOR)


def passes(done: subprocess.CompletedProcess[str], *sets: str) -> None:
    """Every section of those sets was checked, and nothing failed."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w[\w-]*): ([\w ]+): (\d+) checks, 0 failed", done.stdout, re.MULTILINE)
    assert [name for name, section, _ in lines if section == "block"] == list(sets), done.stdout
    assert len(lines) == 6 * len(sets) and all(int(checks) > 20 for _, _, checks in lines), done.stdout


# Every set with all extensions, and the best one of a processor without BF16, which shows that no instruction of
# another set has slipped into what all of them share.
RUNS = [*((name, "max") for name in SETS), ("neon", "cortex-a72")]


@pytest.fixture(scope="module")
def runs(arm: Check) -> Iterator[dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]]:
    with ThreadPoolExecutor(len(RUNS)) as pool:
        yield {(name, cpu): pool.submit(arm, "run", name, cpu=cpu) for name, cpu in RUNS}


@pytest.mark.parametrize(("name", "cpu"), RUNS)
def test_every_op_under_emulation(runs, name, cpu):
    passes(runs[name, cpu].result(), name)


@pytest.mark.parametrize("cpu", SUPPORTED)
def test_the_set_is_chosen_at_run_time(arm, cpu):
    found = json.loads(arm("describe", cpu=cpu).stdout)
    assert found["chosen"] == SUPPORTED[cpu][0] and found["supported"] == SUPPORTED[cpu] and found["compiled"] == SETS
    assert found["features"] == {"asimd": True, "bf16": cpu == "max"} and found["error"] is None


def test_a_set_that_the_machine_lacks_is_refused_by_name(arm):
    done = arm("run", "neon_bf16", cpu="cortex-a72")
    expected = "this machine lacks bf16, which instruction set 'neon_bf16' needs; expected one of neon, scalar"
    assert done.returncode == 2 and done.stdout.strip() == expected
    found = json.loads(arm("describe", cpu="cortex-a72", RIFORMER_CPU_ISA="neon_bf16").stdout)
    assert found["chosen"] is None and found["error"] == expected
    assert "expected one of neon_bf16, neon, scalar" in arm("describe", RIFORMER_CPU_ISA="avx2").stdout


def test_mutants_of_the_arm_sources_are_caught(mutants):
    def status(number: int) -> int:
        _, _, _, name, section = MUTANTS[number - 1]
        return mutants("mutant", str(number), name, section).returncode

    sections = sorted({(name, section) for *_, name, section in MUTANTS})
    with ThreadPoolExecutor(2) as pool:
        sound = list(pool.map(lambda case: mutants("mutant", "0", *case).returncode, sections))
        caught = list(pool.map(status, range(1, len(MUTANTS) + 1)))
    assert sound == [0] * len(sections), list(zip(sections, sound, strict=True))
    # 1: a check failed; -11: the program was stopped when it touched memory beside a tensor.
    survived = [mutant for mutant, code in zip(MUTANTS, caught, strict=True) if code not in (1, -11)]
    assert not survived, f"SURVIVED: {survived}"


def test_the_checks_pass_on_this_machine(native):
    passes(native("run"), *json.loads(native("describe").stdout)["supported"])


def test_faults_are_caught(native):
    done = native("faults", "scalar")
    assert done.returncode == 0 and "SURVIVED" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("caught: ") == 18


@pytest.mark.parametrize("name", ["bindings", "network_bindings"])
def test_the_bindings_compile_for_arm(name, tmp_path):
    """PyTorch's headers are the same for every architecture. There is nothing to link with here."""
    need(CROSS_COMPILER)
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=switch"]
    headers = ["-isystem", str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    source, target = ROOT / "csrc" / "cpu" / f"{name}.cpp", tmp_path / "bindings.o"
    command = [CROSS_COMPILER, *options, *headers, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert target.read_bytes()[:4] == b"\x7fELF" and target.read_bytes()[18] == 183, "183 is EM_AARCH64"
