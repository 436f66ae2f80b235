"""report.html: in a real browser, with the real networks, drawn on as a person would."""

import base64
import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import main

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is missing: apt-get install chromium"
)
RUNS = {
    "cnn": ("--limit", "10000"),
    "fc": ("--model", "fc", "--limit", "10000"),
    "accurate cnn": ("--recipe", "accurate"),
    "accurate fc": ("--recipe", "accurate", "--model", "fc"),
}
QUIET = "--no-sandbox --disable-gpu --disable-background-networking --no-first-run"

# Digits as strokes, in pixels of the drawing area, 280x280.
DIGITS = {
    0: [[(140 - 55 * np.sin(t), 140 - 85 * np.cos(t)) for t in np.arange(0, 6.4, 0.2)]],
    1: [[(145, 45), (140, 235)]],
    2: [[(85, 85), (110, 52), (160, 50), (185, 85), (165, 135), (80, 225), (205, 222)]],
    3: [
        [(85, 65), (140, 48), (185, 85), (130, 132), (190, 175), (150, 228), (80, 212)]
    ],
    4: [[(105, 50), (80, 150), (205, 150)], [(175, 60), (165, 235)]],
    5: [
        [(190, 50), (105, 52), (95, 125), (155, 120), (190, 165), (150, 225), (80, 215)]
    ],
    6: [
        [(165, 45), (115, 110), (95, 180), (125, 230), (175, 215), (180, 165)]
        + [(140, 145), (100, 175)]
    ],
    7: [[(80, 60), (195, 60), (130, 235)]],
    8: [
        [(180, 75), (140, 48), (105, 80), (140, 130), (185, 180), (140, 232)]
        + [(95, 185), (140, 130), (180, 75)]
    ],
    9: [
        [(180, 90), (140, 50), (98, 80), (115, 130), (165, 125), (182, 85)]
        + [(175, 160), (160, 235)]
    ],
}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=QUIET.split()
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_report(browser, trained):
    """open_report(name or folder, **options): the page; it must cause no error."""
    with contextlib.ExitStack() as stack:
        troubles = []

        def open_page(run, **options):
            folder = trained(*RUNS[run]) if run in RUNS else run
            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: troubles.append(message.text))
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            requests = []
            page.goto((folder / "report.html").as_uri())
            assert [
                url for url in requests if not url.startswith(("file:", "data:"))
            ] == []
            return page

        yield open_page
        assert troubles == []


def draw(page, strokes):
    """Draw strokes with the mouse, in pixels of the drawing area."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    for (x, y), *points in strokes:
        page.mouse.move(box["x"] + x, box["y"] + y)
        page.mouse.down()
        for x, y in points:
            page.mouse.move(box["x"] + x, box["y"] + y, steps=2)
        page.mouse.up()
    settle(page)


def settle(page):
    """Wait until the page has shown what it reads."""
    page.evaluate(
        "new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))"
    )


def answer(page):
    return page.locator("#answer").inner_text()


def seen(page):
    """Return the 28x28 image that the page shows as seen: float tensor."""
    script = "[...find('seen').getContext('2d').getImageData(0, 0, 28, 28).data]"
    return torch.tensor(page.evaluate(script)).view(28, 28, 4)[..., 0].float()


# ----- the network in the page


@pytest.mark.parametrize("name", RUNS)
def test_the_networks_of_main_may_be_drawn_for(open_report, name):
    page = open_report(name)
    assert page.locator("#paper").count() == 1
    assert page.locator("#edited").count() == 0
    filters = 128 if "fc" in name else 24
    assert page.locator("#filters canvas").count() == filters


class Tanh(main.CNN):
    """The same layers, so that only the answers tell."""

    def forward(self, x):
        x = torch.tanh(self.pool2(self.conv2(torch.tanh(self.pool1(self.conv1(x))))))
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class Renamed(main.CNN):
    """Other names, by which the page finds no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = self.conv1, self.fc2
        del self.conv1, self.fc2

    def forward(self, x):
        x = torch.relu(self.pool2(self.conv2(self.pool1(torch.relu(self.first(x))))))
        return self.last(self.relu(self.fc1(self.flatten(x))))


@pytest.mark.parametrize("network", [Tanh, Renamed])
def test_an_edited_network_is_not_drawn_for(
    open_report, monkeypatch, tmp_path, network
):
    """The page says so; all else is there."""
    monkeypatch.setitem(main.MODELS, "cnn", network)
    flags = ["--limit=3000", "--epochs=1", "--lr=0.1", "--device=cpu"]
    run = main.Run(main.read_settings(flags), tmp_path)
    tracker = main.Tracker("off", tmp_path)
    monitor = main.Monitor(run.progress["losses"], tmp_path / "curve.png", tracker)
    run.train(monitor)
    logits = run.predict()
    run.write_report(monitor, logits, run.test(logits))
    page = open_report(tmp_path)
    assert "edited" in page.locator("#edited").inner_text()
    for gone in ("#paper", "#filters", "#maps"):
        assert page.locator(gone).count() == 0
    assert page.locator("#title").inner_text() == "Convolutional network (CNN)"
    assert page.locator("#grid figure").count() == 20
    assert page.locator("#charts svg").count() == 3


