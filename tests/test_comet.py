"""What Comet gets: online, offline, and when its server refuses, fails, hangs or dies.

The real client talks to servers on the loopback interface. All runs of this file are
started at once, since much of their time is waiting.
"""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import conftest
import pytest
from fake_comet import FakeComet
from offline import Archive

import main

KEY = "k3y" * 9  # Comet tracks this file, too
PICTURES = {
    *("loss_curve", "sample_prediction", "single_prediction", "predictions_grid"),
    *("worst_mistakes", "confusion_matrix"),
}
OF_COMET = {"curr_step", "curr_epoch"}  # parameters that Comet itself adds
PER_EPOCH = "train_loss", "train_accuracy", "epoch_seconds"
SHORT = "--model", "fc", "--limit", "640", "--epochs", "1"
STEPPY = *SHORT, "--batch-size", "2"  # 320 steps
LONG = "--model", "fc", "--limit", "5000", "--batch-size", "5", "--epochs", "4"

METRICS, IMAGES = "/batch/logger/experiment/metric", "/visualizations/upload"
FAULTS = {  # name: what makes the server
    "key rejected": lambda server: server.answering(bad_key=True),
    "port refused": lambda server: server.listening(False),
    "no such name": lambda server: server.at("nonexistent.invalid"),
    "500 to metrics": lambda server: server.answering(fail={METRICS: 500}),
    "500 to uploads": lambda server: server.answering(fail={IMAGES: 500}),
    "dies in mid-run": lambda server: server.answering(),
    "hangs from the start": lambda server: server.listening(True),
    "hangs in mid-run": lambda server: server.answering(),
}


def be_timed_main(arguments, folder, out, environment):
    """Be main.py, and write down for how long Comet holds up its start and its end."""
    import comet_ml

    def timed(name, call):
        def wrapper(*positional, **named):
            begin = time.monotonic()
            result = call(*positional, **named)
            with open(out / name, "a") as file:
                file.write(f"{time.monotonic() - begin}\n")
            if name == "start":
                result.end = timed("end", result.end)
            return result

        return wrapper

    comet_ml.start = timed("start", comet_ml.start)
    conftest._child(arguments, folder, out, environment)


def be_command(arguments, folder, out, environment):
    """Be the command that the arguments are."""
    conftest.become(folder, out, environment)
    os.execvp(arguments[0], arguments)


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


class Case:
    """A run, or a run and its continuation, and what it takes for Comet."""

    def __init__(self, folder, server, flags, target=be_timed_main, **more):
        self.folder, self.server, self.target = folder, server, target
        self.scratch = folder / "home"
        self.scratch.mkdir(parents=True, exist_ok=True)
        home = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(self.scratch))
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("COMET", "PYTHON"))
        }
        url = {"COMET_URL_OVERRIDE": server.url}
        self.environment = kept | home | url | {"no_proxy": "*"} | more
        self.start(flags)

    def start(self, flags):
        self.run = conftest.Run(list(flags), self.folder, self.environment, self.target)

    def resume(self, *flags, **more):
        """Go on, once it has ended well."""
        assert self.run.wait() == 0, self.run.stderr
        self.before = sorted(self.run.run_dir.glob("*.zip"))
        self.environment |= more
        self.start(["--resume", str(self.run.run_dir), *flags])

    def disturb(self, name):
        """Have the server die or hang in mid-run, once it has some metrics."""
        self.run.wait_for(lambda: len(self.server.fake.metrics) > 5)
        assert "EVALUATING" not in self.run.stdout
        if name == "dies in mid-run":
            self.server.close()
        else:
            self.server.fake.delay = 300

    def held_up(self, name):
        """The seconds in which Comet held up the start or the end."""
        return sum(map(float, (self.run.out / name).read_text().split()))

    @property
    def newest(self):
        """The path of the newest archive."""
        return max(self.run.run_dir.glob("*.zip"), key=os.path.getmtime)

    def check_all_is_in(self, archive):
        """Check that an archive has all but the loss of every step."""
        config, metrics = self.run.json("config.json"), self.run.json("metrics.json")
        steps = len(metrics["losses"]) // len(metrics["train_loss"])
        for name in PER_EPOCH:
            values = enumerate(metrics[name], 1)
            assert archive.metrics[name] == [(n * steps, n, v) for n, v in values], name
        for name in "test_loss", "test_accuracy", "calibration_error":
            ((step, _, value),) = archive.metrics[name]
            assert (step, value) == (len(metrics["losses"]), metrics[name])
        assert archive.images == {
            name: (self.run.run_dir / f"{name}.png").read_bytes() for name in PICTURES
        }
        assert archive.params.keys() - config["settings"].keys() <= OF_COMET
        assert config["settings"].items() <= archive.params.items()
        assert archive.name == self.run.run_dir.name
        assert archive.graph == str(main.MODELS[config["settings"]["model"]]())
        page = (self.run.run_dir / "report.html").read_bytes()
        assert archive.files["asset"]["report.html"] == page
        assert "confusion-matrix" in archive.files
        assert f"Epoch {len(metrics['train_loss'])}/" in archive.output

    def losses(self):
        """The losses of the run: {step: loss}."""
        return dict(enumerate(self.run.json("metrics.json")["losses"], 1))


