"""The smoothed loss, and its curve that is drawn now and then: SPEC's row 15."""

import time

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

import main


def smooth(values, **named):
    history = main.LossHistory(**named)
    for value in values:
        history.append(value)
    return list(history.get())


@pytest.fixture
def curve(tmp_path):
    return tmp_path / "curve.png"


@pytest.fixture
def plotter(curve):
    """plotter(sec, scale) makes a PeriodicPlotter of the file curve.png."""
    return lambda sec=0, scale=None: main.PeriodicPlotter(sec, "x", "y", scale, curve)


def test_smoothing_keeps_the_first_value_and_weighs_the_others():
    assert smooth([1, 0, 0], smoothing_factor=0.9) == pytest.approx([1, 0.9, 0.81])
    assert smooth([2, 4, 8], smoothing_factor=0.25) == pytest.approx([2, 3.5, 6.875])
    assert smooth([3, 1, 2]) == [3, 1, 2]
    assert smooth([], smoothing_factor=0.9) == []


def test_a_curve_is_drawn_every_sec_seconds(plotter, curve):
    """Counted from the making, then from the last drawing."""
    drawing = plotter(sec=0.5)
    drawing.plot([1, 2])
    assert not curve.exists()
    time.sleep(0.5)
    drawing.plot([1, 2])
    first = curve.read_bytes()
    drawing.plot([1, 2, 3])
    assert curve.read_bytes() == first
    time.sleep(0.5)
    drawing.plot([1, 2, 3])
    assert curve.read_bytes() != first


def test_the_last_point_is_drawn(plotter, curve):
    """At the end, at once: every point, counted from 1, and the axes are wide enough."""
    drawing, pictures = plotter(60, "semilogy"), set()
    for points in ([2.0, 1.0], [2.0, 1.0, 0.5], [2.0, 1.0, 0.5, 0.001]):
        drawing.draw(points)
        (axes,) = drawing.figure.axes
        (line,) = axes.lines
        assert list(line.get_ydata()) == points
        assert list(line.get_xdata()) == list(range(1, len(points) + 1))
        assert axes.get_xlim()[1] >= len(points)
        assert axes.get_ylim()[0] <= points[-1]
        pictures.add(curve.read_bytes())
    assert len(pictures) == 3


def test_the_current_figure_is_left_alone(plotter, curve, monkeypatch):
    """And no display is needed, not even if matplotlib is told to open windows."""
    current = plt.figure()
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(mpl.rcParams, "backend", "tkagg")
    plotter().draw([3, 2, 1])
    found = plt.get_fignums(), current.axes
    plt.close(current)
    assert curve.exists() and found == ([current.number], [])


def test_the_axes_have_scale_and_labels(plotter):
    names = {None: (0, 0), "semilogx": (1, 0), "semilogy": (0, 1), "loglog": (1, 1)}
    for scale, is_log in names.items():
        drawing = plotter(scale=scale)
        drawing.draw([2, 1])
        (axes,) = drawing.figure.axes
        assert axes.get_xscale() == ("linear", "log")[is_log[0]]
        assert axes.get_yscale() == ("linear", "log")[is_log[1]]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")
    with pytest.raises(ValueError, match="semilog"):
        plotter(scale="semilog")
