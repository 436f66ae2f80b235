"""The accurate recipe: what it adds to the run; and what a run says of its mistakes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_here, watch_training

import main

QUICK = "--recipe", "accurate", "--limit", 1000, "--epochs", 2, "--batch-size", 50


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


def normalise(images):
    return (images[:, None] / 255 - 0.1307) / 0.3081


@pytest.fixture(scope="module")
def digits(mnist):
    """200 test digits (200, 1, 28, 28), normalised, and their labels."""
    return normalise(mnist[2][:200]), mnist[3][:200]


@pytest.fixture(scope="module")
def accurate(tmp_path_factory):
    """A small run of the accurate recipe: its folder, and its epochs (watch_training)."""
    with pytest.MonkeyPatch.context() as patch:
        epochs = watch_training(patch)
        return run_here(tmp_path_factory.mktemp("accurate"), *QUICK), epochs


@pytest.fixture(scope="module")
def metrics(accurate):
    return json.loads((accurate[0] / "metrics.json").read_text())


@pytest.fixture(scope="module")
def logits(accurate, mnist):
    """What the run's saved model says of the test digits: the mean of nine views."""
    model = main.CNN()
    model.load_state_dict(torch.load(accurate[0] / "model.pt"))
    model.to(memory_format=torch.channels_last)
    batches = main.make_batches(*mnist[2:], 250)
    return main.evaluate(main.ShiftAverage(model), batches)[2]


# ----- training


def test_the_learning_rate_rises_for_30_percent_of_the_steps_and_falls_to_0(accurate):
    rates = [rate for epoch in accurate[1] for rate in epoch.rates]
    peak = main.ACCURATE["lr"]
    assert len(rates) == 40 and max(rates) == pytest.approx(peak, rel=0.05)
    assert rates[:12] == sorted(rates[:12])
    assert rates[12:] == sorted(rates[12:], reverse=True)
    assert rates[0] < 0.1 * peak and 0 < rates[-1] < 0.1 * peak
    assert rates[5] - rates[4] == pytest.approx(peak / 12)
    assert rates[31] - rates[30] == pytest.approx(-peak / 28)


def test_momentum_weight_decay_and_label_smoothing(accurate):
    group = accurate[1][0].optimizer.param_groups[0]
    kept = {name: group[name] for name in ("momentum", "weight_decay", "nesterov")}
    assert kept == {"momentum": 0.9, "weight_decay": 2e-4, "nesterov": True}
    assert accurate[1][0].loss_function.label_smoothing == main.SMOOTHING > 0


def test_every_image_is_distorted_anew_in_every_epoch(accurate, mnist):
    """And still has its own label: it is most like the image that it came from."""
    plain = normalise(mnist[0][:1000])[..., :26, :26].flatten(1)
    seen = []
    for epoch in accurate[1]:
        images = torch.cat([images for images, _ in epoch.batches]).flatten(1)
        labels = torch.cat([labels for _, labels in epoch.batches])
        assert images.shape == plain.shape
        distances = torch.cdist(images, plain)
        assert distances.min() > 1e-3
        nearest = mnist[1][:1000][distances.argmin(dim=1)]
        assert (nearest == labels).float().mean() > 0.75  # by chance: 0.1
        seen.append(images)
    assert torch.cdist(*seen).min() > 1e-3


def distort(digits, maps):
    """Return the digits as main.augment gives them, in batches of 64."""
    images, labels = digits
    batches = list(main.augment(zip(images.split(64), labels.split(64)), maps))
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    return torch.cat([x for x, _ in batches])


def test_a_shift_of_one_pixel_is_a_shift_of_one_pixel(digits):
    maps = torch.eye(2, 3).repeat(200, 1, 1)
    torch.testing.assert_close(distort(digits, maps), digits[0], rtol=0, atol=1e-4)
    maps[:, 0, 2] = 1 / 14  # x, and half the width is 14 pixels
    found, expected = distort(digits, maps)[..., :-1], digits[0][..., 1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_distortions_stay_within_what_the_constants_allow():
    torch.manual_seed(0)
    maps = main.draw_distortions(20_000).double()
    assert maps.shape == (20_000, 2, 3)
    shifts = 14 * maps[:, :, 2]
    assert main.SHIFT * 0.99 < shifts.abs().max() <= main.SHIFT + 1e-6
    assert shifts.mean().abs() < 0.05
    # The first column is the x axis, rotated and scaled, but not sheared.
    angles = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).rad2deg()
    assert main.ANGLE * 0.99 < angles.abs().max() <= main.ANGLE + 1e-3
    widths = maps[:, :, 0].norm(dim=1)
    assert 1 - main.SCALE - 1e-6 <= widths.min() < 1 < widths.max()
    assert widths.max() <= 1 + main.SCALE + 1e-6
    assert len({tuple(row) for row in maps.flatten(1).tolist()}) == 20_000


