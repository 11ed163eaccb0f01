"""Writes wgmma.h: the warpgroup product for each width and form in use, as inline PTX.

    python csrc/cuda/wgmma.py > csrc/cuda/wgmma.h

One function has up to 96 sums among its operands: a list that long is better written by a loop than by hand.
"""

SHARED = (32, 64, 128)  # both operands from shared memory: the first product of a block, and the pair of kernels
REGISTERS = (64, 96, 128, 160, 192)  # a from registers: the second product, on GELU's results
TYPES = {"bf16": "bf16", "f16": "f16"}


def operands(first: int, count: int) -> str:
    return ", ".join(f"%{first + i}" for i in range(count))


def function(name: str, n: int, ptx: str, a_registers: bool) -> list[str]:
    sums = n // 2
    a = f"{{{operands(sums, 4)}}}" if a_registers else f"%{sums}"
    after = sums + (4 if a_registers else 1)
    signature = "const uint32_t (&a)[4]" if a_registers else "uint64_t a"
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_registers else '"l"(a)'
    # Scales of a and b are 1; neither is transposed (in registers, a cannot be).
    tail = "p, 1, 1, 0" if a_registers else "p, 1, 1, 0, 0"
    lines = [f"  static RIFORMER_DEVICE void {name}(float (&d)[{sums}], {signature}, uint64_t b, bool add) {{"]
    lines.append("    asm volatile(")
    lines.append(f'        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{after + 1}, 0;\\n"')
    lines.append(f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{"')
    for start in range(0, sums, 16):
        comma = ", " if start + 16 < sums else ""
        lines.append(f'        "{operands(start, min(16, sums - start))}{comma}"')
    lines.append(f'        "}}, {a}, %{after}, {tail};\\n}}"')
    for start in range(0, sums, 8):
        part = ", ".join(f'"+f"(d[{i}])' for i in range(start, min(start + 8, sums)))
        lines.append(f"        {':' if start == 0 else ' '} {part}{',' if start + 8 < sums else ''}")
    lines.append(f'        : {inputs}, "l"(b), "r"(static_cast<int>(add)));')
    return [*lines, "  }"]


def header() -> str:
    lines = [
        "// Made by wgmma.py, which says what this is. Do not edit.",
        "#pragma once",
        "",
        '#include "device.h"',
        "",
        "namespace riformer::cuda {",
        "",
        "template <class T, int N>",
        "struct Wgmma;",
    ]
    for cpp, ptx in TYPES.items():
        for n in sorted({*SHARED, *REGISTERS}):
            lines += ["", "template <>", f"struct Wgmma<{cpp}, {n}> {{"]
            if n in SHARED:
                lines += function("shared", n, ptx, False)
            if n in REGISTERS:
                lines += function("registers", n, ptx, True)
            lines += ["};"]
    return "\n".join([*lines, "", "}  // namespace riformer::cuda", ""])


if __name__ == "__main__":
    print(header(), end="")
