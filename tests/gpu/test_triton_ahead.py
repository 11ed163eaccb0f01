"""What the compiler makes of every Triton kernel with every entry of the table, for GPUs that need not be there:
registers, spills, shared memory and matrix instructions. Compiled, not run."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from riformer_kernels.backends.triton import ahead, block, choice, embed
from riformer_kernels.backends.triton._math import gelu

MATRIX_KERNELS = ("_fused_kernel", "_expand_kernel", "_project_kernel", "_conv_kernel")
INSTRUCTIONS = {90: ("wgmma.mma",), 100: ("tcgen05.mma", "wgmma.mma", "mma.sync")}
# Programs of a 16-bit matrix kernel that have to fit on a multiprocessor.
LEAST_PROGRAMS = 1

_rows: list[tuple[str, int, ahead.Compiled]] = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Printed at the end (`pytest -s`, and in the log of a failure), so that a regression is seen."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(ahead.lines([row for row in _rows if row[2].matrix or row[2].registers > 128])))


def compiled(launches: list, architecture: int, dtype: torch.dtype) -> list[ahead.Compiled]:
    found = []
    for launch in launches:
        result = ahead.compile_launch(launch, architecture)
        _rows.append((str(dtype).removeprefix("torch."), ahead.width_of(launch), result))
        found.append(result)
    return found


def check(results: list[ahead.Compiled], dtype: torch.dtype) -> None:
    wrong = []
    for result in results:
        architecture = result.architecture
        if result.stack:
            wrong.append(f"{result}: {result.stack} bytes of stack per thread: registers spill")
        if result.shared > choice.SHARED_MEMORY[architecture]:
            wrong.append(f"{result}: more shared memory than sm_{architecture} has")
        if result.programs_per_processor < LEAST_PROGRAMS:
            wrong.append(f"{result}: does not fit on a multiprocessor")
        multiplies = f"_{result.kernel}" in MATRIX_KERNELS and dtype != torch.float32
        if multiplies and result.matrix not in INSTRUCTIONS.get(architecture, ("mma.sync",)):
            wrong.append(f"{result}: no matrix instruction of sm_{architecture}")
    assert not wrong, "\n".join(wrong)


def matrix_launches(architecture: int, dtype: torch.dtype, **options: object) -> list:
    return [found for found in ahead.network(architecture, dtype, **options) if found.kernel.__name__ in MATRIX_KERNELS]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", choice.ARCHITECTURES)
def test_matrix_kernels(architecture, dtype):
    launches = matrix_launches(architecture, dtype)
    assert len(launches) == 4 + 8 + 8, "4 fused, 4 pairs, 8 convolutions"
    check(compiled(launches, architecture, dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [80, 100, 120])
def test_matrix_kernels_with_layer_norm(architecture, dtype):
    launches = [
        found
        for found in matrix_launches(architecture, dtype, per_position=True)
        if found.kernel.__name__ != "_conv_kernel" and ahead.width_of(found) in (192, 512)
    ]
    check(compiled(launches, architecture, dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90])
def test_bfloat16_tokens_with_float32_parameters(architecture):
    """`compute_dtype`: the weights take twice the shared memory on their way."""
    launches = matrix_launches(architecture, torch.bfloat16, parameters=torch.float32)
    assert len(launches) == 4 + 8 + 8
    check(compiled(launches, architecture, torch.bfloat16), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_kernel_on_hopper(dtype, per_position):
    launches = ahead.network(90, dtype, per_position=per_position, training=True)
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= {
        *MATRIX_KERNELS,
        "_prepare_kernel",
        "_merge_kernel",
        "_norm_kernel",
        "_head_kernel",
        "_tile_kernel",
    }
    assert ("_position_kernel" in names) == ("_pool_kernel" in names) == per_position
    check(compiled(launches, 90, dtype), dtype)


@pytest.mark.parametrize("architecture", choice.ARCHITECTURES)
def test_small_kernels(architecture):
    launches = [
        found
        for found in ahead.network(architecture, torch.bfloat16)
        if found.kernel.__name__ not in MATRIX_KERNELS and ahead.width_of(found) in (0, 768)
    ]
    check(compiled(launches, architecture, torch.bfloat16), torch.bfloat16)


@pytest.fixture
def matmul():
    """PyTorch's settings of matrix products, put back afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("interface", ["fp32_precision", "allow_tf32"])
def test_tf32_only_where_pytorch_allows_it(matmul, interface):
    """float32 products are exact unless PyTorch is told otherwise, through either of its two interfaces."""
    values = {"fp32_precision": ("ieee", "tf32"), "allow_tf32": (False, True)}[interface]
    instructions = []
    for value in values:
        setattr(matmul, interface, value)
        launches = [found for found in matrix_launches(90, torch.float32) if ahead.width_of(found) == 64]
        [launch] = [found for found in launches if found.kernel.__name__ == "_fused_kernel"]
        assert launch.settings["PRECISION"] == ("tf32" if value == values[1] else "ieee")
        instructions.append(ahead.compile_launch(launch, 90).matrix)
    assert instructions == [None, "wgmma.mma"]


