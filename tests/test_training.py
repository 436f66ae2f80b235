"""Training and evaluation, compared with the plain form of both; the seed."""

import copy
import gc
import signal
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import main


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


@pytest.fixture(scope="module")
def digits(mnist):
    """301 test images as the CNN takes them, and their labels."""
    images, labels = mnist[2][:301], mnist[3][:301]
    return main.prepare(images, main.CNN()), labels


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
        expected = float(F.cross_entropy(model(images), labels))
        halves = model(images[:300]), model(images[300:])
    naive = sum(map(F.cross_entropy, halves, (labels[:300], labels[300:]))) / 2
    assert abs(float(naive) - expected) > 1e-3
    loss, _ = main.evaluate(model, split(images, labels, 300))
    assert loss == pytest.approx(expected, abs=1e-5)


def test_evaluate_finds_the_loss_and_accuracy_of_a_known_model():
    """The images are logits, and the model hands them through: three of five right."""
    logits = 4 * F.one_hot(torch.tensor([1, 2, 3, 4, 5]), 10).float()
    labels = torch.tensor([1, 2, 3, 9, 9])
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    right, wrong = torch.tensor([4.0, 0.0]) - torch.tensor(4.0).exp().add(9).log()
    loss, accuracy = main.evaluate(torch.nn.Identity(), batches)
    assert accuracy == 3 / 5
    assert loss == pytest.approx(-float(3 * right + 2 * wrong) / 5, abs=1e-6)


def test_evaluate_takes_another_loss_function(digits):
    loss, _ = main.evaluate(main.CNN(), [digits], lambda logits, labels: labels.sum())
    assert loss == float(digits[1].sum())


def test_evaluate_returns_plain_numbers(model, digits):
    assert [type(number) for number in main.evaluate(model, [digits])] == [float, float]


def test_evaluate_computes_no_gradients(model, digits):
    seen = []

    def loss_function(logits, labels):
        seen.append(logits.grad_fn)
        return F.cross_entropy(logits, labels)

    main.evaluate(model, [digits], loss_function)
    assert seen == [None]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_puts_the_model_back_into_its_mode(model, digits, training):
    modes = []

    def loss_function(logits, labels):
        modes.append(model.training)
        return F.cross_entropy(logits, labels)

    main.evaluate(model.train(training), [digits], loss_function)
    assert modes == [False]
    assert all(module.training is training for module in model.modules())


def test_evaluate_takes_a_data_loader(model, digits):
    loader = DataLoader(TensorDataset(*digits), batch_size=64)
    expected = main.evaluate(model, [digits])
    assert main.evaluate(model, loader) == pytest.approx(expected, abs=1e-5)


def test_evaluate_refuses_an_empty_data_set(model, digits):
    with pytest.raises(ValueError, match="no images"):
        main.evaluate(model, [])
    assert model.training


# ----- train_epoch


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
        found = main.train_epoch(
            model, batches, F.cross_entropy, optimizer, lambda loss: None
        )
        assert found == pytest.approx(train_plainly(other, batches, plain), abs=1e-6)
    for mine, its in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


def test_train_epoch_trains_in_training_mode(model, digits):
    modes = []
    main.train_epoch(
        model.eval(),
        [digits],
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda loss: modes.append(model.training),
    )
    assert modes == [True]


def test_train_epoch_hands_out_each_steps_loss(model, digits):
    """On the device, and without the graph that led to it."""
    losses = []
    found, _ = main.train_epoch(
        model,
        split(*digits, 43),
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.01),
        losses.append,
    )
    assert len(losses) == 301 / 43
    assert all(torch.is_tensor(x) and not x.requires_grad for x in losses)
    assert float(torch.stack(losses).mean()) == pytest.approx(found, abs=1e-6)


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
    main.train_epoch(
        model,
        split(*digits, 43),
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda loss: events.append("step"),
    )
    assert events[:-2] == ["step"] * 7
    assert set(events[-2:]) <= set(READINGS)


