"""Train, track and understand your first convolutional network, on MNIST.

python main.py                          train the CNN for 7 epochs
python main.py --limit 2000 --epochs 1  a quick look
python main.py --compare                train the fully connected baseline beside it
python main.py --recipe accurate        the best that this network can do
python main.py --seeds 5                train five times: how much is chance?
python main.py --resume runs/NAME       continue a run that was stopped
python main.py --predict photo.jpg      classify your own handwriting
torchrun --nproc-per-node=2 main.py     train with two processes, or two GPUs

Test accuracy 98.0 ± 0.5 %, accurate 99.64 ± 0.03 %: mean ± standard deviation of 10
seeds, with PyTorch 2.14.1 on 2 cores of an AMD EPYC.
"""

import argparse
import base64
import ctypes
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import urllib.request
import warnings
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchsummary import summary
from torchvision.datasets import MNIST
from tqdm import tqdm

# ===== Settings =======================
# Edit them here, or use the flags: EPOCHS is --epochs.

# The experiment
RECIPE = "classic"  # "classic": as below; "accurate": see ACCURATE
MODEL = "cnn"  # "cnn" (CNN) or "fc" (FullyConnectedModel)
EPOCHS = 7  # passes over the training images
BATCH_SIZE = 64  # images per step
LR = 0.01  # learning rate
OPTIMIZER = "sgd"  # "sgd" or "adam"
SEED = 0  # for the initial weights and the shuffling
SEEDS = 1  # number of runs, with SEED, SEED + 1, ...
LIMIT = 0  # train on the first LIMIT images only; 0: on all 60,000

# What the accurate recipe sets instead. It also varies the learning rate and distorts
# the images; with SGD it has momentum and weight decay, with Adam it has none.
ACCURATE = {"epochs": 7, "batch_size": 64, "lr": 0.1, "optimizer": "sgd"}

# Where
DEVICE = "auto"  # "auto" (the best available), "cpu", "mps", "cuda", "cuda:1", ...
DATA_DIR = str(Path(__file__).resolve().parent / "data")  # has MNIST/raw/*.gz
OUTPUT_DIR = "runs"  # each run makes a new folder in it

# Tracking on comet.com
COMET = "auto"  # "online", "offline", "off"; "auto": online with a key, else offline
COMET_API_KEY = "YOUR_API_KEY_HERE"  # or the variable COMET_API_KEY, or ~/.comet.config
COMET_PROJECT = "mnist-cnn"

# ===== Models =========================


class CNN(nn.Module):
    """Two convolutions and two linear layers: 124,670 parameters."""

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
        """Map normalised images (N, 1, 28, 28) to ten scores each: logits (N, 10)."""
        # Convolution, ReLU, max-pool. Here the pooling comes first, which is the same,
        # since max(relu(a), relu(b)) = relu(max(a, b)), and leaves ReLU a quarter to do.
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


MODELS = {"cnn": CNN, "fc": FullyConnectedModel}

# ===== Data ===========================

MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]


@functools.cache  # several runs load it once
def load_mnist(data_dir):
    """Return MNIST: training images and labels, test images and labels.

    uint8 (60000, 28, 28), int64 (60000,), uint8 (10000, 28, 28), int64 (10000,), from
    the four archives in `data_dir`/MNIST/raw. Raises UserError; see read_archive.
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

    `order` has the indices of the images to use; None: all of them, as they are. This
    does the job of a DataLoader, faster: all of MNIST fits in memory.
    """
    if order is None:
        order = torch.arange(len(labels), device=labels.device)
    for chosen in order.split(batch_size):
        yield normalise(images[chosen]), labels[chosen]


# ===== Training and evaluation ========


