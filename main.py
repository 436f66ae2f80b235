"""Train, track and understand your first convolutional network, on MNIST.

python main.py                          train the CNN for 7 epochs
python main.py --limit 2000 --epochs 1  a quick look
python main.py --compare                train the fully connected baseline, too
python main.py --recipe accurate        the best that this network can do
python main.py --seeds 5                train five times: how much is chance?
python main.py --resume runs/NAME       continue a run that was stopped
python main.py --predict photo.jpg      classify your own handwriting
torchrun --nproc-per-node=2 main.py     train with two processes, or two GPUs

Test accuracy 98.0 ± 0.5 %, accurate 99.64 ± 0.03 %: mean ± standard deviation of 10
seeds (README.md).
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
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchsummary import summary
from torchvision.datasets import MNIST
from tqdm import tqdm

# ===== Settings =======================
# Edit them here; most have a flag: EPOCHS is --epochs.

# The experiment
RECIPE = "classic"  # "classic": as below; "accurate": see ACCURATE
MODEL = "cnn"  # "cnn" (CNN), "fc" (FullyConnectedModel) or "both"
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


MODELS = {"cnn": CNN, "fc": FullyConnectedModel}

# ===== Data ===========================

MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]


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

    `batches` yields images (N, 1, H, W) and labels (N,). Both results are measured
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


@torch.no_grad()
def choose_size(model):
    """Return 26 if the last two rows and columns do not matter, else 28."""
    images = torch.randn(2, 1, 28, 28)
    with explaining("the model must return 10 logits per image"):
        model(images).view(2, 10)
    # The CNN makes 5x5 of both: 28 > 26 > 13 > 11 > 5 and 26 > 24 > 12 > 10 > 5.
    model, images = model.double(), images.double()  # to see small differences
    with suppress(RuntimeError):  # other layers may fit 28x28 only
        if torch.allclose(model(images[..., :26, :26]), model(images), rtol=1e-9):
            return 26
    return 28


def train_run(args, folder):
    """Train, test and keep a model (called by main); return its Recorder."""
    accurate, name = args.recipe == "accurate", args.model.upper()

    # --- 1. Data ---
    device = select_device(args.device)
    images, labels, test_images, test_labels = load_mnist(args.data_dir)
    images = images[: args.limit or None].to(device)  # 0: all
    labels = labels[: args.limit or None].to(device)
    steps = math.ceil(len(labels) / args.batch_size)  # per epoch

    # --- 2. Model, loss, optimizer ---
    size = choose_size(MODELS[args.model]())  # 26x26 is faster
    torch.manual_seed(args.seed)
    model = MODELS[args.model]().to(device)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # faster convolutions
    # Softmax is inside this loss: the model returns logits.
    loss_function = nn.CrossEntropyLoss(label_smoothing=SMOOTHING if accurate else 0)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
    else:
        more = SGD if accurate else {}
        optimizer = torch.optim.SGD(model.parameters(), args.lr, **more)
    # Loads a checkpoint, if any, into model and optimizer.
    recorder = Recorder(args, folder, device, steps, model, optimizer)
    done = recorder.epochs_done  # 0, unless resumed
    # Learning rate: lr * factor(step). (last_epoch counts steps.)
    cycle = functools.partial(one_cycle, args.epochs * steps)
    factor = cycle if accurate else lambda step: 1.0
    scheduler = LambdaLR(optimizer, factor, last_epoch=done * steps - 1)
    # With torchrun: averaged gradients.
    ddp_model = DistributedDataParallel(model) if LAUNCHED else model

    with recorder:  # shows, tracks and saves what follows, however it ends
        # --- 3. Train ---
        print(RULE, f"TRAINING {name} MODEL", RULE, sep="\n")
        print(model)
        summary(MODELS[args.model](), (1, 28, 28), device="cpu")
        for epoch in range(done + 1, args.epochs + 1):
            recorder.start_epoch()
            # No two epochs share a seed; a resumed run continues exactly.
            torch.manual_seed(10_001 * args.seed + epoch)
            share = slice(RANK, None, WORLD_SIZE)  # without torchrun: all
            order = torch.randperm(len(labels))[share].to(device)
            batch_size = args.batch_size // WORLD_SIZE
            batches = make_batches(images, labels, batch_size, order)
            if accurate:
                batches = augment(batches, draw_distortions(len(labels))[share])
            # Cropped: same logits, faster. The test crops nothing.
            batches = ((x[..., :size, :size], y) for x, y in batches)
            loss, accuracy = train_epoch(
                ddp_model, batches, loss_function, optimizer, scheduler, recorder.step
            )
            loss, accuracy = average(loss, accuracy, device)  # torchrun
            recorder.end_epoch(loss, accuracy)
            print(f"Epoch {epoch}/{args.epochs}, Accuracy: {accuracy:.4f}")
        if RANK > 0:  # with torchrun, only rank 0 tests
            return recorder

        # --- 4. Test ---
        print(RULE, f"EVALUATING {name} MODEL", RULE, sep="\n")
        test_images, test_labels = test_images.to(device), test_labels.to(device)
        batches = make_batches(test_images, test_labels, batch_size=100)
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
# Schedule, distortions, nine views in the test; chosen as in tests/README.md

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-4}
SMOOTHING = 0.05  # of the labels: Szegedy et al. 2016, arXiv:1512.00567
ANGLE, SCALE, SHIFT = 5, 0.1, 2  # at most: degrees, share of the size, pixels


def one_cycle(total, step):
    """Return the factor of the learning rate: Smith 2018, arXiv:1803.09820."""
    progress = (step + 0.5) / total
    return max(0.0, min(progress / 0.3, (1 - progress) / 0.7))  # up, then down


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
        images = F.grid_sample(images, grid, "bilinear", "border", False)
        choice = torch.rand(1).item()
        if choice < 1 / 3:
            images = (images + F.max_pool2d(images, 3, stride=1, padding=1)) / 2
        elif choice < 2 / 3:
            images = (images - F.max_pool2d(-images, 3, stride=1, padding=1)) / 2
        yield images, labels


class ShiftAverage(nn.Module):
    """The mean logits for an image and its eight shifts by one pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
        x = F.pad(x, [1, 1, 1, 1], value=-MEAN / STD)  # black: (N, 1, 30, 30)
        views = [x[..., i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
        return torch.stack([self.model(view) for view in views]).mean(dim=0)


# ===== The recorder ===================
# What shows, tracks and keeps the run. LossHistory and PeriodicPlotter have the
# interface of mitdeeplearning.util 0.7.5.

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"  # colour-blind safe


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


class PeriodicPlotter:
    """Draws a growing curve into a PNG file every `sec` seconds."""

    def __init__(self, sec, xlabel="", ylabel="", scale=None, path="loss.png"):
        if scale not in (None, "semilogx", "semilogy", "loglog"):
            raise ValueError(f"unrecognized parameter scale {scale!r}")
        self.sec, self.path, self.drawn = sec, path, time.monotonic()
        self.figure = Figure(figsize=(7, 4))
        self.axes = self.figure.subplots()
        self.figure.subplots_adjust(0.14, 0.13, 0.98, 0.97)  # faster than a layout
        (self.curve,) = getattr(self.axes, scale or "plot")([], [], color=BLUE)
        self.axes.set(xlabel=xlabel, ylabel=ylabel)
        self.axes.grid(which="both", alpha=0.3)

    def plot(self, data):
        if time.monotonic() - self.drawn >= self.sec:
            self.draw(data)

    def draw(self, data):
        self.curve.set_data(range(1, len(data) + 1), data)
        self.axes.relim()
        self.axes.autoscale_view()
        save_figure(self.figure, self.path)
        self.drawn = time.monotonic()


class Recorder:
    """Shows, tracks and saves a run, however it ends."""

    def __init__(self, args, folder, device, steps, model, optimizer):
        """`steps`: per epoch. If the folder has a checkpoint, continue from it."""
        self.args, self.folder, self.steps = args, folder, steps
        self.device, self.model, self.optimizer = device, model, optimizer
        self.waiting, self.bars, self.results = [], [tqdm(disable=True)], {}
        history = {"train_loss": [], "train_accuracy": [], "epoch_seconds": []}
        self.kept = {
            "history": history,
            "losses": [],
            "snapshots": [],
            "comet_key": None,
        }
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            with explaining(f"{self.checkpoint} does not fit"):
                saved = torch.load(self.checkpoint, "cpu", weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                self.kept = saved["kept"]
        self.history, self.losses = self.kept["history"], self.kept["losses"]
        self.epochs_done = len(self.history["train_loss"])
        if self.epochs_done > args.epochs:
            raise UserError("--epochs: the run has done more")
        self.smoothed = LossHistory(smoothing_factor=0.95)
        for loss in self.losses:
            self.smoothed.append(loss)
        png = folder / "loss_curve.png"
        self.plotter = PeriodicPlotter(2, "iteration", "smoothed loss", "semilogy", png)
        self.shown = self.page_written = 0

    def __enter__(self):
        self.config = describe(self.args, self.device)
        kept = self.config["settings"]
        self.comet, where = start_comet(
            kept["comet"], self.folder, self.kept["comet_key"]
        )
        save_json(self.config, self.folder / "config.json")
        print("Settings:", ", ".join(f"{name} {kept[name]}" for name in kept))
        print(f"Device: {self.device}\nFolder: {self.folder}")
        print(f"Report: {self.folder / 'report.html'}\nComet: {where}")
        self.kept["comet_key"] = self.comet.get_key() or self.kept["comet_key"]
        self.comet.set_name(self.folder.name)
        self.comet.log_parameters(kept)
        self.comet.set_model_graph(str(self.model))
        if self.comet.url is None:  # the archive gets all of a resumed run
            for step, loss in enumerate(self.losses, 1):
                self.comet.log_metric("loss", loss, step=step)
            for epoch in range(1, self.epochs_done + 1):
                self.log_epoch(epoch)
        self.page = take_snapshot(self)
        self.write_page("training")

    def start_epoch(self):
        # All are kept: Python ignores a Ctrl-C while one is deleted.
        self.bars.append(tqdm(total=self.steps, disable=RANK > 0))
        self.epoch_start = time.perf_counter()

    def step(self, loss):
        """Take a step's loss, a tensor: read and shown every 0.2 s."""
        self.waiting.append(loss)
        if time.monotonic() - self.shown >= 0.2:
            self.show()

    def show(self):
        losses = [loss.item() for loss in self.waiting]
        self.waiting.clear()
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
        self.shown = time.monotonic()
        if self.shown - self.page_written >= 5:
            self.write_page("training")

    def end_epoch(self, loss, accuracy):
        self.show()
        self.bars[-1].close()
        for weights in self.model.parameters():
            check_finite(weights.detach().sum().item(), "weights")
        self.history["train_loss"].append(loss)
        self.history["train_accuracy"].append(accuracy)
        self.history["epoch_seconds"].append(time.perf_counter() - self.epoch_start)
        self.epochs_done += 1
        self.page = take_snapshot(self)
        checkpoint = {"kept": self.kept, "settings": self.config["settings"]}
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
        values = {"kind": "run", "history": self.history, "results": self.results}
        values |= {"steps_per_epoch": self.steps, "steps_done": len(self.losses)}
        values |= {"message": message, "curve": np.round(smoothed, 4).tolist()}
        write_page(self.folder, self.config | self.page | values, state)
        self.page_written = time.monotonic()

    def keep(self, loss, accuracy, logits, images, labels):
        """Keep weights and test results, as numbers and pictures."""
        check_finite(loss, "test loss")
        folder = self.folder
        save_tensors(self.weights, folder / "model.pt")
        digits = images, logits.softmax(dim=1), labels
        digits = images, probabilities, labels = [part.cpu().numpy() for part in digits]
        answers, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        # Expected calibration error, 15 bins: Guo et al. 2017, arXiv:1706.04599.
        bins = (15 * confidence).astype(int).clip(max=14)
        gaps = np.bincount(bins, confidence - (answers == labels))
        self.results = {"test_loss": loss, "test_accuracy": accuracy}
        self.results["calibration_error"] = abs(gaps).sum() / len(labels)
        self.comet.log_metrics(self.results, step=len(self.losses))
        matrix = np.bincount(10 * labels + answers, minlength=100).reshape(10, 10)
        self.results["confusion_matrix"] = matrix.tolist()
        self.comet.log_confusion_matrix(matrix=matrix.tolist())
        wrong = np.flatnonzero(answers != labels)
        wrong = wrong[np.argsort(-confidence[wrong])]  # the most confident first
        self.page["first"] = encode_digits(digits, range(20))
        self.page["wrong"] = encode_digits(digits, wrong[:200])
        self.page["wrong"]["numbers"] = wrong.tolist()  # of all
        save_figure(draw_results(digits, [0]), folder / "sample_prediction.png")
        save_figure(draw_results(digits, [0], True), folder / "single_prediction.png")
        save_figure(draw_results(digits, range(20)), folder / "predictions_grid.png")
        save_figure(draw_results(digits, wrong[:20]), folder / "worst_mistakes.png")
        save_figure(draw_confusion(matrix), folder / "confusion_matrix.png")

    def __exit__(self, kind, error, traceback):
        """Complete everything, also of a run that did not finish."""
        state = {None: "finished", KeyboardInterrupt: "stopped"}.get(kind, "failed")
        if state == "stopped":
            warn(f"stopped after {self.epochs_done} of {self.args.epochs} epochs")
        self.bars[-1].close()
        try:
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
        raise UserError(f"training diverged: {name} {value}; reduce --lr", 1)


def draw_digits(images, probabilities, titles, colours, bars):
    """Return a Figure of images, and of their probabilities."""
    columns = min(2 if bars else 4, len(images))
    rows = math.ceil(len(images) / columns)
    width, parts = (6, 3) if bars else (2.1, 1)
    figure = Figure(figsize=(width * columns, 2.5 * rows))
    figure.subplots_adjust(0.02, 0.2 / rows, 0.98, 1 - 0.2 / rows, 0.5 * bars, 0.5)
    for n, image in enumerate(images):
        axes = figure.add_subplot(rows, parts * columns, parts * n + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[], anchor="N")
        colour = colours[n]
        axes.spines[:].set(color=colour, linewidth=4 if colour == VERMILION else 1)
        axes.set_title(titles[n], color=colour, size=9, loc="left", parse_math=False)
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
    """Return a Figure of digits, predictions and true labels."""
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
    figure = Figure(figsize=(6.7, 6))
    axes = figure.add_axes((0.17, 0.09, 0.81, 0.9))
    axes.imshow(mistakes, cmap="Oranges", vmax=max(1, 2 * mistakes.max()))
    for (row, column), count in np.ndenumerate(matrix):
        colour = BLUE if row == column else "black"
        axes.text(column, row, count or "·", ha="center", va="center", color=colour)
    share = 100 * right / matrix.sum(axis=1)
    axes.set_yticks(range(10), [f"{share[n]:.1f} %   {n}" for n in range(10)])
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
NO_KEY = "YOUR_API_KEY_HERE"


class NoExperiment:
    """An experiment that ignores all calls: tracking is off."""

    url = None

    def __getattr__(self, name):
        return lambda *arguments, **named: None


def start_comet(mode, folder, key):
    """Return an experiment, with this key if any, and where it goes."""
    if mode == "off" or RANK > 0:
        return NoExperiment(), "off"
    for name, value in COMET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import comet_ml
    except ImportError:
        if mode != "auto":
            raise UserError(f"--comet {mode} needs: pip install comet-ml") from None
        return NoExperiment(), "off (it needs: pip install comet-ml)"
    public = COMET_API_KEY == NO_KEY  # else the code shows the key
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
        raise UserError("--comet online needs an API key: set COMET_API_KEY")
    where = "offline"
    if mode != "offline" and api_key != NO_KEY:
        where = "offline (Comet does not answer, or rejects the API key)"
        with suppress(Exception):  # its text may have the key in it
            experiment = comet_ml.start(online=True, api_key=api_key, **options)
            if experiment.alive:
                return experiment, experiment.url
        if mode == "online":
            raise UserError(f"--comet online fails: {where}", 1)
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
    again = f"if it is incomplete: comet upload --force-reupload {archive}"
    return f"{experiment.url}; {place}; {again}"


# ===== Files ==========================


class UserError(Exception):
    """What is wrong and what to do. Status 2: wrong input; 1: it failed."""

    def __init__(self, text, status=2):
        super().__init__(" ".join(text.split()))
        self.status = status


@contextmanager
def explaining(what, status=2):
    """Turn any error into a UserError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{what}: {error!r:.300}", status) from None


@functools.cache  # each text once
def warn(text):
    with suppress(OSError):
        print(f"main.py: {text}", file=sys.stderr)


def describe(args, device):
    kept = {name: getattr(args, name) for name in FLAGS}
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
    """Return the settings of a run's folder."""
    with explaining(f"{folder} is not a run folder (config.json)"):
        kept = json.loads(Path(folder, "config.json").read_bytes())["settings"]
        return {name: kept[name] for name in FLAGS}


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
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        if needed:
            raise
        warn(f"cannot write {path}: {error.strerror}")
    finally:
        part.unlink(missing_ok=True)


def save_json(values, path):
    write(path, json.dumps(values, indent=2).encode())


def save_tensors(values, path):
    content = io.BytesIO()
    torch.save(values, content)
    write(path, content.getbuffer())


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write(path, content.getbuffer(), needed=False)


def load_predictor(path):
    """Return the model of a file, or of a folder's newest run."""
    path = Path(path)
    if not path.is_file():  # a folder: take its newest run
        found = sorted(path.rglob("model.pt"), key=os.path.getmtime)
        if not found:
            raise UserError(f"no model.pt in {path}: python main.py makes one")
        path = found[-1]
    with explaining(f"{path} is damaged, or not a model of this script"):
        state = torch.load(path, "cpu", weights_only=True)  # runs no code in it
        state = state.get("model", state)
        model = MODELS["cnn" if "conv1.weight" in state else "fc"]().eval()
        model.load_state_dict(state)
    known = (path.parent / "config.json").exists()
    if known and read_config(path.parent)["recipe"] == "accurate":
        model = ShiftAverage(model)
    return model, path


def read_archive(path, md5):
    """Return the bytes of a file of MNIST, downloaded if missing."""
    missing = not path.exists()
    with explaining(f"put {path} there (MD5 sum {md5}, see data/README.md)"):
        content = download(path.name) if missing else path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        reason = f"damaged, or not MNIST's (MD5 sum is not {md5})"
        raise UserError(f"{path} is {reason}: move it away, or change --data-dir")
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
# --seeds: how much is chance? --compare: what does convolution bring?


def train_all(args, folder):
    """Train once, or once for each seed and model, and compare."""
    models = ("fc", "cnn") if args.model == "both" else (args.model,)
    seeds = range(args.seed, args.seed + args.seeds)
    pairs = [(model, seed) for seed in seeds for model in models]
    if len(pairs) == 1:
        train_run(args, folder)
        return
    config, rows, wrong = describe(args, args.device), [], []
    save_json(config, folder / "config.json")
    study = {"kind": "study", "planned": len(pairs), "runs": rows, "wrong": wrong}
    try:
        for model, seed in pairs:
            print(f"Run {len(rows) + 1} of {len(pairs)}: {model}, seed {seed}")
            write_page(folder, config | study, "training")
            one = vars(args) | {"model": model, "seed": seed, "seeds": 1}
            run_folder = folder / f"{model}-seed-{seed}"
            if RANK == 0:
                run_folder.mkdir(exist_ok=True)
            run = train_run(argparse.Namespace(**one), run_folder)
            if RANK == 0:
                rows.append(describe_results(run))
                wrong += [run.page["wrong"]] if len(wrong) < 2 else []
    finally:
        state = "finished" if len(rows) == len(pairs) else "stopped"
        write_page(folder, config | study, state)
    if RANK == 0:
        print_table(rows)
        save_json({"runs": rows}, folder / "metrics.json")
        print(f"Results of all runs: {folder}")


def describe_results(run):
    """Return a run's row of the table, from its Recorder."""
    return {
        "model": run.args.model,
        "seed": run.args.seed,
        "parameters": sum(part.numel() for part in run.model.parameters()),
        "seconds": sum(run.history["epoch_seconds"]),
        "train_accuracy": run.history["train_accuracy"][-1],
        "test_accuracy": run.results["test_accuracy"],
        "test_loss": run.results["test_loss"],
        "name": run.folder.name,
        "curve": np.round(run.smoothed.get(), 4).tolist(),
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


# ===== Your own digits ================
# --predict: photographs and drawings become images like MNIST's.


def find_images(names):
    """Return the files of names, folders and patterns such as *.png."""
    files, kinds = [], Image.registered_extensions()
    endings = (".heic", *(end for end in kinds if kinds[end] in Image.OPEN))
    for name in names:
        if os.path.isdir(name):
            name = os.path.join(glob.escape(name), "*")
        found = sorted(glob.glob(name))
        files += [file for file in found if file.lower().endswith(endings)] or [name]
    return files


def read_photo(path):
    """Return a picture as grey levels: float32 (H, W), 0 to 255."""
    with suppress(ImportError):  # for pictures of iPhones
        from pillow_heif import register_heif_opener

        register_heif_opener()
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(np.uint8(np.array(image) >> 8))
        paper = Image.new("RGBA", image.size, "grey")  # behind transparency
        image = Image.alpha_composite(paper, image.convert("RGBA")).convert("L")
        return np.array(image, np.float32)
    except UnidentifiedImageError:
        reason = "not an image (try JPEG; for HEIC: pip install pillow-heif)"
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}")


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
    picture = picture.reduce(math.ceil(max(picture.size) / 280))
    ink = find_ink(np.array(picture))
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
        save_figure(draw_digits(*zip(*shown[:100]), bars=True), picture)
        print(f"Picture: {picture}")
    return status


# ===== The report page ================
# data/report.html, filled in: a page that reloads while the run trains.


def encode(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def encode_digits(digits, chosen):
    images, rows, labels = (part[chosen] for part in digits)
    rows = np.float64(rows).round(4).tolist()
    return {"images": encode(images), "probabilities": rows, "labels": labels.tolist()}


def take_snapshot(run):
    """Keep a Recorder's weights; return what the page gets of them."""
    weights, epoch = run.model.state_dict(), run.epochs_done
    run.weights = {name: weights[name].cpu().contiguous() for name in weights}
    every = math.ceil(run.args.epochs / 8)  # or the page grows too large
    earlier = range(0, epoch, every)
    snapshots = [one for one in run.kept["snapshots"] if one["epoch"] in earlier]
    accurate = run.args.recipe == "accurate"
    predictor = ShiftAverage(run.model) if accurate else run.model
    images, labels = (part[:10] for part in load_mnist(run.args.data_dir)[:2])
    batch = normalise(images).to(run.device), labels.to(run.device)
    logits = evaluate(predictor, [batch])[2].tolist()
    page = {
        "mean_std": [MEAN, STD],
        "weights": {name: encode(run.weights[name]) for name in weights},
        "weights_epoch": epoch,
        "snapshots": snapshots,
        "check": {"images": encode(images), "logits": logits},
    }
    half = {name: encode(run.weights[name].half()) for name in weights}
    now = [{"epoch": epoch, "weights": half}] if epoch % every == 0 else []
    run.kept["snapshots"] = snapshots + now
    return page


def write_page(folder, values, state):
    values |= {"name": folder.name, "state": state, "written": time.time()}
    data = json.dumps(values).replace("<", "\\u003c")  # ends no tag
    template = Path(__file__).resolve().parent / "data" / "report.html"
    page = template.read_text(encoding="utf-8").replace(">null<", f">{data}<", 1)
    write(folder / "report.html", page.encode(), needed=False)


# ===== The command line ===============

FLAGS = {  # name: (default, choices or lowest and highest, help)
    "recipe": (RECIPE, ("classic", "accurate"), "the settings below, as a whole"),
    "model": (MODEL, ("cnn", "fc", "both"), "CNN or FullyConnectedModel"),
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


def as_flags(values):
    return [f"--{name.replace('_', '-')}={values[name]}" for name in FLAGS]


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
    # The constants, or those of the recipe or run to resume; then what is typed wins.
    typed = sys.argv[1:] if argv is None else list(argv)
    base = {name: details[0] for name, details in FLAGS.items()}
    args = parser.parse_args(as_flags(base) + typed)
    folder = args.resume
    if folder and folder.is_file():
        folder = folder.parent  # runs/NAME/checkpoint.pt
    fixed = set()
    if folder and not args.predict:
        base = read_config(folder)
        fixed = FLAGS.keys() - {"epochs", "device", "data_dir", "output_dir", "comet"}
    elif args.recipe == "accurate":
        base |= ACCURATE
    args = parser.parse_args(as_flags(base) + typed)
    if fixed and args.recipe == "accurate":
        fixed.add("epochs")  # its learning rate depends on them
    args.resume = folder
    if args.checkpoint and not args.predict:
        parser.error("--checkpoint goes with --predict")
    for name in FLAGS:
        value, allowed = getattr(args, name), FLAGS[name][1]
        if name in fixed and value != base[name]:
            parser.error(f"the run has {name} {base[name]}")
        if type(value) is not str and not allowed[0] <= value <= allowed[1]:  # or nan
            parser.error(f"{name} must be from {allowed[0]} to {allowed[1]}")
    return args


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
    """Do what the command line says; return the exit status."""
    warn.cache_clear()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    folder, status, resumable = None, 1, True
    try:
        args = read_settings(argv)
        if args.predict:
            return predict_files(args) if RANK == 0 else 0
        if platform.libc_ver()[0] == "glibc":  # keep the memory that steps free
            for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 2**25)  # 1.25 times as fast
        with suppress(OSError, ValueError):  # a container's share
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            cores = max(1, int(quota) // int(period))  # more are far slower
            torch.set_num_threads(min(cores, torch.get_num_threads()))
        with catch_signals(), join_processes(args) if LAUNCHED else nullcontext():
            load_mnist(args.data_dir)  # an error leaves no folder
            folder = args.resume or make_run_folder(args.output_dir, args.model)
            train_all(args, folder)
        return 0
    except SystemExit as end:  # argparse has printed why
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
        text = "out of memory: reduce --batch-size, or use --device cpu"
    except RuntimeError as error:
        if WORLD_SIZE < 2:
            raise  # a bug
        text = f"a bug, or another process ended: {str(error).splitlines()[0]}"
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