# ----- a whole run, and what the model sees in it


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """shown(seed): what a run of two epochs of 1,000 images does.

    A list: the first weights, the batches that the model is trained on, and between
    them the names in READINGS. shown(seed, 1) is another such run.
    """
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    known = {}

    def run(seed, attempt=0):
        if (seed, attempt) in known:
            return known[seed, attempt]
        events, forward = known.setdefault((seed, attempt), []), main.CNN.forward

        def record(model, x):
            if model.training and len(x) > 2:  # the summary is made with 2
                if not events:
                    events.append(model.fc1.weight.detach().clone())
                events.append(x.flatten(1).clone())
            return forward(model, x)

        def note(name):
            if events:
                events.append(name)

        flags = ["--limit=1000", "--epochs=2", "--batch-size=15", "--comet=off"]
        flags += [f"--seed={seed}", f"--output-dir={tmp_path_factory.mktemp('runs')}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main.CNN, "forward", record)
            watch_readings(patch, note)
            assert main.main(main.read_settings(flags)) == 0
        return events

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def get_epochs(events):
    _, *batches = [event for event in events if torch.is_tensor(event)]
    return batches[:67], batches[67:]


def as_bytes(images):
    return [row.numpy().tobytes() for row in images]


def test_an_epoch_has_67_batches_the_last_one_uneven(shown):
    for epoch in get_epochs(shown(0)):
        assert [len(batch) for batch in epoch] == [15] * 66 + [10]


def test_an_epoch_shows_each_image_once(shown, mnist):
    expected = main.prepare(mnist[0][:1000], main.CNN()).flatten(1)
    for epoch in get_epochs(shown(0)):
        assert Counter(as_bytes(torch.cat(epoch))) == Counter(as_bytes(expected))


def test_every_epoch_has_its_own_order(shown, mnist):
    unshuffled = main.prepare(mnist[0][:15], main.CNN()).flatten(1)
    first, second = (epoch[0] for epoch in get_epochs(shown(0)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, unshuffled)


def test_the_seed_decides_the_order(shown):
    runs = shown(0), shown(0, 1), shown(1)
    one, same, other = (torch.cat(get_epochs(events)[0]) for events in runs)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_seed_decides_the_first_weights(shown):
    one, same, other = (events[0] for events in (shown(0), shown(0, 1), shown(1)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_losses_are_read_now_and_then(shown):
    """A person sees five a second: far fewer than the 67 steps of the first epoch."""
    events = [torch.is_tensor(event) for event in shown(0)]
    end = [i for i, is_batch in enumerate(events) if is_batch][67]
    assert events[:end].count(False) < 67 / 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, [64, 64, 64, 8]),
        (6, [6] * 33 + [2]),  # more batches than are prepared at once
        ([5, 0] * 20 + [100], [5, 0] * 20 + [100]),  # as torchrun's processes may have
    ],
)
def test_images_and_labels_stay_together(mnist, size, expected):
    images, labels = mnist[0][:200], mnist[1][:200]
    order = torch.randperm(200)
    model = main.CNN()
    batches = list(main.make_batches(images, labels, size, order, model))
    assert [(len(x), len(y)) for x, y in batches] == [(n, n) for n in expected]
    prepared = main.prepare(images[order], model)
    assert torch.equal(torch.cat([x for x, _ in batches]), prepared)
    assert torch.equal(torch.cat([y for _, y in batches]), labels[order])


# ----- prepare


def test_prepared_training_images_have_mean_0_and_deviation_1(mnist):
    x = main.prepare(mnist[0], main.FullyConnectedModel())
    assert (x.shape, x.dtype) == ((60_000, 1, 28, 28), torch.float32)
    assert abs(float(x.mean())) < 0.001
    assert abs(float(x.std()) - 1) < 0.001


def test_the_cnn_gets_the_upper_left_part(mnist):
    images = mnist[0][:100]
    whole = main.prepare(images, main.FullyConnectedModel())
    assert torch.equal(main.prepare(images, main.CNN()), whole[:, :, :26, :26])


def test_prepare_leaves_the_images_as_they_are(mnist):
    images = mnist[0][:100]
    before = images.clone()
    main.prepare(images, main.FullyConnectedModel())
    assert torch.equal(images, before)


# ----- the seed


def test_the_seed_decides_the_result(spawn, tmp_path):
    """Weights and metrics of two runs are the same to the bit; another seed's are not."""
    runs = {}
    for name, seed in {"one": 5, "same": 5, "other": 6}.items():
        (tmp_path / name).mkdir()
        runs[name] = spawn(
            *("--limit", 1000, "--epochs", 2, "--batch-size", 48),
            *("--comet", "off", "--seed", seed),
            folder=tmp_path / name,
        )
    weights, metrics = {}, {}
    for name, run in runs.items():
        assert run.wait() == 0, run.stderr
        weights[name] = (run.run_dir / "model.pt").read_bytes()
        metrics[name] = run.json("metrics.json")
        del metrics[name]["epoch_seconds"]
    assert weights["one"] == weights["same"]
    assert metrics["one"] == metrics["same"]
    assert weights["one"] != weights["other"]
    assert all(
        metrics["one"][name] != metrics["other"][name] for name in metrics["one"]
    )


def test_training_collects_garbage_again(tmp_path):
    """main.py, when it is run, switches it off for the imports: a long run needs it."""
    settings = main.read_settings(["--limit=64", "--epochs=1", "--comet=off"])
    gc.disable()
    try:
        run = main.Run(settings, tmp_path)
        tracker = main.Tracker("off", tmp_path)
        run.train(main.Monitor(run.progress["losses"], tmp_path / "c.png", tracker))
        assert gc.isenabled()
    finally:
        gc.enable()
