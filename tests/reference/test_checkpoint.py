"""Checkpoint files: every kind is read, nothing in them is executed, what is wrong is named; and writing them."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
import types

import numpy as np
import pytest
import riformer
import torch
from riformer import CheckpointError, RIFormer, load_checkpoint, load_into, randomize_, save_checkpoint
from support_riformer import nested, same, snapshot

TINY = {"layers": [1, 2], "embed_dims": [8, 16], "mlp_ratios": [4, 2.5]}


def hard(seed: int = 1, arch=TINY, **options) -> RIFormer:
    return randomize_(RIFormer(arch, **{"num_classes": 5, **options}), seed).eval()


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------------- what a file may be


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "prefixes",
    [(), ("backbone.",), ("module.",), ("_orig_mod.",), ("module.", "backbone."),
     ("_orig_mod.", "module.", "backbone."), ("backbone.", "_orig_mod.", "module.")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("key", [None, "state_dict", "ema_state_dict"])
def test_forms_of_pth(tmp_path, key, prefixes, legacy):
    expected = snapshot(hard())
    content = nested(expected, *prefixes)
    content = {key: content, "meta": {"epoch": 3}} if key else content
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=not legacy)
    assert same(load_checkpoint(tmp_path / "model.bin"), expected)


def test_backbone_prefix_only_in_part(tmp_path):
    """What mmpretrain's ImageClassifier saves: backbone.* beside head.fc."""
    expected = snapshot(hard())
    names = {n: n if n.startswith("head.") else f"backbone.{n}" for n in expected}
    torch.save({"state_dict": {names[n]: t for n, t in expected.items()}}, tmp_path / "a.pth")
    assert same(load_checkpoint(tmp_path / "a.pth"), expected)


def test_which_part(tmp_path):
    plain, averaged = snapshot(hard(1)), snapshot(hard(2))
    ema = {"steps": torch.tensor(7), **nested(averaged, "module.")}
    torch.save({"state_dict": plain, "ema_state_dict": ema}, tmp_path / "both.pth")
    torch.save({"ema_state_dict": ema}, tmp_path / "ema.pth")
    torch.save({"n_averaged": torch.tensor(7), **nested(averaged, "module.")}, tmp_path / "bare.pth")
    assert same(load_checkpoint(tmp_path / "both.pth"), plain)
    assert same(load_checkpoint(tmp_path / "both.pth", which="state_dict"), plain)
    assert same(load_checkpoint(tmp_path / "both.pth", which="ema_state_dict"), averaged)
    assert same(load_checkpoint(tmp_path / "ema.pth"), averaged)
    assert same(load_checkpoint(tmp_path / "bare.pth"), averaged)
    with pytest.raises(CheckpointError, match=r"no 'state_dict'.*'ema_state_dict'"):
        load_checkpoint(tmp_path / "ema.pth", which="state_dict")
    with pytest.raises(ValueError, match="which must be"):
        load_checkpoint(tmp_path / "ema.pth", which="ema")


