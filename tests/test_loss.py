"""The smoothed loss, and its curve that is drawn now and then."""

import io
import itertools
import time

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import main

PNG = b"\x89PNG\r\n\x1a\n"


def smooth(values, **named):
    history = main.LossHistory(**named)
    for value in values:
        history.append(value)
    return history.get()


@pytest.fixture
def plotter(tmp_path):
    """plotter(sec, scale) makes a PeriodicPlotter of the file curve.png."""
    path = tmp_path / "curve.png"
    return lambda sec=0, scale=None: main.PeriodicPlotter(sec, "x", "y", scale, path)


def get_axes(plotter):
    (axes,) = plotter.figure.axes
    return axes


# ----- LossHistory


def test_smoothing_keeps_the_first_value_and_weighs_the_others():
    assert smooth([1, 0, 0], smoothing_factor=0.9) == pytest.approx([1, 0.9, 0.81])
    assert smooth([2, 4, 8], smoothing_factor=0.25) == pytest.approx([2, 3.5, 6.875])


def test_a_factor_of_0_is_the_default_and_smooths_nothing():
    assert smooth([3, 1, 2]) == [3, 1, 2]


def test_a_factor_of_1_keeps_the_first_value():
    assert smooth([3, 1, 2], smoothing_factor=1) == [3, 3, 3]


def test_a_new_history_is_empty():
    assert list(main.LossHistory(0.9).get()) == []


# ----- PeriodicPlotter


def test_an_unknown_scale_is_refused(plotter):
    with pytest.raises(ValueError, match="semilog"):
        plotter(scale="semilog")


@pytest.mark.parametrize(
    ("scale", "x", "y"),
    [
        (None, "linear", "linear"),
        ("semilogx", "log", "linear"),
        ("semilogy", "linear", "log"),
        ("loglog", "log", "log"),
    ],
)
def test_the_scale_is_that_of_the_axes(plotter, scale, x, y):
    drawing = plotter(scale=scale)
    drawing.draw([3, 2, 1])
    axes = get_axes(drawing)
    assert (axes.get_xscale(), axes.get_yscale()) == (x, y)


def test_the_axes_have_their_labels(plotter):
    axes = get_axes(plotter())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")


def test_labels_scale_and_file_may_be_left_out():
    assert main.PeriodicPlotter(0).plot([1, 2]).startswith(PNG)


def test_nothing_is_drawn_before_its_time(plotter, tmp_path):
    drawing = plotter(sec=60)
    assert drawing.plot([1, 2]) is None
    assert list(tmp_path.iterdir()) == []


def test_a_curve_is_drawn_every_sec_seconds(plotter, tmp_path):
    """Counted from the making, then from the last drawing."""
    drawing = plotter(sec=0.4)
    assert drawing.plot([1, 2]) is None
    time.sleep(0.4)
    first = drawing.plot([1, 2])
    assert (tmp_path / "curve.png").read_bytes() == first
    assert drawing.plot([1, 2, 3]) is None
    assert (tmp_path / "curve.png").read_bytes() == first
    time.sleep(0.4)
    second = drawing.plot([1, 2, 3])
    assert (tmp_path / "curve.png").read_bytes() == second != first


def test_drawing_at_the_end_does_not_wait(plotter, tmp_path):
    assert plotter(sec=60).draw([1, 2]) == (tmp_path / "curve.png").read_bytes()


def test_the_last_point_is_drawn(plotter):
    """The curve has every point, counted from 1, and the axes are wide enough for it."""
    drawing = plotter(scale="semilogy")
    for points in ([2.0, 1.0], [2.0, 1.0, 0.5, 0.001]):
        drawing.draw(points)
        axes = get_axes(drawing)
        (line,) = axes.lines
        assert list(line.get_ydata()) == points
        assert list(line.get_xdata()) == list(range(1, len(points) + 1))
        assert axes.get_xlim()[1] >= len(points)
        assert axes.get_ylim()[0] <= points[-1]


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ([2.3, 1.8], {"1.8", "2", "2.2"}),
        ([2.3, 0.3], {"0.4", "0.5", "0.6", "0.8", "2"}),
        ([2.3, 0.03], {"0.05", "0.2", "0.5", "2"}),
    ],
)
def test_the_loss_can_be_read_off_its_axis(plotter, losses, labels):
    """However little it has fallen, there are labels; if much, not too many."""
    drawing = plotter(scale="semilogy")
    drawing.draw(losses)
    low, high = get_axes(drawing).get_ylim()
    ticks = get_axes(drawing).yaxis.get_minor_ticks()
    shown = {t.label1.get_text() for t in ticks if low <= t.get_loc() <= high} - {""}
    assert labels <= shown
    assert len(shown) < 12


def test_a_point_more_changes_the_picture(plotter):
    pictures = [plotter().draw([5, 4, 3, 2][:n]) for n in (2, 3, 4)]
    for one, other in itertools.combinations(pictures, 2):
        assert one != other


def test_the_file_is_a_whole_picture(plotter, tmp_path):
    plotter().draw([3, 2, 1])
    with Image.open(tmp_path / "curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 200
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_old_picture_stays_whole_until_the_new_one_is_there(plotter, tmp_path):
    """Who has it open goes on reading the old one: it is replaced, not overwritten."""
    drawing = plotter()
    old = drawing.draw([3, 2])
    with open(tmp_path / "curve.png", "rb") as reader:
        begin = reader.read(100)
        new = drawing.draw([3, 2, 1])
        assert begin + reader.read() == old
    assert (tmp_path / "curve.png").read_bytes() == new


def test_the_current_figure_is_left_alone(plotter):
    current = plt.figure()
    try:
        plotter().draw([3, 2, 1])
        assert plt.get_fignums() == [current.number]
        assert plt.gcf() is current
        assert current.axes == []
    finally:
        plt.close(current)


def test_no_display_is_needed(plotter, monkeypatch):
    """Not even if matplotlib is told to open windows."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(mpl.rcParams, "backend", "tkagg")
    picture = plotter().draw([3, 2, 1])
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
