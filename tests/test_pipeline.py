"""train.sh from end to end at SCALE=smoke: whole, again, killed, failed, with other data, with bad settings."""
import contextlib
import csv
import os
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

ROOT = os.path.dirname(os.path.abspath(fairdiff.__file__))
REAL = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
IDLE = (f'#!/bin/sh\ncase "$*" in -*|*" report "*) ;; *" table "*) exec "{sys.executable}" "$@" ;; '
        '*) echo "a stage ran: $*" >&2; exit 9 ;; esac\n')

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A clean copy of the files, with a python3 that runs them and one, idle, that fails where a stage would run."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("fairdiff.py", "fairness.py", "pointdiff.py", "controlnet.py", "transunet.py", "train.sh"):
        shutil.copy(os.path.join(ROOT, name), folder)
    (folder / "R50+ViT-B_16.npz").touch()
    for name, script in (("real", REAL), ("idle", IDLE)):
        (folder / name).mkdir()
        (folder / name / "python3").write_text(script)
        (folder / name / "python3").chmod(0o755)
    return folder

def start(folder, python="real", **settings):
    env = os.environ | {"SCALE": "smoke", "PATH": f"{folder / python}:{os.environ['PATH']}"} | settings
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "train.sh"], cwd=folder, env=env, start_new_session=True, **pipes)

