"""``torch.library.opcheck`` on every op with four kinds of input, and the recomputed gradients against eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support_block import PARAMETERS, Block, block_parameters, eager_block
from support_cases import DTYPES, EPS, draws, lay_out, per_dtype, per_norm, tokens
from support_compare import outputs
from support_cpu import bindings
from support_embed import Embed, embed_parameters
from support_norm import eager_norm

from riformer_kernels import ops

OPS = bindings()
KINDS = ("contiguous", "channels_last", "empty", "requires_grad")
per_kind = pytest.mark.parametrize("kind", KINDS)


def shaped(x, kind):
    if kind == "requires_grad":
        return x.requires_grad_()
    if kind == "empty":
        return x[:0]
    return lay_out(x, "channels_last" if kind == "channels_last" else "nchw")


def needing(values, kind):
    """Parameters that need gradients too, as a model's do."""
    if kind != "requires_grad":
        return values
    return [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def arguments_of(op, kind, dtype=torch.float32, norm="gn", form="training"):
    flag = norm == "ln"
    draw = draws(0, dtype)
    if op == "embed":
        case = Embed(3, 8, dtype=dtype, size=(11, 9))
        return (shaped(tokens(case, 0, 3), kind), *needing(embed_parameters(case, 0).values(), kind), dtype, not flag)
    case = Block(16, (5, 7), dtype, norm, form, hidden=24)
    x = shaped(tokens(case, 0, 16), kind)
    if op == "moments":
        return (x,)
    moments = None if flag else OPS.moments(x.detach())
    if op in ("block", "block_"):
        parameters = block_parameters(case, 0)
        return (x, moments, *needing([parameters[name] for name in PARAMETERS], kind))
    if op == "norm":
        return (x, moments, *needing([draw(16), draw(16)], kind), EPS, flag, dtype)
    if op == "head":
        norm, fc = needing([draw(16), draw(16)], kind), needing([draw(10, 16), draw(10)], kind)
        return (x, moments, *norm, EPS, *fc, flag, dtype)
    raise KeyError(f"say here what the arguments of op {op!r} are")


@per_kind
@per_norm
@pytest.mark.parametrize("op", [name for name, op in ops.ALL.items() if not op.in_place])
def test_opcheck(op, kind, norm):
    torch.library.opcheck(getattr(OPS, op).default, arguments_of(op, kind, norm=norm), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "empty"])
@per_norm
def test_opcheck_in_place(kind, norm):
    """Without gradients: it overwrites its input, and a forward pass that needs gradients does not use it."""
    torch.library.opcheck(OPS.block_.default, arguments_of("block_", kind, norm=norm), atol=1e-4, rtol=1e-4)


def test_in_place_never_loses_a_gradient_in_silence():
    arguments = arguments_of("block_", "requires_grad")
    x = arguments[0].detach().clone().requires_grad_() * 1

    def written_and_differentiated():
        OPS.block_(x, *arguments[1:])
        x.sum().backward()

    with pytest.raises((RuntimeError, NotImplementedError)):
        written_and_differentiated()


@pytest.mark.parametrize("form", ["deployed", "unit"])
def test_opcheck_of_the_other_forms(form):
    torch.library.opcheck(OPS.block.default, arguments_of("block", "contiguous", form=form), atol=1e-4, rtol=1e-4)


