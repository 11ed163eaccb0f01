"""The published checkpoints: their names, and a download that never leaves a wrong or partial file behind."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import re
import socket
import threading

import pytest
import riformer
import torch
from riformer import zoo

ARCHS = ("s12", "s24", "s36", "m36", "m48")


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_holds_ten_with_distinct_files():
    assert len(riformer.ZOO) == 10
    assert {(e.arch, e.image_size) for e in riformer.ZOO.values()} == {(a, s) for a in ARCHS for s in (224, 384)}
    assert len({e.sha256_prefix for e in riformer.ZOO.values()}) == 10
    for entry in riformer.ZOO.values():
        assert re.fullmatch(r"[0-9a-f]{8}", entry.sha256_prefix)
        folder = "https://download.openmmlab.com/mmclassification/v1/riformer"
        assert entry.url.startswith(f"{folder}/riformer-{entry.arch}_")
        assert ("384px" in entry.url) == (entry.image_size == 384)
        assert entry.source == "mmpretrain model zoo"


def test_published_accuracies():
    """Top-1 per cent as in mmpretrain's README."""
    found = {size: [riformer.find_entry(f"riformer-{a}{part}").top1 for a in ARCHS]
             for size, part in ((224, "_in1k"), (384, "_in1k-384"))}  # fmt: skip
    assert found[224] == [76.90, 80.28, 81.29, 82.57, 82.75]
    assert found[384] == [78.29, 81.36, 82.22, 83.39, 83.70]
    assert all(entry.top1 < entry.top5 < 100 for entry in riformer.ZOO.values())


def test_the_table_is_the_packages_own_metafile():
    """Against the file that mmpretrain ships, where it is installed."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("mmpretrain")
    if spec is None:
        pytest.skip("mmpretrain is not installed; pip install --no-deps -r tests/requirements-mmpretrain.txt")
    yaml = pytest.importorskip("yaml")
    path = Path(spec.submodule_search_locations[0]) / ".mim/configs/riformer/metafile.yml"
    published = {}
    for model in yaml.safe_load(path.read_text())["Models"]:
        metrics = model["Results"][0]["Metrics"]
        published[model["Name"]] = (model["Weights"], metrics["Top 1 Accuracy"], metrics["Top 5 Accuracy"])
    assert published == {e.name: (e.url, e.top1, e.top5) for e in riformer.ZOO.values()}


@pytest.mark.parametrize("arch", ARCHS)
def test_both_spellings(arch):
    large = riformer.find_entry(f"riformer-{arch}_in1k-384")
    assert large is riformer.find_entry(f"riformer-{arch}_384_in1k") is riformer.find_entry(f"RIFormer-{arch}_384_in1k")
    assert (large.arch, large.image_size) == (arch, 384)
    small = riformer.find_entry(f"riformer-{arch}_in1k")
    assert small is riformer.find_entry(arch) is riformer.find_entry(arch.upper())
    assert (small.arch, small.image_size) == (arch, 224)


def test_create_model_by_any_name():
    for name in ("riformer-s12_384_in1k", "riformer-s12_in1k-384", "riformer-s12_in1k", "S12"):
        model = riformer.create_model(name, num_classes=3, deploy=True)
        assert (model.arch.name, model.num_classes, model.deploy) == ("s12", 3, True)
    assert riformer.create_model({"layers": [1], "embed_dims": [8]}).num_classes == 1000
    with pytest.raises(ValueError, match=r"'resnet50'.*s12.*riformer-m48_in1k-384"):
        riformer.create_model("resnet50")
    with pytest.raises(ValueError, match=r"'s12-512'.*riformer-s12_in1k"):
        riformer.find_entry("s12-512")


# --------------------------------------------------------------------------------------------------------- the download


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        status, body, length = self.server.answer
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine in place of the published one, with a small file in place of s12's at 224."""
    # A proxy in the environment must not come between.
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests = []
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()

    model = riformer.randomize_(riformer.RIFormer(TINY, num_classes=1000), 1)
    torch.save({"state_dict": {f"backbone.{n}" if not n.startswith("head") else n: t
                               for n, t in model.state_dict().items()}}, tmp_path / "source.pth")  # fmt: skip
    data = (tmp_path / "source.pth").read_bytes()
    httpd.data, httpd.answer, httpd.model = data, (200, data, len(data)), model
    publish(monkeypatch, f"http://127.0.0.1:{httpd.server_port}", hashlib.sha256(data).hexdigest()[:8])
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


TINY = {"layers": [1, 1], "embed_dims": [8, 16]}


def publish(monkeypatch, base: str, digits: str) -> None:
    name = "riformer-s12_in1k"
    entry = dataclasses.replace(zoo.ZOO[name], url=f"{base}/v1/riformer-s12_32xb128_in1k_20230406-{digits}.pth")
    monkeypatch.setitem(zoo.ZOO, name, entry)


