"""Damaged MNIST files: repaired or refused, never trained on. Real files, real sockets."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from torchvision.datasets import MNIST

import main

BUNDLED = ROOT / "data" / "MNIST" / "raw"
MD5 = dict(MNIST.resources)
TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = MD5
HEADER = {TRAIN: 16, TRAIN_LABELS: 8, TEST: 16, TEST_LABELS: 8}  # bytes


def md5(data):
    return hashlib.md5(data).hexdigest()


@functools.cache
def expected():
    """The sums of what is in the four archives, as gzip alone reads them."""
    contents = (gzip.decompress((BUNDLED / name).read_bytes()) for name in MD5)
    return [md5(data[skip:]) for data, skip in zip(contents, HEADER.values())]


def sums(tensors):
    """The sums of the four tensors of load_mnist, a byte for each of their numbers."""
    return [md5(tensor.numpy().astype("uint8").tobytes()) for tensor in tensors]


@pytest.fixture
def raw(tmp_path):
    """A copy of the four archives, to be damaged: the folder data/MNIST/raw."""
    yield Path(shutil.copytree(BUNDLED, tmp_path / "data" / "MNIST" / "raw"))
    for path in tmp_path.iterdir():  # pytest would keep them
        shutil.rmtree(path)


# Each makes one fault, and returns the names of the archives that are at fault then.


def missing(raw):
    (raw / TRAIN).unlink()
    return [TRAIN]


def truncated(raw):
    os.truncate(raw / TRAIN, 5_000_000)
    return [TRAIN]


def emptied(raw):
    os.truncate(raw / TEST_LABELS, 0)
    return [TEST_LABELS]


def one_flipped_byte(raw):
    with open(raw / TRAIN_LABELS, "r+b") as file:
        file.seek(20_000)
        byte = file.read(1)[0]
        file.seek(20_000)
        file.write(bytes([byte ^ 1]))
    return [TRAIN_LABELS]


def one_byte_more(raw):
    with open(raw / TEST, "ab") as file:
        file.write(b"\0")
    return [TEST]


def half_unpacked(raw):
    data = gzip.decompress((raw / TRAIN).read_bytes())
    (raw / TRAIN).with_suffix("").write_bytes(data[: len(data) // 2])
    return []


def half_unpacked_and_no_archive(raw):
    half_unpacked(raw)
    (raw / TRAIN).unlink()
    return [TRAIN]


def other_images_unpacked(raw):
    data = gzip.decompress((raw / TEST).read_bytes())
    (raw / TEST).with_suffix("").write_bytes(data[:16] + bytes(10_000 * 28 * 28))
    return []


def train_and_test_swapped(raw):
    os.rename(raw / TRAIN, raw / "x")
    os.rename(raw / TEST, raw / TRAIN)
    os.rename(raw / "x", raw / TEST)
    return [TRAIN, TEST]


def images_and_labels_swapped(raw):
    os.rename(raw / TEST, raw / "x")
    os.rename(raw / TEST_LABELS, raw / TEST)
    os.rename(raw / "x", raw / TEST_LABELS)
    return [TEST, TEST_LABELS]


def fewer_labels_than_images(raw):
    labels = gzip.decompress((raw / TRAIN_LABELS).read_bytes())[8:-1]
    header = (0x801).to_bytes(4, "big") + len(labels).to_bytes(4, "big")
    (raw / TRAIN_LABELS).write_bytes(gzip.compress(header + labels))
    return [TRAIN_LABELS]


def other_labels(raw):
    labels = gzip.decompress((raw / TRAIN_LABELS).read_bytes())
    (raw / TRAIN_LABELS).write_bytes(gzip.compress(labels[:8] + labels[:7:-1]))
    return [TRAIN_LABELS]


def empty_folder(raw):
    for path in raw.iterdir():
        path.unlink()
    return list(MD5)


def no_such_folder(raw):
    shutil.rmtree(raw.parent.parent)
    return list(MD5)


def link_to_nothing(raw):
    (raw / TEST).unlink()
    (raw / TEST).symlink_to("nothing")
    return [TEST]


def named_pipe(raw):
    (raw / TEST).unlink()
    os.mkfifo(raw / TEST)
    return [TEST]


FAULTS = [
    missing,
    truncated,
    emptied,
    one_flipped_byte,
    one_byte_more,
    half_unpacked,
    half_unpacked_and_no_archive,
    other_images_unpacked,
    train_and_test_swapped,
    images_and_labels_swapped,
    fewer_labels_than_images,
    other_labels,
    empty_folder,
    no_such_folder,
    link_to_nothing,
    named_pipe,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_and_repaired(fault, raw, capsys):
    names = fault(raw)
    tensors = main.load_mnist(str(raw.parent.parent))
    assert sums(tensors) == expected()
    errors = capsys.readouterr().err
    assert errors.count("\n") == bool(names) and (str(raw) in errors) == bool(names)
    assert [name for name in MD5 if name in errors] == sorted(
        names, key=list(MD5).index
    )
    assert {name: md5((raw / name).read_bytes()) for name in MD5} == MD5
    assert not any(raw.glob("*.part"))


def test_sound_archives_are_left_as_they_are(raw, capsys):
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    assert sums(main.load_mnist(str(raw.parent.parent))) == expected()
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before
    assert capsys.readouterr() == ("", "")


def test_a_folder_in_the_place_of_an_archive_is_named_and_left(raw, capsys):
    (raw / TEST).unlink()
    (raw / TEST).mkdir()
    assert sums(main.load_mnist(str(raw.parent.parent))) == expected()
    errors = capsys.readouterr().err
    assert str(raw) in errors and TEST in errors
    assert (raw / TEST).is_dir() and not any(raw.glob("*.part"))


def test_nothing_is_left_in_the_temporary_folder(raw, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    main.load_mnist(str(raw.parent.parent))
    assert not any((tmp_path / "tmp").iterdir())


# ------------------------------------------------------------------- without permission


@contextlib.contextmanager
def unprivileged():
    """Be no user's process for a while, if we are root's: root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that every user can read, with main.py, data/, and a copy own/ of that."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(ROOT / "main.py", folder)
        for copy in "data", "own":
            shutil.copytree(BUNDLED, folder / copy / "MNIST" / "raw")
        yield folder


