"""The classes are there to be edited: what follows such an edit, and what is said of it."""

import shutil

import pytest
import torch
from torch import nn

import main


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


class Eleven(main.CNN):
    """One class too many."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(128, 11)


def make_run(monkeypatch, folder, network, epochs, resume=None):
    """Return a trained main.Run of an edited CNN, on 500 digits."""
    monkeypatch.setitem(main.MODELS, "cnn", network)
    folder.mkdir(exist_ok=True)
    flags = ["--limit=500", f"--epochs={epochs}", "--lr=0.05", "--device=cpu"]
    settings = main.read_settings(flags) | {"resume": resume}
    run = main.Run(settings, folder)
    tracker = main.Tracker("off", folder)
    run.comet_key = tracker.key
    run.train(main.Monitor(run.progress["losses"], folder / "curve.png", tracker))
    return run


@pytest.mark.parametrize(
    ("network", "seen"),
    [(main.CNN, 26), (main.FullyConnectedModel, 28), (Padded, 28), (Deeper, 26)],
)
def test_a_network_is_fed_what_it_needs(network, seen):
    model = main.check_layers(network())
    assert model.seen == seen
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    assert model(main.prepare(images, model)).shape == (3, 10)


@pytest.mark.parametrize(
    ("network", "problem"),
    [(Wider, "fit[?] .*2x1000 and 900x128"), (Eleven, "but \\(11,\\)")],
)
def test_layers_that_do_not_fit_are_told(monkeypatch, tmp_path, network, problem):
    with pytest.raises(
        main.InputError, match=f"^{network.__name__} makes no .*28x28.*{problem}"
    ):
        make_run(monkeypatch, tmp_path, network, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", [Padded, Deeper])
def test_an_edited_network_goes_on_and_reads(monkeypatch, tmp_path, network):
    """A run stopped after its first epoch, and resumed, ends as one never stopped."""
    whole = make_run(monkeypatch, tmp_path / "whole", network, 2)
    make_run(monkeypatch, tmp_path / "parts", network, 1)
    torch.rand(7)  # what another process has drawn by then
    parts = make_run(monkeypatch, tmp_path / "parts", network, 2, tmp_path / "parts")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name
    predictor, _ = main.load_predictor(tmp_path / "parts" / "checkpoint.pt")
    images = whole.test_images[:100]
    logits = predictor(main.prepare(images, predictor))
    torch.testing.assert_close(logits, whole.predict(100), rtol=1e-4, atol=1e-4)


def test_a_run_of_other_layers_is_told(monkeypatch, tmp_path):
    make_run(monkeypatch, tmp_path, main.CNN, 1)
    with pytest.raises(main.InputError, match="checkpoint.pt is not .*other layers"):
        make_run(monkeypatch, tmp_path, Padded, 2, tmp_path)
    with pytest.raises(main.InputError, match="checkpoint.pt is no .*other layers"):
        main.load_predictor(tmp_path / "checkpoint.pt")


def test_no_epoch_is_taken_back(monkeypatch, tmp_path):
    make_run(monkeypatch, tmp_path, main.CNN, 2)
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(main.InputError, match="^--epochs 1: the run .* has done 2$"):
        make_run(monkeypatch, tmp_path, main.CNN, 1, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == kept


def test_a_constant_and_a_layer_edited_in_the_file(tmp_path, run_script):
    """Edited as a user would edit it, and run to its end."""
    source = main.Path(main.__file__)
    text = source.read_text(encoding="utf-8")
    for old, new in (
        ("EPOCHS = 7", "EPOCHS = 1"),
        ("nn.Conv2d(24, 36, kernel_size=3)", "nn.Conv2d(24, 32, kernel_size=3)"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "main.py").write_text(text, encoding="utf-8")
    shutil.copy(source.with_name("report.html"), tmp_path)
    flags = "--limit", 300, "--comet", "off", "--data-dir", main.DATA_DIR
    run = run_script(*flags, script=tmp_path / "main.py")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "do its layers fit?" in run.stderr
    assert list(tmp_path.glob("runs/*")) == []
    text = text.replace("nn.Linear(36 * 5 * 5, 128)", "nn.Linear(32 * 5 * 5, 128)")
    (tmp_path / "main.py").write_text(text, encoding="utf-8")
    run = run_script(*flags, script=tmp_path / "main.py")
    assert run.returncode == 0, run.stderr
    assert "Epoch 1/1" in run.stdout and "Conv2d(24, 32," in run.stdout
