"""Train, track and understand your first convolutional network, on MNIST.

python main.py                          train the CNN for 7 epochs
python main.py --limit 2000 --epochs 1  a quick look
python main.py --compare                train the fully connected baseline, too
python main.py --recipe accurate        the best that this network can do
python main.py --seeds 5                train five times: how much is chance?
python main.py --resume runs/NAME       continue a run that was stopped
python main.py --predict photo.jpg      classify your own handwriting
torchrun --standalone --nproc-per-node=2 main.py
                                        train with two processes, or two GPUs

Test accuracy, mean ± standard deviation of 10 seeds: 98.0 ± 0.5 %, with the
accurate recipe 99.63 ± 0.04 % (README.md).
"""

import argparse
import base64
import ctypes
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import scipy  # its ndimage is loaded when --predict needs it
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torchsummary import summary
from torchvision.datasets import MNIST
from tqdm import tqdm

# Colab and Jupyter set MPLBACKEND to a backend that only they have: elsewhere, the
# import fails. So it is taken away, and put back below.
mpl_backend = None
if "matplotlib" not in sys.modules:
    mpl_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except (OSError, UnicodeError) as error:
    text = "matplotlib cannot read its settings: save them as UTF-8, or move them away"
    print(f"main.py: {text} ({error})", file=sys.stderr)
    sys.exit(2)

if mpl_backend:
    os.environ["MPLBACKEND"] = mpl_backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = mpl_backend

# ===== Settings =======================
# Edit them here (in a notebook, give flags): EPOCHS is --epochs.

# The experiment
RECIPE = "classic"  # "classic": as below; "accurate": as in ACCURATE
MODEL = "cnn"  # a name in MODELS: "cnn", "fc", your own; or "both": cnn and fc
EPOCHS = 7  # passes over the training images
BATCH_SIZE = 64  # images per step
LR = 0.01  # learning rate
OPTIMIZER = "sgd"  # "sgd" or "adam"
SEED = 0  # for the initial weights and the shuffling
SEEDS = 1  # number of runs, with SEED, SEED + 1, ...
LIMIT = 0  # train on the first LIMIT images only; 0: on all 60,000

# What the accurate recipe sets instead; more in its section.
ACCURATE = {"epochs": 7, "batch_size": 64, "lr": 0.1, "optimizer": "sgd"}

# Where
DEVICE = "auto"  # the best there is; or "cpu", "mps", "cuda", "cuda:1"
DATA_DIR = str(Path(__file__).resolve().parent / "data")  # has MNIST/raw/*.gz
OUTPUT_DIR = "runs"  # each run makes a new folder in it

# Tracking on comet.com
COMET = "auto"  # online with a key, else offline; or "online", "offline", "off"
COMET_API_KEY = "YOUR_API_KEY_HERE"  # or in the environment, or ~/.comet.config
COMET_PROJECT = "mnist-cnn"

# ===== Models =========================


class CNN(nn.Module):
    """Two convolutions and two linear layers: 124,670 parameters."""

    channels_last = True  # order in memory: 1.5 times as fast on a CPU

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
        """Map normalised images (N, 1, 28, 28) to scores: logits (N, 10)."""
        # Usually: convolution, ReLU, max-pool. Pooling before ReLU is the
        # same, since max(relu(a), relu(b)) = relu(max(a, b)), and faster.
        x = F.relu(self.pool1(self.conv1(x)))  # (N, 24, 13, 13)
        x = F.relu(self.pool2(self.conv2(x)))  # (N, 36, 5, 5)
        x = self.relu(self.fc1(self.flatten(x)))  # (N, 900) -> (N, 128)
        return self.fc2(x)  # (N, 10)


class FullyConnectedModel(nn.Module):
    """The baseline: two linear layers, 101,770 parameters."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.relu(self.fc1(self.flatten(x)))  # (N, 784) -> (N, 128)
        return self.fc2(x)  # (N, 10)


# Add your own network here: then --model NAME trains it.
MODELS = {"cnn": CNN, "fc": FullyConnectedModel}

# ===== Data ===========================

TRAINING_IMAGES = 60_000
MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]
BLACK = -MEAN / STD  # a black pixel, normalised


@functools.cache  # loaded once
def load_mnist(data_dir):
    """Return MNIST: training images and labels, test images and labels.

    uint8 (N, 28, 28) and int64 (N,), from `data_dir`/MNIST/raw. Raises UserError.
    """
    tensors = []
    for name, md5 in MNIST.resources:
        archive = read_archive(Path(data_dir, "MNIST", "raw", name), md5)
        values = np.frombuffer(gzip.decompress(archive), np.uint8)
        if "images" in name:  # 16 bytes of header, then the pixels
            tensors.append(torch.tensor(values[16:].reshape(-1, 28, 28)))
        else:  # 8 bytes of header, then the labels
            tensors.append(torch.tensor(values[8:]).long())
    return tensors


def normalise(images):
    """Return grey levels (N, 28, 28), 0 to 255, as network input (N, 1, 28, 28)."""
    return (images.unsqueeze(1) / 255 - MEAN) / STD


def make_batches(images, labels, batch_size=100, order=None):
    """Yield normalised images (N, 1, 28, 28) and labels (N,), a batch at a time.

    `order`: indices of the images to use; None: all. 100 is for evaluate, which gives
    the same with any size. This does a DataLoader's job, faster: MNIST fits in memory.
    """
    if order is None:
        order = torch.arange(len(labels), device=labels.device)
    for chosen in order.split(batch_size):
        yield normalise(images[chosen]), labels[chosen]


# ===== Training and evaluation ========


def train_epoch(model, batches, loss_function, optimizer, scheduler, on_step):
    """Train on every batch once; return mean loss and accuracy over the epoch.

    `batches` yields images (N, 1, 28, 28) and labels (N,). Both results are measured
    while the weights change. on_step(loss) gets each batch's mean loss, a tensor.
    """
    model.train()
    loss_sum, correct, count = 0, 0, 0
    for images, labels in batches:
        logits = model(images)  # forward: (N, 10)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # compute the gradients
        optimizer.step()  # update the weights
        scheduler.step()  # update the learning rate
        loss = loss.detach()  # without what backward() needs
        # Sums stay on the device: .item() would wait for a GPU.
        loss_sum += loss * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
        on_step(loss)
    return float(loss_sum) / count, int(correct) / count


@torch.no_grad()
def evaluate(model, batches, loss_function=F.cross_entropy):
    """Return mean loss, accuracy and logits (N, 10) over all images.

    `batches` yields images and labels, as a DataLoader does; `loss_function` returns a
    batch's mean loss. The model is put back into the mode it was in.
    """
    was_training = model.training
    model.eval()
    loss_sum, correct, parts = 0, 0, []
    for images, labels in batches:
        logits = model(images)
        loss_sum += loss_function(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        parts.append(logits)
    model.train(was_training)
    all_logits = torch.cat(parts).float()
    count = len(all_logits)
    return float(loss_sum) / count, int(correct) / count, all_logits


# ===== The run ========================


def train_run(args, folder):
    """Train, test and keep one model. (train_all calls this, once or more.)"""
    is_accurate = args.recipe == "accurate"

    # --- 1. Data ---
    device = select_device(args.device)
    mnist = [tensor.to(device) for tensor in load_mnist(args.data_dir)]
    images, labels, test_images, test_labels = mnist
    count = args.limit or len(labels)  # images to train on
    epoch_steps = math.ceil(count / args.batch_size)

    # --- 2. Model, loss, optimizer ---
    smoothing = LABEL_SMOOTHING if is_accurate else 0
    loss_function = nn.CrossEntropyLoss(label_smoothing=smoothing)  # includes softmax
    # A copy is tried first, so that a bug in your network shows now.
    check_model(make_model(args.model, device), loss_function, images[:2], labels[:2])
    torch.manual_seed(args.seed)
    model = make_model(args.model, device)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
    else:
        options = ACCURATE_SGD if is_accurate else {}
        optimizer = torch.optim.SGD(model.parameters(), args.lr, **options)
    recorder = Recorder(args, folder, device, epoch_steps, model, optimizer)
    if args.resume:
        recorder.load_checkpoint()  # into model and optimizer, too
    steps_done = recorder.epochs_done * epoch_steps  # 0, unless resumed
    # Learning rate: lr * schedule(step)
    if is_accurate:
        schedule = functools.partial(one_cycle, args.epochs * epoch_steps)
    else:
        schedule = lambda step: 1.0  # constant
    # LambdaLR's epoch is our step. last_epoch: the last one done, from 0.
    scheduler = LambdaLR(optimizer, schedule, last_epoch=steps_done - 1)
    # LAUNCHED by torchrun: equal weights in all processes, gradients are averaged.
    ddp_model = DistributedDataParallel(model) if LAUNCHED else model

    with recorder:  # shows, tracks and saves what follows, however it ends
        # --- 3. Train ---
        recorder.begin()
        print_title(f"TRAINING {args.model.upper()} MODEL")
        print(model)
        print_layers(make_model(args.model))  # torchsummary wants it on the CPU
        for epoch in range(recorder.epochs_done + 1, args.epochs + 1):
            recorder.start_epoch()
            # A seed for each epoch (10,000 at most): a resumed run is the same.
            torch.manual_seed(10_001 * args.seed + epoch)
            # The share of process RANK, of WORLD_SIZE; without torchrun, everything:
            mine = slice(RANK, None, WORLD_SIZE)
            order = torch.randperm(count)[mine].to(device)
            batch_size = args.batch_size // WORLD_SIZE
            batches = make_batches(images, labels, batch_size, order)
            if is_accurate:
                batches = augment(batches, make_distortions(count)[mine])
            train_loss, train_accuracy = train_epoch(
                ddp_model, batches, loss_function, optimizer, scheduler, recorder.add
            )
            train_loss, train_accuracy = average(train_loss, train_accuracy, device)
            recorder.end_epoch(train_loss, train_accuracy)
            if RANK == 0:  # a test to watch: do not choose settings by it
                test_batches = make_batches(test_images, test_labels)
                test_loss, test_accuracy, _ = evaluate(model, test_batches)
                recorder.save_epoch(test_loss, test_accuracy)
            print(f"Epoch {epoch}/{args.epochs}, Accuracy: {train_accuracy:.4f}")
        if RANK > 0:  # with torchrun, only rank 0 tests
            return

        # --- 4. Test ---
        print_title(f"EVALUATING {args.model.upper()} MODEL")
        # The accurate recipe averages the logits of nine views.
        predictor = make_predictor(model, args.recipe)
        test_batches = make_batches(test_images, test_labels)
        test_loss, test_accuracy, logits = evaluate(predictor, test_batches)
        digits = Digits(test_images, logits.softmax(dim=1), test_labels)
        print(f"Test Accuracy: {test_accuracy:.4f}\nTest Loss: {test_loss:.4f}\n")
        predicted = digits.predictions[0]
        print(f"Single Image Prediction: {predicted}, Actual Label: {test_labels[0]}")

        # --- 5. Keep, in the folder ---
        # (metrics.json, loss_curve.png and report.html follow as `with` ends.)
        recorder.save_weights()  # model.pt
        recorder.add_test(summarise_test(test_loss, test_accuracy, digits), digits)
        save_pictures(digits, folder)
    print(f"All runs: {get_output_dir(folder) / 'index.html'}")
    print_title(f"TRAINING COMPLETE - {recorder.location}")


# ===== Helpers of the run =============
# From here on: helpers, and main() at the end.


def select_device(name="auto"):
    """Return a device that works; "auto": MPS, else CUDA, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        best = "cuda" if gpus >= LOCAL_SIZE else "cpu"
        if torch.backends.mps.is_available() and not LAUNCHED:
            best = "mps"
        try:
            return select_device(best)  # by name, as below: does it work?
        except UserError as error:
            warn(f"{error}; using the CPU")
            return torch.device("cpu")
    here = f"GPUs {gpus}, processes {LOCAL_SIZE}"
    with explaining(f"--device {name} does not work here ({here}); cpu always works"):
        device = torch.device(name)
        if LAUNCHED and device.type == "cuda":  # each process has its own
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)
        torch.ones(1, device=device).sum().item()  # does it work?
    return device


