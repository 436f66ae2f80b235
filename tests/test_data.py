"""MNIST: what is in the repository is all that a run needs, and is never written over."""

import functools
import gzip
import http.server
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here
from torchvision.datasets import MNIST

import main

RAW = ROOT / "data" / "MNIST" / "raw"
TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = SUMS = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
QUICK = "--model=fc", "--limit=64", "--epochs=1"


def list_files(folder):
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.fixture
def raw(tmp_path):
    """A copy of the four archives, to be damaged: the folder data/MNIST/raw."""
    yield Path(shutil.copytree(RAW, tmp_path / "data" / "MNIST" / "raw"))
    shutil.rmtree(tmp_path / "data")  # pytest would keep it


def test_every_byte_is_what_gzip_alone_reads(mnist):
    shapes = [tuple(tensor.shape) for tensor in mnist]
    assert shapes == [(60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,)]
    types = [torch.uint8, torch.int64, torch.uint8, torch.int64]
    assert [tensor.dtype for tensor in mnist] == types
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for (name, md5_sum), tensor in zip(SUMS.items(), mnist):
        assert main.get_md5((RAW / name).read_bytes()) == md5_sum and md5_sum in text
        data = gzip.decompress((RAW / name).read_bytes())
        header = 16 if "images" in name else 8
        assert tensor.to(torch.uint8).numpy().tobytes() == data[header:], name


def test_training_needs_no_network_and_changes_no_data(raw, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = list_files(raw)
    raw.chmod(0o555)
    run_here(tmp_path / "runs", f"--data-dir={tmp_path / 'data'}", *QUICK)
    raw.chmod(0o755)
    assert list_files(raw) == before


def truncated(raw):
    os.truncate(raw / TRAIN, 5_000_000)
    return TRAIN


def of_another_data_set(raw):
    """Fashion-MNIST has the same four names: its labels, sound and packed with gzip."""
    labels = gzip.decompress((raw / TRAIN_LABELS).read_bytes())
    (raw / TRAIN_LABELS).write_bytes(gzip.compress(labels[:8] + labels[:7:-1]))
    return TRAIN_LABELS


FAULTS = [truncated, of_another_data_set]


@pytest.fixture
def refusal(tmp_path, capsys):
    """refusal(data_dir): what main.py --data-dir says of it, in one line."""

    def call(data_dir):
        where = f"--output-dir={tmp_path / 'runs'}", f"--data-dir={data_dir}"
        assert main.main([*QUICK, *where, "--comet=off"]) == 2
        assert not any(tmp_path.glob("runs/*"))  # no empty folder is left
        error = capsys.readouterr().err
        assert error.startswith("main.py: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_file_that_is_not_mnists_is_named_and_left_as_it_is(fault, raw, refusal):
    name = fault(raw)
    before = list_files(raw)
    contents = [path.read_bytes() for path in before if path.is_file()]
    error = refusal(raw.parents[1])
    assert str(raw / name) in error and "MD5 sum" in error and SUMS[name] in error
    assert list_files(raw) == before
    assert [path.read_bytes() for path in before if path.is_file()] == contents


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that the second mirror serves; the first one is down."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirrors = [f"http://127.0.0.1:{port}/" for port in (9, server.server_port)]
        monkeypatch.setattr(MNIST, "mirrors", mirrors)
        monkeypatch.setenv("no_proxy", "*")
        yield tmp_path / "served"
        server.shutdown()


def test_missing_files_are_downloaded_and_kept(tmp_path, served, mnist):
    for name in SUMS:
        (served / name).symlink_to(RAW / name)
    found = main.load_mnist(str(tmp_path / "data"))
    assert all(torch.equal(*pair) for pair in zip(found, mnist))
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert {p.name: main.get_md5(p.read_bytes()) for p in raw.iterdir()} == SUMS


def test_a_mirror_with_another_file_is_an_error(raw, served, refusal):
    name = of_another_data_set(raw)
    (raw / name).rename(served / name)
    error = refusal(raw.parents[1])
    assert name in error and SUMS[name] in error
    assert not (raw / name).exists()


def test_without_files_the_error_says_what_to_put_where(tmp_path, served, refusal):
    error = refusal(tmp_path / "nothing")
    path = tmp_path / "nothing" / "MNIST" / "raw" / TRAIN
    assert str(path) in error and SUMS[TRAIN] in error and "put" in error
    assert not (tmp_path / "nothing").exists()
