"""What the tests share: real runs of main.py, as processes.

`python main.py` needs seconds to import PyTorch. A few tests pay that; the others take
`spawn`, which forks a process that has imported main.py already, and has otherwise all
that a process has: its own signals, exit status, standard output and files.
"""

import fcntl
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import sync_playwright

IS_LINUX = sys.platform == "linux"
LINUX = pytest.mark.skipif(not IS_LINUX, reason="Linux alone has this")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# For the fork server, which does not look where pytest does.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
# Two processes with two threads each, on two cores, wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On macOS a fork of a process that has used PyTorch may crash: there each starts anew.
FORKS = multiprocessing.get_context("forkserver" if IS_LINUX else "spawn")
FORKS.set_forkserver_preload(["preload"])

RUNS = {  # what several files look at: the fixture `trained`
    "cnn": "--limit=6000 --epochs=3 --lr=0.1 --comet=off",
    "fc": "--model=fc --limit=6000 --epochs=3 --comet=off",
    "accurate": "--recipe=accurate --model=fc --limit=2000 --epochs=1 --comet=off",
    "study": "--compare --seeds=2 --seed=5 --limit=640 --epochs=1 --batch-size=32 "
    "--lr=0.05 --comet=offline",
}


def get_folders(folder):
    """Return the folders in it: beside the runs lies index.html."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


COMMANDS = "chromium chromium-browser google-chrome google-chrome-stable microsoft-edge"
FILES = """/Applications/Google Chrome.app/Contents/MacOS/Google Chrome
/Applications/Chromium.app/Contents/MacOS/Chromium
/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge
Google/Chrome/Application/chrome.exe
Chromium/Application/chrome.exe
Microsoft/Edge/Application/msedge.exe""".splitlines()  # on macOS and Windows
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
QUIET += ["--in-process-gpu"]  # a process less
WIDE = "document.documentElement.scrollWidth > innerWidth ? ['wide'] : []"
FAINT = """() => {  // WCAG 2.2, level AA: every text, over all the backgrounds behind it
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (colour) => colour.slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((total, c, n) => total + c * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = (e) => {
        const [r, g, b, a = 1] = numbers(getComputedStyle(e).backgroundColor);
        if (a === 1 || !e.parentElement) return [r, g, b];
        return behind(e.parentElement).map((c, n) => a * [r, g, b][n] + (1 - a) * c);
    };
    return [...document.querySelectorAll('body *')].filter((e) => {
        const isText = (n) => n.nodeType === 3 && n.data.trim();
        if (![...e.childNodes].some(isText) || !e.getClientRects().length) return false;
        const {color, fill} = getComputedStyle(e);
        const one = light(numbers(e.closest("svg") ? fill : color)), two = light(behind(e));
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05) < 4.5;
    }).map((e) => e.outerHTML.slice(0, 80));
}"""


@contextmanager
def limit_test_images(count):
    """Have runs test with the first digits only, which saves most of a short run."""
    import main

    load = main.load_mnist

    def load_some(data_dir):
        *training, images, labels = load(data_dir)
        return [*training, images[:count], labels[:count]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_mnist", load_some)
        yield


def become(folder, out, environment):
    """Have all that a process of its own has."""
    os.setsid()  # signals for the test's own terminal are not for us
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGTERM, signal.SIGHUP:  # nohup ignores SIGHUP
        signal.signal(number, signal.SIG_DFL)


def _child(arguments, folder, out, environment):
    """Be `python main.py ARGUMENTS`, in a process that has imported main already."""
    become(folder, out, environment)
    import main

    with limit_test_images(int(environment.get("TEST_IMAGES", 10_000))):
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
        (run_dir,) = get_folders(self.folder / "runs")
        return run_dir

    def json(self, name):
        return json.loads((self.run_dir / name).read_text(encoding="utf-8"))


def normalise(images):
    return (images[:, None] / 255 - 0.1307) / 0.3081


def make_environment(home, **more):
    """Return an environment with no Comet key and no proxy, its home in this folder."""
    home.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COMET", "PYTHON"))}
    places = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(home))
    return env | places | {"no_proxy": "*"} | more


def complete(folder, *arguments, **more):
    """Run main.py to its end in a folder, without a Comet key; return the Run."""
    environment = make_environment(folder / "home", **more)
    run = Run(list(map(str, arguments)), folder, environment)
    assert run.wait() == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run


def run_here(folder, *arguments, status=0, test_images=1000):
    """Call main.main in this process, untracked; return the run's folder in `folder`."""
    import main

    given = [*map(str, arguments), "--comet=off", f"--output-dir={folder}"]
    with limit_test_images(test_images):
        assert main.main(given) == status
    (run_dir,) = get_folders(folder)
    return run_dir


