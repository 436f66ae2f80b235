"""torchrun itself, and forked processes with the variables that it sets."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import conftest
import pytest
import torch
from torch.distributed import run as launcher

import main

LONG = "--limit", "1000", "--batch-size", "10", "--epochs", "3", "--comet", "offline"


def be_torchrun(arguments, folder, out, environment):
    """Be `torchrun ARGUMENTS`, in a process that has imported it already."""
    conftest.become(folder, out, environment)
    launcher.main(arguments)


class Launch(conftest.Run):
    """torchrun with two processes of main.py."""

    def __init__(self, folder):
        flags = ["--standalone", "--nproc-per-node=2", main.__file__, *LONG]
        environment = conftest.make_environment(folder / "home")
        super().__init__(flags, folder, environment, be_torchrun)

    def find_second(self):
        """Return the process number of rank 1."""
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                variables = (place / "environ").read_bytes().split(b"\0")
                if int(parent) == self.process.pid and b"RANK=1" in variables:
                    return int(place.name)


@pytest.fixture
def team(tmp_path):
    launch = Launch(tmp_path / "team")
    yield launch
    with suppress(ProcessLookupError):
        os.killpg(launch.process.pid, signal.SIGKILL)
    launch.process.join()


def messages(run):
    return [line for line in run.stderr.splitlines() if line.startswith("main.py:")]


def assert_same(one, other):
    """Check that two run folders hold the same experiment, but for rounding."""
    weights = [torch.load(f / "model.pt", weights_only=True) for f in (one, other)]
    for name in weights[0]:
        assert float((weights[0][name] - weights[1][name]).abs().max()) < 1e-4
    one, other = (json.loads((f / "metrics.json").read_text()) for f in (one, other))
    assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    for name in "train_accuracy", "test_accuracy", "test_loss":
        assert other[name] == pytest.approx(one[name], abs=5e-4)
    rows = [torch.tensor(m["confusion_matrix"]).sum(dim=1) for m in (one, other)]
    assert rows[0].sum() == 10_000 and torch.equal(*rows)  # every test image, once


def fork(spawn, count, *flags):
    """Start main.py in processes with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1]}
    team |= {"TORCHELASTIC_RUN_ID": 1, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [team | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    more = [{name: str(value) for name, value in own.items()} for own in ranks]
    given = [main.__file__, *flags]
    return [spawn(*given, target=conftest.be_script, **own) for own in more]


def test_four_processes_train_the_weights_of_one(spawn, tmp_path):
    """With augmentation, and a last batch of 4 images; a study of two seeds."""
    flags = "--recipe=accurate", "--model=fc", "--seeds=2", "--limit=388", "--epochs=1"
    team = fork(spawn, 4, *flags, "--comet=off")
    alone = conftest.complete(tmp_path / "alone", *flags, "--comet=off")
    assert [run.wait() for run in team] == [0] * 4, [run.stderr for run in team]
    assert team[0].stdout.count("TRAINING COMPLETE") == 2
    for run in team[1:]:  # PyTorch itself may warn that it knows no host names
        assert (run.stdout, messages(run)) == ("", []) and "%|" not in run.stderr
    for name in "fc-seed-0", "fc-seed-1":
        assert_same(alone.run_dir / name, team[0].run_dir / name)
    assert len(team[0].json("metrics.json")["runs"]) == 2


def test_a_batch_that_cannot_be_shared_is_told(spawn, tmp_path):
    """Each process finds out on its own, before it looks for the others."""
    for run in fork(spawn, 2, "--batch-size=63", "--comet=off"):
        assert run.wait() == 2
        (line,) = messages(run)
        assert "--batch-size" in line and "divisible" in line and "2" in line
    assert not (tmp_path / "runs").exists()


@conftest.LINUX
def test_a_killed_process_ends_the_other_and_two_go_on(team, spawn, tmp_path):
    """To the weights of one. And only the first one shows, tracks and writes."""
    alone = conftest.complete(tmp_path / "alone", *LONG)
    team.wait_for(lambda: "Epoch 1/3" in team.stdout)
    begin = time.monotonic()
    os.kill(team.find_second(), signal.SIGKILL)
    assert team.wait() != 0
    assert time.monotonic() - begin < 45
    assert "TRAINING COMPLETE" not in team.stdout
    checkpoint = torch.load(team.run_dir / "checkpoint.pt", weights_only=True)
    epochs = len(checkpoint["history"]["train_loss"])
    assert epochs in (1, 2)
    (line,) = (line for line in messages(team) if "--resume" in line)
    assert line.endswith(f"{team.run_dir.relative_to(team.folder)} --comet=offline")
    before = set(team.run_dir.glob("*.zip"))
    again, other = fork(spawn, 2, "--resume", team.run_dir, "--comet=offline")
    assert (again.wait(), other.wait()) == (0, 0), again.stderr
    assert f"Epoch {epochs}/3" not in again.stdout
    assert_same(alone.run_dir, team.run_dir)
    for text in "TRAINING CNN MODEL", "Epoch 3/3", "Test Accuracy", "TRAINING COMPLETE":
        assert again.stdout.count(text) == 1
    assert "100/100 [" in again.stderr and messages(again) == []
    assert "Traceback" not in again.stderr
    files = [set(run.run_dir.iterdir()) for run in (alone, team)]
    names = [sorted(path.suffix for path in found - before) for found in files]
    assert names[0] == names[1] and names[0].count(".zip") == 1


def test_processes_for_which_there_are_not_enough_gpus_use_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(main, "LOCAL_SIZE", 2)
    assert main.select_device().type == "cpu"
    assert capsys.readouterr().err == ""  # it was not even tried
    with pytest.raises(main.UserError, match="GPUs 1, processes 2"):
        monkeypatch.setattr(main, "LAUNCHED", True)
        monkeypatch.setattr(main, "LOCAL_RANK", 1)
        main.select_device("cuda")
