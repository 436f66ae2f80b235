"""The network is there to be edited: whatever is written trains, resumes and predicts."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, be_script, run_here, watch_training
from test_network import Recurrent, Residual
from torch import nn

import main

QUICK = "--limit", 500, "--epochs", 2, "--lr", 0.05, "--device", "cpu"


class LeNet(nn.Module):
    """Flattens with view(), which needs weights in the usual order; works in place."""

    get_extra_state = lambda self: {"version": 1}
    set_extra_state = lambda self, state: None

    channels_last = True

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x):
        assert x.shape[1:] == (1, 28, 28)
        x *= 0.5
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


def sequential():
    """Batch normalisation and dropout; the last layer takes its size from the data."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    last = nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(*first, *last)


NETWORKS = [LeNet, sequential, Residual, Recurrent]


@pytest.fixture
def edit(monkeypatch):
    """edit(network): have main.py train it as its CNN."""
    return lambda network: monkeypatch.setitem(main.MODELS, "cnn", network)


@pytest.mark.parametrize("network", NETWORKS)
def test_any_network_trains_resumes_and_predicts(edit, tmp_path, capsys, network):
    """Stopped in its second epoch and resumed, it ends as one never stopped."""
    edit(network)
    with pytest.MonkeyPatch.context() as patch:
        epochs = watch_training(patch)
        whole = run_here(tmp_path / "whole", *QUICK)
    assert [len(epoch.batches) for epoch in epochs] == [8, 8]
    assert epochs[0].batches[0][0].shape == (64, 1, 28, 28)  # the whole image
    with pytest.MonkeyPatch.context() as patch:
        watch_training(patch, stop_in=2)
        parts = run_here(tmp_path / "parts", *QUICK, status=130)
    torch.rand(7)  # what another process has drawn by then
    run_here(tmp_path / "parts", "--resume", parts)
    one, other = (torch.load(run / "model.pt") for run in (whole, parts))
    names = one.keys() - {"_extra_state"}
    assert all(torch.equal(one[name], other[name]) for name in names)

    console = capsys.readouterr().out
    count = sum(weights.numel() for weights in main.make_model("cnn").parameters())
    assert f"{count:,}" in console
    assert ("No table of layers: " in console) is (network is Recurrent)
    metrics = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["test_accuracy"] == metrics["test_accuracy_per_epoch"][-1]
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert config["network"] == str(main.make_model("cnn"))
    picture = whole / "sample_prediction.png"
    bare = shutil.copy(whole / "model.pt", tmp_path)  # with no config.json beside it
    for file in (parts / "checkpoint.pt", bare):
        flags = "--checkpoint", file, "--predict", picture
        assert main.main([*map(str, flags), f"--output-dir={tmp_path}"]) == 0
    answers = re.findall(r"sample_prediction.png: (.*)", capsys.readouterr().out)
    assert len(answers) == 2 and answers[0] == answers[1]


def test_weights_are_stored_channels_last_only_if_the_network_allows_it():
    last = {"memory_format": torch.channels_last}
    assert main.make_model("cnn").conv2.weight.is_contiguous(**last)
    for says_so in True, False:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(main.MODELS, "cnn", LeNet)
            patch.setattr(LeNet, "channels_last", says_so)
            assert not main.make_model("cnn").conv2.weight.is_contiguous(**last)


def test_a_third_network_needs_its_class_and_a_line(tmp_path, spawn):
    """--model, --seeds, --resume, --predict, folders and titles follow MODELS."""
    text = (ROOT / "main.py").read_text(encoding="utf-8")
    own = "class Net(FullyConnectedModel):\n    own = True\n\n\nMODELS = {'mine': Net, "
    script = tmp_path / "own" / "main.py"
    script.parent.mkdir()
    script.write_text(text.replace("\nMODELS = {", f"\n{own}"), encoding="utf-8")
    parts = shutil.ignore_patterns("MNIST")
    shutil.copytree(ROOT / "data", tmp_path / "own" / "data", ignore=parts)
    data = f"--data-dir={ROOT / 'data'}", "--comet=off"
    flags = "--model=mine", "--seeds=2", "--limit=200", "--epochs=1", *data
    run = spawn(script, *flags, target=be_script)
    assert run.wait() == 0, run.stderr
    folder = run.run_dir
    assert folder.name.endswith("-mine") and "TRAINING MINE MODEL" in run.stdout
    assert "mine, mean test accuracy: " in run.stdout
    flags = "--resume", folder / "mine-seed-1", "--epochs=2", *data
    resumed = spawn(script, *flags, target=be_script)
    assert resumed.wait() == 0 and "Epoch 2/2" in resumed.stdout, resumed.stderr
    page = (folder / "mine-seed-0" / "report.html").read_text(encoding="utf-8")
    assert '"title": "Net"' in page


def break_forward(change):
    """Return the CNN with another forward."""
    return type("Broken", (main.CNN,), {"forward": change})


def break_layer(**layers):
    """Return the CNN with other layers, each from a function."""

    def init(self):
        main.CNN.__init__(self)
        for name, make in layers.items():
            setattr(self, name, make())

    return type("Broken", (main.CNN,), {"__init__": init})


def add_unequal(self, x):
    return x + self.conv1(x)


