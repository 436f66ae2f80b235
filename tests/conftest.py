"""What the tests share: real runs of main.py, as processes.

`python main.py` needs seconds to import PyTorch. A few tests pay that; the others take
`spawn`, which forks a process that has imported main.py already, and has otherwise all
that a process has: its own signals, exit status, standard output and files.
"""

import fcntl
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# For the fork server, which does not look where pytest does.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
# Two processes with two threads each, on two cores, wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])

RUNS = {  # what several files look at: the fixture `trained`
    "cnn": "--limit=6000 --epochs=3 --lr=0.1 --comet=off",
    "fc": "--model=fc --limit=6000 --epochs=3 --comet=off",
    "accurate": "--recipe=accurate --model=fc --limit=2000 --epochs=1 --comet=off",
    "study": "--compare --seeds=2 --seed=5 --limit=640 --epochs=1 --batch-size=32 "
    "--lr=0.05 --comet=offline",
}


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

    sys.exit(main.main(arguments))


def be_script(arguments, folder, out, environment):
    """Be `python ARGUMENTS`, a script that is not imported but run."""
    become(folder, out, environment)
    sys.argv = arguments
    runpy.run_path(sys.argv[0], run_name="__main__")


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


def complete(folder, *arguments):
    """Run main.py to its end in a folder, without a Comet key; return the Run."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    folder.mkdir(exist_ok=True)
    run = Run(list(map(str, arguments)), folder, kept | {"HOME": str(folder)})
    assert run.wait() == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run


def run_here(folder, *arguments, status=0):
    """Call main.main in this process, untracked; return the run's folder in `folder`."""
    import main

    given = [*map(str, arguments), "--comet=off", f"--output-dir={folder}"]
    assert main.main(given) == status
    (run_dir,) = folder.iterdir()
    return run_dir


def watch_training(patch, stop_in=None):
    """Have a list filled with what each epoch's training is given: an object an epoch.

    Its first weights; batches and rates (learning rates), one a step; loss_function;
    optimizer. Epoch `stop_in` is stopped by a Ctrl-C.
    """
    import main

    epochs, train_epoch = [], main.train_epoch

    def watched(model, batches, loss_function, optimizer, *more, **named):
        weights = {name: w.clone() for name, w in model.state_dict().items()}
        epoch = SimpleNamespace(weights=weights, batches=[], rates=[])
        epoch.loss_function, epoch.optimizer = loss_function, optimizer
        epochs.append(epoch)

        def note():
            for batch in batches:
                epoch.batches.append(batch)
                epoch.rates.append(optimizer.param_groups[0]["lr"])
                yield batch
                if len(epochs) == stop_in:
                    raise KeyboardInterrupt

        return train_epoch(model, note(), loss_function, optimizer, *more, **named)

    patch.setattr(main, "train_epoch", watched)
    return epochs


def pytest_collection_modifyitems(items):
    """Run the longest files first: else the last one would run alone."""
    long = "comet report torchrun everywhere reliability predict console edits training"
    order = {f"test_{name}": place for place, name in enumerate(long.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
    """spawn(*arguments, **environment) starts main.py, or `target`, quickly; see Run."""
    runs = []

    def start(*arguments, folder=tmp_path, target=_child, **more):
        runs.append(Run(list(map(str, arguments)), folder, environment | more, target))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.join()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(name): the folder of a run of RUNS. All of pytest's processes share it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def train(name):
        folder = root / f"trained-{name}"
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                complete(folder, *RUNS[name].split())
                (folder / "done").touch()
        (run_dir,) = (folder / "runs").iterdir()
        return run_dir

    return train