def as_losses(archive):
    return [(step, loss) for step, _, loss in archive.metrics["loss"]]


def copy_script(folder, **constants):
    """Make a git repository of main.py there, its constants edited after the commit."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "MNIST").symlink_to(conftest.ROOT / "data" / "MNIST")
    text = (conftest.ROOT / "main.py").read_text(encoding="utf-8")
    (folder / "main.py").write_text(text, encoding="utf-8")
    page = (conftest.ROOT / "data" / "report.html").read_bytes()
    (folder / "data" / "report.html").write_bytes(page)
    git = "git", "-C", folder, "-c", "user.name=me", "-c", "user.email=me@localhost"
    for command in (["init", "-q"], ["add", "main.py"], ["commit", "-qm", "main.py"]):
        subprocess.run([*git, *command], check=True)
    for name, value in constants.items():
        text, found = re.subn(f"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", text)
        assert found == 1
    (folder / "main.py").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{name: Case}, all ended. FAULTS; "online", "offline": with a continuation.

    "file": the key is in ~/.comet.config; "constant": in main.py. The last two run in
    new processes, in git repositories.
    """
    root, cases = tmp_path_factory.mktemp("comet"), {}
    key = {"COMET_API_KEY": KEY}
    names = {"COMET_PROJECT_NAME": "my-project", "COMET_WORKSPACE": "my-team"}
    try:
        for name, make in FAULTS.items():
            flags = LONG if "mid-run" in name else SHORT
            cases[name] = Case(root / name, make(Server()), flags, **key)
        for name, more in ("online", key | names), ("offline", {}):
            cases[name] = Case(root / name, Server().answering(), STEPPY, **more)
        script = [sys.executable, "main.py", *SHORT, "--comet", "online"]
        constants = {"LR": 0.0234567}
        for name in "file", "constant":
            copy_script(root / name, **constants)
            constants["COMET_API_KEY"] = KEY
        (root / "file" / "home").mkdir()
        text = f"[comet]\napi_key = {KEY}\n"
        (root / "file" / "home" / ".comet.config").write_text(text, encoding="ascii")
        for name in "file", "constant":
            cases[name] = Case(root / name, Server().answering(), script, be_command)
        for name in FAULTS:
            if "mid-run" in name:
                cases[name].disturb(name)
        cases["online"].resume("--epochs", "2")
        cases["offline"].resume("--epochs", "2", "--comet", "offline", **key)
        for case in cases.values():
            case.run.wait()
        yield cases
    finally:
        for case in cases.values():
            case.run.process.kill()
            case.server.close()


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_happens_to_the_server_the_archive_has_all(cases, name):
    case = cases[name]
    assert case.run.process.exitcode == 0, case.run.stderr
    assert "Traceback" not in case.run.stderr and "Error" not in case.run.stderr
    assert case.held_up("start") < 20 and case.held_up("end") < 25
    (path,) = case.run.run_dir.glob("*.zip")
    archive = Archive(path)
    case.check_all_is_in(archive)
    last = case.run.stdout.splitlines()[-2]
    (line,) = (x for x in case.run.stdout.splitlines() if x.startswith("Comet: "))
    if case.server.fake and not case.server.fake.bad_key:
        assert set(as_losses(archive)) <= case.losses().items()
        assert f"comet upload --force-reupload {path.relative_to(case.folder)}" in last
    else:
        assert line.startswith("Comet: offline (")
        assert as_losses(archive) == list(case.losses().items())
        assert last.endswith(f"comet upload {path.relative_to(case.folder)}")


