"""The accurate recipe: what it adds to the run; and what a run says of its mistakes."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import normalise, run_here, watch_training

import main

QUICK = "--model", "fc", "--limit", 1000, "--epochs", 2, "--batch-size", 50


@pytest.fixture(scope="module")
def digits(mnist):
    """200 test digits (200, 1, 28, 28), normalised, and their labels."""
    return normalise(mnist[2][:200]), mnist[3][:200]


@pytest.fixture(scope="module")
def accurate(tmp_path_factory):
    """A small run of the accurate recipe: its folder, and its epochs (watch_training)."""
    with pytest.MonkeyPatch.context() as patch:
        epochs = watch_training(patch)
        folder = tmp_path_factory.mktemp("accurate")
        flags = "--recipe=accurate", *QUICK
        return run_here(folder, *flags, test_images=10_000), epochs


def test_the_rate_rises_for_30_percent_of_the_steps_and_falls_to_0(accurate):
    rates = [rate for epoch in accurate[1] for rate in epoch.rates]
    peak = main.ACCURATE["lr"]
    assert len(rates) == 40 and max(rates) == pytest.approx(peak, rel=0.05)
    assert rates[:12] == sorted(rates[:12])
    assert rates[12:] == sorted(rates[12:], reverse=True)
    assert rates[0] == pytest.approx(peak * 0.5 / 12)  # in the middle of the step
    assert rates[-1] == pytest.approx(peak * 0.5 / 28)
    assert rates[5] - rates[4] == pytest.approx(peak / 12)
    assert rates[31] - rates[30] == pytest.approx(-peak / 28)
    group = accurate[1][0].optimizer.param_groups[0]
    found = [group[name] for name in ("momentum", "weight_decay", "nesterov")]
    assert found == [0.9, 2e-4, True]
    assert accurate[1][0].loss_function.label_smoothing == main.LABEL_SMOOTHING > 0


def test_every_image_is_distorted_anew_in_every_epoch(accurate, mnist):
    """And still has its own label: it is most like the image that it came from."""
    plain = normalise(mnist[0][:1000]).flatten(1)
    seen = []
    for epoch in accurate[1]:
        images = torch.cat([images for images, _ in epoch.batches]).flatten(1)
        labels = torch.cat([labels for _, labels in epoch.batches])
        assert images.shape == plain.shape
        distances = torch.cdist(images, plain)
        assert distances.min() > 1e-3
        nearest = mnist[1][:1000][distances.argmin(dim=1)]
        assert (nearest == labels).float().mean() > 0.5  # by chance: 0.1
        seen.append(images)
    assert torch.cdist(*seen).min() > 1e-3


def test_distortions_stay_within_what_the_constants_allow():
    torch.manual_seed(0)
    maps = main.make_distortions(20_000).double()
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


def test_the_results_are_those_of_the_saved_model(accurate, mnist):
    """Of the mean of its nine views of each digit."""
    metrics = json.loads((accurate[0] / "metrics.json").read_text())
    model = main.FullyConnectedModel()
    model.load_state_dict(torch.load(accurate[0] / "model.pt"))
    batches = main.make_batches(*mnist[2:], 250)
    logits = main.evaluate(main.ShiftAverage(model), batches)[2]
    labels, digits = mnist[3], logits.argmax(dim=1)
    right = float((digits == labels).float().mean())
    assert metrics["test_accuracy"] == pytest.approx(right, abs=2e-4)
    loss = float(F.cross_entropy(logits, labels))  # without label smoothing
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-3)


def test_beyond_the_border_is_black(digits):
    """By zero padding: PyTorch's border mode is missing on MPS before 2.13."""
    ((found, _),) = main.augment([digits], main.make_distortions(len(digits[0])))
    assert float(found.min()) == pytest.approx(main.BLACK, abs=1e-5)
    assert float(found[..., 0, 0].max()) == pytest.approx(main.BLACK, abs=1e-5)


def test_strokes_become_thicker_or_thinner_by_half(digits):
    image, label = digits[0][:1], digits[1][:1]
    thick, thin = (s * F.max_pool2d(s * image, 3, stride=1, padding=1) for s in (1, -1))
    expected = [image, (image + thick) / 2, (image + thin) / 2]
    counts = [0, 0, 0]
    torch.manual_seed(0)
    for found, _ in main.augment(
        [(image, label)] * 900, torch.eye(2, 3).repeat(900, 1, 1)
    ):
        distances = [float((found - one).abs().max()) for one in expected]
        assert min(distances) < 1e-4
        counts[distances.index(min(distances))] += 1
    assert all(270 < count < 330 for count in counts), counts  # two standard deviations


def test_the_average_is_that_of_nine_shifted_images(digits):
    model, images = main.FullyConnectedModel(), digits[0]
    wide = F.pad(images, [1] * 4, value=float(images.min()))  # black
    views = [wide[..., y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
    expected = sum(model(view) for view in views) / 9
    found = main.ShiftAverage(model)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(images), atol=1e-3)
    main.ShiftAverage(lambda x: x.view(len(x), -1))(images)  # a view() is possible
