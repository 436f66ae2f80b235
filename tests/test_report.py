"""report.html: pages that real runs have written, in a real browser, drawn on."""

import base64
import copy
import io
import itertools
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAINT, ROOT, WIDE, read_data, run_here
from PIL import Image
from test_network import Attention, Residual
from torch import nn

import main

# Strokes in the drawing area, 280x280: "x,y x,y ... / x,y ...".
DIGITS = """0: 140,55 100,80 85,140 100,200 140,225 180,200 195,140 180,80 140,55
1: 145,45 140,235; 4: 105,50 80,150 205,150 / 175,60 165,235; 7: 80,60 195,60 130,235
2: 85,85 110,52 160,50 185,85 165,135 80,225 205,222
3: 85,65 140,48 185,85 130,132 190,175 150,228 80,212
5: 190,50 105,52 95,125 155,120 190,165 150,225 80,215
6: 165,45 115,110 95,180 125,230 175,215 180,165 140,145 100,175
8: 180,75 140,48 105,80 140,130 185,180 140,232 95,185 140,130 180,75
9: 180,90 140,50 98,80 115,130 165,125 182,85 175,160 160,235"""
DIGITS = dict(part.split(": ") for part in re.split("; |\n", DIGITS))
# Also with moved digits, "7@x,y,size": dots, gaps, specks, borders; several, or none.
ONE = """140,140; 140,20 135,262; 7@-80,-80,0.2; 7 / 20,260; 7 / 120,145 190,145
8 / 30,30 / 250,250 / 30,250; 105,50 80,150 205,150 / 175,178 165,235; 140,-20 140,300
100,60 95,125 155,120 190,165 150,225 80,215 / 130,55 190,50; 8@90,0,1; 4@0,90,1
3 / 40,30 70,30; 4@0,0,0.5; 10,140 270,150"""
SEVERAL = """60,60 60,200 / 200,60 200,200; 3@-70,0,0.6 / 4@70,0,0.6
1@0,-70,0.5 / 7@0,70,0.5; 60,100 220,100 / 60,180 220,180; 3@-70,0,0.9 / 2@62,0,0.9"""
ONE, SEVERAL = re.split("; |\n", ONE), re.split("; |\n", SEVERAL)
# In two strokes, 8 and 20 pixels apart: a pen is 22 wide.
GAPS = "95,50 75,150 140,150 / 170,50 165,235; 95,50 75,150 140,150 / 182,50 178,235"
GAPS += "; 190,82 105,84 95,130 160,130 190,165 150,225 80,215 / 105,50 190,50"
GAPS = GAPS.split("; ")


def strokes_of(text):
    """Return strokes, each a list of (x, y)."""
    strokes = []
    for part in text.split("/"):
        digit, _, move = part.strip().partition("@")
        x, y, size = map(float, (move or "0,0,1").split(","))
        for stroke in DIGITS.get(digit, part).split("/"):
            points = [map(float, point.split(",")) for point in stroke.split()]
            points = [(size * (a - 140) + x, size * (b - 140) + y) for a, b in points]
            strokes.append([(140 + a, 140 + b) for a, b in points])
    return strokes


@pytest.fixture(scope="session")
def page_of(trained):
    """page_of(name): the report.html of a finished run of conftest.RUNS."""
    return lambda name: trained(name) / "report.html"


def training(path, epochs, steps, **more):
    """Return what a finished run's page may have had in it while it trained."""
    run = read_data(path)
    run["history"] = {name: part[:epochs] for name, part in run["history"].items()}
    run["snapshots"] = [one for one in run["snapshots"] if one["epoch"] < epochs]
    run |= {"state": "training", "results": {}, "weights_epoch": epochs}
    return run | {"steps_done": steps, "curve": run["curve"][:steps]} | more