@pytest.fixture
def fake_mmengine(monkeypatch):
    """Classes of mmengine's names and pickling habits, in sys.modules while a file is written and gone afterwards."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])

        def mean(self):
            return 0.0

        def __getstate__(self):
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    class ConfigDict(dict):
        def __reduce_ex__(self, proto):
            return self.__class__, (dict(self),)

    class OldConfigDict(dict):
        def __getstate__(self):
            return self

    names = {"mmengine.logging.history_buffer": (HistoryBuffer,), "mmengine.config.config": (ConfigDict, OldConfigDict)}
    OldConfigDict.__name__ = OldConfigDict.__qualname__ = "ConfigDict"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    ConfigDict.__qualname__ = "ConfigDict"
    modules = {}
    for full, classes in names.items():
        parts = full.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            modules.setdefault(name, types.ModuleType(name))
        for cls in classes:
            cls.__module__ = full

    def save(content, path, classes):
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            for cls in classes:
                setattr(modules[cls.__module__], cls.__name__, cls)
            torch.save(content, path)

    return types.SimpleNamespace(HistoryBuffer=HistoryBuffer, ConfigDict=ConfigDict, Old=OldConfigDict, save=save)


def test_mmengines_extras_are_read_without_mmengine(tmp_path, fake_mmengine, monkeypatch):
    mm, expected, path = fake_mmengine, snapshot(hard()), tmp_path / "epoch_9.pth"
    content = {
        "state_dict": expected,
        "message_hub": {"log_scalars": {"train/loss": mm.HistoryBuffer()}, "info": {"lr": np.float64(1e-3)}},
        "meta": {"cfg": mm.ConfigDict(a=1, model=mm.ConfigDict(b=[1])), "n": np.int64(3), "a": np.zeros((2, 2))},
    }
    mm.save(content, path, (mm.HistoryBuffer, mm.ConfigDict))
    # Should anything try to import mmengine, it fails.
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmengine", None)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.ConfigDict", "numpy.dtype",
            "builtins.getattr"} <= set(unsafe)  # fmt: skip
    assert same(load_checkpoint(path), expected)
    # The allowance ends with the call.
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) == set(unsafe)


def test_a_config_pickled_item_by_item_is_read(tmp_path, fake_mmengine):
    mm, expected = fake_mmengine, snapshot(hard())
    mm.save({"state_dict": expected, "cfg": mm.Old(a=1, b=mm.Old(c=2))}, tmp_path / "a.pth", (mm.Old,))
    assert same(load_checkpoint(tmp_path / "a.pth"), expected)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_1_and_2_names(tmp_path, core):
    """Files written beside the other major version of numpy name its internals differently."""
    import zipfile

    expected = snapshot(hard())
    torch.save({"state_dict": expected, "best": np.float32(0.5), "list": np.arange(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                for old in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
                    data = data.replace(old, f"cnumpy.{core}.multiarray\n".encode())
                assert f"cnumpy.{core}.multiarray\n".encode() in data
            target.writestr(name, data)
    assert same(load_checkpoint(tmp_path / "b.pth"), expected)


# ----------------------------------------------------------------------------------------------------- what is refused


class Payload:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle0", "pickle2", "pickle4"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, kind):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"a": torch.zeros(2)}, "meta": Payload(os.system, f"touch {marker}")}
    if kind.startswith("pickle"):
        content["state_dict"] = {}
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=rf"{os.system.__module__}\.system") as caught:
        load_checkpoint(path)
    assert "refused" in str(caught.value) and str(path) in str(caught.value)
    assert not marker.exists()
    # The payload is a real one.
    with open(path, "rb") as file:
        if kind.startswith("pickle"):
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (Payload(eval, "1+1"), "builtins.eval"),
        (Payload(__import__, "this"), "builtins.__import__"),
        (Payload(getattr, torch.Tensor, "__class__"), "builtins.getattr"),
        (Payload(getattr, "text", "upper"), "builtins.getattr"),
        (types.SimpleNamespace(a=1), "types.SimpleNamespace"),
        (np.random.default_rng, "numpy.random._generator.default_rng"),
    ],
    ids=["eval", "import", "getattr-class", "getattr-text", "namespace", "numpy"],
)
def test_other_names_are_refused(tmp_path, payload, name):
    if isinstance(payload, types.SimpleNamespace):
        name = f"{type(payload).__module__}.{type(payload).__qualname__}"
    elif not isinstance(payload, Payload):
        name = f"{payload.__module__}.{payload.__name__}"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "x": payload}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"refused.*{name}"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_users_own_allowance_survives(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(tmp_path / "a.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def broken_files(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(snapshot(hard()), good)
    save_checkpoint(hard(), tmp_path / "good.safetensors")
    pth, safe = good.read_bytes(), (tmp_path / "good.safetensors").read_bytes()
    legacy = tmp_path / "legacy.pth"
    torch.save(snapshot(hard()), legacy, _use_new_zipfile_serialization=False)
    flipped = bytearray(pth)
    at = pth.index(b"data.pkl") + 40
    flipped[at:at + 40] = bytes(40)  # fmt: skip
    return {
        "empty": (b"", "0 bytes"),
        "text": (b"<html>404 Not Found</html>", "truncated, corrupt"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "truncated, corrupt"),
        "zip-truncated": (pth[: len(pth) // 2], "truncated, corrupt"),
        "zip-overwritten": (bytes(flipped), "cannot read|truncated, corrupt"),
        "not-torch-zip": (b"PK\x05\x06" + bytes(18), "truncated, corrupt"),
        "legacy-truncated": (legacy.read_bytes()[:-500], "truncated, corrupt"),
        "safetensors-header-cut": (safe[:200], "damaged safetensors"),
        "safetensors-data-cut": (safe[:-10], "damaged safetensors"),
        "one-byte": (b"\x80", "truncated, corrupt"),
    }


@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "png", "zip-truncated", "zip-overwritten", "not-torch-zip", "legacy-truncated",
     "safetensors-header-cut", "safetensors-data-cut", "one-byte"],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, kind):
    data, words = broken_files(tmp_path)[kind]
    path = tmp_path / "broken.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"a": 3}, "'a' is a int"),
        ({1: torch.zeros(1)}, "entry 1"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        ({"state_dict": {"a": "b"}}, "'a' is a str"),
        ({"backbone.a": torch.zeros(1), "a": torch.ones(1)}, "'backbone.a' and 'a' both stand for 'a'"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a sparse"),
    ],
    ids=["list", "tensor", "number", "int-key", "empty", "empty-part", "text", "two-models", "sparse"],
)
def test_other_content_is_named(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "a.pth")


# -------------------------------------------------------------------------------------------------------------- writing


def test_save_and_load_again(tmp_path):
    model, path = hard(norm="ln", norm_eps=1e-6), tmp_path / "a.safetensors"
    digest = save_checkpoint(model, path, metadata={"top1": "76.9", "labels": 'é, "quoted"'})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(load_checkpoint(path), snapshot(model))
    metadata = riformer.read_metadata(path)
    expected = {"format": "pt", "norm": "ln", "norm_eps": "1e-06", "form": "training-time", "top1": "76.9",
                "labels": "é, \"quoted\""}  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected and '"layers": [1, 2]' in metadata["arch"]
    info = riformer.infer_arch(load_checkpoint(path))
    built = info.build(norm=metadata["norm"], norm_eps=float(metadata["norm_eps"]))
    load_into(built, load_checkpoint(path))
    assert torch.equal(built.eval()(images()), model(images()))


def test_the_same_content_gives_the_same_bytes(tmp_path):
    digests = {save_checkpoint(hard(), tmp_path / f"{i}.safetensors", metadata={c: c for c in "abcdefgh"})
               for i in range(8)}  # fmt: skip
    assert len(digests) == 1
    assert digests != {save_checkpoint(hard(2), tmp_path / "b.safetensors", metadata={c: c for c in "abcdefgh"})}


def test_saving_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(hard(1), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left"):
            save_checkpoint(hard(2), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    save_checkpoint(hard(2), path)
    assert same(load_checkpoint(path), snapshot(hard(2))) and os.listdir(tmp_path) == ["a.safetensors"]


def test_saved_file_has_the_usual_permissions(tmp_path):
    save_checkpoint(hard(), tmp_path / "a.safetensors")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a.safetensors", "plain")}
    assert len(modes) == 1


def test_shared_and_strided_tensors_are_saved(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    save_checkpoint({"a": base, "b": base, "c": base.t()}, tmp_path / "a.safetensors")
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], base) and torch.equal(found["b"], base) and torch.equal(found["c"], base.t())


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="'a' is a int"):
        save_checkpoint({"a": 1}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint({"a": torch.zeros(1)}, tmp_path / "no" / "folder.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_pth_has_no_metadata(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert riformer.read_metadata(tmp_path / "a.pth") == {}
