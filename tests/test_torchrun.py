"""The same script under torchrun: real processes, on this machine and across two hosts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from torch.distributed import run as launcher

import main

QUICK = ["--limit", "2000", "--epochs", "1", "--comet", "off"]


def be_torchrun(arguments, folder, out, environment):
    """Be `torchrun ARGUMENTS`, in a process that has imported it already."""
    conftest.become(folder, out, environment)
    launcher.main(arguments)


def be_command(arguments, folder, out, environment):
    """Be the command that the arguments are."""
    conftest.become(folder, out, environment)
    os.execvp(arguments[0], arguments)


class Launch(conftest.Run):
    """torchrun with main.py, and its processes."""

    def __init__(self, folder, environment, flags, processes, options=(), prefix=()):
        flags, target = list(map(str, flags)), conftest._child
        if processes:
            options = [f"--nproc-per-node={processes}", *options]
            flags, target = [*options, main.__file__, *flags], be_torchrun
        if prefix:
            torchrun = sys.executable, "-m", "torch.distributed.run"
            flags, target = [*prefix, *torchrun, *flags], be_command
        super().__init__(flags, folder, environment, target)

    def find(self, rank):
        """Return the process number of a rank."""
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                names = dict(
                    pair.split(b"=", 1)
                    for pair in (place / "environ").read_bytes().split(b"\0")
                    if b"=" in pair
                )
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                ours = int(parent) == self.process.pid
                if ours and names.get(b"RANK") == str(rank).encode():
                    return int(place.name)
        raise LookupError(rank)

    def end(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def metrics(self):
        return self.json("metrics.json")

    @property
    def weights(self):
        return main.load_tensors(self.run_dir / "model.pt")


@pytest.fixture
def torchrun(tmp_path, environment):
    """torchrun(*flags, processes=2, options=()) launches main.py; 0 processes: without."""
    launches = []

    def launch(*flags, processes=2, options=(), folder=None):
        folder = folder or tmp_path / f"launch{len(launches)}"
        folder.mkdir(exist_ok=True)
        options = "--standalone", *options
        launches.append(Launch(folder, environment, flags, processes, options))
        return launches[-1]

    yield launch
    for one in launches:
        one.end()


def complete(folder, flags, processes):
    """Return a launch that has come to its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    environment["OMP_NUM_THREADS"] = "1"
    launch = Launch(folder, environment, flags, processes, ["--standalone"])
    assert launch.wait() == 0, launch.stderr
    return launch


def differ(one, other):
    """Return the largest difference of a weight between two launches."""
    one, other = one.weights, other.weights
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ----- the same experiment


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count, batch_size", [(2000, 64), (129, 64), (10, 7), (7, 7)])
def test_each_image_once_in_its_batch(size, count, batch_size):
    order = torch.randperm(count)
    batches = [[] for _ in order.split(batch_size)]
    whole = 0
    for rank in range(size):
        team = SimpleNamespace(size=size, rank=rank)
        ours, sizes = main.Team.share(team, count, batch_size)
        for batch, part in zip(batches, order[ours].split(sizes)):
            batch += part.tolist()
        shares = [team.part, *team.shares]
        lengths = [len(batch) for batch in order.split(batch_size)]
        assert [n / b for n, b in zip(sizes, lengths)] == shares
        whole += team.whole
    assert batches == [batch.tolist() for batch in order.split(batch_size)]
    assert abs(whole - 1) < 1e-9


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """QUICK in one process."""
    return complete(tmp_path_factory.mktemp("alone"), QUICK, 0)


def assert_same(one, other):
    """Check that two launches were the same experiment, but for rounding."""
    assert differ(one, other) < 1e-4
    one, other = one.metrics, other.metrics
    for name in "losses", "train_loss":
        assert len(one[name]) == len(other[name])
        assert other[name] == pytest.approx(one[name], abs=1e-4)
    for name in "train_accuracy", "test_accuracy", "test_loss":
        assert other[name] == pytest.approx(one[name], abs=5e-4)
    rows, others = (
        torch.tensor(m["confusion_matrix"]).sum(dim=1) for m in (one, other)
    )
    assert rows.sum() == 10_000 and torch.equal(rows, others)  # every test image, once


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """QUICK in two processes, tracked offline."""
    flags = [*QUICK[:4], "--comet", "offline"]
    return complete(tmp_path_factory.mktemp("pair"), flags, 2)


