"""report.html: pages that real runs have written, in a real browser, drawn on."""

import base64
import io
import itertools
import json
import re
import shutil
import signal
import time

import numpy as np
import photos
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

import main

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
QUIET += ["--in-process-gpu"]  # a process less
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
# Also with moved digits, "7@x,y,size": specks, gaps, borders, frames; several, or none.
ONE = """140,140; 140,20 135,262; 7@-80,-80,0.2; 7 / 20,260; 0 / 140,140; 7 / 120,145 190,145
8 / 30,30 / 250,250 / 30,250; 105,50 80,150 205,150 / 175,178 165,235; 140,-20 140,300
100,60 95,125 155,120 190,165 150,225 80,215 / 130,55 190,50; 8@90,0,1; 4@0,90,1
275,100 275,180 / 2; 5@70,0,1 / 255,20 290,20; 3 / 5,5 60,5; 0@0,0,1.4 / 7@0,0,0.35
20,20 260,20 260,260 20,260 20,20 / 3@0,0,0.7"""
SEVERAL = """60,60 60,200 / 200,60 200,200; 3@-70,0,0.6 / 4@70,0,0.6; 10,140 270,150
1@0,-70,0.5 / 7@0,70,0.5; 60,100 220,100 / 60,180 220,180"""
ONE, SEVERAL = re.split("; |\n", ONE), re.split("; |\n", SEVERAL)


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


def read_data(path):
    """Return what main.py has put into a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search('id="run">(.*?)</script>', text)[1])


def training(path, epochs, steps, **more):
    """Return what a finished run's page may have had in it while it trained."""
    run = read_data(path)
    run["history"] = {name: part[:epochs] for name, part in run["history"].items()}
    run["snapshots"] = [one for one in run["snapshots"] if one["epoch"] < epochs]
    run |= {"state": "training", "results": {}, "weights_epoch": epochs}
    return run | {"steps_done": steps, "curve": run["curve"][:steps]} | more


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        # A page that stays open: Chromium keeps its process for the next ones.
        browser.new_context().new_page().goto((ROOT / "data" / "report.html").as_uri())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(path or data): the page. No message, no request to anywhere."""
    troubles, opened, path = [], [], tmp_path / "report.html"

    def go(run, clock=None, **options):
        if isinstance(run, dict):
            main.write_page(tmp_path, dict(run), run["state"])
        context = browser.contexts[0]
        if options or clock is not None:  # a context of its own
            context = browser.new_context(**options)
            opened.append(context)
        page = context.new_page()
        opened.append(page)
        if clock is not None:  # seconds after the page was written
            page.clock.install(time=time.time() + clock)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url))
        page.goto((path if isinstance(run, dict) else run).as_uri())
        return page

    yield go
    for one in reversed(opened):
        one.close()
    assert not [text for text in troubles if not re.match("file:|data:|blob:", text)]


def draw(page, text):
    """Draw strokes with the mouse, in pixels of the drawing area."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    for points in strokes_of(text):
        for x, y in points:
            page.mouse.move(box["x"] + x, box["y"] + y)
            page.mouse.down()  # the first time
        page.mouse.up()


def as_text(content):
    """Return bytes as base64: a list of numbers takes Playwright long."""
    return base64.b64encode(content).decode()


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


@pytest.mark.parametrize("name", ["cnn", "fc", "accurate"])
def test_the_page_computes_the_logits_of_pytorch(open_page, page_of, name):
    page, images = open_page(page_of(name)), main.load_mnist(main.DATA_DIR)[2][:20]
    script = "all => all.map(text => [...readDigit([...bytes(text)]).logits])"
    logits = torch.tensor(page.evaluate(script, [as_text(x.numpy()) for x in images]))
    model, _ = main.load_predictor(page_of(name).parent)
    expected = model(main.normalise(images)).detach()
    assert float((logits - expected).abs().max()) < 1e-3
    count = 24 + 24 + 36 if name == "cnn" else 128 + 128
    assert page.locator("#filters canvas, #maps canvas").count() == count

    run = read_data(page_of(name))  # and if it cannot:
    run["check"]["logits"][3][2] += np.nan if name == "fc" else 0.1  # edited layers
    page = open_page(run)
    reason = "diverged" if name == "fc" else "edited"
    assert reason in page.locator("#edited").inner_text()
    assert page.locator("#paper, #filters, #maps, #grid figure").count() == 20


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


def test_drawings_are_prepared_as_predict_prepares_the_pixels(open_page, page_of):
    page, wrong = open_page(page_of("fc")), {}
    script = """strokes => {
        clear();
        for (const points of strokes) points.forEach(([x, y], n) =>
            drawTo(n ? {x, y} : Object.assign(place, {x, y})));
        return paper.toDataURL().split(",")[1];
    }"""
    for text in [*DIGITS, *ONE, *SEVERAL]:
        file = io.BytesIO(base64.b64decode(page.evaluate(script, strokes_of(text))))
        digit, problem = main.prepare_photo(main.read_photo(file))
        is_several = answer(page).startswith("No answer: more than one digit")
        difference = float((seen(page) - torch.tensor(digit)).abs().max())
        if difference > 1 or {is_several, problem is not None} != {text in SEVERAL}:
            wrong[text] = difference, is_several, problem
    assert wrong == {}


