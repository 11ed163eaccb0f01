#!/usr/bin/env python3
"""Makes gelu_table.h: python csrc/common/gelu_table.py > csrc/common/gelu_table.h (needs mpmath).

With g(t) = t Phi(-t), GELU is x Phi(x) = max(x, 0) - g(|x|). g is cut into segments of 1 / scale, centred on i / scale,
and in segment i it is a polynomial of f = t scale - i, |f| <= 1/2. Segment 0 is made to have g's value and slope at 0,
so that the relative error of GELU vanishes there. The last segment ends at its centre, where t is clamped.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpmath import cos, erfc, lu_solve, matrix, mp, mpf, pi, sqrt

SEGMENTS = 32


@dataclass(frozen=True)
class Table:
    """One table: its name in C++, segments per unit of x, and the polynomials' degree."""

    name: str
    scale: float
    degree: int
    purpose: str

    @property
    def limit(self) -> float:
        """Where t is clamped."""
        return (SEGMENTS - 1) / self.scale


TABLES = (
    Table("kGeluBfloat16", 6.5, 2, "for results that are rounded to bfloat16: within 1.5e-5"),
    Table("kGeluFloat32", 5.0, 5, "for float32: within 4e-9, in exact arithmetic"),
)


def g(t: mpf) -> mpf:
    return t * erfc(t / sqrt(mpf(2))) / 2


def segment(table: Table, index: int) -> list[mpf]:
    """Coefficients of segment ``index``, lowest first: interpolation at Chebyshev nodes, which is within a few per cent
    of the best polynomial."""
    scale = mpf(table.scale)
    low = mpf(0) if index == 0 else -mpf(1) / 2
    high = mpf(0) if index == SEGMENTS - 1 else mpf(1) / 2
    known = [mpf(0), 1 / (2 * scale)] if index == 0 else []
    count = table.degree + 1 - len(known)
    nodes = [(low + high) / 2 + (high - low) / 2 * cos(pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    values = [g((index + f) / scale) for f in nodes]
    if index == 0:
        values = [(value - known[1] * f) / f**2 for f, value in zip(nodes, values, strict=True)]
    powers = matrix(count, count)
    for row, f in enumerate(nodes):
        for column in range(count):
            powers[row, column] = f**column
    return known + list(lu_solve(powers, matrix(values)))


def coefficients(table: Table) -> list[list[float]]:
    """``[degree + 1][SEGMENTS]`` doubles, lowest power first."""
    with mp.workdps(40):
        columns = [segment(table, index) for index in range(SEGMENTS)]
        return [[float(column[power]) for column in columns] for power in range(table.degree + 1)]


def header() -> str:
    lines = [
        "// Made by gelu_table.py, which says what this is. Do not edit.",
        "#pragma once",
        "",
        "namespace riformer {",
        "",
        f"constexpr int kGeluSegments = {SEGMENTS};",
    ]
    for table in TABLES:
        lines += [
            "",
            f"// {table.purpose[0].upper()}{table.purpose[1:]}.",
            f"constexpr float {table.name}Scale = {table.scale!r}f;",
            f"constexpr float {table.name}Limit = {table.limit:.9g}f;",
            f"constexpr int {table.name}Degree = {table.degree};",
            f"alignas(64) constexpr float {table.name}[{table.name}Degree + 1][kGeluSegments] = {{",
        ]
        for row in coefficients(table):
            parts = [f"{value:.9g}" for value in row]
            parts = [f"{part}f" if any(mark in part for mark in ".e") else f"{part}.f" for part in parts]
            text = [", ".join(parts[i : i + 8]) for i in range(0, SEGMENTS, 8)]
            lines += [
                "    {" + text[0] + ",",
                *("     " + part + "," for part in text[1:-1]),
                "     " + text[-1] + "},",
            ]
        lines[-1] = lines[-1].removesuffix(",") + "};"
    return "\n".join([*lines, "", "}  // namespace riformer", ""])


if __name__ == "__main__":
    print(header(), end="")
