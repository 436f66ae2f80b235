"""A run's pictures: what they show, that one can read it, also if one is colour-blind."""

import itertools
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_here
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

import main

GRIDS = "predictions_grid", "worst_mistakes"
NAMES = (
    *GRIDS,
    "sample_prediction",
    "single_prediction",
    "confusion_matrix",
    "loss_curve",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 2,000 digits: its folder, metrics, and the figures that it saved.

    And the test digits: images, labels, and their probabilities by model.pt.
    """
    figures, savefig = {}, Figure.savefig

    def save(figure, file, **named):
        name = Path(getattr(file, "name", file)).name.partition(".")[0]
        figures[name] = figure
        savefig(figure, file, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        folder = tmp_path_factory.mktemp("drawn")
        run_dir = run_here(folder, "--limit", 2000, "--epochs", 1)
    model = main.CNN()
    model.load_state_dict(torch.load(run_dir / "model.pt"))
    images, labels = main.load_mnist(main.DATA_DIR)[2:]
    batches = main.make_batches(images, labels, 250)
    table = main.evaluate(model, batches)[2].softmax(dim=1)
    return SimpleNamespace(
        folder=run_dir,
        metrics=json.loads((run_dir / "metrics.json").read_text()),
        figures=figures,
        images=images.numpy(),
        labels=labels.numpy(),
        table=table.numpy(),
    )


def get_cells(figure):
    """Return the axes with digits, their images, and their titles as Text objects."""
    axes = [axes for axes in figure.axes if axes.images]
    images = [np.asarray(each.images[0].get_array()) for each in axes]
    titles = []
    for each in axes:
        texts = each.title, each._left_title, each._right_title
        (title,) = (text for text in texts if text.get_text())
        titles.append(title)
    return axes, images, titles


def get_numbers(title):
    """Return what a title says: digit, percent, true label."""
    digit, percent, label = re.findall(r"\d+(?:\.\d+)?", title.get_text())
    return int(digit), float(percent), int(label)


def get_expected(run, number):
    """Return the same by the saved model, of one of the test digits."""
    row = run.table[number]
    percent = pytest.approx(100 * row.max(), abs=0.06)
    return row.argmax(), percent, run.labels[number]


def test_every_picture_is_a_whole_png_of_a_size_that_one_can_look_at(run):
    for name in NAMES:
        with Image.open(run.folder / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L")).astype(int)
            assert picture.format == "PNG"
        assert all(200 <= side <= 1400 for side in pixels.shape), name
        assert (pixels < 128).any() and (pixels > 250).mean() > 0.1, name


def test_the_grid_has_the_first_20_test_digits_in_5_rows_of_4(run):
    """Each with prediction, probability and true label."""
    axes, images, titles = get_cells(run.figures["predictions_grid"])
    assert len(axes) == 20 == len(run.figures["predictions_grid"].axes)
    for number in range(20):
        assert np.array_equal(images[number], run.images[number])
        assert get_numbers(titles[number]) == get_expected(run, number)
    places = [each.get_position() for each in axes]
    rows = [round(place.y0, 2) for place in places[::4]]
    columns = [round(place.x0, 2) for place in places[:4]]
    assert rows == sorted(set(rows), reverse=True) and columns == sorted(set(columns))
    for number, place in enumerate(places):
        assert place.y0 == pytest.approx(rows[number // 4], abs=0.02)
        assert place.x0 == pytest.approx(columns[number % 4], abs=0.02)


def test_the_20_most_confident_mistakes_the_surest_first(run):
    _, images, titles = get_cells(run.figures["worst_mistakes"])
    wrong = np.flatnonzero(run.table.argmax(axis=1) != run.labels)
    wrong = wrong[np.argsort(-run.table[wrong].max(axis=1), kind="stable")][:20]
    percents = [get_numbers(title)[1] for title in titles]
    assert percents == sorted(percents, reverse=True) and len(percents) == 20
    expected = [100 * run.table[number].max() for number in wrong]
    assert percents == pytest.approx(expected, abs=0.06)
    for image, title in zip(images, titles):
        (number,) = np.flatnonzero((run.images == image).all(axis=(1, 2)))
        assert get_numbers(title) == get_expected(run, number)
        assert run.table[number].argmax() != run.labels[number]


def luminance(colour):
    return np.dot([0.2126, 0.7152, 0.0722], linear(colour))


def linear(colour):
    rgb = np.array(colors.to_rgb(colour))
    return np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


# Machado et al. 2009, severity 1.0: what people without green, or red, cones see.
GREEN_BLIND = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
RED_BLIND = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]


def test_right_and_wrong_are_told_apart_by_sign_frame_and_colour(run):
    """Colours that colour-blind people can tell apart, and read on white."""
    marks = {True: set(), False: set()}
    axes, _, titles = get_cells(run.figures["predictions_grid"])
    for each, title in zip(axes, titles):
        digit, _, label = get_numbers(title)
        width = each.spines["left"].get_linewidth()
        mark = title.get_text()[0], width, title.get_color()
        marks[digit == label].add(mark)
    ((sign, width, colour),), ((other, thick, another),) = marks[True], marks[False]
    assert (sign, other) == ("✓", "✗") and thick >= 3 * width
    for matrix in (np.eye(3), GREEN_BLIND, RED_BLIND):
        seen = [np.dot(matrix, linear(each)) for each in (colour, another)]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.3
    for each in (colour, another):
        assert 1.05 / (luminance(each) + 0.05) > 3  # WCAG's contrast for large marks


@pytest.mark.parametrize("name", GRIDS)
def test_the_titles_have_room_and_every_letter(run, name):
    """Nothing overlaps, nothing leaves the picture, no letter is missing in the font."""
    figure = run.figures[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure.draw_without_rendering()
    axes, _, titles = get_cells(figure)
    boxes = [title.get_window_extent() for title in titles]
    assert all(box.height > 10 for box in boxes)
    boxes += [each.get_window_extent() for each in axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", ["sample_prediction", "single_prediction"])
def test_the_sample_has_prediction_and_true_label(run, name):
    _, (image,), (title,) = get_cells(run.figures[name])
    assert np.array_equal(image, run.images[0])
    assert get_numbers(title) == get_expected(run, 0)


def test_the_detail_has_the_digit_beside_a_bar_for_each_probability(run):
    digit, chart = run.figures["single_prediction"].axes
    assert digit.get_position().x1 < chart.get_position().x0
    heights = [bar.get_height() for bar in chart.patches]
    assert heights == pytest.approx(list(100 * run.table[0]), abs=0.05)
    middles = [bar.get_x() + bar.get_width() / 2 for bar in chart.patches]
    assert middles == pytest.approx(range(10)) and list(chart.get_xticks()) == [
        *range(10)
    ]
    labels = [float(text.get_text()) for text in chart.texts]
    assert labels == pytest.approx(heights, abs=0.06)
    assert "%" in chart.get_ylabel()
    best = run.table[0].argmax()
    colours = [bar.get_facecolor() for bar in chart.patches]
    assert [colour == colours[best] for colour in colours].count(True) == 1


def test_the_confusion_matrix_has_every_count_and_the_share_of_each_digit(run):
    matrix = run.metrics["confusion_matrix"]
    (axes,) = run.figures["confusion_matrix"].axes
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(found) == 100
    for (column, row), text in found.items():
        count = matrix[int(row)][int(column)]
        assert text == (str(count) if count else "·")
    colours = np.array(axes.images[0].get_array().filled(-1))
    assert (colours.diagonal() <= 0).all()  # what is right has no colour
    mistakes = ~np.eye(10, dtype=bool)
    assert np.array_equal(colours[mistakes], np.array(matrix)[mistakes])
    for digit, label in enumerate(axes.get_yticklabels()):
        share = 100 * matrix[digit][digit] / sum(matrix[digit])
        assert label.get_text() == f"{share:.1f} %   {digit}"


def test_the_loss_curve_is_the_smoothed_loss_of_every_step(run):
    smoothed = main.LossHistory(0.95)
    for loss in run.metrics["losses"]:
        smoothed.append(loss)
    (axes,) = run.figures["loss_curve"].axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == list(range(1, 33))
    assert list(line.get_ydata()) == pytest.approx(smoothed.get())
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "smoothed loss")
