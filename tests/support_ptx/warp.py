"""A warp: its lanes run together while they agree. When a branch divides them, the lanes at the smallest basic
block run first, until they meet again. No lane is ever held back for good: lanes that wait let others run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .codegen import BLOCKED, EXIT
from .copies import Copies
from .lanes import ALL, LANES, Lanes
from .memory import PtxError
from .spaces import Spaces
from .tensor_core import TensorCore
from .wgmma import Wgmma

if TYPE_CHECKING:
    from .cluster import Cta

ALL_BYTES, NONE_BYTES = ALL.tobytes(), np.zeros(32, bool).tobytes()


class Warp(Spaces, Lanes, Copies, TensorCore, Wgmma):
    def __init__(self, cta: Cta, index: int, threads: int):
        self.cta, self.index, self.launch, self.cluster = cta, index, cta.launch, cta.cluster
        self.program = cta.launch.program
        self.R = list(self.launch.fresh_registers)
        self.live = threads - 32 * index > LANES
        self.full = bool(self.live.all())
        self.pc = 0 if self.full else None
        self.pcs = np.where(self.live, 0, EXIT)
        self.stuck = np.zeros(32, bool)  # lanes that wait, while others of the warp may go on
        self.stuck_since = -1
        self.last_fence = 0
        self.done = False
        self.seen_progress = -1
        self.waits_for = None  # the instruction
        self.specials = {}
        self.threads = 32 * index + LANES
        self.local = None
        self.init_copies()
        self.init_tensor_core()
        self.init_wgmma()

    # Control.

    def run(self, blocks: int):
        """At most so many basic blocks; False when it cannot go on now."""
        program, moved = self.program, False
        for _ in range(blocks):
            if self.pc is not None:
                block = program.blocks[self.pc]
                following = self.step(block, False, None)
                if following == BLOCKED:
                    self.waits_for = program.kernel.instrs[block.first]
                    return moved
                moved = True
                if following is None:
                    self.pc = None
                elif following == EXIT:
                    self.done = True
                    return True
                else:
                    self.pc = following
            else:
                went = self.run_divided()
                if went is None:
                    self.done = True
                    return True
                if not went:
                    return moved
                moved = True
        return True

    def step(self, block, masked, mask):
        function = block.functions.get(masked) or self.program.function(block, masked)
        try:
            return function(self, mask)
        except PtxError as error:
            self.explain(error, function)
            raise
        except (NotImplementedError, IndexError, ValueError, TypeError, NameError) as error:
            self.explain(error, function)
            raise

    def explain(self, error, function):
        trace, line = error.__traceback__, 0
        while trace:
            if trace.tb_frame.f_code.co_name == function.__name__:
                line = function.ptx_lines[min(trace.tb_lineno - 1, len(function.ptx_lines) - 1)]
            trace = trace.tb_next
        error.add_note(
            f"{self.program.kernel.name}, PTX line {line}, thread block {self.cta.index}, warp {self.index}: "
            + next((i.text for i in self.program.kernel.instrs if i.line == line), "")[:160]
        )

    def run_divided(self):
        """The lanes at the smallest basic block that do not wait. None: all have ended; False: all wait."""
        pcs = self.pcs
        alive = pcs != EXIT
        if not alive.any():
            return None
        if self.stuck_since != self.cluster.progress:
            self.stuck = np.zeros(32, bool)
            self.stuck_since = self.cluster.progress
        ready = alive & ~self.stuck
        if not ready.any():
            return False
        at = int(pcs[ready].min())
        mask = ready & (pcs == at)
        block = self.program.blocks[at]
        if block.collective and (alive & ~mask).any():
            here = pcs == at
            if (alive & ~here).any():  # wait for the others to come here
                self.stuck = self.stuck | mask
                self.waits_for = self.program.kernel.instrs[block.first]
                return True
            mask = here
        if mask.all():
            self.pc = at
            self.stuck = np.zeros(32, bool)
            return True
        following = self.step(block, True, mask)
        if following == BLOCKED:
            self.stuck = self.stuck | mask
            self.waits_for = self.program.kernel.instrs[block.first]
            return True
        if following is not None:
            self.pcs = np.where(mask, following, self.pcs)
        self.stuck = np.zeros(32, bool)
        return True

    def branch(self, mask, condition, target, otherwise):
        if mask is None:
            packed = condition.tobytes()
            if packed == ALL_BYTES:
                return target
            if packed == NONE_BYTES:
                return otherwise
            self.pcs = np.where(condition, target, otherwise)
            self.stuck = np.zeros(32, bool)
            return None
        self.pcs = np.where(mask, np.where(condition, target, otherwise), self.pcs)
        return None

    def branch_table(self, mask, index, targets):
        where = np.array(targets)[np.minimum(index, len(targets) - 1).astype(int)]
        if mask is None:
            if (where == where[0]).all():
                return int(where[0])
            self.pcs = where
            return None
        self.pcs = np.where(mask, where, self.pcs)
        return None

    def trap(self, mask, what="trap"):
        if mask is None or mask.any():
            raise PtxError(what)

    # Values.

    def special(self, name, dtype):
        key = (name, dtype)
        if key not in self.specials:
            self.specials[key] = np.array(self.special_value(name) + np.zeros(32, np.int64)).astype(dtype)
        return self.specials[key]

    def special_value(self, name):
        launch, cta = self.launch, self.cta
        base, _, axis = name.partition(".")
        n = {"x": 0, "y": 1, "z": 2}.get(axis, 0)
        x, y, _ = launch.threads
        if base == "tid":
            return (self.threads % x, self.threads // x % y, self.threads // (x * y))[n]
        if base == "clock" or base == "clock64" or base == "globaltimer":
            return self.cluster.progress
        simple = {
            "ntid": launch.threads[n], "ctaid": cta.position[n], "nctaid": launch.grid[n], "laneid": LANES,
            "warpid": self.index, "cluster_ctarank": cta.rank, "cluster_nctarank": launch.cluster_size,
            "cluster_ctaid": (cta.rank, 0, 0)[n], "cluster_nctaid": launch.cluster[n],
            "clusterid": (cta.position[0] // launch.cluster[0], cta.position[1], cta.position[2])[n],
            "nclusterid": launch.grid[n] // launch.cluster[n], "smid": 0, "nsmid": 1,
            "dynamic_smem_size": launch.dynamic,
            "lanemask_lt": (1 << LANES) - 1, "lanemask_le": (2 << LANES) - 1, "lanemask_eq": 1 << LANES,
            "lanemask_ge": (-1 << LANES) & 0xFFFFFFFF, "lanemask_gt": (-2 << LANES) & 0xFFFFFFFF,
        }  # fmt: skip
        if base not in simple:
            raise NotImplementedError(f"%{name}")
        return simple[base]

    def activemask(self, mask):
        value = 0xFFFFFFFF if mask is None else int((mask.astype(np.int64) << LANES).sum())
        return np.full(32, value, np.uint32)
