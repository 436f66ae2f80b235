"""Files from elsewhere: their code does not run, and what is wrong is told in a line."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch

import main


@pytest.fixture(scope="module")
def runs(trained):
    """{model: the folder of a small run that has ended well}."""
    return {model: trained(model) for model in ("cnn", "fc")}


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def with_code_in_a_sound_file(path):
    """Put the code where the tensors of a sound checkpoint are listed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            evil = pickle.dumps(Evil(), protocol=2)
            archive.writestr(name, evil if name.endswith("data.pkl") else data)


def change(path, how):
    """Have how(...) change what a file of torch.save holds; a checkpoint's weights."""
    saved = torch.load(path, weights_only=True)
    how(saved.get("model", saved))
    torch.save(saved, path)


DAMAGED = {  # name: what is done to a sound file
    "code": lambda path: torch.save({"model": Evil()}, path),
    "code among tensors": with_code_in_a_sound_file,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "text": lambda path: path.write_text("not a checkpoint\n", encoding="ascii"),
    "a list": lambda path: torch.save([1, 2], path),
    "of another script": lambda path: torch.save(
        torch.nn.Linear(7, 1).state_dict(), path
    ),
    "a weight less": lambda path: change(path, lambda w: w.pop("fc2.bias")),
    "another shape": lambda path: change(
        path, lambda w: w.update({"fc1.weight": torch.ones(128, 7)})
    ),
}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """refuse(name, *flags): check that main.py refuses the file, in one line."""
    monkeypatch.chdir(tmp_path)

    def check(name, *flags, lines=1):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        assert main.main(list(map(str, flags))) == 2
        errors = capsys.readouterr().err
        told = errors.splitlines()[-1]
        assert told.startswith("main.py: ") and name in told, errors
        assert errors.count("\n") == lines and len(told) < 1000, errors
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before

    return check


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(tmp_path, runs, refuse, fault):
    folder = shutil.copytree(runs["fc"], tmp_path / "run")
    DAMAGED[fault](folder / "checkpoint.pt")
    refuse("checkpoint.pt", "--resume", folder, "--epochs", 4)


def test_a_checkpoint_of_the_other_model_is_refused(tmp_path, runs, refuse):
    folder = shutil.copytree(runs["fc"], tmp_path / "run")
    shutil.copy(runs["cnn"] / "checkpoint.pt", folder)
    refuse("checkpoint.pt", "--resume", folder, "--epochs", 4)


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_model_that_cannot_classify_is_refused(tmp_path, runs, refuse, fault):
    path = shutil.copy(runs["cnn"] / "model.pt", tmp_path)
    DAMAGED[fault](tmp_path / "model.pt")
    refuse("model.pt", "--predict", "digit.png", "--checkpoint", path)


CONFIGS = '{"settings": ', "[" * 100_000, "[1, 2]", "{}", '{"settings": 7}'


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config[:12])
def test_a_damaged_config_is_refused(tmp_path, runs, refuse, config):
    folder = shutil.copytree(runs["fc"], tmp_path / "run")
    (folder / "config.json").write_text(config, encoding="ascii")
    refuse("config.json", "--resume", folder)


def test_a_config_with_an_impossible_setting_is_refused(tmp_path, runs, refuse):
    run = shutil.copytree(runs["fc"], tmp_path / "run")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["settings"]["batch_size"] = "many"
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refuse("--batch-size", "--resume", run, lines=2)  # argparse's line is before ours


@pytest.mark.parametrize("place", ["nothing", "empty", "file.txt"])
def test_what_is_no_run_folder_is_refused(tmp_path, refuse, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text", encoding="ascii")
    refuse("not a run folder", "--resume", place)
