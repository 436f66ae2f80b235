"""--predict: photographs and drawings are made like MNIST's images, and read."""

import io
import itertools
import json
import os
import random
import re
import shutil
import statistics
import time

import numpy as np
import pytest
import torch
from photos import FONTS, draw_photo
from PIL import Image, ImageDraw, ImageOps

import main

ACCURATE = "--recipe", "accurate"
CLASSIC = "--optimizer", "adam", "--lr", "0.001"
ANSWER = re.compile(r"(.*): (\d) \((\d+\.\d) %\), then (\d) \((\d+\.\d) %\)")


@pytest.fixture(scope="module")
def mnist():
    return main.load_mnist(main.DATA_DIR)


@pytest.fixture
def seven(tmp_path):
    """A photograph of a seven: the image and its file."""
    image = draw_photo("7", "DejaVuSans", 0)
    image.save(tmp_path / "seven.png")
    return image, tmp_path / "seven.png"


def make_like_mnist(image):
    """Return what prepare_photo makes of a PIL image: (28, 28), remark."""
    return main.prepare_photo(torch.from_numpy(np.array(image.convert("L"), "float32")))


@torch.no_grad()
def read(predictor, digits):
    """Return what a predictor takes uint8 images (N, 28, 28) for: (N,)."""
    return predictor(main.prepare(digits, predictor)).argmax(dim=1)


def differ(a, b):
    """Return by how many grey levels two images differ on average."""
    return float((a.float() - b.float()).abs().mean())


# ----- the preparation


def enlarge(digit, number):
    """Return an MNIST digit (28, 28) as an image file: enlarged, and more by chance."""
    chance = random.Random(number)
    side = 28 * chance.choice([3, 5, 8, 10])
    ways = Image.NEAREST, Image.BILINEAR, Image.BICUBIC, Image.LANCZOS
    image = Image.fromarray(digit.numpy()).resize((side, side), chance.choice(ways))
    if chance.random() < 0.5:
        image = ImageOps.expand(image, chance.choice([10, 50, 150]))
    if chance.random() < 0.5:
        image = ImageOps.invert(image)
    file, name = io.BytesIO(), chance.choice(["PNG", "JPEG"])
    image.save(file, name, **({"quality": 80} if name == "JPEG" else {}))
    return Image.open(file)


@pytest.mark.parametrize("flags", [ACCURATE, CLASSIC])
def test_mnist_digits_enlarged_inverted_padded_are_read_as_well(
    trained, mnist, flags, made_of_mnist
):
    predictor, _ = main.load_predictor(trained(*flags))
    images, labels = mnist[2][:1000], mnist[3][:1000]
    original = int((read(predictor, images) == labels).sum())
    made, refused = made_of_mnist
    right = int(((read(predictor, made) == labels) & ~refused).sum())
    assert original > 900 and right >= original - 5, (original, right, refused.sum())


@pytest.fixture(scope="module")
def made_of_mnist(mnist):
    """1,000 enlarged test digits, made like MNIST's again; and which were refused."""
    made = [make_like_mnist(enlarge(d, n)) for n, d in enumerate(mnist[2][:1000])]
    refused = torch.tensor([remark is not None for _, remark in made])
    return torch.stack([digit for digit, _ in made]), refused


def test_mnist_digits_are_put_back_where_they_were(mnist):
    differences = []
    for digit in mnist[0][:100]:
        image = Image.fromarray(digit.numpy()).resize((280, 280), Image.BOX)
        made, remark = make_like_mnist(ImageOps.expand(image, 100))
        assert remark is None
        differences.append(differ(made, digit))
        for profile in (made.float().sum(dim=d) for d in (0, 1)):
            centre = float((profile * torch.arange(28)).sum() / profile.sum())
            assert abs(centre - 14) < 0.1
        lit = (made > 50).nonzero()
        assert 18 <= (lit.amax(dim=0) - lit.amin(dim=0)).max() + 1 <= 21
    # The archives' own digits are up to a pixel off their centre; half are nearly as here.
    assert statistics.median(differences) < 8


def test_photographs_of_digits_are_read(trained):
    predictor, _ = main.load_predictor(trained(*ACCURATE))
    cases = [(digit, font) for font in FONTS for digit in range(10)]
    made = [make_like_mnist(draw_photo(str(c), font, 1)) for c, font in cases]
    assert [case for case, (_, remark) in zip(cases, made) if remark] == []
    digits = read(predictor, torch.stack([digit for digit, _ in made]))
    wrong = [case for case, d in zip(cases, digits.tolist()) if d != case[0]]
    assert len(wrong) <= 0.1 * len(cases), wrong


