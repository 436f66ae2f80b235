"""Stopped, killed, out of room, gone wrong: what is kept, and how a run goes on."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
from hashlib import md5

import conftest
import pytest
import torch
from conftest import LINUX, Run, _child, become, get_folders, make_environment, run_here
from matplotlib.image import imread
from offline import Archive

import main

# Three epochs of 160 steps: each lasts long enough to be stopped within.
FLAGS = "--limit", "640", "--batch-size", "4", "--epochs", "3"
ADAM = "--optimizer=adam", "--lr=0.003"
KINDS = {  # signal: what it stops, and how that is tracked
    signal.SIGINT: ("--model", "cnn", "--optimizer", "sgd", "--comet", "offline"),
    signal.SIGHUP: ("--recipe=accurate", "--model=fc", *ADAM, "--comet=offline"),
    signal.SIGKILL: ("--model=fc", *ADAM, "--comet", "off"),
}
SMALL = [*FLAGS, *KINDS[signal.SIGKILL]]


def start(folder, *flags, target=_child):
    """Start main.py with these flags in a folder; return the Run."""
    environment = make_environment(folder / "home", TEST_IMAGES="1000")
    return Run(list(map(str, flags)), folder, environment, target)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def flatten(value, place=()):
    """Yield what is in dicts and lists in one another, and where; tensors as sums."""
    items = list(enumerate(value)) if isinstance(value, (list, tuple)) else ()
    items = value.items() if isinstance(value, dict) else items
    for key, inner in items:
        if key not in ("epoch_seconds", "experiment_key", "comet", "output_dir"):
            yield from flatten(inner, (*place, key))
    if isinstance(value, torch.Tensor):
        value = value.dtype, md5(value.contiguous().numpy().tobytes()).hexdigest()
    if not isinstance(value, (dict, list)):
        yield place, value


def outcome(folder):
    """What a run has come to, to the last bit, save the time it took."""
    paths = folder / "model.pt", folder / "checkpoint.pt"
    parts = [torch.load(path, weights_only=True) for path in paths]
    return list(flatten([*parts, read(folder, "metrics.json")]))


def assert_whole(folder):
    """Check that every file of a run's folder is whole, and that there is no other."""
    for path in folder.iterdir():
        if path.suffix == ".png":
            assert imread(path).size > 10_000
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        else:
            kind = {".json": json.load, ".pt": torch.load, ".zip": Archive}[path.suffix]
            assert kind(path.open("rb")), path


def lines(run):
    """The lines on standard error, without those of the progress bars."""
    pieces = re.split("[\r\n]+", run.stderr)
    return [piece for piece in pieces if piece and "%|" not in piece]


def stop_in_second_epoch(run, number):
    run.wait_for(lambda: "Epoch 1/3" in run.stdout)
    run.kill(number)


class Story:
    """A run that nothing stops, and its like, stopped in the second epoch and resumed."""

    def __init__(self, folder, number):
        self.number, flags = number, [*FLAGS, *KINDS[number]]
        self.run = start(folder, *flags, "--output-dir", "my runs")
        self.undisturbed = start(folder / "undisturbed", *flags, "--comet", "off")

    def stop(self):
        stop_in_second_epoch(self.run, self.number)
        self.status = self.run.wait()
        (self.folder,) = get_folders(self.run.folder / "my runs")
        self.stopped = shutil.copytree(self.folder, self.run.folder / "stopped")

    def go_on(self):
        """Enter the command that the run has printed."""
        flags = ["--resume", str(self.folder)]
        if self.number != signal.SIGKILL:
            (line,) = (x for x in self.run.stderr.splitlines() if "--resume" in x)
            flags = shlex.split(line.partition("python main.py ")[2])
        self.resumed = start(self.run.folder, *flags)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    stories = {}
    for number in KINDS:
        stories[number] = Story(tmp_path_factory.mktemp("story"), number)
        stories[number].stop()
        stories[number].go_on()
    for story in stories.values():
        assert story.resumed.wait() == 0, story.resumed.stderr
        assert story.undisturbed.wait() == 0, story.undisturbed.stderr
        story.whole = story.undisturbed.run_dir
    return stories


def by_signal(*numbers):
    return pytest.mark.parametrize("number", numbers, ids=lambda number: number.name)


CAUGHT = signal.SIGINT, signal.SIGHUP


@by_signal(*KINDS)
def test_a_resumed_run_ends_bit_for_bit_like_one_never_stopped(stories, number):
    story = stories[number]
    assert outcome(story.folder) == outcome(story.whole)
    assert_whole(story.folder)
    assert "Epoch 1/3" not in story.resumed.stdout
    assert "Epoch 3/3" in story.resumed.stdout


