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
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Run, become, run_here

import main

SCRIPT = Path(main.__file__)
RULE = "=" * 70
BAR = re.compile(r" *\d+%\|.*\| \d+/32 \[.*(it/s|s/it).*\] *")
FILES = """
loss_curve.png sample_prediction.png single_prediction.png predictions_grid.png
worst_mistakes.png confusion_matrix.png config.json metrics.json report.html
model.pt checkpoint.pt"""


def list_folder(folder):
    return {path.name for path in folder.iterdir()}


def be_in_terminal(arguments, folder, out, environment):
    """Be main.py in the terminal that the first argument names."""
    become(folder, out, environment)
    terminal = os.open(arguments[0], os.O_RDWR)
    os.write(1, b"here")
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.exit(main.main(arguments[1:]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`python main.py --limit 2000 --epochs 2`, in a pipe and in a terminal."""
    pipe, terminal = tmp_path_factory.mktemp("pipe"), tmp_path_factory.mktemp("tty")
    command = [sys.executable, SCRIPT, "--limit", "2000", "--epochs", "2"]
    kept = {name: os.environ[name] for name in os.environ if "COMET" not in name}
    kept |= {"HOME": str(pipe), "MPLCONFIGDIR": str(terminal)}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with open(pipe / "out", "wb") as out, open(pipe / "err", "wb") as err:
        one = subprocess.Popen(command, cwd=pipe, env=kept, stdout=out, stderr=err)
    arguments = [os.ttyname(slave), *command[2:]]
    other = Run(arguments, terminal, kept, be_in_terminal)
    other.wait_for(lambda: other.stdout == "here")
    os.close(slave)
    shown = b""
    try:
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
            while chunk := os.read(master, 4096):
                shown += chunk
        assert one.wait(240) == other.wait(240) == 0, shown
    finally:
        os.close(master)
        one.kill()
        other.process.kill()
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


def test_a_terminal_shows_the_same_lines_and_each_full_bar_before_its_epochs(finished):
    assert all(c.isprintable() or c in "\r\n" for c in finished.terminal)
    lines = [line.split("\r")[-1] for line in finished.terminal.split("\r\n")]
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
    caches = {".config", ".cache", ".comet"}  # a library's, in the home folder
    assert list_folder(finished.folder) - caches == {"out", "err", "runs"}
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
        assert number == version(name)
    assert ".".join(map(str, sys.version_info[:3])) in json.dumps(config)
    raw = Path(main.DATA_DIR, "MNIST", "raw")
    found = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in raw.glob("*.gz")}
    assert config["data_md5"] == found


def test_configs_command_repeats_the_run_exactly_from_a_notebook(finished, tmp_path):
    """main.main([...]) in a process that goes on returns the exit status."""
    python, script, *flags = shlex.split(finished.config["command"])
    assert (python, script) == ("python", "main.py")
    again = run_here(tmp_path / "again", *flags)
    one, other = (run / "model.pt" for run in (again, finished.run_dir))
    assert one.read_bytes() == other.read_bytes()
    metrics = json.loads((again / "metrics.json").read_text())
    del metrics["epoch_seconds"]
    assert metrics.items() <= finished.metrics.items()
    assert main.main(["--epochs", "0"]) == 2


def test_a_run_never_takes_the_folder_of_another(spawn, tmp_path):
    """The names that this second and the next ones give are taken already."""
    times = [time.localtime(time.time() + second) for second in range(-1, 60)]
    taken = {time.strftime("%Y%m%d-%H%M%S-fc", each) for each in times}
    for name in taken:
        (tmp_path / "runs" / name).mkdir(parents=True)
    flags = "--model", "fc", "--limit", 100, "--epochs", 1, "--comet", "off"
    for run in [spawn(*flags), spawn(*flags)]:
        assert run.wait() == 0, run.stderr
    new = [f for f in (tmp_path / "runs").iterdir() if f.name not in taken]
    assert [list_folder(folder) for folder in new] == [set(FILES.split())] * 2
    assert not any(list_folder(tmp_path / "runs" / name) for name in taken)


@pytest.mark.parametrize(
    ("there", "best"),
    [("", "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("cuda mps", "mps")],
)
def test_auto_takes_the_best_device_and_a_flag_any_there(monkeypatch, there, best):
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
    assert main.select_device() == main.select_device("auto") == torch.device(best)
    for name in ("cpu", "cuda", "mps"):
        if name in ("cpu", *there.split()):
            assert main.select_device(name) == torch.device(name)
        else:
            with pytest.raises(main.UserError, match=f"--device {name}: .* cpu"):
                main.select_device(name)