def test_place_size_tone_and_light_change_little():
    plain = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(plain).line([(60, 40), (140, 40), (90, 160)], fill=0, width=14)
    made, remark = make_like_mnist(plain)
    assert remark is None
    light = np.linspace(0.6, 1, 200)[None] * np.linspace(1, 0.75, 200)[:, None]
    grain = np.random.default_rng(0).normal(0, 5, (200, 200))
    others = {
        "inverted": ImageOps.invert(plain),
        "moved": ImageOps.expand(plain, (300, 10, 20, 200), fill=255),
        "larger": plain.resize((800, 800), Image.BICUBIC),
        "paler": plain.point(lambda v: 120 + v // 3),
        "uneven light": Image.fromarray((np.asarray(plain) * light).astype("uint8")),
        "noise": Image.fromarray((np.asarray(plain) * 0.9 + grain).clip(0, 255)),
    }
    for name, image in others.items():
        other, remark = make_like_mnist(image)
        assert remark is None and differ(made, other) < 3, (name, remark)


def test_specks_are_left_out():
    image = Image.new("L", (300, 300), 240)
    pencil = ImageDraw.Draw(image)
    pencil.line([(100, 80), (180, 80), (130, 220)], fill=10, width=16)
    alone, _ = make_like_mnist(image)
    pencil.ellipse((20, 20, 26, 26), fill=10)
    pencil.point((290, 295), fill=0)
    made, remark = make_like_mnist(image)
    assert remark is None and differ(alone, made) < 0.5


def test_a_digit_of_two_strokes_is_whole():
    image = Image.new("L", (300, 300), 255)
    pencil = ImageDraw.Draw(image)
    pencil.line([(90, 60), (80, 150), (200, 150)], fill=0, width=14)
    pencil.line([(170, 90), (160, 240)], fill=0, width=14)  # the rest of a 4
    pencil.line([(215, 60), (240, 60)], fill=0, width=14)  # a hat that is not joined
    made, remark = make_like_mnist(image)
    assert remark is None and (made > 100).sum() > 60


# ----- what is no digit


@pytest.mark.parametrize("font", FONTS[:4])
def test_several_digits_get_no_answer(font):
    for number, text in enumerate(("1 2", "4 7", "3 0 5", "2 0 2 4")):
        _, remark = make_like_mnist(draw_photo(text, font, number))
        assert remark == "it holds several digits, or none"


def test_two_mnist_digits_side_by_side_get_no_answer(mnist):
    for left, right in zip(mnist[2][0:40:2], mnist[2][1:40:2]):
        pair = torch.zeros(28, 60, dtype=torch.uint8)
        pair[:, :28], pair[:, 32:] = left, right
        image = Image.fromarray(pair.numpy()).resize((600, 280), Image.BICUBIC)
        assert make_like_mnist(image)[1] == "it holds several digits, or none"


@pytest.mark.parametrize("noise", [0, 3, 30])
def test_an_empty_page_gets_no_answer(noise):
    page = 200 + np.random.default_rng(0).normal(0, noise, (300, 400))
    _, remark = make_like_mnist(Image.fromarray(page.clip(0, 255).astype("uint8")))
    assert remark


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 2), (28, 28), (3, 900)])
def test_tiny_and_narrow_images_do_no_harm(size):
    grains = np.random.default_rng(0).integers(0, 256, size[::-1])
    for values in (grains * 0, grains):
        digit, _ = make_like_mnist(Image.fromarray(values.astype("uint8")))
        assert digit.shape == (28, 28) and digit.dtype == torch.uint8


def test_an_unsure_network_gives_no_answer(tmp_path, spawn, trained):
    pencil = ImageDraw.Draw(image := Image.new("L", (200, 200), 255))
    chance, names, unsure = random.Random(1), [], 0
    for number in range(12):
        points = [
            (chance.randrange(20, 180), chance.randrange(20, 180)) for _ in "1234"
        ]
        image.paste(255, (0, 0, 200, 200))
        pencil.line(points, fill=0, width=9)
        image.save(tmp_path / f"{number}.png")
        names.append(f"{number}.png")
    run = spawn("--predict", *names, "--checkpoint", trained(*ACCURATE) / "model.pt")
    assert run.wait() == 0
    for line in run.stdout.splitlines()[1:-1]:
        sure = ANSWER.fullmatch(line)
        unsure += sure is None
        if sure is None and "looks like no digit" in line:
            assert float(re.search(r"\((.*?) %", line)[1]) < 50
        if sure:
            assert float(sure[3]) >= 50
    assert unsure > 0


# ----- kinds of image files