def test_opened_pictures_are_read_as_predict_reads_them(open_page, page_of):
    """Fifty pictures, on paper and on boards (photos.py); ink on nothing; no picture."""
    page, other = open_page(page_of("fc")), {}
    model, _ = main.load_predictor(page_of("fc").parent)
    kinds = "dark on light", "light on dark", "frame", "broken strokes", "pencil"
    pictures = [photos.draw(kind, digit) for kind in kinds for digit in range(10)]
    pictures = [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]
    ink = Image.new("L", (800, 600))
    ImageDraw.Draw(ink).line(strokes_of("7@200,150,1")[0], 255, 30, "curve")
    papers = [Image.new("L", ink.size, grey) for grey in (0, 255, 99)]
    pictures += [Image.merge("LA", (paper, ink)) for paper in papers[:2]] + papers[2:]
    script = """async content => {
        await openPicture(new File([bytes(content)], "x.png"));
        await new Promise(requestAnimationFrame);  // after the page's own
        const cells = [...find("chances").querySelectorAll("td:last-child")];
        const digit = best(cells.map((cell) => parseFloat(cell.textContent)));
        return [digit, find("answer").textContent];
    }"""
    for n, picture in enumerate(pictures):
        file = io.BytesIO()
        picture.save(file, "PNG")
        digit, text = page.evaluate(script, as_text(file.getvalue()))
        image, problem = main.prepare_photo(main.read_photo(file))
        expected = int(model(main.normalise(torch.tensor(image)[None])).argmax())
        refused = text.startswith(("No answer: more than one", "No answer: no digit"))
        if refused != bool(problem) or (digit != expected and not problem):
            other[n] = text, expected, problem
    assert len(other) <= 1 and "contrast" in text, other
    page.evaluate("""var data = new DataTransfer();
        data.items.add(new File(["no picture"], "x.png"));
        paper.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));""")
    page.get_by_text("not a picture").wait_for()
    grey = {"name": "x.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.set_input_files("#file", grey)
    page.get_by_text("contrast").wait_for()


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
        filters.append(page.evaluate("find('filters').children[0].toDataURL()"))
    assert len(set(filters)) == 4
    assert "untrained" in page.locator("#rounding").inner_text()
    torch.manual_seed(0)
    assert torch.equal(weights, main.CNN().fc2.bias.half().float())
    page.evaluate("networks[last].rounded = weightsOf(0); chooseNetwork(2); read()")
    assert "can change the answer" in page.locator("#rounding").inner_text()


def test_a_real_run_is_watched_while_it_trains(open_page, spawn):
    """The page reloads, keeps its place, leaves a drawing alone, and ends."""
    run = spawn("--limit=2000", "--epochs=4", "--lr=0.05", "--comet=off")
    run.wait_for(lambda: list(run.folder.glob("runs/*/report.html")))
    run.kill(signal.SIGSTOP)  # it is as slow as we want it
    path = run.run_dir / "report.html"
    assert f"Report: {path.relative_to(run.folder)}" in run.stdout
    page = open_page(path)
    page.get_by_text("training, epoch 1 of 4").wait_for()
    page.evaluate("scrollTo(0, 99)")
    run.kill(signal.SIGCONT)
    run.wait_for(lambda: read_data(path)["weights_epoch"] > 0)
    run.kill(signal.SIGSTOP)
    page.get_by_text("training accuracy, epoch").wait_for()
    page.wait_for_function("scrollY === 99")
    assert "test accuracy" not in page.locator("main").inner_text()
    draw(page, "1")
    before = page.evaluate("paper.toDataURL()")
    run.kill(signal.SIGCONT)
    assert run.wait() == 0, run.stderr
    page.wait_for_timeout(4100)
    assert "training" in page.title()  # for the sake of the drawing
    page.get_by_role("button", name="Reload for the latest numbers").click()
    page.get_by_text("test accuracy", exact=True).wait_for()
    page.wait_for_function("before => paper.toDataURL() === before", arg=before)


def test_a_page_reloads_until_the_run_is_finished(open_page, page_of, tmp_path):
    path = page_of("cnn")
    page = open_page(training(path, 1, 100), clock=70)
    assert "No news" in page.locator("#news").inner_text()
    main.write_page(tmp_path, training(path, 1, 235), "training")
    page.clock.run_for(25_000)
    page.wait_for_function("find('progress').ariaValueNow === '83'")
    assert page.locator("#news, #confusion").first.is_hidden()
    main.write_page(tmp_path, training(path, 3, 282), "finished")
    for use in ("find('paper').focus()", "chooseNetwork(0)"):
        page.evaluate(use)
        assert stays(page)
        page.evaluate("document.activeElement.blur(); chooseNetwork(last)")
    page.clock.run_for(25_000)
    page.get_by_text("✓ finished").wait_for()
    assert stays(page)


def test_a_run_that_is_stopped_or_diverges_says_so(open_page, page_of, spawn):
    run = spawn("--model=fc", "--limit=1000", "--epochs=100", "--comet=off")
    run.wait_for(lambda: list(run.folder.glob("runs/*/checkpoint.pt")))
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    page = open_page(run.run_dir / "report.html", clock=1)
    text = page.locator("#live").inner_text()
    assert re.search(r"■ stopped after \d+ of 100 epochs", text) and "--resume" in text
    assert page.locator("#charts svg").count() == 3 and stays(page)
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


WIDE = "document.documentElement.scrollWidth > innerWidth ? ['wide'] : []"
FAINT = """() => {  // WCAG 2.2, level AA: every text, over all the backgrounds behind it
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (colour) => colour.slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((total, c, n) => total + c * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = (e) => {
        const [r, g, b, a = 1] = numbers(getComputedStyle(e).backgroundColor);
        if (a === 1 || !e.parentElement) return [r, g, b];
        return behind(e.parentElement).map((c, n) => a * [r, g, b][n] + (1 - a) * c);
    };
    return [...document.querySelectorAll('body *')].filter((e) => {
        const isText = (n) => n.nodeType === 3 && n.data.trim();
        if (![...e.childNodes].some(isText) || !e.getClientRects().length) return false;
        const {color, fill} = getComputedStyle(e);
        const one = light(numbers(e.closest("svg") ? fill : color)), two = light(behind(e));
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05) < 4.5;
    }).map((e) => e.outerHTML.slice(0, 80));
}"""


@pytest.mark.parametrize("name", ["cnn", "fc", "study"])
def test_layout_contrast_and_print(open_page, page_of, name):
    page = open_page(page_of(name))
    if name != "study":
        draw(page, "8")
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(WIDE) == page.evaluate(FAINT) == []
        places = [page.locator(s).bounding_box() for s in (".reached", ".curves")]
        assert (places[0]["y"] == places[1]["y"]) is (width == 1280)
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
    labels, digits = (
        run["wrong"]["labels"],
        map(np.argmax, run["wrong"]["probabilities"]),
    )
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


def test_a_study_has_a_page(open_page, page_of):
    path = page_of("study")
    page, study = open_page(path), read_data(path)
    for link in page.locator("#runs a").all():
        assert (path.parent / link.get_attribute("href")).is_file()
    values = [100 * r["test_accuracy"] for r in study["runs"][::2]]
    expected = [np.mean(values), np.std(values, ddof=1)]
    cell = page.locator("#runs .mean").first.locator("td").nth(4).inner_text()
    assert [*map(float, cell.split()[::2])] == pytest.approx(expected, abs=0.011)
    assert page.locator("#charts polyline").count() == 4
    assert page.locator(".contrast canvas").count() == 20 + 20
    more, fewer = ({**study["wrong"][0]} for _ in range(2))
    for name in "labels", "probabilities", "numbers":  # the images need not fit
        more[name], fewer[name] = more[name][:15], more[name][5:15]
    page = open_page(study | {"wrong": [more, fewer]})
    sections = page.locator(".contrast").all()
    assert [section.locator("canvas").count() for section in sections] == [5, 0]
    assert "Only the CNN" in sections[0].inner_text()
    page = open_page(study | {"state": "training", "runs": study["runs"][:3]})
    assert page.locator("#state").inner_text() == "training, run 4 of 4"


def test_an_axis_has_numbers_and_the_page_is_small(open_page, page_of, tmp_path):
    page = open_page(training(page_of("fc"), 1, 0))
    for curve in ([2.3, 2.1], [2.3], [9e-5, *99_998 * [1], 40]):
        main.write_page(
            tmp_path, training(page_of("fc"), 1, 0, curve=curve), "training"
        )
        page.reload()
        numbers = page.locator("#charts svg").first.locator("[text-anchor=end]")
        assert numbers.count() >= 2
    run = training(page_of("cnn"), 3, 99, curve=10_000 * [0.3333])
    run["snapshots"] = 8 * run["snapshots"][:1]
    run["wrong"] = {"images": "A" * 209_068, "probabilities": 200 * [10 * [0.1234]]}
    main.write_page(tmp_path, run, "training")
    assert (tmp_path / "report.html").stat().st_size < 4_000_000
    template = ROOT / "data" / "report.html"
    lines = template.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 900 and max(map(len, lines)) <= 160
