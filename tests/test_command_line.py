"""The command line: what is refused, in one clear line, and what the flags come to."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import main

FLAGS = {  # of each constant: values in its range, and values that are not
    "RECIPE": (["classic", "accurate"], ["best", ""]),
    "MODEL": (["cnn", "fc"], ["resnet", "CNN", ""]),
    "EPOCHS": ([1, 10_000], [0, -1, 1.5, "abc", "", 10_001, "9" * 5000]),
    "BATCH_SIZE": ([1, 60_000], [0, -1, 60_001, "64.0"]),
    "LR": ([1e-9, 0.5, 1e9], [0, -1, "nan", "inf", "abc", "1e999"]),
    "OPTIMIZER": (["sgd", "adam"], ["rmsprop"]),
    "SEED": ([0, 2**32 - 1], [-1, 2**32, "x"]),
    "SEEDS": ([1], [0, 1001, "all"]),
    "LIMIT": ([0, 64, 60_000], [-1, 60_001, "all"]),
    "DEVICE": (["auto", "cpu"], []),
    "DATA_DIR": ([main.DATA_DIR], []),
    "OUTPUT_DIR": (["runs", "other runs"], []),
    "COMET": (["auto", "online", "offline", "off"], ["yes"]),
}


def to_flag(name):
    return "--" + name.lower().replace("_", "-")


@pytest.fixture
def settings_of(tmp_path, monkeypatch):
    """settings_of(*arguments): what main.py trains with; nothing is trained."""
    monkeypatch.chdir(tmp_path)

    def read(*arguments, module=main):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(module, "train_run", lambda s, folder: seen.append(vars(s)))
            assert module.main(list(map(str, arguments))) == 0
        return seen[0]

    return read


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """refusal(*arguments): what main.py says of a wrong command line."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, module=main):
        capsys.readouterr()
        assert module.main(list(map(str, arguments))) == 2, arguments
        out, err = capsys.readouterr()
        *usage, line = err.splitlines()
        assert out == "" and line.startswith("main.py: "), out + err
        assert usage == [] or len(usage) == 1 and usage[0].startswith("usage: "), err
        assert not any(tmp_path.glob("runs/*"))
        return line

    return refuse


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_in_range_is_taken_and_the_rest_refused(settings_of, refusal, name):
    """With the name of the flag."""
    right, wrong = FLAGS[name]
    for value in wrong:
        line = refusal(f"{to_flag(name)}={value}")
        assert to_flag(name) in line or name.lower() in line
    for value in right:
        assert settings_of(to_flag(name), value)[name.lower()] == value


def test_an_unknown_or_lonely_flag_is_refused(refusal):
    for flag in ("--epochen=3", "--Epochs=3", "-e", "word", "--epochs", "--resume"):
        assert flag in refusal(flag)
    assert "--predict" in refusal("--checkpoint", "model.pt")
    assert "--resume" in refusal("--predict", "7.png", "--resume", "runs/NAME")
    assert "no file x.pt" in refusal("--predict", "7.png", "--checkpoint", "x.pt")


def test_what_is_there_and_what_is_possible_is_told(refusal, tmp_path):
    (tmp_path / "a_file").write_text("text")
    for device in ("cuda:99", "xla", "nonsense"):
        assert device in refusal("--device", device, "--comet", "off")
    assert all(name in refusal("--optimizer", "x") for name in ("sgd", "adam"))
    assert "needs --lr" in refusal("--recipe", "accurate", "--optimizer", "adam")
    assert {"1", "60000"} <= set(re.findall(r"\d+", refusal("--batch-size", 0)))
    assert main.read_settings(["--data-dir=~/d"]).data_dir == str(Path.home() / "d")
    for path in ("a_file/sub", "a_file"):
        line = refusal("--output-dir", path, "--comet", "off")
        assert "--output-dir" in line and path in line


def test_help_lists_every_flag_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    assert main.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = " ".join(out.partition("options:")[2].split())
    for name in FLAGS:
        default = re.escape(str(getattr(main, name)))
        assert re.search(rf"{to_flag(name)} [^()]+ \(default: {default}\)", text), name
    for flag in ("--compare", "--resume", "--predict", "--checkpoint"):
        assert f" {flag} " in text


