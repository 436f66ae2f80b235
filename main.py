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

Test accuracy 98.0 ± 0.5 %, accurate 99.64 ± 0.03 %: mean ± standard deviation of 10
seeds (README.md).
"""

import argparse
import base64
import copy
import ctypes
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
from contextlib import (
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from importlib import metadata
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torchsummary import summary
from torchvision.datasets import MNIST
from tqdm import tqdm

# A shell command of a notebook has the notebook's backend, which may end this import.
is_new = "matplotlib" not in sys.modules
backend = os.environ.pop("MPLBACKEND", None) if is_new else None
import matplotlib.style
from matplotlib.figure import Figure

if backend:  # it stays as it was, where it is known
    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

# ===== Settings =======================
# Edit them here; most have a flag: EPOCHS is --epochs.

# The experiment
RECIPE = "classic"  # "classic": as below; "accurate": see ACCURATE
MODEL = "cnn"  # a name in MODELS: "cnn", "fc", your own; or "both" of these two
EPOCHS = 7  # passes over the training images
BATCH_SIZE = 64  # images per step
LR = 0.01  # learning rate
OPTIMIZER = "sgd"  # "sgd" or "adam"
SEED = 0  # for the initial weights and the shuffling
SEEDS = 1  # number of runs, with SEED, SEED + 1, ...
LIMIT = 0  # train on the first LIMIT images only; 0: on all 60,000

# What the accurate recipe sets instead; see there for what else it does.
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

    channels_last = True  # how a CPU may store it: 1.5 times as fast

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
        # Convolution, ReLU, max-pool. Pooling first is the same and faster, since
        # max(relu(a), relu(b)) = relu(max(a, b)).
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


def make_model(name, device="cpu"):
    """Return a new network of MODELS, stored in the fastest way that it allows."""
    model, images = MODELS[name]().to(device), torch.zeros(2, 1, 28, 28, device=device)
    with torch.no_grad():
        model.eval()(images)  # lazy layers take their sizes from it
        if getattr(model, "channels_last", False) and images.device.type == "cpu":
            try:
                model.to(memory_format=torch.channels_last)(images)
            except RuntimeError:  # view() needs the usual order
                model.to(memory_format=torch.contiguous_format)
    return model.train()


# ===== Data ===========================

MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]
BLACK = -MEAN / STD  # a black pixel, normalised


@functools.cache  # loaded once
def load_mnist(data_dir):
    """Return MNIST: training images and labels, test images and labels.

    uint8 (60000, 28, 28), int64 (60000,), then the same for 10,000 test images, from
    `data_dir`/MNIST/raw. Raises UserError.
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


def make_batches(images, labels, batch_size, order=None):
    """Yield normalised images (N, 1, 28, 28) and labels (N,), a batch at a time.

    `order`: indices of the images to use; None: all. This does the job of a
    DataLoader, faster: all of MNIST fits in memory.
    """
    if order is None:
        order = torch.arange(len(labels), device=labels.device)
    for chosen in order.split(batch_size):
        yield normalise(images[chosen]), labels[chosen]


# ===== Training and evaluation ========


def train_epoch(model, batches, loss_function, optimizer, scheduler, on_step):
    """Train on every batch once; return mean loss and accuracy over the epoch.

    `batches` yields images (N, 1, 28, 28) and labels (N,). Both results are measured
    while the weights still change. on_step(loss) gets each batch's mean loss, a tensor.
    """
    model.train()
    loss_sum = correct = count = 0
    for images, labels in batches:
        logits = model(images)  # forward: (N, 10)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # compute the gradients
        optimizer.step()  # update the weights
        scheduler.step()  # update the learning rate
        # Sums stay on the device: .item() waits for a GPU.
        loss = loss.detach()
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
    loss_sum, correct, all_logits = 0, 0, []
    for images, labels in batches:
        logits = model(images)
        loss_sum += loss_function(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        all_logits.append(logits)
    model.train(was_training)
    all_logits = torch.cat(all_logits)
    return float(loss_sum) / len(all_logits), int(correct) / len(all_logits), all_logits


# ===== The run ========================

RULE = "=" * 70


def select_device(name="auto"):
    """Return a device that works; "auto": MPS, else CUDA, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        mps = torch.backends.mps.is_available() and not LAUNCHED
        best = "mps" if mps else "cuda" if gpus >= LOCAL_SIZE else "cpu"
        try:
            return select_device(best)
        except UserError as error:
            warn(f"{error}; using the CPU")
            return torch.device("cpu")
    hint = f"try cpu (GPUs: {gpus}, processes: {LOCAL_SIZE})"
    with explaining(f"--device {name}: {hint}", status=1 if gpus else 2):
        device = torch.device(name)
        if LAUNCHED and device.type == "cuda":  # each process has its own
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)
        torch.ones(1, device=device).sum().item()  # does it work?
    return device


def train_run(args, folder):
    """Train, test and keep one model: what `main` does with the settings."""
    accurate, title = args.recipe == "accurate", args.model.upper()

    # --- 1. Data ---
    device = select_device(args.device)
    mnist = [tensor.to(device) for tensor in load_mnist(args.data_dir)]
    images, labels, test_images, test_labels = mnist
    if args.limit:
        images, labels = images[: args.limit], labels[: args.limit]
    epoch_steps = math.ceil(len(labels) / args.batch_size)

    # --- 2. Model, loss, optimizer ---
    # Softmax is inside this loss: the model returns logits.
    loss_function = nn.CrossEntropyLoss(label_smoothing=SMOOTHING if accurate else 0)
    check_model(make_model(args.model, device), loss_function, images[:2], labels[:2])
    torch.manual_seed(args.seed)
    model = make_model(args.model, device)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
    else:
        momentum = MOMENTUM if accurate else {}
        optimizer = torch.optim.SGD(model.parameters(), args.lr, **momentum)
    # Loads the checkpoint of a resumed run into model and optimizer.
    recorder = Recorder(args, folder, device, epoch_steps, model, optimizer)
    done = recorder.epochs_done  # 0, unless resumed
    # Learning rate: lr * schedule(step). (last_epoch counts epoch_steps.)
    cycle = functools.partial(one_cycle, args.epochs * epoch_steps)
    schedule = cycle if accurate else lambda step: 1.0
    scheduler = LambdaLR(optimizer, schedule, last_epoch=done * epoch_steps - 1)
    # With torchrun: averaged gradients.
    ddp_model = DistributedDataParallel(model) if LAUNCHED else model

    with recorder:  # shows, tracks and saves what follows, however it ends
        # --- 3. Train ---
        recorder.begin()
        print(RULE, f"TRAINING {title} MODEL", RULE, sep="\n")
        print(model)
        print_layers(make_model(args.model))
        for epoch in range(done + 1, args.epochs + 1):
            recorder.start_epoch()
            # No two epochs share a seed; a resumed run continues exactly.
            torch.manual_seed(10_001 * args.seed + epoch)
            mine = slice(RANK, None, WORLD_SIZE)  # without torchrun: all
            order = torch.randperm(len(labels))[mine].to(device)
            batch_size = args.batch_size // WORLD_SIZE
            batches = make_batches(images, labels, batch_size, order)
            if accurate:
                batches = augment(batches, draw_distortions(len(labels))[mine])
            loss, accuracy = train_epoch(
                ddp_model, batches, loss_function, optimizer, scheduler, recorder.step
            )
            loss, accuracy = average(loss, accuracy, device)  # torchrun
            recorder.end_epoch(loss, accuracy)
            if RANK == 0:  # a test to watch: choose nothing by it
                batches = make_batches(test_images, test_labels, batch_size=100)
                test_loss, test_accuracy, _ = evaluate(model, batches)
                recorder.save_epoch(test_loss, test_accuracy)
            print(f"Epoch {epoch}/{args.epochs}, Accuracy: {accuracy:.4f}")
        if RANK > 0:  # with torchrun, only rank 0 tests
            return

        # --- 4. Test ---
        print(RULE, f"EVALUATING {title} MODEL", RULE, sep="\n")
        batches = make_batches(test_images, test_labels, batch_size=100)
        predictor = ShiftAverage(model) if accurate else model
        loss, accuracy, logits = evaluate(predictor, batches)
        print(f"Test Accuracy: {accuracy:.4f}\nTest Loss: {loss:.4f}\n")
        digit, label = logits[0].argmax(), test_labels[0]
        print(f"Single Image Prediction: {digit}, Actual Label: {label}")

        # --- 5. Keep: model.pt, metrics.json, pictures, page ---
        parts = test_images, logits.softmax(dim=1), test_labels
        digits = Digits(*[part.cpu().numpy() for part in parts])
        recorder.keep(loss, accuracy, digits)
        save_pictures(digits, folder)
    print(f"All runs: {folder.parent / 'index.html'}")
    print(RULE, f"TRAINING COMPLETE - {recorder.location}", RULE, sep="\n")


def check_model(model, loss_function, images, labels):
    """Compute loss and gradients once: a bug is found before the run begins."""
    logits = model(normalise(images))
    found = f"a {type(logits).__name__}"
    if isinstance(logits, torch.Tensor):
        found = tuple(logits.shape)
    if found != (len(images), 10):
        text = f"{type(model).__name__}.forward must return logits (N, 10) for N images"
        raise UserError(f"{text}; for {len(images)} images it returned {found}", 1)
    loss_function(logits, labels).backward()


def print_layers(model):
    """Print torchsummary's table of layers, and what it leaves out."""
    table, count = io.StringIO(), count_parameters(model)
    try:
        with redirect_stdout(table):
            summary(model, (1, 28, 28), device="cpu")
        print(table.getvalue(), end="")
    except Exception as error:  # noqa: BLE001, a layer may return more than a tensor
        print(f"No table of layers: torchsummary cannot read this network ({error})")
    if f"Total params: {count:,}\n" not in table.getvalue():
        print(f"Parameters in all: {count:,}")


def count_parameters(model):
    return sum(weights.numel() for weights in model.parameters())


# ===== The accurate recipe ============
# Schedule, distortions, nine views in the test; chosen as in tests/README.md

MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-4}
SMOOTHING = 0.05  # of the labels: Szegedy et al. 2016, arXiv:1512.00567
ANGLE, SCALE, SHIFT = 5, 0.1, 2  # at most: degrees, fraction of the size, pixels
RISING = 0.3  # of all steps: the learning rate rises
STROKES = 1 / 3  # of all batches get thicker strokes, as many get thinner ones