@pytest.mark.parametrize("name", RUNS)
def test_the_page_computes_the_logits_of_pytorch(open_report, trained, name):
    page = open_report(name)
    count = 50 if "accurate" in name else 200  # of nine views each
    images = main.load_mnist(main.DATA_DIR)[2][:count]
    text = base64.b64encode(images.numpy().tobytes()).decode()
    script = """([text, length]) => {
        const pixels = bytes(text);
        return Array.from({length}, (_, n) =>
            Array.from(readDigit(pixels.subarray(784 * n, 784 * (n + 1))).logits));
    }"""
    logits = torch.tensor(page.evaluate(script, [text, count]))
    predictor, _ = main.load_predictor(trained(*RUNS[name]))
    with torch.no_grad():
        expected = predictor(main.prepare(images, predictor))
    assert logits.shape == (count, 10)
    assert float((logits - expected).abs().max()) < 1e-3


def test_the_feature_maps_are_those_of_the_network(open_report, trained):
    page = open_report("cnn")
    image = main.load_mnist(main.DATA_DIR)[2][0]
    script = """pixels => {
        const {maps1, maps2, hidden} = readDigit(pixels);
        showMaps({maps1, maps2});
        return [Array.from(maps1), Array.from(maps2), Array.from(hidden)];
    }"""
    maps = [torch.tensor(m) for m in page.evaluate(script, image.flatten().tolist())]
    predictor, _ = main.load_predictor(trained(*RUNS["cnn"]))
    with torch.no_grad():
        first = predictor.conv1(main.prepare(image[None], main.FullyConnectedModel()))
        second = predictor.conv2(predictor.pool1(first).relu())
    assert torch.allclose(maps[0].view(24, 26, 26), first[0].relu(), atol=1e-3)
    assert torch.allclose(maps[1].view(36, 11, 11), second[0].relu(), atol=1e-3)
    assert len(maps[2]) == 128
    assert page.locator("#maps canvas").count() == 24 + 36


# ----- the drawing area


def test_digits_drawn_with_the_mouse_are_read(open_report):
    page = open_report("accurate cnn")
    wrong = {}
    for digit, strokes in DIGITS.items():
        draw(page, strokes)
        if not answer(page).startswith(f"{digit} ("):
            wrong[digit] = answer(page)
        best = page.locator("#chances .best th").all_inner_texts()
        assert wrong.get(digit) or best == [str(digit)]
        page.locator("#clear").click()
    assert wrong == {}


STROKES = {
    **DIGITS,
    "small": [[(20, 20), (50, 22), (30, 70)]],
    "corner": [[(2, 2), (2, 270)]],
    "wide": [[(10, 140), (270, 150)]],
    "dot": [[(140, 140), (141, 141)]],
    "with a speck": [*DIGITS[7], [(20, 260), (20, 260)]],
    "scribble": [[(40, 40), (240, 60), (60, 100), (230, 140), (50, 180), (240, 240)]],
}


@pytest.mark.parametrize("name", STROKES)
def test_page_and_predict_prepare_a_drawing_alike(open_report, tmp_path, name):
    page = open_report("fc")
    draw(page, STROKES[name])
    url = page.evaluate("paper.toDataURL()")
    (tmp_path / "drawing.png").write_bytes(base64.b64decode(url.split(",")[1]))
    with Image.open(tmp_path / "drawing.png") as image:
        assert image.size == (280, 280)
    digit, remark = main.prepare_photo(main.read_photo(tmp_path / "drawing.png"))
    assert remark is None and digit.max() == 255
    assert float((seen(page) - digit).abs().mean()) < 1


def test_several_digits_get_no_answer(open_report, tmp_path):
    page = open_report("accurate cnn")
    draw(page, [[(60, 60), (60, 200)], [(200, 60), (200, 200)]])
    assert answer(page) == "No answer: these are several digits, or none."
    assert page.locator("#chances .best").count() == 0


def test_clear(open_report):
    page = open_report("accurate cnn")
    assert answer(page) == "Draw a digit here."
    draw(page, DIGITS[7])
    assert answer(page).startswith("7 (") and seen(page).max() == 255
    page.get_by_role("button", name="Clear").click()
    settle(page)
    assert answer(page) == "Draw a digit here." and seen(page).max() == 0


def test_drawing_by_keyboard(open_report):
    page = open_report("accurate cnn")
    page.get_by_role("application", name="Drawing area").focus()
    for key, times in [(" ", 1), ("ArrowDown", 18)]:
        for _ in range(times):
            page.keyboard.press(key)
    settle(page)
    assert answer(page).startswith("1 (")
    page.keyboard.press(" ")
    before = seen(page)
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert torch.equal(seen(page), before)  # the pen is up
    page.keyboard.press("Delete")
    settle(page)
    assert answer(page) == "Draw a digit here."
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear"