@by_signal(*CAUGHT)
def test_a_stopped_run_says_how_to_go_on_and_keeps_its_epochs(stories, number):
    story, told = stories[number], lines(stories[number].run)
    assert story.status == 128 + number
    assert "Epoch 3/3" not in story.run.stdout and "COMPLETE" not in story.run.stdout
    assert 2 <= len(told) <= 3 and sum(number.name in line for line in told) == 1
    command = f"python main.py --resume 'my runs/{story.folder.name}'"
    assert sum(command in line for line in told) == 1
    assert_whole(story.stopped)
    names = {p.name for p in story.stopped.iterdir() if p.suffix != ".zip"}
    data = {"config.json", "metrics.json", "checkpoint.pt", "report.html"}
    assert names == data | {"loss_curve.png"}
    kept = read(story.stopped, "metrics.json")
    whole = read(story.whole, "metrics.json")
    epochs = len(kept["train_loss"])
    assert epochs in (1, 2) and len(kept["losses"]) == 160 * epochs
    for name in "train_loss", "train_accuracy", "losses":
        assert kept[name] == whole[name][: len(kept[name])]
    assert "test_accuracy" not in kept
    # The run is of Adam:
    assert "momentum" not in read(story.stopped, "config.json")["recipe_numbers"]


@by_signal(*CAUGHT)
def test_a_stopped_run_leaves_a_complete_comet_archive(stories, number):
    story = stories[number]
    (path,) = story.stopped.glob("*.zip")
    archive, whole = Archive(path), read(story.whole, "metrics.json")
    steps = [step for step, _, _ in archive.metrics["loss"]]
    assert len(steps) >= 160 and steps == list(range(1, len(steps) + 1))
    values = [value for _, _, value in archive.metrics["loss"]]
    assert values == whole["losses"][: len(values)]
    logged = [value for _, _, value in archive.metrics["train_loss"]]
    assert logged and logged == whole["train_loss"][: len(logged)]
    assert archive.images.keys() == {"loss_curve"}


def test_resuming_a_finished_run_does_no_harm(stories):
    story = stories[signal.SIGKILL]
    before = outcome(story.folder)
    again = start(story.run.folder, "--resume", story.folder)
    assert again.wait() == 0, again.stderr
    assert "Epoch" not in again.stdout and outcome(story.folder) == before


def test_a_second_ctrl_c_ends_at_once_and_costs_no_epoch(tmp_path, stories):
    run = start(tmp_path, *FLAGS, *KINDS[signal.SIGINT])
    stop_in_second_epoch(run, signal.SIGINT)
    run.wait_for(lambda: "main.py" in run.stderr)
    run.kill(signal.SIGINT)
    assert run.wait(20) in (130, -signal.SIGINT)
    resumed = start(tmp_path, "--resume", run.run_dir, "--comet", "off")
    assert resumed.wait() == 0, resumed.stderr
    assert outcome(run.run_dir) == outcome(stories[signal.SIGINT].whole)
    kept = torch.load(run.run_dir / "checkpoint.pt", weights_only=True)
    assert len(kept["experiment_key"]) == 32  # --comet off does not forget it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_while_python_removes_an_object_is_not_lost(tmp_path, monkeypatch):
    """Python ignores exceptions in finalizers."""
    once = [signal.SIGTERM]
    finalizer = {"__del__": lambda old: once and signal.raise_signal(once.pop())}
    plot = lambda *arguments: type("Old", (), finalizer)()
    monkeypatch.setattr(main.PeriodicPlotter, "plot", plot)
    # And `2>&1 | tee log`: the signal ends tee, too.
    gone = {"write": lambda bar, text: once or os.write(-1, b""), "flush": list}
    monkeypatch.setattr(sys, "stderr", type("Gone", (), gone)())
    folder = run_here(tmp_path, *SMALL, status=143)
    assert read(folder, "metrics.json")["state"] == "stopped"


def be_killed_while_saving(*arguments):
    """Be main.py, killed when its second checkpoint is written and has no name yet."""
    saved, replace = [], os.replace

    def kill_at_second(source, target):
        saved.append(os.path.basename(target))
        if saved.count("checkpoint.pt") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill_at_second
    _child(*arguments)


