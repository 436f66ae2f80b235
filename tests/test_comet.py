"""What Comet gets: online, offline, and when its server refuses, fails, hangs or dies."""

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import zipfile

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
LONG = "--model", "fc", "--limit", "3000", "--batch-size", "5", "--epochs", "4"

FAULTS = {  # name: what makes the server
    "key rejected": lambda: Server(bad_key=True),
    "no such name": lambda: Server("nonexistent.invalid"),
    "busy": lambda: Server(busy=True),
    "dies in mid-run": lambda: Server(),
    "hangs from the start": lambda: Server("localhost"),
    "hangs in mid-run": lambda: Server(),
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


class Server(contextlib.ExitStack):
    """What a run takes for Comet: `url`, and a FakeComet, if there is one."""

    def __init__(self, host=None, **how):
        super().__init__()
        self.fake = None if host else self.enter_context(FakeComet(**how))
        if host == "localhost":  # a port that never answers
            silent = self.enter_context(socket.create_server(("127.0.0.1", 0)))
            host = f"127.0.0.1:{silent.getsockname()[1]}"
        self.url = f"http://{host}/clientlib/" if host else self.fake.url


class Case:
    """A run, or a run and its continuation, and what it takes for Comet."""

    def __init__(self, folder, server, flags, target=be_timed_main, **more):
        self.folder, self.server, self.target = folder, server, target
        more |= {"COMET_URL_OVERRIDE": server.url, "TEST_IMAGES": "1000"}
        self.environment = conftest.make_environment(folder / "home", **more)
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

    @property
    def newest(self):
        """The path of the newest archive."""
        return max(self.run.run_dir.glob("*.zip"), key=os.path.getmtime)

    def check_all_is_in(self, found):
        """Check that an archive or a server has all but the loss of every step."""
        assert self.run.process.exitcode == 0, self.run.stderr
        config, metrics = self.run.json("config.json"), self.run.json("metrics.json")
        last = len(metrics["losses"])
        steps = last // len(metrics["train_loss"])
        for name in PER_EPOCH:
            values = enumerate(metrics[name], 1)
            assert found.metrics[name] == [(n * steps, n, v) for n, v in values], name
        for name in "test_loss", "test_accuracy", "calibration_error":
            step, _, value = found.metrics[name][-1]
            assert (step, value) == (last, metrics[name])
        folder = self.run.run_dir
        pictures = {name: (folder / f"{name}.png").read_bytes() for name in PICTURES}
        assert found.images == pictures
        sent = {name: str(value) for name, value in found.params.items()}
        wanted = {name: str(value) for name, value in config["settings"].items()}
        assert wanted.items() <= sent.items()
        assert sent.keys() - wanted.keys() <= OF_COMET
        assert found.name == folder.name
        assert found.graph == str(main.FullyConnectedModel())
        assert found.files["report.html"] == (folder / "report.html").read_bytes()
        assert (folder / "model.pt").read_bytes() in found.files.values()
        assert "confusion-matrix.json" in found.files

    def losses(self):
        """The losses of the run: {step: loss}."""
        return dict(enumerate(self.run.json("metrics.json")["losses"], 1))

    @property
    def last_line(self):
        return self.run.stdout.splitlines()[-2]


def as_losses(found):
    return sorted((step, loss) for step, _, loss in found.metrics["loss"])


def copy_script(folder, **constants):
    """Make a git repository of main.py there, its constants edited after the commit."""
    (folder / "home").mkdir(parents=True)
    (folder / "data").symlink_to(conftest.ROOT / "data")
    text = (conftest.ROOT / "main.py").read_text(encoding="utf-8")
    (folder / "main.py").write_text(text, encoding="utf-8")
    git = "git", "-C", folder, "-c", "user.name=me", "-c", "user.email=me@localhost"
    for command in (["init", "-q"], ["add", "main.py"], ["commit", "-qm", "main.py"]):
        subprocess.run([*git, *command], check=True)
    for name, value in constants.items():
        text, found = re.subn(f"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", text)
        assert found == 1
    (folder / "main.py").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{name: Case}: started at once, and ended; "file" has the key in ~/.comet.config."""
    root, cases = tmp_path_factory.mktemp("comet"), {}
    key = {"COMET_API_KEY": KEY}
    names = {"COMET_PROJECT_NAME": "my-project", "COMET_WORKSPACE": "my-team"}
    try:
        for name, make in FAULTS.items():
            flags = LONG if "mid-run" in name else SHORT
            cases[name] = Case(root / name, make(), flags, **key)
        for name, more in ("online", key | names), ("offline", {}):
            cases[name] = Case(root / name, Server(), STEPPY, **more)
        flags = *SHORT, "--comet", "online"
        constants = {"LR": 0.0234567}
        for name in "file", "constant":
            copy_script(root / name, **constants)
            constants["COMET_API_KEY"] = KEY
        text = f"[comet]\napi_key = {KEY}\n"
        (root / "file" / "home" / ".comet.config").write_text(text, encoding="ascii")
        for name in "file", "constant":
            script = [str(root / name / "main.py"), *flags]
            cases[name] = Case(root / name, Server(), script, conftest.be_script)
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
    (path,) = case.run.run_dir.glob("*.zip")
    archive = Archive(path)
    case.check_all_is_in(archive)
    assert "Traceback" not in case.run.stderr and "Error" not in case.run.stderr
    for place, limit in ("start", 25), ("end", 28):  # on a quiet machine: 17 and 20
        seconds = (case.run.out / place).read_text().split()
        assert 0 < sum(map(float, seconds)) < limit
    (line,) = (x for x in case.run.stdout.splitlines() if x.startswith("Comet: "))
    if "mid-run" in name:
        assert set(as_losses(archive)) <= case.losses().items()
        command = f"comet upload --force-reupload {path.relative_to(case.folder)}"
    else:
        assert line.startswith("Comet: offline (")
        assert as_losses(archive) == list(case.losses().items())
        command = f"comet upload {path.relative_to(case.folder)}"
    assert case.last_line.endswith(command)


def test_offline_the_archive_of_a_resumed_run_has_the_whole_history(cases):
    """And no server is asked, even with a key."""
    case = cases["offline"]
    archive = Archive(case.newest)
    case.check_all_is_in(archive)
    assert as_losses(archive) == list(case.losses().items())
    assert len(case.losses()) == 640 and "Epoch 2/2" in archive.output
    assert (archive.project, archive.workspace) == (main.COMET_PROJECT, None)
    (before,) = case.before
    assert archive.key in before.name and archive.key in case.newest.name
    assert case.last_line.endswith(f"comet upload {case.newest}")
    assert case.server.fake.requests == []


def test_online_the_server_gets_all_in_one_experiment(cases):
    """The loss at most 100 times a second; project and workspace of the environment."""
    case, fake = cases["online"], cases["online"].server.fake
    case.check_all_is_in(fake)
    losses = as_losses(fake)
    assert set(losses) <= case.losses().items() and losses[-1][0] > 320
    seconds = sum(case.run.json("metrics.json")["epoch_seconds"])
    assert 3 <= len(losses) <= 100 * seconds + 2 * 20  # 20 at the end of each epoch
    (key,) = fake.experiments
    new = next(body for path, body in fake.requests if path.endswith("/add/run"))
    assert (new["projectName"], new["teamName"]) == ("my-project", "my-team")
    address = f"{fake.root}workspace/project/{key}"
    assert f"Comet: {address}" in case.run.stdout.splitlines()
    assert f"COMPLETE - {address}; " in case.last_line
    assert case.last_line.endswith(f"comet upload --force-reupload {case.newest}")


def test_the_printed_commands_upload_all(cases):
    """`comet upload`, the real one, to servers; one of them knows the experiment."""
    comet = [sys.executable, "-m", "comet_ml.scripts.comet", "upload"]
    with contextlib.ExitStack() as stack:
        uploads = []
        for name in "offline", "online":
            case, fake = cases[name], stack.enter_context(FakeComet())
            if name == "online":
                fake.experiments = case.server.fake.experiments
            words = shlex.split(case.last_line.rpartition("comet upload ")[2])
            more = {"COMET_URL_OVERRIDE": fake.url, "COMET_API_KEY": KEY}
            place = {"cwd": case.folder, "env": case.environment | more}
            uploads.append((case, fake, subprocess.Popen([*comet, *words], **place)))
        for case, fake, process in uploads:
            assert process.wait(120) == 0
            assert fake.name == case.run.run_dir.name
            assert fake.images.keys() == PICTURES
            assert as_losses(fake) == as_losses(Archive(case.newest))


@pytest.mark.parametrize("name", ["file", "constant"])
def test_code_and_patch_are_tracked_unless_the_key_stands_in_them(cases, name):
    """The key is found in both places: in Comet's configuration file, in main.py."""
    case, fake = cases[name], cases[name].server.fake
    assert any(body.get("apiKey") == KEY for _, body in fake.requests)
    archive, script = Archive(case.newest), str(case.folder / "main.py")
    for found in fake, archive:
        case.check_all_is_in(found)
        if name == "constant":
            assert script not in found.files and "git-patch" not in found.files
            continue
        assert found.files[script] == (case.folder / "main.py").read_bytes()
        with zipfile.ZipFile(io.BytesIO(found.files["git-patch"])) as patch:
            assert b"+LR = 0.0234567" in patch.read(patch.namelist()[0])
    if name == "constant":
        assert not any(KEY.encode() in data for data in fake.files.values())


def test_the_key_is_written_nowhere(cases):
    for case in cases.values():
        for path in case.folder.rglob("*"):
            if path.is_dir() or path.name in (".comet.config", "main.py"):
                continue
            contents = [path.read_bytes()]
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    contents += map(archive.read, archive.namelist())
            assert not any(KEY.encode() in content for content in contents), path


@pytest.mark.parametrize("fault", ["key rejected", "no such name"])
def test_with_comet_online_a_fault_at_the_start_is_an_error(tmp_path, fault):
    with FAULTS[fault]() as server:
        flags = *SHORT, "--comet", "online"
        case = Case(tmp_path, server, flags, COMET_API_KEY=KEY)
        assert case.run.wait() == 1, case.run.stderr
    assert re.fullmatch("main.py: --comet online.*API key.*\n", case.run.stderr)
    assert "TRAINING" not in case.run.stdout and KEY not in case.run.stderr
    assert not any(tmp_path.glob("runs/*"))