def test_drawing_with_a_finger(open_report):
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True}
    page = open_report("accurate cnn", **phone, is_mobile=True, device_scale_factor=3)
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    before = page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)

    def send(kind, *points):
        places = [{"x": box["x"] + x, "y": box["y"] + y} for x, y in points]
        event = {"type": kind, "touchPoints": places}
        touch.send("Input.dispatchTouchEvent", event)

    (strokes,) = DIGITS[7]
    send("touchStart", strokes[0])
    for start, end in itertools.pairwise(strokes):
        for part in np.linspace(start, end, 12):
            send("touchMove", part.tolist())
    send("touchEnd")
    settle(page)
    assert answer(page).startswith("7 (")
    assert page.evaluate("scrollY") == before


# ----- the page as a whole


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["cnn", "fc"])
def test_nothing_overflows_in_light_and_dark(open_report, name, scheme, width):
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = open_report(name, **view)
    draw(page, DIGITS[8])
    script = """[...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(script) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3]))  # of 765
    assert brightness > 600 if scheme == "light" else brightness < 150


def test_text_has_contrast(open_report):
    for scheme in ("light", "dark"):
        page = open_report("cnn", color_scheme=scheme)
        script = "n => getComputedStyle(document.documentElement).getPropertyValue(n)"
        names = "--paper", "--text", "--soft", "--blue", "--vermilion"
        paper, *colours = (luminance(page.evaluate(script, n)) for n in names)
        for colour in colours:
            low, high = sorted((paper, colour))
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, level AA


def luminance(colour):
    """Return the relative luminance of #rgb or #rrggbb, as WCAG defines it."""
    digits = colour.strip().lstrip("#")
    digits = "".join(c + c for c in digits) if len(digits) == 3 else digits
    parts = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    r, g, b = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("name", RUNS)
def test_the_page_shows_the_run(open_report, trained, name):
    page, folder = open_report(name), trained(*RUNS[name])
    assert (folder / "report.html").stat().st_size < 1_500_000
    metrics = json.loads((folder / "metrics.json").read_text())
    text = page.locator("body").inner_text()
    assert f"{100 * metrics['test_accuracy']:.2f} %" in text
    assert f"{metrics['test_loss']:.4f}" in text and folder.name in text
    rows = page.locator("#confusion tr").all()[1:]
    table = [row.locator("td").all_inner_texts()[:10] for row in rows]
    table = [[0 if n == "·" else int(n) for n in row] for row in table]
    assert table == metrics["confusion_matrix"]
    wrong = 10_000 - sum(row[n] for n, row in enumerate(table))
    assert page.locator("#wrong figure").count() == min(200, wrong)
    assert page.locator("#grid figure").count() == 20
    count = 24 if "cnn" in name else 128
    assert page.locator("#filters canvas").count() == count
    assert page.locator("#charts svg").count() == 3
    config = json.loads((folder / "config.json").read_text())
    assert page.locator("#command").inner_text() == config["command"]


def test_what_a_screen_reader_hears(open_report):
    page = open_report("cnn")
    nameless = """[...document.querySelectorAll('[role=img], [role=application], button')]
        .filter(e => !e.getAttribute('aria-label') && !e.textContent).length"""
    assert page.evaluate(nameless) == 0
    bare = "[...document.querySelectorAll('canvas')].filter(e => !e.closest('[role]'))"
    assert page.evaluate(f"{bare}.length") == 0
    levels = [h.evaluate("e => e.tagName") for h in page.locator("h1, h2").all()]
    assert levels == ["H1"] + ["H2"] * 8
    draw(page, DIGITS[1])
    assert page.get_by_role("status").inner_text() == answer(page) != ""


def test_a_stopped_run_has_a_page_too(tmp_path, spawn, open_report):
    run = spawn("--limit", 2000, "--epochs", 500, "--comet", "off")
    run.wait_for(lambda: "Epoch 2/500" in run.stdout)
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    page = open_report(run.run_dir)
    assert "stopped before it was tested" in page.locator("#subtitle").inner_text()
    assert page.locator("#confusion").count() == 0
    draw(page, DIGITS[1])
    assert "%" in page.locator("#chances").inner_text()


def test_a_run_stopped_in_its_first_epoch_has_a_page_too(spawn, open_report):
    run = spawn("--epochs", 1, "--comet", "off")
    run.wait_for(lambda: "/938" in run.stderr)
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    page = open_report(run.run_dir)
    assert "No epoch was finished." in page.locator("#charts").inner_text()


def test_without_the_template_all_else_is_made(tmp_path, environment):
    shutil.copy(main.__file__, tmp_path / "main.py")
    flags = [
        "--limit",
        "200",
        "--epochs",
        "1",
        "--comet",
        "off",
        "--batch-size",
        "50",
        "--data-dir",
    ]
    done = subprocess.run(
        [sys.executable, "main.py", *flags, main.DATA_DIR],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0
    assert "report.html is missing: this run gets no report" in done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "metrics.json").exists()
    assert not (run_dir / "report.html").exists()
