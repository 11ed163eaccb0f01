"""`riformer-kernels convert`: the same function in a file that cannot execute code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import riformer
import torch
from riformer_cli import main
from support_cli import tiny


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_convert_pth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    state_dict = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"state_dict": state_dict, "ema_state_dict": {k: v + 1 for k, v in state_dict.items()}}, tmp_path / "m.pth"
    )
    out_path = tmp_path / "m.safetensors"
    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] == hashlib.sha256(out_path.read_bytes()).hexdigest()
    assert found["tensors"] == len(state_dict) and found["form"] == "training-time"
    assert found["parameters"] == riformer.count_parameters(model) and found["arch"].startswith("custom")
    loaded = riformer.load_checkpoint(out_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())

    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--which", "ema_state_dict"]) == 2
    assert "--force" in capsys.readouterr().err
    assert hashlib.sha256(out_path.read_bytes()).hexdigest() == found["sha256"]
    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--which", "ema_state_dict", "--force"]) == 0
    out = capsys.readouterr().out
    assert hashlib.sha256(out_path.read_bytes()).hexdigest() in out and found["sha256"] not in out
    assert torch.equal(riformer.load_checkpoint(out_path)["head.fc.bias"], model.state_dict()["head.fc.bias"] + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth", "m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_deploy_keeps_function_dtype_and_metadata(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(norm="ln", norm_eps=1e-3).to(dtype)
    riformer.save_checkpoint(model, tmp_path / "in.safetensors", metadata={"mean": "[0.5, 0.5, 0.5]", "by": "me"})
    arguments = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--deploy"]
    assert main([*arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = str(dtype).removeprefix("torch.")
    assert found["folded"] == 8 and found["form"] == "deployed" and found["dtypes"] == [name]
    metadata = found["metadata"]
    assert (metadata["norm"], metadata["norm_eps"], metadata["form"]) == ("ln", "0.001", "deployed")
    assert (metadata["mean"], metadata["by"]) == ("[0.5, 0.5, 0.5]", "me")
    expected = model.switch_to_deploy().state_dict()
    loaded = riformer.load_checkpoint(tmp_path / "out.safetensors")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[n], t) for n, t in expected.items())


def test_convert_notes_the_norm_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny(norm="ln").state_dict(), tmp_path / "m.pth")
    arguments = ["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")]
    assert main(arguments) == 0
    assert "--norm ln" in capsys.readouterr().err and "norm" not in riformer.read_metadata(tmp_path / "m.safetensors")
    assert main([*arguments, "--norm", "ln", "--force"]) == 0
    assert capsys.readouterr().err == "" and riformer.read_metadata(tmp_path / "m.safetensors")["norm"] == "ln"


def test_convert_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "m.pth")
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors"), "--deploy"]) == 2
    assert "Only a RIFormer" in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert "not recognised" in out and "no RIFormer" in err


def test_convert_refuses_a_malicious_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Malicious()}, "zip.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        assert main(["convert", name, "out.safetensors"]) == 2
        out, err = capsys.readouterr()
        assert not out and "system" in err and "nothing in it was executed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "zip.pth"]


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("missing.pth", "out.safetensors", "no checkpoint at missing.pth"),
        ("broken.safetensors", "out.safetensors", "damaged"),
        ("tiny.safetensors", "out.pth", "ends in .safetensors"),
        ("tiny.safetensors", ".", "is a directory"),
        ("tiny.safetensors", "nowhere/out.safetensors", "there is no folder nowhere"),
    ],
)
def test_convert_bad_input_is_2(
    source: str, target: str, says: str, checkpoint: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(checkpoint).parent)
    Path("broken.safetensors").write_bytes(Path(checkpoint).read_bytes()[:5000])
    assert main(["convert", source, target]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and not Path("out.safetensors").exists()