def test_how_float32_products_are_taken_is_asked_for_float32_alone(matmul, monkeypatch):
    """Reading the older interface fails after the newer one was used, so nothing may read it for bfloat16 blocks;
    nor may TF32 make other variants of the kernels of 16 bits."""
    settings = []
    for value in ("ieee", "tf32"):
        matmul.fp32_precision = value
        settings.append([launch.settings for launch in matrix_launches(90, torch.bfloat16)])
    assert settings[0] == settings[1]

    def fail():
        raise RuntimeError("mixed interfaces")

    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", fail)
    assert matrix_launches(90, torch.bfloat16) and matrix_launches(90, torch.float32)


# ----------------------------------------------------------------------------------------------------------- the table


def problem(channels: int, positions: int, dtype=torch.bfloat16, architecture: int = 90) -> choice.BlockProblem:
    return choice.BlockProblem(channels, 4 * channels, positions, dtype, architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", [80, 86, 87, 89, 90, 100, 103, 120, 121])
def test_choice_is_fused_up_to_192_channels(architecture, dtype):
    for channels in range(8, 1025, 8):
        for positions in (1, 49, 144, 196, 784, 3136, 9216, 10**6):
            chosen = choice.choose_block(problem(channels, positions, dtype, architecture))
            assert (chosen.fused is not None) == (channels <= 192)
            assert (chosen.expand is None) == (chosen.project is None) == (channels <= 192)
            tiles = [tile for tile in (chosen.fused, chosen.expand, chosen.project) if tile]
            for tile in tiles:
                assert tile.rows >= 16 and tile.rows & (tile.rows - 1) == 0
                assert tile.rows == 16 or tile.rows // 2 < positions, "a tile twice as large as the image"


def test_choice_is_frozen():
    """These decide bits: whoever changes one raises VERSION and says what was measured."""
    assert choice.VERSION == 2
    fused = {c: choice.choose_block(problem(c, 784)).fused for c in (64, 96, 128, 192)}
    assert fused == {
        64: choice.FusedTile(64, 64, 64, 4, 2), 96: choice.FusedTile(64, 32, 64, 4, 2),
        128: choice.FusedTile(64, 64, 32, 4, 2), 192: choice.FusedTile(64, 64, 32, 4, 2),
    }  # fmt: skip
    tile = choice.MatrixTile(64, 128, 64, 4, 3)
    narrow = dataclasses.replace(tile, columns=64)
    expand = dataclasses.replace(tile, stages=1)  # not pipelined on Hopper, see test_triton_wgmma.py
    assert choice.choose_block(problem(320, 196)) == choice.BlockChoice(None, expand, narrow)
    assert choice.choose_block(problem(512, 49)) == choice.BlockChoice(None, expand, tile)
    assert choice.choose_block(problem(512, 49, architecture=80)) == choice.BlockChoice(None, tile, tile)


def test_a_dtype_without_tiles_is_refused_by_name():
    """It must not get the tiles of 16 bits without a word."""
    for channels in (64, 512):
        with pytest.raises(ValueError, match="no tiles for float64"):
            choice.choose_block(problem(channels, 196, torch.float64))
    with pytest.raises(ValueError, match="no tiles for float64"):
        choice.choose_embed(choice.EmbedProblem(3, 64, 3136, torch.float64, 90))


@triton.jit
def _gelu_kernel(x, out):
    at = tl.arange(0, 128)
    tl.store(out + at, gelu(tl.load(x + at).to(tl.float32), out.dtype.element_ty).to(out.dtype.element_ty))


@pytest.mark.parametrize("result", ["fp32", "bf16", "fp16", "fp64"])
def test_gelu_refuses_a_dtype_that_it_has_no_form_for(result):
    source = ASTSource(_gelu_kernel, signature={"x": f"*{result}", "out": f"*{result}"}, constexprs={})
    target = GPUTarget("cuda", 80, 32)
    if result == "fp64":
        with pytest.raises(CompilationError) as caught:
            triton.compile(source, target=target)
        assert "gelu has no form for this dtype" in f"{caught.value}{caught.value.__cause__}"
    else:
        assert ("erf" in triton.compile(source, target=target).asm["ttir"]) == (result == "fp32")


def test_problem_and_choice_print_what_they_are():
    assert "channels=320" in repr(problem(320, 196)) and "architecture=90" in repr(problem(320, 196))
    assert "rows=64" in repr(choice.choose_block(problem(320, 196)))


def test_neither_problem_knows_the_batch():
    shape = (16, 9, 7)
    problems = set()
    for batch in (1, 3, 64):
        with ahead.recorded(90):
            problems.add(block.problem_of(torch.empty((batch, *shape), device="meta"), 64))
    assert len(problems) == 1


@pytest.mark.parametrize("batch", [1, 1024])
def test_launches_differ_by_the_number_of_programs_alone(batch):
    def record(count: int) -> list:
        x = torch.empty((count, 16, 9, 7), device="meta", memory_format=torch.channels_last)
        weight, bias = torch.empty((24, 16, 3, 3), device="meta"), torch.empty(24, device="meta")
        return ahead.record(90, embed.embed, x, weight, bias, 2, 1, torch.float32, True)

    for one, two in zip(record(batch), record(5), strict=True):
        assert ahead.source(one).hash() == ahead.source(two).hash() and one.settings == two.settings
        plain = [value for value in one.arguments if not isinstance(value, torch.Tensor)]
        assert plain == [value for value in two.arguments if not isinstance(value, torch.Tensor)]
