"""Number formats and the arithmetic that numpy does not have."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i2, i4, i8 = np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64


def bf16_from_f32(x):
    """Bits, rounded to nearest even."""
    bits = np.asarray(x, dtype=f4).view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def f32_from_bf16(bits):
    return (np.asarray(bits, dtype=u2).astype(u4) << u4(16)).view(f4)


def f16_from_f32(x):
    return np.asarray(x).astype(f2).view(u2)


def f32_from_f16(bits):
    return np.asarray(bits, dtype=u2).view(f2).astype(f4)


def narrow(x, kind):
    """float32 or float64 values to the bits of a 16-bit format."""
    return f16_from_f32(x) if kind == "f16" else bf16_from_f32(np.asarray(x).astype(f4))


def widen(bits, kind):
    return f32_from_f16(bits) if kind == "f16" else f32_from_bf16(bits)


def tf32(x, nearest_away=True):
    bits = np.asarray(x, dtype=f4).view(u4)
    if nearest_away:
        bits = bits + u4(0x1000)
    return (bits & u4(0xFFFFE000)).view(f4)


def halves(word):
    return (word & u4(0xFFFF)).astype(u2), (word >> u4(16)).astype(u2)


def joined(low, high):
    return low.astype(u4) | (high.astype(u4) << u4(16))


def fma32(a, b, c):
    # The product is exact in float64; the sum is rounded twice, which differs from one rounding once in 2^28.
    return (a.astype(f8) * b + c).astype(f4)


def mul_hi(a, b, kind):
    bits = int(kind[1:])
    if bits < 64:
        wide = i8 if kind[0] == "s" else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(f"u{bits // 8}")
    values = [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([v % (1 << 64) for v in values], dtype=u8)


def divide(a, b):
    """Truncated, as C has it; a division by zero gives all ones."""
    if a.dtype.kind == "u":
        return np.where(b == 0, a.dtype.type(-1 % (1 << 8 * a.itemsize)), a // np.where(b == 0, 1, b).astype(a.dtype))
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    q = np.abs(a) // np.abs(safe)
    return np.where(b == 0, -1, np.where((a < 0) != (safe < 0), -q, q)).astype(a.dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def prmt(a, b, selector):
    both = (b.astype(u8) << u8(32)) | a.astype(u8)
    out = np.zeros(a.shape, u8)
    for i in range(4):
        pick = (selector >> u4(4 * i)) & u4(0xF)
        byte = (both >> ((pick & u4(7)).astype(u8) * u8(8))) & u8(0xFF)
        sign = np.where(byte & u8(0x80), u8(0xFF), u8(0))
        out |= np.where(pick & u4(8), sign, byte) << u8(8 * i)
    return out.astype(u4)


def bfe(a, position, length, kind):
    bits = 64 if kind.endswith("64") else 32
    position, length = position & u4(0xFF), length & u4(0xFF)
    out = []
    for value, at, count in zip(a, position, length, strict=True):
        value, at, count = int(value), int(at), int(count)
        field = (value >> at) & ((1 << count) - 1)
        if kind[0] == "s" and count:
            sign = value >> min(at + count - 1, bits - 1) & 1
            if sign:
                field |= -1 << min(count, max(bits - at, 0))
        out.append(field % (1 << bits))
    return np.array(out, dtype=u8 if bits == 64 else u4)


def bfi(a, b, position, length):
    bits = 8 * a.itemsize
    out = []
    for source, into, at, count in zip(a, b, position, length, strict=True):
        at, count = int(at) & 0xFF, int(count) & 0xFF
        mask = (((1 << count) - 1) << at) % (1 << bits)
        out.append((int(into) & ~mask) | ((int(source) << at) & mask))
    return np.array(out, dtype=a.dtype)


def funnel(low, high, shift, left, wrap):
    shift = shift & u4(31) if wrap else np.minimum(shift, u4(32))
    both = (high.astype(u8) << u8(32)) | low.astype(u8)
    if left:
        return ((both << shift.astype(u8)) >> u8(32)).astype(u4)
    return (both >> shift.astype(u8)).astype(u4)


def popc(a):
    return np.bitwise_count(a).astype(u4)


def clz(a):
    bits = 8 * a.itemsize
    return np.array([bits - int(v).bit_length() for v in a], dtype=u4)


def bfind(a):
    return np.array([(int(v).bit_length() - 1) % (1 << 32) for v in a], dtype=u4)


def brev(a):
    bits = 8 * a.itemsize
    return np.array([int(format(int(v), f"0{bits}b")[::-1], 2) for v in a], dtype=a.dtype)


def to_integer(x, kind, how):
    """Float to integer, saturating; NaN gives 0."""
    x = x.astype(f8)
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x)
    bits = int(kind[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    out = [0 if v != v else low if v <= low else high if v >= high else int(v) for v in x]
    return np.array(out, dtype=np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"))


def half_op(name, kind, *operands):
    """An operation on 16-bit floats held as bits, rounded once to 16 bits (or, for f16, from float64)."""
    values = [widen(o, kind).astype(f8) for o in operands]
    function = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "min": np.fmin,
        "max": np.fmax,
        "neg": lambda a: -a,
        "abs": np.abs,
        "ex2": np.exp2,
        "tanh": np.tanh,
    }[name]
    return narrow(function(*values), kind)


def half2_op(name, kind, *operands):
    lows, highs = zip(*(halves(o) for o in operands), strict=True)
    return joined(half_op(name, kind, *lows), half_op(name, kind, *highs))
