"""How fast main.py is beside the usual loop. No test: run it by hand, on an idle machine.

python tests/benchmark.py                       all of it: 10 to 15 minutes on 2 cores
python tests/benchmark.py --rounds 5 --json F   more rounds; the numbers in the file F

Every measurement is a process of its own, one at a time; the two sides take turns.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Multiplications and additions of one image, forward and backward, on 28x28 pixels.
FLOP_PER_IMAGE = 6.93e6


def train_usually(epochs, seed=0):
    """Train and evaluate the way that tutorials do; return seconds an epoch, accuracy."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 24, 3)
            self.pool1 = nn.MaxPool2d(2, 2)
            self.conv2 = nn.Conv2d(24, 36, 3)
            self.pool2 = nn.MaxPool2d(2, 2)
            self.fc1 = nn.Linear(900, 128)
            self.fc2 = nn.Linear(128, 10)

        def forward(self, x):
            x = self.pool1(torch.relu(self.conv1(x)))
            x = self.pool2(torch.relu(self.conv2(x)))
            x = torch.relu(self.fc1(torch.flatten(x, 1)))
            return self.fc2(x)

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
            (raw / archive.name).symlink_to(archive)
        train = datasets.MNIST(folder, train=True, download=True, transform=transform)
        test = datasets.MNIST(folder, train=False, transform=transform)
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        total = 0.0
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds.append(time.perf_counter() - start)
    correct = 0
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(test, batch_size=1000):
            correct += (model(images).argmax(1) == labels).sum().item()
    return {"seconds": seconds, "accuracy": correct / len(test)}


def import_main():
    """Return the module main, imported as it imports when it is run."""
    sys.path.insert(0, str(ROOT))
    sys.modules["triton"] = None
    gc.disable()
    import main

    return main


def train_ours(limit, seed=0):
    """Train one epoch with main.py's own Run, its bar, curve and checkpoint included."""
    main = import_main()

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--epochs=1", f"--limit={limit}", f"--seed={seed}", "--device=cpu"]
        run = main.Run(main.read_settings(flags), Path(folder))
        tracker = main.Tracker("off", Path(folder))
        picture = Path(folder, "loss_curve.png")
        run.train(main.Monitor(run.progress["losses"], picture, tracker))
        accuracy = run.test(run.predict())["test_accuracy"]
        seconds = run.progress["epoch_seconds"]
    return {"seconds": seconds, "accuracy": accuracy}


def measure_matrix_rate():
    """Return the float32 rate of a large torch.mm, in FLOP per second."""
    import torch

    a, b = torch.randn(2, 3000, 3000)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    rate = 2 * 3000**3 / statistics.median(seconds[2:])
    return {"rate": rate, "threads": torch.get_num_threads(), "versions": versions}


