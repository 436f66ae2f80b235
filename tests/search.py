"""Choose the numbers of `--recipe accurate`. No test: run it by hand.

python tests/search.py                     all candidates with 4 seeds: about 35 minutes
python tests/search.py --only shift --seeds 10 --json FILE

Each candidate changes a thing or two of BASE, in main.py's words. It is trained by main.py's own Run on
55,000 of the training images and judged on the other 5,000. The test images are not used.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 5_000

BASE = {"TURN": 10, "STRETCH": 0.1, "SHIFT": 2, "LABEL_SMOOTHING": 0.05}
CANDIDATES = {  # name: (changes of the constants in main.py, flags)
    "base": ({}, []),
    "classic": ({}, ["--recipe=classic", "--lr=0.01"]),
    "no label smoothing": ({"LABEL_SMOOTHING": 0.0}, []),
    "label smoothing 0.02": ({"LABEL_SMOOTHING": 0.02}, []),
    "label smoothing 0.1": ({"LABEL_SMOOTHING": 0.1}, []),
    "shift 1": ({"SHIFT": 1}, []),
    "shift 3": ({"SHIFT": 3}, []),
    "turn 0": ({"TURN": 0}, []),
    "turn 5": ({"TURN": 5}, []),
    "turn 15": ({"TURN": 15}, []),
    "turn 0, shift 1": ({"TURN": 0, "SHIFT": 1}, []),
    "turn 5, shift 1": ({"TURN": 5, "SHIFT": 1}, []),
    "stretch 0.2": ({"STRETCH": 0.2}, []),
    "learning rate 0.05": ({}, ["--lr=0.05"]),
    "learning rate 0.2": ({}, ["--lr=0.2"]),
    "Adam, learning rate 0.003": ({}, ["--optimizer=adam", "--lr=0.003"]),
}


def judge(task):
    """Train a candidate with a seed; return its accuracy, loss, seconds, held out."""
    name, seed, epochs = task
    sys.path.insert(0, str(ROOT))
    import torch

    import main

    torch.set_num_threads(1)
    constants, flags = CANDIDATES[name]
    for constant, value in (BASE | constants).items():
        if not hasattr(main, constant):
            raise AttributeError(f"main.py has no {constant}")
        setattr(main, constant, value)
    flags = ["--recipe=accurate", "--lr=0.1", *flags]
    flags += [f"--seed={seed}", f"--epochs={epochs}"]
    with tempfile.TemporaryDirectory() as folder:
        settings = main.read_settings(
            [*flags, "--device=cpu", f"--output-dir={folder}"]
        )
        run = main.Run(settings, Path(folder))
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(2026))
        used, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
        # In the place of the test images, which nothing looks at.
        run.test_images, run.test_labels = run.images[held_out], run.labels[held_out]
        run.images, run.labels = run.images[used], run.labels[used]
        run.steps = -(-len(run.labels) // settings["batch_size"])
        losses, tracker = run.progress["losses"], main.Tracker("off", Path(folder))
        run.train(main.Monitor(losses, Path(folder, "curve.png"), tracker))
        logits = run.predict()
        loss, accuracy = main.evaluate(torch.nn.Identity(), [(logits, run.test_labels)])
        edge = (run.predictor.seen - run.model.seen) // 2
        middle = slice(edge, edge + run.model.seen)  # what the model itself looks at
        images = main.prepare(run.test_images, run.predictor)[..., middle, middle]
        one_view = main.evaluate(run.model, [(images, run.test_labels)])[1]
    return {
        "name": name,
        "seed": seed,
        "accuracy": accuracy,
        "one_view": one_view,
        "loss": loss,
        "seconds": sum(run.progress["epoch_seconds"]),
    }


def judge_quietly(task):
    """Do judge(task) without its console output: in a process of its own."""
    with open("/dev/null", "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        return judge(task)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4, help="of each candidate (4)")
    parser.add_argument("--epochs", type=int, default=7, help="of each training (7)")
    parser.add_argument(
        "--only", default="", help="candidates of such names (a regular expression)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args()
    names = [name for name in CANDIDATES if re.search(arguments.only, name)]
    # Seed by seed, so that whatever slows the machine slows all candidates.
    tasks = [(n, s, arguments.epochs) for s in range(arguments.seeds) for n in names]
    results = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, None, (), 1) as pool:
        for result in pool.imap_unordered(judge_quietly, tasks):
            results.append(result)
            about = f"{result['name']}, seed {result['seed']}"
            print(
                f"{len(results)}/{len(tasks)} {about}: {100 * result['accuracy']:.2f} %"
            )
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    columns = "held-out accuracy, %", "from one view, %", "held-out loss"
    print("\n| candidate |", " | ".join(columns), "| seeds | seconds |")
    print("|---|---|---|---|---|---|")
    for name in names:
        rows = [result for result in results if result["name"] == name]
        cells = []
        for key, factor in (("accuracy", 100), ("one_view", 100), ("loss", 1)):
            values = [factor * row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        seconds = statistics.median(row["seconds"] for row in rows)
        print(f"| {name} | {' | '.join(cells)} | {len(rows)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