def print_title(title):
    print("=" * 70, title, "=" * 70, sep="\n")


def make_model(name, device="cpu"):
    """Return a new network of MODELS, stored in the fastest way it allows."""
    model = MODELS[name]().to(device)
    # Two, since a network may squeeze() a single image.
    images = torch.zeros(2, 1, 28, 28, device=device)
    with torch.no_grad():
        model.eval()
        model(images)  # lazy layers take their sizes from it
        if getattr(model, "channels_last", False) and images.device.type == "cpu":
            try:  # in memory, all channels of a pixel come together
                model.to(memory_format=torch.channels_last)
                model(images)  # does it still work?
            except RuntimeError:  # its view() fails on channels last
                model.to(memory_format=torch.contiguous_format)
    model.train()
    return model


def check_model(model, loss_function, images, labels):
    """Compute loss and gradients once; raise whatever is wrong."""
    logits = model(normalise(images))
    shape = getattr(logits, "shape", None)
    if shape != (len(images), 10):
        text = f"{type(model).__name__}.forward must return logits (N, 10) for N images"
        found = f"a {type(logits).__name__}" if shape is None else tuple(shape)
        raise UserError(
            f"{text}; for {len(images)} images it returned {found}", status=1
        )
    loss_function(logits, labels).backward()


def print_layers(model):
    """Print torchsummary's table of layers, and what it leaves out."""
    table = io.StringIO()
    try:
        with redirect_stdout(table):
            summary(model, (1, 28, 28), device="cpu")
        print(table.getvalue(), end="")
    except Exception as error:  # noqa: BLE001, a layer may return a tuple
        print(f"No table of layers: torchsummary cannot read this network ({error})")
    count = count_parameters(model)
    if f"Total params: {count:,}\n" not in table.getvalue():
        print(f"Parameters in all: {count:,}")


def count_parameters(model):
    return sum(weights.numel() for weights in model.parameters())


# ===== The accurate recipe ============
# A schedule, distorted images, and nine views of each in the test; chosen as in
# tests/README.md.

ACCURATE_SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-4}
LABEL_SMOOTHING = 0.05  # Szegedy et al. 2016, arXiv:1512.00567
ANGLE = 5  # degrees: largest rotation and shear
SCALE = 0.1  # fraction of the size: largest change
SHIFT = 2  # pixels: largest shift
RISING = 0.3  # share of steps with a rising lr: above 0, below 1
STROKES = 1 / 3  # share of batches with thicker strokes; as many have thinner ones


def get_recipe_numbers(args):
    if args.recipe != "accurate":
        return {}
    numbers = ACCURATE_SGD if args.optimizer == "sgd" else {}
    return numbers | {
        "label_smoothing": LABEL_SMOOTHING,
        "angle": ANGLE,
        "scale": SCALE,
        "shift": SHIFT,
        "rising": RISING,
        "strokes": STROKES,
    }


def one_cycle(total_steps, step):
    """Return what multiplies the learning rate: Smith 2018, arXiv:1803.09820."""
    progress = (step + 0.5) / total_steps  # of a step's middle: it begins above 0
    rise = progress / RISING
    fall = (1 - progress) / (1 - RISING)
    return max(0.0, min(rise, fall))  # LambdaLR asks once more after the last step