def time_operations():
    """Return the seconds of each operation of one step of ours, were it alone.

    Each is repeated at once, on the same tensors, still in the processor's caches, and
    without autograd or another operation between. What is left of Python is each call,
    some microseconds: it is most of the small operations, and nothing of the large ones.
    """
    main = import_main()
    main.keep_freed_memory()
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Repeat(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seconds = {}

        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            result, seconds = operation(*arguments, **(named or {})), []
            for _ in range(100):
                start = time.perf_counter()
                operation(*arguments, **(named or {}))
                seconds.append(time.perf_counter() - start)
            name = operation.overloadpacket.__name__
            self.seconds.setdefault(name, []).append(statistics.median(seconds))
            return result

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--limit=64", "--epochs=1", "--device=cpu"]
        run = main.Run(main.read_settings(flags), Path(folder))
        batches = list(run.make_epoch(1))
        task = run.trained, batches, torch.nn.CrossEntropyLoss(), run.optimizer
        main.train_epoch(*task, lambda loss: None)
        with Repeat() as repeat:
            main.train_epoch(*task, lambda loss: None)
    seconds = {name: sum(each) for name, each in repeat.seconds.items()}
    return {"seconds": seconds, "rate": measure_matrix_rate()["rate"]}


def time_parts():
    """Run the default job, tracked offline; return where its seconds go."""
    start = time.perf_counter()
    main = import_main()

    seconds = {"imports": time.perf_counter() - start}

    def clock(owner, name, part):
        function = getattr(owner, name)

        def clocked(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - start
                seconds[part] = seconds.get(part, 0) + spent

        setattr(owner, name, clocked)

    clock(main, "load_mnist", "data")
    clock(main.Run, "train", "training")
    clock(main.Run, "predict", "evaluation")
    clock(main.Run, "keep", "pictures and files")
    clock(main.Run, "write_report", "pictures and files")
    clock(main.Tracker, "__init__", "Comet")
    clock(main.Tracker, "finish", "Comet")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--comet=offline", "--device=cpu", f"--output-dir={folder}"]
        main.main(main.read_settings(flags))
    seconds["everything"] = time.perf_counter() - start
    return {"seconds": seconds}


def run_child(*task):
    """Do a task in a process of its own; return its results, wall time and peak memory."""
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        encoding="utf-8",
    )
    result = json.loads(child.stdout.splitlines()[-1])
    return result | {"wall": time.perf_counter() - start}


def describe(values, unit=""):
    """Return median and spread as text."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f}{unit} ({low:.2f} to {high:.2f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each side (3)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, *numbers = arguments.child
        tasks = {
            "usual": train_usually,
            "ours": train_ours,
            "rate": measure_matrix_rate,
            "operations": time_operations,
            "parts": time_parts,
        }
        result = tasks[task](*map(int, numbers))
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(result | {"peak_mb": kilobytes / 1024}), flush=True)
        if task == "parts":
            os._exit(0)  # as main.py does
        return

    rate = run_child("rate")
    versions = ", ".join(f"{name} {text}" for name, text in rate["versions"].items())
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}")
    print(f"{rate['threads']} threads, torch.mm {rate['rate'] / 1e9:.0f} GFLOP/s\n")

    usual, ours = [], []
    for number in range(arguments.rounds):
        usual.append(run_child("usual", 1, number))
        ours.append(run_child("ours", 0, number))
        a, b = usual[-1]["seconds"][0], ours[-1]["seconds"][0]
        print(f"round {number + 1}: usual {a:.2f} s, main.py {b:.2f} s, {a / b:.2f}x")
    rates = [rate["rate"], run_child("rate")["rate"]]  # before and after the rounds
    columns = {"usual loop": usual, "main.py": ours}
    rows = {
        "seconds an epoch": lambda run: run["seconds"][0],
        "images a second": lambda run: 60_000 / run["seconds"][0],
        "test accuracy (%)": lambda run: 100 * run["accuracy"],
        "peak memory (MB)": lambda run: run["peak_mb"],
        "share of the matrix rate (%)": lambda run: (
            100 * FLOP_PER_IMAGE * 60_000 / run["seconds"][0] / statistics.mean(rates)
        ),
    }
    print(f"\n{'median (lowest to highest)':30}", *(f"{name:>32}" for name in columns))
    for name, value in rows.items():
        cells = (describe([value(run) for run in runs]) for runs in columns.values())
        print(f"{name:30}", *(f"{cell:>32}" for cell in cells))
    ratios = [a["seconds"][0] / b["seconds"][0] for a, b in zip(usual, ours)]
    print("times the usual speed, pair by pair:", describe(ratios))

    print("\none step of 64 images, every operation alone, at its best")
    operations = [run_child("operations") for _ in range(arguments.rounds)]
    for run in operations:
        seconds, flop = sum(run["seconds"].values()), 64 * FLOP_PER_IMAGE
        run["seconds"]["all"], run["share"] = seconds, flop / seconds / run["rate"]
    slowest = sorted(operations[0]["seconds"].items(), key=lambda item: -item[1])
    for name, _ in slowest[:8]:
        each = [1e3 * run["seconds"][name] for run in operations]
        print(f"{name:34} {describe(each)} ms")
    shares = describe([100 * run["share"] for run in operations])
    print(f"{'share of the matrix rate (%)':34} {shares}")

    print("\nimages    seconds an epoch    microseconds an image")
    growth = {}
    for limit in (7_500, 15_000, 30_000, 60_000):
        seconds = [run_child("ours", limit)["seconds"][0] for _ in range(3)]
        growth[limit] = seconds
        each = 1e6 * statistics.median(seconds) / limit
        print(f"{limit:6}    {describe(seconds):16}    {each:.1f}")

    print("\nthe whole command, 7 epochs (the usual way: no pictures, no Comet)")
    job_usual = run_child("usual", 7)
    job_ours = run_child("parts")
    parts = job_ours["seconds"]
    everything = parts.pop("everything")
    outside = job_ours["wall"] - parts["training"]
    parts["the rest"] = everything - sum(parts.values())
    parts["start and exit of Python"] = job_ours["wall"] - everything
    print(f"usual {job_usual['wall']:.1f} s, main.py {job_ours['wall']:.1f} s")
    print(
        f"main.py: outside training {outside:.1f} s, peak {job_ours['peak_mb']:.0f} MB"
    )
    for part, seconds in parts.items():
        print(f"  {part:26} {seconds:6.2f} s")

    if arguments.json:
        everything = {"matrix_rate": rates, "usual": usual, "ours": ours}
        everything |= {"operations": operations, "growth": growth}
        everything |= {"job": {"usual": job_usual, "ours": job_ours}}
        Path(arguments.json).write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
