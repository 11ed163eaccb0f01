"""Whole models on a GPU: numbers, bits, graphs, streams, threads, bad input and the engine, for both GPU backends.

The ops by themselves are in the conformance suite (`tests/conformance`), which runs on a GPU as well. Everything is
skipped, with the reason, where there is no GPU: `pytest -m gpu`, with `-k "not triton"` or `-k triton` for one of the
backends. What can be known without a GPU is in `test_triton.py`, `test_triton_ahead.py`, `test_cuda.py` and
`test_cuda_build.py`.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_block import PARAMETERS, Block, block_parameters
from support_cases import DTYPES, check_ratios, tokens
from support_gpu import GPU_MARKS, REASONS
from support_target import Target, load

import riformer_kernels
from riformer_kernels import BackendError, Engine, InputError

pytestmark = [*GPU_MARKS, pytest.mark.usefixtures("exact_float32")]

ARCHS = ("s12", "s24", "s36", "m36", "m48")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=REASONS, autouse=True)
def name(request) -> str:
    """The backend under test."""
    if reason := REASONS[request.param]:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.fixture
def target(name) -> Target:
    """Its ops."""
    return load(name)


@pytest.fixture
def patched(name):
    """Patches a model with it, unverified unless said otherwise."""

    def patch(model, **options):
        riformer_kernels.patch(model, **({"verify": False, "backend": name} | options))
        return model

    return patch


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def model_of(arch="s12", dtype=torch.float32, classes=1000, deploy=True, norm="gn") -> RIFormer:
    norm_options = {} if norm == "gn" else {"norm": norm}
    return randomize_(RIFormer(arch, num_classes=classes, deploy=deploy, **norm_options), 0).to(dtype).eval().cuda()


def images_of(batch, size, dtype, layout="nchw", seed=0) -> torch.Tensor:
    x = torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()
    return x.contiguous(memory_format=FORMATS[layout])


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.slow
@per_dtype
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("size", "batch"), [(224, 1), (224, 3), (224, 64), (384, 1), (384, 3)])
@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_model(name, arch, size, batch, layout, dtype):
    model = model_of(arch, dtype).to(memory_format=FORMATS[layout])
    x = images_of(batch, size, dtype, layout)
    few = slice(0, 4)  # float64 is slow; batch invariance has a test of its own
    eager, golden = model(x)[few], copy.deepcopy(model).double()(x[few].double())
    handle = riformer_kernels.patch(model, image_size=size, backend=name)
    assert all(row.backend.startswith(name) for row in handle.report), str(handle)
    check_ratios(model(x)[few], eager, golden, f"{name} {arch} {dtype} {layout} {size} batch {batch}")


@per_dtype
@pytest.mark.parametrize("deploy", [True, False])
@torch.inference_mode()
def test_features_and_training_form(patched, dtype, deploy):
    model = model_of("s12", dtype, classes=0, deploy=deploy)
    x = images_of(2, 97, dtype)
    eager, golden = model(x), copy.deepcopy(model).double()(x.double())
    for index, found in enumerate(patched(model)(x)):
        check_ratios(found, eager[index], golden[index], f"stage {index} {dtype} deploy={deploy}")


# -------------------------------------------------------------------------------------------------------------- bits


@per_dtype
@pytest.mark.parametrize("arch", ["s12", "m36"])
@torch.inference_mode()
def test_same_bits_again_alone_and_in_any_batch(patched, arch, dtype):
    model = patched(model_of(arch, dtype))
    x = images_of(67, 224, dtype)
    out = model(x)
    assert all(torch.equal(model(x), out) for _ in range(5))
    for index in (0, 1, 31, 66):
        assert torch.equal(model(x[index : index + 1])[0], out[index])
    assert torch.equal(model(x[3:40]), out[3:40])
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), out)


@per_dtype
@torch.inference_mode()
def test_a_graph_replays_the_same_bits_on_new_images_and_new_weights(patched, dtype):
    model = patched(model_of("s12", dtype))
    static, other = images_of(3, 224, dtype), images_of(3, 224, dtype, seed=1)
    model(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    for x in (other, static.clone()):
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, model(x))
    model.network[4][1].mlp.fc1.bias.data.mul_(-1)
    graph.replay()
    assert torch.equal(out, model(static))


@torch.inference_mode()
def test_two_streams_and_two_threads(patched):
    model = patched(model_of("s12", torch.bfloat16))
    inputs = [images_of(5, 224, torch.bfloat16, seed=seed) for seed in range(8)]
    expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = [None] * len(inputs)
    for index, x in enumerate(inputs):
        with torch.cuda.stream(streams[index % 2]):
            found[index] = model(x)
    torch.cuda.synchronize()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    wrong = []

    def work(start: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(streams[start]):
            rounds = list(range(start, len(inputs), 2)) * 5
            wrong.extend(index for index in rounds if not torch.equal(model(inputs[index]), expected[index]))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@torch.inference_mode()
def test_no_synchronisation_and_no_other_kernel(name, patched):
    """Between input and logits: our launches and nothing else. In CUDA C++ the convolutions' weights are read as a
    channels_last model has them; Triton's kernels reorder others."""
    model = model_of("s12", torch.bfloat16)
    model = patched(model.to(memory_format=torch.channels_last) if name == "cuda" else model)
    x = images_of(2, 224, torch.bfloat16)
    model(x)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    if not any("fused_kernel" in kernel or "riformer" in kernel for kernel in names):
        pytest.skip("the profiler sees no kernels on this machine")
    strangers = {kernel for kernel in names if any(other in kernel for other in ("at::native", "cudnn", "cublas"))}
    assert not strangers, strangers


