"""Train, track and understand your first convolutional network, on MNIST.

python main.py                          train the CNN: 7 epochs of 60,000 digits
python main.py --recipe accurate        the best that this network can do
python main.py --compare                train the fully connected baseline beside it
python main.py --limit 2000 --epochs 1  a quick look
python main.py --resume runs/NAME       go on with a run that was stopped
python main.py --predict photo.jpg      read your own handwriting
torchrun --nproc-per-node=2 main.py     on two processors or GPUs; on more machines too

Test accuracy 98.30 ± 0.22 %, accurate 99.61 ± 0.03 % (10 seeds, PyTorch 2.14.1, EPYC).
"""

import argparse
import base64
import contextlib
import ctypes
import gc
import io
import json
import math
import os
import pickletools
import platform
import queue
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
from datetime import timedelta
from http.client import HTTPException
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

# ===== Settings =======================================================================
# Edit them here, or use the flags: EPOCHS is --epochs.

# What is trained, and how
RECIPE = "classic"  # classic: as below; or accurate: as in RECIPES, and what it adds
MODEL = "cnn"  # cnn (CNN) or fc (FullyConnectedModel)
EPOCHS = 7  # passes over the training images
BATCH_SIZE = 64  # images per step
LR = 0.01  # learning rate
OPTIMIZER = "sgd"  # sgd or adam
SEED = 0  # of the initial weights and of the shuffling
SEEDS = 1  # train so many times: with SEED, SEED + 1, ...
LIMIT = 0  # train on the first so many images only; 0: on all 60,000

# Where
DEVICE = "auto"  # auto (the best that is there), cpu, cuda or mps
DATA_DIR = str(Path(__file__).resolve().parent / "data")  # has MNIST/raw/*.gz
OUTPUT_DIR = "runs"  # each run makes a new folder in it

# Tracking on comet.com
COMET = "auto"  # online, offline, off; auto: online if there is a key, else offline
COMET_API_KEY = "YOUR_API_KEY_HERE"  # or the variable COMET_API_KEY, or ~/.comet.config
COMET_PROJECT = "mnist-cnn"

# ===== Flags ==========================================================================
# Made from the constants above, or the recipe; checked before the slow imports below.

FLAGS = {  # name: (default, what it may be, help)
    "recipe": (RECIPE, ("classic", "accurate"), "the settings below, as a whole"),
    "model": (MODEL, ("cnn", "fc"), "CNN or FullyConnectedModel"),
    "epochs": (EPOCHS, range(1, 10_001), "passes over the training images"),
    "batch_size": (BATCH_SIZE, range(1, 60_001), "images per step"),
    "lr": (LR, float, "learning rate"),
    "optimizer": (OPTIMIZER, ("sgd", "adam"), "what updates the weights"),
    "seed": (SEED, range(2**32), "of the initial weights and of the shuffling"),
    "seeds": (SEEDS, range(1, 1001), "train N times: with SEED, SEED + 1, ..."),
    "limit": (LIMIT, range(60_001), "train on the first N images only; 0: all"),
    "device": (DEVICE, ("auto", "cpu", "cuda", "mps"), "auto: the best that is there"),
    "data_dir": (DATA_DIR, Path, "folder that has MNIST/raw/*.gz, or gets them"),
    "output_dir": (OUTPUT_DIR, Path, "folder in which each run makes a new one"),
    "comet": (COMET, ("auto", "online", "offline", "off"), "auto: online with a key"),
}
RECIPES = {"accurate": {"epochs": 7, "batch_size": 64, "lr": 0.1, "optimizer": "sgd"}}
# What a resumed run may change; but a schedule has its end: accurate keeps the epochs.
RESUMABLE = ("epochs", "device", "comet")


class UserError(Exception):
    """What went wrong, for the user: one line on standard error, then exit status 1."""


class InputError(UserError):
    """The command line or an input file is wrong: exit status 2."""

    status = 2


def read_setting(name, text, allowed):
    """Return the value that `text` stands for. Raises InputError if not `allowed`."""
    value, wanted, good = text, "a folder", False
    if isinstance(allowed, tuple):
        wanted, good = "one of " + ", ".join(allowed), text in allowed
    elif isinstance(allowed, range):
        wanted = f"a whole number from {allowed[0]:,} to {allowed[-1]:,}"
        value = int(text) if text.isdecimal() and len(text) < 20 else -1
        good = value in allowed
    elif allowed is float:
        wanted = "a number above 0, at most 1e9"
        with contextlib.suppress(ValueError):
            value = float(text)
            good = 0 < value <= 1e9
    elif text and text.isprintable():
        path = Path(text).absolute()
        good = next(p for p in (path, *path.parents) if os.path.lexists(p)).is_dir()
    if not good:
        raise InputError(f"{name} must be {wanted}, not {text!r}")
    return value


def read_settings(argv):
    """Return the settings, a dict: the flags in `argv`, else the constants above.

    "resume" in it is None or a run's folder: it keeps its settings, save RESUMABLE ones.
    "predict" is None or image files; "checkpoint" what shall read them, or None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that we see what was typed
        allow_abbrev=False,
    )
    parser.error = refuse
    for name, (default, allowed, text) in FLAGS.items():
        choices = "|".join(allowed) if isinstance(allowed, tuple) else "X"
        text += f" (default: {default})"
        parser.add_argument(flag_of(name), metavar=choices, help=text)
    parser.add_argument("--compare", action="store_true", help="both models, compared")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="a run to go on")
    parser.add_argument("--predict", nargs="+", metavar="IMAGE", help="digits to read")
    text = "the model.pt or checkpoint.pt that reads them (default: of the newest run)"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=text)
    given = vars(parser.parse_args(argv))
    others = "resume", "predict", "checkpoint"
    run, photos, trained = (given.pop(name, None) for name in others)
    alone = given.keys() <= {"output_dir"} and not (run and trained)
    if not (alone if photos else trained is None):
        refuse("--predict goes with --checkpoint or --resume, and --output-dir, alone")

    kept, fixed = {name: flag[0] for name, flag in FLAGS.items()}, ()
    origin = "the constant"
    kept |= RECIPES.get(str(given.get("recipe", RECIPE)), {})
    settings = {"compare": given.pop("compare", False), "predict": photos}
    settings |= {"resume": run, "checkpoint": trained or run}
    if run is not None and not photos:
        origin = config = Path(run, "config.json")
        try:
            with open(config, encoding="utf-8") as file:
                kept = json.loads(file.read(100_000))["settings"]
            settings["compare"] = dict(kept).get("compare") is True
            kept = {name: kept[name] for name in FLAGS}
            fixed = FLAGS.keys() - RESUMABLE[kept["recipe"] == "accurate" :]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"--resume: {config} is no run's: {error!r:.200}"
            ) from None
    for name, (_, allowed, _) in FLAGS.items():
        source = flag_of(name) if name in given else f"{origin} {name.upper()}"
        text = given.get(name, str(kept[name]))
        settings[name] = read_setting(source, text, allowed)
        if name in fixed and settings[name] != kept[name]:
            raise InputError(f"{source} {text}: the run to resume has {kept[name]}")

    if settings["batch_size"] > (images := settings["limit"] or 60_000):
        raise InputError(f"--batch-size must be from 1 to {images:,}, all the images")
    device, drivers = settings["device"], ("nvidia", "nvhost", "nvmap", "kfd", "dxg")
    missing = {"mps": platform.system() != "Darwin"}  # PyTorch has the last word
    if platform.system() == "Linux":
        missing["cuda"] = not any(x.startswith(drivers) for x in os.listdir("/dev"))
    if missing.get(device):
        raise InputError(f"--device {device}: there is none here; use auto or cpu")
    return settings


def flag_of(name):
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def refuse(message):
    """Raise InputError: what argparse does with an error, in one line."""
    raise InputError(f"{message} (python main.py --help lists the flags)")


def report(error):
    """Print an error as one line on standard error; return the exit status."""
    # With torchrun, all processes find the same mistake: one of each machine says it.
    if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, InputError):
        print("main.py:", " ".join(str(error).split()), file=sys.stderr)
    else:
        time.sleep(5)  # torchrun ends all as soon as one ends: let that one speak first
    return getattr(error, "status", 1)


def handle_signals(handler):
    """Have Ctrl-C and SIGTERM call handler(number, frame)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    handle_signals(lambda number, frame: os._exit(128 + number))  # nothing to save yet
    sys.modules["triton"] = None  # spare us 70 MB and 0.4 s for a compiler we don't use
    gc.disable()  # until collect_garbage: it takes a third of the imports' time
    try:
        SETTINGS = read_settings(sys.argv[1:])
    except InputError as error:
        sys.exit(report(error))

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from torch import distributed as dist
from torch import nn
from torchsummary import summary
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

# ===== Models =========================================================================