def draw(page, text):
    """Draw strokes with the mouse, in pixels of the drawing area."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    for points in strokes_of(text):
        for x, y in points:
            page.mouse.move(box["x"] + x, box["y"] + y)
            page.mouse.down()  # the first time
        page.mouse.up()


def answer(page):
    page.evaluate("read()")
    return page.get_by_role("status").inner_text()


def seen(page):
    """Return the 28x28 image that the page shows as the network's input, once read."""
    pixels = "seen.getContext('2d').getImageData(0, 0, 28, 28).data"
    text = page.evaluate(f"String.fromCharCode(...{pixels})")  # a fast way out
    levels = np.frombuffer(text.encode("latin-1"), np.uint8).reshape(28, 28, 4)
    return torch.tensor(levels[..., 0]).float()


def stays(page):
    page.evaluate("window.same = true")
    page.clock.run_for(60_000)
    return page.evaluate("window.same === true")


def classify(page, images):
    """Return the page's logits for images, uint8 (N, 28, 28)."""
    script = "all => all.map(text => classify([...bytes(text)]).logits)"
    texts = [base64.b64encode(image.numpy()).decode() for image in images]
    return torch.tensor(page.evaluate(script, texts))


@pytest.mark.parametrize("name", ["cnn", "fc", "accurate"])
def test_the_page_computes_the_logits_of_pytorch(open_page, page_of, name):
    page, images = open_page(page_of(name)), main.load_mnist(main.DATA_DIR)[2][:20]
    model, _ = main.load_predictor(page_of(name).parent)
    expected = model(main.normalise(images)).detach()
    assert float((classify(page, images) - expected).abs().max()) < 1e-3
    shown = 24 + 24 + 36 if name == "cnn" else 64 + 64
    assert page.locator("#filters canvas, #maps canvas").count() == shown
    assert page_of(name).stat().st_size < 4_000_000

    run = read_data(page_of(name))  # and if it does not:
    run["check"]["logits"][3][2] += np.nan if name == "fc" else 0.01
    page = open_page(run)
    reason = "diverged" if name == "fc" else "not compute the same as PyTorch"
    assert reason in page.locator("#problem").inner_text()
    assert page.locator("#paper, #maps, #grid figure").count() == 20


class Shortcut(Residual):
    def forward(self, x):
        x = self.first(x)
        return self.fc(self.third(x + self.second(x)).mean(dim=(2, 3)))


class Fourier(main.FullyConnectedModel):
    def forward(self, x):
        return super().forward(torch.fft.fft2(x).abs())


def make_mlp(width):
    layers = nn.Linear(784, width), nn.GELU(), nn.Linear(width, 10)
    return lambda: copy.deepcopy(nn.Sequential(nn.Flatten(), *layers))


NETWORKS = [  # and what the page shows of each, in so many pictures
    (Shortcut, "first.0: 8 feature maps of 28×28, after ReLU", 8 + 8 + 16),
    (Attention, "embed: 1 picture of 28 rows with 32 units each", 1),
    (make_mlp(1600), "1: 1600 units, after gelu", 64),  # in float16
    (make_mlp(3000), "too large", None),
    (Fourier, "fft_fft2", None),
]


@pytest.mark.parametrize(("network", "text", "shown"), NETWORKS)
def test_any_network(open_page, monkeypatch, tmp_path, network, text, shown):
    monkeypatch.setitem(main.MODELS, "cnn", network)
    monkeypatch.setattr(main, "summary", lambda *given, **named: None)
    path = run_here(tmp_path / "runs", "--limit=64", "--epochs=1")
    if shown == 64:
        run_here(tmp_path / "runs", "--resume", path, "--epochs=2")
    page, run = open_page(path / "report.html"), read_data(path / "report.html")
    if run["half"]:  # the check is of the weights that the page has
        model, _ = main.load_predictor(path)
        images = main.normalise(main.load_mnist(main.DATA_DIR)[0][:10])
        expected = model.half().float()(images).detach()
        assert np.allclose(run["check"]["logits"], expected, rtol=0, atol=1e-6)
    assert (path / "report.html").stat().st_size < 8_000_000
    if shown is None:
        problem = page.locator("#problem").inner_text()
        assert text in problem and "main.py --predict" in problem
        assert page.locator("#grid figure").count() == 20
        return
    assert text in page.locator("#maps").inner_text()
    assert page.locator("#maps canvas").count() == shown
    kept = [one["epoch"] for one in run["snapshots"]]
    assert kept == ([] if run["half"] else [0, 1] if shown == 64 else [0])
    images, model = main.load_mnist(main.DATA_DIR)[2][:20], network().eval()
    model.load_state_dict(torch.load(path / "model.pt"))
    model = model.half().float() if run["half"] else model
    expected = model(main.normalise(images)).detach()
    assert float((classify(page, images) - expected).abs().max()) < 1e-3
    if network is Shortcut:  # batch normalisation comes before ReLU
        assert page.evaluate("layers[0].tensor") == 2
    if "100" in text:
        page.get_by_role("button", name="Show 65 to 100 of 100").first.click()
        assert page.locator("#maps canvas:visible").count() == 36


