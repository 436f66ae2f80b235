"""index.html: the overview of all runs, and of a study; and what a run's curves show."""

import json
import re
import shutil
import time
from statistics import mean, stdev

import pytest
from conftest import FAINT, WIDE, read_data

import main

NAMES = {"cnn": "1-cnn", "fc": "2-fc", "accurate": "3-fc", "study": "4-both"}
UNUSED, REPORT = shutil.ignore_patterns("*.png", "*.pt", "*.zip"), "report.html"
LOOKS = "all => all.map((line) => getComputedStyle(line).stroke + line.outerHTML)"
TABLE = """part => [...document.querySelectorAll(`#overview ${part} tr`)].map(
    (row) => [...row.children].map((cell) => cell.innerText.trim()))"""


@pytest.fixture(scope="module")
def overview(trained, tmp_path_factory):
    """The overview of all runs of conftest.RUNS: seven, four of them of a study."""
    root = tmp_path_factory.mktemp("overview") / "runs"
    for name, folder in NAMES.items():
        shutil.copytree(trained(name), root / folder, ignore=UNUSED)
    main.write_overviews(root / NAMES["study"] / "fc-seed-5")
    for path in root / "index.html", root / NAMES["study"] / "index.html":
        text = path.read_text(encoding="utf-8")  # a page just written reloads itself
        path.write_text(re.sub('"written": [0-9.]+', '"written": 1', text), "utf-8")
    return root / "index.html"


@pytest.fixture
def page(open_page, overview):
    return open_page(overview)


def get_rows(page, part="tbody"):
    heads = page.locator("#overview thead button").all_inner_texts()
    return [dict(zip(heads, cells)) for cells in page.evaluate(TABLE, part)]


def get_key(page):
    return page.locator("#key label").all_inner_texts()


def test_each_run_has_its_results_and_only_what_differs(page, overview):
    rows, runs = get_rows(page), read_data(overview)["runs"]
    assert len(rows) == 7 and page.title() == "All runs"
    differs = ["recipe", "model", "epochs", "batch size", "lr", "seed", "limit"]
    measured = ["test loss", "training accuracy", "seconds", "parameters"]
    assert list(rows[0]) == ["run", "state", "test accuracy", *differs, *measured]
    best = max(run["test_accuracy"] for run in runs)
    for row, run in zip(rows, runs, strict=True):
        star = "★ " if run["test_accuracy"] == best else ""
        assert row["test accuracy"] == f"{star}{100 * run['test_accuracy']:.2f} %"
        assert row["test loss"] == f"{run['test_loss']:.4f}"
        assert row["training accuracy"] == f"{100 * run['train_accuracy'][-1]:.2f} %"
        assert row["parameters"] == f"{run['parameters']:,}"
        assert row["limit"] == str(run["settings"]["limit"])
        assert row["state"] == "✓ finished" and row["run"] == run["name"]
        link = page.get_by_role("link", name=run["name"]).get_attribute("href")
        assert (overview.parent / link).samefile(overview.parent / run["name"] / REPORT)
    names = get_key(page)
    assert len(set(names)) == 7 and "cnn, seed 6" in names
    assert "accurate, batch size 64, lr 0.1, limit 2000" in names


def test_a_column_sorts_the_rows_and_the_key(page):
    head = page.get_by_role("button", name="test loss")
    column = page.locator("#overview th[scope=col]", has=head)
    for order, key in (("ascending", "Enter"), ("descending", "Space")):
        before = get_key(page)
        head.press(key)
        losses = [float(row["test loss"]) for row in get_rows(page)]
        assert losses == sorted(losses, reverse=order == "descending")
        assert column.get_attribute("aria-sort") == order
        assert get_key(page) != before and sorted(get_key(page)) == sorted(before)
    page.reload()
    assert [float(row["test loss"]) for row in get_rows(page)] == losses
    assert page.evaluate("document.activeElement.textContent") == "test loss"


