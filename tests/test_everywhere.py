"""It works where people run it: folders, notebooks, streams, GPUs, other people's files.

Situations from public bug reports. More of them: other data under MNIST's names
(test_data.py), SIGHUP, nohup and drives without fsync (test_reliability.py), no Comet
(test_comet.py).
"""

import contextlib
import io
import json
import os
import pstats
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest
import torch
from PIL import Image, ImageDraw, features

import main

QUICK = "--model", "fc", "--limit", "512", "--epochs", "1", "--comet", "off"
OFFLINE = *QUICK[:-1], "offline"
FILES = {"checkpoint.pt", "config.json", "metrics.json", "model.pt", "report.html"}
FILES |= {"loss_curve.png", "predictions_grid.png", "worst_mistakes.png"}


def be_in(arguments, folder, out, environment):
    """Be main.py in the situation, a function of this file, that comes first."""
    conftest.become(folder, out, environment)
    situation, *arguments = arguments
    status = globals()[situation](*arguments)
    sys.exit(main.main(arguments) if status is None else status)


@pytest.fixture
def start(spawn):
    """start(situation, *arguments): main.py in a situation, as a process of its own."""
    return lambda situation, *arguments, **more: spawn(
        situation.__name__, *arguments, target=be_in, **more
    )


def messages(run):
    return [line for line in run.stderr.splitlines() if "main.py:" in line]


def assert_trained(run):
    assert run.wait() == 0, run.stderr
    assert {file.name for file in run.run_dir.iterdir()} >= FILES


def assert_one_line(run, status, *words):
    """Check the exit status, and that one line with these words says why."""
    assert run.wait() == status, run.stderr
    (line,) = messages(run)
    assert all(word in line for word in words), line
    assert len(line) < 500
    assert "Traceback" not in run.stderr


# ----- Folders and programs that start scripts


def be_script(*arguments):
    """Be started as IPython's %run, IDLE and runpy do: not imported, but run."""
    runpy.run_path(sys.argv[0], run_name="__main__")


def be_help_and_run(script, *arguments):
    sys.stdout = open(1, "w", encoding="ascii")  # noqa: SIM115
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        be_script()
    sys.argv = [script, *arguments]
    be_script()


def be_profiled(script, *arguments):
    sys.argv = ["cProfile", "-o", "profile", script, *arguments]
    runpy.run_module("cProfile", run_name="__main__", alter_sys=True)
    return 0  # it swallows the script's exit


@pytest.mark.parametrize("name", [b"100% \xe6\x96\xb0\xe3\x80\x80%s", b"\xff%(x)s"])
def test_a_clone_works_in_a_folder_of_any_name(start, tmp_path, name):
    """Percent signs, a wide space (U+3000), no UTF-8; and a console without Unicode."""
    folder = os.path.join(tmp_path, os.fsdecode(name))
    os.makedirs(folder)
    shutil.copy(main.__file__, folder)
    shutil.copytree(main.DATA_DIR, os.path.join(folder, "data"))
    run = start(be_help_and_run, os.path.join(folder, "main.py"), *OFFLINE)
    assert_trained(run)
    data = run.json("config.json")["settings"]["data_dir"]
    assert os.fsencode(data) == os.path.join(os.fsencode(folder), b"data")
    assert "(default: cnn)" in run.stdout and "TRAINING COMPLETE" in run.stdout


def test_a_profiler_gets_its_output(start):
    run = start(be_profiled, main.__file__, *QUICK)
    assert_trained(run)
    profile = pstats.Stats(str(run.folder / "profile"))
    assert "train_epoch" in {function for _, _, function in profile.stats}