def test_offline_the_archive_of_a_resumed_run_has_the_whole_history(cases):
    case = cases["offline"]
    assert case.run.process.exitcode == 0, case.run.stderr
    archive = Archive(case.newest)
    case.check_all_is_in(archive)
    assert as_losses(archive) == list(case.losses().items())
    assert len(case.losses()) == 640
    assert (archive.project, archive.workspace) == (main.COMET_PROJECT, None)
    (before,) = case.before
    assert archive.key in before.name and archive.key in case.newest.name
    path = case.newest.relative_to(case.folder)
    assert case.run.stdout.splitlines()[-2].endswith(
        f"comet upload {case.run.run_dir}/{path.name}"
    )


def test_offline_no_server_is_asked_even_with_a_key(cases):
    assert cases["offline"].server.fake.requests == []


def test_online_the_server_and_the_archive_get_all(cases):
    case, fake = cases["online"], cases["online"].server.fake
    assert case.run.process.exitcode == 0, case.run.stderr
    metrics = case.run.json("metrics.json")
    for name in PER_EPOCH:
        found = [
            (m["step"], m["epoch"], float(m["metricValue"]))
            for m in fake.metrics
            if m["metricName"] == name
        ]
        assert found == [(320 * n, n, v) for n, v in enumerate(metrics[name], 1)]
    for name in "test_loss", "test_accuracy":
        assert fake.metric(name)[-1] == (640, metrics[name])
    latest = {name: data for name, _, data in fake.images}
    assert latest == {
        name: (case.run.run_dir / f"{name}.png").read_bytes() for name in PICTURES
    }
    settings = case.run.json("config.json")["settings"]
    sent = {p["parameterName"]: str(p["parameterValue"]) for p in fake.params}
    assert {
        name: str(value) for name, value in settings.items()
    }.items() <= sent.items()
    assert sent.keys() - settings.keys() <= OF_COMET
    assert fake.others["Name"] == case.run.run_dir.name
    assert fake.graphs[0]["graph"] == str(main.FullyConnectedModel())
    pages = [u for u in fake.uploads if u["query"].get("fileName") == "report.html"]
    assert pages[-1]["data"] == (case.run.run_dir / "report.html").read_bytes()


def test_online_the_loss_comes_at_most_10_times_a_second(cases):
    case = cases["online"]
    losses = case.server.fake.metric("loss")
    assert set(losses) <= case.losses().items()
    steps = [step for step, _ in losses]
    assert steps == sorted(set(steps)) and steps[-1] > 320
    seconds = sum(case.run.json("metrics.json")["epoch_seconds"])
    assert 3 <= len(losses) <= 10 * seconds + 2 * 2  # two at the end of each epoch


def test_online_a_run_goes_on_in_the_same_experiment(cases):
    """And its address is printed first and last, with the newest archive."""
    case, fake = cases["online"], cases["online"].server.fake
    (key,) = fake.experiments
    address = f"{fake.root}workspace/project/{key}"
    lines = case.run.stdout.splitlines()
    assert f"Comet: {address}" in lines
    assert f"COMPLETE - {address}; " in lines[-2]
    assert f"comet upload --force-reupload {case.newest}" in lines[-2]


def test_project_and_workspace_of_the_environment_win(cases):
    requests = cases["online"].server.fake.requests
    new = [body for _, path, _, body in requests if path.endswith("/add/run")]
    assert new[0]["projectName"] == "my-project" and new[0]["teamName"] == "my-team"


def test_the_printed_commands_upload_all(cases):
    """`comet upload`, the real one, to servers; one of them knows the experiment."""
    comet = [sys.executable, "-m", "comet_ml.scripts.comet"]
    with contextlib.ExitStack() as stack:
        uploads = []
        for name in "offline", "online":
            case, fake = cases[name], stack.enter_context(FakeComet())
            if name == "online":
                fake.experiments = cases[name].server.fake.experiments
            _, _, command = case.run.stdout.splitlines()[-2].rpartition("comet upload ")
            environment = case.environment | {"COMET_URL_OVERRIDE": fake.url}
            process = subprocess.Popen(
                [*comet, "upload", *shlex.split(command)],
                cwd=case.folder,
                env=environment | {"COMET_API_KEY": KEY},
            )
            uploads.append((case, fake, process))
        for case, fake, process in uploads:
            assert process.wait(120) == 0
            assert fake.others["Name"] == case.run.run_dir.name
            assert {name for name, *_ in fake.images} == PICTURES
            seen = [value for _, value in sorted(fake.metric("loss"))]
            assert seen == [loss for _, loss in as_losses(Archive(case.newest))]


