"""ldmatrix, stmatrix and mma.sync.

Sums are taken in float64 over the k of one instruction and rounded to float32 with the accumulator: at least as exact
as the hardware, whose own rounding is not documented.
"""

from __future__ import annotations

import numpy as np

from . import arithmetic as nx
from .memory import PtxError

LANE = np.arange(32)
ROW, PAIR = LANE // 4, 2 * (LANE % 4)
MMA = {
    ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"),
}  # fmt: skip
ELEMENT = {"f16": 2, "bf16": 2, "tf32": 4}


def unpacked(words, kind):
    """[..., values of a word] float32 values of contiguous 32-bit words, the lower first."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    return nx.widen(words.view(np.uint16).reshape(*words.shape, 2), kind)


def a_places(per):
    """Where in a flat 16 x 8 per tile the values [register, lane, half] of A lie (m16n8k16, or tf32's m16n8k8)."""
    width = 8 * per
    i, lane, h = np.arange(4)[:, None, None], LANE[None, :, None], np.arange(per)[None, None, :]
    return (lane // 4 + 8 * (i % 2)) * width + lane % 4 * per + h + (i // 2) * (width // 2)


def b_places(per, count):
    i, lane, h = np.arange(count)[:, None, None], LANE[None, :, None], np.arange(per)[None, None, :]
    return (lane % 4 * per + h + i * 4 * per) * 8 + lane // 4


A_PLACES = {per: a_places(per) for per in (1, 2)}
B_PLACES = {(per, count): b_places(per, count) for per in (1, 2) for count in (1, 2)}
SUM_PLACES = np.stack([(ROW + 8 * (i // 2)) * 8 + PAIR + i % 2 for i in range(4)])


def tile_of(registers, kind, places):
    values = unpacked(np.concatenate(registers), kind)
    tile = np.empty(values.size, np.float64)
    tile[places] = values.reshape(places.shape)
    return tile


def a_tile(registers, kind):
    """A, 16 x k, from its four registers per lane."""
    return tile_of(registers, kind, A_PLACES[1 if kind == "tf32" else 2]).reshape(16, -1)


def b_tile(registers, kind):
    """B, k x 8, from its one or two registers per lane."""
    return tile_of(registers, kind, B_PLACES[1 if kind == "tf32" else 2, len(registers)]).reshape(-1, 8)


class TensorCore:
    """The part of a warp that multiplies matrices."""

    def init_tensor_core(self):
        self.tiles = {}  # of recent operands of mma: they are used for several products

    def tile(self, make, registers, kind):
        key = (*map(id, registers), kind)
        found = self.tiles.get(key)
        if found is None:
            if len(self.tiles) > 64:
                self.tiles.clear()
            # Registers are never written in place; kept here, their identities stay taken.
            found = self.tiles[key] = (make(registers, kind), registers)
        return found[0]

    def all_lanes(self, mask, what):
        if mask is not None and not mask.all():
            raise PtxError(f"{what} by {int(mask.sum())} lanes of a warp")

    # mma.sync and its operands

    def ldmatrix(self, address, count, transposed, mask):
        self.all_lanes(mask, "ldmatrix")
        at = address[: 8 * count]
        if (at % 16).any():
            raise PtxError("ldmatrix of a misaligned row")
        shared = self.cta.shared
        shared.check(at, 16)
        rows = at.reshape(count, 8)
        if not transposed:
            return list(shared.views["u4"][rows[:, ROW] // 4 + LANE % 4])
        low, high = (shared.views["u2"][rows[:, PAIR + i] // 2 + ROW] for i in (0, 1))
        return list(nx.joined(low, high))

    def stmatrix(self, address, values, transposed, mask):
        self.all_lanes(mask, "stmatrix")
        shared = self.cta.shared
        at = address[: 8 * len(values)]
        if (at % 16).any():
            raise PtxError("stmatrix of a misaligned row")
        shared.check(at, 16)
        for i, value in enumerate(values):
            low, high = nx.halves(value)
            rows = np.empty((8, 8), np.uint16)
            rows[ROW, PAIR], rows[ROW, PAIR + 1] = low, high
            if transposed:
                rows = rows.T
            for j, a in enumerate(at[8 * i : 8 * i + 8].tolist()):
                shared.bytes[a : a + 16] = np.ascontiguousarray(rows[j]).view(np.uint8)
                self.note_store(shared, slice(a, a + 16))

    def mma(self, shape, kinds, a, b, c, mask):
        self.all_lanes(mask, "mma")
        to, kind = kinds[0], kinds[1]
        if (shape, kind) not in MMA or to not in ("f32", "f16"):
            raise NotImplementedError(f"mma {shape} {kinds}")
        if shape == "m16n8k8" and kind != "tf32":
            zero = np.zeros(32, np.uint32)
            product = a_tile([*a, zero, zero], kind)[:, :8] @ b_tile(b, kind)
        else:
            product = self.tile(a_tile, a, kind) @ self.tile(b_tile, b, kind)
        product = product.reshape(-1)[SUM_PLACES]
        if to == "f32":
            return (product + np.stack(c)).astype(np.float32)
        for i in range(2):
            low, high = nx.halves(c[i])
            product[2 * i] += nx.f32_from_f16(low)
            product[2 * i + 1] += nx.f32_from_f16(high)
        return [nx.joined(nx.f16_from_f32(product[2 * i]), nx.f16_from_f32(product[2 * i + 1])) for i in range(2)]
