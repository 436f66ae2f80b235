"""--predict: photographs are prepared like MNIST's images, and classified."""

import io
import itertools
import os
import re
import shutil
import time

import numpy as np
import photos
import pytest
import scipy
import torch
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw

import main

ANSWER = re.compile(r"(.*): (\d) \((\d+\.\d)%\), then (\d) \((\d+\.\d)%\)")


@pytest.fixture(scope="module")
def model_file(trained):
    """The weights of a network, after a short training."""
    return trained("cnn") / "model.pt"


@pytest.fixture
def predict(spawn, model_file):
    """predict(*files, status) classifies files; returns its lines and those of stderr."""

    def run(*files, status=0, **environment):
        run = spawn("--predict", *files, "--checkpoint", model_file, **environment)
        assert run.wait() == status, run.stderr
        assert "Traceback" not in run.stderr
        return run.stdout.splitlines(), run.stderr.splitlines()

    return run


def as_image(grey):
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def prepare(picture):
    """Return what prepare_photo makes of grey levels: int (28, 28), problem."""
    digit, problem = main.prepare_photo(picture)
    return np.asarray(digit).astype(int), problem


@torch.no_grad()
def classify(model_file, digits):
    """Return the digit that the network sees in each image (28, 28)."""
    model, _ = main.load_predictor(model_file)
    batch = main.normalise(torch.as_tensor(np.stack(digits).astype(np.uint8)))
    return model(batch).argmax(dim=1).tolist()


@pytest.mark.parametrize("kind", photos.KINDS)
def test_ten_drawings_of_each_kind(model_file, kind):
    prepared = [prepare(photos.draw(kind, digit, 1)) for digit in range(10)]
    digits = classify(model_file, [digit for digit, _ in prepared])
    right = sum(digits[n] == n and not prepared[n][1] for n in range(10))
    assert right >= (4 if kind in ("squared paper", "hard shadow") else 8), digits


@pytest.mark.parametrize("kind", ["two digits", "nothing", "blank ruled paper"])
def test_without_a_single_digit_there_is_no_answer(kind):
    for digit in range(10):
        digit, problem = prepare(photos.draw(kind, digit, 2))
        words = "nothing stands out" if kind == "nothing" else "several|lines|nothing"
        assert re.search(words, problem or ""), (digit, problem)


def test_a_prepared_digit_is_placed_as_mnist_does():
    for digit in range(10):
        image, problem = prepare(photos.draw("dark on light", digit))
        assert problem is None and image.shape == (28, 28) and image.max() == 255
        places = np.arange(28)
        for axis in (0, 1):
            assert abs((image.sum(axis) * places).sum() / image.sum() - 14) < 0.1
        rows, columns = np.nonzero(image > 50)
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22


@torch.no_grad()
def test_an_answer_is_ahead_of_the_second_by_a_fifth(tmp_path, model_file, capsys):
    """On digits of MNIST for which the network hesitates, more or less."""
    model, _ = main.load_predictor(model_file)
    images = main.load_mnist(main.DATA_DIR)[2][:3000]
    ahead = model(main.normalise(images)).softmax(dim=1).topk(2).values.diff().abs()
    leads = {}
    for n in ahead[:, 0].argsort()[:60].tolist():
        digit, problem = main.prepare_photo(images[n].numpy())
        row = model(main.normalise(torch.tensor(digit[None]))).softmax(dim=1)
        lead = float(row.topk(2).values.diff().abs())
        if not problem and 0.01 < abs(lead - 0.2) < 0.15:
            leads[str(tmp_path / f"{n}.png")] = lead
            as_image(images[n].numpy()).save(tmp_path / f"{n}.png")
    assert min(leads.values()) < 0.15 and max(leads.values()) > 0.25
    options = f"--checkpoint={model_file}", f"--output-dir={tmp_path}"
    assert main.main(["--predict", *leads, *options]) == 0
    output = capsys.readouterr().out
    for path, lead in leads.items():
        (line,) = [line for line in output.splitlines() if line.startswith(path)]
        assert ("no answer: not clear; closest" in line) is (lead < 0.2), (line, lead)