def test_two_processes_train_the_same_weights(alone, pair):
    assert_same(alone, pair)


def test_four_processes_train_the_same_weights(torchrun, alone):
    team = torchrun(*QUICK, processes=4)  # the last batch has 16 images
    assert team.wait() == 0, team.stderr
    assert_same(alone, team)


def test_a_process_may_have_nothing_of_a_batch(torchrun):
    flags = ["--limit", 513, "--epochs", 1, "--comet", "off"]
    flags += ["--recipe", "accurate", "--model", "fc"]
    launches = []
    for processes in (0, 2, 2):  # the last batch has one image
        launches.append(torchrun(*flags, processes=processes))
        assert launches[-1].wait() == 0, launches[-1].stderr
    alone, team, again = launches
    assert_same(alone, team)
    assert differ(team, again) == 0  # the same augmentation, to the last bit


def test_only_the_first_process_shows_and_writes(pair):
    for text in "TRAINING CNN MODEL", "Epoch 1/1", "Test Accuracy", "TRAINING COMPLETE":
        assert pair.stdout.count(text) == 1
    assert len(re.findall(r"32/32 \[", pair.stderr.replace("\r", "\n"))) >= 1
    assert "Traceback" not in pair.stderr
    names = {path.name for path in pair.run_dir.iterdir() if path.suffix != ".zip"}
    pictures = {"loss_curve.png", "sample_prediction.png", "single_prediction.png"}
    pictures |= {"predictions_grid.png", "worst_mistakes.png", "confusion_matrix.png"}
    data = {"config.json", "metrics.json", "report.html", "model.pt", "checkpoint.pt"}
    assert names == pictures | data
    assert len(list(pair.run_dir.glob("*.zip"))) == 1
    config = json.loads((pair.run_dir / "config.json").read_text())
    assert config["processes"] == 2


def test_a_study_of_several_runs(torchrun):
    flags = ["--limit", "300", "--epochs", "1", "--comet", "off", "--compare"]
    team = torchrun(*flags)
    assert team.wait() == 0, team.stderr
    assert len(team.metrics["runs"]) == 2
    assert team.stdout.count("TRAINING COMPLETE") == 2


