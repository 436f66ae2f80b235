"""Several runs together: --seeds and --compare."""

import json
import os
import re
import signal
import statistics

import numpy as np
import pytest
import torch
from conftest import Run
from fake_comet import FakeComet
from offline import Archive
from PIL import Image

import main

QUICK = ["--limit", 640, "--batch-size", 32, "--epochs", 2]  # 40 steps
NUMBERS = "parameters", "seconds", "train_accuracy", "test_accuracy", "test_loss"


def start(folder, *flags, **more):
    folder.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
    environment |= {"HOME": str(folder), "no_proxy": "*"}
    return Run(list(map(str, flags)), folder, environment | more)


def complete(folder, *flags):
    run = start(folder, *flags)
    assert run.wait() == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder):
    return main.load_tensors(folder / "model.pt")


def same(one, other):
    return list(one) == list(other) and all(
        map(torch.equal, one.values(), other.values())
    )


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """`--seeds 3`, from seed 5 on, tracked offline."""
    folder = tmp_path_factory.mktemp("seeds")
    return complete(folder, *QUICK, "--seeds", 3, "--seed", 5, "--comet", "offline")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`--compare --seeds 2`."""
    folder = tmp_path_factory.mktemp("both")
    flags = "--limit", 2000, "--epochs", 1, "--optimizer", "adam", "--lr", 0.001
    return complete(folder, *flags, "--compare", "--seeds", 2, "--comet", "off")


# ----- --seeds


def test_each_seed_has_a_whole_run_of_its_own(seeds):
    folders = sorted(path.name for path in seeds.run_dir.iterdir() if path.is_dir())
    assert folders == ["cnn-seed-5", "cnn-seed-6", "cnn-seed-7"]
    for seed, name in zip((5, 6, 7), folders):
        folder = seeds.run_dir / name
        assert read(folder / "config.json")["settings"]["seed"] == seed
        assert len(read(folder / "metrics.json")["losses"]) == 40
        assert (folder / "predictions_grid.png").exists()
        assert f"\nRun {seed - 4} of 3: cnn, seed {seed}\n" in "\n" + seeds.stdout


def test_a_run_among_several_is_the_run_alone(seeds, tmp_path):
    alone = complete(tmp_path, *QUICK, "--seed", 6, "--comet", "off")
    member = seeds.run_dir / "cnn-seed-6"
    assert same(weights(alone.run_dir), weights(member))
    assert not same(weights(alone.run_dir), weights(seeds.run_dir / "cnn-seed-5"))
    one, other = alone.json("metrics.json"), read(member / "metrics.json")
    del one["epoch_seconds"], other["epoch_seconds"]
    assert one == other


def test_the_metrics_of_the_whole_are_those_of_the_runs(seeds):
    metrics = seeds.json("metrics.json")
    assert [(row["model"], row["seed"]) for row in metrics["runs"]] == [
        ("cnn", 5),
        ("cnn", 6),
        ("cnn", 7),
    ]
    for row in metrics["runs"]:
        own = read(seeds.run_dir / f"cnn-seed-{row['seed']}" / "metrics.json")
        assert row["test_accuracy"] == own["test_accuracy"]
        assert row["test_loss"] == own["test_loss"]
        assert row["train_accuracy"] == own["train_accuracy"][-1]
        assert row["seconds"] == pytest.approx(sum(own["epoch_seconds"]))
        assert row["parameters"] == 124_670
    for name in NUMBERS:
        values = [row[name] for row in metrics["runs"]]
        spread = metrics["several"]["cnn"][name]
        assert spread["mean"] == pytest.approx(statistics.mean(values))
        assert spread["standard_deviation"] == pytest.approx(statistics.stdev(values))
    assert metrics["several"]["cnn"]["test_loss"]["standard_deviation"] > 0


def test_the_table_has_a_row_a_seed_and_their_mean(seeds):
    metrics = seeds.json("metrics.json")
    rows = re.findall(r"^cnn +(\d+|mean) +(.+)$", seeds.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["5", "6", "7", "mean"]
    for (_, text), row in zip(rows, metrics["runs"]):
        assert f" {row['test_accuracy']:.4f} " in text
        assert text.endswith(f" {row['test_loss']:.4f}")
    for name in ("test_accuracy", "test_loss", "train_accuracy"):
        spread = metrics["several"]["cnn"][name]
        assert (
            f"{spread['mean']:.4f} ± {spread['standard_deviation']:.4f}" in rows[-1][1]
        )
    table = seeds.stdout[seeds.stdout.index("\nmodel seed") :].split("\n")[1:6]
    assert {len(line) for line in table} == {80}, table


def test_comet_gets_an_experiment_a_seed_with_one_tag(seeds):
    archives = [Archive(path) for path in seeds.run_dir.glob("*/*.zip")]
    assert len({archive.key for archive in archives}) == 3
    assert sorted(archive.params["seed"] for archive in archives) == [5, 6, 7]
    assert all(archive.tags == [seeds.run_dir.name] for archive in archives)
    assert all(len(archive.metrics["loss"]) == 40 for archive in archives)
    assert seeds.stdout.count("comet upload runs/") == 3


def test_online_each_seed_is_an_experiment_too(tmp_path):
    with FakeComet() as server:
        of_comet = {"COMET_API_KEY": "k" * 25, "COMET_URL_OVERRIDE": server.url}
        flags = *QUICK, "--model", "fc", "--seeds", 2
        run = start(tmp_path, *flags, **of_comet)
        assert run.wait() == 0, run.stderr
    assert len(server.experiments) == 2
    seeds = [p["parameterValue"] for p in server.params if p["parameterName"] == "seed"]
    assert sorted(map(int, seeds)) == [0, 1]
    tags = [body for *_, body in server.requests if run.run_dir.name in str(body)]
    assert len(tags) >= 2
    metrics = run.json("metrics.json")
    found = {value for _, value in server.metric("test_accuracy")}
    assert found == {row["test_accuracy"] for row in metrics["runs"]}
    assert not any(run.run_dir.glob("*/*.zip"))


# ----- --compare


def test_both_models_are_trained_and_stand_side_by_side(both):
    assert both.run_dir.name.endswith("-compare")
    rows = re.findall(r"^(fc|cnn) +(\d+|mean) +([\d.]+) ", both.stdout, re.MULTILINE)
    assert rows == [
        ("fc", "0", "101770"),
        ("cnn", "0", "124670"),
        ("fc", "1", "101770"),
        ("cnn", "1", "124670"),
        ("fc", "mean", "101770"),
        ("cnn", "mean", "124670"),
    ]
    assert sorted(both.json("metrics.json")["several"]) == ["cnn", "fc"]


def test_the_pictures_of_a_comparison_can_be_read(both):
    for name in ("loss_curves", "only_cnn_right", "only_fc_right"):
        with Image.open(both.run_dir / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert 300 <= min(pixels.shape[:2]) and max(pixels.shape[:2]) <= 1400
        assert (pixels < 128).any() and (pixels > 250).all(axis=2).mean() > 0.1


def test_the_digits_that_only_one_reads_are_those(both, mnist_test):
    images, labels = mnist_test
    found = {}
    for name in ("fc", "cnn"):
        model = main.MODELS[name]()
        model.load_state_dict(torch.load(both.run_dir / f"{name}-seed-0" / "model.pt"))
        with torch.no_grad():
            logits = model(main.prepare(images, model))
        found[name] = {"model": name, "logits": logits}
        found[name] |= {"labels": labels, "images": images}
    figure = main.draw_contrast(wrong=found["fc"], right=found["cnn"])
    right = {name: row["logits"].argmax(dim=1) == labels for name, row in found.items()}
    expected = (right["cnn"] & ~right["fc"]).nonzero().flatten()[:20].tolist()
    assert len(expected) == 20
    (axes,) = figure.axes
    *texts, title = (text.get_text() for text in axes.texts)
    assert title.startswith("CNN reads them right, FullyConnectedModel")
    for image, text, number in zip(axes.images, texts, expected, strict=True):
        assert np.array_equal(image.get_array(), images[number])
        digit = int(found["fc"]["logits"][number].argmax())
        assert f"✗ predicted {digit} " in text
        assert f"true label {int(labels[number])}" in text


@pytest.fixture(scope="module")
def mnist_test():
    return main.load_mnist(main.DATA_DIR)[2:]


def test_compare_without_seeds_prints_no_mean(tmp_path):
    flags = "--limit", 128, "--epochs", 1, "--comet", "off", "--compare"
    run = complete(tmp_path, *flags)
    rows = re.findall(r"^(fc|cnn) +(\w+) ", run.stdout, re.MULTILINE)
    assert rows == [("fc", "0"), ("cnn", "0")]
    assert run.json("metrics.json")["several"] == {}
    names = {path.name for path in run.run_dir.glob("*.png")}
    assert names == {"loss_curves.png", "only_cnn_right.png", "only_fc_right.png"}


# ----- stopping


def test_a_stopped_study_goes_on_where_it_stopped(tmp_path, both):
    flags = "--limit", 2000, "--epochs", 1, "--optimizer", "adam", "--lr", 0.001
    flags = *flags, "--compare", "--seeds", 2, "--comet", "off"
    run = start(tmp_path, *flags)
    run.wait_for(lambda: "Run 3 of 4" in run.stdout)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    assert "Traceback" not in run.stderr
    (command,) = re.findall(r"python main.py --resume (\S+)", run.stderr)
    assert command == f"runs/{run.run_dir.name}"
    assert not (run.run_dir / "metrics.json").exists()
    before = weights(run.run_dir / "cnn-seed-0")

    resumed = complete(tmp_path, "--resume", command)
    assert same(before, weights(run.run_dir / "cnn-seed-0"))
    for name in ("fc-seed-0", "cnn-seed-0", "fc-seed-1", "cnn-seed-1"):
        assert same(weights(resumed.run_dir / name), weights(both.run_dir / name))
    one, other = resumed.json("metrics.json"), both.json("metrics.json")
    for row in one["runs"] + other["runs"]:
        del row["seconds"]
    assert one["runs"] == other["runs"]


def test_a_ctrl_c_at_the_end_of_a_run_ends_the_study(tmp_path):
    flags = "--limit", 640, "--epochs", 1, "--model", "fc", "--seeds", 2
    run = start(tmp_path, *flags, "--comet", "offline")
    run.wait_for(lambda: any(tmp_path.glob("runs/*/fc-seed-0/metrics.json")))
    run.kill(signal.SIGINT)  # while its archive is written
    assert run.wait() == 130, run.stderr
    assert "Run 2" not in run.stdout
    assert f"python main.py --resume runs/{run.run_dir.name}\n" in run.stderr
    (path,) = run.run_dir.glob("fc-seed-0/*.zip")
    assert len(Archive(path).metrics["loss"]) == 10


def test_a_study_that_cannot_begin_leaves_nothing(tmp_path):
    run = start(tmp_path, "--seeds", 2, "--comet", "online")
    assert run.wait() == 2 and "there is no API key" in run.stderr, run.stderr
    assert run.stderr.count("\n") == 1
    assert not any((tmp_path / "runs").iterdir())


def test_a_run_that_goes_wrong_ends_the_study(tmp_path):
    flags = "--limit", 640, "--epochs", 1, "--lr", 1e6, "--seeds", 2, "--comet", "off"
    run = start(tmp_path, *flags)
    assert run.wait() == 1, run.stderr
    assert "training went wrong" in run.stderr and "Run 2" not in run.stdout
