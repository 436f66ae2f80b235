"""Files from elsewhere cannot run code, nor fill the memory: they are refused."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict

import fuzz
import pytest
import torch
from conftest import FORKS, ROOT, Run

import main

QUICK = ["--limit", "64", "--epochs", "1", "--comet", "off"]
MEGABYTE = 1024  # in kB, as the peak of memory is measured


@pytest.fixture(scope="module", autouse=True)
def forty_faults():
    """tests/fuzz.py, which is at work while the other tests are."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--count=40", "--seed=2"]
    process = subprocess.Popen(
        [*command, "--jobs=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    yield process
    process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(model, optimizer): folder} of small runs that have ended well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    runs = {}
    for model, optimizer in (("cnn", "sgd"), ("fc", "adam")):
        flags = [*QUICK, "--model", model, "--optimizer", optimizer]
        runs[model, optimizer] = Run(flags, tmp_path_factory.mktemp(model), environment)
    for run in runs.values():
        assert run.wait() == 0, run.stderr
    return {key: run.run_dir for key, run in runs.items()}


@pytest.fixture
def sound(runs):
    """A sound checkpoint: its path."""
    return runs["cnn", "sgd"] / "checkpoint.pt"


def assert_refused(path):
    """Check that load_tensors refuses a file in one short line that names it."""
    with pytest.raises(main.InputError) as caught:
        main.load_tensors(path)
    assert str(path) in str(caught.value) and caught.value.status == 2
    assert len(str(caught.value)) < len(str(path)) + 300


# ---------------------------------------------------------------------- made-up files


class Storage:
    """Stands for the numbers of a tensor: a member of the archive and how many."""

    def __init__(self, key, count, kind=torch.FloatStorage):
        self.about = "storage", kind, key, "cpu", count


class Tensor:
    """Stands for a tensor that may claim whatever it likes."""

    def __init__(self, storage, size, stride, offset=0):
        self.about = storage, offset, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.about


class Call:
    """Has a function called when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.about if isinstance(value, Storage) else None


def pickled(value, protocol=2):
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def forge(path, value, numbers=b"\0" * 400, packed=zipfile.ZIP_STORED, protocol=2):
    """Write a file as torch.save does, of `value` and of one storage, "0"."""
    data = value if isinstance(value, bytes) else pickled(value, protocol)
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", numbers)
        archive.writestr("archive/version", b"3\n")
    return path


def test_what_is_forged_here_is_otherwise_sound(tmp_path):
    numbers = struct.pack("<100f", *range(100))
    tensor = Tensor(Storage("0", 100), (2, 50), (50, 1))
    loaded = main.load_tensors(forge(tmp_path / "file", {"a": [tensor, 1.5]}, numbers))
    assert torch.equal(loaded["a"][0], torch.arange(100.0).reshape(2, 50))


@pytest.mark.parametrize("form", ["forged", "zip", "legacy", "plain", "protocol 4"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, form):
    path, made = tmp_path / "file", tmp_path / "made"
    value = {"model": Call(os.mkdir, str(made))}
    if form == "plain":
        path.write_bytes(pickle.dumps(value))
    elif form in ("zip", "legacy"):
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    else:
        forge(path, value, protocol=4 if form == "protocol 4" else 2)
    assert_refused(path)
    assert not made.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert made.exists()  # it would have


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 10**11),
        Call(bytes, 10**11),
        Call(range, 10**11),
        Call(eval, "1"),
        Call(getattr, 1, "real"),
        Call(torch.ones, 10**6),
        Call(torch._utils._rebuild_parameter, None, False, OrderedDict()),
        Call(__import__, "os"),
    ],
    ids=lambda value: value.call[0].__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_only_tensors_and_plain_values_are_built(tmp_path, value, protocol):
    assert_refused(forge(tmp_path / "file", {"a": value}, protocol=protocol))


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(Storage("0", 10**10), (10**10,), (1,)),
        Tensor(Storage("0", 100), (101,), (1,)),
        Tensor(Storage("0", 100), (10,), (100,)),
        Tensor(Storage("0", 100), (10**18, 10**18), (1, 1)),
        Tensor(Storage("0", 100), (10,), (1,), 10**6),
        Tensor(Storage("0", 100), (10,), (1,), -4),
        Tensor(Storage("0", 100), (10,), (-1,)),
        Tensor(Storage("0", 100), (-10,), (1,)),
        Tensor(Storage("0", -1), (10,), (1,)),
        Tensor(Storage("1", 100), (100,), (1,)),
        Tensor(Storage("../0", 100), (100,), (1,)),
    ],
    ids=lambda tensor: repr([*tensor.about[0].about[2:], *tensor.about[1:4]]),
)
def test_a_tensor_beyond_its_numbers_is_refused(tmp_path, tensor):
    assert_refused(forge(tmp_path / "file", {"a": tensor}))


def test_a_torchscript_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        torch.jit.save(module, tmp_path / "file")
    assert_refused(tmp_path / "file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100_000,
        b"not a checkpoint\n",
        b"PK\x05\x06" + b"\0" * 18,
        b"PK\x03\x04" + b"\xff" * 100,
        b"\x80\x02}q\x00.",
    ],
    ids=lambda data: repr(data[:10]),
)
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    assert_refused(tmp_path / "file")


def test_a_folder_or_nothing_at_all_is_refused(tmp_path):
    assert_refused(tmp_path)
    assert_refused(tmp_path / "nothing")


def test_a_pickle_without_an_end_is_refused(tmp_path, sound):
    with zipfile.ZipFile(sound) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(name)
    for size in range(0, len(data), 97):
        assert_refused(forge(tmp_path / "file", data[:size]))
    assert_refused(forge(tmp_path / "file", b"\x80\x02" + b"(" * 100_000 + b"."))
    assert_refused(forge(tmp_path / "file", b"\x80\x02" + b"]" * 9 + b"a" * 9 + b"."))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, sound):
    data = sound.read_bytes()
    for size in range(0, len(data), len(data) // 97):
        (tmp_path / "file").write_bytes(data[:size])
        assert_refused(tmp_path / "file")


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path, sound):
    data = bytearray(sound.read_bytes())
    with zipfile.ZipFile(sound) as archive:
        places = [entry.header_offset for entry in archive.infolist()]
        ends = [*places[1:], archive.start_dir]
    for begin, end in zip(places, ends):
        # The members' contents end where the next header begins, save a few bytes.
        with zipfile.ZipFile(sound) as archive:
            entry = next(e for e in archive.infolist() if e.header_offset == begin)
        place = end - 20 - entry.file_size // 2
        if entry.file_size < 100:
            continue
        data[place] ^= 1
        (tmp_path / "file").write_bytes(data)
        assert_refused(tmp_path / "file")
        data[place] ^= 1
    (tmp_path / "file").write_bytes(data)
    assert main.load_tensors(tmp_path / "file")


# --------------------------------------------------------------- as what --resume reads


def copy_with(change, run, folder):
    """Copy a run into the folder, its checkpoint changed; return where it is then.

    `change` takes the path of the checkpoint, and changes it or returns what is to be
    in it.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    path = shutil.copytree(run, folder / "run") / "checkpoint.pt"
    if (changed := change(path)) is not None:
        main.save_tensors(path, changed)
    return path.parent


@pytest.fixture
def resume(tmp_path, runs):
    """resume(change, ...): main.py --resume of a copy of a run, in a process.

    Returns (exit status, standard error, peak of memory in kB).
    """

    def start(change, key=("cnn", "sgd"), *flags):
        folder = copy_with(change, runs[key], tmp_path)
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        arguments = ["--resume", "run", *flags], tmp_path
        process = FORKS.Process(target=fuzz.be_main, args=arguments)
        process.start()
        process.join(120)
        errors = (tmp_path / "err").read_text(encoding="utf-8")
        assert process.exitcode is not None and "Traceback" not in errors, errors
        if process.exitcode == 2:
            assert errors.count("\n") == 1 and len(errors) < 500, errors
            after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
            assert before == after
        return process.exitcode, errors, int((tmp_path / "peak").read_text("ascii"))

    return start


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


@pytest.fixture
def refusal(tmp_path, runs, mnist, monkeypatch):
    """refusal(change, ...): why a copy of a run, its checkpoint changed, is refused."""
    monkeypatch.setattr(main, "load_mnist", lambda _: mnist)  # it takes its time
    monkeypatch.chdir(tmp_path)

    def refuse(change, key=("cnn", "sgd")):
        folder = copy_with(change, runs[key], tmp_path)
        settings = main.read_settings(["--resume", str(folder), "--epochs", "2"])
        with pytest.raises(main.InputError, match=r"checkpoint.pt") as caught:
            main.Run(settings, folder)
        assert len(str(caught.value)) < 500 and caught.value.status == 2
        assert not any(tmp_path.rglob("*evil*"))

    return refuse


def change(*keys, to):
    """Return a change of the checkpoint for resume: the value at `keys` becomes `to`."""

    def do(path):
        values = place = main.load_tensors(path)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        return values

    return do


def nested(depth):
    """Return lists in lists: 10 ** depth numbers for whoever writes them out."""
    value = [0.0] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def endless(kind=torch.float32, size=400_000_000):
    """Return a tensor of one number that says it is many."""
    return torch.zeros(1, dtype=kind).expand(size)


@pytest.fixture(scope="module")
def usual_peak(runs, tmp_path_factory):
    """The peak of memory of a run that has nothing to refuse, in kB."""
    folder = tmp_path_factory.mktemp("peak")
    shutil.copytree(runs["cnn", "sgd"], folder / "run")
    process = FORKS.Process(target=fuzz.be_main, args=(["--resume", "run"], folder))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return int((folder / "peak").read_text(encoding="ascii"))


def zip_bomb(path):
    """Write 8 tensors of 100 MB each, all zero, into a file of 1 MB."""
    keys = [str(key) for key in range(8)]
    count = 25_000_000
    tensors = [Tensor(Storage(key, count), (count,), (1,)) for key in keys]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickled(tensors))
        for key in keys:
            archive.writestr(f"archive/data/{key}", b"\0" * count * 4)
        archive.writestr("archive/version", b"3\n")


