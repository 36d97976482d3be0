"""train.sh from end to end at SCALE=smoke: whole, again, killed, failed, with other data, with bad settings."""
import contextlib
import csv
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import run

import controlnet
import fairdiff
import fairness
import pointdiff
import transunet

ROOT = pathlib.Path(fairdiff.__file__).parent

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the files; bin holds the python3 of the tests and, for CDPATH, a folder out; in idle python3 does nothing."""
    folder = tmp_path_factory.mktemp("folder")
    for path in (*ROOT.glob("*.py"), ROOT / "train.sh"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name, script in (("bin", f'exec "{sys.executable}" "$@"'), ("idle", "")):
        (folder / name / "out").mkdir(parents=True)
        (folder / name / "python3").write_text(f"#!/bin/sh\n{script}\n")
        (folder / name / "python3").chmod(0o755)
    return folder

def start(folder, python="bin", **settings):
    path = f"{folder / python}:{os.environ['PATH']}"
    env = os.environ | {"SCALE": "smoke", "PATH": path, "CDPATH": str(folder / "bin")} | settings
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "train.sh"], cwd=folder, env=env, start_new_session=True, **pipes)

def train(folder, python="bin", **settings):
    process = start(folder, python, **settings)
    return *process.communicate(), process.returncode

def results(folder, **where):
    rows = csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if where.items() <= row.items()]

@pytest.fixture(scope="module")
def smoke(folder):
    """The folder of one whole run, and what it printed."""
    out, err, code = train(folder)
    assert code == 0, out + err
    return folder / "out", out

def test_a_run_holds_the_whole_experiment(smoke):
    """Every row of the table; the last lines hold a small one."""
    out, printed = smoke
    for key, values in {"method": "plain twice oversample equal oracle", "structure": "cup rim mean", "metric": "dice iou",
                        "group": "overall es sd worst gap eq1 p Asian Black White"}.items():
        assert {row[key] for row in results(out)} == set(values.split())
    last = printed[printed.index("mean Dice of"):].splitlines()
    table = [line for line in last if line.startswith("|")]
    assert [line.split()[1] for line in table[-5:]] == ["plain", "twice", "oversample", "equal", "oracle"]
    first = results(out, metric="dice", structure="mean")[0]
    assert max(map(len, last)) <= 100 and f"{float(first['value']):.4f}" in table[-5] and "Twice the steps change" in printed

def test_the_report_shows_the_numbers(smoke, tmp_path):
    """Each group's Dice by method, every structure's overall Dice, all pictures; so does a browser, if there is one."""
    page = (smoke[0] / "report.html").read_text(encoding="utf-8")
    if shutil.which("chromium"):
        flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
        argv = ["chromium", *flags, f"--user-data-dir={tmp_path}", (smoke[0] / "report.html").as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        page = done.stdout
    shown = results(smoke[0], metric="dice", group="overall")
    for name in ("Asian", "Black", "White"):
        shown += results(smoke[0], metric="dice", structure="mean", group=name)
    assert len(shown) == 5 * 6 and [row for row in shown if f"{float(row['value']):.4f}" not in page] == []
    pictures = re.findall("<img [^>]*src=.([^'\"]+)", page)
    for name in ("data/train.npz", "base-alone.npz", "masks-all.npz", "synthetic-all.npz", "equal.npz", "table1.csv"):
        assert f"{name}.png" in pictures and (smoke[0] / f"{name}.png").is_file(), name
    assert "no medical evidence" in page

def test_the_same_command_skips_all_that_is_done(folder, smoke):
    """A run is known by any spelling of its folder, also moved, and prints the same table; another SEED is refused."""
    shutil.copytree(smoke[0], folder / "moved")
    for spelling in ("out", f"{smoke[0]}/", "moved"):
        out, err, code = train(folder, OUT=spelling)
        stages = re.findall(r"(?m)^== .*", out)
        assert code == 0 and len(stages) > 20 and all(line.endswith(": done") for line in stages), err
        assert re.findall(r"(?m)^\|.*", out) == re.findall(r"(?m)^\|.*", smoke[1])
    out, err, code = train(folder, SEED="1")
    assert code == 2 and re.search(r"data had other settings.*< --seed 1.*> --seed 0", err) and "==" not in out
    assert train(folder, GPUS="2")[2] == 2                              # the trainings were made by one process

def test_a_killed_run_ends_like_an_unbroken_one(folder, smoke):
    """SIGKILL in a training, then the same command: what is done is kept, and the results are the same."""
    shutil.copytree(smoke[0], folder / "killed")
    for path in list((folder / "killed").rglob("*")):
        if re.match("synthetic-all|equal|predict-equal|table-|results", path.name):      # as if not yet begun
            path.unlink()
    process = start(folder, OUT="killed")
    while not (folder / "killed/log/equal-0.txt").exists() and process.poll() is None:
        time.sleep(0.05)
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()] * 2:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == process.pid:                           # train.sh and all that it started
                os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "killed/equal-0.pt").exists()
    out, _, code = train(folder, OUT="killed")
    assert code == 0 and "== equal: done" in out and "== equal-0: done" not in out
    assert (folder / "killed/results.csv").read_bytes() == (smoke[0] / "results.csv").read_bytes()

def test_a_run_that_is_ended_leaves_nothing_behind(folder):
    """SIGTERM to train.sh alone ends its first stage, too, before it writes."""
    process = start(folder, OUT="ended")
    while not (folder / "ended/log/data.txt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.communicate() and os.listdir(folder / "ended") == ["log"]            # waits for all that it started

BAD = [{"SEED": "08"}, {"SEED": "0 1"}, {"SEEDS": "1 1"}, {"METHODS": "nonsense"}, {"GPUS": "0"}, {"DATA": "missing"},
       {"WEIGHTS": "missing", "SCALE": "paper"}, {"WEIGHTS": "other.npz", "SCALE": "paper", "DATA": "none"},
       {"WEIGHTS": "R50+ViT-B_16.npz"}, {"RARE": "0"}, {"SCALE": "huge"}]

@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_settings_are_refused_before_any_stage(folder, settings):
    """Exit code 2 and one line that names the setting or its value; no folder is made."""
    np.savez(folder / "R50+ViT-B_16.npz", **{"conv_root/kernel": np.zeros(1)})
    np.savez(folder / "other.npz", kernel=np.zeros(1))
    out, err, code = train(folder, "bin" if "WEIGHTS" in settings else "idle", OUT="none", **settings)
    assert code == 2 and out == "" and err.count("\n") == 1 and not (folder / "none").exists()
    assert any(word in err for word in next(iter(settings.items())))

FRESH = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
  *version_info*) exec "{python}" -c 'import sys; sys.exit({old})' ;;
  -V) echo Python 3.9.1 ;;
  *"import torch"*) [ -e "$here/torch" ] ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*) sleep 0.5; [ ! -e "$here/../../broken" ] && touch "$here/torch" ;;
  *os.rename*) exec "{python}" "$@" ;;
  *) echo "a stage ran: $*" >&2; exit 9 ;;
esac
"""

