"""`riformer-kernels predict`: the right classes, whatever the images and the format."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import riformer
import torch
from PIL import Image
from riformer_cli import _images, _output, main
from support_cli import EXACT, pixels, probabilities, softmax, tiny


def test_predict_is_the_model_on_the_pixels(
    checkpoint: str, photos: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrupt image among good ones: named with the reason, the others classified, exit code 1."""
    arguments = ["predict", str(photos), "--checkpoint", checkpoint, *EXACT, "--topk", "99", "--batch-size", "2"]
    assert main([*arguments, "--backend", backend, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    names = [Path(image["image"]).name for image in found["images"]]
    assert names == ["a.png", "b.png", "c.png"] and found["model"]["backend"].startswith(backend)
    assert [Path(entry["image"]).name for entry in found["failed"]] == ["bad.png"] and found["failed"][0]["reason"]
    assert "bad.png: " in err and "3 images classified" in err and "Traceback" not in err
    expected = softmax(tiny(), np.stack([pixels(index) for index in range(3)]))
    for image, row in zip(found["images"], expected, strict=True):
        assert probabilities(image) == pytest.approx(row.tolist(), abs=2e-4)
        ranked = [entry["probability"] for entry in image["predictions"]]
        assert ranked == sorted(ranked, reverse=True) and len(ranked) == 10


def test_predict_resizes_and_crops(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(3, 50, 80)).save(tmp_path / "wide.png")
    arguments = [
        "predict",
        str(tmp_path / "wide.png"),
        "--checkpoint",
        checkpoint,
        "--image-size",
        "32",
        "--topk",
        "10",
    ]
    assert main([*arguments, "--no-patch", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preprocessing"]["resize"] == 34 and found["model"]["backend"].startswith("plain")
    resized = Image.fromarray(pixels(3, 50, 80)).resize((54, 34), Image.Resampling.BICUBIC)
    expected = softmax(tiny(), np.asarray(resized.crop((11, 1, 43, 33)))[None])[0]
    assert probabilities(found["images"][0]) == pytest.approx(expected.tolist(), abs=1e-5)


def test_predict_csv_labels_globs(
    checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").unlink()
    (tmp_path / "labels.txt").write_text("".join(f'class "{index}", really\n' for index in range(10)))
    arguments = ["predict", str(photos / "**/*.png"), "--checkpoint", checkpoint, *EXACT, "--no-patch", "--topk", "2"]
    assert main([*arguments, "--format", "csv", "--labels", str(tmp_path / "labels.txt")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["image", "rank", "class", "label", "probability"]
    ranked = [(name, rank) for name in ("a.png", "b.png", "c.png") for rank in "12"]
    assert [(Path(row["image"]).name, row["rank"]) for row in rows] == ranked
    assert all(row["label"] == f'class "{row["class"]}", really' for row in rows)
    best = softmax(tiny(), pixels(1)[None])[0].topk(2)
    assert [int(row["class"]) for row in rows[2:4]] == best.indices.tolist()
    assert float(rows[2]["probability"]) == pytest.approx(best.values[0].item(), abs=1e-5)


def test_predict_text_and_hostile_name(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "x\x1b[31m[b].png")
    arguments = ["predict", str(tmp_path / "x\x1b[31m[b].png"), "--checkpoint", checkpoint, *EXACT, "--no-patch"]
    assert main([*arguments, "--topk", "1"]) == 0
    out, err = capsys.readouterr()
    best = softmax(tiny(), pixels(0)[None])[0].max(0)
    assert "x\\x1b[31m[b].png" in out and out.split()[-1] == str(best.indices.item()) and err == ""
    assert f"{100 * best.values.item():.2f} %" in out


def test_predict_half_precision_is_close(
    checkpoint: str, photos: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "predict",
        str(photos / "a.png"),
        "--checkpoint",
        checkpoint,
        *EXACT,
        "--topk",
        "10",
        "--format",
        "json",
    ]
    assert main([*arguments, "--dtype", "bfloat16", "--backend", backend]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = softmax(tiny(), pixels(0)[None])[0]
    assert found["model"]["dtype"] == "bfloat16"
    assert probabilities(found["images"][0]) == pytest.approx(expected.tolist(), abs=0.05)
    assert probabilities(found["images"][0]) != pytest.approx(expected.tolist(), abs=1e-7)


def test_predict_grey_and_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One input channel, preprocessing and labels from the checkpoint, and the LayerNorm that no tensor tells."""
    model = tiny(in_channels=1, norm="ln")
    metadata = {"image_size": "32", "crop_pct": "1", "mean": "0.1", "std": "[0.5]"}
    metadata["labels"] = json.dumps([f"digit {index}" for index in range(10)])
    riformer.save_checkpoint(model, tmp_path / "grey.safetensors", metadata=metadata)
    grey = pixels(5)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "eight.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    images = [str(tmp_path / "eight.png"), str(tmp_path / "sixteen.png")]
    assert main(["predict", *images, "--checkpoint", str(tmp_path / "grey.safetensors"), "--no-patch", "--topk", "10",
                 "--format", "json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    with torch.inference_mode():
        expected = model((torch.from_numpy(grey).float()[None, None] / 255 - 0.1) / 0.5).softmax(-1)[0].tolist()
    for image in found["images"]:
        assert probabilities(image) == pytest.approx(expected, abs=1e-5)
        assert all(entry["label"] == f"digit {entry['class']}" for entry in image["predictions"])


def test_predict_nothing_readable(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    names = ["text.jpg", "empty.png", "folder", "missing.png", "none*.png"]
    arguments = ["predict", *(str(tmp_path / name) for name in names), "--checkpoint", checkpoint, "--no-patch"]
    assert main([*arguments, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    reasons = {Path(entry["image"]).name: entry["reason"] for entry in json.loads(out)["failed"]}
    assert reasons == {
        "text.jpg": "not an image that Pillow can read", "empty.png": "empty file (0 bytes)",
        "folder": "there are no images in this folder", "missing.png": "No such file or directory",
        "none*.png": "nothing matches this pattern",
    }  # fmt: skip
    assert all(f"{name}: {reason}" in err for name, reason in reasons.items()) and "0 images classified" in err


def test_predict_not_finite(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    with torch.no_grad():
        model.head.fc.bias[3] = float("nan")
    riformer.save_checkpoint(model, tmp_path / "nan.safetensors")
    arguments = ["predict", str(photos / "a.png"), "--checkpoint", str(tmp_path / "nan.safetensors"), *EXACT]
    assert main([*arguments, "--no-patch"]) == 1
    out, err = capsys.readouterr()
    assert not out and "not finite" in err


@pytest.mark.parametrize("arguments", [[], ["--arch", "s12"], ["--arch", "nonsense"]])
def test_predict_never_with_random_weights(
    arguments: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(photos), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and "there are no weights" in err and "--checkpoint" in err and "riformer-s12_in1k" in err


def test_predict_published_name_downloads(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name alone fetches the weights, and brings its image size with it."""
    riformer.save_checkpoint(tiny(), tmp_path / "fetched.safetensors")
    asked = []
    monkeypatch.setattr(riformer, "download", lambda name: asked.append(name) or tmp_path / "fetched.safetensors")
    arguments = ["predict", str(photos / "a.png"), "--no-patch", "--format", "json"]
    assert main([*arguments, "--checkpoint", "riformer-s12_384_in1k"]) == 0
    assert asked == ["riformer-s12_384_in1k"]
    assert json.loads(capsys.readouterr().out)["preprocessing"]["image_size"] == 384
    assert main([*arguments, "--arch", "riformer-s12_in1k"]) == 2  # what came is no s12
    assert asked[1:] == ["riformer-s12_in1k"] and "Leave --arch out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        ({}, ["--arch", "s12"], "holds arch custom"),
        ({"num_classes": 0}, [], "without a classifier"),
        ({"in_channels": 5}, [], "5 channels"),
        ({}, ["--mean", "0.5"], "--mean has 1 values"),
        ({}, ["--std", "1,0,1"], "std positive"),
        ({}, ["--labels", "LABELS"], "3 names, the checkpoint has 10 classes"),
        ({}, ["--labels", "no-such-file"], "no-such-file"),
        ({}, ["--backend", "warp"], "--no-patch"),
    ],
)
def test_predict_bad_input_is_2(
    options: dict, arguments: list[str], says: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    riformer.save_checkpoint(tiny(**options), tmp_path / "c.safetensors")
    (tmp_path / "labels").write_text("a\nb\nc\n\n")
    arguments = [str(tmp_path / "labels") if a == "LABELS" else a for a in arguments]
    assert main(["predict", str(photos / "a.png"), "--checkpoint", str(tmp_path / "c.safetensors"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("riformer-kernels: error: ") and says in err and "Traceback" not in err


def test_predict_without_pillow(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert main(["predict", str(photos), "--checkpoint", checkpoint]) == 2
    assert "pip install 'riformer-kernels[cli]'" in capsys.readouterr().err


def test_image_modes(tmp_path: Path) -> None:
    """Palette, transparency, greyscale and EXIF rotation come out as the colours that they show."""
    how = _images.preprocessing(3, None, {}, image_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    upright = pixels(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    grey = upright[:, :, :1].repeat(3, axis=2)
    Image.fromarray(grey).convert("L").save(tmp_path / "grey.png")
    palette = Image.fromarray(255 - upright[:, :, 0])
    palette.putpalette([value for index in range(256) for value in (255 - index,) * 3])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.dstack((upright, np.full((32, 32), 255, np.uint8)))).save(tmp_path / "alpha.png")
    for name, expected in (("turned", upright), ("grey", grey), ("palette", grey), ("alpha", upright)):
        found = _images.load(str(tmp_path / f"{name}.png"), how).transpose(1, 2, 0) * 255
        assert np.abs(found - expected).max() < 1e-3, name
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(_images.Unreadable, match="mode F"):
        _images.load(str(tmp_path / "float.tiff"), how)


@pytest.mark.parametrize(
    ("arch", "size", "resize"),
    [("s12", 224, 248), ("m36", 224, 236), ("s24", 384, 426), ("m48", 384, 404), (None, 224, 236), ("s12", 256, 269)],
)
def test_published_sizes_resize_as_evaluated(arch: str | None, size: int, resize: int) -> None:
    assert _images.preprocessing(3, arch, {}, image_size=size).resize == resize


def test_metadata_that_makes_no_sense() -> None:
    with pytest.raises(_output.CliError, match="--image-size overrides"):
        _images.preprocessing(3, None, {"image_size": "large"})
    with pytest.raises(_output.CliError, match="mean"):
        _images.preprocessing(3, None, {"mean": "[0.5, 0.5]"})
    assert _images.preprocessing(3, None, {"mean": "[0.5]"}, mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