def get_recipe_numbers():
    images = {"angle": ANGLE, "scale": SCALE, "shift": SHIFT, "strokes": STROKES}
    return MOMENTUM | images | {"label_smoothing": SMOOTHING, "rising": RISING}


def one_cycle(total, step):
    """Return what the learning rate is multiplied by: Smith 2018, arXiv:1803.09820."""
    progress = (step + 0.5) / total  # in the middle of the step
    rise, fall = progress / RISING, (1 - progress) / (1 - RISING)
    return max(0.0, min(rise, fall))


def draw_distortions(count):
    """Return random affine maps (count, 2, 3), after Simard et al. 2003."""
    angle, shear, width, height, x, y = 2 * torch.rand(6, count) - 1  # from -1 to 1
    angle, shear = math.radians(ANGLE) * angle, math.radians(ANGLE) * shear
    width, height = 1 + SCALE * width, 1 + SCALE * height
    x, y = SHIFT / 14 * x, SHIFT / 14 * y  # half of the image is 1
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([width * cos, shear * cos - height * sin, x], dim=1)
    bottom = torch.stack([width * sin, shear * sin + height * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1)


def augment(batches, distortions):
    """Yield the batches, distorted; a third thicker, a third thinner."""
    start = 0
    for images, labels in batches:
        maps = distortions[start : start + len(images)].to(images.device)
        start += len(images)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        # MPS has no border mode: zeros, where 0 is black.
        images = F.grid_sample(images - BLACK, grid, align_corners=False) + BLACK
        choice = torch.rand(1).item()
        if choice < STROKES:
            images = (images + F.max_pool2d(images, 3, stride=1, padding=1)) / 2
        elif choice < 2 * STROKES:
            images = (images - F.max_pool2d(-images, 3, stride=1, padding=1)) / 2
        yield images, labels


class ShiftAverage(nn.Module):
    """The mean logits for an image and its eight shifts by one pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = F.pad(x, [1, 1, 1, 1], value=BLACK)  # (N, 1, 30, 30)
        views = [x[..., i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
        return torch.stack([self.model(view) for view in views]).mean(dim=0)


# ===== The recorder ===================
# What shows and saves the progress of training. LossHistory and PeriodicPlotter have
# the interface of mitdeeplearning.util 0.7.5.

PER_EPOCH = "train_loss", "train_accuracy", "epoch_seconds"
PER_EPOCH += "test_loss_per_epoch", "test_accuracy_per_epoch"
RESUMED = "history", "losses", "snapshots", "comet_key"  # are in checkpoint.pt


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
    """Return the losses of the steps, smoothed as all curves show them."""
    history = LossHistory(smoothing_factor=0.95)  # about the last 20 steps
    for loss in losses:
        history.append(loss)
    return history


class PeriodicPlotter:
    """Draws a growing curve into a PNG file every `sec` seconds."""

    def __init__(self, sec, xlabel="", ylabel="", scale=None, path="loss.png"):
        if scale not in (None, "semilogx", "semilogy", "loglog"):
            raise ValueError(f"unrecognized parameter scale {scale!r}")
        self.sec, self.path, self.scale = sec, path, scale or "plot"
        self.labels = {"xlabel": xlabel, "ylabel": ylabel}
        self.last_time = time.monotonic()

    def plot(self, data):
        if time.monotonic() - self.last_time >= self.sec:
            self.draw(data)

    def draw(self, data):
        save_picture(self.path, self.draw_curve, data)
        self.last_time = time.monotonic()

    def draw_curve(self, data):
        self.figure = Figure(figsize=(7, 4))
        axes = self.figure.add_axes((0.14, 0.13, 0.84, 0.84))
        getattr(axes, self.scale)(range(1, len(data) + 1), data, color=BLUE)
        axes.set(**self.labels)
        axes.grid(which="both", alpha=0.3)
        return self.figure


class Recorder:
    """Shows and saves the progress of training, however it ends."""

    def __init__(self, args, folder, device, epoch_steps, model, optimizer):
        """If the folder has a checkpoint, continue from it."""
        self.args, self.folder, self.epoch_steps = args, folder, epoch_steps
        self.model, self.optimizer = model, optimizer
        self.config = describe(args, device, model)
        self.device = device
        self.history = {name: [] for name in PER_EPOCH}
        self.losses, self.snapshots, self.comet_key = [], [], None
        if (folder / "checkpoint.pt").exists():
            self.load_checkpoint(folder / "checkpoint.pt")
        self.smoothed = smooth(self.losses)
        png = folder / "loss_curve.png"
        self.plotter = PeriodicPlotter(2, "iteration", "smoothed loss", "semilogy", png)
        self.comet, self.results, self.page_data = Tracker(), {}, {}
        self.new_losses, self.bars = [], [tqdm(disable=True)]
        self.shown_time = self.page_time = 0

    def load_checkpoint(self, path):
        compare_configs(read_config(self.folder), self.config)
        with explaining(f"{path} is damaged"):
            saved = torch.load(path, "cpu", weights_only=True)
            load_weights([self.model], saved["model"], path)
            self.optimizer.load_state_dict(saved["optimizer"])
            for name in RESUMED:
                setattr(self, name, saved[name])
        if self.epochs_done > self.args.epochs:
            raise UserError(f"--epochs: this run has done {self.epochs_done} already")

    @property
    def epochs_done(self):
        return len(self.history["train_loss"])

    def __enter__(self):
        return self

    def begin(self):
        """Start Comet; tell and save what is known before the first step."""
        self.comet, where = start_comet(self.args.comet, self.folder, self.comet_key)
        settings = self.config["settings"]
        print("Settings:", ", ".join(f"{name} {settings[name]}" for name in settings))
        print(f"Device: {self.config['device']}\nFolder: {self.folder}")
        print(f"Report: {self.folder / 'report.html'}\nComet: {where}")
        self.comet_key = self.comet.get_key() or self.comet_key
        self.comet.set_name(self.folder.name)
        self.comet.log_parameters(settings | self.config["recipe"])
        self.comet.set_model_graph(str(self.model))
        if self.comet.url is None:  # the archive gets all of a resumed run
            for step, loss in enumerate(self.losses, 1):
                self.comet.log_metric("loss", loss, step=step)
            for epoch in range(1, self.epochs_done + 1):
                self.log_epoch(epoch)
        save_json(self.config, self.folder / "config.json")
        self.program = describe_program(self.model, self.device)
        self.page_data = take_snapshot(self)
        self.save("training")

    def start_epoch(self):
        bar = (
            tqdm(total=self.epoch_steps, disable=True)
            if RANK
            else tqdm(total=self.epoch_steps)
        )
        self.bars.append(bar)  # kept: Python ignores a Ctrl-C while one is deleted
        self.start_time = time.perf_counter()

    def step(self, loss):
        """Take a step's loss, a tensor: read and shown every 0.2 s."""
        self.new_losses.append(loss)
        if time.monotonic() - self.shown_time >= 0.2:
            self.show()

    def show(self):
        losses = [loss.item() for loss in self.new_losses]
        self.new_losses.clear()
        every = math.ceil(len(losses) / 2) if self.comet.url else 1  # 10 a second
        for loss in losses:
            check_finite(loss, "loss")
            self.losses.append(loss)
            self.smoothed.append(loss)
            if len(self.losses) % every == 0:
                self.comet.log_metric("loss", loss, step=len(self.losses))
        smoothed = self.smoothed.get()
        self.bars[-1].set_postfix(loss=f"{smoothed[-1]:.4f}", refresh=False)
        self.bars[-1].update(len(losses))
        self.plotter.plot(smoothed)
        self.shown_time = time.monotonic()
        if self.shown_time - self.page_time >= 5:
            self.update_page("training")

    def end_epoch(self, loss, accuracy):
        self.show()
        self.bars[-1].close()
        for weights in self.model.parameters():
            check_finite(weights.detach().sum().item(), "weights")
        self.trained = loss, accuracy, time.perf_counter() - self.start_time

    def save_epoch(self, test_loss, test_accuracy):
        epoch = dict(zip(PER_EPOCH, [*self.trained, test_loss, test_accuracy]))
        history = {name: [*self.history[name], epoch[name]] for name in PER_EPOCH}
        checkpoint = {name: getattr(self, name) for name in RESUMED}
        checkpoint |= {"history": history, "model": self.model.state_dict()}
        checkpoint["optimizer"] = self.optimizer.state_dict()
        save_tensors(checkpoint, self.folder / "checkpoint.pt")
        self.history = history  # not before it is saved: a Ctrl-C may come
        self.log_epoch(self.epochs_done)
        self.page_data = take_snapshot(self)
        self.save("training")

    def log_epoch(self, epoch):
        values = {name: column[epoch - 1] for name, column in self.history.items()}
        self.comet.log_metrics(values, step=epoch * self.epoch_steps, epoch=epoch)

    def save(self, state, message="", needed=True):
        """Write metrics.json and the pages."""
        metrics = {"state": state, **self.history, **self.results}
        metrics["losses"] = self.losses[: self.epochs_done * self.epoch_steps]
        try:
            save_json(metrics, self.folder / "metrics.json", needed)
        except RunError as error:
            state, message = "failed", str(error)
            raise
        finally:
            self.update_page(state, message)
            write_overviews(self.folder)

    def update_page(self, state, message=""):
        every = len(self.losses) // 10_000 + 1
        curve = np.round(self.smoothed.get()[every - 1 :: every], 4).tolist()
        now = {"kind": "run", "state": state, "message": message, "curve": curve}
        now |= {"curve_every": every, "steps_done": len(self.losses)}
        now |= {"steps_per_epoch": self.epoch_steps, "history": self.history}
        now |= {"results": self.results, "name": self.folder.name}
        write_page(self.folder / "report.html", self.config | self.page_data | now)
        self.page_time = time.monotonic()

    def keep(self, loss, accuracy, digits):
        """Save the trained weights and what the test has shown."""
        check_finite(loss, "test loss")
        path = self.folder / "model.pt"
        weights = self.model.state_dict()
        save_tensors({name: weights[name].cpu().contiguous() for name in weights}, path)
        self.comet.log_model(self.args.model, str(path))
        self.results = {"test_loss": loss, "test_accuracy": accuracy}
        self.results["calibration_error"] = digits.get_calibration_error()
        self.comet.log_metrics(self.results, step=len(self.losses))
        self.results["confusion_matrix"] = digits.count_confusions().tolist()
        self.comet.log_confusion_matrix(matrix=self.results["confusion_matrix"])
        self.page_data["first"] = encode_digits(digits[:20])
        self.page_data["wrong"] = encode_digits(digits.get_mistakes()[:200])

    def __exit__(self, kind, error, trace):
        state = {None: "finished", KeyboardInterrupt: "stopped"}.get(kind, "failed")
        if state == "stopped":
            warn(f"stopped after {self.epochs_done} of {self.args.epochs} epochs")
        self.bars[-1].close()
        try:
            if self.page_data:  # the run had begun
                self.plotter.draw(self.smoothed.get())
                message = str(error) if state == "failed" else ""
                self.save(state, message, needed=state == "finished")
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

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"  # colour-blind safe


class Digits:
    """Images (N, 28, 28), probabilities (N, 10) and true labels (N,), as arrays."""

    def __init__(self, images, probabilities, labels):
        self.images, self.labels = images, labels
        self.probabilities = probabilities
        self.predictions = probabilities.argmax(axis=1)
        self.confidence = probabilities.max(axis=1)
        self.correct = self.predictions == labels

    def __getitem__(self, chosen):
        parts = self.images, self.probabilities, self.labels
        return Digits(*[part[chosen] for part in parts])

    def get_mistakes(self):
        """Return the misclassified digits, the most confident first."""
        order = np.argsort(-self.confidence, kind="stable")
        return self[order[~self.correct[order]]]

    def count_confusions(self):
        """Return how often each label (row) was predicted as each digit: (10, 10)."""
        pairs = 10 * self.labels + self.predictions
        return np.bincount(pairs, minlength=100).reshape(10, 10)

    def get_calibration_error(self):
        """Return the gap of confidence and accuracy: Guo et al. 2017, arXiv:1706.04599."""
        bins = (15 * self.confidence).astype(int).clip(max=14)
        gaps = np.bincount(bins, self.confidence - self.correct)  # sums
        return abs(gaps).sum() / len(self.labels)


def save_pictures(digits, folder):
    """Draw test digits, mistakes and the confusion matrix."""
    mistakes = digits.get_mistakes()[:20]
    save_picture(folder / "sample_prediction.png", draw_results, digits[:1])
    save_picture(folder / "single_prediction.png", draw_results, digits[:1], bars=True)
    save_picture(folder / "predictions_grid.png", draw_results, digits[:20])
    save_picture(folder / "worst_mistakes.png", draw_results, mistakes)
    save_picture(folder / "confusion_matrix.png", draw_confusions, digits)


def save_picture(path, draw, *arguments, **named):
    """Save the Figure that draw(...) returns; if that fails, warn."""
    content = io.BytesIO()
    try:
        with matplotlib.style.context("default"):  # whatever the user's settings are
            draw(*arguments, **named).savefig(content, format="png", dpi=100)
        write(path, content.getbuffer(), needed=False)
    except Exception as error:  # noqa: BLE001
        warn(f"cannot draw {path}: {error!r:.300}")


def draw_results(digits, bars=False):
    """Return a Figure of digits, predictions and true labels."""
    titles, colours = [], []
    for n, label in enumerate(digits.labels):
        sign, colour = ("✓", BLUE) if digits.correct[n] else ("✗", VERMILION)
        prediction = f"predicted {digits.predictions[n]} ({digits.confidence[n]:.1%})"
        titles.append(f"{sign} {prediction}\ntrue label {label}")
        colours.append(colour)
    return draw_digits(digits.images, digits.probabilities, titles, colours, bars)


def draw_digits(images, probabilities, titles, colours, bars):
    """Return a Figure of images and titles; with bars, of their probabilities, too."""
    columns = max(1, min(2 if bars else 4, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    width, parts = (6, 3) if bars else (2.1, 1)
    figure = Figure(figsize=(width * columns, 2.5 * rows))
    figure.subplots_adjust(left=0.02, right=0.98, wspace=0.5 * bars, hspace=0.5)
    figure.subplots_adjust(bottom=0.2 / rows, top=1 - 0.2 / rows)
    for n, image in enumerate(images):
        axes = figure.add_subplot(rows, parts * columns, parts * n + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[], anchor="N")
        colour = colours[n]
        axes.spines[:].set(color=colour, linewidth=4 if colour == VERMILION else 1)
        axes.set_title(titles[n], color=colour, size=9, loc="left", parse_math=False)
        if bars:
            position = parts * n + 2, parts * n + 3
            axes = figure.add_subplot(rows, parts * columns, position)
            drawn = axes.bar(range(10), 100 * probabilities[n], color=GREY)
            drawn[probabilities[n].argmax()].set(color=colour)
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
    axes = figure.add_axes((0.17, 0.09, 0.81, 0.9))
    axes.imshow(mistakes, cmap="Oranges", vmax=max(1, 2 * mistakes.max()))
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
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
}
NO_KEY = "", "YOUR_API_KEY_HERE"


class Tracker:
    """Comet's experiment, or none. If a call fails, a line says so and the run goes on."""

    def __init__(self, experiment=None, directory=None):
        self.experiment, self.directory = experiment, directory  # of the archive
        self.url = getattr(experiment, "url", None)  # None: offline, or no experiment

    def __getattr__(self, name):
        def call(*arguments, **named):
            if self.experiment is None:
                return None
            with redirect_stderr(io.StringIO()):  # without what its threads print
                try:
                    return getattr(self.experiment, name)(*arguments, **named)
                except Exception as error:  # noqa: BLE001
                    problem = type(error).__name__
            return warn(f"Comet: {name} failed ({problem}); the run goes on")

        return call


def start_comet(mode, folder, key):
    """Return a Tracker, for the experiment with this key if any, and where it goes."""
    if mode == "off" or RANK > 0:
        return Tracker(), "off"
    for name, value in COMET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        return open_experiment(mode, folder, key)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        reason = f"fails: {type(error).__name__}"
        if isinstance(error, (ImportError, ValueError)):
            reason += f": {error}".partition("\n")[0]
        else:  # which may show a line with the API key
            reason += " (is something wrong in ~/.comet.config?)"
        if isinstance(error, ModuleNotFoundError) and "comet_ml" in str(error):
            reason = "needs: pip install comet-ml"
    if mode != "auto":
        raise UserError(f"--comet {mode} {reason}")
    return Tracker(), f"off (it {reason})"


def open_experiment(mode, folder, key):
    """Return a Tracker and where it goes; raise whatever Comet raises."""
    import comet_ml

    is_public = COMET_API_KEY in NO_KEY  # else the code shows the key
    api_key = comet_ml.get_config("comet.api_key") or COMET_API_KEY
    if mode == "online" and api_key in NO_KEY:
        raise UserError("--comet online needs an API key: set COMET_API_KEY")
    directory = os.environ.get("COMET_OFFLINE_DIRECTORY", str(folder))
    if not key and is_in_study(folder):  # COMET_EXPERIMENT_KEY would be that of all
        key = os.urandom(16).hex()
    options = {
        "project_name": comet_ml.get_config("comet.project_name") or COMET_PROJECT,
        "experiment_key": key,
        "mode": "get_or_create" if key else "create",
        "experiment_config": comet_ml.ExperimentConfig(
            offline_directory=directory,
            log_code=is_public,
            log_git_patch=is_public,
            parse_args=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            display_summary_level=0,
        ),
    }
    where = "offline"
    if mode != "offline" and api_key not in NO_KEY:
        where = "offline (Comet does not answer, or rejects the API key)"
        with suppress(Exception):  # its text may have the key in it
            experiment = comet_ml.start(online=True, api_key=api_key, **options)
            if experiment.alive:
                return Tracker(experiment, directory), experiment.url
        if mode == "online":
            raise UserError("--comet online: no answer, or the API key is wrong", 1)
    return Tracker(comet_ml.start(online=False, **options), directory), where


def end_comet(comet, folder):
    """End the experiment; return in words where the results are."""
    key = comet.get_key()
    comet.end()
    location = f"results in {folder}"
    if comet.experiment is None:
        return location
    archives = sorted(Path(comet.directory).glob(f"{key}*.zip"), key=os.path.getmtime)
    complete = [archive for archive in archives[-1:] if has_metrics(archive)]
    upload = ["comet", "upload", *map(str, complete)]
    if comet.url is None:
        return f"{location}; {quote(upload) if complete else 'Comet has nothing of it'}"
    upload.insert(2, "--force-reupload")
    retry = f"; if it is incomplete: {quote(upload)}" if complete else ""
    return f"{comet.url}; {location}{retry}"


def has_metrics(archive):
    with suppress(Exception), zipfile.ZipFile(archive) as file:
        return b'"metricName":"loss"' in file.read("messages.json")


# ===== Files ==========================


class UserError(Exception):
    """What is wrong and what to do. Status 2: wrong input; 1: it failed."""

    def __init__(self, text, status=2):
        super().__init__(" ".join(text.split()))
        self.status = status


class RunError(UserError):
    """A run cannot go on; what it has done is kept."""

    def __init__(self, text, resumable=True):
        super().__init__(text, status=1)
        self.resumable = resumable


@contextmanager
def explaining(what, status=2):
    """Turn any error into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{what}: {error!r:.300}", status) from None


@functools.cache  # each text once
def warn(text):
    with suppress(OSError):
        print(f"main.py: {text}", file=sys.stderr)


def get_version(package):
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "unknown"


def quote(words):
    """Return a command as the system's shell takes it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def describe(args, device, model):
    """Return what decides a run's result, and what else one wants to know of it."""
    settings = {name: getattr(args, name) for name in FLAGS}
    decisive = {name: settings[name] for name in FLAGS if name not in PLACES}
    packages = "torch", "torchvision", "numpy", "scipy", "matplotlib"
    return {
        "settings": settings,
        "recipe": get_recipe_numbers() if args.recipe == "accurate" else {},
        "network": str(model),
        "title": type(model).__name__,
        "parameters": count_parameters(model),
        "command": quote(["python", "main.py", *as_flags(decisive)]),
        "device": str(device),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": {name: get_version(name) for name in packages},
        "data_md5": dict(MNIST.resources),
    }


def read_config(folder):
    """Return what config.json says of a run or a study."""
    with explaining(f"{folder} is not a run folder (config.json)"):
        config = json.loads(Path(folder, "config.json").read_bytes())
        config["settings"] = {name: config["settings"][name] for name in FLAGS}
    return config


def compare_configs(before, now):
    """Raise UserError if a run began with another network or other numbers."""
    lines = []  # of both; without the class's name
    for config in before, now:
        numbers = [f"{name} {value}" for name, value in config["recipe"].items()]
        lines.append(numbers + config["network"].split("\n")[1:])
    for old, new in itertools.zip_longest(*lines, fillvalue="nothing"):
        if old != new:
            text = f"the run has {old.strip()}, main.py has {new.strip()}"
            raise UserError(f"--resume: {text}")


def load_weights(models, weights, path):
    """Put weights into the first of the models that they fit; return it."""
    problems = []
    for model in models:
        try:
            model.load_state_dict(weights)
            return model
        except Exception as error:  # noqa: BLE001
            problems.append(str(error).partition("\n")[2])  # which names and sizes
    text = f"the layers in main.py are not those of {path}"
    raise UserError(f"{text}: {min(problems, key=len):.300}")


def load_predictor(path):
    """Return the model of a file, or of a folder's newest run."""
    path = Path(path)
    if not path.is_file():  # a folder: take its newest run
        found = sorted(path.rglob("model.pt"), key=os.path.getmtime)
        if not found:
            raise UserError(f"no model.pt in {path}: python main.py makes one")
        path = found[-1]
    with explaining(f"{path} is damaged, or not saved by this script"):
        weights = torch.load(path, "cpu", weights_only=True)  # runs no code in it
        weights = weights.get("model", weights)
    settings, names = {}, list(MODELS)
    if (path.parent / "config.json").exists():
        settings = read_config(path.parent)["settings"]
        names = [settings["model"]]
    if names[0] not in MODELS:
        raise UserError(
            f"{path} is of a network {names[0]}: add it to MODELS in main.py"
        )
    model = load_weights([make_model(name) for name in names], weights, path)
    is_accurate = settings.get("recipe") == "accurate"
    return (ShiftAverage(model) if is_accurate else model).eval(), path


def make_run_folder(output_dir, name):
    """Make and return a new folder, named by time and `name`."""
    if RANK > 0:
        return Path(os.devnull)
    folder = Path(output_dir, time.strftime("%Y%m%d-%H%M%S-") + name)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if folder.exists():  # another run has started in this second
            return make_run_folder(output_dir, name + "-2")
        raise UserError(f"--output-dir: {folder}: {error.strerror}") from None
    return folder


def write(path, content, needed=True):
    """Write a file, whole or not at all; if that fails, raise or warn."""
    if RANK > 0:  # only the first process writes
        return
    partial = Path(f"{path}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror}"
        if needed:
            raise RunError(text) from None
        warn(text)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_json(values, path, needed=True):
    write(path, json.dumps(values, indent=2).encode(), needed)


def save_tensors(values, path):
    content = io.BytesIO()
    torch.save(values, content)
    write(path, content.getbuffer())


def read_archive(path, md5):
    """Return the bytes of a file of MNIST, downloaded if missing."""
    missing = not path.exists()
    hint = f"put the file there (MD5 sum {md5}, see data/README.md)"
    with explaining(f"cannot read {path}: {hint}"):
        content = download(path.name) if missing else path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        reason = f"damaged, or not MNIST's (MD5 sum is not {md5})"
        raise UserError(f"{path} is {reason}: move it away, or change --data-dir")
    if missing:
        with suppress(OSError, RunError):  # the folder may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)
    return content


def download(name):
    print(f"Downloading {name}")
    for mirror in MNIST.mirrors:
        with suppress(Exception):
            return urllib.request.urlopen(mirror + name, timeout=20).read()
    raise OSError("no mirror answers")


# ===== Several processes ==============
# torchrun: each process trains on its share of a batch; gradients are averaged.

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # 0: the first process
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine
LOCAL_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1


@contextmanager
def join_processes(args):
    """Join the processes that torchrun has started."""
    if args.batch_size % WORLD_SIZE or (args.limit or 60_000) % WORLD_SIZE:
        raise UserError(f"--batch-size and --limit must be divisible by {WORLD_SIZE}")
    device = select_device(args.device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with redirect_stdout(sys.stdout if RANK == 0 else None):
        yield
    distributed.destroy_process_group()


def average(loss, accuracy, device):
    """Return loss and accuracy, averaged over the processes."""
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
    models = ("fc", "cnn") if args.model == "both" else (args.model,)
    seeds = range(args.seed, args.seed + args.seeds)
    pairs = list(itertools.product(seeds, models))
    if len(pairs) == 1:
        train_run(args, folder)
        return
    settings = {name: getattr(args, name) for name in FLAGS}
    save_json({"settings": settings}, folder / "config.json")
    names = [f"{model}-seed-{seed}" for seed, model in pairs]
    before = read_runs(folder)
    for name, (seed, model) in zip(names, pairs):
        done = before.get(name, {"state": "new"})
        if done["state"] == "finished" and len(done["train_loss"]) >= args.epochs:
            continue
        print(f"Run {names.index(name) + 1} of {len(names)}: {model}, seed {seed}")
        if RANK == 0:
            (folder / name).mkdir(exist_ok=True)
        settings = vars(args) | {"model": model, "seed": seed, "seeds": 1}
        train_run(argparse.Namespace(**settings), folder / name)
    if RANK == 0:
        rows = [make_row(read_runs(folder)[name]) for name in names]
        print_table(rows)
        save_json({"runs": rows}, folder / "metrics.json")
        print(f"Results of all runs: {folder / 'index.html'}")


def make_row(run):
    """Return a run's row of a study's table."""
    return {
        "model": run["settings"]["model"],
        "seed": run["settings"]["seed"],
        "parameters": run["parameters"],
        "seconds": sum(run["epoch_seconds"]),
        "train_accuracy": run["train_accuracy"][-1],
        "test_accuracy": run["test_accuracy"],
        "test_loss": run["test_loss"],
    }


def print_table(rows):
    """Print the runs, and each model's mean accuracy."""
    print("model  seed  parameters  seconds  train accuracy  test accuracy  test loss")
    layout = "{:5} {:5} {:11,} {:8.1f} {:15.4f} {:14.4f} {:10.4f}"
    for row in rows:
        print(layout.format(*row.values()))
    for model in sorted({row["model"] for row in rows}):
        values = [row["test_accuracy"] for row in rows if row["model"] == model]
        if len(values) > 1:
            spread = np.std(values, ddof=1)
            print(f"{model}, mean test accuracy: {np.mean(values):.4f} ± {spread:.4f}")


def is_in_study(folder):
    return (folder.parent / "config.json").exists()


@functools.cache  # by time: a file that has changed is read again
def read_run(folder, time_changed):
    """Return what the overview shows of a run."""
    config = read_config(folder)
    run = json.loads((folder / "metrics.json").read_bytes())
    smoothed = smooth(run.pop("losses")).get()
    every = len(smoothed) // 200 + 1  # more points cannot be seen
    run["curve"] = np.round(smoothed[every - 1 :: every], 4).tolist()
    shown = "settings", "recipe", "title", "parameters", "device"
    run |= {name: config[name] for name in shown} | {"curve_every": every}
    return run | {"changed": time_changed / 1e9}  # in seconds


def read_runs(folder):
    """Return what the overview shows of a folder's runs, by name, the newest first."""
    runs = {}
    for pattern in "*/metrics.json", "*/*/metrics.json":  # runs; those of studies
        for path in sorted(folder.glob(pattern), reverse=True):
            with suppress(Exception):  # not a run, or it cannot be read
                run = read_run(path.parent, path.stat().st_mtime_ns)
                name = path.parent.relative_to(folder).as_posix()
                runs[name] = run | {"name": name}
    return runs


def write_overviews(folder):
    """Write index.html beside a run; and beside its study, if it is in one."""
    places = [folder.parent]
    if is_in_study(folder):
        places.append(folder.parent.parent)
    for place in places if RANK == 0 else []:
        runs = sorted(read_runs(place).values(), key=lambda run: run["name"])
        page = {"kind": "runs", "runs": runs[::-1], "name": place.name}
        page["is_study"] = place != places[-1]
        page["defaults"] = {name: FLAGS[name][0] for name in FLAGS}
        if runs:
            write_page(place / "index.html", page)
        elif is_page(place / "index.html"):
            (place / "index.html").unlink()


# ===== Your own digits ================
# --predict: photographs and drawings become images like MNIST's.


PICTURES = ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"
PICTURES += ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"
SIDE = 280  # pixels of the longer side in which a digit is looked for
BRIGHTNESS = 0.299, 0.587, 0.114  # of red, green and blue


def find_images(names):
    """Return the files of names, folders and patterns such as *.png."""
    files = []
    for name in names:
        if os.path.isdir(name):
            name = os.path.join(glob.escape(name), "*")
        found = sorted(glob.glob(name))
        files += [file for file in found if file.lower().endswith(PICTURES)] or [name]
    return files


def read_photo(path):
    """Return a picture as grey levels: float32 (H, W), 0 to 255.

    Of an animation or a document, the page with most contrast.
    """
    with suppress(ImportError):  # for pictures of iPhones
        from pillow_heif import register_heif_opener

        register_heif_opener()
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:
            one = image.format == "MPO"  # a photograph, and data about it
            frames = [image] if one else ImageSequence.Iterator(image)
            pages = [read_page(frame) for frame in itertools.islice(frames, 50)]
        return max(pages, key=np.std)
    except UnidentifiedImageError:
        reason = "not an image (try JPEG; for HEIC: pip install pillow-heif)"
    except Image.DecompressionBombError:
        reason = "more than 178 million pixels: save it smaller"
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}")


def read_page(image):
    """Return the grey levels of an open image, reduced if it is large."""
    image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a smaller size
    if image.mode[0] in "IF":  # 16 or 32 bits: from the darkest to the lightest level
        levels = np.array(ImageOps.exif_transpose(image), np.float32)
        known = levels[np.isfinite(levels)]
        levels = np.where(
            np.isfinite(levels), levels, np.median(known) if known.size else 0
        )
        low, high = np.quantile(levels, (0.001, 0.999))  # without hot pixels
        return np.float32(255 * (levels - low) / (high - low or 1)).clip(0, 255)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGBA")
    image = image.reduce(max(1, max(image.size) // (3 * SIDE)))
    image = ImageOps.exif_transpose(image).convert("RGBA")
    levels = np.array(image, np.float32)
    colours, opacity = levels[..., :3], levels[..., 3:] / 255
    behind = (colours * opacity).mean() / max(opacity.mean(), 0.001)
    if opacity.mean() < 0.5:  # ink alone: on what it stands out from
        behind = 255 if behind < 128 else 0
    colours = behind + opacity * (colours - behind)
    # Ink as bright as its paper: the mixture of colours that varies most.
    detail = (colours - colours.mean(axis=(0, 1))).reshape(-1, 3)
    mixture = np.linalg.eigh(detail.T @ detail)[1][:, -1]
    mixture /= abs(mixture).sum()
    if np.std(detail @ mixture) < 3 * np.std(detail @ BRIGHTNESS):
        mixture = np.array(BRIGHTNESS)
    grey = colours @ mixture
    return np.float32(grey - min(0, grey.min()))


def find_ink(grey):
    """Return the ink: 0 on paper, 1 in a full stroke; or None."""
    factor = math.ceil(max(grey.shape) / 48)
    small = np.array(Image.fromarray(grey).reduce(factor))
    size = max(small.shape)
    blurred = scipy.ndimage.gaussian_filter(small, size / 10, mode="mirror")
    if ((blurred - small) ** 3).sum() < 0:  # light ink on dark paper
        grey, small = -grey, -small
    # The light levels around, then the dark ones: no strokes are left.
    paper, window = small, size // 2 + 1
    for part in 75, 25:
        paper = scipy.ndimage.percentile_filter(paper, part, window, mode="nearest")
    paper = scipy.ndimage.minimum_filter(paper, 3)  # no ink at a shadow's edge
    paper = np.kron(paper, np.ones((factor, factor)))
    ink = paper[: len(grey), : grey.shape[1]] - grey
    noise = 6 * np.quantile(abs(ink), 0.25)  # two standard deviations
    stroke = np.median(ink[ink >= ink.max() / 2])
    if stroke < max(10, 2 * noise, np.ptp(paper) / 4):
        return None
    noise = min(noise, stroke / 4)
    return np.float32((ink - noise) / (stroke - noise))


def number_parts(mask, gap):
    """Number the parts of a mask from 1; return their sizes, too."""
    near = scipy.ndimage.maximum_filter(mask, 1 + 2 * gap)  # strokes have gaps
    number = scipy.ndimage.label(near)[0] * mask
    boxes = scipy.ndimage.find_objects(number)
    sizes = [(y.stop - y.start, x.stop - x.start) for y, x in boxes]
    return number, np.array([(0, 0), *sizes])  # 0 is the paper


def look_inside(mask, frame):
    """Return what the longest part of mask and frame goes round, if any."""
    number, sizes = number_parts(mask | frame, gap=0)
    sides = sizes.max(axis=1)
    frame = number == sides.argmax()
    holes = scipy.ndimage.binary_fill_holes(frame) & ~frame
    inside = sides[number * holes]
    return inside > 0 if inside.max() > 0.08 * max(sides) else mask


def cut_out(ink):
    """Return the ink of the digit; and whether there are several."""
    mask = ink > 0.5  # printed lines are paler
    border = np.ones_like(mask)
    border[1:-1, 1:-1] = False
    mask = look_inside(mask, border)  # without what touches it
    mask = look_inside(mask, False)  # without a frame
    number, sizes = number_parts(mask, 1 + max(mask.shape) // 100)
    counts = np.bincount(number[mask])
    digit = counts.argmax()
    large = counts > 0.06 * counts[digit]  # not a speck
    heights = sizes[:, 0] * large
    tall = heights > heights[digit] / 2  # not the bar of a 5
    mask = large[number]
    height, width = np.ptp(np.nonzero(mask), axis=1)
    several = sum(tall) > 1 or width > 2 * height or counts[digit] < sum(counts) / 2
    mask = scipy.ndimage.maximum_filter(mask, 5)  # with the faint edge
    return ink.clip(0, 1) * mask, several


def centre_digit(ink):
    """Return the ink in 20x20 pixels, its mass centred in 28x28."""
    scale = (np.ptp(np.nonzero(ink > 0.2), axis=1).max() + 1) / 20
    ink = np.pad(ink, math.ceil(15 * scale))
    y, x = np.array(scipy.ndimage.center_of_mass(ink)) + 0.5 - 14.5 * scale
    box = x, y, x + 28 * scale, y + 28 * scale
    digit = Image.fromarray(ink).resize((28, 28), Image.BILINEAR, box)
    return (255 * np.array(digit) / np.max(digit)).round().astype(np.uint8)


def prepare_photo(grey):
    """Return an image as in MNIST, uint8 (28, 28); and None, or why not."""
    picture = Image.fromarray(np.asarray(grey, np.float32))
    grey = np.array(picture.reduce(math.ceil(max(picture.size) / SIDE)))
    edge = min(grey.shape) // 64  # a margin that a crop or a scan has left there
    inner = grey[edge : len(grey) - edge, edge : grey.shape[1] - edge]
    ink = find_ink(grey.clip(inner.min(), inner.max()))
    if ink is None:
        return np.zeros((28, 28), np.uint8), "nothing stands out: use more contrast"
    ink, several = cut_out(ink)
    problem = "several digits, or none: crop to one digit"
    return centre_digit(ink), problem if several else None


@torch.no_grad()
def predict_files(args):
    """Classify the files of --predict; return the exit status."""
    model, path = load_predictor(args.checkpoint or args.output_dir)
    print(f"Model: {path}")
    status, shown = 0, []
    for name in find_images(args.predict):
        try:
            image, problem = prepare_photo(read_photo(name))
        except UserError as error:
            warn(str(error))
            status = 2
            continue
        row = model(normalise(torch.tensor(image[None]))).softmax(dim=1)[0]
        best, second = row.argsort(descending=True)[:2].tolist()
        answer = f"{best} ({row[best]:.1%}), then {second} ({row[second]:.1%})"
        if row[best] - row[second] < 0.2 and not problem:
            problem = f"not clear; closest: {answer}"
        answer = f"no answer: {problem}" if problem else answer
        print(f"{name}: {answer}")
        title = f"{name[-60:]}\n{answer}".encode("latin-1", "replace").decode("latin-1")
        shown.append((image, row.numpy(), title, GREY if problem else BLUE))
    if shown:
        picture = make_run_folder(args.output_dir, "predict") / "predictions.png"
        save_picture(picture, draw_digits, *zip(*shown[:100]), bars=True)
        print(f"Picture: {picture}")
    return status


# ===== The report page ================
# The parts in data/page, joined and filled in. The page computes what the network
# computes, call by call as recorded here.

PAGE = Path(__file__).resolve().parent / "data" / "page"
PAGE_TITLE = b"<title>Training report</title>"
ROOM = 6_000_000  # bytes of a page for weights; all else takes less than 2 MB


def encode(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def encode_digits(digits):
    rows = np.float64(digits.probabilities).round(4).tolist()
    images, labels = encode(digits.images), digits.labels.tolist()
    return {"images": images, "probabilities": rows, "labels": labels}


def encode_weights(weights, precision=torch.float32):
    """Return tensors by name as the page takes them."""
    encoded = {}
    for name, tensor in weights.items():
        data = encode(tensor.detach().cpu().to(precision))
        encoded[name] = {"shape": list(tensor.shape), "data": data}
    return encoded


class OperationRecorder(TorchFunctionMode):
    """Writes down the calls of torch functions, for the page to repeat them.

    A tensor is written as {"weight": name}, as {"tensor": number} (0 is the image, each
    result has the next number), or as {"constant": name}.
    """

    def __init__(self, model, image):
        super().__init__()
        self.operations, self.constants = [], {}
        self.tensors = [image]  # kept, so that no other one gets its id
        weights = model.state_dict(keep_vars=True)
        self.references = {id(weights[name]): {"weight": name} for name in weights}
        self.references[id(image)] = {"tensor": 0}

    def describe(self, value):
        """Return a value that JSON has no form for."""
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        if not isinstance(value, torch.Tensor):
            return str(value)  # a dtype, for instance
        self.has_tensors = True
        if id(value) not in self.references:  # made without the image
            name = f"constant {len(self.constants)}"
            self.constants[name] = value
            self.references[id(value)] = {"constant": name}
        return self.references[id(value)]

    def as_json(self, value):
        text = json.dumps(value, default=self.describe)
        return json.loads(text, parse_constant=str)  # "-Infinity"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.has_tensors = False
        call = {"args": self.as_json(args), "kwargs": self.as_json(kwargs or {})}
        call["op"] = function.__name__
        if call["op"] == "__get__":  # of a property: x.T
            call["op"] = function.__self__.__name__
        result = function(*args, **kwargs or {})
        parts = result if isinstance(result, (tuple, list)) else [result]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if self.has_tensors and (tensors or call["op"] == "__setitem__"):
            for tensor in tensors:
                self.references[id(tensor)] = {"tensor": len(self.tensors)}
                self.tensors.append(tensor)
            self.operations.append(call | {"result": self.as_json(result)})
        return result


@torch.no_grad()
def record_operations(model, image):
    """Return what model(image) computes, in evaluation mode, call by call."""
    was_training = model.training
    with OperationRecorder(model.eval(), image) as recorder:
        logits = model(image)
    model.train(was_training)
    return {
        "operations": recorder.operations,
        "output": recorder.describe(logits),
        "shapes": [list(tensor.shape) for tensor in recorder.tensors],
        "constants": encode_weights(recorder.constants),
    }


def describe_program(model, device):
    """Return what the page needs to compute what a model computes, or why not."""
    image = torch.zeros(1, 1, 28, 28, device=device)
    try:
        return {"program": record_operations(model, image)}
    except Exception as error:  # noqa: BLE001, the run goes on
        return {
            "program": None,
            "problem": f"recording its operations failed ({error!r:.200})",
        }


def take_snapshot(recorder):
    """Return the weights for the page, now and earlier, and logits to check them by."""
    args, model, epoch = recorder.args, recorder.model, recorder.epochs_done
    text = json.dumps(recorder.program)
    weights = model.state_dict()
    weights = {n: weights[n] for n in weights if f'{{"weight": "{n}"}}' in text}
    # In float16, as base64, a set of weights has this size. In float32 it has two.
    size = 1 + 8 / 3 * sum(tensor.numel() for tensor in weights.values())
    room = math.floor((ROOM - len(text)) / size)
    program = recorder.program
    if room < 1:
        program, weights = (
            {"program": None, "problem": "it is too large for a page"},
            {},
        )
    every = math.ceil(args.epochs / max(1, min(8, room - 2)))  # or they have no room
    earlier = [
        one for one in recorder.snapshots if one["epoch"] in range(0, epoch, every)
    ]
    precision = torch.float16 if room == 1 else torch.float32
    if precision == torch.float16:  # the check is of the weights that the page gets
        model = copy.deepcopy(model).half().float()
    predictor = ShiftAverage(model) if args.recipe == "accurate" else model
    images = load_mnist(args.data_dir)[0][:10]
    with torch.no_grad():
        logits = predictor.eval()(normalise(images).to(recorder.device))
    model.train()
    recorder.snapshots = earlier
    if room > 2 and epoch % every == 0:
        half = {name: encode(weights[name].cpu().half()) for name in weights}
        recorder.snapshots = [*earlier, {"epoch": epoch, "weights": half}]
    return program | {
        "mean_std": [MEAN, STD],
        "weights": encode_weights(weights, precision),
        "half": precision == torch.float16,
        "weights_epoch": epoch,
        "snapshots": earlier,
        "check": {"images": encode(images), "logits": logits.tolist()},
    }


def is_page(path):
    return path.exists() and PAGE_TITLE in path.read_bytes()[:500]


def write_page(path, values):
    """Write a page: the parts in data/page, joined, with `values` in it."""
    values |= {"folder": str(path.parent.resolve()), "written": time.time()}
    data = json.dumps(values).replace("<", "\\u003c")  # no text may end the script
    try:
        if path.exists() and not is_page(path):
            raise OSError("it is not a page of this script")
        page = (PAGE / "report.html").read_text(encoding="utf-8")
        for part in PAGE.iterdir():
            text = part.read_text(encoding="utf-8")
            link = f'<link rel="stylesheet" href="{part.name}">'
            page = page.replace(link, f"<style>\n{text}</style>")
            script = f'<script src="{part.name}"></script>'
            page = page.replace(script, f"<script>\n{text}</script>")
        write(path, page.replace(">null<", f">{data}<", 1).encode(), needed=False)
    except OSError as error:
        warn(f"cannot write {path}: {error}")


# ===== The command line ===============

FLAGS = {  # name: (default, choices or lowest and highest, help)
    "recipe": (RECIPE, ("classic", "accurate"), "the settings below, as a whole"),
    "model": (MODEL, (*MODELS, "both"), "a network of MODELS; both: fc and cnn"),
    "epochs": (EPOCHS, (1, 10_000), "passes over the training images"),
    "batch_size": (BATCH_SIZE, (1, 60_000), "images per step"),
    "lr": (LR, (1e-9, 1e9), "learning rate"),
    "optimizer": (OPTIMIZER, ("sgd", "adam"), "what updates the weights"),
    "seed": (SEED, (0, 2**32 - 1), "of initial weights and shuffling"),
    "seeds": (SEEDS, (1, 1000), "number of runs: SEED, SEED + 1, ..."),
    "limit": (LIMIT, (0, 60_000), "train on the first N images; 0: all"),
    "device": (DEVICE, None, "auto, cpu, mps, cuda, cuda:1, ..."),
    "data_dir": (DATA_DIR, None, "folder with MNIST/raw/*.gz"),
    "output_dir": (OUTPUT_DIR, None, "where the runs are kept"),
    "comet": (COMET, ("auto", "online", "offline", "off"), "auto: online with a key"),
}


PLACES = "device", "data_dir", "output_dir", "comet"  # decide no result


def as_flags(values):
    return [f"--{name.replace('_', '-')}={values[name]}" for name in values]


def read_settings(argv=None):
    """Return the settings, a Namespace; argparse exits if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py [flags] (see --help)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, details in FLAGS.items():
        value, allowed, text = details
        kind = type(allowed[0]) if allowed else str
        choices = allowed if kind is str else None
        text += " (default: %(default)s)"
        flag = "--" + name.replace("_", "-")
        add(flag, default=value, type=kind, choices=choices, help=text)
    add("--compare", action="store_const", dest="model", const="both")
    add("--resume", type=Path, help="continue a run: its folder")
    add("--predict", nargs="+", metavar="IMAGE", help="classify images, folders, *.png")
    add("--checkpoint", metavar="FILE", help="the model.pt (default: the newest)")
    # The constants, or those of the recipe or of the run to resume, stand before what
    # is typed, which wins. As flags, since argparse checks flags, but no defaults.
    typed = sys.argv[1:] if argv is None else list(argv)
    base = {name: details[0] for name, details in FLAGS.items()}
    args = parser.parse_args(as_flags(base) + typed)
    folder = args.resume
    if folder and folder.is_file():
        folder = folder.parent  # runs/NAME/checkpoint.pt
    fixed = set()
    if folder and not args.predict:
        base |= read_config(folder)["settings"] | {name: base[name] for name in PLACES}
        fixed = FLAGS.keys() - {"epochs", *PLACES}
        if base["seeds"] > 1 or base["model"] == "both":
            fixed.remove("seeds")  # a study can get more
    elif args.recipe == "accurate":
        base |= ACCURATE
    args = parser.parse_args(as_flags(base) + typed)
    if fixed and args.recipe == "accurate":
        fixed.add("epochs")  # its learning rate depends on them
    args.resume = folder
    accurate_adam = args.recipe == "accurate" and args.optimizer == "adam"
    if accurate_adam and args.lr == ACCURATE["lr"]:  # which is for SGD
        parser.error("--recipe accurate --optimizer adam needs --lr, about 0.003")
    if args.checkpoint and not args.predict:
        parser.error("--checkpoint goes with --predict")
    for name in FLAGS:
        value, allowed = getattr(args, name), FLAGS[name][1]
        if name in fixed and value != base[name]:
            text = f"--resume: this run has {name} {base[name]}"
            parser.error(f"{text}; leave {as_flags({name: value})[0]} out")
        if type(value) is not str and not allowed[0] <= value <= allowed[1]:  # or nan
            parser.error(f"{name} must be from {allowed[0]} to {allowed[1]}")
    return args


def tune_cpu():
    """Use memory and processors so that training is fast."""
    if platform.libc_ver()[0] == "glibc":
        # Memory up to 32 MB is used again, not given back: 1.25 times as fast.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h
        for option in M_TRIM_THRESHOLD, M_MMAP_THRESHOLD:
            ctypes.CDLL(None).mallopt(option, 2**25)
    # In a container with fewer processors than the computer has, more threads are slow.
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        processors = max(1, int(quota) // int(period))
        torch.set_num_threads(min(processors, torch.get_num_threads()))


@contextmanager
def catch_signals():
    """Turn Ctrl-C, SIGTERM and SIGHUP into a KeyboardInterrupt."""
    before = {}

    def stop(number, frame):
        for other, handler in before.items():  # torchrun sends it twice
            signal.signal(other, signal.SIG_IGN if LAUNCHED else handler)
        raise KeyboardInterrupt(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            with suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    """Run the script with these arguments; return the exit status."""
    warn.cache_clear()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    folder, status, useful, resumable = None, 1, True, True
    try:
        args = read_settings(argv)
        if args.predict:
            return predict_files(args) if RANK == 0 else 0
        tune_cpu()
        with catch_signals(), join_processes(args) if LAUNCHED else nullcontext():
            load_mnist(args.data_dir)  # an error leaves no folder
            folder = args.resume or make_run_folder(args.output_dir, args.model)
            train_all(args, folder)
        return 0
    except SystemExit as end:  # argparse has printed why
        return end.code
    except RunError as error:
        text, resumable = str(error), error.resumable
    except UserError as error:
        status, text, useful = error.status, str(error), False
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        status, text = 128 + number, f"interrupted by {signal.Signals(number).name}"
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, torch.OutOfMemoryError):
        text = "out of memory: reduce --batch-size, or use --device cpu"
    except Exception as error:  # noqa: BLE001
        if isinstance(error, OSError) and not error.filename:  # of a print
            text = f"cannot write the output: {error.strerror}"
        else:  # a bug
            traceback.print_exc()
            text, useful = explain_bug(error), False
    if text:
        warn(text)
    if not folder or RANK > 0:
        return status
    if useful and resumable:
        warn(f"continue with: {quote(['python', 'main.py', '--resume', str(folder)])}")
    elif not useful and not args.resume and not any(folder.rglob("checkpoint.pt")):
        shutil.rmtree(folder, ignore_errors=True)
        write_overviews(folder)
    return status


def explain_bug(error):
    """Return a line to print below a traceback: which sizes meet, for instance."""
    if WORLD_SIZE > 1:
        return "this is a bug, or another process has ended"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame.f_code.co_name == "forward"]
    if not frames or isinstance(error, (AttributeError, NameError, TypeError)):
        return ""
    layer, name = frames[-1].f_locals["self"], frames[-1].f_code.co_varnames[1]
    shape = tuple(getattr(frames[-1].f_locals.get(name), "shape", ()))
    layer = str(layer).split("(\n")[0]
    return f"compare the sizes: {name} has the shape {shape} in {layer}"


if __name__ == "__main__":
    sys.exit(main())
