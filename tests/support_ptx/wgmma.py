"""wgmma: descriptors, products of a warpgroup, and what may not be touched while one is under way.

A warp's quarter of a product reads its operands from shared memory either when it is issued or when it is waited for,
at random, and its sums appear at the wait; until then their registers hold NaN.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np

from . import arithmetic as nx
from .memory import PtxError
from .tensor_core import ELEMENT, PAIR, ROW, a_tile, unpacked
from .tensor_map import swizzle

# What a sum holds while it is computed, by how its register is stored.
POISON = {"f4": np.full(32, np.nan, np.float32), "u4": np.full(32, 0xFFFFFFFF, np.uint32)}


class Wgmma:
    """The part of a warp that starts products of a warpgroup and waits for them."""

    def init_wgmma(self):
        self.fenced = None  # the registers as they were at the last wgmma.fence
        self.open_products, self.product_groups = [], []
        self.shadow = {}  # sums under way: register -> values, or None while they are not computed
        self.products = 0

    def wgmma_fence(self, mask):
        self.all_lanes(mask, "wgmma.fence")
        self.fenced = list(self.R)

    def wgmma_commit(self, mask):
        self.all_lanes(mask, "wgmma.commit_group")
        self.product_groups.append(self.open_products)
        self.open_products = []

    def wgmma_wait(self, pending, mask):
        """False while another warp of the warpgroup has not issued what is waited for: only the four together start it
        (CUTLASS lets one warp release a stage for all four)."""
        self.all_lanes(mask, "wgmma.wait_group")
        due = self.product_groups[: max(len(self.product_groups) - pending, 0)]
        if any(product.issued[1] < 4 for group in due for product in group):
            return False
        # It is over for all four then: none of them reads its operands later.
        for sibling in (s for group in due for product in group for s in product.issued[2]):
            if sibling.right is None:
                sibling.read()
            sibling.mark(-1)
        waited = set()
        while len(self.product_groups) > pending:
            for product in self.product_groups.pop(0):
                product.finish()
                waited.update(product.registers)
        still = {r for g in [*self.product_groups, self.open_products] for p in g for r in p.registers}
        for register in waited - still:
            if not self.poisoned(register):
                raise PtxError(f"register {register} was written while wgmma was computing it")
            self.R[register] = self.shadow.pop(register).view(self.R[register].dtype)
            if self.fenced is not None:
                # Sums of earlier products need no fence before the next product of the same shape.
                self.fenced[register] = self.R[register]
        return True

    def wgmma_problem(self):
        if self.open_products or self.product_groups:
            return "wgmma that was never waited for"
        return None

    def wgmma(self, line, shape, kinds, registers, a, a_registers, b, scale, rest, mask):
        self.all_lanes(mask, "wgmma")
        if self.index // 4 * 4 + 4 > len(self.cta.warps):
            raise PtxError("wgmma by an incomplete warpgroup")
        if kinds[0] != "f32" or kinds[1] not in ("f16", "bf16", "tf32"):
            raise NotImplementedError(f"wgmma {kinds}")
        for register in (*registers, *a_registers):
            if not self.is_fenced(register):
                raise PtxError(f"PTX line {line}: wgmma uses a register that was written since the last wgmma.fence")
        for register in a_registers:
            if self.poisoned(register):
                raise PtxError("wgmma reads sums as its A before they are waited for")
        # All warps of the warpgroup run the same products in the same order.
        descriptors = (self.uniform(b, mask, "descriptor"), self.uniform(a, mask, "descriptor") if a is not None else 0)
        key = (line, descriptors, bool(self.uniform(scale.astype(np.int64), mask, "scale-d")))
        log = self.cta.wgmma_log.setdefault((self.index // 4, self.products), [key, 0, []])
        if log[0] != key:
            raise PtxError(f"the warps of a warpgroup run different products: {log[0]} and {key}")
        log[1] += 1
        self.products += 1
        if log[1] == 4:
            del self.cta.wgmma_log[self.index // 4, self.products - 1]
            self.cluster.progress += 1
        product = Product(self, shape, kinds[1], registers, a_registers, descriptors, key[2], rest)
        product.issued = log
        log[2].append(product)
        self.open_products.append(product)
        for register in registers:
            if register not in self.shadow:
                self.shadow[register] = self.R[register].view(np.float32)
            self.R[register] = POISON[self.R[register].dtype.str[1:]]

    def is_fenced(self, register):
        """Whether wgmma may use it: it was written before the last fence, or by a product that is still under way.

        A copy of what some register held at the fence passes too, which by the manual it would not: Triton's compiler
        moves such copies behind the fence, and ptxas moves them back before it (read in the machine code of
        `_fused_kernel` for sm_90, Triton 3.7.1).
        """
        if self.fenced is None:
            return False
        value = self.R[register]
        if self.fenced[register] is value or self.poisoned(register):
            return True
        return any(value is held for held in self.fenced)

    def poisoned(self, register):
        value = self.R[register]
        return value is POISON["f4"] or value is POISON["u4"]


class Product:
    """A warp's 16 rows of one wgmma."""

    def __init__(self, warp, shape, kind, registers, a_registers, descriptors, add, rest):
        self.warp, self.kind, self.registers, self.add = warp, kind, registers, add
        m, rest_of = shape[1:].split("n")
        n, k = rest_of.split("k")
        self.n, self.k = int(n), int(k)
        if m != "64" or self.n % 8 or not 8 <= self.n <= 256 or len(registers) != self.n // 2:
            raise PtxError(f"wgmma {shape} with {len(registers)} sums")
        if self.k * ELEMENT[kind] != 32:
            raise PtxError(f"wgmma {shape} of {kind}")
        self.sign_a, self.sign_b, self.transpose_a, self.transpose_b = rest
        self.b, self.a = descriptors
        self.held = [(r, warp.R[r]) for r in a_registers]
        self.left = a_tile([warp.R[r].view(np.uint32) for r in a_registers], kind) if a_registers else None
        self.right = None
        self.reads = [self.offsets(self.b, 0, self.n, self.transpose_b)]
        if self.left is None:
            self.reads.append(self.offsets(self.a, 16 * (warp.index % 4), 16, self.transpose_a))
        self.marked = 0
        self.mark(1)
        if warp.launch.random.random() < 0.5:
            self.read()

    def mark(self, change):
        """Keeps account of what is read while the product is under way."""
        if self.marked + change in (0, 1):
            self.marked += change
            shared = self.warp.cta.shared
            shared.readers += change
            for offsets in self.reads:
                shared.reading[offsets] += change

    def offsets(self, descriptor, first, rows, transposed):
        return operand_offsets(descriptor, first, rows, self.k, ELEMENT[self.kind], transposed)

    def read(self):
        if self.left is None:
            first = 16 * (self.warp.index % 4)
            self.left = self.matrix(self.a, first, 16, self.transpose_a)
        self.right = self.matrix(self.b, 0, self.n, self.transpose_b)

    def finish(self):
        if self.right is None:
            self.read()
        if any(self.warp.R[r] is not array for r, array in self.held):
            raise PtxError("a register of wgmma's A was written before the product was waited for")
        total = self.left @ self.right.T
        if self.sign_a * self.sign_b < 0:
            total = -total
        shadow = self.warp.shadow
        values = total.reshape(-1)[product_places(self.n)]
        if self.add:
            values += np.stack([shadow[r] for r in self.registers])
        shadow.update(zip(self.registers, values.astype(np.float32), strict=True))

    def matrix(self, descriptor, first, rows, transposed):
        """[rows, k] of an operand; `first`: of its rows (m or n)."""
        offsets = self.offsets(descriptor, first, rows, transposed)
        shared = self.warp.cta.shared
        self.warp.check_fenced(offsets, "wgmma")
        size = ELEMENT[self.kind]
        raw = shared.load(offsets, f"u{size}", 1)[0]
        return (nx.widen(raw, self.kind) if size == 2 else unpacked(raw, "tf32")[..., 0]).astype(np.float64)


