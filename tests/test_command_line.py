"""A wrong command line: exit status 2 and one line that helps, before any slow import."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Run

import main

WHOLE = "whole number from {} to {}".format
EPOCHS, BATCH_SIZE = WHOLE("1", "10,000"), WHOLE("1", "60,000")
SEED, LIMIT = WHOLE("0", "4,294,967,295"), WHOLE("0", "60,000")
DEVICES = ("auto", "cpu", "cuda", "mps")
WRONG = [  # flag, value, what the message says is allowed
    *(("--epochs", value, EPOCHS) for value in ("0", "-1", "1.5", "abc", "10001")),
    *(("--epochs", value, EPOCHS) for value in ("", " 1", "1_0", "9" * 5000)),
    *(("--batch-size", value, BATCH_SIZE) for value in ("0", "-1", "60001", "64.0")),
    *(
        ("--lr", value, "above 0")
        for value in ("0", "-1", "nan", "inf", "abc", "1e999")
    ),
    ("--lr", "1e39", "at most 1e9"),
    *(("--seed", value, SEED) for value in ("-1", str(2**32), "x")),
    *(("--limit", value, LIMIT) for value in ("-1", "60001", "all")),
    *(("--model", value, "cnn, fc") for value in ("resnet", "CNN", "")),
    ("--optimizer", "rmsprop", "sgd, adam"),
    ("--device", "tpu", "auto, cpu, cuda, mps"),
    ("--comet", "yes", "auto, online, offline, off"),
    ("--data-dir", "", "folder"),
    ("--data-dir", "a_file", "folder"),
    ("--output-dir", "a_file", "folder"),
    ("--output-dir", "a_link_to_nothing", "folder"),
]
FLAGS = tuple(f"--{name.replace('_', '-')}" for name in main.FLAGS)
ABSENT = [
    name
    for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps))
    if not module.is_available()
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small run that has ended well."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--limit", "64", "--epochs", "1", "--comet", "off"]
    run = Run(flags, folder, dict(os.environ))
    assert run.wait() == 0, run.stderr
    return run.run_dir


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """refusal(*arguments): the line that main.py ends with for a wrong command line."""
    (tmp_path / "a_file").write_text("text")
    (tmp_path / "a_link_to_nothing").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        with pytest.raises(main.InputError) as caught:
            main.read_settings(list(map(str, arguments)))
        assert main.report(caught.value) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, out + err
        assert not (tmp_path / "runs").exists()
        return err

    return refuse


def assert_refused(done, folder):
    """Check a finished process: exit status 2, one line, no traceback, no run folder."""
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("main.py: "), done
    assert not (folder / "runs").exists()
    return done.stderr


@pytest.mark.parametrize(("flag", "value", "allowed"), WRONG)
def test_a_wrong_value_is_refused_with_its_flag_and_the_range(
    refusal, flag, value, allowed
):
    line = refusal(f"{flag}={value}")
    assert flag in line and allowed in line


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--epochs", (1, 10_000)),
        ("--batch-size", (1, 60_000)),
        ("--seed", (0, 2**32 - 1)),
        ("--limit", (0, 64, 60_000)),
        ("--lr", (1e-9, 0.5, 1e6, 1e9)),
        ("--model", ("cnn", "fc")),
        ("--optimizer", ("sgd", "adam")),
        ("--device", ("auto", "cpu")),
        ("--comet", ("auto", "online", "offline", "off")),
    ],
)
def test_the_ends_of_each_range_are_taken(flag, values):
    for value in values:
        settings = main.read_settings([flag, str(value)])
        assert settings[flag[2:].replace("-", "_")] == value


def test_a_batch_cannot_be_larger_than_the_training_set(refusal):
    line = refusal("--limit", 100, "--batch-size", 101)
    assert re.search("--batch-size must be (from 1 to|at most) 100", line)
    assert main.read_settings(["--limit", "100", "--batch-size", "100"])


@pytest.mark.parametrize("device", ABSENT)
def test_a_device_that_is_not_there_is_refused(device, spawn, tmp_path):
    run = spawn("--device", device, "--comet", "off")
    assert run.wait() == 2, run.stderr
    assert run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert f"--device {device}" in run.stderr and "auto" in run.stderr
    assert not any(tmp_path.glob("runs/*"))
    with pytest.raises(main.InputError, match=f"--device {device}: .* cpu"):
        main.select_device(device)


@pytest.mark.parametrize("path", ["a_file/sub", "/proc/no/such"])
def test_an_output_folder_that_cannot_be_made_is_refused(spawn, tmp_path, path):
    (tmp_path / "a_file").write_text("text")
    run = spawn("--output-dir", path, "--comet", "off")
    assert run.wait() == 2, run.stderr
    assert run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert "--output-dir" in run.stderr and path in run.stderr


@pytest.mark.parametrize("text", ["a\0b", "\udcff", "a\nb"])
def test_a_path_that_is_no_text_is_refused(refusal, text):
    assert "--output-dir" in refusal("--output-dir", text)
    assert "--data-dir" in refusal("--data-dir", text)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--epoch", "3"], "--epoch"),
        (["--batch", "64"], "--batch"),
        (["--epoches", "3"], "--epoches"),
        (["--Epochs", "3"], "--Epochs"),
        (["-e", "3"], "-e"),
        (["somewhere"], "somewhere"),
        (["--epochs"], "--epochs"),
        (["--comet", "off", "--resume"], "--resume"),
    ],
)
def test_an_unknown_or_abbreviated_or_lonely_flag_is_refused(refusal, arguments, part):
    line = refusal(*arguments)
    assert part in line and "--help" in line


# ---------------------------------------------------------------------- what to resume


def test_resume_wants_a_folder_of_a_run(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nothing_there", "a_file", "a_link_to_nothing", "empty", ""):
        assert re.match(r"main.py: .*--resume.*", refusal("--resume", path))
    with pytest.raises(main.InputError):
        main.read_settings(["--resume", "a" * 5000])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"settings"',
        b"{}",
        b'{"settings": null}',
        b'{"settings": []}',
        b'{"settings": {"epochs": 1}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"9" * 5_000,
    ],
    ids=lambda text: repr(text[:28]),
)
def test_resume_refuses_a_foreign_config(refusal, tmp_path, text):
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "config.json").write_bytes(text)
    line = refusal("--resume", folder)
    assert "--resume" in line and "config.json" in line
    assert len(line) < 600 + 2 * len(str(tmp_path))


def test_resume_refuses_a_config_that_is_a_folder(refusal, tmp_path):
    (tmp_path / "stranger" / "config.json").mkdir(parents=True)
    assert "--resume" in refusal("--resume", tmp_path / "stranger")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, EPOCHS),
        ("epochs", 1.5, EPOCHS),
        ("epochs", None, EPOCHS),
        ("epochs", True, EPOCHS),
        ("epochs", [7], EPOCHS),
        ("batch_size", 60_001, BATCH_SIZE),
        ("batch_size", 65, "64"),
        ("lr", math.nan, "above 0"),
        ("lr", -0.01, "above 0"),
        ("lr", {}, "above 0"),
        ("seed", -1, SEED),
        ("limit", 60_001, LIMIT),
        ("model", "resnet", "cnn, fc"),
        ("optimizer", "__class__", "sgd, adam"),
        ("device", "tpu", "auto, cpu"),
        ("comet", "maybe", "auto, online"),
        ("data_dir", "", "folder"),
        ("data_dir", "a\0b", "folder"),
        ("data_dir", "\ud800", "folder"),
    ],
)
def test_resume_refuses_a_config_out_of_range(
    refusal, finished, tmp_path, name, value, allowed
):
    shutil.copytree(finished, tmp_path / "edited")
    path = tmp_path / "edited" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["settings"][name] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    line = refusal("--resume", path.parent)
    assert name.replace("_", "-") in line.lower().replace("_", "-")
    assert allowed in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "fc"),
        ("--batch-size", 32),
        ("--lr", 0.02),
        ("--optimizer", "adam"),
        ("--seed", 1),
        ("--limit", 128),
        ("--data-dir", "elsewhere"),
        ("--output-dir", "elsewhere"),
    ],
)
def test_resume_refuses_a_flag_that_contradicts_the_run(refusal, finished, flag, value):
    line = refusal("--resume", finished, flag, value)
    assert flag in line and str(value) in line


def test_resume_takes_the_flags_that_may_change_and_those_that_agree(finished):
    flags = "--epochs 9 --device cpu --comet offline --lr 0.01 --model cnn --limit 64"
    settings = main.read_settings(["--resume", str(finished), *flags.split()])
    assert (settings["epochs"], settings["device"]) == (9, "cpu")
    assert (settings["comet"], settings["limit"]) == ("offline", 64)


def test_resume_keeps_the_settings_of_the_run(finished):
    settings = main.read_settings(["--resume", str(finished)])
    assert (settings["limit"], settings["epochs"]) == (64, 1)
    assert str(settings["resume"]) == str(finished)


# ------------------------------------------------------------------- as a real process


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--epoch", "1"], "--epoch"),
        (["--resume", "nothing_there"], "--resume"),
        (["--data-dir", str(ROOT / "main.py")], "--data-dir"),
        (["--limit", "10", "--batch-size", "11"], "--batch-size"),
    ],
)
def test_the_script_refuses_a_wrong_flag(run_script, tmp_path, arguments, flag):
    done = run_script(*arguments)
    assert flag in assert_refused(done, tmp_path)


@pytest.mark.parametrize(
    "arguments", ["--epochs 0", "--resume nowhere", "--device mps", "--help"]
)
def test_no_slow_import_comes_before_the_flags_are_read(environment, arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "main.py", *arguments.split()],
        env=environment,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported, done.stderr
    slow = {"torch", "torchvision", "numpy", "matplotlib", "comet_ml", "tqdm", "PIL"}
    assert not imported & slow


def constants():
    """Return (the source of main.py, {name: node} of its constants, in order)."""
    source = (ROOT / "main.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return source, {getattr(node.targets[0], "id", None): node for node in nodes}


def edited_script(folder, name, value):
    """Copy main.py into `folder`, with the constant `name` set to `value`."""
    source, nodes = constants()
    node = nodes[name]
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {value!r}\n"]
    (folder / "main.py").write_text("".join(lines), encoding="utf-8")
    return folder / "main.py"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MODEL", "resnet", "cnn, fc"),
        ("EPOCHS", 0, EPOCHS),
        ("EPOCHS", 1.5, EPOCHS),
        ("BATCH_SIZE", 60_001, BATCH_SIZE),
        ("LR", "fast", "above 0"),
        ("OPTIMIZER", "rmsprop", "sgd, adam"),
        ("SEED", -1, SEED),
        ("LIMIT", 60_001, LIMIT),
        ("DEVICE", "tpu", "auto, cpu"),
        ("DATA_DIR", "main.py", "folder"),
        ("OUTPUT_DIR", "", "folder"),
        ("COMET", None, "auto, online"),
    ],
)
def test_a_constant_out_of_range_is_refused(
    environment, tmp_path, name, value, allowed
):
    done = subprocess.run(
        [sys.executable, edited_script(tmp_path, name, value)],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    line = assert_refused(done, tmp_path)
    assert name in line and allowed in line


def test_a_constant_is_the_default_of_its_flag(environment, tmp_path):
    script = edited_script(tmp_path, "EPOCHS", 12)
    done = subprocess.run(
        [sys.executable, script, "--help"],
        env=environment | {"COLUMNS": "500"},
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0
    assert re.search(r"--epochs .*\(default: 12\)", done.stdout)


def test_help_lists_every_flag_with_its_default(run_script):
    done = run_script("--help", COLUMNS="500")
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(done.stdout.partition("options:")[2].split())
    for flag in FLAGS:
        default = re.escape(str(getattr(main, flag[2:].replace("-", "_").upper())))
        assert re.search(rf"{flag} [^()]+ \(default: {default}\)", text), flag
    assert "--resume RUN_DIR" in text


def test_every_setting_among_the_constants_has_a_flag():
    names = list(constants()[1])
    settings = names[: names.index("COMET_PROJECT")]
    settings.remove("COMET_API_KEY")  # a flag would show it in the list of processes
    assert {"--" + name.lower().replace("_", "-") for name in settings} == set(FLAGS)
