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
import torch
from matplotlib.transforms import Bbox
from PIL import Image, ImageOps, features

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


# ----- the preparation


def test_mnist_digits_enlarged_and_saved_are_classified_as_well(model_file):
    images, labels = main.load_mnist(main.DATA_DIR)[2:]
    images, labels = images[:240], labels[:240].tolist()
    prepared = []
    for number, image in enumerate(images.numpy()):
        ways = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
        large = Image.fromarray(image).resize((224, 224), ways[number % 2])
        large = ImageOps.expand(large, (0, 60)[number // 2 % 2])
        large = ImageOps.invert(large) if number // 4 % 2 else large
        file = io.BytesIO()
        large.save(file, ("PNG", "JPEG")[number // 8 % 2], quality=80)
        prepared.append(prepare(np.array(Image.open(file), np.float32)))
    original = classify(model_file, images.numpy())
    found = classify(model_file, [digit for digit, _ in prepared])
    right = sum(a == b for a, b in zip(original, labels))
    again = sum(a == b for a, b in zip(found, labels))
    again -= sum(problem is not None for _, problem in prepared)
    assert right > 220 and again >= right - 3, (right, again)


@pytest.mark.parametrize("kind", photos.KINDS)
def test_ten_drawings_of_each_kind(model_file, kind):
    prepared = [prepare(photos.draw(kind, digit, 1)) for digit in range(10)]
    digits = classify(model_file, [digit for digit, _ in prepared])
    right = sum(
        digit == n and problem is None
        for n, (digit, (_, problem)) in enumerate(zip(digits, prepared))
    )
    assert right >= (4 if kind in ("squared paper", "hard shadow") else 8), digits


@pytest.mark.parametrize("kind", photos.KINDS)
def test_what_is_round_a_digit_changes_little(kind):
    """Frames, lines, light and shadow go: what is left is nearly the same image."""
    plain, _ = prepare(photos.draw("dark on light", 5))
    other, _ = prepare(photos.draw(kind, 5))
    rough = ("pencil", "broken strokes", "hard shadow", "squared paper")
    limit = 30 if kind in rough else 12
    assert abs(plain - other).mean() < limit


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
            centre = (image.sum(axis) * places).sum() / image.sum()
            assert abs(centre - 14) < 0.1
        rows, columns = np.nonzero(image > 50)
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22


@pytest.mark.parametrize("size", [(1, 1), (50, 1), (108, 2), (1, 86), (28, 28)])
def test_tiny_and_narrow_pictures_do_no_harm(size):
    grains = np.random.default_rng(0).integers(0, 256, size).astype(np.float32)
    stroke = np.full(size, 200, np.float32)
    stroke[int(0.4 * size[0]) : int(0.5 * size[0]) + 1, : int(0.6 * size[1]) + 1] = 20
    for picture in (0 * grains, grains, stroke):
        digit, _ = prepare(picture)
        assert digit.shape == (28, 28)


# ----- kinds of files


def save_as(kind, picture, folder):
    """Save grey levels as one kind of file; return its path."""
    grey, path, options = as_image(picture), folder / "digit.png", {}
    if kind == "16 bits":
        grey = Image.fromarray(picture.astype(np.uint16) * 200 + 3000)
    elif kind == "transparent":
        colour = Image.new("RGBA", grey.size, "black")
        colour.putalpha(ImageOps.invert(grey).point(lambda level: max(0, level - 128)))
        grey = colour
    elif kind == "EXIF-turned":
        options = {"exif": Image.Exif(), "quality": 95}
        options["exif"][0x0112] = 6  # show it turned right by 90 degrees
        grey, path = grey.rotate(90, expand=True), folder / "digit.jpg"
    elif kind == "AVIF":
        path = folder / "digit.avif"
    else:
        grey = grey.convert(kind)
    grey.save(path, **options)
    return path


KINDS = ["L", "RGB", "P", "RGBA", "16 bits", "transparent", "EXIF-turned"]
KINDS += ["AVIF"] * features.check("avif")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(tmp_path, kind):
    picture = photos.photograph(photos.place(photos.write(4)), paper=240)
    expected, _ = prepare(picture)
    made, problem = prepare(main.read_photo(save_as(kind, picture, tmp_path)))
    assert problem is None and abs(made - expected).mean() < 5


def test_heic_is_read_or_the_line_says_what_to_install(tmp_path):
    path = tmp_path / "digit.heic"
    picture = photos.draw("dark on light", 4)
    try:
        import pillow_heif
    except ImportError:
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        with pytest.raises(main.UserError, match="pip install pillow-heif"):
            main.read_photo(path)
    else:
        pillow_heif.from_pillow(as_image(picture).convert("RGB")).save(path)
        assert prepare(main.read_photo(path))[1] is None


def test_bad_files_get_a_line_each_and_the_others_an_answer(tmp_path, predict):
    whole = io.BytesIO()
    as_image(photos.draw("dark on light", 3)).save(whole, "PNG")
    (tmp_path / "good.png").write_bytes(whole.getvalue())
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "empty folder").mkdir()
    problems = {
        "missing.png": "No such file or directory",
        "cut.png": "",
        "text.png": "not an image (try JPEG",
        "bomb.png": "exceeds limit",
        "script.eps": "not an image",
        "empty folder/*": "No such file",
        "*.tif": "No such file or directory",
    }
    lines, errors = predict(*problems, "good.png", status=2)
    assert len(errors) == len(problems)
    for error, (name, problem) in zip(errors, problems.items()):
        assert error.startswith(f"main.py: cannot read {name}: ") and problem in error
    assert ANSWER.fullmatch(lines[1])[1] == "good.png"
    assert predict("missing.png", status=2)[0][1:] == []  # and no empty folder
    assert len(list((tmp_path / "runs").iterdir())) == 1


# ----- the command


def test_it_says_and_draws_what_the_network_sees(tmp_path, predict, model_file):
    kinds = "dark on light", "light on dark", "two digits", "nothing"
    for number, kind in enumerate(kinds):
        as_image(photos.draw(kind, 2)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").touch()
    lines, errors = predict(".", "[01].png")
    first, *answers, last = lines
    assert first == f"Model: {model_file}" and errors == []
    names = ["./0.png", "./1.png", "./2.png", "./3.png", "0.png", "1.png"]
    assert [answer.split(": ")[0] for answer in answers] == names
    for answer in answers[:2] + answers[4:]:
        _, best, p, second, q = ANSWER.fullmatch(answer).groups()
        assert best == "2" != second and 50 <= float(p) and float(p) + float(q) < 100.1
    assert answers[2].startswith("./2.png: no answer: several digits")
    assert answers[3].startswith("./3.png: no answer: nothing stands out")
    (picture,) = (tmp_path / "runs").glob("*-predict/predictions.png")
    assert last == f"Picture: {picture.relative_to(tmp_path)}"


@pytest.mark.parametrize("name", ["数字7.png", os.fsdecode(b"seven-\xff.png")])
def test_a_name_in_chinese_or_in_no_encoding(tmp_path, predict, name):
    as_image(photos.draw("dark on light")).save(tmp_path / name)
    lines, errors = predict(name, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert ANSWER.fullmatch(lines[1])[2] == "7" and errors == []
    assert len(list((tmp_path / "runs").glob("*/predictions.png"))) == 1


@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_picture_is_legible(tmp_path, monkeypatch, model_file, count):
    """Titles, bars and their labels overlap nothing, whatever they say."""
    figures, names = [], []
    monkeypatch.setattr(main, "save_figure", lambda figure, _: figures.append(figure))
    for number in range(count):
        names.append(str(tmp_path / f"{'my digits ' * 12}{number}.png"))
        kind = ("dark on light", "two digits", "nothing")[number % 3]
        as_image(photos.draw(kind, number % 10)).resize((90, 100)).save(names[-1])
    flags = "--checkpoint", str(model_file), "--output-dir", str(tmp_path / "runs")
    assert main.main(["--predict", *names, *flags]) == 0
    (figure,) = figures
    figure.draw_without_rendering()
    assert len(figure.axes) == 2 * count
    cells, labels = [], []
    for image, chart in zip(figure.axes[::2], figure.axes[1::2]):
        cells.append(Bbox.union([image.get_tightbbox(), chart.get_tightbbox()]))
        labels.append([text.get_window_extent() for text in chart.texts])
    for one, other in itertools.combinations(cells[:20], 2):
        assert not one.overlaps(other)
    for boxes in labels:
        for one, other in itertools.pairwise(boxes):
            assert not one.overlaps(other)


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