def test_lines_are_switched_off_and_found(page):
    lines, labels = page.locator("#charts polyline"), page.locator("#key label")
    assert len(set(labels.locator("line").evaluate_all(LOOKS))) == 7
    name = labels.nth(2).inner_text()
    labels.nth(2).locator("input").focus()
    found = page.locator("#charts .chosen title").all_text_contents()
    assert found == [name, name] and page.locator("#charts .faint").count() == 12
    page.keyboard.press("Space")
    assert name not in page.locator("#charts title").all_text_contents()
    page.reload()
    assert lines.count() == 12 and not labels.nth(2).locator("input").is_checked()
    page.get_by_role("button", name="Hide all").click()
    assert lines.count() == 0 and "switched off" in page.locator("#charts").inner_text()
    page.get_by_role("button", name="Show all").click()
    assert lines.count() == 14 and labels.locator(":checked").count() == 7


def test_a_study_has_the_same_page_with_means(open_page, overview):
    path = overview.parent / NAMES["study"] / "index.html"
    page, runs = open_page(path), read_data(path)["runs"]
    link = page.get_by_role("link", name="All runs").get_attribute("href")
    assert (path.parent / link).resolve() == overview.resolve()
    assert [row["run"] for row in get_rows(page)] == [run["name"] for run in runs]
    assert set(get_key(page)) == {f"{m}, seed {s}" for m in ("cnn", "fc") for s in "56"}
    for model, row in zip(("cnn", "fc"), get_rows(page, "tfoot"), strict=True):
        own = [run for run in runs if run["settings"]["model"] == model]
        values = [100 * run["test_accuracy"] for run in own]
        assert row["run"] == f"{model}: mean ± standard deviation of 2 seeds"
        assert row["test accuracy"] == f"{mean(values):.2f} ± {stdev(values):.2f} %"


def test_many_runs_deleted_runs_and_a_moved_folder(open_page, overview, tmp_path):
    root, source = tmp_path / "runs", overview.parent / NAMES["cnn"]
    metrics = json.loads((source / "metrics.json").read_bytes())
    metrics["losses"] = 24 * metrics["losses"]  # as many as the default run has
    names = [f"20260101-0000{n}-cnn" for n in range(10, 72)]
    for name in names:
        shutil.copytree(source, root / name, ignore=shutil.ignore_patterns(REPORT))
        (root / name / "metrics.json").write_text(json.dumps(metrics))
    start = time.perf_counter()
    for _ in range(9):  # at the start, and after each epoch
        main.write_overviews(root / "a run")
    assert time.perf_counter() - start < 3  # 1 s, if nothing else runs
    assert (root / "index.html").stat().st_size < 2_000_000
    (root / names[5] / "metrics.json").write_text("{")
    shutil.rmtree(root / names[7])
    for name in "2026-the-seed-net", "wide-seed-3":  # no studies
        main.write_overviews(root / name)
    assert not (tmp_path / "index.html").exists()
    root = root.rename(tmp_path / "moved")
    page = open_page(root / "index.html")
    links = page.evaluate("[...document.querySelectorAll('a')].map((a) => a.href)")
    del names[7], names[5]
    assert links == [(root / name / REPORT).as_uri() for name in names[::-1]]
    assert list(get_rows(page)[0])[3] == "test loss"  # no settings differ
    assert page.locator("#charts polyline").count() == 120
    assert len(set(get_key(page))) == 60


def test_it_reloads_while_a_run_trains(open_page, overview, tmp_path):
    data, path = read_data(overview), tmp_path / "index.html"
    run = {**data["runs"][0], "state": "training", "train_accuracy": []}
    run |= {"train_loss": [0.5], "epoch_seconds": [1.0], "settings": {"epochs": 3}}
    del run["test_accuracy"], run["test_loss"]
    data["runs"][0] = run
    main.write_page(path, data)
    page = open_page(path, clock=30)
    assert page.title() == "1 training: All runs" and "epoch 2 of 3" in page.content()
    page.get_by_role("button", name="training accuracy").click()
    assert get_rows(page)[-1]["training accuracy"] == "–"
    run["train_loss"] = 2 * [0.5]
    main.write_page(path, data)
    page.clock.run_for(5_000)
    page.get_by_text("training, epoch 3 of 3").wait_for()
    page.clock.run_for(60_000)
    page.get_by_text("no news, after 2 of 3 epochs").wait_for()
    assert "may have been ended" in page.locator("#news").inner_text()