@cache
def product_places(n):
    """Where in a warp's 16 x n sums the values [register, lane] lie."""
    i = np.arange(n // 2)[:, None]
    return (ROW + 8 * (i % 4 // 2)) * n + 8 * (i // 4) + PAIR + i % 2


@lru_cache(maxsize=4096)
def operand_offsets(descriptor, first, rows, depth, size, transposed):
    """Addresses in shared memory of the elements [row, k] that a matrix descriptor describes (PTX ISA, "matrix
    descriptor" and "canonical layouts")."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    base_offset, mode = (descriptor >> 49) & 7, descriptor >> 62
    span = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    used = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
    if descriptor & ~used:
        raise PtxError(f"descriptor {descriptor:#x} with bits that mean nothing")
    if base_offset:
        raise NotImplementedError("base offset")
    r, k = (first + np.arange(rows))[:, None], np.arange(depth)[None, :]
    per = 16 // size  # elements of 16 bytes
    if not transposed:
        if mode == 0:
            linear = (r % 8) * 16 + (r // 8) * stride + (k // per) * leading
        else:
            # Within the span the 16-byte pieces follow each other; one instruction never leaves it.
            if (start % span) + 32 > span:
                raise PtxError("wgmma reads beyond the swizzle's span")
            linear = (r % 8) * span + (r // 8) * stride + (k // per) * 16
        linear = linear + (k % per) * size
    else:
        if size != 2:
            raise PtxError("only 16-bit operands can be transposed")
        if mode == 0:
            linear = (r % 8) * size + (r // 8) * stride + (k % 8) * 16 + (k // 8) * leading
        else:
            wide = span // size
            linear = (r % wide) * size + (r // wide) * leading + (k % 8) * span + (k // 8) * stride
    return swizzle(start + linear, span if mode else 1)
