"""What a run prints, in a pipe and in a terminal, and what it leaves in its folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LINUX, get_folders, make_environment, run_here

import main

RULE = "=" * 70
BAR = re.compile(r" *\d+%\|.*\| \d+/32 \[.*(it/s|s/it).*\] *")
FILES = """loss_curve.png sample_prediction.png single_prediction.png predictions_grid.png
worst_mistakes.png confusion_matrix.png config.json metrics.json report.html
model.pt checkpoint.pt"""


def list_folder(folder):
    return {path.name for path in folder.iterdir()}


def start(folder, **streams):
    """Start `python main.py --limit 2000 --epochs 2` in a folder."""
    command = [sys.executable, main.__file__, "--limit", "2000", "--epochs", "2"]
    environment = make_environment(folder.parent / "home")
    return subprocess.Popen(command, cwd=folder, env=environment, **streams)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a pipe."""
    folder = tmp_path_factory.mktemp("pipe")
    process = start(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (run_dir,) = get_folders(folder / "runs")
    return SimpleNamespace(
        stdout=out.decode(),
        stderr=err.decode(),
        folder=folder,
        run_dir=run_dir,
        metrics=json.loads((run_dir / "metrics.json").read_text()),
        config=json.loads((run_dir / "config.json").read_text()),
    )


def test_the_console_to_the_letter(finished):
    """Title, model, summary, epochs, test results, where they are: as SPEC has it."""
    metrics, folder = finished.metrics, finished.run_dir.relative_to(finished.folder)
    (archive,) = finished.run_dir.glob("*.zip")
    one, two = metrics["train_accuracy"]
    (digit,) = re.findall(r"Single Image Prediction: (\d),", finished.stdout)
    before, rest = finished.stdout.split(f"{RULE}\nTRAINING", 1)
    table, end = rest.split("Epoch 1/2", 1)
    assert table.startswith(f" CNN MODEL\n{RULE}\n{main.CNN()}\n")
    table = re.sub(" +", " ", table)
    for row in ("Conv2d-1 [-1, 24, 26, 26] 240", "MaxPool2d-4 [-1, 36, 5, 5] 0",
                "Linear-6 [-1, 128] 115,328", "Total params: 124,670"):  # fmt: skip
        assert row in table
    expected = f"""\
, Accuracy: {one:.4f}
Epoch 2/2, Accuracy: {two:.4f}
{RULE}
EVALUATING CNN MODEL
{RULE}
Test Accuracy: {metrics["test_accuracy"]:.4f}
Test Loss: {metrics["test_loss"]:.4f}

Single Image Prediction: {digit}, Actual Label: 7
All runs: runs/index.html
{RULE}
TRAINING COMPLETE - results in {folder}; comet upload {folder / archive.name}
{RULE}
"""
    assert end == expected
    assert f"\nDevice: {main.select_device()}\nFolder: {folder}\n" in before
    assert f"\nReport: {folder}/report.html\n" in before
    for name, value in finished.config["settings"].items():
        assert f"{name} {value}" in before.partition("\n")[0]


def test_in_a_pipe_output_is_plain_text_and_bars_are_on_standard_error(finished):
    """A bar counts the steps of each epoch, and ends with the smoothed loss."""
    assert all(c.isprintable() or c == "\n" for c in finished.stdout)
    bars = [piece for piece in re.split("[\r\n]+", finished.stderr) if piece]
    assert bars and all(BAR.fullmatch(bar) for bar in bars)
    smoothed = main.LossHistory(0.95)
    for loss in finished.metrics["losses"]:
        smoothed.append(loss)
    for last in (31, 63):
        shown = f"loss={smoothed.get()[last]:.4f}"
        assert any(" 32/32 " in bar and shown in bar for bar in bars)


@LINUX
def test_a_terminal_shows_the_same_lines_and_full_bars(finished):
    folder = finished.folder.with_name("terminal")
    folder.mkdir()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = start(folder, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while chunk := os.read(master, 4096):
            shown += chunk
    os.close(master)
    assert process.wait(240) == 0, shown
    terminal = shown.decode()
    assert all(c.isprintable() or c in "\r\n" for c in terminal)
    lines = [line.split("\r")[-1] for line in terminal.split("\r\n")]
    text = "\n".join(line for line in lines if not BAR.fullmatch(line))
    elsewhere = re.compile(r"runs/[^ ;\n]+")
    assert elsewhere.sub("RUN", text) == elsewhere.sub("RUN", finished.stdout)
    for epoch in ("Epoch 1/2", "Epoch 2/2"):
        number = next(i for i, line in enumerate(lines) if line.startswith(epoch))
        bar = lines[number - 1]
        assert BAR.fullmatch(bar) and bar.startswith("100%|")


def test_the_folder_has_all_files_and_metrics_what_was_measured(finished):
    """And nothing else is left where the run was started."""
    assert re.fullmatch(r"\d{8}-\d{6}-cnn", finished.run_dir.name)
    (archive,) = finished.run_dir.glob("*.zip")
    assert list_folder(finished.run_dir) == {*FILES.split(), archive.name}
    assert list_folder(finished.folder) == {"runs"}
    metrics = finished.metrics
    for name in ("train_accuracy", "train_loss", "epoch_seconds"):
        assert [type(number) for number in metrics[name]] == [float, float]
    for name in ("test_accuracy", "test_loss", "calibration_error"):
        assert isinstance(metrics[name], float)
    losses = torch.tensor(metrics["losses"]).view(2, 32)
    means = losses @ torch.tensor([64.0] * 31 + [16.0]) / 2000
    assert metrics["train_loss"] == pytest.approx(means.tolist(), abs=1e-5)


def test_config_has_every_setting_version_and_checksum(finished):
    config, names = finished.config, "recipe model epochs batch_size lr optimizer seed"
    names += " seeds limit device data_dir output_dir comet"
    assert set(config["settings"]) == set(names.split())
    assert [config["settings"][name] for name in ("epochs", "limit")] == [2, 2000]
    assert config["device"] == str(main.select_device())
    assert {"torch", "torchvision", "numpy"} <= set(config["versions"])
    for name, number in config["versions"].items():
        assert number.split("+")[0] == version(name)  # 2.6.0+cu124
    assert ".".join(map(str, sys.version_info[:3])) in json.dumps(config)
    raw = Path(main.DATA_DIR, "MNIST", "raw")
    found = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in raw.glob("*.gz")}
    assert config["data_md5"] == found


def test_configs_command_repeats_the_run_exactly_from_a_notebook(finished, tmp_path):
    """main.main([...]) in a process that goes on returns the exit status."""
    python, script, *flags = shlex.split(finished.config["command"])
    assert (python, script) == ("python", "main.py")
    again = run_here(tmp_path / "again", *flags, test_images=10_000)
    one, other = (run / "model.pt" for run in (again, finished.run_dir))
    assert one.read_bytes() == other.read_bytes()
    metrics = json.loads((again / "metrics.json").read_text())
    del metrics["epoch_seconds"]
    assert metrics.items() <= finished.metrics.items()
    assert main.main(["--epochs", "0"]) == 2


def test_a_run_never_takes_the_folder_of_another(tmp_path, monkeypatch):
    """Of one that has started in the same second."""
    monkeypatch.setattr(main.time, "strftime", lambda form: "20260101-000000-")
    folders = [main.make_run_folder(tmp_path, "fc") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


DEVICES = [("", "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("cuda mps", "mps")]
DEVICES += [("broken-cuda", "cpu")]


@pytest.mark.parametrize(("there", "best"), DEVICES)
def test_auto_takes_the_best_device(monkeypatch, capsys, there, best):
    """As if PyTorch had these devices, beside the CPU."""
    ones = torch.ones

    def make(*shape, device):
        if str(device) not in ("cpu", *there.split()):
            raise RuntimeError(f"no {device} here")
        return ones(*shape)

    monkeypatch.setattr(torch, "ones", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int("cuda" in there))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert main.select_device() == torch.device(best)
    assert ("; using the CPU" in capsys.readouterr().err) is (there == "broken-cuda")
    for name in ("cpu", "cuda", "mps"):
        if name in ("cpu", *there.split()):
            assert main.select_device(name) == torch.device(name)
        else:
            with pytest.raises(main.UserError, match=f"--device {name} .* cpu"):
                main.select_device(name)
