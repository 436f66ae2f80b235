"""Comet refuses, fails, hangs or dies: the run goes on, and nothing is lost.

The real client talks to servers on the loopback interface. All runs of this file are
started at once, since most of their time is waiting.
"""

import contextlib
import os
import socket
import time
import zipfile
from pathlib import Path

import conftest
import pytest
from fake_comet import FakeComet
from offline import Archive

import main

KEY = "secretkey0123456789abcdefgh"
PICTURES = {"sample_prediction", "single_prediction", "predictions_grid", "loss_curve"}
SHORT = ["--model", "fc", "--limit", "200", "--batch-size", "10", "--epochs", "2"]
LONG = ["--model", "fc", "--limit", "5000", "--batch-size", "5", "--epochs", "5"]


class Timed(main.Tracker):
    """A Tracker that writes down for how long it has held up the run, in seconds."""

    held_up = 0.0

    def timed(self, method, *arguments, **named):
        begin = time.monotonic()
        try:
            return method(self, *arguments, **named)
        finally:
            self.held_up += time.monotonic() - begin
            Path("held_up").write_text(str(self.held_up), encoding="ascii")

    def __init__(self, *arguments, **named):
        self.timed(main.Tracker.__init__, *arguments, **named)

    def log_losses(self, *arguments, **named):
        self.timed(main.Tracker.log_losses, *arguments, **named)

    def finish(self):
        return self.timed(main.Tracker.finish)


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

    def has_metrics(self):
        return len(self.fake.metrics) > 10

    def die(self):
        self.fake.__exit__()

    def hang(self):
        self.fake.delay = 300


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
NOT_AT_THE_START = {  # case of --comet online: exit status, what the message says
    "key rejected": (2, "API key"),
    "no such name": (1, "Comet"),
    "port refused": (1, "Comet"),
    "never answers": (1, "Comet"),
}
DOWN = [("auto", name) for name in SERVERS if name != "slow"] + [("online", "dies")]


class Case:
    """A run with --comet MODE, and what it takes for Comet."""

    def __init__(self, folder, mode, name):
        self.folder, self.name = folder, name
        self.server = SERVERS[name](Server())
        home = folder / "home"
        home.mkdir()
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith("COMET")
        } | {
            "HOME": str(home),
            "TMPDIR": str(home),
            "no_proxy": "*",
            "COMET_API_KEY": KEY,
            "COMET_URL_OVERRIDE": self.server.url,
        }
        flags = LONG if name in ("dies", "hangs") else SHORT
        self.run = TimedRun([*flags, "--comet", mode], folder, self.environment)

    def disturb(self):
        """Have the server die or hang, if it is to, as soon as it has some metrics."""
        if self.name in ("dies", "hangs"):
            self.run.wait_for(self.server.has_metrics)
            assert "COMPLETE" not in self.run.stdout
            getattr(self.server, self.name.removesuffix("s").replace("die", "die"))()

    @property
    def held_up(self):
        return float((self.folder / "held_up").read_text(encoding="ascii"))

    @property
    def metrics(self):
        return self.run.json("metrics.json")


class TimedRun(conftest.Run):
    """A Run with a Timed tracker."""

    target = staticmethod(be_timed_main)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{(mode, name): Case}, all ended."""
    wanted = [*DOWN, ("auto", "slow"), *(("online", name) for name in NOT_AT_THE_START)]
    cases = {}
    for mode, name in wanted:
        folder = tmp_path_factory.mktemp("case")
        cases[mode, name] = Case(folder, mode, name)
    for case in cases.values():
        case.disturb()
    for case in cases.values():
        case.run.wait()
    return cases