def test_download_then_cache(server, tmp_path, capsys):
    cache = tmp_path / "new" / "cache"
    path = riformer.download("s12", cache)
    assert path == cache / zoo.ZOO["riformer-s12_in1k"].file_name
    assert path.read_bytes() == server.data
    assert os.listdir(cache) == [path.name]
    # Not a terminal: one line, no escape codes, nothing on stdout.
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and path.name in err and "MB" in err and "\x1b" not in err
    assert riformer.download("riformer-s12_in1k", cache) == path
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""


def test_progress_false_prints_nothing(server, tmp_path, capsys):
    riformer.download("s12", tmp_path / "cache", progress=False)
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(server, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    riformer.download("s12", tmp_path / "cache")
    err = capsys.readouterr().err
    assert "riformer-s12" in err and "kB" in err and "downloading" not in err


def test_without_rich_a_terminal_gets_the_plain_line(server, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    riformer.download("s12", tmp_path / "cache")
    assert capsys.readouterr().err.startswith("downloading riformer-s12")


def test_the_default_cache_is_torch_hubs(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert riformer.download("s12", progress=False).parent == tmp_path / "hub" / "checkpoints"


def test_a_server_that_says_no_length(server, tmp_path):
    server.answer = (200, server.data, None)
    assert riformer.download("s12", tmp_path / "cache").read_bytes() == server.data


def failing(tmp_path, *words: str) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(riformer.DownloadError) as caught:
        riformer.download("s12", cache, progress=False)
    entry = zoo.ZOO["riformer-s12_in1k"]
    for word in (*words, entry.url, str(cache / entry.file_name)):
        assert word in str(caught.value), str(caught.value)
    assert os.listdir(cache) == []


def test_wrong_hash(server, tmp_path):
    server.answer = (200, server.data[:-1] + b"?", len(server.data))
    digits = zoo.ZOO["riformer-s12_in1k"].sha256_prefix
    failing(tmp_path, "not the published file", f"expected {digits}", "thrown away")


@pytest.mark.parametrize("kept", [0, 1000])
def test_truncated_transfer(server, tmp_path, kept):
    server.answer = (200, server.data[:kept], len(server.data))
    failing(tmp_path, "ended after", f"{len(server.data):,} bytes")


def test_truncated_without_a_length_is_a_wrong_hash(server, tmp_path):
    server.answer = (200, server.data[:1000], None)
    failing(tmp_path, "not the published file")


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (503, "Service Unavailable")])
def test_http_errors(server, tmp_path, status, reason):
    server.answer = (status, b"no", 2)
    failing(tmp_path, f"answered {status} {reason}", "put it at")


def test_refused_connection(server, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        publish(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", "01234567")
        failing(tmp_path, "cannot reach", "refused", "put it at")


def test_no_such_host(server, tmp_path, monkeypatch):
    publish(monkeypatch, "http://weights.invalid", "01234567")
    failing(tmp_path, "cannot reach", "Without a connection")


def test_cache_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(riformer.DownloadError, match="put it at"):
        riformer.download("s12", tmp_path / "file" / "cache", progress=False)


def test_a_file_put_there_by_hand(server, tmp_path):
    target = tmp_path / zoo.ZOO["riformer-s12_in1k"].file_name
    target.write_bytes(server.data)
    assert riformer.download("s12", tmp_path) == target
    target.write_bytes(b"something else")
    with pytest.raises(riformer.DownloadError, match=r"is not the published file.*Delete it"):
        riformer.download("s12", tmp_path)
    assert target.read_bytes() == b"something else" and server.requests == []


# ------------------------------------------------------------------------------------------------------ pretrained=True


@pytest.fixture
def tiny_s12(server, monkeypatch):
    """The published file holds a tiny model here; s12 means that one for the length of the test."""
    monkeypatch.setitem(riformer.ARCHS, "s12", riformer.resolve_arch(TINY))
    return server


@pytest.mark.parametrize("deploy", [False, True])
def test_pretrained_computes_what_was_published(tiny_s12, tmp_path, deploy):
    model = riformer.create_model("s12", pretrained=True, cache_dir=tmp_path / "c", progress=False, deploy=deploy)
    x = torch.randn(2, 3, 32, 32)
    assert model.deploy is deploy
    torch.testing.assert_close(model.eval()(x), tiny_s12.model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_pretrained_with_other_classes_keeps_a_fresh_head(tiny_s12, tmp_path, num_classes):
    model = riformer.create_model("s12", True, num_classes, cache_dir=tmp_path / "c", progress=False).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.forward_features(x)[0], tiny_s12.model.eval().forward_features(x)[0])
    assert not num_classes or model(x).shape == (2, 7)


def test_pretrained_that_would_be_wrong_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="norm='ln'"):
        riformer.create_model("s12", pretrained=True, norm="ln")
    with pytest.raises(ValueError, match="norm_eps=1e-06"):
        riformer.create_model("s12", pretrained=True, norm_eps=1e-6)
    with pytest.raises(ValueError, match="needs the name of a published checkpoint"):
        riformer.create_model(TINY, pretrained=True)
    assert server.requests == []
    # What the server sends does not fit the real s12.
    with pytest.raises(riformer.CheckpointError, match="does not fit"):
        riformer.create_model("s12", pretrained=True, cache_dir=tmp_path / "c", progress=False)