add_unequal.__code__ = add_unequal.__code__.replace(co_name="forward")
Eleven = break_layer(fc2=lambda: nn.Linear(128, 11))


def fail_in_training(self, x):
    return self.no_such_layer(x) if self.training else main.CNN.forward(self, x)


BUGS = {  # name: network, Python's last line, the line after it
    "typo": (break_forward(lambda self, x: self.conv3(x)), "Attribute.*conv3", ""),
    "training": (break_forward(fail_in_training), ".*no_such_layer", ""),
    "init": (break_layer(fc2=lambda: nn.Linear(128)), "TypeError: .*out_features", ""),
    "type": (break_forward(lambda self, x: self.conv1(x.double())), "R.*type", ""),
    "one": (break_layer(relu=lambda: nn.BatchNorm1d(128)), "V.* 1 v", ".*one image"),
    "linear": (
        break_layer(conv2=lambda: nn.Conv2d(24, 40, 3)),  # fc1 forgotten
        "RuntimeError: .*2x1000 and 900x128.*",
        r"compare the sizes: input has the shape \(2, 1000\) in Linear\(in_features=900",
    ),
    "sum": (
        break_forward(add_unequal),
        "RuntimeError: .*28.*26.*",
        r"compare the sizes: x has the shape \(2, 1, 28, 28\) in Broken",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_shows_its_line_and_leaves_no_folder(edit, tmp_path, capsys, bug):
    """In a run, and in a study."""
    network, last, hint = BUGS[bug]
    edit(network)
    given = [*map(str, QUICK), "--comet=off", f"--output-dir={tmp_path / 'runs'}"]
    given += ["--limit=65"]  # the second batch has one image
    given += ["--seeds=2"] * (bug == "typo")
    assert main.main(given) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback (most recent call last):") == 1
    after = f"main.py: {hint}.*\n" if hint else ""
    assert re.search(f"\n{last}.*\n{after}$", error), error
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_bug_in_the_loss_or_in_training_shows_its_line(tmp_path, capsys, monkeypatch):
    def wrong(*arguments, **named):
        raise NameError("no such thing")

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", wrong)
    run = [*map(str, QUICK), "--comet=off", f"--output-dir={tmp_path}"]
    assert main.main(run) == 1
    monkeypatch.undo()
    monkeypatch.setattr(main, "train_epoch", wrong)
    assert main.main(run) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback") == 2 == error.count("\nNameError: no such thing\n")
    assert list(tmp_path.iterdir()) == []


RETURNED = [  # network, what it returns
    (Eleven, r"\(2, 11\)"),
    (break_forward(lambda self, x: (main.CNN.forward(self, x), 1)), "a tuple"),
    (break_forward(lambda self, x: main.CNN.forward(self, x)[0]), r"\(10,\)"),
]


@pytest.mark.parametrize(("network", "returned"), RETURNED)
def test_what_is_not_ten_logits_is_told(edit, tmp_path, capsys, network, returned):
    edit(network)
    assert main.main([*map(str, QUICK), f"--output-dir={tmp_path}", "--comet=off"]) == 1
    error = capsys.readouterr().err
    must = r"main.py: \w+.forward must return logits \(N, 10\) for N images; for 2"
    assert re.fullmatch(f"{must} images it returned {returned}\n", error), error
    assert list(tmp_path.iterdir()) == []


def test_the_trial_leaves_no_trace(edit, tmp_path):
    """Random numbers and batch statistics are as if it had not been made."""
    edit(sequential)
    weights = []
    for check in (main.check_model, lambda *arguments: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "check_model", check)
            epochs = watch_training(patch)
            run = run_here(tmp_path / str(len(weights)), *QUICK)
        weights.append(torch.load(run / "model.pt"))
        assert epochs[0].weights["1.num_batches_tracked"] == 0
    one, other = weights
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_fit_a_run_is_told(edit, trained, capsys, monkeypatch):
    """Other layers or numbers; fewer epochs than it has done; a network of old."""
    run_dir, accurate = trained("cnn"), trained("accurate")
    kept = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    wider = break_layer(fc1=lambda: nn.Linear(900, 64), fc2=lambda: nn.Linear(64, 10))
    other = break_layer(relu=nn.Tanh)  # the weights would fit
    predict = ["--checkpoint", run_dir / "model.pt", "--predict=7.png"]
    monkeypatch.setattr(main, "LABEL_SMOOTHING", 0.2)
    for network, flags, problem in (
        (main.CNN, ["--resume", run_dir, "--epochs=1"], "--epochs"),
        (main.CNN, ["--resume", accurate], "label_smoothing 0.05"),
        (main.CNN, ["--resume", accurate, "--epochs=2"], "this run has epochs 1"),
        (wider, ["--resume", run_dir, "--epochs=4"], "out_features=64"),
        (other, ["--resume", run_dir, "--epochs=4"], r"ReLU\(\).*Tanh\(\)"),
        (wider, predict, "size mismatch for fc1.weight"),
        (sequential, predict, 'Missing key.*"0.weight"'),
    ):
        edit(network)
        capsys.readouterr()
        assert main.main([*map(str, flags), "--comet=off"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(problem, error) and "damaged" not in error, error
        assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == kept
    monkeypatch.delitem(main.MODELS, "cnn")
    assert main.main([*map(str, predict)]) == 2
    assert "add it to MODELS" in capsys.readouterr().err