def test_digits_are_drawn_with_mouse_keyboard_and_finger(open_page, page_of):
    page, wrong = open_page(page_of("cnn")), {}
    assert page.locator("canvas").first.get_attribute("id") == "paper"
    for digit in list(DIGITS)[::2]:
        draw(page, digit)
        if not answer(page).startswith(f"{digit} ("):
            wrong[digit] = answer(page)
        page.get_by_role("button", name="Clear").click()
    assert len(wrong) <= 1, wrong  # a short training
    assert answer(page) == "Draw a digit here." and seen(page).max() == 0
    draw(page, SEVERAL[0])
    assert answer(page) == "No answer: more than one digit. Draw only one."
    page.locator("#paper").focus()
    for key in ["Delete", " "] + 18 * ["ArrowDown"] + [" "]:
        page.keyboard.press(key)
    assert answer(page).startswith("1 (")
    before = seen(page)
    page.keyboard.press("ArrowLeft")
    assert answer(page).startswith("1 (")
    assert torch.equal(seen(page), before)  # the pen is up
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear"
    page = open_page(page_of("cnn"), has_touch=True, is_mobile=True)
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#paper").scroll_into_view_if_needed()
    box, before = page.locator("#paper").bounding_box(), page.evaluate("scrollY")
    touch, (points,) = page.context.new_cdp_session(page), strokes_of("7")
    for n, (x, y) in enumerate(points):
        touches = [{"x": box["x"] + x, "y": box["y"] + y}]
        event = {"type": "touchMove" if n else "touchStart", "touchPoints": touches}
        touch.send("Input.dispatchTouchEvent", event)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert answer(page).startswith("7 (") and page.evaluate("scrollY") == before


DRAW = """strokes => {
    clear();
    for (const points of strokes) points.forEach(([x, y], n) =>
        drawTo(n ? {x, y} : Object.assign(place, {x, y})));
    return paper.toDataURL().split(",")[1];
}"""


def test_drawings_are_prepared_as_predict_prepares_the_pixels(open_page, page_of):
    page, wrong = open_page(page_of("fc")), {}
    for text in [*DIGITS, *ONE, *SEVERAL, *GAPS]:
        file = io.BytesIO(base64.b64decode(page.evaluate(DRAW, strokes_of(text))))
        digit, problem = main.prepare_photo(main.read_frame(Image.open(file)))
        is_several = answer(page).startswith("No answer: more than one digit")
        difference = (seen(page) - torch.tensor(digit)).abs().max()
        if (not problem and difference > 1) or is_several is not (text in SEVERAL):
            wrong[text] = float(difference), is_several, problem
    assert wrong == {}