@pytest.fixture
def edited(tmp_path):
    """edited(NAME=value, ...): main.py with these constants, as a module."""

    def edit(**constants):
        text = Path(main.__file__).read_text(encoding="utf-8")
        for name, value in {"DATA_DIR": main.DATA_DIR, **constants}.items():
            text, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
            assert found == 1, name
        path = tmp_path / "edited.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return edit


def test_every_constant_is_the_default_of_a_flag(edited, settings_of):
    text = Path(main.__file__).read_text(encoding="utf-8")
    section = text.partition("# ===== Settings")[2].partition("\n# =====")[0]
    constants = set(re.findall(r"(?m)^([A-Z_]+) = ", section))
    assert constants - {"ACCURATE", "COMET_API_KEY", "COMET_PROJECT"} == set(FLAGS)
    module = edited(MODEL="fc", OUTPUT_DIR="100% runs", SEED=4)
    found = settings_of("--seed", 5, module=module)
    assert [found[n] for n in ("model", "output_dir", "seed")] == ["fc", "100% runs", 5]
    assert module.main(["--help"]) == 0


def test_a_flag_wins_over_a_recipe_and_a_recipe_over_the_constants(settings_of, edited):
    expected = {"epochs": 7, "batch_size": 64, "lr": 0.01, "optimizer": "sgd"}
    found = settings_of()
    assert expected.items() <= found.items() and found["recipe"] == "classic"
    accurate = main.ACCURATE
    assert accurate["lr"] != main.LR
    assert accurate.items() <= settings_of("--recipe", "accurate").items()
    found = settings_of("--lr", 0.03, "--recipe", "accurate")
    assert (accurate | {"lr": 0.03}).items() <= found.items()
    module = edited(RECIPE="accurate", LR=0.7, SEED=8)
    found = settings_of("--epochs", 9, module=module)
    assert (accurate | {"epochs": 9, "seed": 8}).items() <= found.items()
    assert settings_of("--recipe", "classic", module=module)["lr"] == 0.7


def test_resume_refuses_what_contradicts_the_run(refusal, trained):
    """And changes nothing."""
    finished = trained("cnn")
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    settings = json.loads(before["config.json"])["settings"]
    flags = "--model=fc --batch-size=32 --lr=0.02 --optimizer=adam --seed=1 --seeds=2"
    for flag in f"{flags} --limit=128 --recipe=accurate --compare".split():
        line = refusal("--resume", finished, flag)
        name = flag.partition("=")[0][2:].replace("-", "_").replace("compare", "model")
        assert name in line and str(settings[name]) in line
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_resume_keeps_the_settings_and_takes_what_may_change(settings_of, trained):
    finished = trained("cnn")
    kept = json.loads((finished / "config.json").read_text())["settings"]
    found = settings_of("--resume", finished)
    kept |= {name: found[name] for name in main.SURROUNDINGS}  # are those of today
    assert kept.items() <= found.items() and kept["lr"] == 0.1
    assert found["data_dir"] == main.DATA_DIR and found["comet"] == "auto"
    flags = "--epochs 9 --device cpu --comet offline --lr 0.1 --model cnn --limit 6000"
    found = settings_of("--resume", finished / "checkpoint.pt", *flags.split())
    changed = {"epochs": 9, "device": "cpu", "comet": "offline"}
    assert (kept | changed).items() <= found.items() and found["resume"] == finished
    Path("config.json").write_text('{"settings": {"lr": 2, "gone": 1}}')  # older flags
    assert settings_of("--resume", ".")["lr"] == 2


def test_resume_wants_the_folder_of_a_run(refusal, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(main, "MODELS", {"own": main.CNN})  # as in a notebook
        assert "MODELS in main.py, or choose one of own" in refusal("--model=cnn")
    for path in ("nothing_there", tmp_path, ""):
        assert "not a run folder" in refusal("--resume", path)
    for text in (b"", b"7", b'{"settings": []}', b"\xff\0", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(text)
        line = refusal("--resume", tmp_path)
        assert "config.json" in line and len(line) < 500 + 2 * len(str(tmp_path))
