"""Damage what main.py reads, at random, and see that it ends as documented.

python tests/fuzz.py --count 2000 --seed 1    2,000 cases; a line for each that goes wrong
python tests/fuzz.py --seed 1 --only 17       case 17 of these alone; its files are kept

A case is a resumed run with a damaged checkpoint or config.json, a run with a damaged
archive of MNIST, or a damaged command line. Each is a process of its own, forked from one
that has imported main.py. It must end in exit status 0, 1 or 2, without a traceback, in
bounded time and memory; and a damaged archive must never be trained on.
"""

import argparse
import collections
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torchvision.datasets import MNIST

import main

QUICK = ["--limit", "100", "--epochs", "1", "--comet", "off"]
GIGABYTE = 2**30
SECONDS = 60  # for one case; an endless one is killed then


# ------------------------------------------------------------------------------ damage


def damage(data, rng):
    """Return bytes with a few flipped, cut out, put in, or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 4, 100, 10_000)), len(data) - at)
        kind = rng.randrange(5)
        if kind == 0 and size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def damage_member(data, rng):
    """Return a zip file with one member changed, but every check sum right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([n for n in members if n.endswith(".pkl")] * 9 + list(members))
    kind = rng.randrange(8)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name.replace("data", "code")] = members.pop(name)
    elif kind == 2:
        other = rng.choice(list(members))
        members[name], members[other] = members[other], members[name]
    else:
        members[name] = damage(members[name], rng)
    out, packed = io.BytesIO(), rng.choice((zipfile.ZIP_STORED,) * 7 + (8,))
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def odd_value(rng):
    """Return what hardly belongs where it is put."""
    shape = rng.choice(([], [0], [1], [10], [128, 10], [5056], [2, 3, 4]))
    kind = rng.choice((torch.float32, torch.float64, torch.uint8, torch.int64))
    values = (
        *(None, True, 0, -1, 3.5, 10**30, float("nan"), float("inf"), -1e308),
        *("", "x", "../evil", "0" * 32, [], [None], [1.0] * 3, {}, {"a": 1}, (1, 2)),
        torch.zeros(shape, dtype=kind),
        torch.full(shape, 200, dtype=kind),
        torch.zeros(1).expand(10_000_000),
        {0: {"step": torch.zeros(1)}},
    )
    return rng.choice(values)


def damage_value(values, rng):
    """Change something in nested dicts and lists, in place."""
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(values[key], (dict, list)) and values[key] and rng.random() < 0.7:
        damage_value(values[key], rng)
    elif rng.random() < 0.3:
        del values[key]
    elif rng.random() < 0.2:
        values[key] = values[rng.choice(keys)]
    else:
        values[key] = odd_value(rng)


# ------------------------------------------------------------------------------- cases


def damaged_checkpoint(folder, rng, bases):
    """Return the arguments that resume a run whose checkpoint is damaged."""
    run = shutil.copytree(rng.choice(bases), folder / "run")
    path, kind = run / "checkpoint.pt", rng.randrange(3)
    if kind == 2:
        values = main.load_tensors(path)
        damage_value(values, rng)
        main.save_tensors(path, values)
    else:
        change = (damage, damage_member)[kind]
        path.write_bytes(change(path.read_bytes(), rng))
    return ["--resume", "run", "--epochs", rng.choice("12")]


def damaged_config(folder, rng, bases):
    """Return the arguments that resume a run whose config.json is damaged."""
    run = shutil.copytree(rng.choice(bases), folder / "run")
    path = run / "config.json"
    if rng.random() < 0.5:
        path.write_bytes(damage(path.read_bytes(), rng))
    else:
        config = json.loads(path.read_text(encoding="utf-8"))
        damage_value(config, rng)
        path.write_text(json.dumps(config, default=str), encoding="utf-8")
    return ["--resume", "run"]


def damaged_archive(folder, rng, _):
    """Return the arguments that train on MNIST with a damaged archive and no other."""
    raw, bundled = folder / "data" / "MNIST" / "raw", ROOT / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = [name for name, _ in MNIST.resources]
    for name in names:
        (raw / name).symlink_to(bundled / name)
    name = rng.choice(names[1:] * 3 + names[:1])
    sound = (bundled / name).read_bytes()
    while (damaged := damage(sound, rng)) == sound:
        pass
    (raw / name).unlink()
    (raw / name).write_bytes(damaged)
    main.__file__ = str(folder / "main.py")  # so that it finds no sound one beside it
    MNIST.mirrors = ["http://127.0.0.1:9/"]
    return [*QUICK, "--data-dir", "data"]


def damaged_command(folder, rng, bases):
    """Return arguments that are mostly wrong."""
    words = [
        "0",
        "-1",
        "1",
        "2",
        "64",
        "1e-3",
        "nan",
        "1e999",
        "",
        " ",
        "x",
        "\x7f",
        "é",
    ]
    words += ["cnn", "fc", "sgd", "adam", "auto", "cpu", "mps", "off", "offline", "."]
    words += ["/dev/null", "run", "--", "-", "=", "9" * 30, "\udcff", "0x10", "1_0"]
    shutil.copytree(rng.choice(bases), folder / "run")
    arguments = [*QUICK]
    for _ in range(rng.randint(1, 3)):
        flag = main.flag_of(rng.choice([*main.FLAGS, "resume", "help"]))
        if rng.random() < 0.2:
            flag = damage(flag.encode(), rng).decode("utf-8", "surrogateescape")
        if rng.random() < 0.3:
            flag += "=" + rng.choice(words)
        arguments += [flag, rng.choice(words)][: rng.randint(1, 2)]
    return [argument.replace("\0", "") for argument in arguments]


