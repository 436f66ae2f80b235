"""The four pictures: that a run leaves them, what they show, and that one can read it."""

import io
import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import main

NAMES = "loss_curve", "sample_prediction", "single_prediction", "predictions_grid"
MISTAKES = "worst_mistakes", "confusion_matrix"  # only of a run that has ended


@pytest.fixture(scope="module")
def digits():
    """20 test images with their labels."""
    images, labels = main.load_mnist(main.DATA_DIR)[2:]
    return images[:20].numpy(), labels[:20].tolist()


def predict(labels, wrong=(), sure=0.905):
    """Return probabilities (N, 10): sure of the label, but for those in `wrong`."""
    table = np.full((len(labels), 10), (1 - sure) / 9, dtype=np.float32)
    for number, label in enumerate(labels):
        table[number, (label + (number in wrong)) % 10] = sure
    return table


@pytest.fixture
def draw_grid(digits):
    def draw(**named):
        images, labels = digits
        return main.draw_digits(images, predict(labels, **named), labels, 5, 4)

    return draw


def get_pixels(png):
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_quick_look_leaves_the_four_pictures_of_what_was_learned(spawn):
    """They show the digits as the weights in model.pt read them, and the losses."""
    run = spawn("--limit", 2000, "--epochs", 1, "--comet", "off")
    assert run.wait() == 0, run.stderr
    found = {p.stem: get_pixels(p.read_bytes()) for p in run.run_dir.glob("*.png")}
    assert set(found) == {*NAMES, *MISTAKES}
    for pixels in found.values():
        assert all(200 <= side <= 1400 for side in pixels.shape[:2])

    model = main.CNN()
    model.load_state_dict(torch.load(run.run_dir / "model.pt"))
    images, labels = (part[:20] for part in main.load_mnist(main.DATA_DIR)[2:])
    with torch.no_grad():
        logits = model(main.prepare(images, model))
    table, labels = logits.softmax(dim=1).numpy(), labels.tolist()
    images = images.numpy()
    smoothed = main.LossHistory(0.95)
    for loss in run.json("metrics.json")["losses"]:
        smoothed.append(loss)
    names = "iteration", "smoothed loss"
    curve = main.PeriodicPlotter(2, *names, "semilogy")
    curve.draw(smoothed.get())
    expected = {
        "loss_curve": curve.figure,
        "sample_prediction": main.draw_digits(images, table, labels, 1, 1),
        "single_prediction": main.draw_detail(images[0], table[0], labels[0]),
        "predictions_grid": main.draw_digits(images, table, labels, 5, 4),
    }
    for name, figure in expected.items():
        pixels = get_pixels(main.save_picture(figure))
        assert pixels.shape == found[name].shape
        assert np.abs(pixels - found[name]).mean() < 0.1, name


def get_cells(figure):
    """Return what a grid says of each digit, as Text objects, and where each digit is."""
    (axes,) = figure.axes
    texts = [text for text in axes.texts if "label" in text.get_text()]
    return texts, [image.get_extent() for image in axes.images]


def test_the_grid_has_5_rows_of_4_digits(draw_grid, digits):
    figure = draw_grid()
    (axes,) = figure.axes
    assert len(axes.images) == 20
    for image, shown in zip(digits[0], axes.images):
        assert np.array_equal(shown.get_array(), image)
    texts, places = get_cells(figure)
    columns, rows = sorted({x for x, *_ in places}), sorted({y for *_, y in places})
    assert (len(rows), len(columns)) == (5, 4)
    assert [(x, y) for x, _, _, y in places] == [(x, y) for y in rows for x in columns]
    for text, (left, right, bottom, top) in zip(texts, places):
        assert (bottom - top, right - left) == (28, 28)
        x, y = text.get_position()  # above the middle of its own digit
        assert x == (left + right) / 2 and 0 < top - y < 3


def test_each_digit_of_the_grid_has_prediction_probability_and_true_label(
    draw_grid, digits
):
    for number, text in enumerate(get_cells(draw_grid(wrong=[3, 7]))[0]):
        label = digits[1][number]
        predicted = (label + (number in (3, 7))) % 10
        numbers = re.findall(r"[\d.]+", text.get_text())
        assert numbers == [str(predicted), "90.5", str(label)]


def test_right_and_wrong_are_told_apart_by_text_frame_and_colour(draw_grid):
    figure = draw_grid(wrong=[3, 7])
    texts = get_cells(figure)[0]
    words = [re.sub(r"[\d.]+", "", text.get_text()) for text in texts]
    colours = [text.get_color() for text in texts]
    frames = [frame.get_linewidth() for frame in figure.axes[0].patches]
    for marks in (words, colours, frames):
        assert len(marks) == 20 and marks[3] == marks[7] != marks[0]
        assert {marks[n] for n in range(20) if n not in (3, 7)} == {marks[0]}


def test_every_letter_of_the_titles_is_in_the_font(draw_grid):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main.save_picture(draw_grid(wrong=[3, 7]))


def test_the_titles_have_room(draw_grid):
    """At their longest: nothing overlaps, nothing leaves the picture."""
    figure = draw_grid(wrong=range(20), sure=1.0)
    main.save_picture(figure)
    boxes = [text.get_window_extent() for text in get_cells(figure)[0]]
    assert len(boxes) == 20 and all(box.height > 10 for box in boxes)
    boxes += [frame.get_window_extent() for frame in figure.axes[0].patches]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("wrong", [[], [0]])
def test_the_sample_has_prediction_and_true_label(digits, wrong):
    images, labels = digits
    table = predict(labels, wrong)
    (axes,) = main.draw_digits(images, table, labels, 1, 1).axes
    numbers = re.findall(r"[\d.]+", axes.texts[0].get_text())
    assert numbers[0] == str(table[0].argmax())
    assert numbers[-1] == str(labels[0])
    (shown,) = axes.images
    assert np.array_equal(shown.get_array(), images[0])


def test_the_detail_has_the_digit_beside_a_bar_for_each_probability(digits):
    image, label = digits[0][0], digits[1][0]
    probabilities = np.linspace(0.01, 0.19, 10, dtype=np.float32)
    digit, chart = main.draw_detail(image, probabilities, label).axes
    assert np.array_equal(digit.images[0].get_array(), image)
    heights = [bar.get_height() for bar in chart.patches]
    assert heights == pytest.approx(list(100 * probabilities), rel=1e-5)
    assert "%" in chart.get_ylabel()
    middles = [bar.get_x() + bar.get_width() / 2 for bar in chart.patches]
    assert middles == pytest.approx(range(10))
    assert list(chart.get_xticks()) == list(range(10))
    numbers = re.findall(r"[\d.]+", digit.texts[0].get_text())
    assert numbers[0] == "9"
    assert numbers[-1] == str(label)