def test_a_notebook_calls_main_again_and_again(tmp_path, monkeypatch):
    """No exit, no changed signals or streams; what went wrong is a status."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (1, 2, 15)]
    out, err = io.StringIO(), io.StringIO()  # they have no reconfigure
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.main(["--predict", "missing.png", "--output-dir", "x"]) == 2
        assert main.main(["--limit", "many"]) == 2
        assert main.main(["--help"]) == 0
        assert main.main(QUICK) == 0
        assert main.main(["--predict", "missing.png"]) == 2
        assert main.main(["--predict", "missing.png"]) == 2
        assert (sys.stdout, sys.stderr) == (out, err)
    assert [signal.getsignal(number) for number in (1, 2, 15)] == handlers
    assert "TRAINING COMPLETE" in out.getvalue()
    assert err.getvalue().count("cannot read missing.png") == 2  # said each time


def be_in_a_container(*arguments):
    """May use one core, and see more of them: two threads took 16 times as long."""
    read_text = Path.read_text

    def read(path, *more, **named):
        if path == Path("/sys/fs/cgroup/cpu.max"):
            return "100000 100000\n"
        return read_text(path, *more, **named)

    Path.read_text = read
    torch.set_num_threads(2)
    assert main.main(list(arguments)) == 0
    return 10 + torch.get_num_threads()


def test_in_a_container_it_has_as_many_threads_as_cores(start):
    assert start(be_in_a_container, *QUICK).wait() == 11


def be_started_by_cron(*arguments):
    """Have no variables, no temporary folder, and a clock that is set back."""
    os.environ.clear()
    os.environ["TMPDIR"] = "/proc"
    hours, now = iter(range(10**9)), time.time()
    time.time = lambda: now - 3600 * next(hours)
    time.strftime = lambda *arguments: "20260101-000000-"


def test_two_jobs_of_cron_at_once(start):
    runs = [start(be_started_by_cron, *OFFLINE) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].stderr
    one, other = (runs[0].folder / "runs").iterdir()
    assert len(list(one.iterdir())) == len(list(other.iterdir())) > len(FILES)


# ----- Streams


def close_output(*arguments):
    os.close(1)
    sys.stdout = None  # as Python has it after >&-, and under pythonw


def close_both(*arguments):
    close_output()
    os.close(2)
    sys.stderr = None


@pytest.mark.parametrize("situation", [close_output, close_both])
def test_with_closed_streams_it_trains_silently(start, situation):
    run = start(situation, *OFFLINE)
    assert_trained(run)
    assert list(run.run_dir.glob("*.zip"))
    assert "Traceback" not in run.stderr
    assert not run.stdout


def pipe_into_head(*arguments):
    """Be followed by `| head -1`, a thread that reads one line and then no more."""
    read, write = os.pipe()

    def be_head():
        with open(read) as file:
            file.readline()

    threading.Thread(target=be_head).start()
    os.dup2(write, 1)
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115


def test_piped_into_head_it_ends_quietly_or_trains_on(start):
    run = start(pipe_into_head, *OFFLINE)
    assert run.wait() == 0 or not messages(run)
    assert "Traceback" not in run.stderr


# ----- Devices


def have_broken_gpu(*arguments):
    """PyTorch sees a GPU that it cannot use: the error is its own."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1


def test_a_gpu_that_does_not_work(start):
    run = start(have_broken_gpu, *QUICK)
    assert_trained(run)
    (line,) = messages(run)
    assert "cuda" in line and "CPU" in line
    assert "Device: cpu" in run.stdout
    asked = start(have_broken_gpu, *QUICK, "--device", "cuda", "--output-dir", "none")
    assert_one_line(asked, 1, "--device cuda", "cpu")
    assert not list(run.folder.glob("none/*"))


@pytest.mark.parametrize("name", ["cuda:77", "xla", "hpu", "no such thing"])
def test_a_device_that_is_not_there(spawn, name):
    run = spawn(*QUICK, "--device", name)
    assert_one_line(run, 1 if torch.cuda.is_available() else 2, name)


def fill_memory(*arguments):
    """In the second epoch there is no memory left, as on a small GPU."""

    class Large(main.FullyConnectedModel):
        steps = 0

        def forward(self, x):
            Large.steps += self.training and len(x) == 64
            if Large.steps == 12:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().forward(x)

    main.MODELS["fc"] = Large


def test_out_of_memory_in_mid_run(start, spawn):
    run = start(fill_memory, *OFFLINE, "--epochs", "3", "--output-dir", "my runs")
    assert run.wait() == 1
    assert "Traceback" not in run.stderr
    assert "--batch-size, or use --device cpu" in run.stderr
    # The resume line and the upload line can be pasted into a shell.
    *_, flag, folder = shlex.split(messages(run)[-1])
    run = spawn(flag, folder)
    assert run.wait() == 0, run.stderr
    history = json.loads((run.folder / folder / "metrics.json").read_text())
    assert len(history["train_loss"]) == 3
    words = shlex.split(run.stdout.splitlines()[-2].partition("; ")[2])
    assert words[:2] == ["comet", "upload"]
    assert (run.folder / words[-1]).exists()


def be_second_of_two(*arguments):
    """Be a process of torchrun for which there is no GPU: there is one, for two."""
    have_broken_gpu()
    sys.argv = [main.__file__, *arguments]
    be_script()


def test_torchrun_with_more_processes_than_gpus(start):
    """One process stands for the second of two: alone, so that it need not wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    team = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    team |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    run = start(be_second_of_two, *QUICK, "--device", "cuda", **team)
    assert_one_line(run, 1, "GPUs: 1", "processes: 2")
    run = start(be_second_of_two, *QUICK, "--output-dir", "cpu", **team)
    assert run.wait() == 0, run.stderr
    assert "Device: cpu" in run.stdout


# ----- Files that cannot be written


def lock_pictures(*arguments):
    def replace(source, target, real=os.replace):
        if str(target).endswith((".png", ".html")):
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    os.replace = replace


def test_a_picture_that_a_viewer_locks_does_not_end_the_run(start):
    run = start(lock_pictures, *OFFLINE)
    assert run.wait() == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert "loss_curve.png" in run.stderr and "report" in run.stderr
    assert (run.run_dir / "model.pt").exists()


def test_a_locked_picture_is_tried_again(tmp_path, monkeypatch, capsys):
    plotter = main.PeriodicPlotter(0, path=tmp_path / "curve.png")
    with monkeypatch.context() as locked:
        locked.setattr(os, "replace", os.replace)  # put back at the end
        lock_pictures()
        plotter.plot([3, 2])
    assert "curve.png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    plotter.plot([3, 2, 1])
    assert (tmp_path / "curve.png").exists()


def have_little_disk(*arguments):
    """No file may be longer than 100 kB: a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_one_line(start):
    run = start(have_little_disk, *QUICK)
    assert run.wait() == 1
    assert "Traceback" not in run.stderr
    assert "File too large" in run.stderr
    assert not list(run.run_dir.glob("*.pt*"))


