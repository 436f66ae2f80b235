"""Comet refuses, fails, hangs or dies: the run goes on, and nothing is lost.

The real client talks to servers on the loopback interface. All runs of this file are
started at once, since most of their time is waiting.
"""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path

import conftest
import pytest
from fake_comet import FakeComet
from offline import Archive

import main

KEY = "secretkey0123456789abcdefgh"
PICTURES = {
    *("sample_prediction", "single_prediction", "predictions_grid", "loss_curve"),
    *("worst_mistakes", "confusion_matrix"),
}
SHORT = ["--model", "fc", "--limit", "200", "--batch-size", "10", "--epochs", "2"]
LONG = ["--model", "fc", "--limit", "5000", "--batch-size", "5", "--epochs", "5"]


class Clock(threading.Thread):
    """Counts seconds, but not those in which the whole machine stood still."""

    seconds = 0.0

    def run(self):
        last = time.monotonic()
        while True:
            time.sleep(0.02)
            now = time.monotonic()
            self.seconds += min(now - last, 0.5)
            last = now


class Timed(main.Tracker):
    """A Tracker that writes down for how long it has held up the run, in seconds."""

    held_up = 0.0

    def timed(self, method, *arguments, **named):
        begin = self.clock.seconds
        try:
            return method(*arguments, **named)
        finally:
            self.held_up += self.clock.seconds - begin
            Path("held_up").write_text(str(self.held_up), encoding="ascii")

    def __init__(self, *arguments, **named):
        self.clock = Clock(daemon=True)
        self.clock.start()
        self.timed(super().__init__, *arguments, **named)

    def log_losses(self, *arguments, **named):
        self.timed(super().log_losses, *arguments, **named)

    def finish(self):
        return self.timed(super().finish)


def be_timed_main(*arguments):
    main.Tracker = Timed
    conftest._child(*arguments)


class Server(contextlib.ExitStack):
    """What a run takes for Comet: `url`, and a FakeComet, if there is one."""

    fake = None

    def answering(self, **how):
        self.fake = self.enter_context(FakeComet(**how))
        self.url = self.fake.url
        return self

    def at(self, host):
        self.url = f"http://{host}/clientlib/"
        return self

    def listening(self, answer):
        """Be a port that never answers, or that nobody listens on."""
        server = self.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        if not answer:
            server.close()
        return self.at(f"127.0.0.1:{port}")


METRICS, IMAGES = "/batch/logger/experiment/metric", "/visualizations/upload"
SERVERS = {  # name: what makes the server
    "key rejected": lambda server: server.answering(bad_key=True),
    "no such name": lambda server: server.at("nonexistent.invalid"),
    "port refused": lambda server: server.listening(False),
    "never answers": lambda server: server.listening(True),
    "dies": lambda server: server.answering(),
    "hangs": lambda server: server.answering(),
    "500 on metrics": lambda server: server.answering(fail={METRICS: 500}),
    "500 on images": lambda server: server.answering(fail={IMAGES: 500}),
    "very slow": lambda server: server.answering(delay=3),
    "slow": lambda server: server.answering(delay=0.5),
}
AT_THE_START = {  # exit status and what the message says, with --comet online
    "key rejected": (2, "API key"),
    "no such name": (1, "does not answer"),
    "port refused": (1, "does not answer"),
    "never answers": (1, "does not answer"),
}
DOWN = [("auto", name) for name in SERVERS if name != "slow"] + [("online", "dies")]