def test_bad_files_get_a_line_each_and_the_others_an_answer(tmp_path, predict):
    whole = io.BytesIO()
    as_image(photos.draw("dark on light", 3)).save(whole, "PNG")
    (tmp_path / "good.png").write_bytes(whole.getvalue())
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty folder").mkdir()
    problems = {
        "missing.png": "No such file or directory",
        "cut.png": "",
        "text.png": "not an image (try JPEG",
        "bomb.png": "save it smaller",
        "empty folder": "no picture",
        "*.tif": "No such file or directory",
    }
    lines, errors = predict(*problems, "good.png", status=2)
    assert len(errors) == len(problems)
    for error, (name, problem) in zip(errors, problems.items()):
        assert error.startswith(f"main.py: cannot read {name}: ") and problem in error
    assert ANSWER.fullmatch(lines[1])[1] == "good.png"
    assert predict("missing.png", status=2)[0][1:] == []  # and no empty folder
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_it_says_and_draws_what_the_network_sees(tmp_path, predict, model_file):
    """Of the pictures in a folder, and of patterns."""
    names = "0.png", "1.JPG", "2 [a].webp", "3.png"
    kinds = "dark on light", "light on dark", "two digits", "nothing"
    for name, kind in zip(names, kinds):
        as_image(photos.draw(kind, 2)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    lines, errors = predict(".", "[01].*")
    first, *answers, last = lines
    assert first == f"Model: {model_file}" and errors == []
    found = [f"./{name}" for name in names] + ["0.png", "1.JPG"]
    assert [answer.split(": ")[0] for answer in answers] == found
    for answer in answers[:2] + answers[4:]:
        _, best, p, second, q = ANSWER.fullmatch(answer).groups()
        assert best == "2" != second and 50 <= float(p) and float(p) + float(q) < 100.1
    assert "no answer: several digits" in answers[2]
    assert "no answer: nothing stands out" in answers[3]
    (picture,) = (tmp_path / "runs").glob("*-predict/predictions.png")
    assert last == f"Picture: {picture.relative_to(tmp_path)}"


@pytest.mark.parametrize("count", [1, 20])
def test_the_picture_is_legible(tmp_path, monkeypatch, model_file, count):
    """Titles, bars and their labels overlap nothing, whatever they say."""
    figures, names = [], []
    note = lambda path, draw, *given, **named: figures.append(draw(*given, **named))
    monkeypatch.setattr(main, "save_picture", note)
    for number in range(count):
        names.append(str(tmp_path / f"{'my digits ' * 12}{number}.png"))
        kind = ("dark on light", "two digits", "nothing")[number % 3]
        as_image(photos.draw(kind, number % 10)).resize((90, 100)).save(names[-1])
    flags = "--checkpoint", str(model_file), "--output-dir", str(tmp_path / "runs")
    assert main.main(["--predict", *names, *flags]) == 0
    (figure,) = figures
    figure.draw_without_rendering()
    assert len(figure.axes) == 2 * count
    cells = []
    for image, chart in zip(figure.axes[::2], figure.axes[1::2]):
        cells.append(Bbox.union([image.get_tightbbox(), chart.get_tightbbox()]))
        labels = [text.get_window_extent() for text in chart.texts]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(cells, 2))


