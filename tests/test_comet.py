"""What is tracked on Comet: in an offline archive, and by a server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Run
from fake_comet import FakeComet
from offline import Archive

import main

SCRIPT = Path(main.__file__)
SMALL = "--model", "fc", "--limit", 200, "--epochs", 1
PICTURES = (
    *("loss_curve", "sample_prediction", "single_prediction", "predictions_grid"),
    *("worst_mistakes", "confusion_matrix"),
)
KEY = "k3y" * 9


def clean_environment(home):
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("COMET", "PYTHON"))
    }
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home), "no_proxy": "*"}


def complete(folder, *arguments, **more):
    """Run main.py in a folder of its own, to its good end; see conftest.Run."""
    run = Run(list(map(str, arguments)), folder, clean_environment(folder) | more)
    try:
        assert run.wait() == 0, run.stderr
    finally:
        run.process.kill()
    return run


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run of 2 x 938 steps, with several loss curves, and its archive."""
    folder = tmp_path_factory.mktemp("offline")
    flags = "--limit", 30_000, "--batch-size", 32, "--epochs", 2
    run = complete(folder, *flags, "--comet", "offline")
    (path,) = run.run_dir.glob("*.zip")
    metrics = run.json("metrics.json")
    return SimpleNamespace(run=run, path=path, archive=Archive(path), metrics=metrics)


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """A fast run with a key in the environment, and what Comet got of it."""
    folder = tmp_path_factory.mktemp("online")
    with FakeComet() as server:
        flags = "--model", "fc", "--epochs", 3
        of_comet = {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": server.url}
        run = complete(folder, *flags, **of_comet)
    metrics = run.json("metrics.json")
    return SimpleNamespace(run=run, server=server, metrics=metrics)


def read_pictures(run):
    return {name: (run.run_dir / f"{name}.png").read_bytes() for name in PICTURES}


# ----- offline


def test_offline_the_settings_are_the_parameters(offline):
    """Comet itself adds the step of each picture."""
    settings = offline.run.json("config.json")["settings"]
    assert settings.items() <= offline.archive.params.items()
    assert offline.archive.params.keys() - settings.keys() == {"curr_step"}
    assert settings["batch_size"] == 32


def test_offline_the_loss_of_every_step_is_there(offline):
    """Steps count on over the epochs: they never restart."""
    found = [(step, loss) for step, _, loss in offline.archive.metrics["loss"]]
    assert len(found) == 2 * 938
    assert found == list(enumerate(offline.metrics["losses"], start=1))


@pytest.mark.parametrize("name", ["train_accuracy", "train_loss", "epoch_seconds"])
def test_offline_each_epoch_has_its_metrics(offline, name):
    expected = [
        (938 * epoch, epoch, value)
        for epoch, value in enumerate(offline.metrics[name], start=1)
    ]
    assert len(expected) == 2
    assert offline.archive.metrics[name] == expected


@pytest.mark.parametrize("name", ["test_accuracy", "test_loss"])
def test_offline_the_test_results_are_there(offline, name):
    ((step, _, value),) = offline.archive.metrics[name]
    assert (step, value) == (2 * 938, offline.metrics[name])


def test_offline_the_pictures_are_those_of_the_folder(offline):
    latest = {name: data for name, _, data in offline.archive.images}
    assert latest == read_pictures(offline.run)


def test_offline_the_report_is_an_asset(offline):
    report = (offline.run.run_dir / "report.html").read_bytes()
    assert offline.archive.assets == {"report.html": report}


def test_offline_the_loss_curve_grows_under_one_name(offline):
    images = offline.archive.images
    curves = [(step, data) for name, step, data in images if name == "loss_curve"]
    steps = [step for step, _ in curves]
    assert len(set(steps)) > sum(offline.metrics["epoch_seconds"]) // 3
    assert steps == sorted(steps)
    assert steps[-1] == 2 * 938
    assert len({data for _, data in curves}) == len(set(steps))
    assert all(data.startswith(b"\x89PNG") for _, data in curves)
    assert len(images) == len(curves) + 5


def test_offline_the_model_is_the_graph(offline):
    assert offline.archive.graph == str(main.CNN())


def test_offline_the_name_is_that_of_the_folder(offline):
    assert offline.archive.name == offline.run.run_dir.name
    assert offline.archive.project == main.COMET_PROJECT


def test_offline_the_upload_command_names_the_archive(offline):
    (path,) = re.findall(r"comet upload (\S+\.zip)$", offline.run.stdout, re.MULTILINE)
    assert offline.run.folder / path == offline.path


def test_the_upload_command_uploads_all(offline):
    """`comet upload`, the real one, to a server."""
    with FakeComet() as server:
        environment = clean_environment(offline.run.folder)
        of_comet = {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": server.url}
        done = subprocess.run(
            [sys.executable, "-m", "comet_ml.scripts.comet", "upload", offline.path],
            env=environment | of_comet,
            check=False,
        )
    assert done.returncode == 0
    assert server.others["Name"] == offline.archive.name
    assert len(server.metric("loss")) == 2 * 938
    assert {name for name, *_ in server.images} == set(PICTURES)


# ----- which mode


def test_auto_without_a_key_is_offline(spawn):
    run = spawn(*SMALL)
    assert run.wait() == 0, run.stderr
    (path,) = run.run_dir.glob("*.zip")
    assert f"comet upload runs/{run.run_dir.name}/{path.name}\n" in run.stdout
    assert Archive(path).metrics["test_loss"]


def test_the_placeholder_is_no_key(spawn):
    """Nobody is asked whether it is right."""
    with FakeComet() as server:
        of_comet = {"COMET_URL_OVERRIDE": server.url}
        run = spawn(*SMALL, COMET_API_KEY="YOUR_API_KEY_HERE", **of_comet)
        assert run.wait() == 0, run.stderr
    assert server.requests == []
    assert len(list(run.run_dir.glob("*.zip"))) == 1


@pytest.mark.parametrize("key", [{}, {"COMET_API_KEY": "YOUR_API_KEY_HERE"}])
def test_online_without_a_key_is_refused(spawn, key):
    run = spawn(*SMALL, "--comet", "online", **key)
    assert run.wait() == 2
    assert run.stdout == ""
    assert re.fullmatch("main.py: .*API key.*COMET_API_KEY.*\n", run.stderr)
    assert list(run.folder.glob("runs/*")) == []


def test_offline_asks_no_server_even_with_a_key(spawn):
    with FakeComet() as server:
        of_comet = {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": server.url}
        run = spawn(*SMALL, "--comet", "offline", **of_comet)
        assert run.wait() == 0, run.stderr
    assert server.requests == []
    assert len(list(run.run_dir.glob("*.zip"))) == 1


# ----- online


def test_online_the_settings_are_the_parameters(online):
    settings = online.run.json("config.json")["settings"]
    sent = online.server.params
    found = {p["parameterName"]: str(p["parameterValue"]) for p in sent}
    del found["curr_step"]  # which Comet itself adds, with each picture
    assert found == {name: str(value) for name, value in settings.items()}
    assert len(sent) < len(settings) + len(online.server.metrics)  # with no metric


def test_online_the_losses_are_right_and_the_last_step_is_in(online):
    losses = dict(enumerate(online.metrics["losses"], start=1))
    found = online.server.metric("loss")
    assert len(losses) == 3 * 938
    assert set(found) <= set(losses.items())
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    assert found[-1][0] == 3 * 938


def test_online_the_losses_are_thinned_to_what_comet_takes(online):
    """12,000 values a minute are 200 a second; a few of them come at once."""
    stamps = [m["timestamp"] / 1000 for m in online.server.metrics]
    assert 30 < len(stamps) <= 200 * (max(stamps) - min(stamps)) + 50
    assert len(stamps) < 3 * 938 / 2


def test_online_each_epoch_has_its_metrics(online):
    for name in ("train_accuracy", "train_loss", "epoch_seconds"):
        found = [
            (m["step"], m["epoch"], float(m["metricValue"]))
            for m in online.server.metrics
            if m["metricName"] == name
        ]
        values = enumerate(online.metrics[name], start=1)
        assert found == [(938 * epoch, epoch, value) for epoch, value in values]


def test_online_the_test_results_are_there(online):
    for name in ("test_accuracy", "test_loss"):
        assert online.server.metric(name) == [(3 * 938, online.metrics[name])]


def test_online_the_pictures_are_those_of_the_folder(online):
    last = [(n, data) for n, step, data in online.server.images if step == 3 * 938]
    assert dict(last) == read_pictures(online.run)
    assert {name for name, *_ in online.server.images} == set(PICTURES)
    reports = [
        u for u in online.server.uploads if u["query"].get("extension") == "html"
    ]
    assert [u["query"]["fileName"] for u in reports] == ["report.html"]


def test_online_the_name_and_the_graph_are_there(online):
    assert online.server.others["Name"] == online.run.run_dir.name
    (graph,) = online.server.graphs
    assert graph["graph"] == str(main.FullyConnectedModel())


def test_online_the_address_is_printed_first_and_last(online):
    (key,) = online.server.experiments
    address = f"{online.server.root}workspace/project/{key}"
    lines = online.run.stdout.splitlines()
    assert f"Comet: {address}" in lines
    assert lines[-2].startswith("TRAINING COMPLETE")
    assert lines[-2].endswith(address)


def test_online_no_archive_is_left(online):
    assert list(online.run.folder.rglob("*.zip")) == []
    assert "comet upload" not in online.run.stdout


def test_online_nothing_but_the_bars_is_on_standard_error(online):
    pieces = [piece for piece in re.split("[\r\n]+", online.run.stderr) if piece]
    assert pieces
    assert all(re.fullmatch(r" *\d+%\|.*\| \d+/938 \[.*\] *", p) for p in pieces)


def test_the_key_is_written_nowhere(online):
    files = [path for path in online.run.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert KEY.encode() not in path.read_bytes()


# ----- processes of their own: with Comet's import as it is


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Runs of main.py, each a new process, side by side: (status, stdout, folder).

    "file": the key is in ~/.comet.config; "constant": in main.py; "off": --comet off,
    telling at the end which modules there are.
    """
    folders = {n: tmp_path_factory.mktemp(n) for n in ("file", "constant", "off")}
    flags = [str(flag) for flag in (*SMALL, f"--data-dir={main.DATA_DIR}")]
    (folders["file"] / ".comet.config").write_text(f"[comet]\napi_key = file-{KEY}\n")
    text = SCRIPT.read_text(encoding="utf-8")
    constant = f"COMET_API_KEY = 'constant-{KEY}'"
    text, found = re.subn("(?m)^COMET_API_KEY = .*$", constant, text)
    assert found == 1
    (folders["constant"] / "main.py").write_text(text, encoding="utf-8")
    probe = """
import json, os, runpy, sys

def tell(status, end=os._exit):
    print(json.dumps(sorted(sys.modules)), flush=True)
    end(status)

os._exit = tell
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    commands = {
        "file": [SCRIPT, *flags, "--comet=online"],
        "constant": ["main.py", *flags, "--comet=online"],
        "off": ["-c", probe, SCRIPT, *flags, "--comet=off"],
    }
    results = {}
    with FakeComet() as server:
        running = {
            name: subprocess.Popen(
                [sys.executable, *command],
                cwd=folders[name],
                env=clean_environment(folders[name])
                | {"COMET_URL_OVERRIDE": server.url},
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
            for name, command in commands.items()
        }
        try:
            for name, process in running.items():
                output, _ = process.communicate(timeout=120)
                results[name] = process.returncode, output, folders[name]
        finally:
            for process in running.values():
                process.kill()
    results["keys"] = {
        body["apiKey"]
        for _, path, _, body in server.requests
        if path.endswith("/add/run")
    }
    return results


@pytest.mark.parametrize("place", ["file", "constant"])
def test_the_key_is_found(processes, place):
    """In Comet's configuration file, in the constant in main.py."""
    status, output, folder = processes[place]
    assert status == 0
    assert f"{place}-{KEY}" in processes["keys"]
    assert re.search("^Comet: http://127.0.0.1", output, re.MULTILINE)
    assert list(folder.rglob("*.zip")) == []


def test_off_never_imports_comet(processes):
    status, output, folder = processes["off"]
    assert status == 0
    modules = json.loads(output.splitlines()[-1])
    assert "torch" in modules
    assert not [name for name in modules if name.startswith("comet")]
    assert "comet upload" not in output
    assert list(folder.rglob("*.zip")) == []


def test_a_run_does_without_pyplot(processes):
    """No window is made, and no figure but main.py's own is touched."""
    modules = json.loads(processes["off"][1].splitlines()[-1])
    assert "matplotlib.figure" in modules
    assert "matplotlib.pyplot" not in modules