class CNN(nn.Module):
    """Two convolutions and two linear layers: 124,670 parameters."""

    # Two 3x3 convolutions and two 2x2 poolings never look at the last two rows and columns
    # of 28x28 (28 > 26 > 13 > 11 > 5, and 26 > 24 > 12 > 10 > 5): we need not feed them.
    seen = 26  # edit the layers as you like: check_layers takes 28 if they need it

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, kernel_size=3)
        self.pool1 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(24, 36, kernel_size=3)
        self.pool2 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(36 * 5 * 5, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        """Map normalised images, (N, 1, 28, 28) or (N, 1, 26, 26), to logits (N, 10)."""
        # Convolution, ReLU, max-pool. Since max(relu(a), relu(b)) = relu(max(a, b)), the
        # ReLU may come after the pooling, where it has a quarter of the work.
        x = F.relu(self.pool1(self.conv1(x)))  # (N, 24, 13, 13)
        x = F.relu(self.pool2(self.conv2(x)))  # (N, 36, 5, 5)
        x = self.relu(self.fc1(self.flatten(x)))  # (N, 900) -> (N, 128)
        return self.fc2(x)


class FullyConnectedModel(nn.Module):
    """The baseline: every pixel to every one of 128 units; 101,770 parameters."""

    seen = 28  # rows and columns of the image that the model looks at

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.relu(self.fc1(self.flatten(x)))  # (N, 784) -> (N, 128)
        return self.fc2(x)


MODELS = {"cnn": CNN, "fc": FullyConnectedModel}


# ===== Data ===========================================================================

MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]


def load_mnist(data_dir):
    """Return MNIST: train images, train labels, test images, test labels.

    uint8 (60000, 28, 28), int64 (60000,), uint8 (10000, 28, 28), int64 (10000,), from the
    four archives in `data_dir`/MNIST/raw. Raises InputError; see gather_archives.
    """
    # Unpacked anew each time, so that nothing half unpacked or read-only is in the way.
    with tempfile.TemporaryDirectory(prefix="mnist-") as scratch:
        gather_archives(data_dir, scratch)
        train, test = MNIST(scratch, train=True), MNIST(scratch, train=False)
    return train.data, train.targets, test.data, test.targets


def prepare(images, model):
    """Return uint8 images (N, 28, 28) as normalised floats (N, 1, seen, seen)."""
    x = images[:, None, : model.seen, : model.seen].float()
    return x.sub_(255 * MEAN).div_(255 * STD)


def make_batches(images, labels, batch_size, order, model):
    """Yield prepared images and labels, a batch at a time, in the order of the indices."""
    batches = order.split(batch_size)
    for first in range(0, len(batches), 16):  # to prepare 16 at once takes less time
        sizes = [len(batch) for batch in batches[first : first + 16]]
        chosen = torch.cat(batches[first : first + 16])
        prepared = prepare(images.index_select(0, chosen), model).split(sizes)
        yield from zip(prepared, labels.index_select(0, chosen).split(sizes))


# ===== Training and evaluation ========================================================


def train_epoch(model, batches, loss_function, optimizer, on_step):
    """Train the model on every batch once; return (mean loss, accuracy) on the way.

    `batches` yields images (N, 1, H, W) and labels (N,). After every step
    on_step(loss) is called with the batch's mean loss, a tensor on the device.
    """
    model.train()
    loss_sum = correct = count = 0
    for images, labels in batches:
        logits = model(images)  # forward: (N, 10)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # update

        # The sums stay on the device: reading a number would wait for it, every step.
        loss = loss.detach()
        loss_sum += loss * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
        on_step(loss)
    return float(loss_sum) / count, int(correct) / count


@torch.no_grad()
def evaluate(model, batches, loss_function=F.cross_entropy):
    """Return the model's (mean loss, accuracy) over all images of `batches`.

    `batches` yields images and labels, as a DataLoader does; `loss_function` returns a
    batch's mean loss; every image weighs the same. The model is left in the mode,
    training or evaluation, that it was in. ValueError if there are no images.
    """
    was_training = model.training
    model.eval()
    loss_sum = correct = count = 0
    for images, labels in batches:
        logits = model(images)
        loss_sum += loss_function(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
    model.train(was_training)
    if not count:
        raise ValueError("evaluate() was given no images")
    return float(loss_sum) / count, int(correct) / count


# ===== The accurate recipe ============================================================
# What it adds to the loop above: a learning rate that rises and falls, digits that are
# never twice the same, and a test that looks at each digit from nine places. What was
# chosen, and how, on 5,000 training images that were held out, is in tests/README.md.

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-4}  # Adam has none of it
LABEL_SMOOTHING = 0.05  # Szegedy et al. 2016, arXiv:1512.00567
TURN, STRETCH, SHIFT = 5, 0.1, 2  # at most: degrees, a share of the size, pixels


def one_cycle(batches, steps, optimizer, peak):
    """Yield the batches, and before each set the learning rate of its step.

    `steps`: those to go of all. For the first 30 % of all the rate rises evenly from 0 to
    `peak`, then it falls evenly to 0 (Smith 2018, arXiv:1803.09820).
    """
    for step, batch in zip(steps, batches):
        progress = (step + 0.5) / steps.stop
        for group in optimizer.param_groups:
            group["lr"] = peak * min(progress / 0.3, (1 - progress) / 0.7)
        yield batch