def save_as(image, kind, path):
    """Save an RGB image as one kind of file; return its path."""
    grey = image.convert("L")
    if kind == "16 bits":
        deep = np.asarray(grey).astype(np.uint16) * 200 + 3000
        image = Image.fromarray(deep)
    elif kind == "float":
        image = Image.fromarray(np.asarray(grey).astype("float32") / 1000)
    elif kind in ("dark on nothing", "light on nothing"):
        image = Image.new("RGBA", image.size, "black" if kind[0] == "d" else "white")
        dark = np.asarray(grey).mean() > 127
        image.putalpha(ImageOps.invert(grey) if dark else grey)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90° to the right
        image = image.rotate(90, expand=True)
        image.save(path.with_suffix(".jpg"), exif=exif, quality=95)
        return path.with_suffix(".jpg")
    else:
        image = image.convert(kind)
    path = path.with_suffix(".tiff" if kind in ("float", "CMYK") else ".png")
    image.save(path)
    return path


KINDS = "L", "LA", "P", "RGBA", "CMYK", "16 bits", "float", "turned"


@pytest.mark.parametrize("kind", [*KINDS, "dark on nothing", "light on nothing"])
def test_every_kind_of_image_is_seen_alike(tmp_path, kind):
    image = draw_photo("4", "DejaVuSans", 3)
    expected, _ = make_like_mnist(image)
    path = save_as(image, kind, tmp_path / "four")
    made, remark = main.prepare_photo(main.read_photo(path))
    assert remark is None and differ(made, expected) < 6


def test_a_large_photograph_is_reduced(tmp_path, seven):
    image = seven[0].resize((3000, 2500), Image.BICUBIC)
    image.save(tmp_path / "large.jpg")
    assert max(main.read_photo(tmp_path / "large.jpg").shape) == 1000


def make_bad(path):
    """Make files that hold no image; return the name of each, and what is said of it."""
    whole = io.BytesIO()
    draw_photo("3", "DejaVuSans", 0).save(whole, "PNG")
    (path / "empty.png").touch()
    (path / "text.png").write_text("not an image")
    (path / "cut.png").write_bytes(whole.getvalue()[:3000])
    flipped = bytearray(whole.getvalue())
    flipped[len(flipped) // 2] ^= 255
    (path / "flipped.png").write_bytes(flipped)
    Image.new("1", (20_000, 10_000)).save(path / "bomb.png")
    (path / "script.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"
    )
    (path / "folder").mkdir()
    os.mkfifo(path / "pipe")
    return {
        "empty.png": "is no image",
        "text.png": "is no image",
        "cut.png": "cannot be read",
        "flipped.png": "cannot be read",
        "bomb.png": "pixels; make it smaller",
        "script.eps": "is no image",
        "folder": "is not a file",
        "pipe": "is not a file",
        "missing.png": "does not exist",
    }


def test_bad_files_get_a_line_each_and_the_others_an_answer(
    tmp_path, spawn, trained, seven
):
    problems = make_bad(tmp_path)
    files = [*problems, "seven.png"]
    run = spawn("--predict", *files, "--resume", trained(*ACCURATE))
    assert run.wait() == 2
    lines = run.stderr.splitlines()
    assert len(lines) == len(problems)
    for line, (name, problem) in zip(lines, problems.items()):
        assert line.startswith(f"main.py: {name} ") and problem in line
    assert ANSWER.search(run.stdout)[1] == "seven.png"


def test_only_bad_files(tmp_path, spawn, trained):
    run = spawn("--predict", "missing.png", "--resume", trained(*ACCURATE))
    assert run.wait() == 2 and "does not exist" in run.stderr
    assert not (tmp_path / "runs").exists()


# ----- the command


def test_predict_prints_and_draws(tmp_path, spawn, trained):
    names = []
    for digit in range(10):
        names.append(f"{digit}.png")
        draw_photo(str(digit), "cmss10", 5).save(tmp_path / names[-1])
    run_dir = trained(*ACCURATE)
    run = spawn("--predict", *names, "--resume", run_dir)
    assert run.wait() == 0 and run.stderr == ""
    first, *answers, last = run.stdout.splitlines()
    assert first == f"Model: {run_dir / 'model.pt'}"
    predictor, _ = main.load_predictor(run_dir)
    for name, line in zip(names, answers):
        digit, _ = main.prepare_photo(main.read_photo(tmp_path / name))
        logits = predictor(main.prepare(digit[None], predictor))
        (p, q), (a, b) = (x[0].tolist() for x in logits.softmax(dim=1).topk(2))
        if p > 0.501:
            assert line == f"{name}: {a} ({100 * p:.1f} %), then {b} ({100 * q:.1f} %)"
    (picture,) = (tmp_path / "runs").glob("*-predict/predictions.png")
    assert last.endswith(str(picture.relative_to(tmp_path)))
    with Image.open(picture) as image:
        assert image.size == (1000, 1200)


@pytest.mark.parametrize("flags", [CLASSIC, (*ACCURATE, "--model", "fc")])
@pytest.mark.parametrize("file", ["model.pt", "checkpoint.pt"])
def test_either_file_of_a_run_reads_as_the_run_did(trained, mnist, flags, file):
    run_dir = trained(*flags)
    predictor, _ = main.load_predictor(run_dir / file)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    wrong = (read(predictor, mnist[2]) != mnist[3]).sum()
    assert abs(float(wrong) - 10_000 * (1 - metrics["test_accuracy"])) < 1.5


@pytest.mark.parametrize("count", [1, 4])
def test_what_it_says_has_room_in_the_picture(count):
    """Each line whole, at its longest, and beside nothing that it could hide."""
    longest = "it looks like no digit; most like 3 (49.9 %), then 8 (48.8 %)"
    names, digits = ["MY_DIGITS/" * 20] * count, np.zeros((count, 28, 28), np.uint8)
    chances = np.full((count, 10), 0.1, np.float32)
    answers = [f"no answer: {longest}", "no answer: it holds several digits, or none"]
    figure = main.draw_readings(names, digits, chances, (2 * answers)[:count])
    main.save_picture(figure)
    titles = [axes._left_title for axes in figure.axes if axes.get_title(loc="left")]
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) == count
    cells = [axes.get_tightbbox() for axes in figure.axes if not axes.images]
    for one, other in itertools.combinations(boxes + cells, 2):
        assert not one.overlaps(other)
    for box in boxes + cells:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_a_checkpoint_that_does_not_exist_is_told(spawn, seven):
    run = spawn("--predict", "seven.png", "--checkpoint", "nowhere/model.pt")
    assert run.wait() == 2
    assert run.stderr == "main.py: --checkpoint: nowhere/model.pt does not exist\n"