def test_with_one_run_it_says_what_to_try_next(open_page, overview):
    data = read_data(overview)
    data["runs"] = [run for run in data["runs"] if run["name"] == NAMES["fc"]]
    settings = data["runs"][0]["settings"]
    data["defaults"] = settings | {"limit": 0, "output_dir": "runs"}
    settings["output_dir"] = "my runs"
    command = open_page(data).locator("#command").inner_text()
    assert command == 'python main.py --limit 6000 --output-dir "my runs" --lr 0.1'


def test_layout_contrast_and_print(page):
    views = (1280, "light", "none"), (390, "dark", "none"), (800, "light", "active")
    for width, scheme, forced in views:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme, forced_colors=forced)
        assert page.evaluate(WIDE) == page.evaluate(FAINT) == []
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) <= 2


FALL, OVERFIT = [0.9, 0.3, 0.1, 0.03, 0.01], [0.8, 0.3, 0.2, 0.25, 0.3]
HISTORIES = [  # training loss, test loss, training accuracy, what the page says
    (FALL, OVERFIT, 0.9, "0.2900 above .* after epoch 3 .* has risen .* overfits"),
    (FALL, [0.8, 0.5, 0.4, 0.3, 0.2], 0.9, "0.1900 above .* still falling"),
    (FALL, [0.8, 0.2, 0.3, 0.2, 0.25], 0.9, "lowest after epoch 2 .* not clearly rise"),
    ([0.3, 0.1, 0.1, 0.2, 0.2], [0.8, 0.2, 0.25, 0.3, 0.35], 0.9, "has risen since"),
    (FALL, [0.8, 0.3, 0.2, 0.2, 0.199], 0.9, "levelled off"),
    ([0.9, 0.8], [0.4, 0.4], 0.9, "below the training loss .* a few more epochs"),
    ([0.9, None], [0.4, None], 0.9, "diverged"),
    ([], [], 0.9, "No epoch was finished"),
    ([1, *FALL], [0.11, 0.1, 0.07, 0.06, 0.0575, 0.0548], 0.9, "still falling"),
    ([2.4, 5e3], [2.3, 3e3], 0.1, "hardly learned .* exploded"),
    ([0.9, 0.2, 2.3], [0.4, 0.3, 2.3], 0.5, r"lowest \(0.2000\) in epoch 2 .* lower"),
    ([2.4, 2.3], [2.3, 2.3], 0.1, "hardly learned"),
]


def test_the_page_says_in_a_sentence_what_the_curves_show(open_page, trained):
    page = open_page(trained("cnn") / "report.html")
    script = "([history, recipe]) => describeCurves(history, {recipe}, 'finished')"
    for training, test, accuracy, text in HISTORIES:
        history = {"train_loss": training, "test_loss_per_epoch": test}
        history["train_accuracy"] = [accuracy] * len(training)
        said = page.evaluate(script, [history, "classic"])
        assert re.search(text, said), said
        assert ("overfits" in text) == ("overfits" in said)
        history["test_accuracy_per_epoch"] = [0.8, *history["train_accuracy"][1:]]
        said = page.evaluate(script, [history, "accurate"])
        assert ("label smoothing" in said) == ("epoch 2 (90.00 %)" in said)
        assert "overfits" not in said and "above" not in said
    axis = "makeScales([[1, 0.1], [2, 1e20]], {log: true, end: 0}).high"
    assert page.evaluate(axis) < 3  # one loss that exploded hides no other
    page.evaluate("find('charts').replaceChildren(); showEpochCurves(run)")
    for chart in page.locator("#charts figure").all():
        assert re.search("—— training.*- - - test", chart.inner_text())
        assert len(set(chart.locator(".curve").evaluate_all(LOOKS))) == 2
