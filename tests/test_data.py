"""MNIST: what is in the repository, and that it is all that a run needs."""

import ctypes
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import main

DATA = Path(main.__file__).parent / "data"
RAW = DATA / "MNIST" / "raw"
SUMS = {  # as torchvision.datasets.MNIST.resources lists them
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(DATA)


def list_files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def test_shapes_and_types(mnist):
    shapes = [tuple(tensor.shape) for tensor in mnist]
    assert shapes == [(60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,)]
    types = [torch.uint8, torch.int64, torch.uint8, torch.int64]
    assert [tensor.dtype for tensor in mnist] == types


def test_how_often_each_digit_is_there(mnist):
    training = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist[1].bincount().tolist() == training
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist[3].bincount().tolist() == test


def test_the_constants_are_the_training_images_mean_and_deviation(mnist):
    pixels = mnist[0].double() / 255
    assert round(float(pixels.mean()), 4) == main.MEAN == 0.1307
    assert round(float(pixels.std()), 4) == main.STD == 0.3081


@pytest.mark.parametrize("name", SUMS)
def test_the_archive_in_the_repository_is_the_original(name):
    assert hashlib.md5((RAW / name).read_bytes()).hexdigest() == SUMS[name]


def test_the_readme_beside_the_data_tells_what_it_is():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name, md5 in SUMS.items():
        assert name in text
        assert md5 in text
    for words in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert words in text


def test_git_ignores_what_is_unpacked_and_the_runs_not_the_archives(tmp_path):
    shutil.copy(Path(main.__file__).parent / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    raw = "data/MNIST/raw/"
    ignored = [raw + name.removesuffix(".gz") for name in SUMS]
    ignored += ["runs/20260101-120000-cnn/model.pt"]
    kept = [raw + name for name in SUMS] + ["main.py", "data/README.md"]
    told = subprocess.run(
        ["git", "-C", tmp_path, "check-ignore", *ignored, *kept],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    assert told.stdout.split() == ignored


def test_loading_needs_no_network(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    assert len(main.load_mnist(DATA)[0]) == 60_000


def test_loading_leaves_nothing_unpacked(tmp_path, monkeypatch):
    shutil.copytree(RAW, tmp_path / "data" / "MNIST" / "raw")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    before = list_files(tmp_path)
    main.load_mnist(tmp_path / "data")
    after = list_files(tmp_path)
    del before[tmp_path / "scratch"], after[tmp_path / "scratch"]
    assert after == before


def test_loading_says_nothing(capfd):
    main.load_mnist(DATA)
    assert capfd.readouterr() == ("", "")


def test_without_archives_the_mirrors_serve(tmp_path, monkeypatch, capfd, mnist):
    """torchvision downloads, with its bar, from a mirror: here, a real one of our own."""
    handler = partial(SimpleHTTPRequestHandler, directory=RAW)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(main.MNIST, "mirrors", [mirror])
        monkeypatch.setattr(main, "__file__", str(tmp_path / "main.py"))
        monkeypatch.setenv("no_proxy", "*")
        found = main.load_mnist(tmp_path / "data")
        server.shutdown()
    assert all(torch.equal(*pair) for pair in zip(found, mnist))
    assert "100%" in capfd.readouterr().err


def obey_file_modes():
    """Make root heed read-only files as everybody must: drop two of its capabilities."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_training_works_on_read_only_data(tmp_path, environment):
    script = shutil.copy(main.__file__, tmp_path)
    shutil.copytree(RAW, tmp_path / "data" / "MNIST" / "raw")
    before = list_files(tmp_path / "data")
    for path in [tmp_path / "data", *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    limit = obey_file_modes if os.geteuid() == 0 else None
    flags = ["--limit", "200", "--epochs", "1", "--comet", "off"]
    touched, trained = (
        subprocess.run(
            command, cwd=tmp_path, env=environment, preexec_fn=limit, check=False
        )
        for command in (
            ["touch", "data/MNIST/raw/new"],
            [sys.executable, script, *flags],
        )
    )
    assert touched.returncode != 0
    assert trained.returncode == 0
    assert list_files(tmp_path / "data") == before
    (model,) = tmp_path.glob("runs/*/model.pt")
    assert model.stat().st_size > 4 * 124_670