def test_a_run_stopped_and_resumed_ends_bit_for_bit_the_same(
    accurate, metrics, tmp_path, capsys
):
    """It is stopped in its second epoch, in the middle of the cycle."""
    with pytest.MonkeyPatch.context() as patch:
        watch_training(patch, stop_in=2)
        stopped = run_here(tmp_path, *QUICK, status=130)
    assert f"--resume {stopped}" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        epochs = watch_training(patch)
        assert run_here(tmp_path, "--resume", stopped) == stopped
    assert [epoch.rates for epoch in epochs] == [accurate[1][1].rates]
    one, other = (torch.load(run / "model.pt") for run in (stopped, accurate[0]))
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = json.loads((stopped / "metrics.json").read_text())
    assert found | {"epoch_seconds": metrics["epoch_seconds"]} == metrics


def test_the_cycle_of_a_run_cannot_be_made_longer(accurate, capsys):
    assert main.main(["--resume", str(accurate[0]), "--epochs", "3"]) == 2
    assert "the run to resume has epochs 2" in capsys.readouterr().err


def test_the_classic_recipe_has_nothing_of_it(tmp_path, monkeypatch):
    """Not even if what only the accurate recipe has is changed."""
    weights = []
    for change in ({}, {"SMOOTHING": 0.5, "SHIFT": 9, "ANGLE": 90}):
        for name, value in change.items():
            assert hasattr(main, name)
            monkeypatch.setattr(main, name, value)
        epochs = watch_training(monkeypatch)
        folder = tmp_path / str(len(weights))
        run_dir = run_here(folder, "--limit", 300, "--epochs", 1, "--model", "fc")
        weights.append((run_dir / "model.pt").read_bytes())
        assert set(epochs[0].rates) == {main.LR}
        assert epochs[0].loss_function.label_smoothing == 0
        assert epochs[0].optimizer.param_groups[0]["weight_decay"] == 0
    assert weights[0] == weights[1]


# ----- the test: the average over nine views


@pytest.mark.parametrize("kind", ["cnn", "fc"])
def test_the_average_is_that_of_nine_shifted_images(digits, kind):
    torch.manual_seed(0)
    model, (images, _) = main.MODELS[kind](), digits
    wide = F.pad(images, [1] * 4, value=float(images.min()))  # black
    views = [
        model(wide[..., down : down + 28, right : right + 28])
        for down in range(3)
        for right in range(3)
    ]
    found = main.ShiftAverage(model)(images)
    torch.testing.assert_close(found, sum(views) / 9, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, views[4], atol=1e-3)


def test_the_test_result_is_that_of_the_average_of_the_saved_model(
    metrics, mnist, logits
):
    right = logits.argmax(dim=1) == mnist[3]
    assert metrics["test_accuracy"] == pytest.approx(
        float(right.float().mean()), abs=2e-4
    )
    loss = float(F.cross_entropy(logits, mnist[3]))  # without label smoothing
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-3)


# ----- what it gets wrong


def naive_calibration_error(probabilities, labels, bins=15):
    """By the definition, image by image."""
    members = [[] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist()):
        confidence = max(row)
        right = row.index(confidence) == label
        members[min(int(confidence * bins), bins - 1)].append((confidence, right))
    gaps = [abs(sum(c for c, _ in m) - sum(r for _, r in m)) for m in members]
    return sum(gaps) / len(labels)


def test_the_calibration_error_is_that_of_the_definition():
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(2000, 10)).softmax(dim=1)
    sure, digits = probabilities.max(dim=1)  # too sure at the top, not enough below
    labels = torch.where(sure < 0.6, digits, torch.randint(0, 10, (2000,)))
    expected = naive_calibration_error(probabilities, labels)
    found = main.calibration_error(probabilities, labels)
    assert found == pytest.approx(expected, abs=1e-5) and expected > 0.1
    sure = F.one_hot(torch.arange(10), 10).float()
    assert main.calibration_error(sure, torch.arange(10)) == 0
    assert main.calibration_error(sure, torch.arange(10).roll(1)) == 1


def test_the_calibration_error_is_in_the_metrics(metrics, mnist, logits):
    expected = naive_calibration_error(logits.softmax(dim=1), mnist[3])
    assert metrics["calibration_error"] == pytest.approx(expected, abs=1e-3)
    assert math.isfinite(expected) and expected > 0.001


def test_the_confusion_matrix_counts_every_test_digit_once(metrics, mnist, logits):
    expected = torch.zeros(10, 10, dtype=torch.long)
    for label, digit in zip(mnist[3].tolist(), logits.argmax(dim=1).tolist()):
        expected[label, digit] += 1
    found = torch.tensor(metrics["confusion_matrix"])
    assert found.sum() == 10_000
    assert (found - expected).abs().sum() <= 4  # a tie or two, by rounding
    assert found.diag().sum() == round(10_000 * metrics["test_accuracy"])
