"""torch.compile(fullgraph=True), torch.export and AOTInductor on the patched model itself."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from support_compare import close

from riformer_kernels import patch
from riformer_kernels.tracing import constant_while_tracing

SMALL = {"layers": [1, 2], "embed_dims": [16, 32]}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """A compiler backend that keeps the graphs it is given and runs them as they are."""
    kept = []

    def compiler(graph, inputs):
        kept.append(graph)
        return graph

    compiler.kept = kept
    return compiler


def ops_in(graph) -> list[str]:
    names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in names if name.startswith("riformer.")]


def native(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch is traced through: there are no ops of the engine in the graph")


def test_the_graph_holds_the_ops_and_nothing_in_place(make, images, backend, graphs):
    native(backend)
    model = make(arch=SMALL, num_classes=10)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend)
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        assert close(compiled(images), expected)
    assert len(graphs.kept) == 1
    assert ops_in(graphs.kept[0]) == ["embed", "block", "embed", "block", "block", "head"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", ["patch, compile", "compile, patch"])
def test_inductor(make, images, backend, mode, order):
    model = make(arch=SMALL, num_classes=10)
    with mode():
        expected = model(images)
        if order == "patch, compile":
            patch(model, backend=backend)
            compiled = torch.compile(model, fullgraph=True)
        else:
            compiled = torch.compile(model, fullgraph=True)
            handle = patch(compiled, backend=backend)
            assert handle.report[0].name == "_orig_mod.patch_embed"
        assert close(compiled(images), expected)


def test_patching_after_the_first_compiled_call(make, images, backend, graphs):
    native(backend)
    model = make(arch=SMALL, num_classes=10)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        expected = compiled(images)
        handle = patch(model, backend=backend)
        assert close(compiled(images), expected) and len(ops_in(graphs.kept[-1])) == 6
        handle.restore()
        assert close(compiled(images), expected)
    assert ops_in(graphs.kept[0]) == [] and len(graphs.kept) <= 3


def test_compiled_weights_are_not_stale(make, images, backend):
    model, other = make(seed=1, arch=SMALL, num_classes=10), make(seed=2, arch=SMALL, num_classes=10)
    patch(model, backend=backend)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(images)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        assert close(compiled(images), other(images))


def test_compiled_with_gradients_due(make, images, backend):
    model = make(arch=SMALL, num_classes=10)
    model(images).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    patch(model, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = compiled(images)
    assert result.requires_grad and any("inference_mode" in str(entry.message) for entry in seen)
    result.sum().backward()
    assert all(
        torch.allclose(p.grad, wanted, atol=1e-4) for p, wanted in zip(model.parameters(), expected, strict=True)
    )
    with torch.no_grad():
        assert close(compiled(images), result)


def test_train_after_compiling_turns_dropout_on(make, images, backend, graphs):
    native(backend)
    model = make(arch=SMALL, num_classes=10, drop_path_rate=0.9)
    patch(model, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        fused = compiled(images)
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not close(compiled(images), fused)
        assert ops_in(graphs.kept[-1]).count("block") == 1, "the first block's rate is 0"
        model.eval()
        assert close(compiled(images), fused)


def test_a_hook_before_compiling_is_in_the_graph(make, images, backend, graphs):
    native(backend)
    model = make(arch=SMALL, num_classes=10)
    model.network[2][0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend, strict=False)
        assert close(torch.compile(model, fullgraph=True, backend=graphs)(images), expected)
    assert ops_in(graphs.kept[0]) == ["embed", "block", "embed", "moments", "block", "head"]


def test_no_recompilation_for_other_batches(make, backend, graphs):
    model = make(arch=SMALL, num_classes=10)
    patch(model, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 8):
            images = torch.randn(batch, 3, 64, 64)
            assert close(compiled(images), model(images))
    assert len(graphs.kept) == 1


def test_autocast_compiled(make, images, backend):
    model = make(arch=SMALL, num_classes=10)
    patch(model, backend=backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert found.dtype == expected.dtype == torch.bfloat16 and close(found.float(), expected.float(), 2e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(make, images, backend, strict):
    model = make(arch=SMALL, num_classes=10)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=strict)
        assert close(program.module()(images), expected)
        assert program.module()(images[:1]).shape == (1, 10)
    if backend != "reference":
        assert ops_in(program.graph_module) == ["embed", "block", "embed", "block", "block", "head"]
    assert set(program.state_dict) == set(model.state_dict())


def test_aot_inductor_package(make, images, backend, tmp_path):
    model = make(arch=SMALL, num_classes=10)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        assert close(loaded(images), expected) and close(loaded(images[1:]), expected[1:])


def test_the_mark_for_tracing_is_the_one_that_torch_sets():
    def ours() -> None: ...

    def theirs() -> None: ...

    constant_while_tracing(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_the_import_does_not_bring_the_compiler():
    """Importing torch._dynamo takes as long as the rest of torch."""
    code = (
        "import sys, torch; before = set(sys.modules); import riformer_kernels\n"
        "print(sorted({'torch._dynamo', 'torch._inductor'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr
