"""What a run prints, in a pipe and in a terminal, and what it leaves in its folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here

import main

SCRIPT = Path(main.__file__)
RULE = "=" * 70
BAR = re.compile(r" *\d+%\|.*\| \d+/32 \[.*(it/s|s/it).*\] *")
FILES = {
    *("loss_curve.png", "sample_prediction.png", "single_prediction.png"),
    *("predictions_grid.png", "worst_mistakes.png", "confusion_matrix.png"),
    *("config.json", "metrics.json", "report.html"),
    *("model.pt", "checkpoint.pt"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`python main.py --limit 2000 --epochs 2`, in a pipe and in a terminal."""
    pipe, terminal = tmp_path_factory.mktemp("pipe"), tmp_path_factory.mktemp("tty")
    command = [sys.executable, SCRIPT, "--limit", "2000", "--epochs", "2"]
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("COMET", "PYTHON"))
    }
    environment = kept | {"HOME": str(pipe), "MPLCONFIGDIR": str(pipe)}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with open(pipe / "out", "wb") as out, open(pipe / "err", "wb") as err:
        in_pipe = subprocess.Popen(
            command, cwd=pipe, env=environment, stdout=out, stderr=err
        )
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        in_terminal = subprocess.Popen(
            command, cwd=terminal, env=environment, start_new_session=True, **streams
        )
    os.close(slave)
    shown = b""
    try:
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
            while chunk := os.read(master, 4096):
                shown += chunk
        assert in_pipe.wait(240) == in_terminal.wait(240) == 0, shown
    finally:
        os.close(master)
        in_pipe.kill()
        in_terminal.kill()
    (run_dir,) = (pipe / "runs").iterdir()
    return SimpleNamespace(
        stdout=(pipe / "out").read_bytes().decode(),
        stderr=(pipe / "err").read_bytes().decode(),
        terminal=shown.decode(),
        folder=pipe,
        run_dir=run_dir,
        metrics=json.loads((run_dir / "metrics.json").read_text()),
        config=json.loads((run_dir / "config.json").read_text()),
    )


# ----- the console


def test_training_begins_with_its_title_the_model_and_the_summary(finished):
    lines = finished.stdout.splitlines()
    start = lines.index(RULE)
    assert lines[start : start + 3] == [RULE, "TRAINING CNN MODEL", RULE]
    model = str(main.CNN()).splitlines()
    end = start + 3 + len(model)
    assert lines[start + 3 : end] == model
    epoch = next(i for i, line in enumerate(lines) if line.startswith("Epoch"))
    rows = [
        *("Conv2d-1 [-1, 24, 26, 26] 240", "MaxPool2d-2 [-1, 24, 13, 13] 0"),
        *("Conv2d-3 [-1, 36, 11, 11] 7,812", "MaxPool2d-4 [-1, 36, 5, 5] 0"),
        *("Linear-6 [-1, 128] 115,328", "Linear-8 [-1, 10] 1,290"),
        "Total params: 124,670",
    ]
    table = re.sub(" +", " ", "\n".join(lines[end:epoch]))
    assert all(row in table for row in rows)
    assert "Epoch" not in table and "===" in table


def test_what_follows_the_summary_is_to_the_letter(finished):
    lines = finished.stdout.split("\n")
    expected = [
        r"Epoch 1/2, Accuracy: 0\.\d{4}",
        r"Epoch 2/2, Accuracy: 0\.\d{4}",
        RULE,
        "EVALUATING CNN MODEL",
        RULE,
        r"Test Accuracy: 0\.\d{4}",
        r"Test Loss: \d\.\d{4}",
        "",
        r"Single Image Prediction: \d, Actual Label: 7",
        RULE,
        r"TRAINING COMPLETE - .+",
        RULE,
        "",
    ]
    first = next(i for i, line in enumerate(lines) if line.startswith("Epoch"))
    assert len(lines[first:]) == len(expected)
    for line, pattern in zip(lines[first:], expected):
        assert re.fullmatch(pattern, line)


def test_the_numbers_are_those_of_metrics_json(finished):
    metrics = finished.metrics
    shown = re.findall(r"^Epoch \d/2, Accuracy: (.*)$", finished.stdout, re.MULTILINE)
    assert shown == [f"{accuracy:.4f}" for accuracy in metrics["train_accuracy"]]
    assert f"Test Accuracy: {metrics['test_accuracy']:.4f}\n" in finished.stdout
    assert f"Test Loss: {metrics['test_loss']:.4f}\n" in finished.stdout


def test_settings_device_and_folder_are_told_before_training(finished):
    before = finished.stdout.split(RULE)[0].splitlines()
    folder = finished.run_dir.relative_to(finished.folder)
    assert f"Device: {main.select_device()}" in before
    assert f"Folder: {folder}" in before and f"Report: {folder}/report.html" in before
    (settings,) = (line for line in before if line.startswith("Settings: "))
    for name, value in finished.config["settings"].items():
        assert f"{name} {value}" in settings


