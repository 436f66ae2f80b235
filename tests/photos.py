"""Photographs of digits, made here: what no MNIST file has to do with."""

import random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Fonts that come with matplotlib.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSans-Oblique",
    "STIXGeneral",
    "cmss10",
    "cmr10",
)
PAPERS = [(250, 248, 240), (255, 255, 255), (200, 220, 235)]
BOARDS = [(30, 40, 35), (20, 20, 60)]
PENS = [(20, 20, 30), (20, 40, 150), (120, 20, 20)]
CHALKS = [(240, 240, 235), (250, 230, 90)]


def draw_photo(text, font, seed):
    """Return an RGB image: the text somewhere on paper or a board, all else by chance.

    Size, thickness, colours and place of the writing, its turn by up to 10°, how sharp
    the picture is, its noise, and light that falls unevenly.
    """
    chance = random.Random(f"{text} {font} {seed}")
    width, height = chance.choice([(300, 300), (400, 300), (640, 480), (900, 1200)])
    size = min(chance.choice([60, 120, 250, 400]), 0.8 * height, width / len(text))
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf"
    letters = ImageFont.truetype(path, int(size))
    writing = Image.new("L", (width, height))
    pencil = ImageDraw.Draw(writing)
    left, top, right, bottom = pencil.textbbox((0, 0), text, font=letters)
    x = chance.uniform(8, max(9, width - (right - left) - 8))
    y = chance.uniform(8, max(9, height - (bottom - top) - 8))
    stroke = chance.choice([0, 0, size / 40, size / 20])
    place = x - left, y - top
    pencil.text(place, text, fill=255, font=letters, stroke_width=int(stroke))
    centre = x + (right - left) / 2, y + (bottom - top) / 2
    writing = writing.rotate(chance.uniform(-10, 10), Image.BICUBIC, center=centre)
    writing = writing.filter(ImageFilter.GaussianBlur(chance.choice([0, 0.7, 1.5])))

    papers, pens = chance.choice([(PAPERS, PENS), (PAPERS, PENS), (BOARDS, CHALKS)])
    paper, pen = (np.array(chance.choice(c), float) for c in (papers, pens))
    ink = np.asarray(writing, float)[..., None] / 255
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    dim = 0.5 + 0.25 * (x * chance.uniform(-1, 1) + y * chance.uniform(-1, 1))
    light = 1 - chance.uniform(0, 0.35) * (dim + 0.25 * (x**2 + y**2))
    noise = np.random.default_rng(chance.randrange(2**31))
    grain = noise.normal(0, chance.choice([0, 3, 7]), (height, width, 1))
    picture = (paper * (1 - ink) + pen * ink) * light[..., None] + grain
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))
