"""How fast main.py is beside the usual loop. Not a test: run it on an idle machine.

python tests/benchmark.py  5 rounds, about 10 minutes on 2 cores

Every measurement is a process of its own, one at a time; the sides take turns.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def train_usually(epochs):
    """Train and test as tutorials do; print seconds per epoch and accuracy as JSON."""
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 24, 3)
            self.conv2 = nn.Conv2d(24, 36, 3)
            self.pool = nn.MaxPool2d(2, 2)
            self.fc1 = nn.Linear(900, 128)
            self.fc2 = nn.Linear(128, 10)

        def forward(self, x):
            x = self.pool(torch.relu(self.conv1(x)))
            x = self.pool(torch.relu(self.conv2(x)))
            x = torch.relu(self.fc1(torch.flatten(x, 1)))
            return self.fc2(x)

    normalise = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([transforms.ToTensor(), normalise])
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
            (raw / archive.name).symlink_to(archive)
        train = datasets.MNIST(folder, train=True, download=True, transform=transform)
        test = datasets.MNIST(folder, train=False, transform=transform)
    torch.manual_seed(0)
    model, loss_function = Net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        loss_sum = 0.0
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
        seconds.append(time.perf_counter() - start)
    correct = 0
    with torch.no_grad():
        for images, labels in DataLoader(test, batch_size=250):
            correct += (model(images).argmax(dim=1) == labels).sum().item()
    print(json.dumps({"epoch_seconds": seconds, "test_accuracy": correct / len(test)}))


# Runs a script, and says at the end of it how much memory it took at most: not at the end
# of the process, since PyTorch reads more of its library files when it is unloaded.
WATCH = """import atexit, resource, runpy, sys
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
atexit.register(lambda: print(usage(), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def measure(command, metrics=None):
    """Run a script; return its seconds, peak memory in MB, and its results, a dict."""
    start = time.perf_counter()
    command = [sys.executable, "-c", WATCH, *command]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    results = json.loads(metrics().read_text() if metrics else process.stdout)
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    memory = int(process.stderr.split()[-1]) / unit
    return {"command": seconds, "MB": memory, **results}


def run_script(*flags):
    """Measure one run of main.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "main.py"), "--output-dir", folder]
        found = lambda: next(Path(folder).glob("*/metrics.json"))
        return measure([*command, *flags], found)


def show(name, values, digits=2):
    """Print a row of the table: median, lowest and highest of each side."""
    cells = []
    for side in values:
        low, middle, high = min(side), statistics.median(side), max(side)
        cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--usual", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.usual:
        return train_usually(options.usual)

    sides = {
        "usual loop": lambda: measure([__file__, "--usual", "1"]),
        "main.py": lambda: run_script("--epochs", "1", "--comet", "off"),
    }
    rounds = {name: [] for name in sides}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for name, run in sides.items():
            rounds[name].append(run())

    print(f"{platform.platform()}, Python {platform.python_version()}, ", end="")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(
        f"| median of {options.rounds} (lowest to highest) | " + " | ".join(sides), "|"
    )
    print("|---" * (len(sides) + 1) + "|")
    seconds = [[run["epoch_seconds"][0] for run in rounds[name]] for name in sides]
    show("seconds per epoch", seconds)
    accuracy = [[100 * run["test_accuracy"] for run in rounds[name]] for name in sides]
    show("test accuracy after it, %", accuracy, 1)
    show("peak memory, MB", [[run["MB"] for run in rounds[name]] for name in sides], 0)
    show("usual loop / main.py", [[usual / ours for usual, ours in zip(*seconds)]])
    runs = [run_script("--comet", "offline") for _ in range(3)]
    outside = [run["command"] - sum(run["epoch_seconds"]) for run in runs]
    print("\n| python main.py | median of 3 (lowest to highest) |")
    print("|---|---|")
    show("seconds in all", [[run["command"] for run in runs]], 1)
    show("seconds outside the epochs", [outside], 1)
    show("peak memory, MB", [[run["MB"] for run in runs]], 0)
    return None


if __name__ == "__main__":
    main()