@pytest.mark.parametrize("closed", ["own", f"own/MNIST/raw/{TRAIN}"])
def test_what_may_not_be_read_is_taken_from_beside_the_script(public, closed, capsys):
    script = module_at(public / "main.py")
    script.load_mnist(str(public / "data"))  # whatever is to be imported, is by now
    (public / closed).chmod(0)
    with unprivileged():
        tensors = script.load_mnist(str(public / "own"))
    (public / closed).chmod(0o755)
    assert sums(tensors) == expected()
    errors = capsys.readouterr().err
    assert str(public / "own" / "MNIST" / "raw") in errors and TRAIN in errors


# -------------------------------------------------------- without the bundled archives


def module_at(script):
    """Import the main.py at `script`."""
    spec = importlib.util.spec_from_file_location("other_main", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lonely(tmp_path):
    """main, of a copy of main.py that has no data/ beside it."""
    (tmp_path / "lonely").mkdir()
    return module_at(shutil.copy(ROOT / "main.py", tmp_path / "lonely"))


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """mirror(folder): have torchvision download from a server of that folder."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(folder):
        handler = functools.partial(Handler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def no_mirror(monkeypatch):
    """Have torchvision download from a port that refuses."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])


def assert_says_what_to_do(text, path):
    """Check the last line: the file, its size and sum, where to put it."""
    line = text.splitlines()[-1]
    size = (BUNDLED / path.name).stat().st_size
    assert str(path) in line and MD5[path.name] in line, text
    assert f"{size:,} bytes" in line and "put" in line, text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_without_originals_a_fault_is_an_error(lonely, no_mirror, raw, fault):
    names = fault(raw)
    if not names:  # what is unpacked there does not count
        assert sums(lonely.load_mnist(str(raw.parent.parent))) == expected()
        return
    with pytest.raises(lonely.InputError) as caught:
        lonely.load_mnist(str(raw.parent.parent))
    assert caught.value.status == 2
    assert_says_what_to_do(str(caught.value), raw / names[0])


@pytest.mark.parametrize("fault", [one_flipped_byte, empty_folder])
def test_a_mirror_serves_verified_and_kept(lonely, mirror, raw, fault, capsys):
    names = fault(raw)
    mirror(BUNDLED)
    assert sums(lonely.load_mnist(str(raw.parent.parent))) == expected()
    errors = capsys.readouterr().err
    assert str(raw) in errors and all(name in errors for name in names)
    assert {name: md5((raw / name).read_bytes()) for name in MD5} == MD5


@pytest.mark.parametrize("fault", [one_flipped_byte, other_labels, truncated, missing])
def test_a_mirror_with_damaged_files_is_an_error(lonely, mirror, raw, tmp_path, fault):
    shutil.copytree(BUNDLED, tmp_path / "served")
    (name,) = fault(tmp_path / "served")
    (raw / name).unlink()
    mirror(tmp_path / "served")
    with pytest.raises(lonely.InputError) as caught:
        lonely.load_mnist(str(raw.parent.parent))
    assert_says_what_to_do(str(caught.value), raw / name)
    assert not (raw / name).exists()


def test_the_script_without_data_and_network_says_what_to_do(environment, tmp_path):
    shutil.copy(ROOT / "main.py", tmp_path)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py", "--comet", "off"],
        cwd=tmp_path,
        env=environment | nowhere | {"no_proxy": ""},
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 2, done
    assert_says_what_to_do(done.stderr, tmp_path / "data" / "MNIST" / "raw" / TRAIN)
    assert done.stderr.count("\n") <= 2 and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.glob("runs/*"))