def test_the_last_line_says_where_the_results_are(finished):
    (line,) = re.findall("^TRAINING COMPLETE - .*$", finished.stdout, re.MULTILINE)
    assert str(finished.run_dir.relative_to(finished.folder)) in line
    (archive,) = finished.run_dir.glob("*.zip")
    assert line.endswith(f"comet upload {archive.relative_to(finished.folder)}")


def test_in_a_pipe_the_output_is_plain_text_and_only_the_bars_are_errors(finished):
    assert all(c.isprintable() or c == "\n" for c in finished.stdout)
    pieces = [piece for piece in re.split("[\r\n]+", finished.stderr) if piece]
    assert pieces
    for piece in pieces:
        assert BAR.fullmatch(piece)


def test_a_bar_counts_the_steps_of_each_epoch_and_has_the_smoothed_loss(finished):
    smoothed = main.LossHistory(0.95)
    for loss in finished.metrics["losses"]:
        smoothed.append(loss)
    bars = [bar for bar in re.split("[\r\n]+", finished.stderr) if "100%" in bar]
    for last in (31, 63):
        shown = f"loss={smoothed.get()[last]:.4f}"
        assert any("32/32" in bar and shown in bar for bar in bars)


def test_a_terminal_shows_the_same_lines(finished):
    assert all(c.isprintable() or c in "\r\n" for c in finished.terminal)
    lines = [line.split("\r")[-1] for line in finished.terminal.split("\r\n")]
    text = "\n".join(line for line in lines if not BAR.fullmatch(line))
    elsewhere = re.compile(r"runs/[^ ;\n]+")
    assert elsewhere.sub("RUN", text) == elsewhere.sub("RUN", finished.stdout)


def test_a_terminal_shows_each_full_bar_right_before_its_epochs_line(finished):
    lines = [line.split("\r")[-1] for line in finished.terminal.split("\r\n")]
    for epoch in ("Epoch 1/2", "Epoch 2/2"):
        number = next(i for i, line in enumerate(lines) if line.startswith(epoch))
        assert BAR.fullmatch(lines[number - 1])
        assert lines[number - 1].startswith("100%|")


def test_in_a_pipe_an_epochs_line_is_there_when_the_epoch_is_done(spawn):
    run = spawn("--model", "fc", "--limit", 6000, "--epochs", 1000, "--comet", "off")
    run.wait_for(lambda: "Epoch 2/1000, Accuracy: " in run.stdout)
    assert run.stdout.count("Accuracy: ") < 20  # not all that a buffer holds


# ----- the run's folder


def test_the_folder_is_named_by_time_and_model(finished):
    assert re.fullmatch(r"\d{8}-\d{6}-cnn", finished.run_dir.name)
    made = time.mktime(time.strptime(finished.run_dir.name[:15], "%Y%m%d-%H%M%S"))
    assert 0 <= time.time() - made < 600


def test_the_folder_has_the_listed_files_and_nothing_else_is_left(finished):
    (archive,) = finished.run_dir.glob("*.zip")
    found = {path.name for path in finished.run_dir.iterdir()}
    assert found == FILES | {archive.name}
    shared = {"out", "err", "runs"}
    caches = {".config", ".cache", ".comet"}  # a library's, in the home folder
    left = {path.name for path in finished.folder.iterdir()} - shared - caches
    assert not [name for name in left if not name.startswith("fontlist")]


def test_metrics_json_has_what_was_measured(finished):
    metrics = finished.metrics
    for name in ("train_accuracy", "train_loss", "epoch_seconds"):
        assert len(metrics[name]) == 2
        assert all(isinstance(number, float) for number in metrics[name])
    for name in ("test_accuracy", "test_loss", "calibration_error"):
        assert isinstance(metrics[name], float)
    assert len(metrics["losses"]) == 2 * 32
    sizes = [64] * 31 + [16]
    for epoch in (0, 1):
        losses = metrics["losses"][32 * epoch : 32 * (epoch + 1)]
        mean = sum(loss * size for loss, size in zip(losses, sizes)) / 2000
        assert metrics["train_loss"][epoch] == pytest.approx(mean, abs=1e-5)


def test_model_pt_has_the_weights_that_gave_the_results(finished):
    """A state dict of tensors, for whole images normalised as SPEC says."""
    weights = torch.load(finished.run_dir / "model.pt", weights_only=True)
    model = main.CNN()
    model.load_state_dict(weights)
    assert all(weight.is_contiguous() for weight in weights.values())
    images, labels = main.load_mnist(main.DATA_DIR)[2:]
    images = ((images[:, None] / 255 - 0.1307) / 0.3081).split(250)
    loss, accuracy, logits = main.evaluate(model, zip(images, labels.split(250)))
    assert finished.metrics["test_accuracy"] == pytest.approx(accuracy, abs=2e-4)
    assert finished.metrics["test_loss"] == pytest.approx(loss, abs=1e-4)
    assert f"Single Image Prediction: {int(logits[0].argmax())}," in finished.stdout


