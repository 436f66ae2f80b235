"""The classes are there to be edited: what follows such an edit, and what is said of it."""

import re
import shutil

import pytest
import torch
from conftest import run_here, watch_training
from torch import nn

import main

QUICK = "--limit", 500, "--epochs", 2, "--lr", 0.05, "--device", "cpu"


class Padded(main.CNN):
    """Convolutions that see the border: they need all 28x28 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(24, 36, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(36 * 7 * 7, 128)


class Deeper(main.CNN):
    """Batch normalisation, with its count of batches, and dropout."""

    def __init__(self):
        super().__init__()
        self.pool1 = nn.Sequential(self.pool1, nn.BatchNorm2d(24))
        self.flatten = nn.Sequential(self.flatten, nn.Dropout())


class Wider(main.CNN):
    """More filters, and the first linear layer forgotten."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(24, 40, kernel_size=3)


class Normalised(main.CNN):
    """Batch normalisation for images, where there are none any more."""

    def __init__(self):
        super().__init__()
        self.relu = nn.Sequential(nn.BatchNorm2d(128), self.relu)


class Eleven(main.CNN):
    """One class too many."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(128, 11)


@pytest.fixture
def edit(monkeypatch):
    """edit(network): have main.py train it as its CNN."""
    return lambda network: monkeypatch.setitem(main.MODELS, "cnn", network)


@pytest.mark.parametrize("network", [Padded, Deeper])
def test_an_edited_network_trains_resumes_and_predicts(
    edit, monkeypatch, tmp_path, capsys, network
):
    """Stopped in its second epoch and resumed, it ends as one never stopped."""
    edit(network)
    with monkeypatch.context() as patch:
        epochs = watch_training(patch)
        whole = run_here(tmp_path / "whole", *QUICK)
    assert len(epochs) == 2
    assert epochs[0].batches[0][0].shape == (64, 1, 28, 28)
    with monkeypatch.context() as patch:
        watch_training(patch, stop_in=2)
        parts = run_here(tmp_path / "parts", *QUICK, status=130)
    torch.rand(7)  # what another process has drawn by then
    run_here(tmp_path / "parts", "--resume", parts)
    one, other = (torch.load(run / "model.pt") for run in (whole, parts))
    assert list(one) == list(network().state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    picture = whole / "sample_prediction.png"
    flags = "--checkpoint", parts / "checkpoint.pt", "--predict", picture
    assert main.main([*map(str, flags), f"--output-dir={tmp_path}"]) == 0
    assert f"{picture}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "problem"),
    [(Wider, "2x1000 and 900x128"), (Normalised, "4D"), (Eleven, "10 logits .*11")],
)
def test_layers_that_do_not_fit_are_told(edit, tmp_path, capsys, network, problem):
    edit(network)
    flags = *map(str, QUICK), "--comet=off", f"--output-dir={tmp_path}"
    assert main.main(list(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ") and error.count("\n") == 1
    assert re.search(problem, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_layers_is_told(edit, tmp_path, capsys):
    run_dir = run_here(tmp_path, *QUICK)
    kept = (run_dir / "config.json").read_bytes()
    edit(Padded)
    capsys.readouterr()
    for flags in (
        ["--resume", str(run_dir), "--epochs=3"],
        ["--checkpoint", str(run_dir / "model.pt"), "--predict", "digit.png"],
    ):
        assert main.main([*flags, "--comet=off", f"--output-dir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "fc1.weight" in error
    assert (run_dir / "config.json").read_bytes() == kept


def test_no_epoch_is_taken_back(tmp_path, capsys):
    run_dir = run_here(tmp_path, *QUICK)
    kept = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    capsys.readouterr()
    assert main.main(["--resume", str(run_dir), "--epochs=1"]) == 2
    error = capsys.readouterr().err
    assert "--epochs" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == kept


def test_a_layer_edited_in_the_file(tmp_path, run_script):
    """Edited as a user would edit it: the first linear layer forgotten, then right."""
    text = main.Path(main.__file__).read_text(encoding="utf-8")
    shutil.copytree(main.TEMPLATE.parent, tmp_path / "data")
    for old, new, status in (
        ("nn.Conv2d(24, 36, kernel_size=3)", "nn.Conv2d(24, 32, kernel_size=3)", 2),
        ("nn.Linear(36 * 5 * 5, 128)", "nn.Linear(32 * 5 * 5, 128)", 0),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
        (tmp_path / "main.py").write_text(text, encoding="utf-8")
        flags = "--limit", 300, "--epochs", 1, "--comet", "off"
        run = run_script(*flags, script=tmp_path / "main.py")
        assert run.returncode == status, run.stderr
        if status:
            assert run.stderr.count("\n") == 1 and "800" in run.stderr
            assert list(tmp_path.glob("runs/*")) == []
    assert "Epoch 1/1" in run.stdout and "Conv2d(24, 32," in run.stdout
