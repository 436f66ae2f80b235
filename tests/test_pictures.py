"""A run's pictures: what they show, and that one can read it."""

import itertools
import json
import re
import warnings
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import run_here
from matplotlib.text import Text

import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, metrics, figures; test digits, and model.pt's probabilities."""
    figures, save_picture = {}, main.save_picture

    def save(path, draw, *arguments, **named):
        with mpl.style.context("default"):
            figures[path.stem] = draw(*arguments, **named)
        save_picture(path, draw, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "save_picture", save)
        folder = tmp_path_factory.mktemp("drawn")
        run_dir = run_here(folder, "--limit=2000", "--epochs=1", test_images=10_000)
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


def get_digits(figure):
    """Return the images of a figure's digits and their titles, in order."""
    images = [image for axes in figure.axes for image in axes.images]
    texts = [text for axes in figure.axes for text in axes.findobj(Text)]
    return images, [text for text in texts if "true label" in text.get_text()]


def check_digits(run, name, numbers):
    """A picture shows these test digits, each with prediction, percent and label."""
    digits, titles = get_digits(run.figures[name])
    for image, title, number in zip(digits, titles, numbers, strict=True):
        assert np.array_equal(image.get_array(), run.images[number])
        digit, percent, label = re.findall(r"\d+(?:\.\d+)?", title.get_text())
        row = run.table[number]
        assert [int(digit), int(label)] == [row.argmax(), run.labels[number]]
        assert float(percent) == pytest.approx(100 * row.max(), abs=0.06)
    return digits, titles


def test_the_grid_has_the_first_20_test_digits_in_5_rows_of_4(run):
    digits, _ = check_digits(run, "predictions_grid", range(20))
    corners = [image.get_window_extent().p0 for image in digits]
    x, y = np.transpose(corners).reshape(2, 5, 4).round()
    assert (x == x[0]).all() and (np.diff(x[0]) > 150).all()  # pixels
    assert (y.T == y[:, 0]).all() and (np.diff(y[:, 0]) < -200).all()


def test_the_20_most_confident_mistakes_the_surest_first(run):
    wrong = np.flatnonzero(run.table.argmax(axis=1) != run.labels)
    wrong = wrong[np.argsort(-run.table[wrong].max(axis=1))][:20]
    check_digits(run, "worst_mistakes", wrong)


def test_right_and_wrong_are_told_apart_by_sign_frame_and_colour(run):
    marks = {True: set(), False: set()}
    digits, titles = check_digits(run, "predictions_grid", range(20))
    for n, frame in enumerate(digits[0].axes.patches):
        assert frame.get_xy() == tuple(digits[n].get_extent()[i] for i in (0, 3))
        mark = titles[n].get_text()[0], frame.get_linewidth(), titles[n].get_color()
        marks[run.table[n].argmax() == run.labels[n]].add(mark)
    ((sign, thin, colour),), ((other, thick, another),) = marks.values()
    assert (sign, other) == ("✓", "✗") and thick >= 3 * thin and colour != another


@pytest.mark.parametrize("name", ["predictions_grid", "worst_mistakes"])
def test_the_titles_have_room_and_every_letter(run, name):
    """Nothing overlaps, nothing leaves the picture, no letter is missing in the font."""
    figure = run.figures[name]
    assert figure.get_figwidth() <= 14 >= figure.get_figheight()  # 100 pixels each
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure.draw_without_rendering()
    digits, titles = get_digits(figure)
    boxes = [drawn.get_window_extent() for drawn in titles + digits]
    assert len(boxes) == 40 and all(box.height > 10 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_the_sample_and_its_detail_with_a_bar_for_each_probability(run):
    check_digits(run, "sample_prediction", [0])
    check_digits(run, "single_prediction", [0])
    digit, chart = run.figures["single_prediction"].axes
    assert digit.get_position().x1 < chart.get_position().x0
    percent = pytest.approx(list(100 * run.table[0]), abs=0.06)
    assert [bar.get_height() for bar in chart.patches] == percent
    assert [float(text.get_text()) for text in chart.texts] == percent
    middles = [bar.get_x() + bar.get_width() / 2 for bar in chart.patches]
    assert middles == pytest.approx(range(10))
    assert "%" in chart.get_ylabel() and list(chart.get_xticks()) == [*range(10)]


def test_the_confusion_matrix_has_every_count_and_the_share_of_each_digit(run):
    matrix = np.array(run.metrics["confusion_matrix"])
    (axes,) = run.figures["confusion_matrix"].axes
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(found) == 100
    for (column, row), text in found.items():
        assert text == str(matrix[row, column] or "·")
    colours = np.array(axes.images[0].get_array())
    assert np.array_equal(colours + np.diag(matrix.diagonal()), matrix)  # of mistakes
    for digit, label in enumerate(axes.get_yticklabels()):
        share = 100 * matrix[digit, digit] / matrix[digit].sum()
        assert label.get_text() == f"{share:.1f} %   {digit}"


def test_the_calibration_error_has_15_bins():
    """Confidences 0.62 and 0.68 are in one tenth, but in two fifteenths."""
    probabilities = torch.full((5, 10), 0.01)
    probabilities[:, 3] = torch.tensor(3 * [0.62] + 2 * [0.68])
    labels = torch.tensor([3, 3, 3, 4, 4])  # the last two are misclassified
    digits = main.Digits(torch.zeros(5, 28, 28), probabilities, labels)
    expected = (3 * (1 - 0.62) + 2 * 0.68) / 5
    assert digits.get_calibration_error() == pytest.approx(expected)


def test_a_test_without_a_mistake_has_its_pictures(tmp_path, capsys):
    labels = torch.arange(20) % 10
    images, probabilities = torch.zeros(20, 28, 28), torch.eye(10)[labels]
    main.save_pictures(main.Digits(images, probabilities, labels), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert capsys.readouterr().err == ""