def test_the_newest_finished_run_is_taken(tmp_path, spawn, model_file):
    as_image(photos.draw("dark on light")).save(tmp_path / "seven.png")
    run = spawn("--predict", "seven.png")
    assert run.wait() == 2 and "no model.pt in runs" in run.stderr
    for age, name in enumerate(["b-cnn", "c-compare/fc-seed-0", "a-cnn"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        copy = shutil.copy(model_file, tmp_path / "runs" / name)
        os.utime(copy, (time.time() - 100 + age,) * 2)
    run = spawn("--predict", "seven.png")
    assert run.wait() == 0 and "Model: runs/a-cnn/model.pt" in run.stdout
    run = spawn("--predict", "seven.png", "--checkpoint", "runs/c-compare")
    assert run.wait() == 0 and "runs/c-compare/fc-seed-0/model.pt" in run.stdout


def draw_seven(levels, shape=(300, 260)):
    """Return a 7 of these levels, ink and paper, as an array (H, W) or (H, W, 3)."""
    mask = Image.new("L", shape[::-1])
    points = [(70, 70), (190, 70), (120, 240)]
    ImageDraw.Draw(mask).line(points, fill=255, width=22, joint="curve")
    ink, paper = np.array(levels, float)
    part = np.array(mask)[..., None] / 255
    return (paper + part * (ink - paper)).squeeze()


def save_pgm(path, most):
    grey = (draw_seven((30, 220)) / 255 * most).astype(">u2")
    path.write_bytes(b"P5 %d %d %d\n" % (*grey.shape[::-1], most) + grey.tobytes())


def save_levels(path, scale, shift, kind, margin=0):
    levels = np.pad(draw_seven((30, 220)), margin, constant_values=220)
    Image.fromarray((levels * scale + shift).astype(kind)).save(path)


def save_transparent(path, colour, levels=(255, 0)):
    opacity = draw_seven(levels).astype(np.uint8)
    image = Image.new("RGBA", opacity.shape[::-1], colour)
    image.putalpha(Image.fromarray(opacity))
    image.save(path)


def save_second_page(path):
    blank = Image.new("L", (260, 300), 255)
    blank.save(path, save_all=True, append_images=[as_image(draw_seven((30, 220)))])


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned right by 90 degrees
    as_image(draw_seven((30, 220))).rotate(90, expand=True).save(path, exif=exif)


def save_colours(path):
    noise = np.random.default_rng(0).normal(0, 3, (300, 260, 3))
    light = np.linspace(1, 0.4, 260)[:, None]
    as_image(draw_seven(((255, 200, 20), (150, 215, 235))) * light + noise).save(path)


LEVELS = {  # file: how it is saved
    "16.pgm": lambda path: save_pgm(path, 65_535),
    "10.pgm": lambda path: save_pgm(path, 1023),
    "16.png": lambda path: save_levels(path, 257, 0, np.uint16),
    "32.tif": lambda path: save_levels(path, 1000, 0, np.int32),
    "to-1.tif": lambda path: save_levels(path, 1 / 255, 0, np.float32),
    "to-255.tif": lambda path: save_levels(path, 1, 0, np.float32),
    "below-0.tif": lambda path: save_levels(path, 3, -500, np.float32),
    "grey.png": lambda path: save_transparent(path, "#808080"),
    "blue.png": lambda path: save_transparent(path, "#1E90FF"),
    "orange.webp": lambda path: save_transparent(path, "#FF5722"),
    "slate.png": lambda path: save_transparent(path, "#708090"),
    "palette.png": lambda path: as_image(draw_seven((30, 220))).convert("P").save(path),
    "hole.png": lambda path: save_transparent(path, "#808080", (0, 255)),
    "small.png": lambda path: save_levels(path, 257, 0, np.uint16, 1500),
    "turned.jpg": save_turned,
    "turned.tif": save_turned,
    "as-bright.png": save_colours,
    "animated.gif": save_second_page,
    "pages.tif": save_second_page,
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_colours_and_pages_of_all_kinds(tmp_path, name):
    """They become what the same digit in 8 bits becomes."""
    path = tmp_path / name
    LEVELS[name](path)
    digit, problem = prepare(main.read_photo(path))
    expected, _ = prepare(draw_seven((30, 220)))
    assert problem is None
    assert abs(digit - expected).mean() < 8, abs(digit - expected).mean()


def test_in_a_folder_only_pictures_are_looked_at(tmp_path):
    for name in "7.png", "model.h5", "clip.mpg", "notes.pdf":
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert main.find_images([str(tmp_path)]) == [str(tmp_path / "7.png")]
    for name in "model.h5", "*.h5":
        assert main.find_images([f"{tmp_path}/{name}"]) == [f"{tmp_path}/model.h5"]
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(main.UserError, match="not a file"):
        main.read_photo(tmp_path / "pipe.png")


def test_large_photographs_are_read_reduced(tmp_path, recwarn, monkeypatch):
    path = tmp_path / "large.jpg"
    Image.new("L", (16_000, 12_000), 200).save(path)
    assert max(main.read_photo(path).shape) <= 1500
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    image = Image.open(path)
    main.read_frame(image)
    assert image.size == (2000, 1500)  # as it was decoded
    with pytest.raises(ValueError, match="too large"):
        main.read_frame(Image.new("1", (8000, 8000)))


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (0, 2), (6, 6), (20, 20)])
def test_a_white_margin_decides_nothing(model_file, rows, columns):
    """Grey paper, darker to the corners, a digit in levels of 60, a crop's margin."""
    y, x = np.mgrid[-1:1:300j, -1:1:260j]
    grey = draw_seven((80, 140)) - 15 * (x**2 + y**2)
    grey[:, -columns:] = 252
    grey[len(grey) - rows :] = 252
    digit, problem = prepare(grey)
    assert problem is None and classify(model_file, [digit]) == [7]


def test_specks_are_left_out():
    grey = draw_seven((30, 220))
    expected, _ = prepare(grey)
    for y, x in (30, 30), (150, 40), (260, 200), (280, 30):
        grey[y : y + 7, x : x + 7] = 30
    digit, problem = prepare(grey)
    assert problem is None and abs(digit - expected).mean() < 2


def test_tiny_and_faint_pictures_noise_and_a_shadow_are_no_digit():
    for shape in (1, 1), (10, 2000), (600, 3), (3, 3000):
        assert prepare(np.full(shape, 200.0))[1]
    dash = np.pad(np.full((20, 300), 30.0), 90, constant_values=220)
    assert "several digits, or none" in prepare(dash)[1]
    noise = np.random.default_rng(0).normal(0, 3, (400, 360))
    assert "nothing stands out" in prepare(draw_seven((194, 200)))[1]
    assert "nothing stands out" in prepare(200 + 6 * noise)[1]
    y, x = np.mgrid[:400, :360]
    spot = np.hypot(x - 190, y - 240) < 120
    for dark in spot, np.hypot(x, y) < 120, np.hypot(x, y) < 240, x + y > 290, y > 240:
        for blur in 0.5, 4, 15:
            shadow = 110 * scipy.ndimage.gaussian_filter(dark.astype(float), blur)
            assert prepare(205 + noise - shadow)[1], blur


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_levels_that_are_no_numbers(tmp_path, value):
    path, levels = tmp_path / "float.tif", draw_seven((30, 220)).astype(np.float32)
    levels[0, 0] = value
    Image.fromarray(levels).save(path)
    assert prepare(main.read_photo(path))[1] is None
    Image.fromarray(np.full((50, 50), value, np.float32)).save(path)
    assert "nothing stands out" in prepare(main.read_photo(path))[1]