def draw_warps(count, generator):
    """Return random affine maps (count, 2, 3), for F.affine_grid, from the generator.

    Rotation, shear, scale and shift: Simard et al. 2003, doi:10.1109/ICDAR.2003.1227801.
    """
    turn, shear, width, height, x, y = 2 * torch.rand(6, count, generator=generator) - 1
    turn, shear = math.radians(TURN) * turn, math.radians(TURN) * shear
    width, height = 1 + STRETCH * width, 1 + STRETCH * height
    cos, sin, x, y = turn.cos(), turn.sin(), x * SHIFT / 14, y * SHIFT / 14
    top = torch.stack([width * cos, shear * cos - height * sin, x], dim=1)
    bottom = torch.stack([width * sin, shear * sin + height * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1)


def warp(batches, maps, size):
    """Yield the batches, each image (1, 28, 28) warped by its map: (1, size, size)."""
    zoom = torch.tensor([size / 28, size / 28, 1], device=maps[0].device)
    for (images, labels), chosen in zip(batches, maps):
        if len(images):  # with torchrun, a process may have none of a batch
            shape = len(images), 1, size, size
            grid = F.affine_grid(chosen * zoom, shape, align_corners=False)
            options = {"padding_mode": "border", "align_corners": False}
            images = F.grid_sample(images, grid, **options)
        yield images, labels


class ShiftAverage(nn.Module):
    """A model's mean opinion of an image and of the image shifted by a pixel: 9 views."""

    seen = 28

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        size = self.model.seen
        x = F.pad(x, [(size - 26) // 2] * 4, value=-MEAN / STD)  # size + 2; black
        views = [x[..., i : i + size, j : j + size] for i in range(3) for j in range(3)]
        return torch.stack([self.model(view) for view in views]).mean(dim=0)


# ===== The loss while it falls ========================================================
# From here on: what shows, tracks and keeps the above. Read it when you need it.

WENT_WRONG = "training went wrong (try a smaller --lr):"
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"  # told apart by all eyes


class LossHistory:
    """Exponentially smoothed values: the first one raw, then a * last + (1 - a) * value.

    The interface and the numbers of LossHistory in mitdeeplearning.util 0.7.5.
    """

    def __init__(self, smoothing_factor=0.0):
        self.smoothing_factor = smoothing_factor
        self.loss = []

    def append(self, value):
        """Add a value."""
        if self.loss:
            a = self.smoothing_factor
            value = a * self.loss[-1] + (1 - a) * value
        self.loss.append(value)

    def get(self):
        """Return the smoothed values, oldest first."""
        return self.loss


class PeriodicPlotter:
    """Draws a growing curve into the PNG file `path`, no more often than every `sec` s.

    The interface of mitdeeplearning.util 0.7.5. `scale` is None, semilogx, semilogy or
    loglog; else ValueError.
    """

    def __init__(self, sec, xlabel="", ylabel="", scale=None, path=None):
        if scale not in (None, "semilogx", "semilogy", "loglog"):
            raise ValueError(f"unrecognized parameter scale {scale!r}")
        self.sec, self.path = sec, path
        self.figure = Figure(figsize=(7, 4))
        place = {"left": 0.11, "right": 0.98, "bottom": 0.13, "top": 0.97}
        self.axes = self.figure.subplots(gridspec_kw=place)
        self.axes.set(xlabel=xlabel, ylabel=ylabel)
        self.axes.set_xscale("log" if scale in ("semilogx", "loglog") else "linear")
        self.axes.set_yscale("log" if scale in ("semilogy", "loglog") else "linear")
        self.axes.grid(which="both", alpha=0.3)
        y = self.axes.yaxis
        y.set_major_formatter("{x:g}")
        y.set_minor_formatter(self.label)
        (self.curve,) = self.axes.plot([], [], color=BLUE, linewidth=1.2)
        self.drawn = time.monotonic()

    def label(self, value, _):
        """Return the label of a minor tick: of all, if they span less than a decade."""
        low, high = self.axes.get_ylim()
        return f"{value:g}" if high < 10 * low or f"{value:e}"[0] in "25" else ""

    def plot(self, data):
        """Draw if it is time: return the picture (PNG, bytes), else None."""
        if time.monotonic() - self.drawn >= self.sec:
            return self.draw(data)

    def draw(self, data):
        """Draw now, up to the last point: return the picture (PNG, bytes)."""
        self.curve.set_data(range(1, len(data) + 1), data)
        self.axes.relim()
        self.axes.autoscale_view()
        png = save_picture(self.figure, self.path)
        self.drawn = time.monotonic()
        return png


class Monitor:
    """Shows the losses: bar, curve, Comet. They wait on the device for 0.2 s at a time."""

    def __init__(self, losses, png, tracker):
        self.losses = losses  # a list: of every step since the first epoch
        self.smoothed = LossHistory(smoothing_factor=0.95)
        for loss in losses:
            self.smoothed.append(loss)
        self.plotter = PeriodicPlotter(2, "iteration", "smoothed loss", "semilogy", png)
        self.tracker = tracker
        self.bar = None  # a tqdm, a new one each epoch
        self.waiting, self.shown = [], time.monotonic()

    def step(self, loss):
        """Take the loss of one step, a tensor on any device."""
        self.waiting.append(loss)
        if time.monotonic() - self.shown >= 0.2:
            self.show()

    def show(self):
        """Show every step so far. Raises FloatingPointError if a loss is not finite."""
        values = torch.stack(self.waiting).tolist() if self.waiting else []
        self.waiting.clear()
        finite = list(takewhile(math.isfinite, values))
        for value in finite:
            self.losses.append(value)
            self.smoothed.append(value)
        if finite:
            smoothed, step = self.smoothed.get(), len(self.losses)
            self.bar.set_postfix(loss=f"{smoothed[-1]:.4f}", refresh=False)
            self.bar.update(len(finite))
            self.tracker.log_losses(finite, step)
            if png := self.plotter.plot(smoothed):
                self.tracker.log("log_image", png, name="loss_curve", step=step)
        if len(finite) < len(values):
            raise FloatingPointError(f"{WENT_WRONG} the loss is {values[len(finite)]}")
        self.shown = time.monotonic()


class Silence(Monitor):
    """What the other processes of torchrun have instead: it shows nothing."""

    def __init__(self):
        self.bar, self.tracker = None, Tracker("off", None)

    def step(self, loss):
        """Take the loss of one step."""

    def show(self):
        """Show nothing."""


# ===== Pictures =======================================================================


def show_digit(axes, image, probabilities, label, x=0, y=0):
    """Show a digit (28, 28), its first corner at (x, y), and what the network says of it.

    Sign, frame and colour tell whether that is right. Return the colour.
    """
    digit, percent = int(probabilities.argmax()), 100 * probabilities.max()
    right = digit == label
    colour, sign = (BLUE, "✓") if right else (VERMILION, "✗")
    text = f"{sign} predicted {digit} ({percent:.1f} %)\ntrue label {label}"
    axes.text(x + 14, y - 1, text, color=colour, ha="center", va="bottom")
    axes.imshow(image, "gray", vmin=0, vmax=255, extent=(x, x + 28, y + 28, y))
    frame = {"color": colour, "linewidth": 1 if right else 4}  # points
    axes.add_patch(Rectangle((x, y), 28, 28, fill=False, clip_on=False, **frame))
    axes.axis("off")
    return colour


def draw_digits(images, probabilities, labels, rows, columns, title=""):
    """Return a Figure: digits (N, 28, 28) with prediction, probability and true label."""
    # In one Axes, in pixels of MNIST: to make one for each digit takes much longer.
    across, down, top = 31, 36, 12 if title else 7
    width, height = across * columns, down * rows + top - 6
    figure = Figure(figsize=(width / 14, height / 14))
    axes = figure.add_axes((0, 0, 1, 1))
    cells = np.ndindex(rows, columns)
    for (row, column), *digit in zip(cells, images, probabilities, labels):
        show_digit(axes, *digit, across * column, down * row)
    axes.set(xlim=(-1.5, width - 1.5), ylim=(height - top, -top))
    axes.text(width / 2 - 1.5, 1 - top, title, ha="center", va="top", fontsize=12)
    return figure


def draw_bars(axes, probabilities, colour):
    """Draw ten probabilities as a bar chart, the largest in the colour."""
    percent = [100 * float(p) for p in probabilities]
    bars = axes.bar(range(10), percent, color=GREY)
    bars[probabilities.argmax()].set(color=colour)
    axes.bar_label(bars, [f"{p:.1f}" for p in percent], fontsize=8)
    axes.set(xlabel="digit", ylabel="probability (%)", xticks=range(10), ylim=(0, 112))


def draw_detail(image, probabilities, label):
    """Return a Figure: a digit (28, 28) beside a bar chart of its ten probabilities."""
    figure = Figure(figsize=(8, 3.6))
    left, chart = figure.subplots(1, 2, width_ratios=(1, 1.6))
    figure.subplots_adjust(0.01, 0.14, 0.99, 0.86, 0.19)  # a layout engine is slower
    draw_bars(chart, probabilities, show_digit(left, image, probabilities, label))
    return figure


def draw_confusion(matrix):
    """Return a Figure: how many of each digit (row) are read as which (column)."""
    counts = torch.tensor(matrix)  # (10, 10)
    wrong = counts - counts.diag().diag()  # the colours are for these alone
    figure = Figure(figsize=(6.7, 6))
    axes = figure.subplots()
    figure.subplots_adjust(0.18, 0.08, 0.99, 0.99)
    axes.imshow(wrong.numpy(), cmap="Oranges", vmax=max(1, 2 * int(wrong.max())))
    for row, column in np.ndindex(10, 10):
        style = {"color": BLUE, "weight": "bold"} if row == column else {}
        count = int(counts[row, column])
        axes.text(column, row, count or "·", ha="center", va="center", **style)
    share = (100 * counts.diag() / counts.sum(dim=1)).tolist()
    axes.set(xlabel="predicted", ylabel="true label, and how many of it are read right")
    axes.set(xticks=range(10), yticks=range(10))
    axes.set_yticklabels([f"{p:.1f} %   {digit}" for digit, p in enumerate(share)])
    return figure


def calibration_error(probabilities, labels, bins=15):
    """Return how far confidence and accuracy are apart, from 0 to 1.

    In `bins` equal intervals of confidence; their mean, weighted by the images in each
    (expected calibration error: Guo et al. 2017, arXiv:1706.04599).
    """
    confidence, digits = probabilities.max(dim=1)
    number = (confidence * bins).long().clamp(max=bins - 1)
    excess = confidence - (digits == labels).float()
    gaps = torch.zeros(bins, device=labels.device).index_add(0, number, excess)
    return float(gaps.abs().sum()) / len(labels)


# ===== Files ==========================================================================


def is_sound(archive, md5):
    """Tell whether a file can be read and has the MD5 sum that it should have."""
    with contextlib.suppress(OSError):
        return check_integrity(archive, md5)
    return False


def gather_archives(data_dir, scratch):
    """Put MNIST into `scratch`, unpacked, from `data_dir`.

    What is missing or damaged there is taken from beside this script, or from
    torchvision's mirrors, and put there; if that fails too, InputError.
    """
    raw, unpacked = Path(data_dir, "MNIST", "raw"), Path(scratch, "MNIST", "raw")
    bundled = Path(__file__).resolve().parent / "data" / "MNIST" / "raw"
    unpacked.mkdir(parents=True)
    faulty = [name for name, md5 in MNIST.resources if not is_sound(raw / name, md5)]
    for name, md5 in MNIST.resources:
        source = bundled / name if name in faulty else raw / name
        if name not in faulty or is_sound(source, md5):
            shutil.copyfile(source, unpacked / name)
    if len(os.listdir(unpacked)) < len(MNIST.resources):
        print("MNIST is incomplete: trying torchvision's mirrors", file=sys.stderr)
    socket.setdefaulttimeout(20)  # seconds: a silent mirror must not hang the run
    try:
        MNIST(scratch, train=False, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        sizes = 9_912_422, 28_881, 1_648_877, 4_542  # bytes, of MNIST.resources
        for (name, md5), size in zip(MNIST.resources, sizes):
            if not is_sound(unpacked / name, md5):
                lost = f"{raw / name} is missing or damaged, and no mirror answers"
                wanted = f"put there the file of {size:,} bytes with MD5 sum {md5}"
                raise InputError(f"{lost}; {wanted}") from None
        raise UserError(f"cannot unpack MNIST in {scratch}: {error}") from None
    note = f"{', '.join(faulty)} in {raw}: missing or damaged"
    try:
        for name in faulty:
            raw.mkdir(parents=True, exist_ok=True)
            write_file(raw / name, (unpacked / name).read_bytes())
        if faulty:
            print(f"{note}; put the original there", file=sys.stderr)
    except (OSError, UserError):
        print(f"{note}; took the original from elsewhere", file=sys.stderr)


def write_file(path, data):
    """Write bytes to `path`, whole or not at all. Raises UserError."""
    beside = Path(f"{path}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def save_picture(figure, path=None):
    """Return a Figure as PNG (bytes), written to `path` if there is one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    if path:
        write_file(path, buffer.getvalue())
    return buffer.getvalue()


def save_tensors(path, values):
    """Write tensors, and plain values beside them, for load_tensors."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_file(path, buffer.getvalue())


def load_tensors(path):
    """Return what save_tensors wrote. Raises InputError if `path` is anything else.

    The file may come from anywhere. weights_only keeps it from running code; that it is
    plain tensors, not compressed, keeps it from taking more memory than its size.
    """
    allowed = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    allowed |= {f"torch {kind}Storage" for kind in ("Float", "Byte", "Long")}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type or e.file_size > 2**27 for e in entries):
                raise ValueError("compressed, or too large")
            if damaged := archive.testzip():
                raise ValueError(f"bad check sum of {damaged}")
            (pickled,) = [e for e in entries if e.filename.endswith("/data.pkl")]
            for code, argument, _ in pickletools.genops(archive.read(pickled)):
                if "GLOBAL" in code.name and argument not in allowed:
                    raise ValueError(f"it holds {argument or 'more than tensors'}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        message = f"{path} is damaged, or none of ours: {error!r:.200}"
        raise InputError(message) from None


# ===== Tracking =======================================================================

COMET_DEFAULTS = {  # of Comet's own variables; what the user has set wins
    "COMET_DISABLE_AUTO_LOGGING": "1",  # we log what we mean to, no more
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_ERROR_TRACKING_ENABLE": "0",
    "COMET_TIMEOUT_HTTP": "5",  # seconds, as are the next two
    "COMET_TIMEOUT_API": "5",
    "COMET_TIMEOUT_FILE_UPLOAD": "5",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
    # No archive by Comet itself: it would lack what a server has refused.
    "COMET_FALLBACK_STREAMER_FALLBACK_TO_OFFLINE_MIN_BACKEND_VERSION": "9999.0.0",
}
NO_KEY = (None, "", "YOUR_API_KEY_HERE")


class Tracker:
    """Tells Comet of the run; never holds it up for long, never makes it fail.

    Every event goes into a record. Online, a thread sends it as well. Unless the server
    took all of them, and offline always, the record becomes an archive, KEY.zip.
    """

    def __init__(self, mode, folder, key=None):
        """Start; `key`: of an experiment to go on with. UserError if it can't be online."""
        self.folder, self.key, self.resumed = folder, key or uuid.uuid4().hex, bool(key)
        self.record = []  # (milliseconds since 1970, method of an experiment, arguments)
        self.comet = self.outbox = self.url = self.trouble = None
        self.under_way = set()
        self.state = mode if mode == "off" else "offline"
        if mode == "off":
            return
        for name, value in COMET_DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            import comet_ml

            api_key = comet_ml.get_config("comet.api_key") or COMET_API_KEY
        except Exception as error:  # noqa: BLE001, not installed or badly configured
            self.state = f"off, comet_ml does not load ({type(error).__name__})"
            if mode != "auto":
                raise UserError(f"--comet {mode}: {self.state}") from None
            return
        self.comet = comet_ml
        if mode == "online" and api_key in NO_KEY:
            raise InputError("--comet online: there is no API key; set COMET_API_KEY")
        if mode == "offline" or api_key in NO_KEY:
            return
        self.outbox = queue.SimpleQueue()  # of the events to send
        self.started, self.finished = threading.Event(), threading.Event()
        threading.Thread(target=self.send, args=(api_key,), daemon=True).start()
        self.started.wait(20 if mode == "online" else 4)  # seconds
        trouble = self.trouble or "Comet does not answer"
        if mode == "online" and not self.url:
            wrong = InputError if "API key" in trouble else UserError
            raise wrong(f"--comet online: {trouble}; or take --comet offline")
        self.state = self.url or f"{trouble}; the run is kept for a later upload"

    def log(self, method, *arguments, live=True, **named):
        """Have a method of the experiment called. This neither waits nor fails."""
        if self.comet:
            event = (round(time.time() * 1000), method, arguments, named)
            self.record.append(event)
            if self.outbox and live:
                self.outbox.put(event)

    def log_losses(self, losses, last_step, live=True):
        """Log the losses of the steps up to `last_step`."""
        # Comet takes 12,000 values a minute: online we send 10 a call, the last included.
        thin = math.ceil(len(losses) / 10)
        for step, loss in enumerate(losses, last_step - len(losses) + 1):
            sent = live and (last_step - step) % thin == 0
            self.log("log_metric", "loss", loss, step=step, live=sent)

    def finish(self):
        """End the experiment; return its address, or the command that uploads it."""
        if not self.comet:
            return None
        if self.outbox:
            self.outbox.put(None)
            if self.finished.wait(10) and self.url and not self.trouble:  # seconds
                return self.url
            # Some of it may be there: the archive becomes an experiment of its own.
            self.resumed, self.key = False, uuid.uuid4().hex
        messages, path = self.comet.messages, self.folder / f"{self.key}.zip"
        self.comet.config.set_global_experiment(None)  # forget one that hangs
        with tempfile.TemporaryDirectory(prefix="comet-") as scratch:
            experiment = self.start({"offline_directory": scratch}, online=False)
            experiment.streamer.queue_timeout = 0.05  # seconds: end() waits for it
            clock = messages.local_timestamp
            for event in self.record:
                # Let Comet show when it happened, not when it was written down.
                messages.local_timestamp = lambda event=event: event[0]
                self.call(experiment, *event)
            messages.local_timestamp = clock
            experiment.end()
            (archive,) = Path(scratch).glob("*.zip")
            write_file(path, archive.read_bytes())
        return f"comet upload {path}"

    def start(self, config, **named):
        """Start an experiment that logs nothing by itself."""
        off = "log_code log_graph log_git_metadata log_git_patch log_env_details parse_args"
        config |= dict.fromkeys(off.split(), False) | {"display_summary_level": 0}
        named |= {"project_name": COMET_PROJECT, "experiment_key": self.key}
        named["mode"] = "get_or_create" if self.resumed else "create"
        config = self.comet.ExperimentConfig(**config)
        return self.comet.start(experiment_config=config, **named)

    def call(self, experiment, _, method, arguments, named):
        """Call the method of the experiment that an event names."""
        if method == "log_image":
            arguments = [io.BytesIO(*arguments)]
        named = dict(named)
        for name in named.keys() & {"step", "epoch"}:
            # As an argument it would be logged as a parameter too, time and again.
            setattr(experiment, f"curr_{name}", named.pop(name))
        getattr(experiment, method)(*arguments, **named)

    def send(self, api_key):
        """Send what comes into the outbox, until None comes. Runs in a thread."""
        try:
            self.watch()
            experiment = self.start({}, online=True, api_key=api_key)
            if experiment.alive:
                self.url, self.trouble = experiment.url, None  # 404 was: new here
                self.started.set()
                while event := self.outbox.get():
                    self.call(experiment, *event)
                experiment.end()
                while self.under_way:
                    time.sleep(0.1)
        except Exception as error:  # noqa: BLE001, its text may have the key in it
            self.trouble = self.trouble or f"Comet failed ({type(error).__name__})"
        finally:
            self.started.set()
            self.finished.set()

    def watch(self):
        """Note what the server does not take: comet_ml has no call that tells."""
        import requests

        send = requests.Session.send

        def watched(session, request, **named):
            self.under_way.add(request)
            try:
                response = send(session, request, **named)
                if response.status_code >= 400:
                    refused = response.status_code == 401 or "90212" in response.text
                    answer = f"answers with status {response.status_code}"
                    answer = "refuses the API key" if refused else answer
                    self.trouble = self.trouble or f"Comet {answer}"
                return response
            except requests.RequestException:
                self.trouble = self.trouble or "Comet does not answer"
                raise
            finally:
                self.under_way.discard(request)

        requests.Session.send = watched


# ===== Several processes ==============================================================
# torchrun --nproc-per-node=2 main.py: every process trains on its share of each batch. It
# stays the same experiment: the same batches, and, but for rounding, the same weights.


def launched():
    """Tell whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def name_launcher():
    """Return what tells this torchrun from others: the same after a restart; or None."""
    return f"{platform.node()} {os.getppid()}" if launched() else None


@contextlib.contextmanager
def name_loss():
    """Raise UserError where PyTorch finds that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        time.sleep(1)  # a signal that comes with it says more
        raise UserError(f"another process is gone ({error!r:.100})") from None


class Team:
    """The processes that torchrun has started; this is one of them."""

    def __init__(self, settings):
        """Join the others. Raises InputError."""
        device, self.size = settings["device"], int(os.environ["WORLD_SIZE"])
        if device == "mps":
            raise InputError("--device mps: torchrun needs cuda or cpu")
        if settings["batch_size"] < self.size:
            raise InputError(f"--batch-size must be {self.size} or more: the processes")
        gpu = device != "cpu" and torch.cuda.is_available()
        number = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", number) if gpu else torch.device("cpu")
        # As long as the first process may need to download MNIST; a process that is
        # killed is seen at once.
        wait = timedelta(minutes=10)
        store, self.rank, _ = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it restarts us: read no address of before.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        named = {"store": store, "rank": self.rank, "world_size": self.size}
        dist.init_process_group("nccl" if gpu else "gloo", timeout=wait, **named)
        self.shares, self.part = iter(()), 1.0

    def share(self, count, batch_size):
        """Return which of `count` places are ours, and how many of them in each batch."""
        batches = torch.arange(count).split(batch_size)
        ours = [batch.tensor_split(self.size)[self.rank] for batch in batches]
        sizes = [len(our) for our in ours]
        self.shares = iter([n / len(batch) for n, batch in zip(sizes, batches)])
        self.part = next(self.shares)  # of the batch under way
        self.whole = sum(sizes) / count
        return torch.cat(ours), sizes

    def make_loss(self, smoothing):
        """Return cross_entropy, that of no images being 0: our share may be empty."""

        def loss_function(logits, labels):
            named = {"label_smoothing": smoothing, "reduction": "sum"}
            return F.cross_entropy(logits, labels, **named) / max(1, len(labels))

        return loss_function

    def wrap(self, model):
        """Return the model as one that adds up its gradients over all processes."""
        model = nn.parallel.DistributedDataParallel(model)
        model.register_comm_hook(self, add_gradients)
        return model

    def average(self, *numbers):
        """Return the means over all images of numbers that are means over our share."""
        ours = torch.tensor(numbers, dtype=torch.float64) * self.whole
        return self.add(ours.to(self.device)).tolist()

    def add_loss(self, loss):
        """Return the mean loss of the whole batch, given that of our share of it."""
        loss = loss * self.part
        self.part = next(self.shares, 1.0)
        return self.add(loss)

    def add(self, tensor):
        """Return the sum of all processes' tensors."""
        dist.all_reduce(tensor)
        return tensor

    @name_loss()
    def broadcast(self, value):
        """Return the first process's value."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]


def add_gradients(team, bucket):
    """Add the processes' mean gradients, each weighted by its part of the batch."""
    gradients = bucket.buffer().mul_(team.part)
    future = dist.all_reduce(gradients, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


# ===== The run ========================================================================

RULE = "=" * 70
PER_EPOCH = ("train_accuracy", "train_loss", "epoch_seconds")  # a number for each epoch


def select_device(name="auto"):
    """Return the torch.device of that name; "auto": the best there is. InputError if none."""
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    if name == "auto":
        name = "mps" if mps else "cuda" if cuda else "cpu"
    if (name == "mps" and not mps) or (name == "cuda" and not cuda):
        raise InputError(f"--device {name}: PyTorch finds none here; use auto or cpu")
    return torch.device(name)


@torch.no_grad()
def check_layers(model):
    """Return the model, ready to look at all 28x28 pixels if edited layers need them.

    Raises InputError if the layers do not fit each other.
    """
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    wrong = f"{type(model).__name__} makes no 10 logits of an image of 28x28 pixels"
    try:
        logits = model.eval()(images)
    except RuntimeError as error:
        raise InputError(f"{wrong}: do its layers fit? {error}") from None
    if logits.shape != (2, 10):
        raise InputError(f"{wrong}, but {tuple(logits.shape[1:])}")
    try:
        part = model(images[..., : model.seen, : model.seen])
        same = torch.allclose(part, logits, atol=1e-4)
    except RuntimeError:
        same = False
    model.seen = model.seen if same else 28
    return model


def collect_garbage():
    """Let Python collect garbage from now on, but never in what was imported by now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def keep_freed_memory():
    """Have glibc keep freed memory: to fault it in again takes a third of every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc, no need
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: in bytes
            ctypes.CDLL(None).mallopt(threshold, 2**30)


class Run:
    """One training run: its settings, its folder, its state, its checkpoints."""

    def __init__(self, settings, folder, team=None):
        """Load the data and make the model. `settings`: as read_settings returns them.

        `folder` is None for a process of the `team` that is not the first one.
        """
        self.settings = {name: settings[name] for name in FLAGS}
        self.folder, self.team = folder, team
        self.device = team.device if team else select_device(settings["device"])
        images, labels, *test = load_mnist(settings["data_dir"])
        self.test_images, self.test_labels = (tensor.to(self.device) for tensor in test)
        torch.manual_seed(settings["seed"])
        self.model = check_layers(MODELS[settings["model"]]())
        self.accurate = settings["recipe"] == "accurate"
        self.predictor = ShiftAverage(self.model) if self.accurate else self.model
        self.generator = torch.Generator().manual_seed(settings["seed"])
        self.progress = {name: [] for name in (*PER_EPOCH, "losses")}
        # Bytes, on the device, and only the pixels that are seen: a step has less to move.
        limit, seen = settings["limit"] or None, self.predictor.seen
        self.images = images[:limit, :seen, :seen].contiguous().to(self.device)
        self.labels = labels[:limit].to(self.device)
        self.steps = math.ceil(len(self.labels) / settings["batch_size"])
        self.comet_key = None
        self.model.to(self.device)
        if self.device.type == "cpu":  # whose convolutions like the channels last
            self.model.to(memory_format=torch.channels_last)
        parameters, lr = self.model.parameters(), settings["lr"]
        if settings["optimizer"] == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr=lr)
        else:
            options = SGD if self.accurate else {}
            self.optimizer = torch.optim.SGD(parameters, lr=lr, **options)
        if settings["resume"]:
            self.load_checkpoint()
        self.trained = self.model
        if team:
            state = self.progress, self.model.state_dict(), self.optimizer.state_dict()
            state = team.broadcast((*state, self.generator.get_state()))
            self.progress, weights, optimizer, generator = state
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(optimizer)
            self.generator.set_state(generator)
            self.trained = team.wrap(self.model)
        packages = "torch", "torchvision", "numpy", "matplotlib", "comet-ml"
        flags = [f"{flag_of(name)}={value}" for name, value in self.settings.items()]
        self.config = {  # all that it takes to repeat the run
            "settings": self.settings,
            "command": shlex.join(["python", "main.py", *flags]),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": team.size if team else 1,
            "platform": f"{platform.platform()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in packages},
            "data_md5": dict(MNIST.resources),
            "launcher": name_launcher(),
        }
        if folder:
            config = json.dumps(self.config, indent=2)
            write_file(folder / "config.json", config.encode())

    def save_checkpoint(self):
        """Write checkpoint.pt, from which load_checkpoint goes on."""
        checkpoint = {
            "settings": self.settings,
            "progress": self.progress,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "generator": self.generator.get_state(),
            "comet_key": self.comet_key,
        }
        save_tensors(self.folder / "checkpoint.pt", checkpoint)

    def load_checkpoint(self):
        """Put the state in checkpoint.pt back. Raises InputError if it isn't this run's."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            raise InputError(f"{path} is missing: nothing was trained; start a new run")
        saved = load_tensors(path)
        try:
            for name in FLAGS.keys() - RESUMABLE:
                one, other = saved["settings"][name], self.settings[name]
                if type(one) is not type(other) or one != other:
                    raise ValueError("config.json has other settings")
            numbers = {name: saved["progress"][name] for name in self.progress}
            epochs, *lengths = (len(values) for values in numbers.values())
            tensors = any(map(torch.is_tensor, numbers.values()))  # they may be huge
            if tensors or lengths != [epochs, epochs, epochs * self.steps]:
                raise ValueError("its numbers are not one an epoch or step")
            if not math.isfinite(sum(map(sum, numbers.values()))):
                raise ValueError("its numbers are not finite")
            now = self.model.state_dict()
            if get_shapes({0: saved["model"]}) != get_shapes({0: now}):
                raise ValueError("its network has other layers than main.py now")
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)  # so that this step shows
            self.optimizer.step()  # what state to expect, and no more
            expected, state = self.optimizer.state_dict(), saved["optimizer"]
            known = get_shapes(expected["state"] if epochs else {})
            if not isinstance(state, dict) or get_shapes(state) != known:
                raise ValueError("it has another optimizer")
            steps = [values["step"] for values in state.values() if "step" in values]
            if not all(0 < step <= epochs * self.steps for step in steps):  # of Adam
                raise ValueError("its optimizer has taken other steps")
            for name, values in numbers.items():
                self.progress[name] = [float(value) for value in values]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict({**expected, "state": state})
            self.generator.set_state(saved["generator"])
            self.comet_key = uuid.UUID(hex=saved["comet_key"]).hex
        except Exception as error:  # noqa: BLE001, a made-up file can raise anything
            raise InputError(f"{path} is not of this run ({error!r:.200})") from None
        if epochs > (wanted := self.settings["epochs"]):
            raise InputError(f"--epochs {wanted}: the run to resume has done {epochs}")

    def make_epoch(self, epoch):
        """Return the batches of an epoch, counted from 1, by settings and recipe."""
        sizes, count = self.settings["batch_size"], len(self.labels)
        order = torch.randperm(count, generator=self.generator)
        maps = draw_warps(count, self.generator) if self.accurate else None
        if self.team:
            ours, sizes = self.team.share(count, sizes)
            order, maps = order[ours], maps[ours] if self.accurate else None
        order = order.to(self.device)
        batches = make_batches(self.images, self.labels, sizes, order, self.predictor)
        if self.accurate:
            maps = maps.to(self.device).split(sizes)
            batches = warp(batches, maps, self.model.seen)
            steps = range(
                (epoch - 1) * self.steps, self.settings["epochs"] * self.steps
            )
            batches = one_cycle(batches, steps, self.optimizer, self.settings["lr"])
        return batches

    @name_loss()
    def train(self, monitor):
        """Train the epochs that are missing: a line and a checkpoint for each."""
        epochs, team, on_step = self.settings["epochs"], self.team, monitor.step
        smoothing = LABEL_SMOOTHING if self.accurate else 0
        loss_function = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if team:
            loss_function = team.make_loss(smoothing)
            on_step = lambda loss: monitor.step(team.add_loss(loss))
        collect_garbage()
        keep_freed_memory()
        for epoch in range(len(self.progress["train_loss"]) + 1, epochs + 1):
            start = time.perf_counter()
            # For layers that draw at random, as dropout does: a resumed run draws the same,
            # and another seed never does (there are at most 10,000 epochs).
            torch.manual_seed(10_001 * self.settings["seed"] + epoch)
            batches = self.make_epoch(epoch)
            task = self.trained, batches, loss_function, self.optimizer, on_step
            with tqdm(total=self.steps, disable=not self.folder) as monitor.bar:
                loss, accuracy = train_epoch(*task)
                monitor.show()
            if team:
                loss, accuracy = team.average(loss, accuracy)
            if not all(p.isfinite().all() for p in self.model.parameters()):
                raise FloatingPointError(f"{WENT_WRONG} a weight is not finite")
            numbers = accuracy, loss, time.perf_counter() - start
            for name, number in zip(PER_EPOCH, numbers):
                self.progress[name].append(number)
            if self.folder:
                self.save_checkpoint()
            print(f"Epoch {epoch}/{epochs}, Accuracy: {accuracy:.4f}")
            self.log_epoch(epoch, numbers, monitor.tracker)

    def log_epoch(self, epoch, numbers, tracker, live=True):
        """Tell Comet the numbers PER_EPOCH of an epoch, counted from 1."""
        step, metrics = epoch * self.steps, dict(zip(PER_EPOCH, numbers))
        tracker.log("log_metrics", metrics, step=step, epoch=epoch, live=live)

    def introduce(self, tracker, study):
        """Tell Comet what the run is, and, if it was resumed, what it has done."""
        tracker.log("set_name", self.folder.name)
        if study != self.folder:
            tracker.log("add_tag", study.name)
        tracker.log("log_parameters", self.settings)
        tracker.log("set_model_graph", str(self.model))
        losses, *epochs = (self.progress[name] for name in ("losses", *PER_EPOCH))
        tracker.log_losses(losses, len(losses), live=False)
        for epoch, numbers in enumerate(zip(*epochs), 1):
            self.log_epoch(epoch, numbers, tracker, live=False)

    @name_loss()
    @torch.no_grad()
    def predict(self, count=None):
        """Return the logits (N, 10) of the first `count` test images; None: of all."""
        self.model.eval()
        order = torch.arange(len(self.test_labels[:count]), device=self.device)
        logits = torch.zeros(len(order), 10, device=self.device)
        shared = self.team and count is None  # each process takes its part, once
        ours = order.tensor_split(self.team.size)[self.team.rank] if shared else order
        test = self.test_images, self.test_labels, 250, ours, self.predictor
        for chosen, (images, _) in zip(ours.split(250), make_batches(*test)):
            logits[chosen] = self.predictor(images)
        return self.team.add(logits) if shared else logits

    def test(self, logits):
        """Return the results on all the test images, given their logits; print them."""
        labels = self.test_labels
        loss, accuracy = evaluate(nn.Identity(), [(logits, labels)])
        if not math.isfinite(loss):
            raise FloatingPointError(f"{WENT_WRONG} the test loss is {loss}")
        print(f"Test Accuracy: {accuracy:.4f}\nTest Loss: {loss:.4f}\n")
        digits = logits.argmax(dim=1)
        print(f"Single Image Prediction: {digits[0]}, Actual Label: {labels[0]}")
        confusion = torch.bincount(10 * labels + digits, minlength=100).view(10, 10)
        return {
            "test_accuracy": accuracy,
            "test_loss": loss,
            "calibration_error": calibration_error(logits.softmax(dim=1), labels),
            "digit_accuracy": (confusion.diag() / confusion.sum(dim=1)).tolist(),
            "confusion_matrix": confusion.tolist(),
        }

    def keep(self, monitor, logits, results):
        """Write pictures, metrics and, if there are test results, the model; tell Comet."""
        tracker, step = monitor.tracker, len(monitor.losses)
        if monitor.losses:
            curve = monitor.plotter.draw(monitor.smoothed.get())
            tracker.log("log_image", curve, name="loss_curve", step=step)
        first, mistakes = self.pick_digits(logits)
        figures = {
            "sample_prediction": draw_digits(*first, 1, 1),
            "single_prediction": draw_detail(*(values[0] for values in first)),
            "predictions_grid": draw_digits(*first, 5, 4),
        }
        if results:
            figures["worst_mistakes"] = draw_digits(*(x[:20] for x in mistakes), 5, 4)
            figures["confusion_matrix"] = draw_confusion(results["confusion_matrix"])
            weights = self.model.state_dict().items()
            weights = {name: tensor.cpu().contiguous() for name, tensor in weights}
            save_tensors(self.folder / "model.pt", weights)
            numbers = {k: v for k, v in results.items() if isinstance(v, float)}
            tracker.log("log_metrics", numbers, step=step)
            matrix = {
                "matrix": results["confusion_matrix"],
                "labels": list("0123456789"),
            }
            tracker.log("log_confusion_matrix", **matrix, step=step)
        for name, figure in figures.items():
            picture = save_picture(figure, self.folder / f"{name}.png")
            tracker.log("log_image", picture, name=name, step=step)
        metrics = json.dumps({**self.progress, **results}, indent=2)
        write_file(self.folder / "metrics.json", metrics.encode())

    def pick_digits(self, logits):
        """Return the first 20 test digits, and those read wrong, the surest 200 first.

        Each: images (N, 28, 28), probabilities (N, 10), labels (N,), of NumPy.
        """
        count = len(logits)
        images = self.test_images[:count].cpu().numpy()
        labels = self.test_labels[:count].cpu().numpy()
        probabilities = logits.softmax(dim=1).cpu().numpy()
        wrong = (probabilities.argmax(axis=1) != labels).nonzero()[0]
        wrong = wrong[probabilities[wrong].max(axis=1).argsort()[::-1][:200]]
        chosen = slice(20), wrong
        return [(images[i], probabilities[i], labels[i]) for i in chosen]

    def write_report(self, monitor, logits, results):
        """Write report.html: its template, beside this script, filled in; tell Comet."""
        template = Path(__file__).resolve().with_name("report.html")
        if not template.exists():
            print(f"{template} is missing: this run gets no report", file=sys.stderr)
            return
        curve = monitor.smoothed.get()
        first, mistakes = self.pick_digits(logits)
        start, thin = (26 - self.model.seen) // 2, len(curve) // 1000 + 1
        views = [(start + i, start + j) for i in range(3) for j in range(3)]
        run = {
            **self.config,
            "name": self.folder.name,
            "progress": {name: self.progress[name] for name in PER_EPOCH},
            "results": results,
            "curve": [[n, curve[n - 1]] for n in range(len(curve), 0, -thin)][::-1],
            "mean_std": [MEAN, STD],
            "views": views if self.accurate else [(0, 0)],  # as ShiftAverage has them
            "weights": {k: encode(v.cpu()) for k, v in self.model.state_dict().items()},
        }
        for name, (images, probabilities, labels) in (
            ("first", first),
            ("wrong", mistakes),
        ):
            run[name] = {
                "images": encode(images),
                "probabilities": np.nan_to_num(probabilities).round(4).tolist(),
                "labels": labels.tolist(),
            }
        data = json.dumps(run).replace("<", "\\u003c")  # so that it ends no element
        page = template.read_text(encoding="utf-8").replace(">null<", f">{data}<", 1)
        path = self.folder / "report.html"
        write_file(path, page.encode())
        monitor.tracker.log("log_asset", str(path), file_name=path.name)


def encode(array):
    """Return the bytes of an array or tensor as text, for report.html."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def make_run_folder(settings, name):
    """Make a new folder, its name ending so; return its Path. Raises InputError."""
    stamp = time.strftime("%Y%m%d-%H%M%S-") + name
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = Path(settings["output_dir"], stamp + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.exists():
                message = f"--output-dir: cannot make {folder}: {error.strerror}"
                raise InputError(message) from None


def get_shapes(state):
    """Return the names, shapes and types of what a state (a dict of dicts) holds."""
    named = [(i, name, value) for i in state for name, value in state[i].items()]
    kinds = "shape", "dtype"
    return [(i, name, *(getattr(v, k, None) for k in kinds)) for i, name, v in named]


def end_early():
    """Have the next Ctrl-C or SIGTERM end us at once; torchrun sends two of each."""
    handle_signals(signal.SIG_IGN if launched() else signal.SIG_DFL)


def stop(signum, frame):
    """Handle Ctrl-C and SIGTERM: end in good order. For a second one see end_early."""
    end_early()
    error = KeyboardInterrupt(f"interrupted by {signal.Signals(signum).name}")
    error.status = 128 + signum
    raise error


def run_once(settings, folder, study, team=None):
    """Train, evaluate, show and track once, into `folder`: a new one, or one to resume.

    `study`: the folder of all runs, which is `folder` if there is one only; `team`: None,
    or that of the first process. Return the exit status and a row for the table of runs.
    """
    uploaded, status, begun, kept, row = None, 0, False, False, {}
    try:
        handle_signals(stop)
        run = Run(settings, folder, team)
        tracker = Tracker(settings["comet"], folder, run.comet_key)
        monitor = Monitor(run.progress["losses"], folder / "loss_curve.png", tracker)
        run.comet_key = tracker.key
        run.save_checkpoint()  # a full disk shows now, not after the first epoch
        begun, title = True, settings["model"].upper()
        print("Settings:", ", ".join(f"{k} {v}" for k, v in run.settings.items()))
        print(f"Device: {run.device}\nFolder: {folder}\nComet: {tracker.state}")
        print(RULE, f"TRAINING {title} MODEL", RULE, sep="\n")
        print(run.model)
        summary(MODELS[settings["model"]](), (1, 28, 28), device="cpu")
        run.introduce(tracker, study)
        run.train(monitor)
        print(RULE, f"EVALUATING {title} MODEL", RULE, sep="\n")
        logits = run.predict()
        results = run.test(logits)
        run.keep(monitor, logits, results)
        kept = True
        run.write_report(monitor, logits, results)
        late = []  # All is safe: a Ctrl-C waits for the last second, a second one doesn't.
        handle_signals(lambda *call: (late.append(call), end_early()))
        uploaded = tracker.finish()
        place = f"results in {folder}" + f"; {uploaded}" * bool(uploaded)
        print(RULE, f"TRAINING COMPLETE - {place}", RULE, sep="\n")
        row = {
            "model": settings["model"],
            "seed": settings["seed"],
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "seconds": sum(run.progress["epoch_seconds"]),
            "train_accuracy": run.progress["train_accuracy"][-1],
            "curve": monitor.smoothed.get(),
            "logits": logits.cpu(),
            "images": run.test_images.cpu(),
            "labels": run.test_labels.cpu(),
            **results,
        }
        if late and study != folder:
            stop(*late[0])
    except (KeyboardInterrupt, UserError, OSError, FloatingPointError) as error:
        end_early()
        status = report(error)
        with contextlib.suppress(UserError, OSError):  # keep what is good
            if begun and not kept:
                run.load_checkpoint()
                run.keep(monitor, logits := run.predict(20), {})
                run.write_report(monitor, logits, {})
            if begun and not uploaded and (uploaded := tracker.finish()):
                print(uploaded)
        for new in () if begun or settings["resume"] else (folder, study):
            if not any(new.glob("**/checkpoint.pt")):
                shutil.rmtree(new, ignore_errors=True)  # there is nothing in it yet
        others = study != folder and any(study.glob("*/checkpoint.pt"))
        if (begun or others) and not isinstance(error, FloatingPointError):
            done = len(run.progress["train_loss"]) if begun else 0
            command = f"python main.py --resume {shlex.quote(str(study))}"
            safe = f"{done} of {settings['epochs']} epochs are safe"
            print(f"{safe}; to go on: {command}", file=sys.stderr)
    return status, row


# ===== Your own digits ================================================================
# --predict: photographs and drawings, made like MNIST's images, and read by the network.

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_photo(path):
    """Return an image file, upright, as grey levels: float32 (H, W), from 0 to 255.

    The longer side is reduced to 1,000 pixels. Raises InputError if it is no image, is
    damaged, or is so large that it may be a decompression bomb.
    """
    try:
        if not os.path.isfile(path):
            problem = "is not a file" if os.path.exists(path) else "does not exist"
            raise InputError(f"{path} {problem}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # put behind it what it stands out from
                image = image.convert("RGBA")
                writing = ImageStat.Stat(image.convert("L"), image.getchannel("A"))
                paper = "white" if writing.sum[0] < 127 * writing.count[0] else "black"
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, paper), image
                )
            if image.mode[0] in "IF":  # 16 bits or more: what counts is the contrast
                values = np.nan_to_num(np.array(image, np.float32), posinf=0, neginf=0)
                values = (values - values.min()) * (255 / max(np.ptp(values), 1e-9))
                image = Image.fromarray(values)
            else:
                image = image.convert("RGB").convert("L")
            image.thumbnail((1000, 1000))
        return torch.from_numpy(np.array(image, np.float32))
    except InputError:
        raise
    except UnidentifiedImageError:
        problem = f"is no image ({', '.join(FORMATS)})"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        problem = f"has over {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error!s:.200}"
    raise InputError(f"{path} {problem}")


def find_ink(grey):
    """Return how much ink there is at each pixel, (H, W), dark on light or the reverse.

    0: the paper; 1: a full stroke; between: what may be noise is 0 or below. None if
    nothing stands out. Light may fall unevenly: the paper is a quadratic surface, fitted
    by reweighted least squares (Cauchy's weights) that care little for the ink.
    """
    y, x = (torch.linspace(-1, 1, size) for size in grey.shape)
    y, x = torch.meshgrid(y, x, indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=2)
    some = slice(None, None, math.ceil(max(grey.shape) / 64))  # are enough to fit it
    basis, values = terms[some, some].reshape(-1, 6), grey[some, some].reshape(-1)
    apart = values - values.median()
    for _ in range(12):
        weighted = basis / (apart**2 + 10**2)[:, None]
        surface = torch.linalg.lstsq(weighted.T @ basis, weighted.T @ values).solution
        apart = values - basis @ surface
    ink = grey - terms @ surface
    ink *= (ink**3).sum().sign()  # the few pixels that differ much are the ink
    noise = 1.5 * ink.abs().median()  # about a standard deviation
    stroke = ink.max()
    for _ in range(5):
        stroke = ink[ink >= stroke / 2].median()
    if stroke < max(10, 4 * noise):
        return None
    noise = min(2 * noise, stroke / 4)
    return (ink - noise) / (stroke - noise)


def find_parts(ink):
    """Return the large connected parts of the ink (H, W), without specks.

    First a mask (H, W) of them, 0 or 1; then their corners, int64 (parts, 2, 2): the
    first row and column of each, and those after the last.
    """
    factor = math.ceil(max(ink.shape) / 140)  # at a reduced size it is fast
    mask = F.max_pool2d((ink > 0.2)[None].float(), factor, ceil_mode=True)
    grown, parts = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask, None
    while parts is None or not torch.equal(grown, parts):  # the largest number spreads,
        parts, grown = grown, F.max_pool2d(grown, 3, stride=1, padding=1) * mask
        grown = F.pad(grown.flatten(), (1, 0))[grown.long()]  # in leaps: see who has it
    sizes = parts.long().flatten().bincount()
    sizes[0] = 0  # what is no ink
    large, corners = (sizes > 0.06 * sizes.max()).nonzero()[:, 0], []
    for number in large:
        pixels = (parts[0] == number).nonzero()  # (N, 2)
        corners.append(torch.stack([pixels.amin(dim=0), pixels.amax(dim=0) + 1]))
    mask = torch.isin(parts, large).float()
    mask = F.max_pool2d(mask, 3, stride=1, padding=1)[None]  # with the faint border
    mask = F.interpolate(mask, scale_factor=factor)[0, 0, : len(ink), : ink.shape[1]]
    return mask, factor * torch.stack(corners)


def prepare_photo(grey):
    """Return an image (H, W), grey levels, as MNIST's makers would: uint8 (28, 28).

    They cut the digit out, fitted it into 20x20 pixels, kept its aspect, and moved its
    centre of mass to the centre of 28x28 (LeCun et al. 1998, doi:10.1109/5.726791; in
    the archives that is pixel 14, 14). Beside it: None, or why it is not one digit.
    """
    ink = find_ink(grey)
    if ink is None:
        return torch.zeros(28, 28, dtype=torch.uint8), "nothing stands out"
    for _ in range(2):  # the second time from near, where small gaps show
        mask, corners = find_parts(ink)
        top, left = (corners[:, 0].amin(dim=0) - 3).clamp(min=0)
        bottom, right = corners[:, 1].amax(dim=0) + 3
        ink = (ink.clamp(0, 1) * mask)[top:bottom, left:right]
    extents = (corners[:, 1] - corners[:, 0]).amax(dim=1)
    digits = corners[extents > 0.5 * extents.max()]
    gaps = (digits[:, None, 0] - digits[None, :, 1]).amax(dim=2)  # of each two
    several = len(corners) > 6 or gaps.max() >= 0.05 * extents.max()

    pixels = (ink > 0.2).nonzero()
    scale = float((pixels.amax(dim=0) - pixels.amin(dim=0)).max() + 1) / 20
    rows, columns = (torch.arange(size) + 0.5 for size in ink.shape)
    mass, margin = ink.sum(), math.ceil(15 * scale)
    y = float(ink.sum(dim=1) @ rows / mass) + margin - 14.5 * scale
    x = float(ink.sum(dim=0) @ columns / mass) + margin - 14.5 * scale
    image = Image.fromarray(F.pad(ink, [margin] * 4).numpy())
    window = x, y, x + 28 * scale, y + 28 * scale
    image = image.resize((28, 28), Image.Resampling.HAMMING, window)
    digit = torch.from_numpy(np.array(image)).clamp(min=0)
    digit = (255 * digit / digit.max()).round().byte()
    return digit, "it holds several digits, or none" if several else None


def load_predictor(path):
    """Return a trained network, in evaluation mode, and the file that it is from.

    `path`: a model.pt, a checkpoint.pt, or a folder, of which the newest finished run
    counts. Raises InputError.
    """
    path = Path(path)
    if path.suffix == ".pt" and not path.exists():
        raise InputError(f"--checkpoint: {path} does not exist")
    if not path.is_file():
        found = [file for n in range(3) for file in path.glob("*/" * n + "model.pt")]
        if not found:
            message = f"there is no finished run in {path}; python main.py makes one"
            raise InputError(message)
        path = max(found, key=os.path.getmtime)
    state, settings = load_tensors(path), {}
    try:
        if "settings" in state:  # a checkpoint
            settings, state = state["settings"], state["model"]
        elif (config := path.with_name("config.json")).exists():
            settings = json.loads(config.read_text(encoding="utf-8"))["settings"]
        shapes, models = get_shapes({0: state}), [make() for make in MODELS.values()]
        models = [m for m in models if get_shapes({0: m.state_dict()}) == shapes]
        if not models:
            raise ValueError("its network has other layers than main.py now")
        model = models[0]
        model.load_state_dict(state)
        accurate = settings["recipe"] == "accurate" if settings else False
    except Exception as error:  # noqa: BLE001, a made-up file can raise anything
        raise InputError(f"{path} is no model of ours ({error!r:.200})") from None
    check_layers(model)
    return (ShiftAverage(model) if accurate else model).eval(), path


def draw_readings(names, digits, probabilities, answers):
    """Return a Figure: digits (N, 28, 28), as the network sees them, and what it says."""
    across = min(2, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(5 * across, 2.4 * down))
    space = {"width_ratios": (1, 1.6) * across, "hspace": 0.8, "wspace": 0.3}
    cells = figure.subplots(down, 2 * across, squeeze=False, gridspec_kw=space)
    figure.subplots_adjust(0.02, 0.22 / down, 0.985, 1 - 0.25 / down)
    for axes in cells.flat[2 * len(names) :]:  # the last may be left over
        axes.remove()
    for name, digit, chances, answer, (left, chart) in zip(
        names, digits, probabilities, answers, cells.reshape(-1, 2)
    ):
        left.imshow(digit, cmap="gray", vmin=0, vmax=255)
        left.set(xticks=[], yticks=[])
        draw_bars(chart, chances, GREY if answer.startswith("no answer") else BLUE)
        name = name if len(name) <= 48 else "…" + name[-47:]
        text = {"fontsize": 9, "loc": "left", "parse_math": False}
        title = name + "\n" + answer.replace("; ", ";\n")
        left.set_title(title, **text)  # it may run on above the chart
    return figure


@torch.no_grad()
def predict_photos(settings):
    """Read the image files of --predict; return the exit status."""
    collect_garbage()
    predictor, path = load_predictor(settings["checkpoint"] or settings["output_dir"])
    print(f"Model: {path}")
    status, names, digits, remarks = 0, [], [], []
    for name in tqdm(settings["predict"], leave=False, disable=None):
        try:
            digit, remark = prepare_photo(read_photo(name))
            names.append(name)
            digits.append(digit)
            remarks.append(remark)
        except InputError as error:
            with tqdm.external_write_mode(sys.stderr):
                status = report(error)
    if not names:
        return status
    images = torch.stack(digits)
    logits = predictor(prepare(images, predictor))  # (N, 10)
    if not logits.isfinite().all():
        raise InputError(f"{path}: its answers are not finite numbers")
    best, order = logits.softmax(dim=1).sort(dim=1, descending=True)
    answers = []
    for name, remark, (p, q, *_), (digit, second, *_) in zip(
        names, remarks, (100 * best).tolist(), order.tolist()
    ):
        answer = f"{digit} ({p:.1f} %), then {second} ({q:.1f} %)"
        if remark is None and p < 50:
            remark = f"it looks like no digit; most like {answer}"
        answers.append(f"no answer: {remark}" if remark else answer)
        print(f"{name}: {answers[-1]}")
    shown = names[:100], images[:100].numpy(), logits[:100].softmax(dim=1).numpy()
    picture = make_run_folder(settings, "predict") / "predictions.png"
    save_picture(draw_readings(*shown, answers), picture)
    more = f", the first 100 of {len(names)}" if len(names) > 100 else ""
    print(f"What the network sees is in {picture}{more}")
    return status


# ===== Several runs ===================================================================
# --seeds: how much of a result is chance? --compare: what does the convolution bring?

NUMBERS = {  # in the table of runs, and in its metrics.json: (width, digits)
    "parameters": (10, 0),
    "seconds": (10, 1),
    "train_accuracy": (15, 4),
    "test_accuracy": (15, 4),
    "test_loss": (15, 4),
}


def draw_contrast(wrong, right):
    """Return a Figure: up to 20 digits that the run `right` reads and `wrong` doesn't."""
    labels, guesses = wrong["labels"], wrong["logits"].argmax(dim=1)
    chosen = (right["logits"].argmax(dim=1) == labels) & (guesses != labels)
    chosen = chosen.nonzero()[:20, 0]
    probabilities = wrong["logits"][chosen].softmax(dim=1).numpy()
    images, labels = wrong["images"][chosen].numpy(), labels[chosen].tolist()
    names = (MODELS[row["model"]].__name__ for row in (right, wrong))
    title = "{} reads them right, {} as it says here".format(*names)
    return draw_digits(images, probabilities, labels, 5, 4, title)


def summarise(rows, study):
    """Print, draw and keep what all runs of a study reached: `rows` from run_once."""
    path, several = study / "loss_curves.png", {}
    plotter = PeriodicPlotter(0, "iteration", "smoothed loss", "semilogy", path)
    print("model seed", *(f"{name:>{width}}" for name, (width, _) in NUMBERS.items()))
    for row in rows:
        cells = (f"{row[name]:{size}.{n}f}" for name, (size, n) in NUMBERS.items())
        print(f"{row['model']:5} {row['seed']:4}", *cells)
    for model, colour in (("fc", VERMILION), ("cnn", BLUE)):
        runs = [row for row in rows if row["model"] == model]
        for number, row in enumerate(runs):
            label = None if number else MODELS[model].__name__
            line = {"color": colour, "linewidth": 1, "label": label}
            plotter.axes.plot(range(1, len(row["curve"]) + 1), row["curve"], **line)
        if len(runs) > 1:
            several[model], cells = {}, []
            for name, (width, n) in NUMBERS.items():
                values = [row[name] for row in runs]
                mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
                several[model][name] = {"mean": mean, "standard_deviation": deviation}
                cells.append(f"{mean:.{n}f} ± {deviation:.{n}f}".rjust(width))
            print(f"{model:5} mean", *cells)
    plotter.axes.legend()
    plotter.draw([])
    if rows[0]["model"] != rows[-1]["model"]:
        save_picture(draw_contrast(*rows[:2]), study / "only_cnn_right.png")
        save_picture(draw_contrast(*rows[1::-1]), study / "only_fc_right.png")
    runs = [{name: row[name] for name in ("model", "seed", *NUMBERS)} for row in rows]
    metrics = json.dumps({"runs": runs, "several": several}, indent=2)
    write_file(study / "metrics.json", metrics.encode())
    print(f"the results of all {len(rows)} runs are in {study}")


def assist(runs):
    """Be not the first process of torchrun: train a share of all runs, show nothing.

    `runs`: their settings. Return the exit status.
    """
    handle_signals(lambda number, frame: os._exit(128 + number))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the end
    try:
        team = Team(runs[0])
        for settings in runs:
            run = Run(settings, None, team)
            run.train(Silence())
            run.predict()
    except UserError as error:
        return report(error)
    except FloatingPointError:
        return 1  # the first process says it
    dist.destroy_process_group()
    return 0


def find_started(output_dir):
    """Return the newest run that this torchrun has begun, a folder; None if none."""
    mine = json.dumps(name_launcher())
    for config in sorted(Path(output_dir).glob("*/config.json"), reverse=True):
        started = any(config.parent.glob("**/checkpoint.pt"))
        if started and mine in config.read_text(encoding="utf-8", errors="replace"):
            return config.parent
    return None


def main(settings):
    """Train as `settings` say, once or more often; return the exit status."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    models = ("fc", "cnn") if settings["compare"] else (settings["model"],)
    name = "compare" if settings["compare"] else settings["model"]
    seeds = range(settings["seed"], settings["seed"] + settings["seeds"])
    runs = [(model, seed) for seed in seeds for model in models]
    if launched() and os.environ["RANK"] != "0":
        one = {"seeds": 1, "resume": None}
        all_ = [settings | one | {"model": model, "seed": seed} for model, seed in runs]
        return 0 if settings["predict"] else assist(all_)
    status, rows = 0, []
    try:
        if settings["predict"]:
            return predict_photos(settings)
        team = Team(settings) if launched() else None
        if team and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            begun = find_started(settings["output_dir"])
            settings["resume"] = settings["resume"] or begun
        study = folder = Path(settings["resume"] or make_run_folder(settings, name))
        if len(runs) > 1:
            kept = {name: settings[name] for name in (*FLAGS, "compare")}
            about = {"settings": kept, "launcher": name_launcher()}
            config = json.dumps(about, indent=2)
            write_file(study / "config.json", config.encode())
        for model, seed in runs:
            one = settings | {"model": model, "seed": seed, "seeds": 1}
            if len(runs) > 1:
                folder = study / f"{model}-seed-{seed}"
                one["resume"] = folder if (folder / "checkpoint.pt").exists() else None
                folder.mkdir(exist_ok=True)
                print(f"Run {len(rows) + 1} of {len(runs)}: {model}, seed {seed}")
            status, row = run_once(one, folder, study, team)
            rows.append(row)
            if status:
                break
        if len(runs) > 1 and not status:
            summarise(rows, study)
        if team and not status:
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        status = report(error)
    return status


if __name__ == "__main__":
    # At once: not after threads of Comet that hang, nor after 0.3 s and 70 MB for an
    # orderly end of all the libraries. All that was printed or written is out by now.
    os._exit(main(SETTINGS))