def make_distortions(count):
    """Return random affine maps (count, 2, 3), after Simard et al. 2003."""
    random = 2 * torch.rand(6, count) - 1  # from -1 to 1
    angle = math.radians(ANGLE) * random[0]
    shear = math.radians(ANGLE) * random[1]
    x_scale = 1 + SCALE * random[2]
    y_scale = 1 + SCALE * random[3]
    x = SHIFT / 14 * random[4]  # affine_grid's unit is 14 pixels
    y = SHIFT / 14 * random[5]
    cos, sin = angle.cos(), angle.sin()
    # The rotation times [[x_scale, shear], [0, y_scale]]; and the shift:
    top = torch.stack([x_scale * cos, shear * cos - y_scale * sin, x], dim=1)
    bottom = torch.stack([x_scale * sin, shear * sin + y_scale * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1)


def augment(batches, distortions):
    """Yield the batches, distorted; some with thicker, some with thinner strokes."""
    start = 0
    for images, labels in batches:
        maps = distortions[start : start + len(images)].to(images.device)
        start += len(images)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        # grid_sample fills in 0 outside of the image: black is made 0 for it.
        images = F.grid_sample(images - BLACK, grid, align_corners=False) + BLACK
        choice = torch.rand(1).item()
        if choice < STROKES:
            brightest = F.max_pool2d(images, 3, stride=1, padding=1)
            images = (images + brightest) / 2
        elif choice < 2 * STROKES:
            darkest = -F.max_pool2d(-images, 3, stride=1, padding=1)
            images = (images + darkest) / 2
        yield images, labels


class ShiftAverage(nn.Module):
    """The mean logits for an image and its eight shifts by one pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = F.pad(x, [1, 1, 1, 1], value=BLACK)  # (N, 1, 30, 30)
        shifted = [x[..., i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
        # contiguous(), since some networks call view(), which needs it.
        logits = [self.model(images.contiguous()) for images in shifted]
        return torch.stack(logits).mean(dim=0)


def make_predictor(model, recipe):
    return ShiftAverage(model) if recipe == "accurate" else model


# ===== The recorder ===================
# It shows and saves the progress of training. LossHistory and
# PeriodicPlotter are like those of mitdeeplearning.util 0.7.5.

PER_EPOCH = "train_loss", "train_accuracy", "epoch_seconds"
PER_EPOCH += "test_loss_per_epoch", "test_accuracy_per_epoch"
# Attributes in checkpoint.pt, beside model and optimizer; history: PER_EPOCH
RESUMED = "history", "losses", "snapshots", "experiment_key", "is_online"


class LossHistory:
    """Smoothed values: the first one raw, then a * last + (1 - a) * value."""

    def __init__(self, smoothing_factor=0.0):
        self.smoothing_factor = smoothing_factor
        self.loss = []

    def append(self, value):
        if self.loss:
            a = self.smoothing_factor
            value = a * self.loss[-1] + (1 - a) * value
        self.loss.append(value)

    def get(self):
        return self.loss


def smooth(losses):
    """Return the LossHistory that all curves show."""
    smoothed = LossHistory(smoothing_factor=0.95)  # about the last 20 steps
    for loss in losses:
        smoothed.append(loss)
    return smoothed


class PeriodicPlotter:
    """Draws a growing curve into a PNG file every `sec` seconds."""

    def __init__(self, sec, xlabel="", ylabel="", scale=None, path="loss.png"):
        if scale not in (None, "semilogx", "semilogy", "loglog"):
            raise ValueError(f"scale {scale!r}: not semilogx, semilogy or loglog")
        self.sec = sec
        self.path = path
        self.method = scale or "plot"  # of Axes
        self.axis_labels = {"xlabel": xlabel, "ylabel": ylabel}
        self.last_time = time.monotonic()

    def plot(self, data):
        if time.monotonic() - self.last_time >= self.sec:
            self.draw(data)

    def draw(self, data):
        save_picture(self.path, self.make_figure, data)
        self.last_time = time.monotonic()

    def make_figure(self, data):
        self.figure = Figure(figsize=(7, 4))
        margins = {"left": 0.16, "right": 0.98, "bottom": 0.13, "top": 0.97}
        axes = self.figure.subplots(gridspec_kw=margins)
        getattr(axes, self.method)(range(1, len(data) + 1), data, color=BLUE)
        axes.set(**self.axis_labels)
        axes.grid(which="both", alpha=0.3)
        return self.figure


class Recorder:
    """Shows and saves the progress of training, however it ends.

    It ends a training whose loss is not finite: that can be neither shown nor saved.
    """

    def __init__(self, args, folder, device, epoch_steps, model, optimizer):
        self.args = args
        self.folder = folder
        self.device = device
        self.epoch_steps = epoch_steps
        self.model = model
        self.optimizer = optimizer
        self.config = make_config(args, device, model)
        self.history = {name: [] for name in PER_EPOCH}
        self.losses = []  # of all steps
        self.snapshots = []  # the weights of some epochs, for the page
        self.experiment_key = None  # by which Comet knows this run
        self.is_online = False  # whether Comet's server gets this run
        self.location = ""  # where the results are; known when the run has ended
        self.smoothed = smooth([])
        png = folder / "loss_curve.png"
        self.plotter = PeriodicPlotter(
            sec=2, xlabel="step", ylabel="smoothed loss", scale="semilogy", path=png
        )
        self.comet = Tracker()
        self.results = {}  # of the test
        self.page_data = {}  # what the page shows of the network and of the test
        self.has_begun = False
        self.program_or_problem = {}  # the model's torch calls; or why there are none
        self.epoch_results = {}  # of the training, before its test
        self.new_losses = []  # tensors: not read yet
        self.bar = tqdm(disable=True)
        self.start_time = 0  # of the epoch
        self.shown_time = 0
        self.page_time = 0

    def load_checkpoint(self):
        """Continue from the folder's checkpoint, if it has one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():  # nothing is saved yet: start with epoch 1
            return
        if RANK == 0:
            for partial in self.folder.glob("*.part"):  # the run was killed
                partial.unlink()
        advice = "if it or config.json is damaged, start a new run"
        with explaining(f"cannot continue from {path} ({advice})"):
            compare_configs(read_config(self.folder), self.config)
            saved = load_tensors(path)
            load_weights([self.model], saved["model"], path)
            self.optimizer.load_state_dict(saved["optimizer"])
            for name in RESUMED:
                setattr(self, name, saved[name])
        self.smoothed = smooth(self.losses)
        if self.epochs_done > self.args.epochs:
            raise UserError(
                f"--epochs: this run has done {self.epochs_done}; give at least that"
            )

    @property
    def epochs_done(self):
        return len(self.history["train_loss"])

    def __enter__(self):
        return self

    def begin(self):
        """Start Comet; print and save what is known before the first step.

        Inside the `with` block, so that Comet is ended if this fails.
        """
        self.comet, target = start_comet(
            self.args.comet, self.folder, self.experiment_key
        )
        settings = self.config["settings"]
        print("Settings:", ", ".join(f"{name} {settings[name]}" for name in settings))
        print(f"Device: {self.config['device']}\nFolder: {self.folder}")
        print(f"Report: {self.folder / 'report.html'}\nComet: {target}")
        self.experiment_key = self.comet.get_key() or self.experiment_key
        self.comet.set_name(self.folder.name)
        self.comet.log_parameters(settings | self.config["recipe_numbers"])
        self.comet.set_model_graph(str(self.model))
        was_online = self.is_online
        self.is_online = self.comet.url is not None
        if not (was_online and self.is_online):  # else Comet's server has them
            self.log_earlier_epochs()
        save_json(self.config, self.folder / "config.json")
        self.program_or_problem = record_program(self.model, self.device)
        self.page_data, self.snapshots = describe_network(self)
        self.has_begun = True
        self.save("training")

    def log_earlier_epochs(self):
        for step, loss in enumerate(self.losses, 1):
            self.comet.log_metric("loss", loss, step=step)
        for epoch in range(1, self.epochs_done + 1):
            self.log_epoch(epoch)

    def start_epoch(self):
        if RANK == 0:
            try:
                self.bar = tqdm(total=self.epoch_steps)
            except Exception as error:  # noqa: BLE001, a wrong variable TQDM_…
                warn(f"no progress bar: unset TQDM_… ({get_reason(error)})")
        self.start_time = time.perf_counter()

    def add(self, loss):
        """Take a step's loss, a tensor: it is read and shown every 0.2 s."""
        if INTERRUPTS:  # a signal's exception was lost: see INTERRUPTS
            raise KeyboardInterrupt(INTERRUPTS[0])
        self.new_losses.append(loss)
        if time.monotonic() - self.shown_time >= 0.2:
            self.process_losses()

    def process_losses(self):
        """Read the new losses; keep, track and show them."""
        numbers = [loss.item() for loss in self.new_losses]
        self.new_losses.clear()
        # Comet takes 12,000 values a minute, 40 in 0.2 s: half for the loss.
        every = math.ceil(len(numbers) / 20) if self.is_online else 1
        for loss in numbers:
            check_finite(loss, "loss")
            self.losses.append(loss)
            self.smoothed.append(loss)
            if len(self.losses) % every == 0:
                self.comet.log_metric("loss", loss, step=len(self.losses))
        curve = self.smoothed.get()
        self.bar.set_postfix(loss=f"{curve[-1]:.4f}", refresh=False)
        self.bar.update(len(numbers))
        self.plotter.plot(curve)
        self.shown_time = time.monotonic()
        if self.shown_time - self.page_time >= 5:  # seconds
            self.update_page("training")

    def end_epoch(self, loss, accuracy):
        self.process_losses()
        self.bar.close()
        self.epoch_results = {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "epoch_seconds": time.perf_counter() - self.start_time,
        }

    def save_epoch(self, test_loss, test_accuracy):
        check_finite(test_loss, "test loss")
        values = self.epoch_results | {
            "test_loss_per_epoch": test_loss,
            "test_accuracy_per_epoch": test_accuracy,
        }
        history = {name: [*self.history[name], values[name]] for name in PER_EPOCH}
        checkpoint = {name: getattr(self, name) for name in RESUMED}
        checkpoint |= {"history": history, "model": self.model.state_dict()}
        checkpoint["optimizer"] = self.optimizer.state_dict()
        save_tensors(checkpoint, self.folder / "checkpoint.pt")
        self.history = history  # not before it is saved: a Ctrl-C may come
        self.log_epoch(self.epochs_done)
        self.page_data, self.snapshots = describe_network(self)
        self.save("training")

    def log_epoch(self, epoch):
        values = {name: column[epoch - 1] for name, column in self.history.items()}
        self.comet.log_metrics(values, step=epoch * self.epoch_steps, epoch=epoch)

    def save(self, state, message="", needed=True):
        """Write metrics.json and the pages; a failure is raised only if `needed`."""
        metrics = {"state": state, **self.history, **self.results}
        metrics["losses"] = self.losses[: self.epochs_done * self.epoch_steps]
        try:
            save_json(metrics, self.folder / "metrics.json", needed)
        except RunError as error:
            state, message = "failed", str(error)  # for the page
            raise
        finally:
            self.update_page(state, message)
            write_overviews(self.folder)

    def update_page(self, state, message=""):
        every = len(self.losses) // 10_000 + 1  # at most 10,000 points in a chart
        curve = np.round(self.smoothed.get()[every - 1 :: every], 4).tolist()
        now = {
            "kind": "run",
            "name": self.folder.name,
            "state": state,
            "message": message,
            "curve": curve,
            "curve_every": every,
            "steps_done": len(self.losses),
            "epoch_steps": self.epoch_steps,
            "history": self.history,
            "results": self.results,
        }
        write_page(self.folder / "report.html", self.config | self.page_data | now)
        self.page_time = time.monotonic()

    def save_weights(self):
        path = self.folder / "model.pt"
        weights = self.model.state_dict()
        for name, value in weights.items():
            if isinstance(value, torch.Tensor):  # get_extra_state() may return others
                weights[name] = value.cpu().contiguous()
        save_tensors(weights, path)
        self.comet.log_model(self.args.model, str(path))

    def add_test(self, results, digits):
        """Send the test's results to Comet; keep them for metrics.json and the page."""
        self.results = results
        for name, value in results.items():
            if name == "confusion_matrix":
                self.comet.log_confusion_matrix(matrix=value)
            else:
                self.comet.log_metric(name, value, step=len(self.losses))
        self.page_data |= encode_test(digits)

    def __exit__(self, kind, error, trace):
        # `kind`: the class of what ended the run early, or None
        states = {None: "finished", KeyboardInterrupt: "stopped"}
        state = states.get(kind, "failed")
        with suppress(OSError):  # nobody may read it
            self.bar.close()
        if state == "stopped" and RANK == 0:
            warn(f"stopped after {self.epochs_done} of {self.args.epochs} epochs")
        try:
            if self.has_begun:
                message = str(error) if state == "failed" else ""
                self.save(state, message, needed=(state == "finished"))
                self.plotter.draw(self.smoothed.get())
            for path in sorted(self.folder.glob("*.png")):
                self.comet.log_image(str(path), path.stem)
            self.comet.log_asset(str(self.folder / "report.html"), "report.html")
        finally:
            self.location = end_comet(self.comet, self.folder)


def check_finite(value, name):
    if not math.isfinite(value):
        text = f"training diverged: {name} {value}; reduce --lr"
        raise RunError(text, resumable=False)


# ===== Results and pictures ===========

BLUE = "#0072B2"  # of what is right; all three are colour-blind safe
VERMILION = "#D55E00"  # of what is wrong
GREY = "#999999"
FRAME_WIDTHS = {BLUE: 1, VERMILION: 4}  # for those who see no colours
# With 256 levels, whatever matplotlib's settings are:
GREYS = matplotlib.colormaps["gray"].resampled(256)
ORANGES = matplotlib.colormaps["Oranges"].resampled(256)


class Digits:
    """Images (N, 28, 28), probabilities (N, 10) and true labels (N,)."""

    def __init__(self, images, probabilities, labels):
        self.images = images.cpu()
        self.labels = labels.cpu()
        self.probabilities = probabilities.cpu()
        self.confidence, self.predictions = self.probabilities.max(dim=1)
        self.correct = self.predictions == self.labels

    def __getitem__(self, some):
        return Digits(self.images[some], self.probabilities[some], self.labels[some])

    def get_mistakes(self):
        """Return the misclassified digits, the most confident first."""
        order = self.confidence.argsort(descending=True, stable=True)
        wrong = order[~self.correct[order]]
        return self[wrong]

    def count_confusions(self):
        """Return how often each label (row) was predicted as each digit: (10, 10)."""
        pairs = 10 * self.labels + self.predictions
        return pairs.bincount(minlength=100).reshape(10, 10).numpy()

    def get_calibration_error(self):
        """Return the gap of confidence and accuracy: Guo et al. 2017, arXiv:1706.04599.

        In 15 bins of confidence; 0 is perfect: of answers 90 % sure, 90 % are correct.
        """
        bins = (15 * self.confidence).long().clamp(max=14)
        # Of each bin the sum of (confidence - correct), 0 if it is calibrated:
        gaps = bins.bincount(weights=self.confidence - self.correct.double())
        return gaps.abs().sum().item() / len(self.labels)


def summarise_test(test_loss, test_accuracy, digits):
    """Return the results of the test, as metrics.json has them."""
    return {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "calibration_error": digits.get_calibration_error(),
        "confusion_matrix": digits.count_confusions().tolist(),
    }


def save_pictures(digits, folder):
    """Save pictures of test digits, mistakes and the confusion matrix."""
    mistakes = digits.get_mistakes()[:20]
    save_picture(folder / "sample_prediction.png", draw_results, digits[:1])
    save_picture(folder / "single_prediction.png", draw_results, digits[:1], bars=True)
    save_picture(folder / "predictions_grid.png", draw_results, digits[:20])
    save_picture(folder / "worst_mistakes.png", draw_results, mistakes)
    save_picture(folder / "confusion_matrix.png", draw_confusions, digits)


def save_picture(path, draw, *arguments, **named):
    """Save the Figure that draw(...) returns; if that fails, warn."""
    if RANK > 0:
        return
    content = io.BytesIO()
    try:
        # Not with the user's settings; without warnings about a font.
        with matplotlib.style.context("default"), warnings.catch_warnings(record=True):
            draw(*arguments, **named).savefig(content, format="png", dpi=100)
        write(path, content.getbuffer(), needed=False)
    except Exception as error:  # noqa: BLE001
        warn(f"cannot draw {path}: {get_reason(error)}")


def draw_results(digits, bars=False):
    """Return a Figure of digits, predictions and true labels."""
    titles, colours = [], []
    for n, label in enumerate(digits.labels):
        sign = "✓" if digits.correct[n] else "✗"
        prediction = f"predicted {digits.predictions[n]} ({digits.confidence[n]:.1%})"
        titles.append(f"{sign} {prediction}\ntrue label {label}")
        colours.append(BLUE if digits.correct[n] else VERMILION)
    images = digits.images.numpy()
    if bars:
        return draw_bars(images, digits.probabilities.numpy(), titles, colours)
    return draw_grid(images, titles, colours)


def draw_grid(images, titles, colours):
    """Return a Figure of images and titles, four in a row."""
    columns = max(1, min(4, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows))
    # All in one Axes, since each takes 0.02 s.
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
    cell_width = 31  # 28 pixels and their margins
    cell_height = 37  # with two lines of text above
    for n, image in enumerate(images):
        x = cell_width * (n % columns) + 1
        y = cell_height * (n // columns) + 8
        axes.imshow(image, GREYS, vmin=0, vmax=255, extent=(x, x + 28, y + 28, y))
        width = FRAME_WIDTHS[colours[n]]
        axes.add_patch(Rectangle((x, y), 28, 28, fill=False, ec=colours[n], lw=width))
        axes.text(x, y - 1, titles[n], color=colours[n], size=9, parse_math=False)
    axes.set(xlim=(0, cell_width * columns), ylim=(cell_height * rows, 0))
    return figure


def draw_bars(images, probabilities, titles, colours):
    """Return a Figure of images, each with a bar chart at its right; two in a row."""
    columns = min(2, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(6 * columns, 2.5 * rows))
    figure.subplots_adjust(left=0.02, right=0.98, wspace=0.5, hspace=0.5)
    figure.subplots_adjust(bottom=0.2 / rows, top=1 - 0.2 / rows)
    for n, image in enumerate(images):
        axes = figure.add_subplot(rows, 3 * columns, 3 * n + 1)
        axes.imshow(image, GREYS, vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.set_title(
            titles[n], color=colours[n], size=9, loc="left", parse_math=False
        )
        axes = figure.add_subplot(rows, 3 * columns, (3 * n + 2, 3 * n + 3))
        drawn = axes.bar(range(10), 100 * probabilities[n], color=GREY)
        drawn[probabilities[n].argmax()].set(color=colours[n])
        axes.bar_label(drawn, fmt="%.1f", fontsize=8)
        axes.set(xlabel="digit", ylabel="probability (%)", ylim=(0, 112))
        axes.set_xticks(range(10))
    return figure


def draw_confusions(digits):
    """Return a Figure of the confusion matrix: true label by prediction."""
    matrix = digits.count_confusions()
    accuracy = 100 * matrix.diagonal() / matrix.sum(axis=1)
    mistakes = matrix - np.diag(matrix.diagonal())
    figure = Figure(figsize=(6.7, 6))
    margins = {"left": 0.17, "right": 0.98, "bottom": 0.09, "top": 0.99}
    axes = figure.subplots(gridspec_kw=margins)
    axes.imshow(mistakes, ORANGES, vmax=max(1, 2 * mistakes.max()))
    for (row, column), count in np.ndenumerate(matrix):
        colour = BLUE if row == column else "black"
        axes.text(column, row, count or "·", ha="center", va="center", color=colour)
    axes.set_yticks(range(10), [f"{accuracy[n]:.1f} %   {n}" for n in range(10)])
    axes.set(xlabel="predicted", ylabel="accuracy and true label", xticks=range(10))
    return figure


# ===== Comet ==========================

COMET_DEFAULTS = {  # of Comet's variables; what the user has set wins
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_FALLBACK_STREAMER_KEEP_OFFLINE_ZIP": "1",  # an archive, too
    "COMET_TIMEOUT_HTTP": "5",  # seconds, if the server does not answer
    "COMET_TIMEOUT_API": "5",
    "COMET_TIMEOUT_FILE_UPLOAD": "5",
    "COMET_TIMEOUT_CLEANING": "10",  # seconds at the end for what is not sent yet
    "COMET_TIMEOUT_UPLOAD": "30",  # and for files
    # No retry, since that waits as long as the server says (Retry-After).
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "0",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
}
NO_KEY = (None, "", "YOUR_API_KEY_HERE")


class Tracker:
    """Comet's experiment, or none. It has all methods of the experiment.

    If a call fails, a line says so, and the run goes on.
    """

    def __init__(self, experiment=None, directory=None):
        self.experiment = experiment
        self.directory = directory  # of the archive
        self.url = getattr(experiment, "url", None)  # None if offline

    def __getattr__(self, name):  # of any method: log_metric, end, ...
        def call(*arguments, **named):
            if self.experiment is None:
                return None
            with redirect_stderr(io.StringIO()):  # what its threads print
                try:
                    return getattr(self.experiment, name)(*arguments, **named)
                except Exception as error:  # noqa: BLE001
                    problem = type(error).__name__
            warn(f"Comet: {name} failed ({problem}); the run goes on")
            return None

        return call


def start_comet(mode, folder, experiment_key):
    """Return a Tracker; and the experiment's address, or why there is none."""
    if mode == "off" or RANK > 0:
        return Tracker(), "off"
    for name, value in COMET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        return open_experiment(mode, folder, experiment_key)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001
        if isinstance(error, ModuleNotFoundError) and error.name == "comet_ml":
            reason = "needs: pip install comet-ml"
        elif isinstance(error, (ImportError, ValueError)):
            reason = f"fails: {type(error).__name__}: {error}".partition("\n")[0]
        else:  # its text may have the API key in it
            advice = "look at your variables COMET_… and at ~/.comet.config"
            reason = f"fails: {type(error).__name__} ({advice})"
    if mode != "auto":
        raise UserError(f"--comet {mode} {reason}; or use --comet off")
    return Tracker(), f"off (it {reason})"


def open_experiment(mode, folder, experiment_key):
    """Return what start_comet returns; raise whatever Comet raises."""
    import comet_ml

    key_in_code = COMET_API_KEY not in NO_KEY  # and in its git patch
    api_key = comet_ml.get_config("comet.api_key") or COMET_API_KEY
    if mode == "online" and api_key in NO_KEY:
        raise UserError("--comet online needs an API key: set COMET_API_KEY")
    directory = os.environ.get("COMET_OFFLINE_DIRECTORY") or str(folder)
    directory = os.path.expanduser(directory)
    os.makedirs(directory, exist_ok=True)
    if not experiment_key and is_in_study(folder):
        # COMET_EXPERIMENT_KEY would be the same for all runs.
        experiment_key = os.urandom(16).hex()
    options = {
        "project_name": comet_ml.get_config("comet.project_name") or COMET_PROJECT,
        "experiment_key": experiment_key,
        "mode": "get_or_create" if experiment_key else "create",
        "experiment_config": comet_ml.ExperimentConfig(
            offline_directory=directory,
            log_code=not key_in_code,
            log_git_patch=not key_in_code,
            parse_args=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            display_summary_level=0,
        ),
    }
    target = "offline"
    if mode != "offline" and api_key not in NO_KEY:
        with suppress(Exception):  # its text may have the key in it
            experiment = comet_ml.start(online=True, api_key=api_key, **options)
            if experiment.alive:
                return Tracker(experiment, directory), experiment.url
        if mode == "online":
            text = "--comet online: no answer, or the API key is wrong; check the key"
            raise UserError(f"{text}, or use --comet offline", status=1)
        target = "offline (Comet does not answer, or rejects the API key)"
    experiment = comet_ml.start(online=False, **options)
    return Tracker(experiment, directory), target


def end_comet(comet, folder):
    """End the experiment; return in words where the results are."""
    location = f"results in {folder}"
    if comet.experiment is None:
        return location
    experiment_key = comet.get_key()
    if comet.url:
        with suppress(OSError):
            print("Sending the rest to Comet")
    comet.end()
    archives = Path(comet.directory).glob(f"{experiment_key}*.zip")
    archive = max(archives, key=os.path.getmtime, default=None)
    if not has_metrics(archive):  # or there is no archive
        advice = "Comet got nothing: make room on the disk and in its temporary folder"
        return f"{location}; {comet.url or advice}"
    if comet.url is None:
        return f"{location}; {quote(['comet', 'upload', str(archive)])}"
    retry = quote(["comet", "upload", "--force-reupload", str(archive)])
    return f"{comet.url}; {location}; if it is incomplete: {retry}"


def has_metrics(archive):
    with suppress(Exception), zipfile.ZipFile(archive) as file:
        return b'"loss"' in file.read("messages.json")


# ===== Errors, settings and files =====


class UserError(Exception):
    """What is wrong and what to do. Status 2: wrong input; 1: it failed."""

    def __init__(self, text, status=2):
        super().__init__(" ".join(text.split()))
        self.status = status


class RunError(UserError):
    """A run cannot go on; what it has saved is kept."""

    def __init__(self, text, resumable=True):
        super().__init__(text, status=1)
        self.resumable = resumable


def get_reason(error):
    """Return what any error says, in one line."""
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


@contextmanager
def explaining(what):
    """Turn any error into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{what}: {get_reason(error)}") from None


@functools.cache  # each text once
def warn(text):
    with suppress(OSError):
        print(f"main.py: {text}", file=sys.stderr)


def quote(words):
    """Return a command as the system's shell takes it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def make_config(args, device, model):
    """Return what config.json says of a run: settings, network, computer."""
    settings = {name: getattr(args, name) for name in FLAGS}
    to_repeat = {name: settings[name] for name in FLAGS if name not in SURROUNDINGS}
    packages = torch, torchvision, np, matplotlib
    return {
        "settings": settings,
        "recipe_numbers": get_recipe_numbers(args),
        "network": re.sub(" at 0x[0-9a-fA-F]+", "", str(model)),  # <function f at 0x..>
        "title": type(model).__name__,
        "parameters": count_parameters(model),
        "command": quote(["python", "main.py", *as_flags(to_repeat)]),
        "device": str(device),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": {package.__name__: package.__version__ for package in packages},
        "data_md5": dict(MNIST.resources),
    }


def read_config(folder):
    """Return what config.json says of a run or a study."""
    with explaining(f"{folder} is not a run folder (runs/NAME): its config.json"):
        config = json.loads(Path(folder, "config.json").read_bytes())
        known = config["settings"]  # perhaps of another version of FLAGS
        config["settings"] = {name: known.get(name, DEFAULTS[name]) for name in FLAGS}
    return config


def compare_configs(before, now):
    """Raise UserError if a run began with another network or other numbers."""
    lines = []  # two lists: before, now
    for config in before, now:
        numbers = config["recipe_numbers"]
        number_lines = [f"{name} {numbers[name]}" for name in numbers]
        lines.append(number_lines + config["network"].split("\n")[1:])  # not the class
    for old, new in itertools.zip_longest(*lines, fillvalue="nothing"):
        if old != new:
            text = f"the run has {old.strip()}, main.py has {new.strip()}"
            raise UserError(f"--resume: {text}; undo that, or start a new run")


def load_weights(models, weights, path):
    """Put weights into the first of the models that they fit; return it."""
    problems = []
    for model in models:
        try:
            model.load_state_dict(weights)
            return model
        except Exception as error:  # noqa: BLE001
            first, _, others = str(error).partition("\n")
            problems.append(others or first)  # others: which names and sizes
    text = f"the layers in main.py are not those of {path}: put the old ones back"
    nearest = min(problems, key=len)  # of the network that fits best
    raise UserError(f"{text}: {nearest:.300}")


def load_predictor(path):
    """Return the predictor of a file, or of a folder's newest run; and its path."""
    path = Path(path)
    if path.suffix == ".pt" and not os.path.exists(path):
        raise UserError(f"there is no file {path}: change --checkpoint")
    if not os.path.isfile(path):  # a folder: take its newest run
        found = sorted(path.rglob("model.pt"), key=os.path.getmtime)
        if not found:
            raise UserError(f"no model.pt in {path}: python main.py makes one")
        path = found[-1]
    weights = load_tensors(path)
    if isinstance(weights, dict) and "optimizer" in weights:  # a checkpoint.pt
        weights = weights["model"]
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds no weights: give the model.pt of a run")
    settings = {}
    names = list(MODELS)
    if (path.parent / "config.json").exists():
        settings = read_config(path.parent)["settings"]
        names = [settings["model"]]
        if names[0] not in MODELS:
            raise UserError(f"{path} is of {names[0]}: add it to MODELS in main.py")
    else:
        warn(f"no config.json beside {path}: taken for one of the classic recipe")
    torch.manual_seed(settings.get("seed", 0))  # a network may draw random constants
    models = [make_model(name) for name in names]
    model = load_weights(models, weights, path)
    return make_predictor(model, settings.get("recipe")).eval(), path


def make_run_folder(output_dir, name):
    """Make and return a new folder, named by time and `name`."""
    if RANK > 0:
        return Path(os.devnull)  # only the first process writes
    folder = Path(output_dir, time.strftime("%Y%m%d-%H%M%S-") + name)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if os.path.exists(folder):  # another run has started in this second
            return make_run_folder(output_dir, name + "-2")
        text = f"cannot make {folder}: {error.strerror}; choose another --output-dir"
        raise UserError(text) from None
    return folder


def write(path, content, needed=True):
    """Write a file, whole or not at all; if that fails, raise or warn."""
    if RANK > 0:  # only the first process writes
        return
    partial = Path(f"{path}.{os.getpid()}.part")  # another run may write it, too
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror}"
        text += "; make room there and allow writing, or change --output-dir"
        if needed:
            raise RunError(text) from None
        warn(text)
    finally:
        with suppress(OSError):
            partial.unlink()


def save_json(values, path, needed=True):
    write(path, json.dumps(values, indent=2).encode(), needed)


def save_tensors(values, path):
    content = io.BytesIO()
    torch.save(values, content)
    write(path, content.getbuffer())


def load_tensors(path):
    """Return what save_tensors has written. No code in the file is run."""
    with explaining(f"cannot read {path}"):
        content = io.BytesIO(Path(path).read_bytes())
    try:
        return torch.load(content, "cpu", weights_only=True)
    except Exception:  # noqa: BLE001, its text recommends to run such code
        text = f"{path} is damaged, or not of main.py: give another, or start a new run"
        raise UserError(text) from None


def read_archive(path, md5):
    """Return the bytes of a file of MNIST, downloaded if missing."""
    hint = f"put the file there (MD5 sum {md5}, see data/README.md)"
    with explaining(f"cannot read {path}: {hint}"):
        content = path.read_bytes() if path.exists() else download(path, md5)
    if get_md5(content) != md5:
        reason = f"damaged, or not MNIST's (MD5 sum is not {md5})"
        raise UserError(f"{path} is {reason}: move it away, or change --data-dir")
    return content


def download(path, md5):
    """Return a file of MNIST from a mirror; keep it at `path`."""
    print(f"Downloading {path.name}")
    content = b""
    for mirror in MNIST.mirrors:
        url = mirror + path.name
        with suppress(Exception), urllib.request.urlopen(url, timeout=20) as answer:
            content = answer.read()
        if get_md5(content) == md5:
            break
    else:  # no break
        raise OSError("no mirror answers with this file")
    with suppress(OSError, RunError):  # the folder may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
    return content


def get_md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# ===== Several processes ==============
# torchrun: each process trains on its share of a batch; gradients are averaged.

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # 0: the first process
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine
LOCAL_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1


@contextmanager
def join_processes(args):
    """Join the processes that torchrun has started, if it has."""
    if not LAUNCHED:
        yield
        return
    count = args.limit or TRAINING_IMAGES
    if args.batch_size % WORLD_SIZE or count % WORLD_SIZE:
        text = "--batch-size and the number of images (60,000, or --limit)"
        raise UserError(f"{text} must be divisible by {WORLD_SIZE}")
    device = select_device(args.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend)
    with redirect_stdout(sys.stdout if RANK == 0 else None):  # only rank 0 prints
        yield
    distributed.destroy_process_group()


def average(loss, accuracy, device):
    """Return loss and accuracy, averaged over the processes of torchrun."""
    if LAUNCHED:
        both = torch.tensor([loss, accuracy], device=device)
        distributed.all_reduce(both)
        loss, accuracy = (both / WORLD_SIZE).tolist()
    return loss, accuracy


# ===== Several runs ===================
# --seeds: how much is chance? --compare: what does convolution bring? index.html is
# the overview of the runs in a folder.


def train_all(args, folder):
    """Train once, or once for each seed and model: a study."""
    model_names = ("fc", "cnn") if args.model == "both" else (args.model,)
    seeds = range(args.seed, args.seed + args.seeds)
    pairs = list(itertools.product(seeds, model_names))
    if len(pairs) == 1:
        train_run(args, folder)
        return
    before = read_runs(folder)
    epochs_done = {name: len(run["train_loss"]) for name, run in before.items()}
    most = max(epochs_done.values(), default=0)
    if most > args.epochs:
        raise UserError(f"--epochs: a run has done {most}; give at least that")
    settings = {name: getattr(args, name) for name in FLAGS}
    save_json({"settings": settings}, folder / "config.json")
    names = [f"{model_name}-seed-{seed}" for seed, model_name in pairs]
    for name, (seed, model_name) in zip(names, pairs):
        is_finished = name in before and before[name]["state"] == "finished"
        if is_finished and epochs_done[name] == args.epochs:
            continue
        print(f"Run {names.index(name) + 1} of {len(names)}: {model_name}, seed {seed}")
        if RANK == 0:
            (folder / name).mkdir(exist_ok=True)
        run_args = vars(args) | {"model": model_name, "seed": seed, "seeds": 1}
        train_run(argparse.Namespace(**run_args), folder / name)
    if RANK == 0:
        runs = read_runs(folder)
        rows = [make_row(runs[name]) for name in names]
        print_table(rows)
        save_json({"runs": rows}, folder / "metrics.json")
        print(f"Results of this study: {folder / 'index.html'}")


def make_row(run):
    """Return a run's row of a study's table."""
    return {
        "model": run["settings"]["model"],
        "seed": run["settings"]["seed"],
        "parameters": run["parameters"],
        "seconds": sum(run["epoch_seconds"]),
        "train_accuracy": run["train_accuracy"][-1],  # the last
        "test_accuracy": run["test_accuracy"],
        "test_loss": run["test_loss"],
    }


def print_table(rows):
    """Print the runs, and each model's mean accuracy."""
    print("model  seed  parameters  seconds  train accuracy  test accuracy  test loss")
    layout = "{model:5} {seed:5} {parameters:11,} {seconds:8.1f} {train_accuracy:15.4f}"
    layout += " {test_accuracy:14.4f} {test_loss:10.4f}"
    for row in rows:
        print(layout.format(**row))
    for name in sorted({row["model"] for row in rows}):
        values = [row["test_accuracy"] for row in rows if row["model"] == name]
        if len(values) > 1:
            spread = np.std(values, ddof=1)
            print(f"{name}, mean test accuracy: {np.mean(values):.4f} ± {spread:.4f}")


def is_in_study(folder):
    return "-seed-" in folder.name and (folder.parent / "config.json").exists()


def get_output_dir(folder):
    """Return the folder that a run, or its study, lies in."""
    return folder.parent.parent if is_in_study(folder) else folder.parent


@functools.lru_cache(maxsize=500)  # what has changed is read again
def read_run(folder, time_changed, size):
    """Return what the overview shows of a run."""
    config = read_config(folder)
    run = json.loads((folder / "metrics.json").read_bytes())
    curve = smooth(run.pop("losses")).get()
    every = len(curve) // 200 + 1  # at most 200 points a curve
    run["curve"] = np.round(curve[every - 1 :: every], 4).tolist()
    names = "settings", "recipe_numbers", "title", "parameters", "device"
    run |= {name: config[name] for name in names}
    return run | {"curve_every": every, "changed": time_changed / 1e9}  # in seconds


def read_runs(folder):
    """Return what the overview shows of a folder's runs, by name."""
    runs = {}
    for pattern in "*/metrics.json", "*/*/metrics.json":  # runs; those of studies
        for path in folder.glob(pattern):
            with suppress(Exception):  # not a run, or it cannot be read
                stat = path.stat()
                run = read_run(path.parent, stat.st_mtime_ns, stat.st_size)
                name = path.parent.relative_to(folder).as_posix()
                runs[name] = run | {"name": name}
    return runs


def write_overviews(folder):
    """Write or remove index.html beside a run, and beside its study, if it has one."""
    if RANK > 0:
        return
    folder = folder.resolve()  # "." has no parent
    output_dir = get_output_dir(folder)
    for parent in {folder.parent, output_dir}:
        runs = read_runs(parent)
        newest_first = sorted(runs.values(), key=lambda run: -run["changed"])
        values = {"kind": "runs", "runs": newest_first, "name": parent.name}
        values["is_study"] = parent != output_dir
        values["defaults"] = DEFAULTS
        if runs:
            write_page(parent / "index.html", values)
        elif is_page(parent / "index.html"):
            (parent / "index.html").unlink()


# ===== Your own digits ================
# --predict: photographs and drawings become images like MNIST's. The numbers below were
# chosen on pictures by other people: tests/README.md.

PICTURES = ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"
PICTURES += ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"
SIDE = 280  # pixels of the longer side in which a digit is looked for
BRIGHTNESS = 0.299, 0.587, 0.114  # of red, green and blue: ITU-R BT.601
MOST_MEMORY = 500_000_000  # bytes of a picture; of a JPEG, after its reduction
LEAD = 0.2  # of an answer's probability over the second one, at least


def find_images(names):
    """Return the files of names, folders and patterns such as *.png."""
    files = []
    for name in names:
        if os.path.isdir(name):
            pattern = os.path.join(glob.escape(name), "*")
            found = filter(is_picture, glob.glob(pattern))
        elif os.path.exists(name):
            found = [name]
        else:
            found = filter(os.path.isfile, glob.glob(name))
        files += sorted(found) or [name]  # read_photo says why there is none
    return files


def is_picture(file):
    return file.lower().endswith(PICTURES) and os.path.isfile(file)


def read_photo(path):
    """Return a picture as grey levels (H, W), 0 to 255.

    Of an animation or several pages, the one with most contrast. Raises UserError.
    """
    with suppress(ImportError):  # for pictures of iPhones
        from pillow_heif import register_heif_opener

        register_heif_opener()
    if os.path.isdir(path):
        raise UserError(f"cannot read {path}: there is no picture in this folder")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, for instance
        raise UserError(f"cannot read {path}: it is not a file")
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # read_frame looks at the size
    try:
        # An open file: Pillow turns some TIFFs wrongly if it gets the path.
        with open(path, "rb") as file, warnings.catch_warnings(record=True):
            image = Image.open(file)
            frames = ImageSequence.Iterator(image)
            if image.format == "MPO":  # other frames are depths, for instance
                frames = [image]
            frames = itertools.islice(frames, 50)  # not all of a long animation
            return max([read_frame(frame) for frame in frames], key=get_contrast)
    except UnidentifiedImageError:
        reason = "not an image (try JPEG; for HEIC: pip install pillow-heif)"
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        reason = getattr(error, "strerror", None) or error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    raise UserError(f"cannot read {path}: {reason}")


def read_frame(image):
    """Return the grey levels of an open image, reduced if it is large."""
    image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a smaller size
    # Bytes of a pixel in Pillow's memory; more if it must be converted.
    pixel_size = {"L": 1, "RGB": 4, "CMYK": 4}.get(image.mode, 12)
    if image.width * image.height * pixel_size > MOST_MEMORY:
        raise ValueError("it is too large: save it smaller, or as JPEG")
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    elif image.mode not in ("L", "RGB", "CMYK", "I", "F"):
        image = image.convert("RGBA")
    image = image.reduce(max(1, max(image.size) // (3 * SIDE)))  # not yet to SIDE
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):  # 16 or 32 bits
        return scale_levels(np.array(image, np.float32))
    levels = np.array(image.convert("RGBA"), np.float32)
    colours = levels[..., :3]
    opacity = levels[..., 3:] / 255
    mean_opacity = max(opacity.mean(), 0.001)
    mean_colour = (colours * opacity).mean(axis=(0, 1)) / mean_opacity
    variance = ((colours - mean_colour) ** 2 * opacity).mean() / mean_opacity
    behind = mean_colour.mean()  # seen through what is transparent
    if mean_opacity < 0.5 or variance < 10**2:  # ink alone, nearly one colour
        behind = 255 if behind < 128 else 0  # on white or black
    colours = behind + opacity * (colours - behind)
    # Ink as bright as its paper differs more in red, green or blue than in grey.
    grey = colours @ BRIGHTNESS
    strongest = max(np.moveaxis(colours, 2, 0), key=get_contrast)
    return strongest if get_contrast(strongest) > 2.5 * get_contrast(grey) else grey


def get_contrast(levels):
    """Return how much levels differ from those around, in whatever light."""
    around = scipy.ndimage.uniform_filter(levels, max(1, max(levels.shape) // 5))
    return np.std(levels - around)


def scale_levels(levels):
    """Return levels of any range as grey levels, 0 to 255."""
    known = np.isfinite(levels)
    levels[~known] = np.median(levels[known])
    filtered = scipy.ndimage.median_filter(levels, 3)  # without hot pixels
    low = filtered.min()
    span = filtered.max() - low
    levels = 255 * (levels - low) / (span or 1)
    return np.nan_to_num(levels).clip(0, 255)  # huge numbers have overflowed


def without_margin(image):
    """Return the inner part: crops and scans may leave margins in other colours."""
    margin = min(image.shape) // 10
    return image[margin : len(image) - margin, margin : image.shape[1] - margin]


def find_ink(grey):
    """Return the ink: 0 on paper, 1 in a full stroke; or None.

    It is what is darker than the paper, whose grey level is estimated everywhere.
    """
    reduction = math.ceil(max(grey.shape) / 48)  # to 48 pixels: less detail
    small = np.array(Image.fromarray(grey).reduce(reduction))
    size = max(small.shape)
    # Strokes are the few pixels that differ much from what is around: the cube keeps
    # the sign and weights large differences most.
    around = scipy.ndimage.gaussian_filter(small, size / 10, mode="mirror")
    contrast = without_margin(around - small)
    if (contrast**3).sum() < 0:  # light ink on dark paper
        grey, small = -grey, -small
    # In a window wider than strokes, the light levels are the paper's.
    paper = small
    window = size // 2 + 1
    for percent in 75, 25:  # strokes vanish; then what has grown shrinks again
        paper = scipy.ndimage.percentile_filter(paper, percent, window, mode="nearest")
    paper = scipy.ndimage.minimum_filter(paper, 3)  # no ink at a shadow's edge
    paper = np.kron(paper, np.ones((reduction, reduction)))  # as large as before
    ink = paper[: len(grey), : grey.shape[1]] - grey
    # A quarter of noise is below 0.32 standard deviations; 6 * 0.32 is about two.
    noise = 6 * np.quantile(abs(ink), 0.25)
    full = np.median(ink[ink >= ink.max() / 2])  # in a full stroke
    # 10 of 255 levels. Where the paper's own levels differ much, it may be a shadow.
    needed = max(10, 2 * noise, np.ptp(paper) / 4)
    if full < needed:
        return None
    blank = min(noise, full / 4)  # paper up to here; capped: texture is noise, too
    return np.float32((ink - blank) / (full - blank))


def number_parts(mask, gap):
    """Number the parts of a mask from 1; return their heights and widths, too."""
    near = scipy.ndimage.maximum_filter(mask, 1 + 2 * gap)  # strokes have gaps
    numbers = scipy.ndimage.label(near)[0] * mask
    boxes = scipy.ndimage.find_objects(numbers)
    sizes = [(y.stop - y.start, x.stop - x.start) for y, x in boxes]
    return numbers, np.array([(0, 0), *sizes])  # 0 is the paper


def look_inside(lines, otherwise):
    """Return what the longest part of `lines` encloses; if only specks, `otherwise`."""
    numbers, sizes = number_parts(lines, gap=0)
    lengths = sizes.max(axis=1)
    longest = numbers == lengths.argmax()
    holes = scipy.ndimage.binary_fill_holes(longest) & ~longest
    inner = lengths[numbers * holes]  # for each pixel inside: how long its part is
    is_frame = inner.max() > 0.08 * max(lengths)  # a digit's loop holds specks
    return inner > 0 if is_frame else otherwise


def cut_out(ink):
    """Return the ink of the digit; and True if there is not clearly one."""
    dark = ink > 0.5  # strokes: printed lines are paler
    border = np.ones_like(dark)
    border[1:-1, 1:-1] = False
    # Without what touches the border, if there is more; then without a frame.
    inside = look_inside(dark | border, otherwise=dark)
    inside = look_inside(inside, otherwise=inside)
    numbers, sizes = number_parts(inside, gap=1 + max(dark.shape) // 100)
    counts = np.bincount(numbers[inside])  # pixels of each part
    largest = counts.argmax()
    large = counts > 0.06 * counts[largest]  # others are specks
    heights = sizes[:, 0] * large
    tall = heights > heights[largest] / 2  # others are like the bar of a 5
    digit = large[numbers]  # True in large parts
    height, width = np.ptp(np.nonzero(digit), axis=1)
    unclear = sum(tall) > 1
    unclear |= width > 2 * height  # digits that touch
    unclear |= counts[largest] < sum(counts) / 2  # many parts: a text, a pattern
    # What touches two adjacent borders, but does not fill the picture, is a shadow.
    touches_two = digit[[0, -1]].any() and digit[:, [0, -1]].any()
    fills = min(height / len(digit), width / len(digit[0])) >= 0.8
    unclear |= touches_two and not fills
    half_width = scipy.ndimage.distance_transform_edt(np.pad(digit, 1)).max()
    unclear |= half_width > 0.35 * max(height, width)  # no stroke: a spot, a shadow
    digit = scipy.ndimage.maximum_filter(digit, 5)  # with the faint edge
    return ink.clip(0, 1) * digit, unclear


def is_edge(grey, ink):
    """Return True if this is no stroke, but the edge of a shadow."""
    stroke = ink > 0.5
    around = scipy.ndimage.maximum_filter(stroke, 13)
    around &= ~scipy.ndimage.maximum_filter(stroke, 5)  # without the faint edge
    contrast = abs(grey[around] - np.median(grey[stroke]))
    as_dark = contrast < 0.2 * contrast.max(initial=0)
    # A stroke has paper on both sides: around a digit at most 0.14 of the pixels are as
    # dark as its ink (in a hard shadow), around a shadow's edge nearly half.
    return as_dark.sum() > 0.25 * as_dark.size


def centre_digit(ink):
    """Return the ink in 20x20 pixels, its mass centred in 28x28."""
    sides = np.ptp(np.nonzero(ink > 0.2), axis=1) + 1  # without the faint edge
    scale = sides.max() / 20  # pixels of the picture for one of MNIST's
    ink = np.pad(ink, math.ceil(15 * scale))  # the box stays inside
    # The mass goes to the middle of pixel (14, 14), as in MNIST.
    y, x = np.array(scipy.ndimage.center_of_mass(ink)) + 0.5 - 14.5 * scale
    box = x, y, x + 28 * scale, y + 28 * scale
    digit = Image.fromarray(ink).resize((28, 28), Image.BILINEAR, box)
    return (255 * np.array(digit) / np.max(digit)).round().astype(np.uint8)


def prepare_photo(grey):
    """Return an image as in MNIST, uint8 (28, 28); and None, or its problem."""
    picture = Image.fromarray(np.asarray(grey, np.float32))
    grey = np.array(picture.reduce(math.ceil(max(picture.size) / SIDE)))
    inner = without_margin(grey)
    grey = grey.clip(inner.min(), inner.max())
    ink = find_ink(grey)
    if ink is None:
        return np.zeros((28, 28), np.uint8), "nothing stands out: use more contrast"
    ink, unclear = cut_out(ink)
    unclear |= is_edge(grey, ink)
    problem = "several digits, or none: crop to one digit" if unclear else None
    return centre_digit(ink), problem


@torch.no_grad()
def predict_files(args):
    """Classify the files of --predict; return the exit status."""
    predictor, path = load_predictor(args.checkpoint or args.output_dir)
    print(f"Model: {path}")
    status = 0
    answers = []
    for name in find_images(args.predict):
        try:
            image, problem = prepare_photo(read_photo(name))
        except UserError as error:
            warn(str(error))
            status = 2
            continue
        # Twice, since some networks squeeze() a single image.
        images = normalise(torch.tensor(np.stack([image, image])))
        p = predictor(images).float().softmax(dim=1)[0]  # probabilities
        best, second = p.argsort(descending=True)[:2].tolist()
        answer = f"{best} ({p[best]:.1%}), then {second} ({p[second]:.1%})"
        if p[best] - p[second] < LEAD and not problem:
            problem = f"not clear; closest: {answer}"
        line = f"no answer: {problem}" if problem else answer
        print(f"{name}: {line}")
        title = f"{name[-60:]}\n{line}"  # so much fits
        title = title.encode("utf-8", "replace").decode()  # a name may be no text
        answers.append((image, p.numpy(), title, GREY if problem else BLUE))
    if answers:
        picture = make_run_folder(args.output_dir, "predict") / "predictions.png"
        save_picture(picture, draw_bars, *zip(*answers[:100]))  # not too large
        if picture.exists():
            print(f"Picture: {picture}")
    return status


# ===== The report page ================
# The parts in data/page, joined and filled in. The page computes what the network
# does, call by call as recorded here.

PAGE = Path(__file__).resolve().parent / "data" / "page"
PAGE_TITLE = b"<title>Training report</title>"
ROOM = 6_000_000  # bytes of a page for weights; all else takes less than 2 MB


def encode(array):
    return base64.b64encode(np.asarray(array).tobytes()).decode()


def encode_digits(digits):
    rows = np.float64(digits.probabilities).round(4).tolist()
    labels = digits.labels.tolist()
    return {"images": encode(digits.images), "probabilities": rows, "labels": labels}


def encode_test(digits):
    """Return the test digits that the page shows; of the mistakes 200, 0.2 MB."""
    mistakes = digits.get_mistakes()[:200]
    return {"first": encode_digits(digits[:20]), "wrong": encode_digits(mistakes)}


def encode_weights(weights, precision=torch.float32):
    """Return tensors by name as the page takes them."""
    encoded = {}
    for name, tensor in weights.items():
        data = encode(tensor.detach().cpu().to(precision))
        encoded[name] = {"shape": list(tensor.shape), "data": data}
    return encoded


class OperationTracer(TorchFunctionMode):
    """Writes down the calls of torch functions, for the page to repeat them.

    relu(x) becomes {"op": "relu", "args": [{"tensor": 0}], "kwargs": {},
    "result": {"tensor": 1}}. A tensor is {"tensor": number} (0 is the image, each
    result has the next number), {"weight": name} or {"constant": name}.
    """

    def __init__(self, model, image):
        super().__init__()
        self.operations = []
        self.constants = {}
        self.tensors = [image]  # kept, or Python would use its id again
        weights = model.state_dict(keep_vars=True)
        self.references = {id(weights[name]): {"weight": name} for name in weights}
        self.references[id(image)] = {"tensor": 0}

    def as_reference(self, value):
        """Return a value's stand-in in JSON, for json.dumps; set saw_tensor."""
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        if not isinstance(value, torch.Tensor):
            return str(value)  # a dtype, for instance
        self.saw_tensor = True
        if id(value) not in self.references:  # made without the image
            name = f"constant {len(self.constants)}"
            self.constants[name] = value
            self.references[id(value)] = {"constant": name}
        return self.references[id(value)]

    def as_json(self, value):
        text = json.dumps(value, default=self.as_reference)  # instead of tensors
        return json.loads(text, parse_constant=str)  # "-Infinity"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # PyTorch calls this instead of each torch function.
        self.saw_tensor = False  # until as_json has come to a tensor
        call = {"args": self.as_json(args), "kwargs": self.as_json(kwargs or {})}
        call["op"] = function.__name__
        if call["op"] == "__get__":  # of a property: x.T
            call["op"] = function.__self__.__name__
        result = function(*args, **kwargs or {})
        results = result if isinstance(result, (tuple, list)) else [result]
        tensors = [value for value in results if isinstance(value, torch.Tensor)]
        is_operation = bool(tensors) or call["op"] == "__setitem__"
        if self.saw_tensor and is_operation:
            for tensor in tensors:
                self.references[id(tensor)] = {"tensor": len(self.tensors)}
                self.tensors.append(tensor)
            self.operations.append(call | {"result": self.as_json(result)})
        return result


@torch.no_grad()
def trace_program(model, image):
    """Return what model(image) computes, in evaluation mode, call by call."""
    with OperationTracer(model.eval(), image) as tracer:
        logits = model(image)
    return {
        "operations": tracer.operations,
        "output": tracer.as_reference(logits),
        "shapes": [list(tensor.shape) for tensor in tracer.tensors],
        "constants": encode_weights(tracer.constants),
    }


def record_program(model, device):
    """Return {"program": what trace_program returns}; or {"problem": why not}."""
    try:
        image = torch.zeros(1, 1, 28, 28, device=device)
        return {"program": trace_program(model, image)}
    except Exception as error:  # noqa: BLE001, the run goes on
        return {"problem": f"recording its operations failed ({get_reason(error)})"}


def describe_network(recorder):
    """Return a network as the page needs it; and the snapshots, one more if due."""
    program_or_problem = recorder.program_or_problem
    text = json.dumps(program_or_problem)
    weights = {}  # those in it, as {"weight": name}: the page uses no others
    for name, tensor in recorder.model.state_dict().items():
        if f'"weight": {json.dumps(name)}' in text:
            weights[name] = tensor
    room = ROOM - len(text)
    # In float16: 2 bytes a number, times 4/3 as base64.
    half_size = 8 / 3 * sum(tensor.numel() for tensor in weights.values())
    is_half = 2 * half_size > room  # else there is room for float32
    if half_size > room:
        program_or_problem = {"problem": "it is too large for a page"}
        weights = {}
    # + 1: there are no weights if the recording has failed.
    snapshots = choose_snapshots(recorder, weights, room / (half_size + 1))
    precision = torch.float16 if is_half else torch.float32
    try:
        check = compute_check(recorder, is_half)
    except Exception as error:  # noqa: BLE001, it is only for the page
        reason = get_reason(error)
        program_or_problem = {"problem": f"its answers cannot be computed ({reason})"}
        check = {"images": "", "logits": []}
    epoch = recorder.epochs_done
    page_data = program_or_problem | {
        "mean_std": [MEAN, STD],
        "weights": encode_weights(weights, precision),
        "half": is_half,
        "weights_epoch": epoch,
        "snapshots": [old for old in snapshots if old["epoch"] < epoch],
        "check": check,
    }
    return page_data, snapshots


def choose_snapshots(recorder, weights, copies):
    """Return the snapshots to keep: float16 weights of every few epochs.

    `copies`: so many sets of float16 weights fit; the current ones, float32, take two.
    """
    count = max(1, min(8, math.floor(copies) - 2))  # 8 are enough
    every = math.ceil(recorder.args.epochs / count)
    snapshots = [old for old in recorder.snapshots if old["epoch"] % every == 0]
    if copies >= 3 and recorder.epochs_done % every == 0:
        texts = {name: encode(weights[name].cpu().half()) for name in weights}
        snapshots.append({"epoch": recorder.epochs_done, "weights": texts})
    return snapshots


@torch.no_grad()
def compute_check(recorder, is_half):
    """Return ten images and their logits, for the page to check itself."""
    images = load_mnist(recorder.args.data_dir)[0][:10]
    predictor = make_predictor(recorder.model, recorder.args.recipe).eval()
    compute = predictor
    if is_half:  # with the weights as the page gets them
        weights = predictor.state_dict()
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                weights[name] = tensor.half().to(tensor.dtype)
        compute = functools.partial(
            functional_call, predictor, weights, tie_weights=False
        )
    logits = []
    for image in normalise(images).to(recorder.device):  # as in the page
        logits.append(compute(image[None]).float().flatten().tolist())
    return {"images": encode(images), "logits": logits}


def is_page(path):
    with suppress(FileNotFoundError), path.open("rb") as file:
        return PAGE_TITLE in file.read(500)  # bytes; it is near the top


def write_page(path, values):
    """Write a page: the parts in data/page, joined, with `values` in it."""
    if RANK > 0:
        return
    values = values | {"folder": str(path.parent.resolve()), "written": time.time()}
    data = json.dumps(values, default=str)  # a constant may be a Path
    data = data.replace("<", "\\u003c")  # no text may end the script
    try:
        if path.exists() and not is_page(path):
            warn(f"cannot write {path}: it is not a page of this script; rename it")
            return
        # An edited part may be in another encoding.
        page = (PAGE / "report.html").read_text(encoding="utf-8", errors="replace")
        for file in [*PAGE.glob("*.css"), *PAGE.glob("*.js")]:
            text = file.read_text(encoding="utf-8", errors="replace")
            link = f'<link rel="stylesheet" href="{file.name}">'
            page = page.replace(link, f"<style>\n{text}</style>")
            script = f'<script src="{file.name}"></script>'
            page = page.replace(script, f"<script>\n{text}</script>")
        page = page.replace(">null<", f">{data}<", 1)  # <script id="run">null</script>
        write(path, page.encode(), needed=False)
    except OSError as error:
        warn(f"cannot write {path}: {error}; it needs data/page beside main.py")


# ===== The command line ===============

FLAGS = {  # name: (default, allowed, help); allowed: choices, or lowest and highest
    "recipe": (RECIPE, ("classic", "accurate"), "the settings below, as a whole"),
    "model": (MODEL, None, "a network of MODELS; both: fc and cnn"),
    "epochs": (EPOCHS, (1, 10_000), "passes over the training images"),
    "batch_size": (BATCH_SIZE, (1, TRAINING_IMAGES), "images per step"),
    "lr": (LR, (1e-9, 1e9), "learning rate"),
    "optimizer": (OPTIMIZER, ("sgd", "adam"), "what updates the weights"),
    "seed": (SEED, (0, 2**32 - 1), "of initial weights and shuffling"),
    "seeds": (SEEDS, (1, 1000), "number of runs: SEED, SEED + 1, ..."),
    "limit": (LIMIT, (0, TRAINING_IMAGES), "train on the first N images; 0: all"),
    "device": (DEVICE, None, "auto, cpu, mps, cuda, cuda:1, ..."),
    "data_dir": (DATA_DIR, None, "folder with MNIST/raw/*.gz"),
    "output_dir": (OUTPUT_DIR, None, "where the runs are kept"),
    "comet": (COMET, ("auto", "online", "offline", "off"), "auto: online with a key"),
}
DEFAULTS = {name: details[0] for name, details in FLAGS.items()}
# Where a run happens; not taken from a resumed run:
SURROUNDINGS = "device", "data_dir", "output_dir", "comet"


def as_flag(name):
    return "--" + name.replace("_", "-")


def as_flags(values):
    return [f"{as_flag(name)}={values[name]}" for name in values]


def make_parser():
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py [flags] (see --help)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, details in FLAGS.items():
        default, allowed, meaning = details
        kind = type(allowed[0]) if allowed else os.path.expanduser
        choices = allowed if kind is str else None
        meaning += " (default: %(default)s)"
        add(as_flag(name), default=default, type=kind, choices=choices, help=meaning)
    add("--compare", action="store_const", dest="model", const="both")
    add("--resume", type=Path, help="continue a run: its folder")
    add("--predict", nargs="+", metavar="IMAGE", help="classify images, folders, *.png")
    add("--checkpoint", metavar="FILE", help="the model.pt (default: the newest)")
    return parser


def read_settings(argv=None):
    """Return the settings, a Namespace; argparse exits if one is wrong."""
    parser = make_parser()
    typed = sys.argv[1:] if argv is None else list(argv)
    # Parsed twice: first for recipe and run; then with their settings as flags, since
    # argparse checks no defaults. Of two equal flags the last wins: the typed one.
    args = parser.parse_args(as_flags(DEFAULTS) + typed)
    if args.predict and args.resume:
        parser.error("--predict does not go with --resume")
    folder = None
    saved = {}  # the settings of the run to resume
    if args.resume:
        folder = Path(os.path.expanduser(args.resume)).resolve()  # "." has no name
        if os.path.isfile(folder):
            folder = folder.parent  # runs/NAME/checkpoint.pt
        saved = read_config(folder)["settings"]
        for name in SURROUNDINGS:
            del saved[name]
    base = saved
    if args.recipe == "accurate" and not saved:
        base = ACCURATE
    args = parser.parse_args(as_flags(DEFAULTS | base) + typed)
    args.resume = folder
    check_settings(parser, args)
    if saved:
        compare_settings(parser, args, saved)
    return args


def check_settings(parser, args):
    """Exit if a setting is out of range, or does not fit another one."""
    if args.model not in (*MODELS, "both"):
        text = f"--model {args.model}: add it to MODELS in main.py"
        parser.error(f"{text}, or choose one of {', '.join(MODELS)}, both")
    for name in FLAGS:
        value = getattr(args, name)
        if type(value) is str:
            continue
        lowest, highest = FLAGS[name][1]
        if not lowest <= value <= highest:  # or it is nan
            parser.error(f"{as_flag(name)} must be from {lowest} to {highest}")
    accurate_adam = args.recipe == "accurate" and args.optimizer == "adam"
    if accurate_adam and args.lr == ACCURATE["lr"]:  # which is for SGD
        parser.error("--recipe accurate --optimizer adam needs --lr 0.003 or so")
    if args.model == "both" and not {"cnn", "fc"} <= MODELS.keys():
        parser.error("--compare needs cnn and fc in MODELS")
    if args.checkpoint and not args.predict:
        parser.error("--checkpoint goes with --predict")


def compare_settings(parser, args, saved):
    """Exit if a resumed run would go on with other settings."""
    changeable = {"epochs"}
    if args.recipe == "accurate":
        changeable.remove("epochs")  # its learning rate depends on them
    if saved["seeds"] > 1 or saved["model"] == "both":
        changeable.add("seeds")  # a study can get more
    for name in saved:
        value = getattr(args, name)
        if name not in changeable and value != saved[name]:
            text = f"--resume: this run has {name} {saved[name]}, not {value}"
            parser.error(f"{text}; leave that flag out")
    if args.seeds < saved["seeds"]:
        parser.error(f"--seeds: there are {saved['seeds']} already; give at least that")


def tune_cpu():
    """Keep freed memory, and use no more threads than processors: both are faster."""
    if os.name == "posix" and platform.libc_ver()[0] == "glibc":
        # Memory up to 32 MB is kept: 1.25 times as fast.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h
        for option in M_TRIM_THRESHOLD, M_MMAP_THRESHOLD:
            ctypes.CDLL(None).mallopt(option, 2**25)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        processors = max(1, int(quota) // int(period))
        torch.set_num_threads(min(processors, torch.get_num_threads()))


# Signals that came. Python loses an exception raised while it deletes an object
# (an old figure): hence Recorder.add looks here.
INTERRUPTS = []


@contextmanager
def catch_signals():
    """Turn Ctrl-C, SIGTERM and SIGHUP into a KeyboardInterrupt."""
    before = {}
    INTERRUPTS.clear()

    def stop(signum, frame):
        INTERRUPTS.append(signum)
        for other, handler in before.items():  # for a second signal: torchrun sends two
            signal.signal(other, signal.SIG_IGN if LAUNCHED else handler)
        raise KeyboardInterrupt(signum)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # by nohup
            with suppress(ValueError):  # not in the main thread
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv=None):
    """Run the script with these arguments; return the exit status."""
    warn.cache_clear()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, if closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    folder = None
    status = 1  # failed, unless set below
    resumable = True  # not after wrong input, or if the training has diverged
    keeps_unsaved = True  # a folder with no checkpoint; not after a bug or wrong input
    try:
        args = read_settings(argv)
        if args.predict:
            if RANK > 0:  # the first process does it
                return 0
            return predict_files(args)
        tune_cpu()
        with catch_signals(), join_processes(args):
            load_mnist(args.data_dir)  # an error leaves no folder
            folder = args.resume or make_run_folder(args.output_dir, args.model)
            train_all(args, folder)
        return 0
    except SystemExit as end:  # argparse has printed why; or a network calls exit()
        status = end.code or 0
        text = ""
        keeps_unsaved = False
    except RunError as error:
        text = str(error)
        resumable = error.resumable
    except UserError as error:
        status = error.status
        text = str(error)
        resumable = False
        keeps_unsaved = False
    except KeyboardInterrupt as error:
        signum = error.args[0] if error.args else signal.SIGINT
        status = 128 + signum  # as shells count
        text = f"interrupted by {signal.Signals(signum).name}"
    except BrokenPipeError:  # main.py | head
        drop_output()
        text = ""
    except Exception as error:  # noqa: BLE001
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        no_memory |= "can't allocate memory" in str(error)  # on a CPU
        is_full = getattr(error, "errno", None) == errno.ENOSPC
        if no_memory:
            text = "out of memory: start a new run with smaller batches"
            text += "; or, on a GPU, go on with --device cpu"
        elif is_full and not error.filename:  # of a print
            text = f"cannot write the output: {error.strerror}; make room there"
            drop_output()
        else:  # a bug
            traceback.print_exc()
            text = explain_bug(error)
            keeps_unsaved = False
    if text:
        warn(text)
    if folder and RANK == 0:
        keep_or_remove(folder, args, resumable, keeps_unsaved)
    return status


def drop_output():
    """Print nothing more, not even what is waiting to be printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_or_remove(folder, args, resumable, keeps_unsaved):
    """Print how to continue a run that did not finish; or remove its folder."""
    has_checkpoint = any(folder.rglob("checkpoint.pt"))
    has_config = (folder / "config.json").exists()
    is_kept = args.resume or has_checkpoint or (keeps_unsaved and has_config)
    if not is_kept:
        shutil.rmtree(folder, ignore_errors=True)
        write_overviews(folder)
    elif resumable:
        command = ["python", "main.py", "--resume", str(folder)]
        for name in "device", "data_dir", "comet":
            if getattr(args, name) != DEFAULTS[name]:
                command += as_flags({name: getattr(args, name)})
        warn(f"continue with: {quote(command)}")


def explain_bug(error):
    """Return advice to print below a traceback, or ""."""
    if WORLD_SIZE > 1:
        return "this is a bug, or another process has ended (see the first traceback)"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if "self" in frame.f_locals]
    frames = [frame for frame in frames if frame.f_code.co_name == "forward"]
    kinds = RuntimeError, ValueError, AssertionError
    words = r"size|shape|dim|element|\dD"  # "expected 2D or 3D input"
    is_of_sizes = isinstance(error, kinds) and re.search(words, str(error))
    if not frames or not is_of_sizes:
        return ""
    if "more than 1 value" in str(error):  # BatchNorm
        return "it cannot train on a batch of one image: change --batch-size or --limit"
    last = frames[-1]
    name = "".join(last.f_code.co_varnames[1:2])  # first argument after self
    shape = tuple(getattr(last.f_locals.get(name), "shape", ()))
    layer = str(last.f_locals["self"]).split("(\n")[0]
    return f"compare the sizes: {name} has the shape {shape} in {layer}"


if __name__ == "__main__":
    sys.exit(main())