def test_one_pointer_draws_and_a_pen_wins(open_page, page_of):
    page = open_page(page_of("cnn"))
    pen = [("pen", "down", 80, 60), ("pen", "move", 195, 60), ("pen", "move", 130, 235)]
    palm = [("touch", "down", 200, 200), ("touch", "move", 240, 240)]
    script = """events => {
        paper.setPointerCapture = clear() ?? (() => {});
        const {left, top} = paper.getBoundingClientRect();
        for (const [pointerType, name, x, y] of events) {
            const at = {clientX: left + x, clientY: top + y};
            const options = {...at, pointerType, pointerId: pointerType.length};
            paper.dispatchEvent(new PointerEvent(`pointer${name}`, options));
        }
        return paper.toDataURL();
    }"""
    for end in "up", "cancel":
        lift, last = ("touch", end, 240, 240), ("pen", "up", 130, 235)
        orders = [[*pen, last], [*pen[:2], *palm, lift, pen[2], last]]
        orders += [[*palm, *pen[:2], lift, pen[2], last]]  # the palm first
        assert len({page.evaluate(script, events) for events in orders}) == 1
    alone = [*palm, ("touch", "cancel", 240, 240)]  # leaves nothing
    assert page.evaluate(script, alone) == page.evaluate(script, [])


def test_a_browser_that_falsifies_pixels_is_told(open_page, page_of):
    page = open_page(page_of("cnn"))
    noise = "image.data.forEach((_, n) => { image.data[n] = 255 * Math.random(); })"
    page.evaluate(f"""context.getImageData = (...box) => {{
        const image = new ImageData(box[2], box[3]);
        {noise};
        return image;
    }}; clear()""")
    assert "to protect your privacy" in answer(page) and "0 (" not in answer(page)
    page.evaluate("delete context.getImageData; clear()")
    assert answer(page) == "Draw a digit here."


def test_a_server_that_forbids_scripts_shows_why(browser, page_of):
    page, text = browser.new_page(), page_of("cnn").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": "script-src 'self'"}
    page.route("**/*", lambda to: to.fulfill(body=text, headers=headers))
    page.goto("http://127.0.0.1/report.html")
    assert "needs JavaScript" in page.locator("body").inner_text()
    assert page.locator("h2:visible").count() == 0
    page.close()


def test_the_parts_are_short_and_need_no_browser_newer_than_2022():
    new = r"\(\?<[=!]|\.(findLast|toSorted|toReversed|groupBy)\(|:has\(|color-mix"
    for part in (ROOT / "data" / "page").iterdir():
        lines = part.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400 and max(map(len, lines)) <= 100, part
        assert not [line for line in lines if re.search(new, line)]


def test_the_answer_and_what_it_rests_on(open_page, page_of):
    """The map comes when the pen is lifted, in parts; as does a slow answer."""
    page = open_page(page_of("fc"))
    draw(page, "8")
    times = """() => Array.from({length: 20}, () => {
        const start = performance.now();
        return read() ?? performance.now() - start;
    })"""
    assert np.median(page.evaluate(times)) < 50
    page.evaluate("clear()")
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + 60)
    page.mouse.down()
    for x, y in ((195, 60), (130, 235)):
        page.mouse.move(box["x"] + x, box["y"] + y)
    assert answer(page).startswith("7 (") and page.locator("#rests").is_hidden()
    page.mouse.up()
    page.get_by_text("the probability of 7 falls").wait_for()
    most = page.evaluate("""() => {
        const {pixels} = prepareDrawing(), starts = ticks(-4, 26, 15);
        const chance = (image) => toChances(classify(image).logits)[7];
        return Math.max(...starts.flatMap((top) => starts.map((left) => {
            const covered = pixels.map((p, n) => patchAt(top, left).includes(n) ? 0 : p);
            return chance(pixels) - chance(covered);
        })));
    }""")
    note = page.locator("#rests-note").inner_text()
    assert f"up to about {round(100 * most)} percentage" in note, (note, most)
    pixels = "[...find('falls').getContext('2d').getImageData(0, 0, 28, 28).data]"
    levels = np.array(page.evaluate(pixels)).reshape(28, 28, 4)
    orange = levels[..., 0] - levels[..., 2]
    near = F.max_pool2d(seen(page)[None], 9, stride=1, padding=4)[0].numpy()
    assert orange.max() > 100 and not orange[near == 0].any()
    page.evaluate("fastest = 150; explain(prepareDrawing().pixels, 7)")
    assert "takes too long" in page.locator("#rests-note").inner_text()
    page.evaluate("var reads = 0; read = () => { reads += 1; }; 0")
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 200)
    page.wait_for_timeout(400)
    assert page.evaluate("reads") == 0
    page.mouse.up()
    page.wait_for_function("reads === 1")