def test_packages_are_installed_whole_or_not_at_all(folder):
    """An installation that fails leaves no .venv, two at once leave one that works; an old python3 is refused."""
    for name, old in (("fresh", 0), ("old", 1)):
        (folder / name).mkdir()
        (folder / name / "python3").write_text(FRESH.format(python=sys.executable, old=old))
        (folder / name / "python3").chmod(0o755)
    _, err, code = train(folder, "old", OUT="none")
    assert code == 2 and "3.10" in err and "3.9.1" in err and err.count("\n") == 1 and not (folder / "none").exists()
    (folder / "broken").touch()
    assert train(folder, "fresh", OUT="none")[2] != 0 and not (folder / ".venv").exists()
    (folder / "broken").unlink()
    for process in [start(folder, "fresh", OUT=f"none{i}") for i in (1, 2)]:
        assert "a stage ran" in process.communicate()[1]
    assert (folder / ".venv/bin/torch").exists() and not (folder / ".venv/.venv").exists()
    shutil.rmtree(folder / ".venv")

def test_a_small_set_of_ones_own_reaches_its_table(folder):
    """25 patients, one structure, three scanners, the rarest absent from the test part: DATA=own.npz."""
    image, mask = (fairdiff.make_phantom(25, 32, seed=2)[key] for key in ("image", "mask"))
    np.savez(folder / "own.npz", image=image, mask=np.minimum(mask, 1), scanner=np.repeat(["A", "B", "C"], (14, 9, 2)))
    out, err, code = train(folder, DATA="own.npz", ATTRIBUTE="scanner", METHODS="equal oracle", OUT="own")
    assert code == 0, out[-2000:] + err[-2000:]
    assert set(fairdiff.load_set(folder / "own/data/test.npz")["scanner"]) == {"A", "B"}
    assert {"A", "B", "overall"} <= {row["group"] for row in results(folder / "own", structure="structure")}
    assert re.findall(r"(?m)^\| (equal|or\w+|ov\w+) ", out) == ["equal", "oversample"] and "medical" not in out