class Case(conftest.Run):
    """A run with --comet MODE, and what it takes for Comet."""

    def __init__(self, folder, mode, name):
        self.folder, self.name = folder, name
        self.server = SERVERS[name](Server())
        self.out = folder / "home"  # and whatever else is not the run's folder
        self.out.mkdir()
        home = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(self.out))
        comet = {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": self.server.url}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
        environment = kept | home | comet | {"no_proxy": "*"}
        for console in ("out", "err"):
            (self.out / console).touch()
        flags = [*(LONG if name in ("dies", "hangs") else SHORT), "--comet", mode]
        arguments = flags, folder, self.out, environment
        self.process = conftest.FORKS.Process(target=be_timed_main, args=arguments)
        self.process.start()

    def disturb(self):
        """Have the server die or hang, if it is to, once it has some metrics."""
        if self.name in ("dies", "hangs"):
            self.wait_for(lambda: len(self.server.fake.metrics) > 10)
            assert "EVALUATING" not in self.stdout
            if self.name == "hangs":
                self.server.fake.delay = 300
            else:
                self.server.close()

    @property
    def held_up(self):
        return float((self.folder / "held_up").read_text(encoding="ascii"))

    @property
    def archive(self):
        (path,) = self.run_dir.glob("*.zip")
        return Archive(path)

    def pictures(self):
        return {name: (self.run_dir / f"{name}.png").read_bytes() for name in PICTURES}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{(mode, name): Case}, all ended."""
    wanted = [*DOWN, ("auto", "slow"), *(("online", name) for name in AT_THE_START)]
    cases = {key: Case(tmp_path_factory.mktemp("case"), *key) for key in wanted}
    for case in cases.values():
        case.disturb()
    for case in cases.values():
        case.wait()
    yield cases
    for case in cases.values():
        case.process.kill()
        case.server.close()


@pytest.fixture(params=DOWN, ids=" ".join)
def down(request, cases):
    """A run whose server is down, or goes down."""
    return cases[request.param]


def test_the_run_succeeds_without_a_traceback(down):
    assert down.process.exitcode == 0, down.stderr
    assert "Traceback" not in down.stderr and "Error" not in down.stderr, down.stderr
    assert "TRAINING COMPLETE" in down.stdout


def test_the_run_is_held_up_for_less_than_20_seconds(down):
    assert 0 < down.held_up < 20


def test_the_upload_command_is_printed_with_the_archive(down):
    (path,) = down.run_dir.glob("*.zip")
    place = path.relative_to(down.folder)
    (line,) = (x for x in down.stdout.splitlines() if "comet upload" in x)
    assert line.endswith(f"comet upload {place}")


def test_the_archive_has_the_loss_of_every_step_once(down):
    losses = [(step, value) for step, _, value in down.archive.metrics["loss"]]
    assert losses == list(enumerate(down.json("metrics.json")["losses"], 1))
    assert len(losses) in (40, 5000)


def test_the_archive_has_the_metrics_of_every_epoch_and_the_test(down):
    metrics, tracked = down.json("metrics.json"), down.archive.metrics
    for name in "train_accuracy", "train_loss", "epoch_seconds":
        numbers = list(enumerate(metrics[name], 1))
        assert [(epoch, value) for _, epoch, value in tracked[name]] == numbers
    for name in "test_accuracy", "test_loss":
        assert [value for _, _, value in tracked[name]] == [metrics[name]]


def test_the_archive_has_the_four_pictures_and_the_settings(down):
    last = {name: data for name, _, data in down.archive.images}
    assert last == down.pictures()
    settings = down.json("config.json")["settings"]
    assert settings.items() <= down.archive.params.items()
    assert down.archive.name == down.run_dir.name


@pytest.mark.parametrize("name", AT_THE_START)
def test_auto_says_at_the_start_what_is_wrong(cases, name):
    (line,) = (x for x in cases["auto", name].stdout.splitlines() if "Comet: " in x)
    assert AT_THE_START[name][1] in line and "later upload" in line


def test_a_slow_server_has_it_all_or_the_archive_has(cases):
    slow = cases["auto", "slow"]
    assert slow.process.exitcode == 0 and slow.held_up < 20, slow.stderr
    metrics = slow.json("metrics.json")
    if list(slow.run_dir.glob("*.zip")):
        tracked = {k: [x[2] for x in v] for k, v in slow.archive.metrics.items()}
        images = slow.archive.images
        assert "comet upload" in slow.stdout
    else:
        fake = slow.server.fake
        tracked = {name: [v for _, v in sorted(fake.metric(name))] for name in metrics}
        tracked["loss"] = [v for _, v in sorted(fake.metric("loss"))]
        images = fake.images
        assert f"{fake.root}workspace/project/" in slow.stdout.splitlines()[-2]
    lists = {"losses", "epoch_seconds", "digit_accuracy", "confusion_matrix"}
    for name in set(metrics) - lists:
        wanted = metrics[name] if isinstance(metrics[name], list) else [metrics[name]]
        assert tracked[name] == wanted
    assert tracked["loss"][-1] == metrics["losses"][-1]
    assert {name: data for name, _, data in images} == slow.pictures()


def test_a_run_resumed_while_comet_is_down_has_an_archive_with_all(cases, tmp_path):
    case = cases["auto", "port refused"]
    folder = shutil.copytree(case.run_dir, tmp_path / "runs" / case.run_dir.name)
    (before,) = folder.glob("*.zip")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    comet = {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": case.server.url}
    flags = ["--resume", str(folder), "--epochs", "3"]
    resumed = conftest.Run(flags, tmp_path, kept | comet | {"no_proxy": "*"})
    assert resumed.wait() == 0, resumed.stderr
    (path,) = set(folder.glob("*.zip")) - {before}
    assert f"comet upload {path}" in resumed.stdout
    losses = [value for _, _, value in Archive(path).metrics["loss"]]
    assert losses == resumed.json("metrics.json")["losses"] and len(losses) == 60


@pytest.mark.parametrize("name", AT_THE_START)
def test_online_a_server_that_is_down_is_an_error_before_training(cases, name):
    case, (status, words) = cases["online", name], AT_THE_START[name]
    assert case.process.exitcode == status, case.stderr
    assert case.stderr.count("\n") == 1 and case.stdout == "", case.stderr + case.stdout
    assert case.stderr.startswith("main.py: --comet online: ")
    assert words in case.stderr and "--comet offline" in case.stderr
    assert not any(case.folder.glob("runs/*"))


def test_online_a_stopped_run_goes_on_in_the_same_experiment(tmp_path):
    with FakeComet() as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
        environment |= {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": server.url}
        environment |= {"HOME": str(tmp_path), "no_proxy": "*"}
        run = conftest.Run([*LONG, "--comet", "online"], tmp_path, environment)
        run.wait_for(lambda: "Epoch 2/5" in run.stdout)
        run.kill(signal.SIGTERM)
        assert run.wait() == 143, run.stderr
        flags = ["--resume", str(run.run_dir)]
        resumed = conftest.Run(flags, tmp_path, environment)
        assert resumed.wait() == 0, resumed.stderr
    assert len(server.experiments) == 1
    (address,) = {
        line
        for r in (run, resumed)
        for line in r.stdout.splitlines()
        if "Comet: " in line
    }
    assert address.endswith(f"/workspace/project/{server.experiments.pop()}")
    metrics = resumed.json("metrics.json")
    losses = [value for _, value in sorted(server.metric("train_loss"))]
    assert losses == metrics["train_loss"]
    assert not any(resumed.run_dir.glob("*.zip"))


def test_the_key_is_nowhere(cases):
    key = KEY.encode()
    for case in cases.values():
        for path in case.folder.rglob("*"):
            assert KEY not in path.name
            if path.is_file():
                assert key not in path.read_bytes(), path
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    assert not any(key in archive.read(n) for n in archive.namelist())
    fake = cases["auto", "slow"].server.fake
    assert any(KEY in str(request) for request in fake.requests)  # it was used