# ----- Pictures of all kinds, under names of all kinds


def draw_seven(path, form):
    image = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(image).line([(60, 50), (140, 50), (100, 150)], 0, 14)
    image.save(path, format=form)


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures, and with other files beside them."""
    folder = tmp_path / "more"
    (folder / "empty").mkdir(parents=True)
    bad = os.path.join(folder, os.fsdecode(b"bad\xff.png"))
    names = {"数字7.png": "PNG", bad: "PNG", "UPPER.JPG": "JPEG", "a [1].webp": "WEBP"}
    if features.check("avif"):  # since Pillow 11.3
        names["new.avif"] = "AVIF"
    for name, form in names.items():
        draw_seven(folder / name, form)
    (folder / "notes.txt").write_text("no picture")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4\n%%EOF")
    return folder


def answers(text):
    """Return the lines that have an answer for a picture."""
    return [line for line in text.splitlines() if ": " in line and "%" in line]


@pytest.mark.usefixtures("pictures")
def test_folders_and_patterns_of_pictures(spawn, trained):
    model = "--checkpoint", trained("cnn") / "model.pt"
    run = spawn("--predict", "more", *model)
    assert run.wait() == 0, run.stderr
    assert len(answers(run.stdout)) == 4 + features.check("avif")
    run = spawn("--predict", "more/*.png", "more/a [1].webp", *model)
    assert run.wait() == 0, run.stderr
    assert len(answers(run.stdout)) == 3
    for nothing in ("more/*.gif", "more/empty", "more/paper.pdf"):
        assert_one_line(spawn("--predict", nothing, *model), 2, nothing)


@pytest.mark.usefixtures("pictures")
def test_names_that_the_console_cannot_show(tmp_path, environment, trained):
    """A real process: LC_ALL=C decides how Python decodes the names themselves."""
    model = "--checkpoint", trained("cnn") / "model.pt"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    names = "more/数字7.png", os.fsdecode(b"more/bad\xff.png"), "more/missing数.png"
    command = [sys.executable, main.__file__, "--predict", *names, *model]
    how = {"cwd": tmp_path, "env": environment | plain, "encoding": "utf-8"}
    run = subprocess.run(command, capture_output=True, check=False, timeout=300, **how)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert len(answers(run.stdout)) == 2
    assert "7.png: 7" in run.stdout and "bad" in run.stdout
    assert "cannot read more/missing" in run.stderr


def have_no_heif(*arguments):
    sys.modules["pillow_heif"] = None


def test_pictures_of_phones_and_pdf(start, trained, tmp_path):
    """Without pillow-heif, the line on a HEIC says what to do."""
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" * 9)
    model = "--checkpoint", trained("cnn") / "model.pt"
    run = start(have_no_heif, "--predict", "a.heic", *model)
    assert_one_line(run, 2, "a.heic", "JPEG", "pip install pillow-heif")


# ----- Models of other scripts


def test_resume_takes_the_checkpoint_for_its_folder(spawn, trained, tmp_path):
    folder = shutil.copytree(trained("fc"), tmp_path / "run")
    # As in test_checkpoints.py: read and saved again, it is sound.
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["kept"]["comet_key"] = 32 * "k"  # --comet off does not forget it
    torch.save(saved, folder / "checkpoint.pt")
    more = "--epochs", "4", "--device", "cpu:0"  # PyTorch takes it, as it does cuda:1
    run = spawn("--resume", folder / "checkpoint.pt", *more)
    assert run.wait() == 0, run.stderr
    assert "Device: cpu:0" in run.stdout
    assert "Epoch 4/4" in run.stdout
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["kept"]["comet_key"] == 32 * "k"


def test_models_of_other_scripts(spawn, trained, tmp_path):
    """One line that names the difference, for --checkpoint and for --resume."""
    other = main.CNN()
    other.fc2 = torch.nn.Linear(128, 11)
    draw_seven(tmp_path / "7.png", "PNG")
    foreign = {
        "fc2.weight": other.state_dict(),  # as ours, but with 11 classes
        "list": [1, 2, 3],
    }
    folder = shutil.copytree(trained("cnn"), tmp_path / "run")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    for word, state in foreign.items():
        torch.save(state, tmp_path / "other.pt")
        run = spawn("--predict", "7.png", "--checkpoint", "other.pt")
        assert_one_line(run, 2, "other.pt", word)
    torch.save(checkpoint | {"model": other.state_dict()}, folder / "checkpoint.pt")
    run = spawn("--resume", folder, "--epochs", "4")
    assert_one_line(run, 2, "checkpoint.pt", "fc2.weight")