@torch.inference_mode()
def test_a_device_that_is_not_the_current_one(target):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    block, moments = target.ops["block"], target.ops["moments"]
    case = Block(96, (9, 7), torch.bfloat16)
    x, parameters = tokens(case, 0, 96), [block_parameters(case, 0)[key] for key in PARAMETERS]

    def there(value):
        return value.to("cuda:1") if isinstance(value, torch.Tensor) else value

    found = block(there(x), moments(there(x)), *map(there, parameters))[0]
    assert torch.cuda.current_device() == 0 and found.device.index == 1
    assert torch.equal(found.cpu(), block(on_gpu(x), moments(on_gpu(x)), *map(on_gpu, parameters))[0].cpu())
    if target.name == "cuda":
        with pytest.raises(RuntimeError, match=r"is on cuda:0 and the tokens are on cuda:1; move one of them"):
            block(there(x), moments(there(x)), *map(on_gpu, parameters))


@torch.inference_mode()
def test_offsets_beyond_2_31(patched):
    """Tokens of the first stage pass 2^31 elements; the last image has to be right."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("less than 40 GB of GPU memory are free")
    model = patched(model_of("s12", torch.bfloat16))
    count = 2**31 // (64 * 56 * 56) + 2
    x = images_of(1, 224, torch.bfloat16).expand(count, -1, -1, -1)
    assert torch.equal(model(x)[-1], model(x[:1])[0])


# ---------------------------------------------------------------------------------------------------- contract, engine


@torch.inference_mode()
def test_fresh_weights(patched):
    model, x = patched(model_of("s12", torch.bfloat16)), images_of(2, 224, torch.bfloat16)
    before = model(x)
    state = {name: value.flip(0) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    changed = model(x)
    assert not torch.equal(changed, before)
    riformer_kernels.unpatch(model)
    reference = model(x)
    assert (changed - reference).abs().max() < 0.1 * reference.abs().max()


@torch.inference_mode()
def test_bad_input_and_moves(name, patched):
    model, x = patched(model_of("s12")), images_of(2, 224, torch.float32)
    expected = model(x)
    with pytest.raises(InputError, match="found images on cpu"):
        model(x.cpu())
    assert torch.equal(model(x), expected)
    explicit = patched(model_of("s12"), backend=name).cpu()
    with pytest.raises(BackendError, match="it serves cuda tensors"):
        explicit(x.cpu())
    assert torch.equal(explicit.cuda()(x), expected)


def test_compile_and_opcheck(target, patched):
    model, x = patched(model_of("s12", torch.bfloat16)), images_of(2, 224, torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))
    case = Block(24, (9, 7), torch.float16)
    for layout in FORMATS:
        values = tokens(case, 0, 24).cuda().contiguous(memory_format=FORMATS[layout])
        arguments = [on_gpu(value) for value in block_parameters(case, 0).values()]
        torch.library.opcheck(
            target.ops["block"].default, (values, target.ops["moments"](values), *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_engine(patched, device):
    model = patched(model_of("s12", torch.bfloat16), image_size=96)
    engine = Engine(model, (1, 4, 16), 96)
    for count in (0, 1, 3, 4, 16, 21):
        x = images_of(count, 96, torch.bfloat16)
        with torch.inference_mode():
            expected = model(x).to(device)
        assert torch.equal(engine(x.to(device)), expected)
    x = images_of(3, 96, torch.bfloat16)
    model.head.fc.bias.data.add_(1)
    assert torch.equal(engine(x), model_now(model, x)), "a change in place"
    model.head.fc.bias = torch.nn.Parameter(model.head.fc.bias.detach() * 2)
    assert torch.equal(engine(x), model_now(model, x)), "a parameter replaced"


@torch.inference_mode()
def model_now(model, x):
    return model(x)


def test_engine_of_many_threads(patched):
    model = patched(model_of("s12", torch.bfloat16), image_size=96)
    engine = Engine(model, (1, 4), 96)
    inputs = [images_of(1 + index % 6, 96, torch.bfloat16, seed=index) for index in range(12)]
    expected, wrong = [model_now(model, x) for x in inputs], []
    torch.cuda.synchronize()  # the threads' streams do not wait for this one, which has made inputs and results

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for index in list(range(start, 12, 3)) * 10:
                x = inputs[index].cpu() if index % 2 else inputs[index]
                if not torch.equal(engine(x).cuda(), expected[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_out_of_memory_leaves_everything_usable(patched):
    model = patched(model_of("s12", torch.bfloat16), image_size=96)
    x = images_of(2, 96, torch.bfloat16)
    expected = model_now(model, x)
    total = torch.cuda.get_device_properties(0).total_memory
    too_many = int(total // (3 * 96 * 96 * 2)) + 1
    with pytest.raises(riformer_kernels.MemoryLimitError, match="Tried to allocate"):
        Engine(model, (too_many,), 96)
    assert torch.equal(Engine(model, (2,), 96)(x), expected) and torch.equal(model_now(model, x), expected)