def test_sigkill_while_a_checkpoint_is_written_loses_nothing(tmp_path, stories):
    run = start(tmp_path, *SMALL, target=be_killed_while_saving)
    assert run.wait() == -signal.SIGKILL, run.stderr
    kept = torch.load(run.run_dir / "checkpoint.pt", weights_only=True)
    assert len(kept["history"]["train_loss"]) == 1
    resumed = start(tmp_path, "--resume", run.run_dir)
    assert resumed.wait() == 0, resumed.stderr
    assert "Epoch 2/3" in resumed.stdout
    assert outcome(run.run_dir) == outcome(stories[signal.SIGKILL].whole)
    assert_whole(run.run_dir)


def test_a_loss_that_is_no_number_ends_the_run_within_the_epoch(tmp_path):
    # An epoch of 60,000 steps: nobody would wait for its end.
    run = start(tmp_path, "--lr", "1e6", "--batch-size", 1, "--comet", "offline")
    assert run.wait(60) == 1
    assert "Epoch 1/" not in run.stdout and "COMPLETE" not in run.stdout
    assert re.search("diverged.*--lr", run.stderr), run.stderr
    assert len(lines(run)) <= 2 and "--resume" not in run.stderr
    assert_whole(run.run_dir)
    assert run.json("metrics.json")["train_loss"] == []
    assert not (run.run_dir / "model.pt").exists()


def test_the_first_epoch_is_kept_if_the_second_diverges(tmp_path, monkeypatch, capsys):
    epochs, train_epoch = [], main.train_epoch

    def disturb(model, batches, loss_function, optimizer, *others):
        epochs.append(optimizer)
        if len(epochs) == 2:
            optimizer.param_groups[0]["lr"] = 1e30
        return train_epoch(model, batches, loss_function, optimizer, *others)

    monkeypatch.setattr(main, "train_epoch", disturb)
    folder = run_here(tmp_path, "--model=fc", *FLAGS, status=1)
    error = capsys.readouterr().err
    assert "Traceback" not in error and re.search("main.py: .*diverged.*--lr", error)
    assert len(read(folder, "metrics.json")["losses"]) == 160
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(kept["history"]["train_loss"]) == 1
    assert_whole(folder)


@LINUX
def test_no_room_on_the_disk_leaves_the_earlier_files_whole(tmp_path, stories):
    run = start(tmp_path, *SMALL)
    run.wait_for(lambda: "Epoch 1/3" in run.stdout)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run.wait() == 1, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert re.search(r"cannot write runs/\S+: File too large", run.stderr)
    assert f"--resume {run.run_dir.relative_to(tmp_path)}" in run.stderr
    assert_whole(run.run_dir)
    resumed = start(tmp_path, "--resume", run.run_dir, "--comet", "off")
    assert resumed.wait() == 0, resumed.stderr
    assert outcome(run.run_dir) == outcome(stories[signal.SIGKILL].whole)


LOCKED = "predictions_grid.png", "loss_curve.png", "report.html"


def be_in_trouble(arguments, folder, out, environment):
    """Be `nohup python main.py`; after an epoch a viewer locks files, as on Windows."""
    saved, replace = [], os.replace

    def lock(source, target):
        saved.append(os.path.basename(target))
        if "checkpoint.pt" in saved and saved[-1] in LOCKED:
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    os.replace = lock
    become(folder, out, environment)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with conftest.limit_test_images(1000):
        sys.exit(main.main(arguments))


def test_a_run_goes_on_under_nohup_and_with_locked_pictures(tmp_path, stories):
    run = start(tmp_path, *SMALL[:-1], "offline", target=be_in_trouble)
    stop_in_second_epoch(run, signal.SIGHUP)
    assert run.wait() == 0, run.stderr
    for name in LOCKED:
        # Anywhere: the curve is drawn while a bar stands in the line.
        assert re.search(f"cannot write .*{name}: Permission denied", run.stderr)
    assert len(lines(run)) <= 4 and "Traceback" not in run.stderr, run.stderr
    assert not (run.run_dir / "predictions_grid.png").exists()
    assert not any(run.run_dir.glob("*.part"))
    assert outcome(run.run_dir) == outcome(stories[signal.SIGKILL].whole)


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


DAMAGED = {  # name: what is done to a sound file
    "code": lambda path: torch.save({"model": Evil()}, path),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "of another script": lambda path: torch.save({"fc.bias": torch.ones(7)}, path),
}


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_it_is_refused(tmp_path, trained, monkeypatch, capsys, name, fault):
    """By --resume and by --predict."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(trained("fc"), tmp_path / "run")
    DAMAGED[fault](folder / name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = "--resume", str(folder), "--epochs", "4"
    if name == "model.pt":
        flags = "--predict", "digit.png", "--checkpoint", str(folder / name)
    assert main.main([*flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ") and name in error and error.count("\n") == 1
    assert len(error) < 1000
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
