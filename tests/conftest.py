"""What the tests share: real runs of main.py, as processes.

`python main.py` needs seconds to import PyTorch. A few tests pay that; the others take
`spawn`, which forks a process that has imported main.py already, and has otherwise all
that a process has: its own signals, exit status, standard output and files.
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# For the fork server, which does not look where pytest does.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
# Two processes with two threads each, on two cores, wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])


def pytest_collection_finish():
    gc.freeze()  # as main.py does: nothing that is imported by now is garbage


def become(folder, out, environment):
    """Have all that a process of its own has."""
    os.setsid()  # signals for the test's own terminal are not for us
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _child(arguments, folder, out, environment):
    """Be `python main.py ARGUMENTS`, in a process that has imported main already."""
    become(folder, out, environment)
    import main

    try:
        settings = main.read_settings(arguments)
    except main.UserError as error:
        sys.exit(main.report(error))
    os._exit(main.main(settings))  # as main.py does


class Run:
    """A running or finished process of main.py."""

    def __init__(self, arguments, folder, environment, target=_child):
        self.folder = folder
        self.out = folder / f"console-{time.monotonic_ns()}"
        self.out.mkdir(parents=True)
        for name in ("out", "err"):
            (self.out / name).touch()
        self.process = FORKS.Process(
            target=target, args=(arguments, folder, self.out, environment)
        )
        self.process.start()

    def wait(self, seconds=300):
        """Wait for the end; return the exit status (negative: the signal)."""
        self.process.join(seconds)
        assert not self.process.is_alive(), f"still running\n{self.stdout}{self.stderr}"
        return self.process.exitcode

    def wait_for(self, condition, seconds=180):
        """Wait until condition() is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended early\n{self.stdout}{self.stderr}"
            assert time.monotonic() < end, f"not in time\n{self.stdout}{self.stderr}"
            time.sleep(0.005)

    def kill(self, number=signal.SIGKILL):
        """Send a signal."""
        os.kill(self.process.pid, number)

    @property
    def stdout(self):
        return (self.out / "out").read_text(encoding="utf-8")

    @property
    def stderr(self):
        return (self.out / "err").read_text(encoding="utf-8")

    @property
    def run_dir(self):
        """The only folder in runs/, the default output folder."""
        (run_dir,) = (self.folder / "runs").iterdir()
        return run_dir

    def json(self, name):
        return json.loads((self.run_dir / name).read_text(encoding="utf-8"))


@pytest.fixture
def environment(tmp_path):
    """An environment with no Comet key and no proxy, its home in an empty folder."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("COMET", "PYTHON"))
    }
    home = tmp_path / "home"
    home.mkdir()
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home), "no_proxy": "*"}


@pytest.fixture
def spawn(tmp_path, environment):
    """spawn(*arguments, **environment) starts main.py, quickly; see Run."""
    runs = []

    def start(*arguments, folder=tmp_path, **more):
        runs.append(Run(list(map(str, arguments)), folder, environment | more))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.join()


@pytest.fixture
def run_script(tmp_path, environment):
    """run_script(*arguments, **environment): `python main.py ARGUMENTS`, to its end."""

    def run(*arguments, folder=tmp_path, script=ROOT / "main.py", **more):
        return subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            check=False,
            cwd=folder,
            env=environment | more,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(*flags): the folder of a run with these flags, on all digits, 1 epoch."""
    runs = {}

    def train(*flags):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("trained")
            kept = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
            arguments = *flags, "--epochs", "1", "--comet", "off"
            run = Run(list(arguments), folder, kept | {"HOME": str(folder)})
            assert run.wait() == 0, run.stderr
            runs[flags] = run.run_dir
        return runs[flags]

    return train