def greedy_claims(path):
    """Write 60 tensors of one number each, whose storages claim the rest of the file."""
    tensors = [Tensor(Storage(str(key), 10**7), (1,), (1,)) for key in range(60)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(tensors))
        for key in range(60):
            archive.writestr(f"archive/data/{key}", b"\0" * 4)
        archive.writestr("archive/data/60", b"\0" * 40_000_000)
        archive.writestr("archive/version", b"3\n")


def endless_progress(path):
    values = main.load_tensors(path)
    values["progress"] = {
        name: endless(size=100_000_000) for name in values["progress"]
    }
    return values


@pytest.mark.parametrize(
    "bomb",
    [
        zip_bomb,
        greedy_claims,
        endless_progress,
        change("progress", "losses", to=endless()),
        change("progress", "train_loss", to=endless()),
        change("progress", "losses", to=nested(8)),
        change("progress", "losses", to=[0.0] * 500_000),
        change("generator", to=endless(torch.uint8, 1_500_000_000)),
        change("comet_key", to=nested(8)),
        change("comet_key", to="0" * 50_000_000),
        change("settings", to=nested(8)),
        change("settings", "lr", to=nested(8)),
        change("settings", "lr", to=endless(torch.float32, 1_500_000_000)),
        change("model", to=nested(8)),
        change("model", "fc1.weight", to=endless()),
        change("optimizer", to={0: {"momentum_buffer": endless()}}),
        change("optimizer", to=endless()),
    ],
    ids=[
        "zip bomb",
        "claims of the rest of the file",
        "endless progress",
        "endless losses",
        "endless train_loss",
        "nested losses",
        "too many losses",
        "endless generator",
        "nested key",
        "long key",
        "nested settings",
        "nested lr",
        "endless lr",
        "nested model",
        "endless weights",
        "endless optimizer",
        "a tensor for the optimizer",
    ],
)
def test_a_bomb_is_refused_in_little_memory(resume, usual_peak, bomb):
    status, errors, peak = resume(bomb)
    assert status == 2, errors
    assert "checkpoint.pt" in errors
    assert peak < usual_peak + 200 * MEGABYTE


