"""Stopped, killed, out of room, gone wrong: what is kept, and how a run goes on."""

import contextlib
import copy
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKS, ROOT, Run
from matplotlib.image import imread
from offline import Archive

import main

# Three epochs of 200 steps: each lasts long enough to be stopped within.
FLAGS = ["--limit", 1000, "--batch-size", 5, "--epochs", 3]
# The same of the smaller model, for runs that are stopped again and again.
SMALL = ["--model", "fc", "--limit", 1000, "--batch-size", 2, "--epochs", 3]
PICTURES = {"sample_prediction", "single_prediction", "predictions_grid", "loss_curve"}


def start(folder, *flags):
    """Start main.py with these flags in a folder; return the Run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    temporary = folder / "temporary"  # for what a kill leaves behind
    temporary.mkdir(parents=True, exist_ok=True)
    settings = {"HOME": str(temporary), "TMPDIR": str(temporary)}
    return Run(list(map(str, flags)), folder, environment | settings)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def outcome(folder):
    """What a run has come to, save the time it took: weights, checkpoint, metrics."""
    saved = main.load_tensors(folder / "checkpoint.pt")
    metrics = read(folder, "metrics.json")
    for numbers in saved["progress"], metrics:
        assert len(numbers.pop("epoch_seconds")) == len(numbers["train_loss"])
    return {
        "weights": main.load_tensors(folder / "model.pt"),
        "metrics": metrics,
        "state": [
            saved[name] for name in ("model", "optimizer", "generator", "progress")
        ],
    }


def assert_same(one, other):
    """Check that two structures are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_whole(folder):
    """Check that every file of a run's folder is whole, and that there is no other."""
    for path in folder.iterdir():
        if path.suffix == ".png":
            assert imread(path).size > 10_000
        elif path.suffix == ".json":
            assert read(folder, path.name)
        elif path.suffix == ".pt":
            assert main.load_tensors(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.suffix == ".zip" and Archive(path).metrics, path


def at_once(*tasks):
    """Call the functions at the same time; an exception in one is raised here."""
    failures = []

    def attempt(task):
        try:
            task()
        except BaseException as error:  # noqa: BLE001, an AssertionError is none
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{name: folder} of runs that nothing has stopped: FLAGS with sgd and adam, SMALL."""
    flags = {"small": SMALL}
    flags |= {name: [*FLAGS, "--optimizer", name] for name in ("sgd", "adam")}
    runs = {
        name: start(tmp_path_factory.mktemp(name), *flags[name], "--comet", "off")
        for name in flags
    }
    for run in runs.values():
        assert run.wait() == 0, run.stderr
    return {name: run.run_dir for name, run in runs.items()}


# ------------------------------------------------------------------ Ctrl-C and SIGTERM


class Story:
    """A run stopped by a signal in its second epoch, and gone on with as it says."""

    def __init__(self, folder, number, optimizer):
        self.number, self.optimizer = number, optimizer
        flags = *FLAGS, "--optimizer", optimizer, "--comet", "offline"
        self.run = start(folder, *flags)

    def stop(self):
        """Stop the run; keep its folder as it is then."""
        self.run.wait_for(lambda: "Epoch 1/3" in self.run.stdout)
        self.run.kill(self.number)
        self.status = self.run.wait()
        self.folder = self.run.run_dir
        self.stopped = shutil.copytree(self.folder, self.run.folder / "stopped")

    def go_on(self):
        """Enter the command that the run has printed."""
        (line,) = (x for x in self.run.stderr.splitlines() if "--resume" in x)
        flags = shlex.split(line.partition("python main.py ")[2])
        self.resumed = start(self.run.folder, *flags)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    stories = {
        number: Story(tmp_path_factory.mktemp("story"), number, optimizer)
        for number, optimizer in ((signal.SIGINT, "sgd"), (signal.SIGTERM, "adam"))
    }
    at_once(*(story.stop for story in stories.values()))
    for story in stories.values():
        story.go_on()
    return stories


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def story(request, stories):
    return stories[request.param]


def test_a_stopped_run_tells_what_stopped_it_and_how_to_go_on(story):
    assert story.status == 128 + story.number
    assert "Epoch 2/3" not in story.run.stdout
    assert "Traceback" not in story.run.stderr
    lines = [x for x in story.run.stderr.splitlines() if "it/s" not in x and x]
    assert sum(story.number.name in line for line in lines) == 1
    assert sum(f"python main.py --resume {story.folder}" in x for x in lines) == 0
    assert sum("python main.py --resume runs/" in line for line in lines) == 1


def test_a_stopped_run_leaves_whole_files(story):
    assert_whole(story.stopped)
    names = {f"{name}.png" for name in PICTURES}
    names |= {"config.json", "metrics.json", "checkpoint.pt", "report.html"}
    assert names == {p.name for p in story.stopped.iterdir() if p.suffix != ".zip"}


def test_a_stopped_run_keeps_the_epochs_that_were_finished(story, undisturbed):
    kept = read(story.stopped, "metrics.json")
    whole = read(undisturbed[story.optimizer], "metrics.json")
    assert len(kept.pop("epoch_seconds")) == 1
    for name, values in kept.items():
        assert values == whole[name][: len(values)] and len(values) in (1, 200)
    assert "test_accuracy" not in kept


def test_a_stopped_run_leaves_a_complete_comet_archive(story, undisturbed):
    (path,) = story.stopped.glob("*.zip")
    archive, whole = Archive(path), read(undisturbed[story.optimizer], "metrics.json")
    steps = [step for step, _, _ in archive.metrics["loss"]]
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1))
    values = [value for _, _, value in archive.metrics["loss"]]
    assert values == whole["losses"][: len(values)]
    assert [v for _, _, v in archive.metrics["train_loss"]] == whole["train_loss"][:1]
    assert {name for name, _, _ in archive.images} == PICTURES
    assert f"comet upload runs/{story.folder.name}/{path.name}" in story.run.stdout


def test_the_printed_command_goes_on_in_the_same_folder(story):
    assert story.resumed.wait() == 0, story.resumed.stderr
    assert story.resumed.run_dir == story.folder
    assert "Epoch 1/3" not in story.resumed.stdout
    assert "Epoch 2/3" in story.resumed.stdout
    assert_whole(story.folder)


def test_a_run_stopped_and_resumed_ends_bit_for_bit_like_one_never_stopped(
    story, undisturbed
):
    assert story.resumed.wait() == 0, story.resumed.stderr
    assert_same(outcome(story.folder), outcome(undisturbed[story.optimizer]))


def test_a_resumed_run_has_one_archive_with_the_whole_history(story):
    assert story.resumed.wait() == 0, story.resumed.stderr
    (before,), (path,) = story.stopped.glob("*.zip"), story.folder.glob("*.zip")
    archive, metrics = Archive(path), read(story.folder, "metrics.json")
    assert archive.key == Archive(before).key and path.name == before.name
    losses = [(step, value) for step, _, value in archive.metrics["loss"]]
    assert losses == list(enumerate(metrics["losses"], 1))
    for name in "train_accuracy", "train_loss", "epoch_seconds":
        numbers = [(e * 200, e, value) for e, value in enumerate(metrics[name], 1)]
        assert archive.metrics[name] == numbers
    for name in "test_accuracy", "test_loss":
        assert [v for _, _, v in archive.metrics[name]] == [metrics[name]]
    for name in PICTURES:
        last = [data for other, _, data in archive.images if other == name][-1]
        assert last == (story.folder / f"{name}.png").read_bytes()


def test_a_second_ctrl_c_ends_at_once(tmp_path, undisturbed):
    run = start(tmp_path, *FLAGS, "--comet", "offline")
    run.wait_for(lambda: "Epoch 1/3" in run.stdout)
    run.kill(signal.SIGINT)
    run.wait_for(lambda: "SIGINT" in run.stderr)
    run.kill(signal.SIGINT)
    assert run.wait() == -signal.SIGINT
    resumed = start(tmp_path, "--resume", run.run_dir, "--comet", "off")
    assert resumed.wait() == 0, resumed.stderr
    assert_same(outcome(run.run_dir), outcome(undisturbed["sgd"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_pytorch_is_imported_leaves_nothing(
    environment, tmp_path, number
):
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", "--comet", "off"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 128 + number
    assert not (tmp_path / "runs").exists()


def test_a_signal_after_the_end_changes_nothing(environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", "--limit=64", "--epochs=1", "--comet=off"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert any("TRAINING COMPLETE" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 143, -signal.SIGTERM), errors
    assert "Traceback" not in errors and "Interrupt" not in errors, errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "model.pt").exists() and "test_loss" in read(
        folder, "metrics.json"
    )


def test_a_signal_while_the_archive_is_written_costs_no_result(tmp_path):
    run = start(tmp_path, *FLAGS[:4], "--epochs", 1, "--comet", "offline")
    run.wait_for(lambda: any(tmp_path.glob("runs/*/metrics.json")))
    run.kill(signal.SIGINT)
    assert run.wait() in (0, 130), run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert_whole(run.run_dir)
    metrics = read(run.run_dir, "metrics.json")
    (path,) = run.run_dir.glob("*.zip")
    for name in "test_accuracy", "test_loss":
        assert [v for _, _, v in Archive(path).metrics[name]] == [metrics[name]]


# ------------------------------------------------------------------ at any moment at all


def resume_or_start(folder):
    """Go on with the run in the folder; if there is nothing to resume, start a new one."""
    runs = list(folder.glob("runs/*"))
    if not runs:
        return start(folder, *SMALL, "--comet", "off")
    (run_dir,) = runs
    if not (run_dir / "checkpoint.pt").exists():
        refused = start(folder, "--resume", run_dir)
        assert refused.wait() == 2
        assert refused.stdout == "" and refused.stderr.count("\n") == 1
        assert re.search(r"config.json|start a new run", refused.stderr), refused.stderr
        shutil.rmtree(run_dir)
        return start(folder, *SMALL, "--comet", "off")
    return start(folder, "--resume", run_dir)


def stop_again_and_again(folder, moments, strike):
    """Have a run stopped four times, and resumed each time; return its folder."""
    stopped = 0
    while stopped < 4:
        run = resume_or_start(folder)
        time.sleep(moments.uniform(0, 1.2))
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
            strike(run)
        status = run.wait()
        stopped += status != 0
        assert "Traceback" not in run.stderr, run.stderr
        assert status in (0, 130, 143, -signal.SIGKILL), run.stderr
    run = resume_or_start(folder)
    assert run.wait() == 0, run.stderr
    return run.run_dir


def stop_many(folder, count, strike):
    """Stop so many runs again and again, two at a time; return their folders."""
    run_dirs = []

    def stop_one(number):
        moments = random.Random(number)
        run_dirs.append(stop_again_and_again(folder / str(number), moments, strike))

    for number in range(0, count, 2):
        at_once(lambda n=number: stop_one(n), lambda n=number: stop_one(n + 1))
    return run_dirs


def test_sigkill_at_any_moment_loses_nothing(tmp_path, undisturbed):
    run_dirs = stop_many(tmp_path, 6, Run.kill)  # 24 times in all
    assert len(run_dirs) == 6
    for run_dir in run_dirs:
        assert_same(outcome(run_dir), outcome(undisturbed["small"]))
        assert_whole(run_dir)


def test_ctrl_c_and_sigterm_at_any_moment_lose_nothing(tmp_path, undisturbed):
    numbers = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGINT])

    def strike(run):
        about = Path(f"/proc/{run.process.pid}/status")  # until it handles SIGTERM:
        while not int(re.search(r"SigCgt:\s*(\w+)", about.read_text())[1], 16) & 0x4000:
            time.sleep(0.001)
        run.kill(next(numbers))

    run_dirs = stop_many(tmp_path, 2, strike)
    assert len(run_dirs) == 2
    for run_dir in run_dirs:
        assert_same(outcome(run_dir), outcome(undisturbed["small"]))


def test_sigkill_while_a_checkpoint_is_written_loses_nothing(tmp_path, undisturbed):
    torn = 0
    for attempt in range(1, 11):
        run = resume_or_start(tmp_path)
        half = None
        while half is None and run.process.is_alive():
            half = next(tmp_path.glob("runs/*/checkpoint.pt.part"), None)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            run.kill()
        run.wait()
        torn += any(tmp_path.glob("runs/*/checkpoint.pt.part"))
        if torn == 3:
            break
    assert torn, f"none of {attempt} kills met a checkpoint half written"
    run = resume_or_start(tmp_path)
    assert run.wait() == 0, run.stderr
    assert_same(outcome(run.run_dir), outcome(undisturbed["small"]))
    assert_whole(run.run_dir)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []

    def note(name):
        call = getattr(os, name)

        def noted(*arguments):
            calls.append((name, sorted(path.name for path in tmp_path.iterdir())))
            return call(*arguments)

        monkeypatch.setattr(os, name, noted)

    note("fsync")
    note("replace")
    main.write_file(tmp_path / "a", b"text")
    assert calls == [("fsync", ["a.part"]), ("replace", ["a.part"])]
    assert (tmp_path / "a").read_bytes() == b"text"


# --------------------------------------------------------------------- on and on


def test_a_run_can_be_trained_longer(tmp_path, undisturbed):
    short = start(tmp_path, *FLAGS[:4], "--epochs", 2, "--comet", "off")
    assert short.wait() == 0, short.stderr
    longer = start(tmp_path, "--resume", short.run_dir, "--epochs", 3)
    assert longer.wait() == 0, longer.stderr
    assert_same(outcome(short.run_dir), outcome(undisturbed["sgd"]))
    assert read(short.run_dir, "config.json")["settings"]["epochs"] == 3


def test_resuming_a_finished_run_does_no_harm(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed["adam"], tmp_path / "runs" / "finished")
    again = start(tmp_path, "--resume", folder)
    assert again.wait() == 0, again.stderr
    assert "Epoch" not in again.stdout
    assert_same(outcome(folder), outcome(undisturbed["adam"]))
    assert again.run_dir == folder


# ------------------------------------------------------------- training that goes wrong


def test_a_loss_that_is_no_number_ends_the_run_within_the_epoch(tmp_path):
    # An epoch of 60,000 steps: nobody would wait for its end.
    run = start(tmp_path, "--lr", "1e6", "--batch-size", 1, "--comet", "offline")
    assert run.wait(60) == 1
    lines = [line for line in run.stderr.splitlines() if "it/s" not in line and line]
    assert len(lines) == 1 and "loss" in lines[0] and "--lr" in lines[0]
    assert "Epoch 1/" not in run.stdout and "COMPLETE" not in run.stdout
    assert_whole(run.run_dir)
    assert read(run.run_dir, "metrics.json")["train_loss"] == []
    assert not (run.run_dir / "model.pt").exists()


def test_the_last_step_may_go_wrong_too(tmp_path):
    flags = "--lr", 1e9, "--optimizer", "adam", "--limit", 64, "--epochs", 1
    run = start(tmp_path, *flags, "--comet", "off")
    assert run.wait() == 1
    assert "--lr" in run.stderr and "Traceback" not in run.stderr
    assert not (run.run_dir / "model.pt").exists()
    assert_whole(run.run_dir)


def test_what_was_good_is_kept_when_training_goes_wrong(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed["sgd"], tmp_path / "runs" / "run")
    (folder / "model.pt").unlink()
    (folder / "metrics.json").unlink()
    config, saved = (
        read(folder, "config.json"),
        main.load_tensors(folder / "checkpoint.pt"),
    )
    saved = copy.deepcopy(saved)
    config["settings"]["lr"] = saved["settings"]["lr"] = 1e6
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    main.save_tensors(folder / "checkpoint.pt", saved)
    run = start(tmp_path, "--resume", folder, "--epochs", 4)
    assert run.wait() == 1 and "--lr" in run.stderr
    assert len(read(folder, "metrics.json")["train_loss"]) == 3
    assert not (folder / "model.pt").exists()
    kept = main.load_tensors(folder / "checkpoint.pt")
    assert_same(kept["model"], saved["model"])
    assert_same(kept["progress"], saved["progress"])


# ------------------------------------------------------------------------- no room left


def run_out_of_room(folder, size, after, flags):
    """Be main.py, where no file may grow above `size` bytes after a call of `after`."""
    os.chdir(folder)
    for number, console in (1, "out"), (2, "err"):
        os.dup2(os.open(console, os.O_CREAT | os.O_WRONLY), number)
    owner, name = (main.Run if after == "save_checkpoint" else main), after
    call = getattr(owner, name)

    def call_then_limit(*arguments):
        result = call(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return result

    setattr(owner, name, call_then_limit)
    sys.exit(main.main(main.read_settings(list(map(str, flags)))))


def end_of_run_out_of_room(folder, *arguments):
    """Have a process be run_out_of_room; return its exit status, output and errors."""
    process = FORKS.Process(target=run_out_of_room, args=(folder, *arguments))
    process.start()
    process.join(120)
    console = ((folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
    return process.exitcode, *console


def test_no_room_for_a_checkpoint_shows_before_training(tmp_path):
    arguments = 100_000, "load_mnist", [*FLAGS, "--comet", "off"]
    status, out, errors = end_of_run_out_of_room(tmp_path, *arguments)
    assert status == 1, errors
    assert re.fullmatch(r"main.py: cannot write .*checkpoint.pt: .*\n", errors), errors
    assert "Epoch" not in out and not any(tmp_path.glob("runs/*"))


def test_no_room_later_leaves_the_earlier_files_whole(tmp_path, undisturbed):
    run = start(tmp_path, *FLAGS, "--comet", "offline")
    run.wait_for(lambda: "Epoch 1/3" in run.stdout)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run.wait() == 1, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert re.search(r"main.py: cannot write .*: File too large", run.stderr)
    assert f"--resume {run.run_dir.relative_to(tmp_path)}" in run.stderr
    assert_whole(run.run_dir)
    resumed = start(tmp_path, "--resume", run.run_dir, "--comet", "off")
    assert resumed.wait() == 0, resumed.stderr
    assert_same(outcome(run.run_dir), outcome(undisturbed["sgd"]))


def test_no_room_for_the_model_leaves_the_rest_whole(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed["sgd"], tmp_path / "runs" / "run")
    before = outcome(folder)
    (folder / "model.pt").unlink()
    (folder / "metrics.json").unlink()
    arguments = 200_000, "save_checkpoint", ["--resume", folder]
    status, _, errors = end_of_run_out_of_room(tmp_path, *arguments)
    assert status == 1, errors
    assert re.search(r"main.py: cannot write .*model.pt: File too large", errors)
    assert_whole(folder)
    assert not (folder / "model.pt").exists()
    kept = read(folder, "metrics.json")
    assert kept["train_loss"] == before["metrics"]["train_loss"]


def test_an_output_folder_that_vanishes_is_an_error(tmp_path):
    run = start(tmp_path, *FLAGS, "--comet", "off")
    run.wait_for(lambda: "Epoch 1/3" in run.stdout)
    shutil.rmtree(run.run_dir)
    assert run.wait() == 1, run.stderr
    assert "main.py: cannot write " in run.stderr and "Traceback" not in run.stderr