def train_epoch(model, batches, loss_function, optimizer, scheduler, on_step):
    """Train on every batch once; return mean loss and accuracy over the epoch.

    `batches` yields images (N, 1, H, W) and labels (N,). Both results are measured
    while the weights still change. on_step(loss) is called after every step with the
    mean loss of its batch: a tensor, still on the device.
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

        # No .item() here: it would make a GPU wait. The sums stay on the device.
        loss = loss.detach()
        loss_sum += loss * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
        on_step(loss)
    return float(loss_sum) / count, int(correct) / count


@torch.no_grad()
def evaluate(model, batches, loss_function=F.cross_entropy):
    """Return the mean loss, the accuracy and the logits (N, 10) of all batches.

    `batches` yields images and labels, as a DataLoader does; `loss_function` returns a
    batch's mean loss. Every image has the same weight. The model is put back into the
    mode it was in, training or evaluation. Raises ValueError if there are no images.
    """
    was_training = model.training
    model.eval()
    loss_sum = correct = 0
    all_logits = []
    for images, labels in batches:
        logits = model(images)
        loss_sum += loss_function(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        all_logits.append(logits)
    model.train(was_training)
    if not all_logits:
        raise ValueError("evaluate() was given no images")
    all_logits = torch.cat(all_logits)
    count = len(all_logits)
    return float(loss_sum) / count, int(correct) / count, all_logits


# ===== The run ========================

RULE = "=" * 70


def select_device(name="auto"):
    """Return a torch.device that works; "auto": MPS, else CUDA, else the CPU."""
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
        torch.ones(1, device=device).sum().item()  # it may be listed but broken
    return device


@torch.no_grad()
def choose_size(model):
    """Return 26 if the last two rows and columns of 28x28 do not matter, else 28."""
    images = torch.randn(2, 1, 28, 28)
    with explaining("the model's layers do not fit together"):
        logits = model(images)
        if logits.shape != (2, 10):
            raise UserError(f"the model must return 10 logits, not {logits.shape[1:]}")
    # The CNN makes 5x5 of both: 28, 26, 13, 11, 5 pixels and 26, 24, 12, 10, 5.
    with suppress(RuntimeError):  # other layers may fit 28x28 only
        if torch.allclose(model(images[..., :26, :26]), logits, atol=1e-4):
            return 26
    return 28


def train_run(settings, folder):
    """Train, test and keep one model as the settings say; return its Recorder."""
    accurate, name = settings.recipe == "accurate", settings.model.upper()

    # --- 1. Data ---
    device = select_device(settings.device)
    images, labels, test_images, test_labels = load_mnist(settings.data_dir)
    images = images[: settings.limit or None].to(device)  # 0: all
    labels = labels[: settings.limit or None].to(device)
    steps = math.ceil(len(labels) / settings.batch_size)  # per epoch

    # --- 2. Model, loss, optimizer ---
    size = choose_size(MODELS[settings.model]())  # 26x26 is faster
    torch.manual_seed(settings.seed)
    model = MODELS[settings.model]().to(device)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # faster convolutions
    # Softmax is inside this loss: the model returns logits.
    loss_function = nn.CrossEntropyLoss(label_smoothing=SMOOTHING if accurate else 0)
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), settings.lr)
    else:
        more = SGD if accurate else {}
        optimizer = torch.optim.SGD(model.parameters(), settings.lr, **more)
    recorder = Recorder(settings, folder, device, steps, model, optimizer)
    done = recorder.epochs_done  # 0, unless a run is resumed
    # The learning rate is constant, or has the accurate recipe's schedule over all steps.
    schedule = functools.partial(one_cycle, settings.epochs * steps if accurate else 0)
    scheduler = LambdaLR(optimizer, schedule, last_epoch=done * steps - 1)
    # torchrun: its gradients are averaged over all processes; the weights are model's.
    ddp_model = DistributedDataParallel(model) if LAUNCHED else model

    with recorder:  # shows, tracks and saves what follows, however it ends
        # --- 3. Train ---
        print(RULE, f"TRAINING {name} MODEL", RULE, sep="\n")
        print(model)
        summary(MODELS[settings.model](), (1, 28, 28), device="cpu")
        for epoch in range(done + 1, settings.epochs + 1):
            recorder.start_epoch()
            # Each epoch has its own seed, so that a resumed run continues exactly. (There
            # are at most 10,000 epochs: no seed is used twice.)
            torch.manual_seed(10_001 * settings.seed + epoch)
            share = slice(RANK, None, WORLD_SIZE)  # without torchrun: everything
            order = torch.randperm(len(labels))[share].to(device)
            batch_size = settings.batch_size // WORLD_SIZE
            batches = make_batches(images, labels, batch_size, order)
            if accurate:
                batches = augment(batches, draw_distortions(len(labels))[share])
            # Crop them: the same logits, faster. The test is on whole images.
            batches = ((x[..., :size, :size], y) for x, y in batches)
            loss, accuracy = train_epoch(
                ddp_model, batches, loss_function, optimizer, scheduler, recorder.step
            )
            loss, accuracy = average(loss, accuracy, device)
            recorder.end_epoch(loss, accuracy)
            print(f"Epoch {epoch}/{settings.epochs}, Accuracy: {accuracy:.4f}")
        if RANK > 0:  # with torchrun, only the first process tests
            return recorder

        # --- 4. Test ---
        print(RULE, f"EVALUATING {name} MODEL", RULE, sep="\n")
        test_images, test_labels = test_images.to(device), test_labels.to(device)
        batches = make_batches(test_images, test_labels, batch_size=250)
        predictor = ShiftAverage(model) if accurate else model
        loss, accuracy, logits = evaluate(predictor, batches)
        print(f"Test Accuracy: {accuracy:.4f}\nTest Loss: {loss:.4f}\n")
        digit, label = logits[0].argmax(), test_labels[0]
        print(f"Single Image Prediction: {digit}, Actual Label: {label}")

        # --- 5. Keep: weights, metrics, pictures, page ---
        recorder.keep(loss, accuracy, logits, test_images, test_labels)
    print(RULE, f"TRAINING COMPLETE - {recorder.place}", RULE, sep="\n")
    return recorder


# ===== The accurate recipe ============
# A learning rate that rises and falls, digits that look different in every epoch, and a
# test that averages nine views of each digit. How it was chosen: tests/README.md.

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-4}
SMOOTHING = 0.05  # of the labels: Szegedy et al. 2016, arXiv:1512.00567
ANGLE, SCALE, SHIFT = 5, 0.1, 2  # at most: degrees, share of the size, pixels


def one_cycle(steps, step):
    """Return the learning rate's factor at a step: Smith 2018, arXiv:1803.09820."""
    if not steps:
        return 1.0
    progress = (step + 0.5) / steps
    return max(0.0, min(progress / 0.3, (1 - progress) / 0.7))  # up, then down


def draw_distortions(count):
    """Return random affine maps (count, 2, 3), as of Simard et al. 2003."""
    angle, shear, width, height, x, y = 2 * torch.rand(6, count) - 1  # from -1 to 1
    angle, shear = math.radians(ANGLE) * angle, math.radians(ANGLE) * shear
    width, height = 1 + SCALE * width, 1 + SCALE * height
    x, y = SHIFT / 14 * x, SHIFT / 14 * y  # 14 pixels, half of the image, are 1
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([width * cos, shear * cos - height * sin, x], dim=1)
    bottom = torch.stack([width * sin, shear * sin + height * cos, y], dim=1)
    return torch.stack([top, bottom], dim=1)


def augment(batches, distortions):
    """Yield the batches, every image distorted by its own map, in order.

    The strokes of a third of the batches are thickened by half, of a third thinned.
    """
    start = 0
    for images, labels in batches:
        maps = distortions[start : start + len(images)].to(images.device)
        start += len(images)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        images = F.grid_sample(images, grid, "bilinear", "border", False)
        choice = torch.rand(1).item()
        if choice < 1 / 3:
            images = (images + F.max_pool2d(images, 3, stride=1, padding=1)) / 2
        elif choice < 2 / 3:
            images = (images - F.max_pool2d(-images, 3, stride=1, padding=1)) / 2
        yield images, labels


