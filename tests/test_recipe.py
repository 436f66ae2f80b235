"""The accurate recipe: what it adds to the loop; and what a run says of its mistakes."""

import copy
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from offline import Archive

import main

QUICK = ["--limit", 1000, "--epochs", 2, "--comet", "off"]


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


@pytest.fixture(scope="module")
def digits(mnist):
    """200 test digits (200, 1, 28, 28), normalised, and their labels."""
    return main.prepare(mnist[2][:200], main.FullyConnectedModel()), mnist[3][:200]


def complete(folder, *flags):
    """Run main.py to its end, in a folder; return the Run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    run = Run(list(map(str, flags)), folder, environment | {"HOME": str(folder)})
    assert run.wait() == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def accurate(tmp_path_factory):
    """A small run of the accurate recipe, with its archive."""
    folder = tmp_path_factory.mktemp("accurate")
    flags = "--recipe", "accurate", *QUICK[:4], "--comet", "offline"
    return complete(folder, *flags)


@pytest.fixture(scope="module")
def logits(accurate, mnist):
    """What the run's saved model says of the test digits, nine views of each: (N, 10)."""
    model = main.CNN()
    model.load_state_dict(torch.load(accurate.run_dir / "model.pt"))
    average, wide = main.ShiftAverage(model), main.FullyConnectedModel()
    with torch.no_grad():
        parts = (average(main.prepare(part, wide)) for part in mnist[2].split(100))
        return torch.cat(list(parts))


# ----- what a recipe sets


def test_the_classic_recipe_is_the_constants():
    settings = main.read_settings([])
    assert settings["recipe"] == "classic"
    assert [settings[name] for name in ("epochs", "batch_size", "lr")] == [7, 64, 0.01]


def test_a_recipe_sets_the_training_constants_and_a_flag_beside_it_wins():
    settings = main.read_settings(["--recipe", "accurate"])
    expected = main.RECIPES["accurate"]
    assert expected["lr"] != main.LR
    assert {name: settings[name] for name in expected} == expected
    settings = main.read_settings(["--lr", "0.03", "--recipe", "accurate"])
    assert {name: settings[name] for name in expected} == expected | {"lr": 0.03}


# ----- the learning rate


