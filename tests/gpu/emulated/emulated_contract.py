"""What the bindings of the CUDA kernels do besides what `test_errors.py` and `test_opcheck.py` ask of all bindings."""

from __future__ import annotations

import pytest
import torch
from support_block import PARAMETERS, Block, block_parameters
from support_cases import tokens
from support_cpu import bindings
from support_emulated import OPS

from riformer_kernels import ops


def test_these_are_the_emulated_ops():
    assert bindings() is OPS and OPS.block.default._schema.name == "riformer_emulated::block"


@pytest.mark.parametrize("op", [name for name in ops.ALL if name not in ("block", "block_")])  # see test_errors.py
def test_widths_that_rows_of_16_bytes_do_not_allow(op):
    x, ones = torch.ones(2, 12, 3, 3), torch.ones(12)
    arguments = {
        "moments": (x,),
        "norm": (x, torch.ones(2, 2, 12), ones, ones, 1e-5, False, torch.float32),
        "head": (x, torch.ones(2, 2, 12), ones, ones, 1e-5, torch.ones(4, 12), None, False, torch.float32),
        "embed": (x, torch.ones(12, 12, 3, 3), ones, 1, 1, torch.float32, True),
    }
    with pytest.raises(RuntimeError, match=f"{op}: 12 channels, expected a multiple of 8; use backend='reference'"):
        getattr(OPS, op)(*arguments[op])


def test_an_in_place_call_that_needs_a_gradient_names_the_way_out():
    case = Block(16, (3, 3), hidden=24)
    x, parameters = tokens(case, 0, 16).requires_grad_(), block_parameters(case, 0)
    with pytest.raises(
        RuntimeError, match=r"riformer_emulated::block_ has no gradient.*call riformer_emulated::block,"
    ):
        OPS.block_(x, OPS.moments(x.detach()), *(parameters[name] for name in PARAMETERS))


def test_a_write_in_place_is_counted():
    case = Block(16, (3, 3), hidden=24)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    found = OPS.moments(x)
    before = x._version, found._version
    OPS.block_(x, found, *(parameters[name] for name in PARAMETERS))
    assert x._version > before[0] and found._version > before[1]