@per_dtype
@per_norm
@per_kind
@pytest.mark.parametrize("op", [name for name, op in ops.ALL.items() if not op.in_place])
def test_fakes_tell_shape_dtype_and_strides(op, kind, norm, dtype):
    arguments = arguments_of(op, kind, dtype, norm)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        told = getattr(OPS, op).default(*fake)
    found = getattr(OPS, op).default(*arguments)
    for mine, theirs in zip(outputs(found), outputs(told), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


# ------------------------------------------------------------------------------------------------------- gradients


def gradients(function, leaves, weights):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    (out * weights.to(out.dtype)).sum().backward()
    return [leaf.grad for leaf in leaves]


def compare_gradients(ours, eager, golden, names, dtype):
    """Each gradient's RMS error within twice eager's, or within the last digit of what it is."""
    for name, mine, theirs, exact in zip(names, ours, eager, golden, strict=True):
        assert mine.shape == exact.shape and mine.dtype == dtype, name
        error, other = (mine - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
        digit = torch.finfo(dtype).eps * exact.square().mean().sqrt()
        assert error <= 2 * other + digit, f"{name}: {error:.3g}, eager {other:.3g}, last digit {digit:.3g}"


@per_norm
@pytest.mark.parametrize("form", ["training", "deployed", "unit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_block(norm, form, dtype):
    case = Block(16, (9, 7), dtype, norm, form, hidden=40)
    parameters = block_parameters(case, 0)
    names = [name for name, value in parameters.items() if isinstance(value, torch.Tensor)]
    leaves = [tokens(case, 0, 16), *(parameters[name] for name in names)]
    weights = draws(7, torch.float64)(*leaves[0].shape)

    def native(x, *values):
        changed = parameters | dict(zip(names, values, strict=True))
        moments = None if norm == "ln" else OPS.moments(x)
        return OPS.block(x, moments, *(changed[name] for name in PARAMETERS))[0]

    def plain(x, *values):
        return eager_block(x, parameters | dict(zip(names, values, strict=True)))

    golden = gradients(plain, [leaf.double() for leaf in leaves], weights)
    compare_gradients(
        gradients(native, leaves, weights), gradients(plain, leaves, weights), golden, ["x", *names], dtype
    )


def check_gradients(native, plain, leaves, weights, names):
    """The gradients of ``native`` against those of ``plain`` in float32, and in float64 for golden."""
    golden = gradients(plain, [leaf.double() for leaf in leaves], weights)
    ours, eager = gradients(native, leaves, weights), gradients(plain, leaves, weights)
    compare_gradients(ours, eager, golden, names, torch.float32)


@per_norm
def test_gradients_of_norm_and_head(norm):
    draw = draws(0, torch.float32)
    leaves = [draw(3, 16, 9, 7), draw(16, mean=1.0), draw(16)]
    flag = norm == "ln"

    def moments(x):
        return None if flag else OPS.moments(x)

    def native_norm(x, weight, bias):
        return OPS.norm(x, moments(x), weight, bias, EPS, flag, torch.float32)

    def plain_norm(x, weight, bias):
        return eager_norm(x, weight, bias, EPS, flag)

    weights = draws(7, torch.float64)(3, 16, 9, 7)
    check_gradients(native_norm, plain_norm, leaves, weights, ["x", "weight", "bias"])

    def native_head(x, weight, bias, fc_weight, fc_bias):
        return OPS.head(x, moments(x), weight, bias, EPS, fc_weight, fc_bias, flag, torch.float32)

    def plain_head(x, weight, bias, fc_weight, fc_bias):
        return F.linear(plain_norm(x, weight, bias).mean((2, 3)), fc_weight, fc_bias)

    leaves += [draw(10, 16), draw(10)]
    weights = draws(7, torch.float64)(3, 10)
    check_gradients(native_head, plain_head, leaves, weights, ["x", "weight", "bias", "fc_weight", "fc_bias"])


def test_gradients_of_embed_and_moments():
    draw = draws(0, torch.float32)
    leaves = [draw(2, 3, 17, 20), draw(8, 3, 7, 7), draw(8)]

    def native_embed(x, weight, bias):
        return OPS.embed(x, weight, bias, 4, 2, torch.float32, True)[0]

    def plain_embed(x, weight, bias):
        return F.conv2d(x, weight, bias, 4, 2)

    check_gradients(native_embed, plain_embed, leaves, draws(7, torch.float64)(2, 8, 4, 5), ["x", "weight", "bias"])

    def plain_moments(x):
        values = x.flatten(2)
        return torch.stack((values.mean(2), values.var(2, unbiased=False) * values.shape[2]), 1)

    leaves, weights = [draw(2, 8, 17, 20)], draws(7, torch.float64)(2, 2, 8)
    check_gradients(OPS.moments, plain_moments, leaves, weights, ["x"])
