"""Photographs of digits, drawn here by code. Run it to draw data/stages.png anew."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage

STROKES = {  # the way of the pen: x, y in a square
    0: ["50,0 15,20 10,65 40,100 80,80 88,35 60,2 45,2"],
    1: ["55,0 52,50 48,100"],
    2: ["15,25 30,5 60,0 80,20 70,45 40,75 12,98 50,93 90,97"],
    3: ["15,12 45,0 75,15 65,40 40,48 75,60 80,85 50,100 12,88"],
    4: ["30,0 12,55 12,57 85,55", "65,10 60,100"],
    5: ["80,2 30,2 29,3 22,42 60,40 82,65 65,95 30,100 12,88"],
    6: ["70,0 35,30 18,70 40,100 75,85 70,60 40,58 20,75"],
    7: ["12,5 85,2 84,4 55,50 38,100"],
    8: ["70,15 45,0 25,20 50,45 78,75 50,100 22,78 50,47 75,22 70,12"],
    9: ["75,20 45,2 22,28 45,50 75,25 78,15 72,60 60,100"],
}
HEIGHT, WIDTH, SIZE = 400, 360, 170  # of the pictures and of most digits, in pixels


def write(digit, seed=0, size=SIZE, pen=0.07):
    """Return the ink (H, W), 0 to 1, of a digit written by a hand that shakes a bit."""
    chance = np.random.default_rng([digit, seed])
    image = Image.new("L", (2 * size, 2 * size))  # twice as large, for smooth edges
    draw = ImageDraw.Draw(image)
    for stroke in STROKES[digit]:
        points = np.array([point.split(",") for point in stroke.split()], float) / 100
        places = np.linspace(0, len(points) - 1, 300)
        x, y = (np.interp(places, range(len(points)), way) for way in points.T)
        shake = ndimage.gaussian_filter1d(chance.normal(0, 0.12, (3, 300)), 25)
        x = ndimage.gaussian_filter1d(x, 9, mode="nearest") + shake[0] + 0.1 * (1 - y)
        y = ndimage.gaussian_filter1d(y, 9, mode="nearest") + shake[1]
        for way in np.stack([x, y, pen / 2 * (1 + 4 * shake[2])]).T:
            across, down, r = 2 * size * (way * (0.76, 0.8, 1) + (0.1, 0.1, 0))
            draw.ellipse((across - r, down - r, across + r, down + r), fill=255)
    ink = np.array(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    rows, columns = ndimage.find_objects((ink > 0.5).astype(int))[0]
    return ink[rows, columns]


def place(ink, top=None, left=None):
    """Return the ink on a sheet of HEIGHT x WIDTH, in the middle unless told."""
    sheet = np.zeros((HEIGHT, WIDTH), np.float32)
    top = (HEIGHT - len(ink)) // 2 if top is None else top
    left = (WIDTH - ink.shape[1]) // 2 if left is None else left
    sheet[top : top + len(ink), left : left + ink.shape[1]] = ink
    return sheet


def photograph(ink, paper=None, pen=60, noise=3):
    """Return the grey levels (H, W) of ink on paper, in a light that falls unevenly."""
    y, x = np.mgrid[0 : len(ink), 0 : ink.shape[1]] / max(ink.shape)
    paper = 215 - 70 * x * y - 30 * y if paper is None else paper
    grey = ndimage.gaussian_filter(paper * (1 - ink) + pen * ink, 0.8)
    grey += np.random.default_rng(0).normal(0, noise, grey.shape)
    return grey.clip(0, 255).astype(np.float32)


def rule(gap, slope=0.02, width=3):
    """Return the ink of lines across a sheet."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return ((y + slope * x + 20) % gap < width).astype(np.float32)


def draw(kind, digit=7, seed=0):
    """Return a picture, grey levels (H, W), of one of the KINDS."""
    ink = write(digit, seed)
    sheet = place(ink)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    light = 215 - 60 * x / WIDTH - 30 * y / HEIGHT
    if kind == "frame":
        sheet[90:310, 70:290] = 1
        sheet[94:306, 74:286] = place(ink)[94:306, 74:286]
    elif kind == "frame at the border":
        sheet[:5], sheet[-9:], sheet[:, :7], sheet[:, -4:] = 1, 1, 1, 1
    elif kind == "ruled lines":
        light = light * (1 - 0.3 * rule(60))
    elif kind == "squared paper":
        light = light * (1 - 0.25 * np.maximum(rule(50), (x - 0.02 * y) % 50 < 3))
    elif kind == "broken strokes":
        sheet[:, (WIDTH // 2) : (WIDTH // 2) + 4] = 0
        sheet[HEIGHT // 2 - 30 : HEIGHT // 2 - 26] = 0
    elif kind == "hard shadow":
        light = light - 80 / (1 + np.exp((x - 0.7 * y - 40) / 2))
    elif kind == "pencil":
        grain = np.random.default_rng(seed).normal(0.7, 0.3, sheet.shape)
        return photograph(sheet * grain.clip(0, 1), light, pen=90, noise=3)
    elif kind == "tight crop":
        return photograph(ink)
    elif kind == "touches the border":
        sheet = place(ink, top=HEIGHT - len(ink))
    elif kind == "light on dark":
        return 255 - photograph(sheet, light, noise=6)
    elif kind == "two digits":
        sheet = np.maximum(place(ink, left=20), place(write(3, seed), left=200))
    elif kind == "nothing":
        sheet[:] = 0
    elif kind == "blank ruled paper":
        return photograph(0 * sheet, light * (1 - 0.3 * rule(60)))
    return photograph(sheet, light)


KINDS = "dark on light,light on dark,frame,frame at the border,ruled lines,"
KINDS += "squared paper,broken strokes,hard shadow,pencil,tight crop,touches the border"
KINDS = KINDS.split(",")  # of pictures with one digit


def draw_stages(path):
    """Draw how a photograph becomes an image as MNIST's: photo, ink, cut out, 28x28."""
    import main

    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    light = 205 - 60 * x / WIDTH - 60 / (1 + np.exp((x + 0.6 * y - 300) / 25))
    light = light * (1 - 0.25 * rule(48, slope=0.04))
    photo = photograph(place(write(2, 3), top=120, left=70), light, noise=4)
    photo = np.array(Image.fromarray(photo).reduce(2))  # as prepare_photo does
    ink = main.find_ink(photo)
    stages = {
        "1. Photo": photo,
        "2. Ink: paper, light and shadow removed": ink.clip(0, 1),
        "3. Digit alone, lines removed": main.cut_out(ink)[0],
        "4. 28x28 pixels, centred": main.prepare_photo(photo)[0],
    }
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, 4), stages.items()):
        axes.imshow(image, cmap="gray", vmin=0, vmax=None if image.max() <= 1 else 255)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, size=10)
    figure.savefig(path, dpi=100)
    Image.open(path).convert("L").quantize(32).save(path, optimize=True)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))
    draw_stages(root / "data" / "stages.png")
