"""Training and evaluation, compared with the plain form of both; the seed."""

import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import run_here, watch_training
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import main

QUICK = "--limit", 1000, "--epochs", 2, "--batch-size", 15


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


def normalise(images):
    return (images[:, None] / 255 - 0.1307) / 0.3081


@pytest.fixture(scope="module")
def digits(mnist):
    """301 test images as the CNN takes them, and their labels."""
    return normalise(mnist[2][:301]), mnist[3][:301]


def split(images, labels, size):
    return list(zip(images.split(size), labels.split(size)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return main.CNN()


# ----- evaluate


def test_evaluate_weighs_every_image_the_same(model, digits):
    """The last batch has one image: the mean of the batches' means is another number."""
    images, labels = digits
    with torch.no_grad():
        logits = model(images)
    expected = float(F.cross_entropy(logits, labels))
    parts = zip(logits.split(300), labels.split(300))
    naive = sum(float(F.cross_entropy(*part)) for part in parts) / 2
    assert abs(naive - expected) > 1e-3
    loss, accuracy, found = main.evaluate(model, split(images, labels, 300))
    assert [type(loss), type(accuracy)] == [float, float]
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_evaluate_finds_the_loss_and_accuracy_of_a_known_model():
    """The images are logits, and the model hands them through: three of five right."""
    logits = 4 * F.one_hot(torch.tensor([1, 2, 3, 4, 5]), 10).float()
    labels = torch.tensor([1, 2, 3, 9, 9])
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    right, wrong = torch.tensor([4.0, 0.0]) - torch.tensor(4.0).exp().add(9).log()
    loss, accuracy, found = main.evaluate(torch.nn.Identity(), batches)
    assert accuracy == 3 / 5
    assert loss == pytest.approx(-float(3 * right + 2 * wrong) / 5, abs=1e-6)
    assert torch.equal(found, logits)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_uses_no_gradients_and_puts_the_mode_back(model, digits, training):
    """And it takes another loss function."""
    seen = []

    def loss_function(logits, labels):
        seen.append((logits.grad_fn, model.training))
        return labels.float().mean()

    model.train(training)
    loss, *_ = main.evaluate(model, split(*digits, 200), loss_function)
    assert loss == pytest.approx(float(digits[1].float().mean()))
    assert seen == [(None, False)] * 2
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training is training for module in model.modules())


def test_evaluate_takes_a_data_loader(model, digits):
    loader = DataLoader(TensorDataset(*digits), batch_size=64)
    expected = main.evaluate(model, [digits])
    assert main.evaluate(model, loader)[:2] == pytest.approx(expected[:2], abs=1e-5)


def test_evaluate_refuses_an_empty_data_set(model):
    with pytest.raises(ValueError, match="no images"):
        main.evaluate(model, [])
    assert model.training


# ----- train_epoch


def train(model, batches, optimizer, on_step=lambda loss: None, factor=None):
    """Call main.train_epoch, with a constant learning rate if there is no factor."""
    scheduler = LambdaLR(optimizer, factor or (lambda step: 1))
    loss_function = F.cross_entropy
    return main.train_epoch(
        model, batches, loss_function, optimizer, scheduler, on_step
    )


def train_plainly(model, batches, optimizer):
    """The textbook's loop: return (mean loss, accuracy) over the images."""
    losses, right = [], 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        losses += [loss.item()] * len(labels)
        right += sum(int(row.argmax()) == int(y) for row, y in zip(logits, labels))
    return sum(losses) / len(losses), right / len(losses)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_train_epoch_is_the_textbooks_loop(model, digits, kind):
    """Batches of 100, 100, 100 and 1 image, twice."""
    batches = split(*digits, 100)
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 1]
    other = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=0.01)
    plain = kind(other.parameters(), lr=0.01)
    for _ in range(2):
        expected = train_plainly(other, batches, plain)
        assert train(model, batches, optimizer) == pytest.approx(expected, abs=1e-6)
    for mine, its in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


