"""The smoothed loss, and its curve that is drawn now and then: SPEC's row 15."""

import time

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import main


def smooth(values, **named):
    history = main.LossHistory(**named)
    for value in values:
        history.append(value)
    return list(history.get())


@pytest.fixture
def plotter(tmp_path):
    """plotter(sec, scale) makes a PeriodicPlotter of the file curve.png."""
    path = tmp_path / "curve.png"
    return lambda sec=0, scale=None: main.PeriodicPlotter(sec, "x", "y", scale, path)


@pytest.fixture
def curve(tmp_path):
    """curve(): the bytes of curve.png, None if there is none."""
    path = tmp_path / "curve.png"
    return lambda: path.read_bytes() if path.exists() else None


def get_axes(plotter):
    (axes,) = plotter.figure.axes
    return axes


# ----- LossHistory


def test_smoothing_keeps_the_first_value_and_weighs_the_others():
    assert smooth([1, 0, 0], smoothing_factor=0.9) == pytest.approx([1, 0.9, 0.81])
    assert smooth([2, 4, 8], smoothing_factor=0.25) == pytest.approx([2, 3.5, 6.875])
    assert smooth([3, 1, 2], smoothing_factor=1) == [3, 3, 3]


def test_a_factor_of_0_is_the_default_and_a_new_history_is_empty():
    assert smooth([3, 1, 2]) == [3, 1, 2]
    assert list(main.LossHistory(0.9).get()) == []


# ----- PeriodicPlotter


def test_an_unknown_scale_is_refused(plotter):
    with pytest.raises(ValueError, match="semilog"):
        plotter(scale="semilog")


def test_the_axes_have_scale_and_labels(plotter):
    scales = {
        None: ("linear", "linear"),
        "semilogx": ("log", "linear"),
        "semilogy": ("linear", "log"),
        "loglog": ("log", "log"),
    }
    for scale, expected in scales.items():
        drawing = plotter(scale=scale)
        drawing.draw([3, 2, 1])
        axes = get_axes(drawing)
        assert (axes.get_xscale(), axes.get_yscale()) == expected
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")


def test_labels_scale_and_file_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing = main.PeriodicPlotter(0)
    drawing.plot([1, 2])
    assert list(get_axes(drawing).lines[0].get_ydata()) == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_curve_is_drawn_every_sec_seconds(plotter, curve):
    """Counted from the making, then from the last drawing."""
    drawing = plotter(sec=0.5)
    drawing.plot([1, 2])
    assert curve() is None
    time.sleep(0.5)
    drawing.plot([1, 2])
    first = curve()
    assert first
    drawing.plot([1, 2, 3])
    assert curve() == first
    time.sleep(0.5)
    drawing.plot([1, 2, 3])
    assert curve() != first


def test_drawing_at_the_end_does_not_wait(plotter, curve):
    plotter(sec=60).draw([1, 2])
    assert curve()


def test_the_last_point_is_drawn(plotter, curve):
    """The curve has every point, counted from 1, and the axes are wide enough for it."""
    drawing, pictures = plotter(scale="semilogy"), set()
    for points in ([2.0, 1.0], [2.0, 1.0, 0.5], [2.0, 1.0, 0.5, 0.001]):
        drawing.draw(points)
        axes = get_axes(drawing)
        (line,) = axes.lines
        assert list(line.get_ydata()) == points
        assert list(line.get_xdata()) == list(range(1, len(points) + 1))
        assert axes.get_xlim()[1] >= len(points)
        assert axes.get_ylim()[0] <= points[-1]
        pictures.add(curve())
    assert len(pictures) == 3


@pytest.mark.parametrize("last", [1.8, 0.3, 0.03])
def test_the_loss_can_be_read_off_its_axis(plotter, last):
    """However little it has fallen, there are two labels or more; and not too many."""
    drawing = plotter(scale="semilogy")
    drawing.draw([2.3, last])
    axis = get_axes(drawing).yaxis
    low, high = get_axes(drawing).get_ylim()
    ticks = axis.get_major_ticks() + axis.get_minor_ticks()
    shown = [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high]
    assert 2 <= len(set(shown) - {""}) < 15


def test_the_file_is_a_whole_picture(plotter, tmp_path):
    plotter().draw([3, 2, 1])
    with Image.open(tmp_path / "curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 200
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_old_picture_stays_whole_until_the_new_one_is_there(
    plotter, curve, tmp_path
):
    """Who has it open goes on reading the old one: it is replaced, not overwritten."""
    drawing = plotter()
    drawing.draw([3, 2])
    old = curve()
    with open(tmp_path / "curve.png", "rb") as reader:
        begin = reader.read(100)
        drawing.draw([3, 2, 1])
        assert begin + reader.read() == old
    assert curve() != old


def test_the_current_figure_is_left_alone_and_no_display_is_needed(
    plotter, curve, monkeypatch
):
    """Not even if matplotlib is told to open windows."""
    current = plt.figure()
    try:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(mpl.rcParams, "backend", "tkagg")
        plotter().draw([3, 2, 1])
        assert curve()
        assert plt.get_fignums() == [current.number]
        assert current.axes == []
    finally:
        plt.close(current)
