"""It works where people run it, with their settings: situations from public reports."""

import contextlib
import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import conftest
import matplotlib
import pytest
import torch
from conftest import ROOT, _child, run_here, watch_training
from fake_comet import FakeComet
from offline import Archive

import main

QUICK = "--model=fc", "--limit=200", "--epochs=1"
STRANGE = """text.usetex: True
image.origin: lower
image.lut: 3
figure.facecolor: black
font.family: No Such Font
savefig.dpi: 300
axes.titlesize: 40
"""


def read_pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The pictures of a run without any settings of the user's."""
    folder = tmp_path_factory.mktemp("plain")
    return read_pictures(run_here(folder, *QUICK, test_images=10_000))


def test_the_users_settings_change_no_picture(tmp_path, environment, plain):
    """A matplotlibrc, a notebook's backend, and TQDM_DISABLE: in a process of its own."""
    config = tmp_path / "home" / "matplotlibrc"
    config.write_text(STRANGE, encoding="utf-8")
    backend = "module://matplotlib_inline.backend_inline"
    settings = environment | {"MPLBACKEND": backend, "TQDM_DISABLE": "1"}
    command = [sys.executable, ROOT / "main.py", *QUICK, "--comet=off"]
    how = {"cwd": tmp_path, "env": settings, "encoding": "utf-8"}
    done = subprocess.run(command, capture_output=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr and "Traceback" not in done.stderr
    (run_dir,) = conftest.get_folders(tmp_path / "runs")
    pictures = read_pictures(run_dir)
    curve = {"loss_curve.png": pictures["loss_curve.png"]}
    assert pictures == plain | curve and len(pictures) == 6
    config.write_text(STRANGE, encoding="utf-16")
    done = subprocess.run(command, capture_output=True, check=False, **how)
    assert done.returncode == 2 and "save them as UTF-8" in done.stderr


def test_settings_of_a_notebook_stay_and_decide_nothing(tmp_path, plain):
    strange = {"image.origin": "lower", "text.usetex": True, "lines.linewidth": 20}
    with matplotlib.rc_context(strange):
        before = dict(matplotlib.rcParams)
        pictures = read_pictures(run_here(tmp_path, *QUICK, test_images=10_000))
        assert dict(matplotlib.rcParams) == before
    assert pictures == plain


@pytest.mark.parametrize("name", ["add_axes", "add_subplot"])
def test_no_picture_ends_a_run(tmp_path, monkeypatch, capsys, name):
    """Of the loss and the confusion matrix; of digits."""

    def fail(*arguments, **named):
        raise RuntimeError("latex was not able to process")

    monkeypatch.setattr(main.Figure, name, fail)
    run_dir = run_here(tmp_path, *QUICK)
    errors = capsys.readouterr().err
    assert "cannot draw" in errors and "latex" in errors and "Traceback" not in errors
    assert json.loads((run_dir / "metrics.json").read_text())["state"] == "finished"


def test_a_bar_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "tqdm", functools.partial(main.tqdm, ascii="1"))
    monkeypatch.setitem(main.DEFAULTS, "data_dir", Path(main.DATA_DIR))  # no text
    run_here(tmp_path, *QUICK)
    assert "no progress bar: unset TQDM_" in capsys.readouterr().err


def be_main_without_comet(*arguments):
    sys.modules["comet_ml"] = None
    conftest._child(*arguments)


def be_main_beside_a_broken_package(arguments, folder, out, environment):
    del sys.modules["comet_ml"]
    (folder / "comet_ml.py").write_text("import no_such_package", encoding="utf-8")
    sys.path.insert(0, str(folder))
    conftest._child(arguments, folder, out, environment)