def test_train_epoch_hands_out_each_steps_loss(model, digits):
    """In training mode; the loss without the graph that led to it."""
    losses, modes = [], []

    def on_step(loss):
        losses.append(loss)
        modes.append(model.training)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss, _ = train(model.eval(), split(*digits, 43), optimizer, on_step)
    assert modes == [True] * (301 // 43)
    assert all(torch.is_tensor(x) and not x.requires_grad for x in losses)
    assert float(torch.stack(losses).mean()) == pytest.approx(loss, abs=1e-6)


def test_train_epoch_steps_the_schedule_once_a_step(model, digits):
    optimizer, rates = torch.optim.SGD(model.parameters(), lr=0.1), []

    def on_step(loss):
        rates.append(optimizer.param_groups[0]["lr"])

    train(model, split(*digits, 43), optimizer, on_step, lambda step: 1 / (1 + step))
    assert rates == pytest.approx([0.1 / (2 + step) for step in range(7)])


READINGS = "item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"


def watch_readings(monkeypatch, note):
    """Have note(name) called when a number is read out of a tensor: that waits for it."""

    def watch(name, original):
        def read(self, *arguments):
            note(name)
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READINGS:
        watch(name, getattr(torch.Tensor, name))


def test_no_step_waits_for_the_device(model, digits, monkeypatch):
    """All that is read of 7 steps are the two sums, when the steps are done."""
    events = []
    watch_readings(monkeypatch, events.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, split(*digits, 43), optimizer, lambda loss: events.append("step"))
    assert events[:-2] == ["step"] * 7
    assert set(events[-2:]) <= set(READINGS)


# ----- whole runs of two epochs of 1,000 images, and what the model sees in them


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: seed 5, 5 again, and 6. See watch_training.

    Each one's folder, its epochs, and at which of an epoch's steps numbers were read.
    """

    def run(name, seed):
        readings = []
        with pytest.MonkeyPatch.context() as patch:
            epochs = watch_training(patch)
            watch_readings(
                patch, lambda name: epochs and readings.append(len(epochs[-1].rates))
            )
            folder = tmp_path_factory.mktemp(name)
            run_dir = run_here(folder, *QUICK, "--seed", seed)
        torch.rand(7)  # what else this process draws is of no matter
        return run_dir, epochs, readings

    return run("one", 5), run("same", 5), run("other", 6)


def get_images(epoch):
    return torch.cat([images for images, _ in epoch.batches])


def get_rows(images):
    return [row.numpy().tobytes() for row in images.flatten(1)]


def test_an_epoch_has_67_batches_the_last_one_uneven(runs):
    epochs = runs[0][1]
    assert len(epochs) == 2
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch.batches] == [15] * 66 + [10]
        assert set(epoch.rates) == {0.01}


def test_an_epoch_shows_each_image_once_with_its_label(runs, mnist):
    """What the CNN looks at of it: 26 rows and columns."""
    images = normalise(mnist[0][:1000])[..., :26, :26]
    expected = Counter(zip(get_rows(images), mnist[1][:1000].tolist()))
    for epoch in runs[0][1]:
        labels = torch.cat([labels for _, labels in epoch.batches]).tolist()
        assert Counter(zip(get_rows(get_images(epoch)), labels)) == expected


def test_every_epoch_has_its_own_order(runs, mnist):
    first, second = (get_images(epoch) for epoch in runs[0][1])
    unshuffled = normalise(mnist[0][:1000])[..., :26, :26]
    for one, other in ((first, second), (first, unshuffled), (second, unshuffled)):
        assert (one != other).flatten(1).any(dim=1).float().mean() > 0.9


def test_the_seed_decides_order_and_weights_to_the_bit(runs):
    one, same, other = (epochs[0] for _, epochs, _ in runs)
    assert torch.equal(get_images(one), get_images(same))
    assert not torch.equal(get_images(one), get_images(other))
    for name, weights in one.weights.items():
        assert torch.equal(weights, same.weights[name])
        assert not torch.equal(weights, other.weights[name])


def test_the_seed_decides_the_result_to_the_bit(runs):
    one, same, other = ((run / "model.pt").read_bytes() for run, *_ in runs)
    assert one == same != other


def test_numbers_are_read_now_and_then(runs):
    """A person sees five a second: far fewer than the 67 steps of each epoch."""
    steps = [step for step in runs[0][2] if 0 < step < 67]
    assert len(steps) < 67


# ----- the loop of a run


@pytest.mark.parametrize(
    ("model", "optimizer", "lr"), [("cnn", "adam", 0.002), ("fc", "sgd", 0.05)]
)
def test_customised_training_is_the_textbooks(tmp_path, mnist, model, optimizer, lr):
    """A batch of all images leaves no order to choose: a plain loop tells the losses."""
    flags = ["--model", model, "--optimizer", optimizer, "--lr", lr, "--device", "cpu"]
    flags += ["--epochs", 3, "--batch-size", 500, "--limit", 500, "--seed", 4]
    run_dir = run_here(tmp_path, *flags)
    torch.manual_seed(4)
    network = {"cnn": main.CNN, "fc": main.FullyConnectedModel}[model]()
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    plain = kind(network.parameters(), lr=lr)
    batches = [(normalise(mnist[0][:500]), mnist[1][:500])]
    losses = [train_plainly(network, batches, plain)[0] for _ in range(3)]
    assert max(losses) - min(losses) > 0.05
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["losses"] == pytest.approx(losses, abs=2e-3)
    assert metrics["train_loss"] == pytest.approx(losses, abs=2e-3)
    assert run_dir.name.endswith("-" + model)
