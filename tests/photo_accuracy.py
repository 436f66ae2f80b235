"""How well a network reads other people's pictures.

python tests/photo_accuracy.py --checkpoint runs/NAME/model.pt --photos FOLDER

FOLDER has the pictures and labels.tsv: file, digit ("-": no single digit), kind. Every
kind is split into halves A and B, always the same: choose on A, confirm on B.
"""

import argparse
import io
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main


@torch.no_grad()
def classify(model, digits):
    """Return the probabilities (N, 10) of uint8 images (N, 28, 28)."""
    images = torch.as_tensor(np.stack(digits))
    return model(main.normalise(images)).softmax(dim=1)


def read(model, pictures):
    """Return each picture's answer, 0 to 9, or None for no answer, as --predict does."""
    prepared = [main.prepare_photo(picture) for picture in pictures]
    answers = []
    chances = classify(model, [digit for digit, _ in prepared])
    for (_, problem), row in zip(prepared, chances):
        second, best = row.sort().values[-2:].tolist()
        unclear = problem or best - second < 0.2
        answers.append(None if unclear else int(row.argmax()))
    return answers


def split(rows):
    """Return the half, A or B, of each file: each kind is halved, with a fixed seed."""
    halves = {}
    for kind in {kind for _, _, kind in rows}:
        names = sorted(name for name, _, other in rows if other == kind)
        random.Random(f"0 {kind}").shuffle(names)
        halves |= {name: "AB"[place % 2] for place, name in enumerate(names)}
    return halves


def measure_photos(model, folder):
    """Print the table, by kind and half."""
    lines = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    halves, counts = split(rows), defaultdict(Counter)
    answers = read(model, [main.read_photo(folder / name) for name, _, _ in rows])
    for (name, digit, kind), answer in zip(rows, answers):
        outcome = "right" if str(answer) == digit else "wrong"
        outcome = "none" if answer is None else outcome
        groups = [kind] if digit == "-" else [kind, "all"]
        if kind.startswith("photo"):
            groups.append("all photographs")
        for group in groups:
            counts[group, halves[name]][outcome] += 1
            counts[group, "both"][outcome] += 1
    print(f"{'right / wrong / no answer':26}{'half A':>14}{'half B':>14}{'both':>14}")
    groups = {group for group, _ in counts}
    for group in sorted(groups, key=lambda name: (name.startswith("all"), name)):
        cells = ""
        for half in ("A", "B", "both"):
            count = counts[group, half]
            cells += f"{count['right']:5} /{count['wrong']:3} /{count['none']:3}"
        share = count["right"] / count.total(), count["wrong"] / count.total()
        print(f"{group:26}{cells}{share[0]:8.1%} right{share[1]:7.1%} wrong")


def measure_mnist(model, count=1000):
    """Print how many test digits are read: the originals; enlarged to 280x280 files."""
    images, labels = main.load_mnist(main.DATA_DIR)[2:]
    pictures = []
    for image in images[:count].numpy():
        file = io.BytesIO()
        Image.fromarray(image).resize((280, 280)).save(file, "PNG")
        pictures.append(np.array(Image.open(file), np.float32))
    labels = labels[:count].tolist()
    direct = classify(model, images[:count]).argmax(dim=1).tolist()
    answers = read(model, pictures)
    for name, found in ("originals", direct), ("enlarged and saved", answers):
        right = sum(a == b for a, b in zip(found, labels))
        print(f"MNIST, {name}: {right} of {count} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--photos", type=Path, required=True)
    args = parser.parse_args()
    network, _ = main.load_predictor(args.checkpoint)
    measure_photos(network, args.photos)
    measure_mnist(network)
