"""Choose the numbers of the accurate recipe. Not a test: run it by hand.

python tests/search.py                          all candidates, 4 seeds each: 40 minutes
python tests/search.py --only shift --seeds 10  some of them

Every candidate changes a thing or two of main.py. It is trained by main.py itself on
55,000 of the training images and judged on the other 5,000; no test image is used.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 5_000
CANDIDATES = {  # name: (constants of main.py, flags)
    "as it is": ({}, []),
    "classic": ({}, ["--recipe=classic"]),
    "no label smoothing": ({"LABEL_SMOOTHING": 0.0}, []),
    "label smoothing 0.1": ({"LABEL_SMOOTHING": 0.1}, []),
    "shift 1": ({"SHIFT": 1}, []),
    "shift 3": ({"SHIFT": 3}, []),
    "angle 0": ({"ANGLE": 0}, []),
    "angle 10": ({"ANGLE": 10}, []),
    "angle 15": ({"ANGLE": 15}, []),
    "scale 0.2": ({"SCALE": 0.2}, []),
    "learning rate 0.05": ({}, ["--lr=0.05"]),
    "learning rate 0.2": ({}, ["--lr=0.2"]),
    "Adam, learning rate 0.003": ({}, ["--optimizer=adam", "--lr=0.003"]),
}


def judge(task):
    """Train a candidate with a seed; return its held-out accuracy and loss, a dict."""
    name, seed = task
    sys.path.insert(0, str(ROOT))
    import torch

    import main

    torch.set_num_threads(1)
    constants, flags = CANDIDATES[name]
    for constant, value in constants.items():
        getattr(main, constant)  # AttributeError if there is none
        setattr(main, constant, value)
    images, labels, *_ = main.load_mnist(main.DATA_DIR)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(2026))
    used, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    split = images[used], labels[used], images[held_out], labels[held_out]
    main.load_mnist = lambda data_dir: split
    common = [f"--seed={seed}", "--device=cpu", "--comet=off"]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        flags = ["--recipe=accurate", *flags, *common, f"--output-dir={folder}"]
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            assert main.main(flags) == 0
        metrics = json.loads(next(Path(folder).glob("*/metrics.json")).read_text())
    results = {"name": name, "seed": seed, "loss": metrics["test_loss"]}
    return results | {"accuracy": 100 * metrics["test_accuracy"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", default="", help="candidates: a regular expression")
    options = parser.parse_args()
    names = [name for name in CANDIDATES if re.search(options.only, name)]
    tasks = [(name, seed) for seed in range(options.seeds) for name in names]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), None, (), 1) as pool:
        results = pool.map(judge, tasks, chunksize=1)
    print("| candidate | held-out accuracy, % | held-out loss | seeds |")
    print("|---|---|---|---|")
    for name in names:
        cells = [name]
        for key, digits in (("accuracy", 2), ("loss", 3)):
            values = [row[key] for row in results if row["name"] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        print("| " + " | ".join(cells) + f" | {options.seeds} |")


if __name__ == "__main__":
    main()
