"""Random shapes, dtypes, layouts and instruction sets. A failure prints a blob: `@reproduce_failure` runs it again."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support_block import PARAMETERS, Block, block_parameters, check_block
from support_cases import DTYPES, LAYOUTS, check_again, draws, lay_out, tokens
from support_cpu import CPU, ISAS, OPS, selected
from support_embed import Embed, check_embed, embed_parameters
from support_head import check_head
from support_moments import check_moments
from support_norm import check_norm

from riformer_kernels.machine import threads

LIMIT = 8_000_000  # multiply-adds of one call: a plain C++ product does a thousand million of them in a second
PROFILE = settings(
    deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")), max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip

isas = st.sampled_from(ISAS or ("none",))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
norms = st.sampled_from(("gn", "ln"))
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))
eights = st.integers(1, 20).map(lambda n: 8 * n)
seeds = st.integers(0, 1000)
batches = st.integers(1, 4)

blocks = st.builds(
    Block, channels=eights, size=sizes, dtype=dtypes, norm=norms,
    form=st.sampled_from(("training", "deployed", "unit")),
    residual=st.booleans(), layout=layouts, batch=batches, hidden=st.integers(1, 48).map(lambda n: 8 * n),
    parameters=st.none() | dtypes, seed=seeds,
)  # fmt: skip
any_blocks = st.builds(lambda case, int8: replace(case, int8=int8), case=blocks, int8=st.booleans())


@given(isa=isas, case=blocks)
@PROFILE
def test_block(isa, case):
    assume(case.work <= LIMIT)
    with selected(isa):
        check_again(lambda drawn: check_block(CPU.block, drawn, isa), case)


kernels = st.sampled_from(
    [((7, 7), 4, 2), ((3, 3), 2, 1), ((3, 3), 1, 1), ((2, 2), 2, 0), ((1, 1), 1, 0), ((4, 5), 3, 2)]
)
embeds = st.builds(
    lambda shape, **options: Embed(kernel=shape[0], stride=shape[1], padding=shape[2], **options),
    shape=kernels, in_channels=st.integers(1, 20), channels=st.integers(1, 70),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    dtype=dtypes, images=st.none() | dtypes, parameters=st.none() | dtypes, layout=layouts,
    weight_layout=st.sampled_from(("nchw", "channels_last", "strided")), bias=st.booleans(), batch=batches, seed=seeds,
)  # fmt: skip


@given(isa=isas, case=embeds)
@PROFILE
def test_embed(isa, case):
    assume(case.work <= LIMIT)
    if case.dtype == torch.float32 and case.kernel != (7, 7):
        # Eager's own NCHW and channels_last sums differ by more than the rule allows for small depths; the grid of
        # test_embed.py has the model's.
        case = Embed(**{**vars(case), "layout": "nchw", "weight_layout": "nchw"})
    with selected(isa):
        check_again(lambda drawn: check_embed(CPU.embed, drawn, isa), case)


@given(
    isa=isas,
    channels=st.integers(1, 70),
    size=sizes,
    dtype=dtypes,
    norm=norms,
    layout=layouts,
    batch=batches,
    seed=seeds,
)
@PROFILE
def test_norm_and_moments(isa, channels, size, dtype, norm, layout, batch, seed):
    # Statistics of a handful of values: by chance they are nearly equal, and what is compared is chance.
    assume((channels if norm == "ln" else channels * size[0] * size[1]) >= 8)
    case = Block(channels, size, dtype, norm, layout=layout, batch=batch, seed=seed)
    with selected(isa):
        check_again(lambda drawn: check_norm(CPU.norm, drawn, isa), case)
        x = tokens(case, seed, channels)
        check_moments(OPS.moments(x), x, f"{isa} {case}")


@given(isa=isas, channels=st.integers(2, 70), size=st.tuples(st.integers(1, 8), st.integers(1, 8)), dtype=dtypes,
       norm=norms, classes=st.integers(33, 70), batch=st.integers(12, 40), seed=seeds)  # fmt: skip
@PROFILE
def test_head(isa, channels, size, dtype, norm, classes, batch, seed):
    with selected(isa):
        case = Block(channels, size, dtype, norm, batch=batch, seed=seed)
        check_again(lambda drawn: check_head(CPU.head, drawn, classes, isa), case)


@given(isa=isas, case=any_blocks, count=st.integers(1, 4), data=st.data())
@PROFILE
def test_bits_do_not_depend_on_company_layout_or_threads(isa, case, count, data):
    assume(case.work <= LIMIT // 4)
    case = Block(**{**vars(case), "layout": "nchw"})
    x, parameters = tokens(case, case.seed, case.channels), block_parameters(case, case.seed)
    with selected(isa):
        out, moments = CPU.block(x, parameters)
        image = data.draw(st.integers(0, case.batch - 1), label="image")
        layout = data.draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]), label="layout")
        with threads(count):
            alone, alone_moments = CPU.block(lay_out(x[image : image + 1], layout), parameters)
            assert torch.equal(alone[0], out[image]) and torch.equal(alone_moments[0], moments[image])
            own = lay_out(x, layout).clone()
            held = None if case.norm == "ln" else OPS.moments(x)
            OPS.block_(own, held, *(parameters[name] for name in PARAMETERS))
        assert torch.equal(own, out) and (held is None or torch.equal(held, moments))


@given(isa=isas, case=embeds, count=st.integers(1, 4), data=st.data())
@PROFILE
def test_bits_of_embed_do_not_depend_on_company_or_threads(isa, case, count, data):
    assume(case.work <= LIMIT // 4)
    x, parameters = tokens(case, case.seed, case.in_channels), embed_parameters(case, case.seed)
    with selected(isa):
        out, moments = CPU.embed(x, parameters, case.dtype)
        image = data.draw(st.integers(0, case.batch - 1), label="image")
        layout = data.draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]), label="layout")
        with threads(count):
            alone, alone_moments = CPU.embed(lay_out(x[image : image + 1], layout), parameters, case.dtype)
        assert torch.equal(alone[0], out[image]) and torch.equal(alone_moments[0], moments[image])
        assert torch.equal(OPS.moments(out), moments)


@given(isa=isas, dtype=dtypes, norm=norms, size=sizes, scale=st.floats(-6, 6), seed=seeds)
@PROFILE
def test_finite_in_finite_out(isa, dtype, norm, size, scale, seed):
    """Whatever the scale of the tokens, a result that float64 has within the dtype's range is finite."""
    case = Block(16, size, dtype, norm, hidden=24)
    x = (draws(seed, torch.float32)(2, 16, *size) * 10.0**scale).clamp(-6e4, 6e4).to(dtype)
    with selected(isa):
        out, moments = CPU.block(x, block_parameters(case, seed))
    assert moments.isfinite().all() or norm == "ln"
    assert out.isfinite().all() or (dtype == torch.float16 and x.abs().max() > 1e4)