def test_the_newest_finished_run_is_taken(tmp_path, trained, seven, spawn):
    model = trained(*ACCURATE) / "model.pt"
    for number, name in enumerate(
        ["b-cnn", "c-compare/fc-seed-0", "a-cnn", "unfinished"]
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "unfinished":
            shutil.copy(model, tmp_path / "runs" / name)
            stamp = time.time() - 100 + number
            os.utime(tmp_path / "runs" / name / "model.pt", (stamp, stamp))
    run = spawn("--predict", "seven.png")
    assert run.wait() == 0 and "Model: runs/a-cnn/model.pt" in run.stdout
    run = spawn("--predict", "seven.png", "--resume", "runs/c-compare")
    assert run.wait() == 0 and "Model: runs/c-compare/fc-seed-0/model" in run.stdout


def test_no_finished_run(spawn, seven):
    run = spawn("--predict", "seven.png")
    assert run.wait() == 2
    assert "no finished run in runs; python main.py makes one" in run.stderr


@pytest.mark.parametrize("content", [b"", b"PK", "json"])
def test_a_checkpoint_that_is_none(tmp_path, spawn, seven, content):
    file = tmp_path / "model.pt"
    if content == "json":
        torch.save({"conv1.weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(content)
    run = spawn("--predict", "seven.png", "--checkpoint", file)
    assert run.wait() == 2
    assert len(run.stderr.splitlines()) == 1 and str(file) in run.stderr


def test_weights_that_are_no_numbers(tmp_path, spawn, seven):
    state = main.FullyConnectedModel().state_dict()
    torch.save({name: tensor * float("nan") for name, tensor in state.items()}, "x.pt")
    shutil.move("x.pt", tmp_path / "x.pt")
    run = spawn("--predict", "seven.png", "--checkpoint", "x.pt")
    assert run.wait() == 2 and "not finite" in run.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--predict"],
        ["--checkpoint", "model.pt"],
        ["--predict", "a.png", "--epochs", "3"],
        ["--predict", "a.png", "--compare"],
        ["--predict", "a.png", "--checkpoint", "m.pt", "--resume", "runs/x"],
    ],
)
def test_flags_that_do_not_go_together(flags, capsys):
    with pytest.raises(main.InputError) as caught:
        main.read_settings(flags)
    assert "--predict" in str(caught.value)


def test_a_picture_of_100_and_no_more(tmp_path, spawn, trained, seven):
    seven[0].resize((60, 60)).save(seven[1])
    files = ["seven.png"] * 103
    run = spawn("--predict", *files, "--resume", trained(*ACCURATE))
    assert run.wait() == 0
    assert len(ANSWER.findall(run.stdout)) == 103
    assert "the first 100 of 103" in run.stdout


def test_a_folder_that_cannot_be_made(tmp_path, spawn, trained, seven):
    (tmp_path / "file").touch()
    flags = "--predict", "seven.png", "--output-dir", "file/x"
    run = spawn(*flags, "--resume", trained(*ACCURATE))
    assert run.wait() == 2 and len(run.stderr.splitlines()) == 1


def test_the_command_itself(tmp_path, run_script, trained, seven):
    done = run_script("--predict", "seven.png", "--resume", trained(*ACCURATE))
    assert done.returncode == 0 and done.stderr == ""
    assert ANSWER.search(done.stdout)[2] == "7"