CASES = [damaged_checkpoint] * 5 + [damaged_archive] * 2 + [damaged_command] * 3
CASES += [damaged_config]


# --------------------------------------------------------------------------- processes


def be_main(arguments, folder):
    """Be `python main.py ARGUMENTS` in a folder: end this process as that would.

    The console goes to the files out and err there, and the peak of memory (kB) to the
    file peak. More than four gigabytes above what is there now are not to be had.
    """
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + 4 * GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    try:
        settings = main.read_settings(arguments)
        # A valid command may take hours: then it is enough that it was understood.
        small = 0 < settings["limit"] <= 100 and settings["epochs"] <= 2
        status = main.main(settings) if small else 0
    except main.UserError as error:
        status = main.report(error)
    except SystemExit as error:  # --help
        status = error.code or 0
    sys.stdout.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path("peak").write_text(str(peak), encoding="ascii")
    sys.exit(status)


def fork(task, *arguments):
    """Call task(*arguments) in a new process; return its number."""
    if number := os.fork():
        return number
    try:
        os.setsid()
        task(*arguments)
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code)
    except BaseException:  # noqa: BLE001, what would be the end of a script
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def play(index, seed, bases, folder):
    """Be case `index`."""
    rng = random.Random(f"{seed} {index}")
    case = rng.choice(CASES)
    folder.mkdir()
    (folder / "case").write_text(case.__name__, encoding="ascii")
    arguments = case(folder, rng, bases)
    (folder / "arguments").write_text(repr(arguments), encoding="utf-8")
    be_main(arguments, folder)


def judge(folder, status):
    """Return the name of a case and what went wrong with it, or None."""
    name = (folder / "case").read_text(encoding="ascii")
    if not (folder / "arguments").exists():
        return name, "the case could not be made"
    errors = (folder / "err").read_text(encoding="utf-8", errors="replace")
    if status not in (0, 1, 2) or "Traceback" in errors:
        return name, f"exit status {status}: {errors[-2000:]}"
    if status == 2 and errors.count("main.py: ") != 1:
        return name, f"not one error: {errors}"
    if int((folder / "peak").read_text(encoding="ascii")) > 1.5 * GIGABYTE / 1024:
        return name, "took more than 1.5 GB of memory"
    if name == "damaged_archive" and status != 2:
        return name, "trained on damaged data"
    if any(folder.parent.glob("*evil*")):
        return name, "wrote outside of its folder"
    return name, None


def fuzz(indices, seed, jobs, scratch):
    """Play the cases; return (Counter of (name, status), [index of each gone wrong])."""
    bases = []
    # Seen from a case's folder. A damaged path is to lead to nowhere else.
    (scratch / "data").symlink_to(ROOT / "data")
    for flags in "--model cnn --optimizer sgd", "--model fc --optimizer adam":
        folder = scratch / f"base{len(bases)}"
        folder.mkdir()
        arguments = [*QUICK, "--data-dir", "../data", *flags.split()]
        number = fork(be_main, arguments, folder)
        assert os.waitpid(number, 0)[1] == 0, (folder / "err").read_text("utf-8")
        bases += (folder / "runs").iterdir()

    indices, counts, wrong, running = list(indices), collections.Counter(), [], {}
    clock, last = 0.0, time.monotonic()  # that stands still when the machine does
    while indices or running:
        while indices and len(running) < jobs:
            index = indices.pop(0)
            folder = scratch / str(index)
            number = fork(play, index, seed, bases, folder)
            running[number] = index, folder, clock
        time.sleep(0.005)
        clock, last = clock + min(time.monotonic() - last, 0.1), time.monotonic()
        for number, (index, folder, begin) in list(running.items()):
            if clock - begin > SECONDS:
                os.kill(number, signal.SIGKILL)
            done, status = os.waitpid(number, os.WNOHANG)
            if not done:
                continue
            del running[number]
            status = os.waitstatus_to_exitcode(status)
            name, fault = judge(folder, status)
            counts[name, status] += 1
            if fault:
                wrong.append(index)
                print(f"case {index} ({name}): {fault}")
            shutil.rmtree(folder) if not fault else None
    return counts, wrong


def run():
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="how many cases")
    parser.add_argument("--seed", default="1", help="of the random numbers")
    parser.add_argument("--only", type=int, metavar="INDEX", help="one case alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    flags = parser.parse_args()
    indices = range(flags.count) if flags.only is None else [flags.only]
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tempfile.tempdir = str(scratch)
    begin = time.monotonic()
    counts, wrong = fuzz(indices, flags.seed, flags.jobs, scratch)
    for (name, status), count in sorted(counts.items()):
        print(f"{name:20} exit status {status:3}: {count:5}")
    seconds = time.monotonic() - begin
    print(f"{counts.total()} cases, {len(wrong)} gone wrong, {seconds:.0f} s")
    if wrong or flags.only is not None:
        print(f"files: {scratch}")
    else:
        shutil.rmtree(scratch)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run())