def kill(process):
    """SIGKILL for train.sh and all that it started."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()] * 2:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
    process.communicate()

def train(folder, python="real", **settings):
    process = start(folder, python, **settings)
    out_and_err = process.communicate()
    return process.returncode, *out_and_err

def results(folder, **where):
    with open(folder / "results.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]

@pytest.fixture(scope="module")
def smoke(copy):
    """The folder of one whole run, and what it printed."""
    code, out, err = train(copy)
    assert code == 0, out + err
    return copy / "out", out

def test_a_run_holds_the_whole_experiment(smoke):
    """Every row of the table, equal groups in the mixed set; the last lines hold a small table."""
    out, printed = smoke
    for key, values in {"method": "plain oversample equal oracle", "structure": "cup rim mean", "metric": "dice iou",
                        "group": "overall es sd worst gap eq1 p Asian Black White"}.items():
        assert {row[key] for row in results(out)} == set(values.split())
    for mixed in map(fairdiff.load_set, (out / "mixed.npz", out / "oracle.npz")):
        assert np.unique(mixed["race"], return_counts=True)[1].tolist() == [32] * 3
    last = printed[printed.index("mean Dice of"):].splitlines()
    table = [line for line in last if line.startswith("|")]
    assert [line.split()[1] for line in table[-4:]] == ["plain", "oversample", "equal", "oracle"]
    first = results(out, metric="dice", structure="mean")[0]
    assert max(map(len, last)) <= 100 and f"{float(first['value']):.4f}" in table[-4]

def test_the_report_shows_the_numbers(smoke):
    """Each group's Dice by method with its interval, every structure's overall Dice, the pictures of all stages."""
    page = (smoke[0] / "report.html").read_text(encoding="utf-8")
    shown = [row for row in results(smoke[0], metric="dice")
             if row["group"] in ("overall", *["Asian", "Black", "White"] * (row["structure"] == "mean"))]
    assert len(shown) == 4 * 6 and [row for row in shown if f"{float(row['value']):.4f}" not in page] == []
    for name in ("data/train.npz", "base.pt", "masks-all.npz", "synthetic-all.npz", "mixed.npz", "table1.csv"):
        assert f"src='{name}.png'" in page and (smoke[0] / f"{name}.png").is_file(), name
    assert "no medical evidence" in page

@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_the_report_opens_in_a_browser(smoke, tmp_path):
    """Headless Chromium has nothing to complain of, and its DOM holds the numbers."""
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
    done = subprocess.run(["chromium", *flags, f"--user-data-dir={tmp_path}", (smoke[0] / "report.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    assert all(f"{float(row['value']):.4f}" in done.stdout for row in results(smoke[0], metric="dice", group="overall"))

def test_the_same_command_skips_all_that_is_done(copy, smoke):
    """OUT=out, out/, ./out, the absolute path and a moved folder are one run, which prints the same table.
    Another SEED there: exit code 2, the stage, the new value and the old one, and nothing is made."""
    shutil.copytree(smoke[0], copy / "moved")
    for spelling in ("out", "out/", "./out", str(smoke[0]), "moved"):
        code, out, err = train(copy, "idle", OUT=spelling)
        stages = re.findall(r"(?m)^== .*", out)
        assert code == 0 and len(stages) > 20 and all(line.endswith(": done") for line in stages), err
        assert re.findall(r"(?m)^\|.*", out) == re.findall(r"(?m)^\|.*", smoke[1])
    code, out, err = train(copy, "idle", SEED="1")
    assert code == 2 and re.search(r"data had other settings.*< 1.*> 0", err) and "a stage ran" not in err

def test_a_killed_run_ends_like_an_unbroken_one(copy, smoke):
    """SIGKILL in a training, then the same command: what is done is kept, and the results are the same."""
    shutil.copytree(smoke[0], copy / "killed")
    for path in list((copy / "killed").rglob("*")):
        if re.match("synthetic-all|mix|equal-0|predict-equal|table-|results", path.name):      # as if not yet begun
            path.unlink()
    process = start(copy, OUT="killed")
    while not (copy / "killed/log/equal-0.txt").exists() and process.poll() is None:
        time.sleep(0.05)
    kill(process)
    assert process.returncode == -signal.SIGKILL and not (copy / "killed/equal-0.pt").exists()
    code, out, _ = train(copy, OUT="killed")
    assert code == 0 and "== mix: done" in out and "== equal-0: done" not in out
    assert (copy / "killed/results.csv").read_bytes() == (smoke[0] / "results.csv").read_bytes()

BAD = [{"SEED": "08"}, {"SEED": "0 1"}, {"SEEDS": "1 1"}, {"METHODS": "nonsense"}, {"GPUS": "x"}, {"DATA": "missing"},
       {"WEIGHTS": "missing", "SCALE": "paper"}, {"WEIGHTS": "R50+ViT-B_16.npz"}, {"RARE": "-1"}, {"SCALE": "huge"}]

@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_settings_are_refused_before_any_stage(copy, settings):
    """Exit code 2 and one line that names the setting or its value; no folder is made."""
    code, out, err = train(copy, "idle", OUT="none", **settings)
    assert code == 2 and out == "" and err.count("\n") == 1 and not (copy / "none").exists()
    assert any(word in err for word in next(iter(settings.items())))

def test_a_group_column_that_is_not_there_is_refused(copy):
    """ATTRIBUTE=nonsense: exit code 2, a line that lists the columns, no traceback and no set."""
    code, _, err = train(copy, OUT="nonsense", ATTRIBUTE="nonsense")
    assert code == 2 and "maritalstatus" in err and "Traceback" not in err and not list(copy.glob("nonsense/*/*.npz"))

def test_a_small_set_of_ones_own_reaches_its_table(copy):
    """25 patients, one structure, three scanners, the rarest absent from the test part: DATA=own.npz."""
    image, mask = (fairdiff.make_phantom(25, 32, seed=2)[key] for key in ("image", "mask"))
    np.savez(copy / "own.npz", image=image, mask=np.minimum(mask, 1), scanner=np.repeat(["A", "B", "C"], (14, 9, 2)))
    code, out, err = train(copy, DATA="own.npz", ATTRIBUTE="scanner", METHODS="equal", OUT="own")
    assert code == 0, out[-2000:] + err[-2000:]
    assert set(fairdiff.load_set(copy / "own/data/test.npz")["scanner"]) == {"A", "B"}
    assert len(set(np.unique(fairdiff.load_set(copy / "own/mixed.npz")["scanner"], return_counts=True)[1])) == 1
    rows = results(copy / "own", structure="structure", metric="dice")
    assert {"A", "B", "overall"} <= {row["group"] for row in rows}
    assert re.search(r"^\| equal ", out, re.M) and "medical" not in out

def test_fairseg_files_a_failing_stage_and_a_new_file(copy, phantom):
    """A folder of FairSeg files is imported; a stage that fails ends the run without a table; a new file is noticed."""
    fairdiff.save_set(copy / "set.npz", {key: array[:40] for key, array in phantom.items()})
    assert run(fairdiff, ["export", str(copy / "set.npz"), str(copy / "files")]) == 0
    (copy / "seg/base.pt").mkdir(parents=True)                          # in the way of a checkpoint
    process = start(copy, DATA="files", OUT="seg", METHODS="plain")
    assert process.wait() not in (0, -signal.SIGKILL)
    kill(process)
    assert not (copy / "seg/results.csv").exists() and not (copy / "seg/log/base.done").exists()
    data = [fairdiff.load_set(copy / f"seg/data/{part}.npz") for part in ("train", "test")]
    assert sum(len(part["name"]) for part in data) == 40 and set(data[0]["race"]) == {"Asian", "Black", "White"}
    shutil.copy(copy / "files/data_00001.npz", copy / "files/data_00041.npz")
    code, _, err = train(copy, "idle", DATA="files", OUT="seg", METHODS="plain")
    assert code == 2 and "data had other settings" in err and err.count("\n") == 1

def test_train_sh_runs_on_an_old_bash(copy):
    """The syntax is whole, and nothing in it is newer than the bash 3.2 of a Mac."""
    assert subprocess.run(["bash", "-n", copy / "train.sh"]).returncode == 0
    code = re.sub(r"(?m)^#.*", "", (copy / "train.sh").read_text(encoding="utf-8"))
    assert not re.findall(r"wait -n|mapfile|readarray|declare -A|local -n|\$\{\w+(?:,,?|\^\^?)\}|&>>|\|&", code)

COMMANDS = {fairdiff: "phantom, fairseg a, images a b c, split a, export a b, mix a b, report a",
            pointdiff: "train a, sample a, evaluate a b c", transunet: "train a, predict a b", fairness: "table a b=c",
            controlnet: "train-base a, train-control a b, sample a b, evaluate a b c d"}

@pytest.mark.parametrize("module, line", [(module, x) for module in COMMANDS for x in COMMANDS[module].split(", ")])
def test_help_and_unknown_options(module, line, capsys):
    """Every command explains itself; an option that it does not know is exit code 2 and one line."""
    with pytest.raises(SystemExit, match="^0$"):
        run(module, [line.split()[0], "--help"])
    assert "usage" in capsys.readouterr().out
    assert run(module, [*line.split(), "--nonsense"]) == 2
    error = capsys.readouterr().err
    assert "--nonsense" in error and error.count("\n") == 1