@pytest.mark.parametrize("place", ["exp_avg", "exp_avg_sq", "step"])
def test_an_endless_state_of_adam_is_refused_in_little_memory(
    resume, usual_peak, place
):
    bomb = change("optimizer", 0, place, to=endless(torch.float32))
    status, errors, peak = resume(bomb, ("fc", "adam"))
    assert status == 2, errors
    assert peak < usual_peak + 200 * MEGABYTE


def without(*keys):
    def do(path):
        values = place = main.load_tensors(path)
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return values

    return do


FOREIGN = {
    "code": lambda path: forge(path, Call(os.mkdir, "evil")) and None,
    "text": lambda path: path.write_text("text", encoding="ascii") and None,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a list": lambda path: [1, 2],
    "no model": without("model"),
    "no optimizer": without("optimizer"),
    "no generator": without("generator"),
    "no progress": without("progress"),
    "no losses": without("progress", "losses"),
    "no key": without("comet_key"),
    "no lr": without("settings", "lr"),
    "other lr": change("settings", "lr", to=0.5),
    "no weight": without("model", "fc1.bias"),
    "other weight": change("model", "fc1.bias", to=torch.zeros(7)),
    "weights of whole numbers": change("model", "fc1.bias", to=[0.0] * 128),
    "losses that are text": change("progress", "losses", to="abc"),
    "losses that are None": change("progress", "losses", to=[None]),
    "losses that are not finite": change("progress", "losses", to=[float("nan")]),
    "more epochs than losses": change("progress", "train_loss", to=[1.0, 1.0]),
    "fewer epochs than losses": change("progress", "train_accuracy", to=[]),
    "a key that is a path": change("comet_key", to="../../evil"),
    "a key that is absolute": change("comet_key", to="/tmp/evil"),
    "a key that is none": change("comet_key", to=None),
    "a short generator": change("generator", to=torch.zeros(7, dtype=torch.uint8)),
    "an odd generator": change(
        "generator", to=torch.full((5056,), 255, dtype=torch.uint8)
    ),
    "a generator of floats": change("generator", to=torch.zeros(5056)),
    "an optimizer for SGD": change("optimizer", to={0: {"exp_avg": torch.zeros(1)}}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_that_is_not_of_the_run_is_refused(refusal, name):
    refusal(FOREIGN[name])


@pytest.mark.parametrize("key", [("cnn", "sgd"), ("fc", "adam")])
def test_a_checkpoint_of_another_model_is_refused(refusal, runs, key):
    (other,) = set(runs) - {key}
    refusal(lambda path: shutil.copy(runs[other] / path.name, path) and None, key)


@pytest.mark.parametrize(
    "broken",
    [
        change("optimizer", to={0: {"step": torch.tensor(1.0)}}),
        change("optimizer", 0, "exp_avg", to=torch.zeros(1)),
        change("optimizer", 0, "step", to=torch.tensor(-1.0)),
        change("optimizer", 0, "step", to=torch.tensor(float("nan"))),
        change("optimizer", 0, "step", to=torch.tensor(1e9)),
        change("optimizer", 0, "step", to=torch.tensor(255, dtype=torch.uint8)),
        without("optimizer", 3),
        without("optimizer", 0, "exp_avg"),
    ],
    ids=[
        "only steps",
        "other sizes",
        "steps below 0",
        "steps that are no number",
        "too many steps",
        "steps as bytes",
        "a parameter less",
        "an average less",
    ],
)
def test_an_adam_that_lacks_its_state_is_refused(refusal, broken):
    refusal(broken, ("fc", "adam"))


def test_a_foreign_checkpoint_ends_the_process_with_one_line(resume):
    status, errors, _ = resume(FOREIGN["other weight"])
    assert status == 2 and errors.startswith("main.py: run/checkpoint.pt is not"), (
        errors
    )


def test_weights_that_are_no_numbers_end_in_an_error(resume):
    broken = change("model", "fc1.bias", to=torch.full((128,), float("nan")))
    status, errors, _ = resume(broken)
    assert status in (1, 2) and "main.py: " in errors


def test_what_is_changed_here_is_otherwise_sound(resume, runs):
    for key in runs:
        status, errors, _ = resume(main.load_tensors, key, "--epochs", "2")
        assert status == 0, errors


def test_a_huge_config_is_refused_in_little_memory(resume, usual_peak):
    def grow(path):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config).replace('"cnn"', '"' + "x" * 400_000_000 + '"')
        (path.parent / "config.json").write_text(text, encoding="utf-8")

    status, errors, peak = resume(grow)
    assert status == 2 and "config.json" in errors
    assert peak < usual_peak + 200 * MEGABYTE


# --------------------------------------------------------------------------- at random


def test_forty_random_faults_end_as_documented(forty_faults):
    out, errors = forty_faults.communicate(timeout=300)
    assert forty_faults.returncode == 0, out + errors
    assert "40 cases, 0 gone wrong" in out