def test_fairseg_files_a_failing_stage_and_a_changed_file(folder, phantom):
    """A folder of FairSeg files is imported; a training that fails ends the run at once; a changed file is noticed."""
    fairdiff.save_set(folder / "set.npz", fairdiff.subset(phantom, slice(40)))
    assert run(fairdiff, "export", folder / "set.npz", folder / "files") == 0
    (folder / "seg/oversample-0.pt").mkdir(parents=True)                # in the way of a checkpoint
    assert train(folder, DATA="files", OUT="seg", METHODS="plain")[2] == 2
    assert not (folder / "seg/equal.npz").exists() and not (folder / "seg/log/oversample-0.done").exists()
    (folder / "files/data_00001.npz").write_bytes((folder / "files/data_00001.npz").read_bytes()[::-1])
    _, err, code = train(folder, DATA="files", OUT="seg", METHODS="plain")
    assert code == 2 and "data had other settings" in err and "checksum of DATA" in err and err.count("\n") == 1

def test_train_sh_runs_on_an_old_bash():
    """Nothing in it is newer than the bash 3.2 of a Mac."""
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train.sh", ".ci/python.sh"))
    assert not re.findall(r"wait -n|mapfile|readarray|declare -A|local -n|\$\{\w+(?:,,?|\^\^?)\}|&>>|\|&", code)

COMMANDS = {fairdiff: "phantom, fairseg a, images a b c, split a, export a b, mix a b, report a",
            pointdiff: "train a, sample a, evaluate a b c", transunet: "train a, predict a b", fairness: "table a b=c",
            controlnet: "train-base a, train-control a b, sample a b, evaluate a b c d"}

@pytest.mark.parametrize("module, line", [(module, x) for module in COMMANDS for x in COMMANDS[module].split(", ")])
def test_help_and_unknown_options(module, line, capsys, refused):
    """Every command explains itself; an option that it does not know is exit code 2 and one line."""
    with pytest.raises(SystemExit, match="^0$"):
        run(module, line.split()[0], "--help")
    assert "usage" in capsys.readouterr().out
    refused(module, *line.split(), "--nonsense", words="--nonsense")

TRAININGS = [(pointdiff, "train set.npz --width 8 --points 64"), (controlnet, "train-base set.npz --width 8"),
             (controlnet, "train-control set.npz base.pt"),
             *[(transunet, f"train set.npz --width 8 --method {method}") for method in transunet.METHODS]]

@pytest.mark.parametrize("module, line", TRAININGS, ids=[line for _, line in TRAININGS])
def test_killed_and_continued_equals_unbroken(here, phantom, monkeypatch, capsys, module, line):
    """Training, some patients unknown, ends bit for bit the same; another setting is refused and named, old and new."""
    fairdiff.save_set("set.npz", phantom | {"race": np.where(np.arange(60) % 3 == 0, "", phantom["race"])})
    if "base.pt" in line:
        assert run(controlnet, "train-base", "set.npz", "--width", 8, "--batch", 4, "--steps", 1) == 0
    update, steps = fairdiff.Run.update, []
    def interrupted(training, loss):
        steps.append(training.step)
        if len(steps) == 8 + 6:
            raise KeyboardInterrupt
        update(training, loss)
    monkeypatch.setattr(fairdiff, "SAVE_EVERY", 4)
    monkeypatch.setattr(fairdiff.Run, "update", interrupted)
    argv = [*line.split(), "--batch", 4, "--steps", 8, "--out"]
    assert [run(module, *argv, path) for path in ("whole.pt", "broken.pt", "broken.pt")] == [0, 130, 0]
    assert steps == [*range(8), *range(6), *range(4, 8)]
    a, b = map(fairdiff.load_checkpoint, ("whole.pt", "broken.pt"))
    assert all(np.array_equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])
    assert run(module, *argv, "broken.pt", "--lr", 0.5) == 2
    assert re.search("lr was .*, now 0.5", capsys.readouterr().err.splitlines()[-1])

@pytest.mark.parametrize("line", ["pointdiff.py train --points 64 --batch 1", "transunet.py train --batch 2"])
def test_two_processes_train_one_model(here, line):
    """torchrun parts a batch, nobody's part is empty; only the first process prints and saves."""
    file, *argv = f"{line} set.npz --width 8 --steps 2 --out model.pt".split()
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / file, *argv]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.stdout.count("after 2 steps") == 1 and fairdiff.load_checkpoint("model.pt")["step"] == 2, done.stderr

@pytest.mark.parametrize("module, command, size, disc, words", [
    (controlnet, "train-base", 36, 1, "36 multiples 8"), (transunet, "train", 32, 0, "empty"),
    (transunet, "train", 16, 1, "--batch")])
def test_sets_that_cannot_be_learnt_are_refused(here, refused, module, command, size, disc, words):
    """36 px cannot be halved three times, empty masks teach nothing, 16 px one by one are too little for BatchNorm."""
    data = fairdiff.make_phantom(4, size, seed=0)
    fairdiff.save_set("set.npz", data | {"mask": disc * data["mask"]})
    refused(module, command, "set.npz", "--batch", 1, "--steps", 2, words=words)
    refused(module, command, "set.npz", "--width", 12, words="--width 12 8")