def rates(steps, peak=0.4):
    """The learning rate that each batch is trained with."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=123.0)
    batches = main.one_cycle(range(len(steps)), steps, optimizer, peak)
    return [optimizer.param_groups[0]["lr"] for _ in batches]


def test_the_learning_rate_rises_for_30_percent_of_the_steps_and_falls_to_0():
    found = rates(range(1000))
    assert max(found) == pytest.approx(0.4, rel=0.01)
    assert found[:300] == sorted(found[:300])
    assert found[300:] == sorted(found[300:], reverse=True)
    assert found[0] < 0.002 and 0 < found[-1] < 0.001
    assert found[11] - found[10] == pytest.approx(0.4 / 300)
    assert found[501] - found[500] == pytest.approx(-0.4 / 700)


def test_a_resumed_run_goes_on_in_the_middle_of_the_cycle():
    assert rates(range(600, 1000)) == rates(range(1000))[600:]


# ----- the warps


def warped(images, labels, maps, size=28):
    batches = zip(images.split(64), labels.split(64))
    return list(main.warp(batches, maps.split(64), size))


def test_a_map_that_changes_nothing_gives_the_middle_of_the_image(digits):
    images, labels = digits
    same = torch.eye(2, 3).expand(len(images), 2, 3)
    for size, cut in ((28, images), (26, images[..., 1:-1, 1:-1])):
        batches = warped(images, labels, same, size)
        assert torch.equal(torch.cat([y for _, y in batches]), labels)
        found = torch.cat([x for x, _ in batches])
        torch.testing.assert_close(found, cut, rtol=0, atol=1e-4)


def test_a_shift_of_one_pixel_is_a_shift_of_one_pixel(digits):
    images, labels = digits
    maps = torch.eye(2, 3).repeat(len(images), 1, 1)
    maps[:, 0, 2] = 1 / 14  # x, and half the width is 14 pixels
    found = torch.cat([x for x, _ in warped(images, labels, maps)])
    expected = images[..., 1:]
    torch.testing.assert_close(found[..., :-1], expected, rtol=0, atol=1e-4)


def test_maps_stay_within_what_the_constants_allow():
    maps = main.draw_warps(20_000, torch.Generator().manual_seed(0)).double()
    assert maps.shape == (20_000, 2, 3)
    shifts = 14 * maps[:, :, 2]
    assert main.SHIFT * 0.99 < shifts.abs().max() <= main.SHIFT + 1e-6
    assert shifts.mean().abs() < 0.05
    # The first column is the x axis, turned and stretched, but not sheared.
    angles = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).rad2deg()
    assert main.TURN * 0.99 < angles.abs().max() <= main.TURN + 1e-3
    widths = maps[:, :, 0].norm(dim=1)
    assert 1 - main.STRETCH - 1e-6 <= widths.min() < 1 < widths.max()
    assert widths.max() <= 1 + main.STRETCH + 1e-6


def test_maps_come_from_the_generator_and_differ():
    draws = [main.draw_warps(50, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len({tuple(row.flatten().tolist()) for row in draws[0]}) == 50


def test_a_warped_digit_is_still_that_digit(mnist):
    """A network that never saw a warped digit reads most of them."""
    torch.manual_seed(0)
    model = main.CNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    images, labels = mnist[0], mnist[1]
    order = torch.arange(20_000)
    batches = main.make_batches(images, labels, 64, order, model)
    main.train_epoch(model, batches, F.cross_entropy, optimizer, lambda loss: None)
    whole = main.prepare(mnist[2][:1000], main.FullyConnectedModel())
    maps = main.draw_warps(1000, torch.Generator().manual_seed(0))
    plain = torch.eye(2, 3).expand(1000, 2, 3)
    found = [
        main.evaluate(model, warped(whole, mnist[3][:1000], chosen, 26))[1]
        for chosen in (plain, maps)
    ]
    assert found[0] > 0.85 and found[1] > found[0] - 0.15, found


# ----- the average over nine views


@pytest.mark.parametrize("kind", ["cnn", "fc"])
def test_the_average_is_that_of_nine_shifted_images(digits, kind):
    images, _ = digits
    torch.manual_seed(0)
    model = main.MODELS[kind]()
    black = float(images.min())
    wide = F.pad(images, [1] * 4, value=black)  # (N, 1, 30, 30)
    middle = slice(1, 27) if kind == "cnn" else slice(0, 28)  # of what it looks at
    views = []
    for down in range(3):
        for right in range(3):
            shifted = wide[..., down : down + 28, right : right + 28]
            views.append(model(shifted[..., middle, middle]))
    expected = sum(views) / 9
    found = main.ShiftAverage(model)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, views[4], atol=1e-3)


# ----- a whole run


def test_an_accurate_run_says_what_it_was(accurate):
    settings = accurate.json("config.json")["settings"]
    assert settings["recipe"] == "accurate"
    assert settings["lr"] == main.RECIPES["accurate"]["lr"]
    assert "recipe accurate" in accurate.stdout
    (path,) = accurate.run_dir.glob("*.zip")
    assert Archive(path).params["recipe"] == "accurate"


def test_the_test_accuracy_is_that_of_the_average_of_the_saved_model(
    accurate, mnist, logits
):
    loss, accuracy = main.evaluate(torch.nn.Identity(), [(logits, mnist[3])])
    metrics = accurate.json("metrics.json")
    assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=2e-4)
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("model", ["cnn", "fc"])
def test_an_accurate_run_stopped_and_resumed_ends_bit_for_bit_the_same(tmp_path, model):
    flags = ["--recipe", "accurate", "--model", model, "--limit", 600, "--epochs", 3]
    flags += ["--batch-size", 5, "--comet", "off"]
    whole = complete(tmp_path / "whole", *flags)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    stopped = Run(list(map(str, flags)), tmp_path / "stopped", environment)
    stopped.wait_for(lambda: "Epoch 1/3" in stopped.stdout)
    stopped.kill(signal.SIGINT)
    assert stopped.wait() == 130, stopped.stderr
    resumed = complete(tmp_path / "stopped", "--resume", stopped.run_dir)
    assert "Epoch 1/3" not in resumed.stdout
    one, other = (
        main.load_tensors(run.run_dir / "model.pt") for run in (whole, resumed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    a, b = whole.json("metrics.json"), resumed.json("metrics.json")
    assert len(a.pop("epoch_seconds")) == len(b.pop("epoch_seconds")) == 3
    assert a == b


def test_the_cycle_of_a_run_cannot_be_made_longer(accurate):
    with pytest.raises(main.InputError, match="--epochs 3: the run to resume has 2"):
        main.read_settings(["--resume", str(accurate.run_dir), "--epochs", "3"])


# ----- what it gets wrong


def naive_calibration_error(probabilities, labels, bins=15):
    """By the definition, image by image."""
    members = [[] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist()):
        confidence = max(row)
        right = row.index(confidence) == label
        members[min(int(confidence * bins), bins - 1)].append((confidence, right))
    gaps = [
        len(m) * abs(sum(c for c, _ in m) / len(m) - sum(r for _, r in m) / len(m))
        for m in members
        if m
    ]
    return sum(gaps) / len(labels)


def test_the_calibration_error_is_that_of_the_definition():
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(2000, 10)).softmax(dim=1)
    sure, digits = probabilities.max(dim=1)  # too sure at the top, not enough below
    labels = torch.where(sure < 0.6, digits, torch.randint(0, 10, (2000,)))
    expected = naive_calibration_error(probabilities, labels)
    assert expected > 0.1
    found = main.calibration_error(probabilities, labels)
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_calibration_error_of_the_sure_and_right_is_0_and_of_the_sure_and_wrong_1():
    sure = F.one_hot(torch.arange(10), 10).float()
    assert main.calibration_error(sure, torch.arange(10)) == 0
    assert main.calibration_error(sure, torch.arange(10).roll(1)) == 1


def test_the_confusion_matrix_counts_every_test_digit_once(accurate, mnist, logits):
    metrics = accurate.json("metrics.json")
    digits = logits.argmax(dim=1)
    expected = torch.zeros(10, 10, dtype=torch.long)
    for label, digit in zip(mnist[3].tolist(), digits.tolist()):
        expected[label, digit] += 1
    found = torch.tensor(metrics["confusion_matrix"])
    assert found.sum() == 10_000
    assert (found - expected).abs().sum() <= 4  # a tie or two, by rounding
    assert found.diag().sum() == round(10_000 * metrics["test_accuracy"])
    shares = found.diag() / found.sum(dim=1)
    assert metrics["digit_accuracy"] == pytest.approx(shares.tolist(), abs=1e-6)


def test_the_calibration_error_is_in_the_metrics(accurate, mnist, logits):
    expected = naive_calibration_error(logits.softmax(dim=1), mnist[3])
    found = accurate.json("metrics.json")["calibration_error"]
    assert found == pytest.approx(expected, abs=1e-3)


def test_comet_gets_the_confusion_matrix(accurate):
    (path,) = accurate.run_dir.glob("*.zip")
    archive = Archive(path)
    (matrix,) = archive.matrices
    assert matrix["matrix"] == accurate.json("metrics.json")["confusion_matrix"]
    assert matrix["labels"] == list("0123456789")
    ((step, _, value),) = archive.metrics["calibration_error"]
    assert step == 32 and value == accurate.json("metrics.json")["calibration_error"]


def test_the_confusion_picture_has_every_count_and_the_diagonal_has_no_colour():
    matrix = torch.randint(1, 50, (10, 10)) + 1000 * torch.eye(10, dtype=torch.long)
    matrix[3, 5] = 0
    figure = main.draw_confusion(matrix.tolist())
    (axes,) = figure.axes
    found = {text.get_position(): text.get_text() for text in axes.texts}
    expected = {
        (column, row): str(int(matrix[row, column])) if matrix[row, column] else "·"
        for row in range(10)
        for column in range(10)
    }
    assert found == expected
    (colours,) = axes.images
    shown = torch.from_numpy(colours.get_array().filled(-1).copy())
    assert (shown.diag() == 0).all()
    off = ~torch.eye(10, dtype=torch.bool)
    assert torch.equal(shown[off], matrix[off])
    share = 100 * matrix[0, 0] / matrix[0].sum()
    assert axes.get_yticklabels()[0].get_text() == f"{share:.1f} %   0"


def test_the_worst_mistakes_are_the_surest_ones(monkeypatch, tmp_path):
    """What is drawn, in order: wrong, most confident first, and no more than 20."""
    drawn = {}

    def draw(images, probabilities, labels, rows, columns):
        drawn[rows, len(drawn)] = probabilities, labels
        return original(images, probabilities, labels, rows, columns)

    original = main.draw_digits
    monkeypatch.setattr(main, "draw_digits", draw)
    flags = ["--limit=500", "--epochs=1", "--batch-size=10", "--comet=off"]
    settings = main.read_settings([*flags, f"--output-dir={tmp_path}"])
    run = main.Run(settings, tmp_path)
    tracker = main.Tracker("off", tmp_path)
    monitor = main.Monitor(run.progress["losses"], tmp_path / "curve.png", tracker)
    run.train(monitor)
    logits = run.predict()
    run.keep(monitor, logits, run.test(logits))
    probabilities, labels = list(drawn.values())[-1]
    digits, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    assert len(digits) == 20 and (digits != labels).all()
    assert sure.tolist() == sorted(sure.tolist(), reverse=True)
    table = logits.softmax(dim=1)
    wrong = table.argmax(dim=1) != run.test_labels
    best = table[wrong].amax(dim=1).sort(descending=True).values[:20]
    assert sure.tolist() == pytest.approx(best.tolist())


def test_a_picture_of_fewer_digits_has_no_empty_frames(mnist):
    table = F.one_hot(mnist[3][:7], 10).float().numpy()
    figure = main.draw_digits(mnist[2][:7].numpy(), table, mnist[3][:7], 5, 4)
    (axes,) = figure.axes
    assert len(axes.images) == len(axes.patches) == 7


def test_the_loop_of_the_classic_recipe_knows_nothing_of_the_accurate_one(tmp_path):
    """Same bits with other numbers for what only the accurate recipe has."""
    weights = []
    for change in ({}, {"LABEL_SMOOTHING": 0.5, "SHIFT": 9, "TURN": 90}):
        kept = {name: copy.copy(getattr(main, name)) for name in change}
        for name, value in change.items():
            setattr(main, name, value)
        flags = ["--limit=300", "--epochs=1", "--comet=off"]
        run = main.Run(main.read_settings(flags), tmp_path)
        tracker = main.Tracker("off", tmp_path)
        run.train(main.Monitor(run.progress["losses"], tmp_path / "c.png", tracker))
        weights.append([p.detach().clone() for p in run.model.parameters()])
        for name, value in kept.items():
            setattr(main, name, value)
    assert all(map(torch.equal, *weights))
    assert all(math.isfinite(float(w.sum())) for w in weights[0])
    assert "classic" not in main.RECIPES