def be_main_with_a_config(*arguments):
    """Read ~/.comet.config, which the process forked from had none of."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "comet_ml"]:
        del sys.modules[name]
    conftest._child(*arguments)


def be_main_whose_metrics_fail(*arguments):
    import comet_ml

    def fail(*arguments, **named):
        raise OSError("no space left")

    comet_ml.OfflineExperiment.log_metrics = fail
    comet_ml.OfflineExperiment.log_image = fail
    conftest._child(*arguments)


WAYS = {  # name: target, environment, ~/.comet.config, what is told
    "missing": (be_main_without_comet, {}, b"", "pip install comet-ml"),
    "import": (be_main_beside_a_broken_package, {}, b"", "no_such_package"),
    "UTF-16": (be_main_with_a_config, {}, "[comet]\n".encode("utf-16"), "Error"),
    "broken": (be_main_with_a_config, {}, b"[comet\nx=secret", "Error"),
    "key": (_child, {"COMET_EXPERIMENT_KEY": "short"}, b"", "COMET_EXPERIMENT_KEY"),
}


@pytest.mark.parametrize("way", WAYS)
def test_comet_that_cannot_start(tmp_path, spawn, way):
    """auto trains on and says why; offline was asked for: a line, and no folder."""
    target, settings, config, reason = WAYS[way]
    (tmp_path / "home" / ".comet.config").write_bytes(config)
    runs = []
    for mode in ("auto", "offline"):
        flags = *QUICK, f"--comet={mode}", f"--output-dir={mode}"
        runs.append(spawn(*flags, target=target, **settings))
    assert [run.wait() for run in runs] == [0, 2], runs[0].stderr + runs[1].stderr
    told = re.findall("(?m)^Comet: off.*", runs[0].stdout)
    assert len(told) == 1 and reason in told[0]
    assert ("pip install" in told[0]) is (way == "missing")
    assert list(tmp_path.glob("auto/*-fc/model.pt"))
    assert reason in runs[1].stderr and runs[1].stderr.count("\n") == 1
    assert list((tmp_path / "offline").iterdir()) == []
    for run in runs:
        assert "secret" not in run.stdout + run.stderr and "Traceback" not in run.stderr


def test_comet_that_fails_in_mid_run_is_told_once(spawn):
    run = spawn(*QUICK, "--comet=offline", target=be_main_whose_metrics_fail)
    assert run.wait() == 0, run.stderr
    told = re.findall("(?m)^main.py: Comet.*", run.stderr)
    assert len(told) == 2  # log_metrics and log_image
    assert "Test Accuracy" in run.stdout


def test_comets_variables_for_the_key_and_the_folder(tmp_path, spawn):
    """The key is that of one run, not of a study."""
    key = {"COMET_EXPERIMENT_KEY": "0123456789abcdef" * 2}
    own = {"COMET_OFFLINE_DIRECTORY": "~/new/own"}
    one = spawn(*QUICK, "--comet=offline", "--output-dir=one", **key, **own)
    two = spawn(*QUICK, "--comet=offline", "--output-dir=two", "--seeds=2", **key)
    assert one.wait() == two.wait() == 0, one.stderr + two.stderr
    (path,) = (tmp_path / "home" / "new" / "own").glob("*.zip")
    assert f"comet upload {path}" in one.stdout
    archive = Archive(path)
    assert archive.key == key["COMET_EXPERIMENT_KEY"] and archive.metrics["loss"]
    assert len({Archive(path).key for path in tmp_path.glob("two/*/*/*.zip")}) == 2


def test_what_was_offline_is_sent_when_the_network_is_back(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main.main([*QUICK, "--comet=offline", f"--output-dir={tmp_path}/runs"]) == 0
    (run_dir,) = conftest.get_folders(tmp_path / "runs")
    with FakeComet() as fake:
        monkeypatch.setenv("COMET_URL_OVERRIDE", fake.url)
        monkeypatch.setenv("COMET_API_KEY", "k3y" * 9)
        flags = "--epochs=2", "--comet=online"
        assert main.main(["--resume", str(run_dir), *flags]) == 0
    assert [epoch for _, epoch, _ in fake.metrics["train_loss"]] == [1, 2]
    steps = [step for step, _, _ in fake.metrics["loss"]]
    assert len(steps) == len(set(steps)) and steps[0] == 1


@pytest.mark.parametrize("key", ["", None])
def test_an_empty_key_is_none(tmp_path, monkeypatch, key):
    monkeypatch.setattr(main, "COMET_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(main.UserError, match="needs an API key"):
        main.start_comet("online", tmp_path, None)
    comet, where = main.start_comet("auto", tmp_path, None)
    comet.end()
    assert where == "offline"


class FullDisk(main.Tracker):
    """An experiment whose archive gets no metrics, as with a full temporary folder."""

    def end(self):
        self.experiment.end()
        (path,) = Path(self.directory).glob("*.zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("experiment.json", "{}")


@pytest.mark.parametrize("kind", [main.Tracker, FullDisk])
def test_an_archive_without_metrics_is_not_offered(tmp_path, kind):
    comet, _ = main.start_comet("offline", tmp_path, None)
    comet.log_metric("loss", 1.5, step=1)
    place = main.end_comet(kind(comet.experiment, comet.directory), tmp_path)
    assert ("comet upload" in place) is (kind is main.Tracker)


def test_a_project_that_was_moved_goes_on(tmp_path, monkeypatch):
    """With the data where they are now; its command has no folder in it."""
    old = tmp_path / "old"
    (old / "data" / "MNIST").mkdir(parents=True)
    (old / "data" / "MNIST" / "raw").symlink_to(ROOT / "data" / "MNIST" / "raw")
    run_dir = run_here(old / "runs", *QUICK, f"--data-dir={old / 'data'}")
    old.rename(tmp_path / "new")
    run_dir = tmp_path / "new" / "runs" / run_dir.name
    assert main.main(["--resume", str(run_dir), "--epochs=2", "--comet=off"]) == 0
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["data_dir"] == main.DATA_DIR
    assert not old.exists() and str(old) not in config["command"]
    assert "--epochs=2" in config["command"] and "-dir" not in config["command"]


def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch):
    words = ["python", "main.py", "--resume", "my runs"]
    assert main.quote(words) == "python main.py --resume 'my runs'"
    with monkeypatch.context() as patch:  # pytest itself must not see it
        patch.setattr(main.os, "name", "nt")
        quoted = main.quote(words)
    assert quoted == 'python main.py --resume "my runs"'


def test_a_strange_index_stays(tmp_path, capsys):
    index = tmp_path / "index.html"
    index.write_text("<h1>My homepage</h1>", encoding="utf-8")
    assert main.main([*QUICK, "--comet=off", f"--output-dir={tmp_path}"]) == 0
    for folder in conftest.get_folders(tmp_path):
        shutil.rmtree(folder)
    main.write_overviews(folder)  # no run: nor is it removed
    assert index.read_text(encoding="utf-8") == "<h1>My homepage</h1>"
    assert str(index) in capsys.readouterr().err


@pytest.mark.parametrize(("stop_in", "status"), [(None, 1), (2, 130)])
def test_metrics_that_cannot_be_written(tmp_path, monkeypatch, capsys, stop_in, status):
    """A run that is done fails; one that is stopped is stopped. The page says so."""
    save = main.Recorder.save

    def block(recorder, state, *arguments, **named):
        if state != "training":
            (recorder.folder / "metrics.json").unlink()
            (recorder.folder / "metrics.json").mkdir()
        save(recorder, state, *arguments, **named)

    watch_training(monkeypatch, stop_in)
    monkeypatch.setattr(main.Recorder, "save", block)
    flags = "--model=fc", "--limit=200", "--epochs=2", "--comet=off"
    assert main.main([*flags, f"--output-dir={tmp_path}"]) == status
    (run_dir,) = tmp_path.glob("*-fc")
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert ('"state": "stopped"' if stop_in else '"state": "failed"') in page
    errors = capsys.readouterr().err
    assert "metrics.json" in errors and "Traceback" not in errors


def test_the_page_is_updated_within_an_epoch(tmp_path, monkeypatch):
    """Every 5 seconds, of a clock that runs 20 times as fast."""
    steps, clock = [], main.time.monotonic
    note = lambda path, values: steps.append(values.get("steps_done"))
    monkeypatch.setattr(main.time, "monotonic", lambda: 20 * clock())
    monkeypatch.setattr(main, "write_page", note)
    run_here(tmp_path, "--limit=6400", "--epochs=1")
    assert set(steps) - {0, 100, None}, steps


def test_a_stop_before_the_checkpoint_is_saved(tmp_path, monkeypatch):
    """metrics.json has as many epochs as checkpoint.pt."""
    save = main.save_tensors

    def stop(values, path):
        if path.name == "checkpoint.pt" and len(values["history"]["train_loss"]) == 2:
            raise KeyboardInterrupt
        save(values, path)

    monkeypatch.setattr(main, "save_tensors", stop)
    run_dir = run_here(tmp_path, "--model=fc", "--limit=200", "--epochs=3", status=130)
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    saved = torch.load(run_dir / "checkpoint.pt")
    assert metrics["state"] == "stopped" and len(metrics["train_loss"]) == 1
    assert metrics["train_loss"] == saved["history"]["train_loss"]
    assert len(metrics["losses"]) == 4


def test_comet_is_ended_when_the_run_cannot_begin(tmp_path, monkeypatch):
    import comet_ml

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "record_program", stop)
    assert main.main([*QUICK, "--comet=offline", f"--output-dir={tmp_path}"]) == 130
    assert comet_ml.get_running_experiment().ended


def test_a_clone_works_in_a_folder_of_any_name(spawn, tmp_path):
    """Percent signs and a wide space (U+3000)."""
    folder = tmp_path / "100% 新\u3000%s"
    folder.mkdir()
    shutil.copy(main.__file__, folder)
    shutil.copytree(main.DATA_DIR, folder / "data")
    run = spawn(folder / "main.py", *QUICK, "--comet=off", target=conftest.be_script)
    assert run.wait() == 0, run.stderr
    assert run.json("config.json")["settings"]["data_dir"] == str(folder / "data")


def test_a_notebook_calls_main_again_and_again(tmp_path, monkeypatch):
    """No exit, no changed signals or streams; what went wrong is a status."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (1, 2, 15)]
    out, err = io.StringIO(), io.StringIO()  # they have no reconfigure
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.main(["--limit", "many"]) == 2
        assert main.main(["--help"]) == 0
        assert main.main([*QUICK, "--comet=off"]) == 0
        for _ in range(2):
            assert main.main(["--predict", "missing.png"]) == 2
        assert (sys.stdout, sys.stderr) == (out, err)
    assert [signal.getsignal(number) for number in (1, 2, 15)] == handlers
    assert "TRAINING COMPLETE" in out.getvalue()
    assert err.getvalue().count("cannot read missing.png") == 2  # said each time


def test_in_a_container_it_has_as_many_threads_as_cores(monkeypatch):
    """It may use one core, and sees more: two threads took 16 times as long."""
    monkeypatch.setattr(Path, "read_text", lambda path: "100000 100000\n")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    main.tune_cpu()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 10**15])
def test_out_of_memory_in_mid_run(tmp_path, monkeypatch, capsys, size):
    """In the second epoch, as on a small GPU, or on the CPU."""

    class Large(main.FullyConnectedModel):
        steps = 0

        def forward(self, x):
            Large.steps += self.training and len(x) == 64
            if Large.steps == 12 and torch.empty(size) is not None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().forward(x)

    monkeypatch.setitem(main.MODELS, "fc", Large)
    run_here(tmp_path, "--model=fc", "--limit=512", "--epochs=3", status=1)
    error = capsys.readouterr().err
    assert "with smaller batches" in error and "Traceback" not in error
    assert "continue with: python main.py --resume" in error
