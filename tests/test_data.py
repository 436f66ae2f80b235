"""MNIST: what is in the repository is all that a run needs, and is never written over."""

import ctypes
import functools
import gzip
import hashlib
import http.server
import os
import resource
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, _child
from torchvision.datasets import MNIST

import main

RAW = ROOT / "data" / "MNIST" / "raw"
TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = SUMS = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def md5(data):
    return hashlib.md5(data).hexdigest()


def list_files(folder):
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(str(ROOT / "data"))


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
    for name, tensor in zip(SUMS, mnist):
        data = gzip.decompress((RAW / name).read_bytes())
        header = 16 if "images" in name else 8
        assert tensor.to(torch.uint8).numpy().tobytes() == data[header:], name


def test_the_constants_are_the_training_images_mean_and_deviation(mnist):
    pixels = mnist[0].double() / 255
    assert round(float(pixels.mean()), 4) == main.MEAN == 0.1307
    assert round(float(pixels.std()), 4) == main.STD == 0.3081


def test_the_archives_are_the_originals_and_the_readme_tells_of_them():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name, md5_sum in SUMS.items():
        assert md5((RAW / name).read_bytes()) == md5_sum
        assert name in text and md5_sum in text
    for words in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"):
        assert words in text


def be_without_privileges(arguments, folder, out, environment):
    """Be main.py, without a network, that heeds file modes even if root starts it."""

    def refuse(*arguments, **named):
        raise AssertionError("the network was asked for")

    socket.socket.connect = socket.getaddrinfo = refuse
    header, no_capability = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, no_capability) == 0
    with pytest.raises(PermissionError):
        (folder / "data" / "MNIST" / "raw" / "new").touch()
    _child(arguments, folder, out, environment)


def test_training_works_on_read_only_data_without_a_network(raw, tmp_path, environment):
    before = list_files(raw)
    folders = raw, raw.parent, raw.parents[1]
    for path in folders:
        path.chmod(0o555)
    flags = ["--data-dir", "data", "--limit", "64", "--epochs", "1", "--comet", "off"]
    flags += ["--model", "fc"]
    run = Run(flags, tmp_path, environment, be_without_privileges)
    status = run.wait()
    for path in folders:
        path.chmod(0o755)
    assert status == 0, run.stderr
    assert list_files(raw) == before
    assert (run.run_dir / "model.pt").stat().st_size > 4 * 101_770


def truncated(raw):
    os.truncate(raw / TRAIN, 5_000_000)
    return TRAIN


def one_flipped_bit(raw):
    data = bytearray((raw / TRAIN_LABELS).read_bytes())
    data[20_000] ^= 1
    (raw / TRAIN_LABELS).write_bytes(data)
    return TRAIN_LABELS


def of_another_data_set(raw):
    """Fashion-MNIST has the same four names: its labels, sound and packed with gzip."""
    labels = gzip.decompress((raw / TRAIN_LABELS).read_bytes())
    (raw / TRAIN_LABELS).write_bytes(gzip.compress(labels[:8] + labels[:7:-1]))
    return TRAIN_LABELS


def a_folder(raw):
    (raw / TEST).unlink()
    (raw / TEST).mkdir()
    return TEST


FAULTS = [truncated, one_flipped_bit, of_another_data_set, a_folder]


@pytest.fixture
def train(tmp_path, capsys):
    """train(data_dir): what main.py --data-dir says on standard error, and its status."""

    def call(data_dir):
        flags = "--limit=64", "--epochs=1", f"--output-dir={tmp_path / 'runs'}"
        status = main.main([*flags, "--comet=off", "--data-dir", str(data_dir)])
        errors = capsys.readouterr().err
        if status:  # no empty folder is left
            assert not any(tmp_path.glob("runs/*"))
        return status, errors

    return call


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_file_that_is_not_mnists_is_named_and_left_as_it_is(fault, raw, train):
    name = fault(raw)
    before = list_files(raw)
    contents = [path.read_bytes() for path in before if path.is_file()]
    status, errors = train(raw.parents[1])
    assert status == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("main.py: ") and str(raw / name) in errors
    assert "MD5 sum" in errors and SUMS[name] in errors
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


def test_missing_files_are_downloaded_and_kept_if_that_is_possible(
    tmp_path, served, mnist
):
    """Where no file may grow above 1 MB, no half of one stays."""
    for name in SUMS:
        (served / name).symlink_to(RAW / name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        found = main.load_mnist(str(tmp_path / "data"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(torch.equal(*pair) for pair in zip(found, mnist))
    raw = tmp_path / "data" / "MNIST" / "raw"
    kept = {path.name: md5(path.read_bytes()) for path in raw.iterdir()}
    assert kept == {name: SUMS[name] for name in (TRAIN_LABELS, TEST_LABELS)}
    main.load_mnist(f"{tmp_path}/./data")  # which is not cached
    assert {path.name: md5(path.read_bytes()) for path in raw.iterdir()} == SUMS


def test_a_mirror_with_another_file_is_an_error(raw, served, train):
    name = one_flipped_bit(raw)
    (raw / name).rename(served / name)
    status, errors = train(raw.parents[1])
    assert status == 2 and errors.count("\n") == 1, errors
    assert name in errors and SUMS[name] in errors
    assert not (raw / name).exists()


def test_a_mirror_that_breaks_off_is_an_error(raw, train, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (raw / TRAIN).unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def break_off():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9912422\r\n\r\nabc")
            connection.close()

        threading.Thread(target=break_off, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address])
        status, errors = train(raw.parents[1])
    assert status == 2 and "Traceback" not in errors, errors
    assert str(raw / TRAIN) in errors and not (raw / TRAIN).exists()


def test_without_files_the_error_says_what_to_put_where(tmp_path, served, train):
    status, errors = train(tmp_path / "nothing")
    assert status == 2 and errors.count("\n") == 1, errors
    path = tmp_path / "nothing" / "MNIST" / "raw" / TRAIN
    assert str(path) in errors and SUMS[TRAIN] in errors and "put" in errors
    assert not (tmp_path / "nothing").exists()
