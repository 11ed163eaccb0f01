"""``norm_mlp``: the LN-1x1 unit for other models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from riformer_kernels import InputError, norm_mlp, numerics


def unit(channels=16, hidden=64, dtype=torch.float32, seed=0, pointwise=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

    tail = (1, 1) if pointwise else ()
    parameters = [
        draw(channels, scale=0.25, mean=1.0), draw(channels, scale=0.25),
        draw(hidden, channels, *tail, scale=channels**-0.5), draw(hidden, scale=0.5),
        draw(channels, hidden, *tail, scale=1.5 * hidden**-0.5), draw(channels, scale=0.25),
    ]  # fmt: skip
    return draw(3, channels, 7, 5, mean=0.5), parameters, draw(channels, scale=0.3, mean=0.5)


def eager(x, parameters, scale=None, norm="group", eps=1e-5, residual=True):
    weight, bias, w1, b1, w2, b2 = parameters
    if norm == "group":
        z = F.group_norm(x, 1, weight, bias, eps)
    else:
        z = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
    w1, w2 = (w.reshape(*w.shape[:2], 1, 1) for w in (w1, w2))
    y = F.conv2d(F.gelu(F.conv2d(z, w1, b1)), w2, b2)
    y = y if scale is None else y * scale.view(1, -1, 1, 1)
    return x + y if residual else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values(backend, dtype, norm, residual, channels_last):
    x, parameters, scale = unit(32, 96, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    before = x.clone()
    golden = eager(x.double(), [p.double() for p in parameters], scale.double(), norm, residual=residual)
    found = norm_mlp(x, *parameters, norm=norm, layer_scale=scale, residual=residual, backend=backend)
    plain = eager(x.contiguous(), parameters, scale, norm, residual=residual)
    ratios = numerics.compare(found, plain, golden)
    assert ratios.passed, ratios.exceeded
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout) and torch.equal(x, before)


def test_options(backend):
    x, parameters, _ = unit(pointwise=True)
    golden = eager(x.double(), [p.double() for p in parameters], eps=0.1)
    assert torch.allclose(norm_mlp(x, *parameters, eps=0.1, backend=backend).double(), golden, atol=1e-5)
    no_bias = [*parameters[:3], None, parameters[4], None]
    golden = eager(x, no_bias)
    assert torch.allclose(norm_mlp(x, *no_bias, backend=backend), golden, atol=1e-5)
    assert norm_mlp(x[:0], *parameters, backend=backend).shape == (0, 16, 7, 5)


def test_moments_flow_from_unit_to_unit(backend):
    x, parameters, scale = unit()
    y, moments = norm_mlp(x, *parameters, layer_scale=scale, return_moments=True, backend=backend)
    assert moments.shape == (3, 2, 16) and moments.dtype == torch.float32
    assert torch.allclose(moments[:, 0], y.mean((2, 3)), atol=1e-5)
    again = norm_mlp(y, *parameters, moments=moments, backend=backend)
    assert torch.allclose(again, norm_mlp(y, *parameters, backend=backend), atol=1e-5)
    other = torch.stack((moments[:, 0] + 1, moments[:, 1]), 1)
    assert not torch.allclose(norm_mlp(y, *parameters, moments=other, backend=backend), again, atol=1e-2), (
        "they are read"
    )


def test_parameters_of_another_dtype(backend):
    x, parameters, scale = unit()
    found = norm_mlp(x.bfloat16(), *parameters, layer_scale=scale, backend=backend)
    golden = eager(x.bfloat16().double(), [p.double() for p in parameters], scale.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - golden).abs().max() < 2e-2 * golden.abs().max()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_gradients(backend, norm):
    x, parameters, scale = unit()
    leaves = [value.clone().requires_grad_() for value in (x, *parameters, scale)]
    eager(leaves[0], leaves[1:7], leaves[7], norm).square().sum().backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    norm_mlp(leaves[0], *leaves[1:7], norm=norm, layer_scale=leaves[7], backend=backend).square().sum().backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert torch.allclose(leaf.grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_gradients_of_some_inputs_only(backend):
    x, parameters, _ = unit()
    parameters[4].requires_grad_()
    norm_mlp(x, *parameters, backend=backend).sum().backward()
    assert parameters[4].grad.abs().sum() > 0 and x.grad is None
    with torch.no_grad():
        assert not norm_mlp(x, *parameters, backend=backend).requires_grad


@pytest.mark.parametrize("plain", [False, True], ids=["", "reference"])
def test_autocast_is_ignored(backend, plain):
    backend = "reference" if plain else backend
    x, parameters, _ = unit()
    expected = norm_mlp(x, *parameters, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm_mlp(x, *parameters, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_views_and_compilation(backend):
    x, parameters, _ = unit()
    compiled = torch.compile(lambda x: norm_mlp(x, *parameters, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), norm_mlp(x, *parameters, backend=backend), atol=1e-6)
    wide = x.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(norm_mlp(wide, *parameters, backend=backend), norm_mlp(x, *parameters, backend=backend))


def _with(index, value):
    def change(x, parameters):
        parameters = list(parameters)
        parameters[index] = value(parameters[index])
        return x, parameters

    return change


BAD = [
    (lambda x, p: (x[0], p), {}, r"x must be tokens \[B, C, H, W\], found shape \(16, 7, 5\)"),
    (lambda x, p: (x.numpy(), p), {}, "found ndarray"),
    (lambda x, p: (x.int(), p), {}, "found torch.int32"),
    (lambda x, p: (x[..., :0], p), {}, "at least one position"),
    (lambda x, p: (x, p), {"norm": "batch"}, "norm must be 'group'.*found 'batch'"),
    (lambda x, p: (x, p), {"norm": "layer", "return_moments": True}, "moments belong to norm='group'"),
    (lambda x, p: (x, p), {"moments": torch.zeros(3, 2, 8)}, r"moments must have shape \(3, 2, 16\)"),
    (lambda x, p: (x, p), {"layer_scale": torch.ones(1)}, r"layer_scale must have shape \(16,\)"),
    (_with(0, lambda w: None), {}, "norm_weight must be a tensor"),
    (_with(1, lambda w: w[:8]), {}, r"norm_bias must have shape \(16,\).*found \(8,\)"),
    (_with(2, lambda w: w.t()), {}, r"fc1_weight must have shape"),
    (_with(3, lambda w: w[:-1]), {}, r"fc1_bias must have shape \(64,\)"),
    (_with(4, lambda w: w.t()), {}, r"fc2_weight must have shape \(16, 64\)"),
    (_with(5, lambda w: w.to("meta")), {}, "fc2_bias is on meta and x on cpu"),
    (_with(5, lambda w: w.int()), {}, "fc2_bias must be floating point"),
]


@pytest.mark.parametrize(("change", "options", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input(backend, change, options, message):
    x, parameters, _ = unit()
    x, parameters = change(x, parameters)
    with pytest.raises(InputError, match=message):
        norm_mlp(x, *parameters, backend=backend, **options)


def test_widths_of_the_native_kernels(backend):
    x, parameters, _ = unit(12, 20)
    if backend == "reference":
        assert torch.allclose(norm_mlp(x, *parameters, backend=backend), eager(x, parameters), atol=1e-5)
        return
    with pytest.raises(InputError, match="C=12 and hidden=20: the native kernels need multiples of 8"):
        norm_mlp(x, *parameters, backend=backend)
