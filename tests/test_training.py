"""Networks, training and evaluation, compared with the plain form of each; the seed."""

import copy
import itertools
import json
import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import normalise, run_here, watch_training
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import main

PRINTED = """\
CNN(
  (conv1): Conv2d(1, 24, kernel_size=(3, 3), stride=(1, 1))
  (pool1): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
  (conv2): Conv2d(24, 36, kernel_size=(3, 3), stride=(1, 1))
  (pool2): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
  (flatten): Flatten(start_dim=1, end_dim=-1)
  (fc1): Linear(in_features=900, out_features=128, bias=True)
  (relu): ReLU()
  (fc2): Linear(in_features=128, out_features=10, bias=True)
)"""


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


def plain_cnn(model, x):
    """The documented form: convolution, ReLU, max-pool; twice; two linear layers."""
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias)), 2)
    return plain_fc(model, x)


def plain_fc(model, x):
    x = F.relu(F.linear(x.flatten(1), model.fc1.weight, model.fc1.bias))
    return F.linear(x, model.fc2.weight, model.fc2.bias)


def test_cnn_prints_as_documented():
    assert str(main.CNN()) == PRINTED


def check(model, plain, images, labels):
    """Logits and all gradients are the same, up to float32 rounding."""
    found = []
    for function in (model, lambda x: plain(model, x)):
        model.zero_grad()
        logits = function(images)
        F.cross_entropy(logits, labels).backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in found[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cnn_is_the_documented_computation(model, digits, layout):
    check(model.to(memory_format=layout), plain_cnn, *digits)


def test_fully_connected_model_is_the_documented_computation(digits):
    check(main.FullyConnectedModel(), plain_fc, *digits)


def test_evaluate_weighs_every_image_the_same(model, digits):
    """The last batch has one image: the mean of the batches' means is another number."""
    images, labels = digits
    with torch.no_grad():
        logits = model(images)
    expected = float(F.cross_entropy(logits, labels))
    parts = zip(logits.split(300), labels.split(300))
    naive = sum(float(F.cross_entropy(*part)) for part in parts) / 2
    assert abs(naive - expected) > 1e-3
    loader = DataLoader(TensorDataset(images, labels), batch_size=300)
    loss, accuracy, found = main.evaluate(model, loader)
    assert [type(loss), type(accuracy)] == [float, float]
    assert loss == pytest.approx(expected, abs=1e-5)
    assert accuracy == int((logits.argmax(dim=1) == labels).sum()) / 301
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


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
    """Batches of 100, 100, 100 and 1 image, twice. It hands out each step's loss."""
    batches, losses = split(*digits, 100), []
    other = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=0.01)
    plain = kind(other.parameters(), lr=0.01)
    scheduler = LambdaLR(optimizer, lambda step: 1)

    def on_step(loss):
        assert model.training and not loss.requires_grad
        losses.append(loss * [100, 100, 100, 1][len(losses) % 4])

    for _ in range(2):
        expected = train_plainly(other, batches, plain)
        more = F.cross_entropy, optimizer, scheduler, on_step
        found = main.train_epoch(model.eval(), batches, *more)
        assert found == pytest.approx(expected, abs=1e-6)
        assert float(sum(losses[-4:])) / 301 == pytest.approx(found[0], abs=1e-6)
    assert len(losses) == 8
    for mine, its in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The epochs (see watch_training) and model.pt of three runs: seeds 5, 5, 6."""
    runs, flags = [], ["--limit", 400, "--epochs", 2, "--batch-size", 15]
    for seed in (5, 5, 6):
        with pytest.MonkeyPatch.context() as patch:
            epochs = watch_training(patch)
            run_dir = run_here(tmp_path_factory.mktemp("run"), *flags, "--seed", seed)
        runs.append((epochs, (run_dir / "model.pt").read_bytes()))
        torch.rand(7)  # what else this process draws is of no matter
    return runs


def get_pairs(epoch):
    """Return the images, as bytes, and labels of an epoch, in order."""
    images, labels = (torch.cat(parts) for parts in zip(*epoch.batches))
    return [(x.numpy().tobytes(), int(y)) for x, y in zip(images, labels)]


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(runs, mnist):
    """The whole image; the last batch has the rest."""
    images = normalise(mnist[0][:400])
    expected = [(x.numpy().tobytes(), int(y)) for x, y in zip(images, mnist[1])]
    orders = [expected]
    assert len(runs[0][0]) == 2
    for epoch in runs[0][0]:
        assert [len(labels) for _, labels in epoch.batches] == [15] * 26 + [10]
        assert set(epoch.rates) == {0.01}
        orders.append(get_pairs(epoch))
        assert Counter(orders[-1]) == Counter(expected)
    for one, other in itertools.combinations(orders, 2):
        assert sum(map(operator.eq, one, other)) < 40


def test_the_seed_decides_order_weights_and_result_to_the_bit(runs):
    one, same, other = (epochs[0] for epochs, _ in runs)
    assert get_pairs(one) == get_pairs(same) != get_pairs(other)
    assert torch.equal(one.weights["fc1.weight"], same.weights["fc1.weight"])
    assert not torch.equal(one.weights["fc1.weight"], other.weights["fc1.weight"])
    one, same, other = (weights for _, weights in runs)
    assert one == same != other


@pytest.mark.parametrize(
    ("model", "optimizer", "lr"), [("cnn", "adam", 0.002), ("fc", "sgd", 0.05)]
)
def test_customised_training_is_the_textbooks(tmp_path, mnist, model, optimizer, lr):
    """A batch of all images leaves no order to choose: a plain loop tells the losses."""
    flags = ["--model", model, "--optimizer", optimizer, "--lr", lr, "--seed", 4]
    flags += ["--epochs", 3, "--batch-size", 500, "--limit", 500]
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
    assert run_dir.name.endswith("-" + model)