def test_config_has_every_setting_version_and_checksum(finished):
    assert finished.config["settings"] == {
        "recipe": "classic",
        "model": "cnn",
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.01,
        "optimizer": "sgd",
        "seed": 0,
        "seeds": 1,
        "limit": 2000,
        "device": "auto",
        "data_dir": main.DATA_DIR,
        "output_dir": "runs",
        "comet": "auto",
        "compare": False,
    }
    assert finished.config["device"] == str(main.select_device())
    versions = finished.config["versions"]
    assert {"torch", "torchvision", "numpy"} <= set(versions)
    for name, number in versions.items():
        assert number == version(name)
    assert ".".join(map(str, sys.version_info[:3])) in json.dumps(finished.config)
    raw = Path(main.DATA_DIR, "MNIST", "raw")
    found = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in raw.glob("*.gz")}
    assert finished.config["data_md5"] == found


def test_configs_command_repeats_the_run_exactly_from_a_notebook(finished, tmp_path):
    """main.main([...]) in a process that goes on returns the exit status."""
    python, script, *flags = shlex.split(finished.config["command"])
    assert (python, script) == ("python", "main.py")
    again = run_here(tmp_path / "again", *flags)
    one, other = (run / "model.pt" for run in (again, finished.run_dir))
    assert one.read_bytes() == other.read_bytes()
    metrics = json.loads((again / "metrics.json").read_text())
    for name in ("losses", "train_accuracy", "test_accuracy", "test_loss"):
        assert metrics[name] == finished.metrics[name]
    assert main.main(["--epochs", "0"]) == 2
    assert main.main(["--resume", str(tmp_path / "nothing")]) == 2


def test_a_run_never_takes_the_folder_of_another(spawn, tmp_path):
    """The names that this second and the next ones give are taken already."""
    now = time.time()
    taken = {
        time.strftime("%Y%m%d-%H%M%S-fc", time.localtime(now + second))
        for second in range(-1, 60)
    }
    for name in taken:
        (tmp_path / "runs" / name).mkdir(parents=True)
    flags = "--model", "fc", "--limit", 100, "--epochs", 1, "--comet", "off"
    runs = [spawn(*flags), spawn(*flags)]
    for run in runs:
        assert run.wait() == 0, run.stderr
    new = [f for f in (tmp_path / "runs").iterdir() if f.name not in taken]
    assert len(new) == 2
    for folder in new:
        assert {path.name for path in folder.iterdir()} == FILES
        assert any(folder.name.startswith(name + "-") for name in taken)
    assert not any(list((tmp_path / "runs" / name).iterdir()) for name in taken)


def test_constants_edited_in_the_file_do_what_the_flags_do(run_script, tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    constants = {
        "MODEL": "fc", "EPOCHS": 1, "BATCH_SIZE": 100, "LR": 0.002, "OPTIMIZER": "adam",
        "SEED": 3, "LIMIT": 300, "DEVICE": "cpu", "DATA_DIR": main.DATA_DIR,
        "OUTPUT_DIR": "elsewhere", "COMET": "off",
    }  # fmt: skip
    for name, value in constants.items():
        text, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
        assert found == 1
    (tmp_path / "main.py").write_text(text, encoding="utf-8")
    (tmp_path / "data").mkdir()
    shutil.copy(SCRIPT.parent / "data" / "report.html", tmp_path / "data")
    done = run_script(script="main.py")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "elsewhere").iterdir()
    assert {path.name for path in run_dir.iterdir()} == FILES
    assert "TRAINING FC MODEL" in done.stdout
    settings = json.loads((run_dir / "config.json").read_text())["settings"]
    expected = {name.lower(): value for name, value in constants.items()}
    assert expected.items() <= settings.items()
    assert len(json.loads((run_dir / "metrics.json").read_text())["losses"]) == 3


# ----- the device


@pytest.fixture
def devices(monkeypatch):
    """devices(name, ...): have PyTorch find these, beside the CPU, and take tensors."""

    def find(*names):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)
        ones = torch.ones

        def make(*shape, device="cpu"):
            if device != "cpu" and device not in names:
                raise RuntimeError(f"no {device} here")
            return ones(*shape)

        monkeypatch.setattr(torch, "ones", make)
        monkeypatch.setattr(torch, "zeros", make)

    return find


@pytest.mark.parametrize(
    ("there", "best"),
    [((), "cpu"), (("cuda",), "cuda"), (("mps",), "mps"), (("cuda", "mps"), "mps")],
)
def test_auto_takes_the_best_device_and_a_flag_any_that_is_there(devices, there, best):
    devices(*there)
    assert main.select_device() == main.select_device("auto") == torch.device(best)
    for name in ("cpu", "cuda", "mps"):
        if name in ("cpu", *there):
            assert main.select_device(name) == torch.device(name)
        else:
            with pytest.raises(main.UserError, match=f"{name} .*--device cpu") as error:
                main.select_device(name)
            assert error.value.status == 2
