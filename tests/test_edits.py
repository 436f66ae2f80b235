"""The classes are there to be edited: what follows such an edit, and what is said of it."""

import re

import pytest
import torch
from conftest import run_here, watch_training
from torch import nn

import main

QUICK = "--limit", 500, "--epochs", 2, "--lr", 0.05, "--device", "cpu"


def edited(**layers):
    """Return the CNN with other layers, as a class; each from a function."""

    class Edited(main.CNN):
        def __init__(self):
            super().__init__()
            for name, make in layers.items():
                setattr(self, name, make())

    return Edited


Other = edited(  # convolutions that see the border: they need all 28x28 pixels
    conv1=lambda: nn.Conv2d(1, 24, kernel_size=3, padding=1),
    conv2=lambda: nn.Conv2d(24, 36, kernel_size=3, padding=1),
    fc1=lambda: nn.Linear(36 * 7 * 7, 128),
    # batch normalisation, with its count of batches, and dropout
    pool1=lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(24)),
    flatten=lambda: nn.Sequential(nn.Flatten(), nn.Dropout()),
)
Wider = edited(conv2=lambda: nn.Conv2d(24, 40, kernel_size=3))  # fc1 forgotten
Flat = edited(flatten=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm2d(900)))
Eleven = edited(fc2=lambda: nn.Linear(128, 11))  # one class too many


class Deep(nn.Module):
    """The border matters in the fifth decimal of its logits, as long as it is untrained."""

    def __init__(self):
        super().__init__()
        layers = []
        for channels in [1] + 8 * [32]:
            layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(("network", "size"), [(main.CNN, 26), (Other, 28), (Deep, 28)])
def test_images_are_cropped_only_if_the_logits_stay_the_same(network, size):
    assert [main.choose_size(network()) for _ in range(3)] == [size] * 3


@pytest.fixture
def edit(monkeypatch):
    """edit(network): have main.py train it as its CNN."""

    def put(network):
        monkeypatch.setitem(main.MODELS, "cnn", network)
        monkeypatch.setattr(main, "CNN", network)

    return put


def test_an_edited_network_trains_resumes_and_predicts(
    edit, monkeypatch, tmp_path, capsys
):
    """Stopped in its second epoch and resumed, it ends as one never stopped."""
    edit(Other)
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
    assert list(one) == list(Other().state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)
    picture = whole / "sample_prediction.png"
    flags = "--checkpoint", parts / "checkpoint.pt", "--predict", picture
    assert main.main([*map(str, flags), f"--output-dir={tmp_path}"]) == 0
    assert f"{picture}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "problem"),
    [(Wider, "2x1000 and 900x128"), (Flat, "4D"), (Eleven, "10 logits")],
)
def test_layers_that_do_not_fit_are_told(edit, tmp_path, capsys, network, problem):
    edit(network)
    flags = *map(str, QUICK), "--comet=off", f"--output-dir={tmp_path}"
    assert main.main(list(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ") and error.count("\n") == 1
    assert re.search(problem, error), error
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_a_run_is_told_and_changes_nothing(edit, trained, capsys):
    """Other layers; fewer epochs than it has done."""
    run_dir = trained("cnn")
    kept = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    for network, flags, problem in (
        (main.CNN, ["--resume", run_dir, "--epochs=1"], "--epochs"),
        (Other, ["--resume", run_dir, "--epochs=4"], "fc1.weight"),
        (
            Other,
            ["--checkpoint", run_dir / "model.pt", "--predict=7.png"],
            "fc1.weight",
        ),
    ):
        edit(network)
        capsys.readouterr()
        assert main.main([*map(str, flags), "--comet=off"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and problem in error
        assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == kept