def test_the_slider_shows_the_network_of_each_epoch(open_page, page_of):
    page, run = open_page(page_of("cnn")), read_data(page_of("cnn"))
    draw(page, "3")
    answer(page)
    model, filters = main.load_predictor(page_of("cnn").parent)[0], []
    for epoch in (3, 2, 1, 0):
        if epoch < 3:
            kept = run["snapshots"][epoch]["weights"]
            for name, weights in model.state_dict().items():
                values = np.frombuffer(base64.b64decode(kept[name]), np.float16)
                weights.copy_(torch.tensor(values).view(weights.shape))
            page.get_by_role("slider").first.focus()
            page.keyboard.press("ArrowLeft")
        expected = model(main.normalise(seen(page)[None])).softmax(dim=1)[0].tolist()
        shown = page.locator("#chances td:last-child").all_inner_texts()
        shown = [float(text.split()[0]) / 100 for text in shown]
        assert shown == pytest.approx(expected, abs=6e-4)
        picture = "document.querySelector('#filters canvas').toDataURL()"
        filters.append(page.evaluate(picture))
    assert len(set(filters)) == 4
    assert "untrained" in page.locator("#rounding").inner_text()
    torch.manual_seed(0)
    assert torch.equal(weights, main.CNN().fc2.bias.half().float())
    page.evaluate("networks[last].rounded = weightsOf(0); chooseNetwork(2); read()")
    assert "can change the answer" in page.locator("#rounding").inner_text()


def test_a_page_reloads_until_the_run_is_finished(open_page, page_of, tmp_path):
    """It keeps its place, and leaves one who uses it alone."""
    path, file = page_of("cnn"), tmp_path / "report.html"
    page = open_page(training(path, 1, 100), clock=70)
    assert "No news" in page.locator("#news").inner_text()
    page.evaluate("scrollTo(0, 99)")
    main.write_page(file, training(path, 1, 235))
    page.clock.run_for(25_000)
    page.wait_for_function("find('progress').ariaValueNow === '83'")
    page.wait_for_function("scrollY === 99")
    assert page.locator("#news, #confusion").first.is_hidden()
    main.write_page(file, training(path, 3, 282, state="finished"))
    page.evaluate("chooseNetwork(0)")
    assert stays(page)
    draw(page, "1")
    page.evaluate("chooseNetwork(last)")
    before = page.evaluate("paper.toDataURL()")
    assert stays(page)  # for the sake of the drawing
    page.get_by_role("button", name="Reload for the latest numbers").click()
    page.get_by_text("✓ finished").wait_for()
    assert stays(page)
    for _ in range(2):  # and when the finished page is reloaded
        page.wait_for_function("before => paper.toDataURL() === before", arg=before)
        page.reload()


def test_a_copy_says_where_the_file_is(open_page, page_of, tmp_path):
    path = tmp_path / "report.html"
    main.write_page(path, training(page_of("fc"), 1, 50))
    page = open_page(shutil.copy(path, tmp_path / "x.html"), 70)
    assert "No news" in page.locator("#news").inner_text()
    for _ in range(3):
        page.clock.run_for(21_000)
        page.wait_for_load_state()
    page.get_by_text("This is a copy from").wait_for()
    assert str(path) in page.locator("#news").inner_text()