class ShiftAverage(nn.Module):
    """The mean logits of a model for an image and its eight shifts by one pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = F.pad(x, [1, 1, 1, 1], value=-MEAN / STD)  # black: (N, 1, 30, 30)
        views = [x[..., i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
        return torch.stack([self.model(view) for view in views]).mean(dim=0)


# ===== The recorder ===================
# What shows, tracks and keeps the run. Read it when you need it.

KEPT = ("history", "losses", "snapshots", "comet_key")  # in a checkpoint
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"  # colour-blind safe


class LossHistory:
    """Smoothed values: the first one raw, then a * last + (1 - a) * value.

    This class and the next have the interface of mitdeeplearning.util 0.7.5.
    """

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


class PeriodicPlotter:
    """Draws a growing curve into the PNG file `path`, at most every `sec` seconds.

    `scale` is None, semilogx, semilogy or loglog; else ValueError.
    """

    def __init__(self, sec, xlabel="", ylabel="", scale=None, path=None):
        if scale not in (None, "semilogx", "semilogy", "loglog"):
            raise ValueError(f"unrecognized parameter scale {scale!r}")
        self.sec, self.path, self.drawn = sec, path, time.monotonic()
        self.figure = Figure(figsize=(7, 4))
        self.axes = self.figure.subplots()
        self.figure.subplots_adjust(0.11, 0.13, 0.98, 0.97)  # a layout engine is slow
        (self.curve,) = getattr(self.axes, scale or "plot")([], [], color=BLUE)
        self.axes.set(xlabel=xlabel, ylabel=ylabel)
        self.axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
        self.axes.grid(which="both", alpha=0.3)

    def plot(self, data):
        if time.monotonic() - self.drawn >= self.sec:
            self.draw(data)

    def draw(self, data):
        """Draw the values now, up to the last one."""
        self.curve.set_data(range(1, len(data) + 1), data)
        self.axes.relim()
        self.axes.autoscale_view()
        if self.path:
            save_figure(self.figure, self.path)
        self.drawn = time.monotonic()


class Recorder:
    """Shows, tracks and saves a run, however it ends."""

    def __init__(self, settings, folder, device, steps, model, optimizer):
        """`steps`: per epoch. If the folder has a checkpoint, continue from it."""
        self.settings, self.folder, self.steps = settings, folder, steps
        self.device, self.model, self.optimizer = device, model, optimizer
        self.history = {"train_loss": [], "train_accuracy": [], "epoch_seconds": []}
        self.losses, self.snapshots, self.results = [], [], {}
        self.bar, self.waiting, self.comet_key = None, [], None
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load_checkpoint()
        self.epochs_done = len(self.history["train_loss"])
        self.smoothed = LossHistory(smoothing_factor=0.95)
        for loss in self.losses:
            self.smoothed.append(loss)
        png = folder / "loss_curve.png"
        self.plotter = PeriodicPlotter(2, "iteration", "smoothed loss", "semilogy", png)
        self.shown = self.page_written = 0

    def load_checkpoint(self):
        with explaining(f"{self.checkpoint} does not fit"):
            kept = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            for name in KEPT:
                setattr(self, name, kept[name])
            for name in FLAGS.keys() - RESUMABLE:
                if kept["settings"][name] != getattr(self.settings, name):
                    raise ValueError(f"it was trained with another {name}")
            if len(self.history["train_loss"]) > self.settings.epochs:
                raise UserError("--epochs: the run to resume has done more")

    def __enter__(self):
        """Start or continue everything."""
        self.config = describe(self.settings, self.device)
        kept = self.config["settings"]
        self.comet, where = start_comet(kept["comet"], self.folder, self.comet_key)
        save_json(self.config, self.folder / "config.json")
        print("Settings:", ", ".join(f"{name} {kept[name]}" for name in kept))
        print(f"Device: {self.device}\nFolder: {self.folder}")
        print(f"Report: {self.folder / 'report.html'}\nComet: {where}")
        self.comet_key = self.comet.get_key()
        self.comet.set_name(self.folder.name)
        self.comet.log_parameters(kept)
        self.comet.set_model_graph(str(self.model))
        if self.comet.url is None:  # the archive gets all of a resumed run
            for step, loss in enumerate(self.losses, 1):
                self.comet.log_metric("loss", loss, step=step)
            for epoch in range(1, self.epochs_done + 1):
                self.log_epoch(epoch)
        self.network = take_snapshot(self)
        self.write_page("training")

    def start_epoch(self):
        self.bar = tqdm(total=self.steps, disable=RANK > 0)
        self.epoch_start = time.perf_counter()

    def step(self, loss):
        """Take a step's loss, a tensor: read and shown every 0.2 s."""
        self.waiting.append(loss)
        if time.monotonic() - self.shown >= 0.2:
            self.show()

    def show(self):
        losses = torch.stack(self.waiting).tolist() if self.waiting else []
        self.waiting.clear()
        # Online, Comet takes 200 values a second. It gets at most 10.
        every = math.ceil(len(losses) / 2) if self.comet.url else 1
        for loss in losses:
            check_finite(loss, "loss")
            self.losses.append(loss)
            self.smoothed.append(loss)
            if len(self.losses) % every == 0:
                self.comet.log_metric("loss", loss, step=len(self.losses))
        smoothed = self.smoothed.get()
        self.bar.set_postfix(loss=f"{smoothed[-1]:.4f}", refresh=False)
        self.bar.update(len(losses))
        self.plotter.plot(smoothed)
        self.shown = time.monotonic()
        if self.shown - self.page_written >= 5:
            self.write_page("training")

    def end_epoch(self, loss, accuracy):
        """Keep the epoch's results and a checkpoint."""
        self.show()
        self.bar.close()
        for weights in self.model.parameters():
            check_finite(weights.detach().sum().item(), "weights")
        seconds = time.perf_counter() - self.epoch_start
        for name, value in zip(self.history, (loss, accuracy, seconds)):
            self.history[name].append(value)
        self.epochs_done += 1
        self.network = take_snapshot(self)
        checkpoint = {name: getattr(self, name) for name in KEPT}
        checkpoint["settings"] = self.config["settings"]
        checkpoint["model"] = self.model.state_dict()
        checkpoint["optimizer"] = self.optimizer.state_dict()
        save_tensors(checkpoint, self.checkpoint)
        self.log_epoch(self.epochs_done)
        self.write_page("training")

    def log_epoch(self, epoch):
        values = {name: column[epoch - 1] for name, column in self.history.items()}
        self.comet.log_metrics(values, step=epoch * self.steps, epoch=epoch)

    def write_page(self, state, message=""):
        smoothed = self.smoothed.get()
        values = {"kind": "run", "message": message, "curve": thin(smoothed)}
        values |= {"history": self.history, "results": self.results}
        values |= {"steps_per_epoch": self.steps, "steps_done": len(smoothed)}
        write_page(self.folder, self.config | self.network | values, state)
        self.page_written = time.monotonic()

    def keep(self, loss, accuracy, logits, images, labels):
        """Keep the weights, and the test's results as numbers and pictures."""
        check_finite(loss, "test loss")
        weights = self.model.state_dict()
        weights = {name: weights[name].cpu().contiguous() for name in weights}
        save_tensors(weights, self.folder / "model.pt")
        probabilities = logits.softmax(dim=1)
        numbers = {"test_loss": loss, "test_accuracy": accuracy}
        numbers["calibration_error"] = calibration_error(probabilities, labels)
        digits = [part.cpu().numpy() for part in (images, probabilities, labels)]
        images, probabilities, labels = self.digits = digits
        answers = probabilities.argmax(axis=1)
        self.right = answers == labels
        matrix = np.bincount(10 * labels + answers, minlength=100).reshape(10, 10)
        self.comet.log_metrics(numbers, step=len(self.losses))
        self.comet.log_confusion_matrix(matrix=matrix.tolist())
        self.results = numbers | {"confusion_matrix": matrix.tolist()}
        wrong = np.flatnonzero(~self.right)
        order = np.argsort(-probabilities[wrong].max(axis=1))
        wrong = wrong[order][:200]  # the most confident first
        self.network["first"] = encode_digits(digits, range(20))
        self.network["wrong"] = encode_digits(digits, wrong)
        pictures = {
            "sample_prediction": draw_results(digits, [0]),
            "single_prediction": draw_results(digits, [0], bars=True),
            "predictions_grid": draw_results(digits, range(20)),
            "worst_mistakes": draw_results(digits, wrong[:20]),
            "confusion_matrix": draw_confusion(matrix),
        }
        for name, figure in pictures.items():
            save_figure(figure, self.folder / f"{name}.png")

    def __exit__(self, kind, error, traceback):
        """Complete everything, also of a run that did not finish."""
        state = "finished"
        if error is not None and kind is not BrokenPipeError:
            state = "stopped" if kind is KeyboardInterrupt else "failed"
            done = f"{self.epochs_done} of {self.settings.epochs} epochs are done"
            warn(f"the run has {state}: {done}, in {self.folder}")
        if self.bar:
            self.bar.close()
        try:
            if self.losses:
                self.plotter.draw(self.smoothed.get())
            whole = {"losses": self.losses[: self.epochs_done * self.steps]}
            save_json(self.history | whole | self.results, self.folder / "metrics.json")
            self.write_page(state, str(error) if state == "failed" else "")
            for path in sorted(self.folder.glob("*.png")):
                self.comet.log_image(str(path), path.stem)
            self.comet.log_asset(str(self.folder / "report.html"), "report.html")
        finally:
            self.place = end_comet(self.comet, self.folder)