def watch_training(patch, stop_in=None):
    """Have a list filled with what each epoch's training is given: an object an epoch.

    Its first weights; batches and rates (learning rates), one a step; loss_function;
    optimizer. Epoch `stop_in` is stopped by a Ctrl-C.
    """
    import main

    epochs, train_epoch = [], main.train_epoch

    def watched(model, batches, loss_function, optimizer, *more, **named):
        weights = {name: w.clone() for name, w in model.named_parameters()}
        weights |= {name: buffer.clone() for name, buffer in model.named_buffers()}
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
    long = "comet report surroundings torchrun reliability predict console edits"
    order = {f"test_{name}": place for place, name in enumerate(long.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def mnist():
    import main

    return main.load_mnist(str(ROOT / "data"))


@pytest.fixture
def environment(tmp_path):
    return make_environment(tmp_path / "home")


@pytest.fixture
def spawn(tmp_path, environment):
    """spawn(*arguments, **environment) starts main.py, or `target`, quickly; see Run."""
    runs = []

    def start(*arguments, folder=tmp_path, target=_child, **more):
        more = environment | {"TEST_IMAGES": "1000"} | more
        runs.append(Run(list(map(str, arguments)), folder, more, target))
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
                complete(folder, *RUNS[name].split(), TEST_IMAGES="1000")
                (folder / "done").touch()
        (run_dir,) = get_folders(folder / "runs")
        return run_dir

    return train


def find_browser():
    """Return the path of a browser; or None, for Playwright's own, which is installed."""
    variables = "PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"
    roots = [os.environ[name] for name in variables if name in os.environ]
    paths = [Path(root, file) for root in roots or ["/"] for file in FILES]
    found = [shutil.which(name) for name in COMMANDS.split()]
    found += [str(path) for path in paths if path.is_file()]
    for path in filter(None, found):
        return path
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    subprocess.run(command, capture_output=True, check=False, timeout=300)
    return None


def read_data(path):
    """Return what main.py has put into a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search('id="run">(.*?)</script>', text)[1])


@pytest.fixture(scope="session")
def browser():
    """Chromium, started once for all files that look at pages."""
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=find_browser(), args=QUIET)
        except Exception as error:  # noqa: BLE001
            need = "install Chromium, Chrome or Edge for these tests (apt install chromium)"
            pytest.fail(f"{need}: {str(error).splitlines()[0]}", pytrace=False)
        # A page that stays open: Chromium keeps its process for the next ones.
        template = ROOT / "data" / "page" / "report.html"
        browser.new_context().new_page().goto(template.as_uri())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(path or data): the page. No message, no request to anywhere."""
    troubles, opened, path = [], [], tmp_path / "report.html"

    def go(run, clock=None, **options):
        import main

        if isinstance(run, dict):
            main.write_page(path, dict(run))
        context = browser.contexts[0]
        if options or clock is not None:  # a context of its own
            context = browser.new_context(**options)
            opened.append(context)
        page = context.new_page()
        opened.append(page)
        if clock is not None:  # seconds after the page was written
            page.clock.install(time=time.time() + clock)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url))
        page.goto((path if isinstance(run, dict) else run).as_uri())
        checked = "!find('answer')?.textContent.startsWith('Checking')"
        page.wait_for_function(checked)
        return page

    yield go
    for one in reversed(opened):
        one.close()
    assert not [text for text in troubles if not re.match("file:|data:|blob:", text)]