def test_a_run_that_is_stopped_or_diverges_says_so(open_page, page_of, spawn):
    run = spawn("--model=fc", "--limit=1000", "--epochs=100", "--comet=off")
    run.wait_for(lambda: list(run.folder.glob("runs/*/checkpoint.pt")))
    page = open_page(run.run_dir / "report.html")
    page.get_by_text(re.compile("training, epoch .* of 100")).wait_for()
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    page.get_by_text(re.compile(r"■ stopped after \d+ of 100 epochs")).wait_for()
    assert "--resume" in page.locator("#live").inner_text()
    assert page.locator("#charts svg").count() == 3
    flags = "--limit=500", "--epochs=2", "--lr=1e9", "--comet=off"
    run = spawn(*flags, "--output-dir=diverged")
    assert run.wait() == 1
    page = open_page(next(run.folder.glob("diverged/*/report.html")), clock=1)
    text = page.locator("#live").inner_text()
    assert "✗ failed in epoch 1 of 2" in text and "diverged" in text
    assert "untrained" in page.locator("#rounding").inner_text() and stays(page)
    message = "the loss is nan </script><b>&amp;"
    page = open_page(training(page_of("fc"), 0, 0, state="failed", message=message))
    assert page.locator("#news").inner_text() == message


def test_layout_contrast_and_print(open_page, page_of):
    page = open_page(page_of("cnn"))
    draw(page, "8")
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(WIDE) == page.evaluate(FAINT) == []
        places = [page.locator(s).bounding_box() for s in (".reached", ".curves")]
        assert (places[0]["y"] == places[1]["y"]) is (width == 1280)
    page.emulate_media(color_scheme="light", forced_colors="active")
    colours = page.evaluate("""() => [document.body, ...document.querySelectorAll(
        '.best .bar, #confusion [style*="/ 0.65"]')]
        .map((one) => getComputedStyle(one).backgroundColor)""")
    assert len(colours) == len(set(colours)) == 3
    page.emulate_media(forced_colors="none")
    for paper in ("A4", "Letter"):
        sheets = re.findall(rb"/Type\s*/Page\b", page.pdf(format=paper))
        assert 2 <= len(sheets) <= 3


def test_the_page_shows_the_run_and_what_is_pointed_at(open_page, page_of):
    page, run = open_page(page_of("cnn")), read_data(page_of("cnn"))
    assert page.locator("#wrong figure").count() == 40
    text, results = page.locator("body").inner_text(), run["results"]
    assert f"{100 * results['test_accuracy']:.2f} %" in text and run["name"] in text
    rows = page.locator("#confusion tr").all()[1:]
    table = [row.locator("td").all_inner_texts()[:10] for row in rows]
    table = [[0 if n == "·" else int(n) for n in row] for row in table]
    assert table == results["confusion_matrix"]
    assert page.locator("#command").inner_text() == run["command"]
    assert page.locator("#settings dd:empty").count() == 0 and "undefined" not in text
    page.locator("#more").click()
    assert page.locator("#wrong figure").count() == len(run["wrong"]["labels"]) > 40
    assert page.locator("canvas:not([aria-label]), button:empty").count() == 0
    labels, chances = run["wrong"]["labels"], run["wrong"]["probabilities"]
    digits = [np.argmax(row) for row in chances]
    pairs = [f"label {label} and prediction {n}" for label, n in zip(labels, digits)]
    cells, pair = page.locator("#confusion [tabindex]"), page.locator("#pair")
    cells.nth(10 * labels[0] + int(pairs[0][-1])).hover()
    assert pairs[0] in pair.inner_text()
    assert pair.locator("canvas").count() == pairs.count(pairs[0])
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    assert "label 1 and prediction 0" in pair.inner_text()
    draw(page, "5")
    maps, zoom = page.locator("#maps canvas"), page.locator("#zoom")
    maps.nth(3).hover()
    assert "Feature map 4 of 24" in zoom.inner_text()
    assert zoom.locator("canvas").count() == 2  # the map, and its filter
    maps.nth(24).focus()
    page.keyboard.press("ArrowRight")
    assert "Feature map 2 of 36" in zoom.inner_text()
    assert zoom.locator("canvas").count() == 1 + 24