@pytest.mark.parametrize("name", ["file", "constant"])
def test_code_and_patch_are_tracked_unless_the_key_stands_in_them(cases, name):
    """The key is found in both places: in Comet's configuration file, in main.py."""
    case = cases[name]
    assert case.run.process.exitcode == 0, case.run.stderr
    requests = case.server.fake.requests
    keys = {b["apiKey"] for _, path, _, b in requests if path.endswith("/add/run")}
    assert keys == {KEY}
    archive = Archive(case.newest)
    case.check_all_is_in(archive)
    sent = b"".join(upload["data"] for upload in case.server.fake.uploads)
    if name == "constant":
        assert not archive.files.keys() & {"source_code", "git-patch"}
        assert KEY.encode() not in sent and b"class CNN" not in sent
        return
    (code,) = archive.files["source_code"].values()
    assert code == (case.folder / "main.py").read_bytes()
    patch = case.folder / "patch.zip"
    patch.write_bytes(archive.files["git-patch"][None])
    with zipfile.ZipFile(patch) as content:
        assert any(b"+LR = 0.0234567" in content.read(n) for n in content.namelist())
    assert code in sent and patch.read_bytes() in sent


def test_the_key_is_written_nowhere(cases):
    key = KEY.encode()
    for case in cases.values():
        for path in case.folder.rglob("*"):
            if path.is_dir() or path.name in (".comet.config", "main.py"):
                continue
            assert key not in path.read_bytes(), path
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    assert not any(key in archive.read(n) for n in archive.namelist())
    assert any(KEY in str(request) for request in cases["online"].server.fake.requests)


@pytest.mark.parametrize("fault", ["key rejected", "port refused"])
def test_with_comet_online_a_fault_at_the_start_is_an_error(tmp_path, fault):
    with FAULTS[fault](Server()) as server:
        flags = *SHORT, "--comet", "online"
        case = Case(tmp_path, server, flags, COMET_API_KEY=KEY)
        assert case.run.wait() == 1, case.run.stderr
    assert re.fullmatch("main.py: --comet online .*API key.*\n", case.run.stderr)
    assert "TRAINING" not in case.run.stdout and KEY not in case.run.stderr
    assert not any(tmp_path.glob("runs/*"))


def test_with_comet_online_a_key_is_needed(spawn):
    run = spawn(*SHORT, "--comet", "online", COMET_API_KEY="YOUR_API_KEY_HERE")
    assert run.wait() == 2
    assert re.fullmatch("main.py: .*API key.*COMET_API_KEY.*\n", run.stderr)
    assert not any(run.folder.glob("runs/*"))


class NotInstalled:
    """Finds no comet_ml, and notes that it was looked for: among sys.meta_path."""

    @staticmethod
    def find_spec(name, *_):
        if name == "comet_ml":
            Path("asked").touch()
            raise ModuleNotFoundError(name)


def be_main_without_comet(*arguments):
    del sys.modules["comet_ml"]
    sys.meta_path.insert(0, NotInstalled)
    conftest._child(*arguments)


def test_without_comet_ml_a_run_says_so_and_trains(tmp_path, environment):
    """And with --comet off, it is not even looked for."""
    runs = {}
    for mode in "auto", "off", "offline":
        flags = [*SHORT, "--comet", mode]
        (tmp_path / mode).mkdir()
        target = be_main_without_comet
        runs[mode] = conftest.Run(flags, tmp_path / mode, environment, target)
    assert [run.wait() for run in runs.values()] == [0, 0, 2], runs["auto"].stderr
    for mode in "auto", "off":
        assert "Test Accuracy" in runs[mode].stdout
        assert not any(runs[mode].run_dir.glob("*.zip"))
        assert ("pip install comet-ml" in runs[mode].stdout) == (mode == "auto")
        assert (tmp_path / mode / "asked").exists() == (mode == "auto")
    error = "main.py: --comet offline needs: pip install comet-ml\n"
    assert runs["offline"].stderr == error