def test_without_torchrun_there_is_no_team(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not main.launched() and main.name_launcher() is None
    assert not main.dist.is_initialized()


# ----- mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "--epochs must be"),
        (["--batch-size", "1"], "--batch-size must be 2 or more"),
    ],
)
def test_a_mistake_is_told_once(torchrun, flags, message):
    team = torchrun(*flags, *QUICK[4:])
    assert team.wait() != 0
    lines = [x for x in team.stderr.splitlines() if x.startswith("main.py:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (team.folder / "runs").exists()


def test_the_first_process_may_find_a_mistake_last(tmp_path, environment):
    late = tmp_path / "late.py"
    late.write_text(f"""
import os, runpy, sys, time
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(1)
sys.argv = [{main.__file__!r}, "--epochs", "0"]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone"
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", late],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode
    assert done.stderr.count("main.py: --epochs must be") == 1


def test_training_that_goes_wrong_is_told_once(torchrun):
    team = torchrun(*QUICK, "--lr", "1e9")
    assert team.wait() != 0
    lines = [x for x in team.stderr.splitlines() if "main.py:" in x]
    assert sum("training went wrong" in line for line in lines) == 1


# ----- stopping, and processes that die


LONG = ["--limit", "6000", "--epochs", "3", "--comet", "off"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """LONG without a stop, in two processes: what all that follows must end with."""
    return complete(tmp_path_factory.mktemp("whole"), LONG, 2)


def assert_safe(team):
    """Check what a stopped run has left; return the command that goes on."""
    found = re.findall(r"(\d) of 3 epochs are safe; to go on: (.*)", team.stderr)
    ((done, command),) = found
    assert int(done) >= 1 and main.load_tensors(team.run_dir / "checkpoint.pt")
    assert (team.run_dir / "metrics.json").exists()
    assert (team.run_dir / "report.html").exists()
    return command.split()[2:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_team_goes_on(torchrun, whole, number):
    team = torchrun(*LONG)
    team.wait_for(lambda: "Epoch 1/3" in team.stdout)
    if number == signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
        os.killpg(team.process.pid, number)
    else:
        os.kill(team.process.pid, number)
    assert team.wait() != 0
    assert (
        sum(number.name in x for x in team.stderr.splitlines() if "main.py:" in x) == 1
    )
    flags = assert_safe(team)
    again = torchrun(*flags, folder=team.folder)
    assert again.wait() == 0, again.stderr
    assert differ(again, whole) < 1e-4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_an_error(torchrun, rank):
    team = torchrun(*LONG)
    team.wait_for(lambda: "Epoch 1/3" in team.stdout)
    start = time.monotonic()
    os.kill(team.find(rank), signal.SIGKILL)
    assert team.wait() != 0
    assert time.monotonic() - start < 45
    assert "another process is gone" in team.stderr or "SIGTERM" in team.stderr
    if rank == 1:
        assert_safe(team)
    else:
        assert main.load_tensors(team.run_dir / "checkpoint.pt")


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_from_the_last_checkpoint(torchrun, whole, rank):
    team = torchrun(*LONG, options=["--max-restarts=1"])
    team.wait_for(lambda: "Epoch 1/3" in team.stdout)
    os.kill(team.find(rank), signal.SIGKILL)
    assert team.wait() == 0, team.stderr
    assert team.stdout.count("Epoch 1/3") == 1  # and not trained again
    assert team.stdout.count("TRAINING COMPLETE") == 1
    assert differ(team, whole) < 1e-4


# ----- two hosts


def run_ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def hosts():
    """Two network namespaces, joined by a veth pair: their names, and the first's address."""
    if not shutil.which("ip"):
        pytest.skip("ip is missing: apt-get install iproute2")
    names = [f"mnist{os.getpid()}{side}" for side in "ab"]
    try:
        if run_ip("netns", "add", names[0]) or run_ip("netns", "add", names[1]):
            pytest.skip("network namespaces need root: ip netns add is refused")
        ends = ["veth0", "netns", names[0], "type", "veth", "peer"]
        assert run_ip("link", "add", *ends, "name", "veth0", "netns", names[1]) == 0
        for number, name in enumerate(names, 1):
            place = "-n", name
            address = f"10.77.0.{number}/24"
            assert run_ip(*place, "addr", "add", address, "dev", "veth0") == 0
            assert run_ip(*place, "link", "set", "veth0", "up") == 0
            assert run_ip(*place, "link", "set", "lo", "up") == 0
        yield names, "10.77.0.1"
    finally:
        for name in names:
            run_ip("netns", "delete", name)


def test_two_hosts_with_two_processes_each(tmp_path, environment, hosts, alone):
    names, address = hosts
    launches = []
    for number, name in enumerate(names):
        folder = tmp_path / name
        folder.mkdir()
        options = ["--nnodes=2", f"--node-rank={number}", f"--master-addr={address}"]
        options += ["--master-port=29511"]
        prefix = "ip", "netns", "exec", name
        over_the_wire = environment | {"GLOO_SOCKET_IFNAME": "veth0"}
        launch = Launch(folder, over_the_wire, QUICK, 2, options, prefix)
        launches.append(launch)
    try:
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].stderr
    finally:
        for launch in launches:
            launch.end()
    assert not (launches[1].folder / "runs").exists()  # only the first one writes
    assert_same(alone, launches[0])