def check_finite(value, name):
    if not math.isfinite(value):
        raise UserError(f"training diverged: {name} {value}; try a smaller --lr", 1)


# ===== Pictures =======================


def draw_digits(images, probabilities, titles, colours, bars):
    """Return a Figure of images (N, 28, 28), and bar charts of probabilities."""
    columns = min(2 if bars else 4, len(images))
    rows = math.ceil(len(images) / columns)
    width, parts = (6, 3) if bars else (2.1, 1)
    figure = Figure(figsize=(width * columns, 2.5 * rows), layout="constrained")
    for n, image in enumerate(images):
        axes = figure.add_subplot(rows, parts * columns, parts * n + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        colour, title = colours[n], titles[n].encode(errors="replace").decode()
        axes.spines[:].set(color=colour, linewidth=4 if colour == VERMILION else 1)
        axes.set_title(title, color=colour, size=9, loc="left", parse_math=False)
        if bars:
            place = parts * n + 2, parts * n + 3
            axes = figure.add_subplot(rows, parts * columns, place)
            drawn = axes.bar(range(10), 100 * probabilities[n], color=GREY)
            drawn[probabilities[n].argmax()].set(color=colour)
            axes.bar_label(drawn, fmt="%.1f", fontsize=8)
            axes.set(xlabel="digit", ylabel="probability (%)", ylim=(0, 112))
            axes.set_xticks(range(10))
    return figure


def draw_results(digits, chosen, bars=False):
    """Return a Figure of some digits with prediction and true label."""
    images, probabilities, labels = (part[chosen] for part in digits)
    titles, colours = [], []
    for row, label in zip(probabilities, labels):
        sign, colour = ("✓", BLUE) if row.argmax() == label else ("✗", VERMILION)
        prediction = f"{sign} predicted {row.argmax()} ({row.max():.1%})"
        titles.append(f"{prediction}\ntrue label {label}")
        colours.append(colour)
    return draw_digits(images, probabilities, titles, colours, bars)


def draw_confusion(matrix):
    """Return a Figure of the matrix (10, 10): true label by prediction."""
    right = matrix.diagonal()
    mistakes = matrix - np.diag(right)
    figure = Figure(figsize=(6.7, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mistakes, cmap="Oranges", vmax=max(1, 2 * mistakes.max()))
    for (row, column), count in np.ndenumerate(matrix):
        style = {"color": BLUE, "weight": "bold"} if row == column else {}
        axes.text(column, row, count or "·", ha="center", va="center", **style)
    share = 100 * right / matrix.sum(axis=1)
    axes.set_yticks(range(10), [f"{share[n]:.1f} %   {n}" for n in range(10)])
    axes.set(xlabel="predicted", ylabel="accuracy and true label", xticks=range(10))
    return figure


def calibration_error(probabilities, labels):
    """Return the expected calibration error: Guo et al. 2017, arXiv:1706.04599."""
    confidence, digits = probabilities.max(dim=1)
    number = (15 * confidence).long().clamp(max=14)  # of 15 equal bins
    excess = confidence - (digits == labels).float()
    gaps = torch.zeros(15, device=labels.device).index_add(0, number, excess)
    return float(gaps.abs().sum()) / len(labels)


# ===== Comet ==========================

COMET_DEFAULTS = {  # of Comet's own variables; what the user has set wins
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    # An online experiment writes an archive, too.
    "COMET_FALLBACK_STREAMER_KEEP_OFFLINE_ZIP": "1",
    "COMET_TIMEOUT_HTTP": "5",  # seconds, if the server does not answer
    "COMET_TIMEOUT_API": "5",
    "COMET_TIMEOUT_FILE_UPLOAD": "5",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
}
NO_KEY = "YOUR_API_KEY_HERE"


class NoExperiment:
    """Stands in for an experiment when tracking is off; ignores all calls."""

    url = None

    def __getattr__(self, name):
        return lambda *arguments, **named: None


def start_comet(mode, folder, key):
    """Return an experiment, of this key if there is one, and where it goes."""
    if mode == "off" or RANK > 0:
        return NoExperiment(), "off"
    for name, value in COMET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import comet_ml
    except ImportError:
        if mode != "auto":
            raise UserError(f"--comet {mode} needs: pip install comet-ml") from None
        return NoExperiment(), "off (comet-ml is not installed: pip install comet-ml)"
    public = COMET_API_KEY == NO_KEY  # else code and patch would show the key
    options = {
        "project_name": comet_ml.get_config("comet.project_name") or COMET_PROJECT,
        "experiment_key": key,
        "mode": "get_or_create" if key else "create",
        "experiment_config": comet_ml.ExperimentConfig(
            offline_directory=str(folder),
            log_code=public,
            log_git_patch=public,
            parse_args=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            display_summary_level=0,
        ),
    }
    api_key = comet_ml.get_config("comet.api_key") or COMET_API_KEY
    if mode == "online" and api_key == NO_KEY:
        raise UserError("--comet online: there is no API key; set COMET_API_KEY")
    where = "offline"
    if mode != "offline" and api_key != NO_KEY:
        where = "offline (Comet does not answer, or rejects the API key)"
        with suppress(Exception):  # its text may have the key in it
            experiment = comet_ml.start(online=True, api_key=api_key, **options)
            if experiment.alive:
                return experiment, experiment.url
        if mode == "online":
            raise UserError(f"--comet online is not possible, only {where}", 1)
    return comet_ml.start(online=False, **options), where


def end_comet(experiment, folder):
    """End the experiment; return in words where the results are."""
    experiment.end()
    place = f"results in {folder}"
    archives = sorted(folder.glob("*.zip"), key=os.path.getmtime)
    if not archives:
        return place
    archive = shlex.quote(archives[-1].as_posix())
    if experiment.url is None:
        return f"{place}; comet upload {archive}"
    copy = f"if Comet lacks something: comet upload --force-reupload {archive}"
    return f"{experiment.url}; {place}; {copy}"


# ===== Files ==========================


class UserError(Exception):
    """What is wrong and what to do. Status 2: wrong input; 1: it failed."""

    def __init__(self, text, status=2):
        super().__init__(" ".join(text.split()))
        self.status = status


@contextmanager
def explaining(what, status=2):
    """Turn any error, such as a damaged file can raise, into a UserError."""
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


def describe(settings, device):
    """Return what config.json holds."""
    kept = {name: getattr(settings, name) for name in (*FLAGS, "compare")}
    packages = ("torch", "torchvision", "numpy", "scipy", "matplotlib")
    return {
        "settings": kept,
        "command": shlex.join(["python", "main.py", *as_flags(kept)]),
        "device": str(device),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in packages},
        "data_md5": dict(MNIST.resources),
    }


def read_config(folder):
    """Return the settings in the config.json of a run's folder."""
    with explaining(f"{folder} is not a run folder (config.json)"):
        text = Path(folder, "config.json").read_text(encoding="utf-8")
        settings = json.loads(text)["settings"]
        return {name: settings[name] for name in (*FLAGS, "compare")}


def make_run_folder(output_dir, name):
    """Make a new folder, named by the time and `name`; return it."""
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


def write(path, content):
    """Write a file: whole, or not at all."""
    if RANK > 0:  # only the first process writes
        return
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def save_json(values, path):
    write(path, json.dumps(values, indent=2).encode())


def save_tensors(values, path):
    content = io.BytesIO()
    torch.save(values, content)
    write(path, content.getbuffer())


def save_figure(figure, path):
    """Write a Figure as PNG. If that fails, only warn."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names may have letters of no font
        figure.savefig(content, format="png", dpi=100)
    try:
        write(path, content.getbuffer())
    except OSError as error:
        warn(f"cannot write {path}: {error.strerror}")


def load_predictor(path):
    """Return the model in a model.pt or checkpoint.pt, and its path."""
    path = Path(path)
    if not path.is_file():  # a folder: take its newest run
        found = sorted(path.rglob("model.pt"), key=os.path.getmtime)
        if not found:
            raise UserError(f"no trained network in {path}: python main.py trains one")
        path = found[-1]
    with explaining(f"{path} is damaged, or not a model of this script"):
        # weights_only: code in a file from elsewhere does not run.
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        model = MODELS["cnn" if "conv1.weight" in state else "fc"]().eval()
        model.load_state_dict(state)
    known = (path.parent / "config.json").exists()
    accurate = known and read_config(path.parent)["recipe"] == "accurate"
    return (ShiftAverage(model) if accurate else model), path


def read_archive(path, md5):
    """Return the bytes of a file of MNIST; download it if it is missing."""
    missing = not path.exists()
    hint = f"put the file with MD5 sum {md5} there (see data/README.md)"
    with explaining(f"cannot get {path}: {hint}"):
        content = download(path.name) if missing else path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        reason = f"damaged, or not MNIST's file (its MD5 sum is not {md5})"
        raise UserError(f"{path} is {reason}: move it away, or use another --data-dir")
    if missing:
        with suppress(OSError):  # the folder may be read-only
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
# With torchrun, each process trains on its share of every batch, and the gradients are
# averaged: but for rounding, the weights are those of one process.

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # 0: the first process
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine
LOCAL_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1


@contextmanager
def join_processes(settings):
    """Join the processes that torchrun has started."""
    if not LAUNCHED:
        yield
        return
    if settings.batch_size % WORLD_SIZE or (settings.limit or 60_000) % WORLD_SIZE:
        reason = f"not divisible by {WORLD_SIZE} processes"
        raise UserError(f"--batch-size or --limit (or 60,000): {reason}")
    device = select_device(settings.device)
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
# --seeds: how much of a result is chance? --compare: what does the convolution bring?


def train_all(settings, folder):
    """Train once, or once for each seed and model, and compare."""
    models = ("fc", "cnn") if settings.compare else (settings.model,)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    pairs = [(model, seed) for seed in seeds for model in models]
    if len(pairs) == 1:
        train_run(settings, folder)
        return
    config, runs, rows = describe(settings, settings.device), [], []
    save_json(config, folder / "config.json")
    page = config | {"kind": "study", "runs": rows, "planned": len(pairs)}
    try:
        for model, seed in pairs:
            print(f"Run {len(runs) + 1} of {len(pairs)}: {model}, seed {seed}")
            write_page(folder, page | {"contrast": contrast(runs)}, "training")
            one = argparse.Namespace(**vars(settings))
            one.model, one.seed, one.seeds, one.compare = model, seed, 1, False
            run_folder = folder / f"{model}-seed-{seed}"
            if RANK == 0:
                run_folder.mkdir(exist_ok=True)
            runs.append(train_run(one, run_folder))
            if RANK == 0:
                rows.append(describe_results(runs[-1]))
    finally:
        state = "finished" if len(rows) == len(pairs) else "stopped"
        write_page(folder, page | {"contrast": contrast(runs)}, state)
    if RANK == 0:
        print_table(rows)
        save_json({"runs": rows}, folder / "metrics.json")
        print(f"The results of all {len(runs)} runs are in {folder}")


def describe_results(run):
    """Return a run's row in the table and on the page, from its Recorder."""
    return {
        "model": run.settings.model,
        "seed": run.settings.seed,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "seconds": sum(run.history["epoch_seconds"]),
        "train_accuracy": run.history["train_accuracy"][-1],
        "test_accuracy": run.results["test_accuracy"],
        "test_loss": run.results["test_loss"],
        "name": run.folder.name,
        "curve": thin(run.smoothed.get()),
    }


def contrast(runs):
    """Return test digits that only one of the first two runs gets right."""
    if RANK > 0 or len(runs) < 2 or runs[0].settings.model == runs[1].settings.model:
        return None
    parts = []
    for good, bad in ((runs[1], runs[0]), (runs[0], runs[1])):
        chosen = np.flatnonzero(good.right & ~bad.right)[:20]
        title = f"Only {type(good.model).__name__} classifies them correctly"
        digits, name = encode_digits(bad.digits, chosen), type(bad.model).__name__
        parts.append({"title": title, "wrong": name, "digits": digits})
    return parts


def print_table(rows):
    """Print the runs, and mean ± standard deviation for each model."""
    print("model  seed  parameters  seconds  train accuracy  test accuracy  test loss")
    layout = "{:5} {:5} {:11,} {:8.1f} {:15.4f} {:14.4f} {:10.4f}"
    for row in rows:
        print(layout.format(*row.values()))
    for model in sorted({row["model"] for row in rows}):
        for name in ("seconds", "train_accuracy", "test_accuracy", "test_loss"):
            values = [row[name] for row in rows if row["model"] == model]
            if len(values) > 1:
                deviation = np.std(values, ddof=1)
                print(f"{model}, mean {name}: {np.mean(values):.4f} ± {deviation:.4f}")


# ===== Your own digits ================
# --predict: photographs and drawings become images like MNIST's.

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")


def find_images(names):
    """Return the files that names, folders and patterns such as *.png stand for."""
    kinds, files = Image.registered_extensions(), []
    endings = (*(ending for ending in kinds if kinds[ending] in FORMATS), ".heic")
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if os.path.isdir(name):
            inside = sorted(glob.glob(os.path.join(glob.escape(name), "*")))
            found = [file for file in inside if file.lower().endswith(endings)]
        files += found or [name]
    return files


def read_photo(path):
    """Return an image file, upright, as grey levels: float32 (H, W), 0 to 255."""
    with suppress(ImportError):  # for pictures of iPhones
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits or more: what counts is the contrast
            values = np.nan_to_num(np.array(image, np.float32), posinf=0, neginf=0)
            values = (values - values.min()) * (255 / max(np.ptp(values), 1e-9))
            image = Image.fromarray(values)
        else:  # transparency becomes grey, from which black and white stand out
            paper = Image.new("RGBA", image.size, "grey")
            image = Image.alpha_composite(paper, image.convert("RGBA")).convert("L")
        image.thumbnail((1000, 1000))
        return np.array(image, np.float32)
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, try JPEG or PNG (for HEIC: pip install pillow-heif)"
        raise UserError(f"cannot read {path}: {reason}") from None


AROUND = np.ones((3, 3))  # diagonal neighbours are connected, too


def find_ink(grey):
    """Return the ink (H, W): 0 on paper, 1 in a full stroke. None: nothing stands out."""
    factor = math.ceil(max(grey.shape) / 48)
    small = np.array(Image.fromarray(grey).reduce(factor))
    blurred = ndimage.gaussian_filter(small, max(small.shape) / 6, mode="mirror")
    sign = np.sign(((blurred - small) ** 3).sum())  # 1: dark ink on light paper; or -1
    # Raise each grey level to the light ones around, then lower it to the dark ones: the
    # strokes vanish, and the paper is left, with its shadows.
    window = {"size": max(1, max(small.shape) // 2), "mode": "nearest"}
    paper = ndimage.percentile_filter(sign * small, 75, **window)
    paper = ndimage.percentile_filter(paper, 25, **window)
    paper = np.kron(paper, np.ones((factor, factor)))[: len(grey), : grey.shape[1]]
    darkest = ndimage.minimum_filter(paper, 2 * factor + 1)
    lightest = ndimage.maximum_filter(paper, 2 * factor + 1)
    ink = np.clip(sign * grey, darkest, lightest) - sign * grey
    noise = 3 * np.quantile(np.abs(paper - sign * grey), 0.25)  # one standard deviation
    stroke = np.median(ink[ink >= ink.max() / 2])
    if stroke < max(10, 4 * noise, 0.25 * np.ptp(paper)):
        return None
    noise = min(2 * noise, stroke / 4)
    return ((ink - noise) / (stroke - noise)).astype(np.float32)


def find_lines(mask):
    """Return where ruled lines are: straight, thin, from the left to the right border."""
    thick = ndimage.maximum_filter(mask, (5, 1))  # so that they may slope
    length = max(1, mask.shape[1] // 3)
    runs = ndimage.binary_opening(thick, np.ones((1, length)))
    number = ndimage.label(runs, AROUND)[0] * mask
    sizes = np.bincount(number.ravel())
    sizes[number[[0, -1]]] = mask.size  # at the border, it may be a stroke
    through = np.intersect1d(number[:, :3], number[:, -3:])
    return np.isin(number, through[sizes[through] < 0.05 * mask.size])


def remove_lines(ink):
    """Return a mask (H, W) of the ink without ruled lines, but with what crosses them."""
    mask = ink > 0.2
    lines = mask & (find_lines(ink > 0.1) | find_lines(ink.T > 0.1).T)
    if not lines.any():
        return mask
    rest = ndimage.binary_opening(mask & ~lines, np.ones((3, 3)))
    bridged = ndimage.binary_closing(np.pad(rest, 8), np.ones((15, 15)))[8:-8, 8:-8]
    rest |= lines & bridged
    return rest if rest.any() else mask


def measure(number):
    """Return the longer side of each numbered part; first 0, for the paper's number 0."""
    places = ndimage.find_objects(number)
    return np.array([0] + [max(y.stop - y.start, x.stop - x.start) for y, x in places])


def remove_frames(mask):
    """Return the mask without what touches the border or goes round the digit."""
    number = ndimage.label(mask, AROUND)[0]
    extents = measure(number)
    margin = 1 + max(mask.shape) // 100
    edge = number.copy()
    edge[margin:-margin, margin:-margin] = 0
    free = np.setdiff1d(number, edge)
    if extents[free].max(initial=0) > 0.08 * max(mask.shape):
        digit = number == free[extents[free].argmax()]
        near = ndimage.maximum_filter(digit, 1 + 2 * (extents[free].max() // 12))
        number *= np.isin(number, np.append(free, number[near]))  # its own parts stay
    frame = number == max(np.unique(number), key=extents.item)
    inside = ndimage.binary_fill_holes(frame) & ~frame & (number > 0)
    return inside if inside.sum() > 0.15 * frame.sum() else number > 0


def cut_out(ink):
    """Return the ink of the digit, cut to its size; and whether there are several."""
    mask = remove_frames(remove_lines(ink))
    extent = measure(ndimage.label(mask, AROUND)[0]).max()
    near = ndimage.maximum_filter(mask, 1 + 2 * int(0.04 * extent))  # over small gaps
    number = ndimage.label(near, AROUND)[0] * mask
    sizes = np.bincount(number[mask])
    large = sizes > 0.06 * sizes.max()  # the others are specks
    extents = measure(number) * large
    several = (extents > 0.5 * extents.max()).sum() > 1
    mask = large[number]
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    mask = ndimage.maximum_filter(mask, 5)  # with the faint edge of the strokes
    ink = np.pad(ink.clip(0, 1) * mask, 3)
    ink = ink[rows.start : rows.stop + 6, columns.start : columns.stop + 6]
    return ink, several or ink.shape[1] > 2 * ink.shape[0]


def centre_digit(ink):
    """Return the ink fitted into 20x20, its centre of mass at pixel 14, 14 of 28x28."""
    rows, columns = np.nonzero(ink > 0.2)
    scale = (max(np.ptp(rows), np.ptp(columns)) + 1) / 20
    margin = math.ceil(15 * scale)
    ink = np.pad(ink, margin)
    y, x = np.array(ndimage.center_of_mass(ink)) + 0.5 - 14.5 * scale
    window = x, y, x + 28 * scale, y + 28 * scale
    image = Image.fromarray(ink).resize((28, 28), Image.Resampling.HAMMING, window)
    digit = np.array(image).clip(0)
    return (255 * digit / digit.max()).round().astype(np.uint8)


def prepare_photo(grey):
    """Return a picture as MNIST's makers would, uint8 (28, 28); and None, or why not."""
    grey = Image.fromarray(np.asarray(grey, np.float32))
    ink = find_ink(np.array(grey.reduce(math.ceil(max(grey.size) / 280))))
    if ink is None:
        message = "nothing stands out: use more contrast, or come closer"
        return np.zeros((28, 28), np.uint8), message
    ink, several = cut_out(ink)
    message = "several digits, or none: crop the picture to one digit"
    return centre_digit(ink), message if several else None


@torch.no_grad()
def predict_files(settings):
    """Classify the image files of --predict; return the exit status."""
    path = settings.checkpoint or settings.resume or settings.output_dir
    model, path = load_predictor(path)
    print(f"Model: {path}")
    status, images, rows, titles, colours = 0, [], [], [], []
    for name in find_images(settings.predict):
        try:
            image, problem = prepare_photo(read_photo(name))
        except UserError as error:
            warn(str(error))
            status = error.status
            continue
        row = model(normalise(torch.tensor(image[None]))).softmax(dim=1)[0]
        best, second = row.argsort(descending=True)[:2].tolist()
        answer = f"{best} ({row[best]:.1%}), then {second} ({row[second]:.1%})"
        if row[best] < 0.5 and not problem:
            problem = f"it does not look like a digit; most like {answer}"
        if problem:
            answer = f"no answer: {problem}"
        print(f"{name}: {answer}")
        images.append(image)
        rows.append(row.numpy())
        titles.append(f"{name[-60:]}\n{answer}")
        colours.append(GREY if problem else BLUE)
    if images:
        figure = draw_digits(images[:100], rows, titles, colours, bars=True)
        picture = make_run_folder(settings.output_dir, "predict") / "predictions.png"
        save_figure(figure, picture)
        print(f"What the network sees is in {picture}")
    return status


# ===== The report page ================
# data/report.html, filled in: a page that reloads while the run trains.

TEMPLATE = Path(__file__).resolve().parent / "data" / "report.html"


def encode(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def encode_digits(digits, chosen):
    images, rows, labels = (part[chosen] for part in digits)
    rows = np.float64(rows).round(4).tolist()
    return {"images": encode(images), "probabilities": rows, "labels": labels.tolist()}


def take_snapshot(run):
    """Return the network of a Recorder as it is now, for the page."""
    weights = run.model.state_dict()
    weights = {name: weights[name].cpu() for name in weights}
    old = [one for one in run.snapshots if one["epoch"] < run.epochs_done]
    run.snapshots = old[:]  # a resumed run has the one of this epoch
    if run.epochs_done in {round(n * run.settings.epochs / 8) for n in range(9)}:
        kept = {name: encode(weights[name].half()) for name in weights}
        run.snapshots.append({"epoch": run.epochs_done, "weights": kept})
    images, labels = load_mnist(run.settings.data_dir)[:2]
    batch = normalise(images[:10]).to(run.device), labels[:10].to(run.device)
    accurate = run.settings.recipe == "accurate"
    logits = evaluate(ShiftAverage(run.model) if accurate else run.model, [batch])[2]
    shifts = (-1, 0, 1) if accurate else (0,)
    return {
        "mean_std": [MEAN, STD],
        "views": [(y, x) for y in shifts for x in shifts],
        "weights": {name: encode(weights[name]) for name in weights},
        "weights_epoch": run.epochs_done,
        "check": {"images": encode(images[:10]), "logits": logits.tolist()},
        "snapshots": old,
    }


def thin(curve):
    """Return at most 1,000 points [x, y] of a curve, with the last one."""
    every = len(curve) // 1000 + 1
    return [[n, curve[n - 1]] for n in range(len(curve), 0, -every)][::-1]


def write_page(folder, values, state):
    values |= {"name": folder.name, "state": state, "written": time.time()}
    data = json.dumps(values).replace("<", "\\u003c")  # ends no tag
    try:
        page = TEMPLATE.read_text(encoding="utf-8").replace(">null<", f">{data}<", 1)
        write(folder / "report.html", page.encode())
    except OSError as error:
        warn(f"no report: {error}")


# ===== The command line ===============

FLAGS = {  # name: (default, choices or lowest and highest, help)
    "recipe": (RECIPE, ("classic", "accurate"), "the settings below, as a whole"),
    "model": (MODEL, ("cnn", "fc"), "CNN or FullyConnectedModel"),
    "epochs": (EPOCHS, (1, 10_000), "passes over the training images"),
    "batch_size": (BATCH_SIZE, (1, 60_000), "images per step"),
    "lr": (LR, (1e-9, 1e9), "learning rate"),
    "optimizer": (OPTIMIZER, ("sgd", "adam"), "what updates the weights"),
    "seed": (SEED, (0, 2**32 - 1), "for the initial weights and the shuffling"),
    "seeds": (SEEDS, (1, 1000), "number of runs: with SEED, SEED + 1, ..."),
    "limit": (LIMIT, (0, 60_000), "train on the first N images only; 0: all 60,000"),
    "device": (DEVICE, None, "auto, cpu, mps, cuda, cuda:1, ..."),
    "data_dir": (DATA_DIR, None, "folder with MNIST/raw/*.gz"),
    "output_dir": (OUTPUT_DIR, None, "folder in which each run makes a new one"),
    "comet": (COMET, ("auto", "online", "offline", "off"), "auto: online with a key"),
}
RESUMABLE = {"epochs", "device", "data_dir", "output_dir", "comet"}  # may change


def as_flags(settings):
    """Return settings, a dict, as command-line arguments."""
    flags = [f"--{name.replace('_', '-')}={settings[name]}" for name in FLAGS]
    return [*flags, "--compare"] if settings["compare"] else flags


def read_settings(argv=None):
    """Return the settings, a Namespace; argparse exits if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py [flags]   (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ranges = {}
    for name, details in FLAGS.items():
        value, allowed, text = details
        flag, text = f"--{name.replace('_', '-')}", text + " (default: %(default)s)"
        kind = type(allowed[0]) if allowed else str
        if kind is not str:
            ranges[name], allowed = allowed, None
        parser.add_argument(flag, default=value, type=kind, choices=allowed, help=text)
    add = parser.add_argument
    add("--compare", action="store_true", help="train both models")
    add("--resume", type=Path, help="continue a run: its folder")
    add("--predict", nargs="+", metavar="IMAGE", help="classify images, folders, *.png")
    add("--checkpoint", metavar="FILE", help="the model.pt (default: the newest)")

    # The constants, then what the recipe or the run to resume sets, then what is
    # typed: all go through the parser, and the last one wins.
    typed = sys.argv[1:] if argv is None else list(argv)
    constants = {name: flag[0] for name, flag in FLAGS.items()} | {"compare": False}
    settings = parser.parse_args(as_flags(constants) + typed)
    folder = settings.resume
    if folder and folder.is_file():
        folder = folder.parent  # runs/NAME/checkpoint.pt
    if settings.checkpoint and not settings.predict:
        parser.error("--checkpoint goes with --predict")
    if folder and not settings.predict:
        saved = read_config(folder)
        settings = parser.parse_args(as_flags(saved) + typed)
        fixed = saved.keys() - RESUMABLE
        if settings.recipe == "accurate":  # its schedule depends on the epochs
            fixed.add("epochs")
        for name, value in saved.items():
            if name in fixed and getattr(settings, name) != value:
                parser.error(f"the run to resume has {name} {value}")
    elif settings.recipe == "accurate":
        settings = parser.parse_args(as_flags(constants | ACCURATE) + typed)
    for name, (low, high) in ranges.items():
        if not low <= getattr(settings, name) <= high:  # nan is not, either
            parser.error(f"{name} must be from {low} to {high}")
    settings.resume = folder
    return settings


@contextmanager
def catch_signals():
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a KeyboardInterrupt."""
    before = {}

    def stop(number, frame):
        for other, handler in before.items():  # torchrun sends each signal twice
            signal.signal(other, signal.SIG_IGN if LAUNCHED else handler)
        raise KeyboardInterrupt(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            with suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    """Do what the command line says; return the exit status."""
    warn.cache_clear()
    # They may be closed, or not there: pythonw on Windows.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    folder, status, resumable = None, 1, True
    try:
        settings = read_settings(argv)
        if settings.predict:
            return predict_files(settings) if RANK == 0 else 0
        if platform.libc_ver()[0] == "glibc":  # let it keep the memory that steps free
            for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 2**25)  # bytes: 1.25 times as fast
        with suppress(OSError, ValueError):  # a container's share of the processor
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            cores = max(1, int(quota) // int(period))  # more threads are slower
            torch.set_num_threads(min(cores, torch.get_num_threads()))
        with catch_signals(), join_processes(settings):
            load_mnist(settings.data_dir)  # an error there leaves no folder
            name = "compare" if settings.compare else settings.model
            folder = settings.resume or make_run_folder(settings.output_dir, name)
            train_all(settings, folder)
        return 0
    except SystemExit as end:  # argparse has printed its help, or what is wrong
        return end.code
    except UserError as error:
        status, text, resumable = error.status, str(error), False
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        status, text = 128 + number, f"interrupted by {signal.Signals(number).name}"
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        text = f"{error.filename or 'output'}: {error.strerror or error}"
    except (MemoryError, torch.OutOfMemoryError):
        text = "out of memory: try a smaller --batch-size, or --device cpu"
    except RuntimeError as error:
        if not LAUNCHED:
            raise  # a bug
        text = f"another process has ended: {str(error).splitlines()[0]}"
    warn(text)
    if folder and RANK == 0:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        if resumable and folder.exists():
            command = shlex.join(["python", "main.py", "--resume", folder.as_posix()])
            warn(f"continue with: {command}")
    return status


if __name__ == "__main__":
    sys.exit(main())
