"""Several runs together: --seeds and --compare."""

import json
import os
import re
import signal
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import RUNS, complete, run_here
from offline import Archive

import main

SEEDS = "--model=fc", *(flag for flag in RUNS["study"].split() if flag != "--compare")
NAMES = ["cnn-seed-5", "cnn-seed-6", "fc-seed-5", "fc-seed-6"]
MEASURED = "seconds", "train_accuracy", "test_accuracy", "test_loss"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def same(one, other):
    """Whether the weights in two run folders are the same, bit for bit."""
    one, other = (torch.load(folder / "model.pt") for folder in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def get_folders(run_dir):
    return sorted(path.name for path in run_dir.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def study(trained):
    """`--compare --seeds 2`, from seed 5 on, tracked offline; each run has 20 steps."""
    run_dir = trained("study")
    (console,) = run_dir.parents[1].glob("console-*/out")
    return SimpleNamespace(run_dir=run_dir, stdout=console.read_text("utf-8"))


def test_each_run_of_a_study_has_a_folder_of_its_own(study):
    assert study.run_dir.name.endswith("-both")
    assert get_folders(study.run_dir) == NAMES
    assert study.run_dir.name in study.stdout.split("\n")[-2]
    for number, (model, seed) in enumerate(zip(["fc", "cnn"] * 2, "5566")):
        folder = study.run_dir / f"{model}-seed-{seed}"
        settings = read(folder / "config.json")["settings"]
        assert (settings["seed"], settings["seeds"]) == (int(seed), 1)
        assert settings["model"] == model
        assert len(read(folder / "metrics.json")["losses"]) == 20
        assert {"predictions_grid.png", "report.html"} <= set(os.listdir(folder))
        assert f"\nRun {number + 1} of 4: {model}, seed {seed}\n" in "\n" + study.stdout


def get_table(run):
    """Return the table that a study prints: a list of words for each run."""
    lines = run.stdout.split("\n")
    head = next(n for n, line in enumerate(lines) if re.match("model +seed", line))
    names = "model seed parameters seconds train accuracy test accuracy test loss"
    assert lines[head].split() == names.split()
    rows = [line for line in lines[head:] if re.match(r"(fc|cnn) +\d", line)]
    assert {len(row) for row in rows} == {len(lines[head])}  # below each other
    return [row.split() for row in rows]


def test_the_table_has_each_run_as_the_run_has_it(study):
    rows, metrics = get_table(study), read(study.run_dir / "metrics.json")["runs"]
    fc, cnn = ["fc", "101,770"], ["cnn", "124,670"]
    assert [[row[0], row[2]] for row in rows] == [fc, cnn, fc, cnn]
    for shown, row in zip(rows, metrics, strict=True):
        assert shown[:2] == [row["model"], str(row["seed"])]
        own = read(study.run_dir / "{model}-seed-{seed}/metrics.json".format(**row))
        assert f"{row['parameters']:,}" == shown[2]
        assert row["test_accuracy"] == own["test_accuracy"]
        assert row["test_loss"] == own["test_loss"]
        assert row["train_accuracy"] == own["train_accuracy"][-1]
        assert row["seconds"] == pytest.approx(sum(own["epoch_seconds"]))
        numbers = [f"{row['seconds']:.1f}", *(f"{row[n]:.4f}" for n in MEASURED[1:])]
        assert shown[3:] == numbers


def check_means(run, *models):
    """Check the means and standard deviations that a study prints."""
    rows, expected = read(run.run_dir / "metrics.json")["runs"], []
    for model in models:
        values = [row["test_accuracy"] for row in rows if row["model"] == model]
        spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        expected.append(f"{model}, mean test accuracy: {spread}")
    assert re.findall("(?m)^.*mean test accuracy.*$", run.stdout) == expected


def test_means_deviations_and_an_experiment_for_each_run(study):
    check_means(study, "cnn", "fc")
    archives = [Archive(path) for path in study.run_dir.glob("*/*.zip")]
    assert len({archive.key for archive in archives}) == 4
    assert sorted(int(archive.params["seed"]) for archive in archives) == [5, 5, 6, 6]
    assert study.stdout.count("comet upload runs/") == 4


def test_a_stopped_study_goes_on_and_can_get_more_seeds(tmp_path, study, spawn):
    """One of `--seeds 2` alone, to have its table, too."""
    run = spawn(*SEEDS, "--comet", "off")
    run.wait_for(lambda: "Run 2 of 2" in run.stdout)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    assert "Traceback" not in run.stderr
    (command,) = re.findall(r"python main.py --resume (\S+)", run.stderr)
    assert command == f"runs/{run.run_dir.name}"
    assert not (run.run_dir / "metrics.json").exists()
    before = {path: path.read_bytes() for path in run.run_dir.glob("fc-seed-5/*")}
    resumed = complete(tmp_path, "--resume", command, "--seeds=3")
    # What is finished is neither trained, tested nor archived again.
    for text in "Epoch 1/1", "TRAINING COMPLETE":
        assert resumed.stdout.count(text) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert get_folders(resumed.run_dir) == [*NAMES[2:], "fc-seed-7"]
    for name in NAMES[2:]:
        assert same(resumed.run_dir / name, study.run_dir / name)
    assert [row[1] for row in get_table(resumed)] == ["5", "6", "7"]
    check_means(resumed, "fc")
    assert main.main(["--resume", str(resumed.run_dir), "--seeds=2"]) == 2  # not fewer
    assert resumed.json("config.json")["settings"]["seeds"] == 3


def test_the_test_after_each_epoch_changes_no_weight(tmp_path, monkeypatch):
    flags = "--limit=300", "--epochs=2", "--lr=0.1"
    one = run_here(tmp_path / "one", *flags)
    metrics = read(one / "metrics.json")
    assert len(metrics["test_loss_per_epoch"]) == 2
    assert metrics["test_accuracy_per_epoch"][-1] == metrics["test_accuracy"]
    assert metrics["test_loss_per_epoch"][-1] == pytest.approx(metrics["test_loss"])
    evaluate, results = main.evaluate, []

    def evaluate_at_the_end(model, batches, **named):
        results.append(len(results))
        if len(results) <= 2:
            return 0.0, 0.0, None
        return evaluate(model, batches, **named)

    monkeypatch.setattr(main, "evaluate", evaluate_at_the_end)
    assert same(one, run_here(tmp_path / "two", *flags))
    assert len(results) == 3
