"""train.sh from end to end at SCALE=smoke, again, killed, on FairSeg files; and bad input for every command."""
import base64
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
import torch
from conftest import ROOT
from PIL import Image

import controlnet
import fairdiff
import fairness
import pointdiff
import transunet

FILES = ["fairdiff.py", "fairness.py", "pointdiff.py", "transunet.py", "controlnet.py", "train.sh",
         "requirements.txt"]


def train_sh(folder, **env):
    """Start train.sh at SCALE=smoke in a folder, in a process group of its own."""
    bin = os.path.dirname(os.path.realpath(shutil.which("true")))
    path = os.pathsep.join([os.environ["SHIM"], os.environ["PATH"], bin])
    return subprocess.Popen(["bash", "train.sh"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True,
                            env=os.environ | {"SCALE": "smoke", "PATH": path} | env)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A clean copy of the files, and a python3 on the PATH that is the one running the tests."""
    folder = tmp_path_factory.mktemp("copy")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    shim = tmp_path_factory.mktemp("shim")
    (shim / "python3").write_text(f'#!/bin/sh\nexec "{os.sys.executable}" "$@"\n')
    (shim / "python3").chmod(0o755)
    os.environ["SHIM"] = str(shim)
    return folder


@pytest.fixture(scope="module")
def smoke(copy):
    """The output folder of one whole run, and what it printed."""
    run = train_sh(copy)
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    return copy / "out", out


def test_smoke_run_holds_the_whole_experiment(smoke):
    """Every file is there, the results cover all rows, synthetic groups are equal after mixing."""
    out, printed = smoke
    for name in ("masks.npz", "synthetic.npz", "mixed.npz", "results.csv", "tables.md", "agreement.csv",
                 "table1.csv", "table1.csv.png", "report.html", "synthetic.npz.png"):
        assert (out / name).stat().st_size > 0, name
        assert name in printed or not name.endswith(".png")
    rows = list(csv.DictReader(open(out / "results.csv")))
    assert {r["method"] for r in rows} == {"plain", "oversample", "equal", "oracle"}
    assert {r["structure"] for r in rows} == {"cup", "rim"} and {r["metric"] for r in rows} == {"dice", "iou"}
    assert {"overall", "es", "sd", "worst", "gap", "eq1", "p"} <= {r["group"] for r in rows}
    mixed = fairdiff.load_set(out / "mixed.npz")
    assert np.bincount(mixed["race"]).tolist() == [5 * 32] * 3 and mixed["synthetic"].any()
    masks = fairdiff.load_set(out / "masks.npz")
    assert not masks["image"].any() and all((masks["mask"] == label).any((1, 2)).all() for label in (0, 1, 2))
    assert (fairdiff.load_set(out / "synthetic.npz")["image"].std((1, 2)) > 0).all()
    assert "ES-Dice" in printed and "seconds:" in printed


def test_run_again_skips_everything(copy, smoke):
    """The same command does no work and prints the same table."""
    before = {p: p.stat().st_mtime_ns for p in smoke[0].rglob("*.npz")}
    run = train_sh(copy)
    out, err = run.communicate()
    assert run.returncode == 0, err
    stages = [line for line in out.splitlines() if line.startswith("== ")]
    assert len(stages) > 15 and all(line.endswith("complete, skipped") for line in stages)
    assert {p: p.stat().st_mtime_ns for p in smoke[0].rglob("*.npz")} == before
    tables = [text[text.rindex("cup, by race"):text.rindex("pictures:")] for text in (out, smoke[1])]
    assert tables[0] == tables[1]


def test_report_shows_the_numbers_of_the_results(smoke):
    """Every group's Dice and interval in the charts, every stage's section and seconds, the command; no script."""
    out, _ = smoke
    page = (out / "report.html").read_text()
    titles = re.findall(r"<title>(\w+) ([\d.e-]+) \[([\d.e-]+), ([\d.e-]+)\]</title>", page)
    rows = [r for r in csv.DictReader(open(out / "results.csv")) if r["metric"] == "dice"
            and r["group"] in fairdiff.ATTRIBUTES["race"]]
    assert len(rows) == 2 * 4 * 3
    for r in rows:
        want = tuple(f"{float(r[k]):.4g}" for k in ("value", "lo", "hi"))
        assert (r["group"], *want) in titles, r
    assert "has not run" not in page and page.count("<h2>") == 9 and "<script" not in page
    assert "SCALE=smoke" in page and "no medical evidence" in page and page.count("<svg") == 4
    for png in [p for p in out.rglob("*.png") if p.name.split(".")[0] in ("masks", "control", "table1", "mixed")]:
        assert base64.b64encode(png.read_bytes()).decode() in page, png
    assert page.count("<img") == page.count("<img alt='") > 6


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_report_renders_in_a_browser(smoke, tmp_path):
    """Headless Chromium parses it without complaint, draws something, and its DOM holds results.csv's numbers."""
    url = (smoke[0] / "report.html").as_uri()
    flags = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path}", "--window-size=400,800"]
    dump = subprocess.run([*flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert dump.returncode == 0 and "CONSOLE" not in dump.stderr, dump.stderr
    rows = [r for r in csv.DictReader(open(smoke[0] / "results.csv")) if r["group"] == "Asian" and r["metric"] == "dice"]
    assert rows and all(f"Asian {float(r['value']):.4g} [" in dump.stdout for r in rows)
    subprocess.run([*flags, f"--screenshot={tmp_path / 'page.png'}", url], check=True, capture_output=True, timeout=120)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("L")))) > 50


def test_outputs_of_another_configuration_are_refused(copy, smoke):
    """Another seed into the same OUT: one line, exit code 2, nothing changed."""
    run = train_sh(copy, SEED="5")
    out, err = run.communicate()
    assert run.returncode == 2 and "another configuration" in err and len(err.splitlines()) == 1


def test_killed_run_continues_to_the_same_table(copy, smoke):
    """SIGKILL in the middle of the points training; run again, the table is the unbroken run's, bit for bit."""
    run = train_sh(copy, OUT="killed")
    deadline = time.time() + 120
    while not (copy / "killed/points.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    step = fairdiff.load_checkpoint(copy / "killed/points.pt")["step"]
    assert 0 < step < 300
    run = train_sh(copy, OUT="killed")
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert f"continuing killed/points.pt at step {step}" in out
    assert (copy / "killed/results.csv").read_bytes() == (smoke[0] / "results.csv").read_bytes()


def test_fairseg_files_run_the_pipeline(copy, smoke):
    """export -> DATA=folder -> the same pipeline, without an oracle."""
    assert fairdiff.main(["export", str(smoke[0] / "data/train.npz"), str(copy / "seg")]) == 0
    run = train_sh(copy, DATA="seg", OUT="real")
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert {r["method"] for r in csv.DictReader(open(copy / "real/results.csv"))} == {"plain", "oversample", "equal"}


STUB = """#!/bin/sh
case "$2" in *group_codes*) printf 'Asian\nOld and grey\n' ;; esac
[ "$1" = -c ] && exit 0
[ "$1" != -m ] || shift 4
shift_out() { while [ "$1" != --out ]; do shift; done; echo "$2"; }
echo "$(basename "$1") $(echo "$@" | cut -d' ' -f2-)" >> "$CALLS"
if [ "$2" = table ]; then out=$(shift_out "$@"); echo "attribute,x" > "$out"; echo "${out%/*},1" >> "$out"
  echo "# $out" > "${out%/*}/tables.md"; fi
"""


@pytest.fixture
def calls(copy, tmp_path, monkeypatch):
    """train.sh over a python3 that only notes what it is called with; returns the lines of a run."""
    (tmp_path / "python3").write_text(STUB)
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("SHIM", str(tmp_path))
    shutil.copy(ROOT / "train.sh", tmp_path)

    def run(**env):
        (tmp_path / "calls").write_text("")
        process = train_sh(tmp_path, CALLS=str(tmp_path / "calls"), **env)
        assert process.wait() == 0, process.stderr.read()
        return (tmp_path / "calls").read_text().splitlines()
    return run


def test_all_attributes_share_data_plain_and_judge(calls, tmp_path):
    """ATTRIBUTE=all: six runs, what knows no attribute is trained once and scored six times; again: all skipped."""
    lines = calls(ATTRIBUTE="all", METHODS="plain adv", SEEDS="0 4")
    trained = [line.split(" --out ")[1] for line in lines if line.startswith("transunet.py train")]
    assert len(trained) == len(set(trained)) == 2 + 1 + 6 * 2
    assert [t for t in trained if t.count("/") == 1] == ["out/plain.pt", "out/plain-4.pt", "out/judge.pt"]
    tables = [line for line in lines if line.startswith("fairness.py table out/data/test.npz")]
    assert len(tables) == 6 and all("plain:0=out/pred/plain.npz plain:4=out/pred/plain-4.npz" in t for t in tables)
    assert "adv:4=out/age/pred/adv-4.npz" in tables[-1] and "--attribute age --out out/age/results.csv" in tables[-1]
    assert [line for line in lines if line.startswith("fairdiff.py phantom --out out/data")][1:] == []
    assert (tmp_path / "out/results.csv").read_text().splitlines()[:3] == ["attribute,x", "out/race,1", "out/gender,1"]
    assert len((tmp_path / "out/tables.md").read_text().splitlines()) == 6
    again = calls(ATTRIBUTE="all", METHODS="plain adv", SEEDS="0 4")
    assert {line.split()[1] for line in again} == {"report"}


def test_rows_and_seeds_may_grow(calls):
    """A run with more METHODS or SEEDS into the same OUT trains only what is new, then prints the table anew."""
    first = calls()
    more = [line for line in calls(METHODS="plain adv", SEEDS="0 1") if "report" not in line]
    assert sum(line.startswith("transunet.py train") for line in first) == 5 and len(more) == 7
    assert [m.split(" --out ")[1] for m in more if "transunet.py train" in m] == ["out/plain-1.pt", "out/adv.pt", "out/adv-1.pt"]


def test_gpu_scale_is_the_papers_setting_on_several_processes(calls, tmp_path):
    """SCALE=gpu: a point model a group, every row of the tables; GPUS=2: what learns and draws runs under torchrun."""
    lines = calls(SCALE="gpu", GPUS="2")
    assert [line.split("--group ")[1].split(" --")[0] for line in lines if line.startswith("pointdiff.py train")] == [
        "Asian", "Old and grey"]
    for command in ("sample", "score"):
        assert any(line.startswith(f"pointdiff.py {command} out/points-0.pt out/points-1.pt ") for line in lines)
    rows = "plain oversample adv groupdro fairseg equal synthetic-only oracle".split()
    assert all(f"{row}:0=out/pred/{row}.npz" in lines[-2] for row in rows)
    (tmp_path / "w.npz").write_text("")
    lines = calls(SCALE="paper", OUT="paper", WEIGHTS="w.npz", METHODS="plain")
    assert any("--base --optimizer sgd --weights w.npz" in line for line in lines if "--out paper/plain.pt" in line)


@pytest.mark.parametrize("name, value", [("METHODS", "plain magic"), ("ATTRIBUTE", "zodiac"), ("SEEDS", "0 x"), ("SEEDS", " "),
                                         ("SEEDS", "0 1 0"), ("METHODS", "plain equal plain"), ("GPUS", "0"),
                                         ("WEIGHTS", "w.npz")])
def test_bad_dials_are_refused_at_once(copy, name, value):
    """Exit code 2 and one line before anything is made."""
    run = train_sh(copy, OUT="none", **{name: value})
    err = run.communicate()[1]
    assert run.returncode == 2 and name in err and len(err.splitlines()) == 1 and not (copy / "none").exists()


@pytest.fixture
def bad(tmp_path, phantom, monkeypatch):
    """A folder with one good set and all sorts of bad files; the working directory."""
    monkeypatch.chdir(tmp_path)
    fairdiff.save_set("set.npz", phantom)
    fairdiff.save_set("two.npz", fairdiff.take(phantom, phantom["race"] > 0))
    fairdiff.save_set("odd.npz", phantom | {"image": phantom["image"][:, :30, :30], "mask": phantom["mask"][:, :30, :30]})
    fairdiff.save_set("norace.npz", phantom | {"race": np.full(60, -1)})
    np.savez("key.npz", picture=phantom["image"])
    np.savez("shape.npz", image=phantom["image"], mask=phantom["mask"][:, :8])
    fairdiff.save_set("set2.npz", phantom | {"name": np.char.add("x", phantom["name"])})
    np.savez("flat.npz", image=np.zeros((5, 0, 0), np.uint8), mask=np.zeros((5, 0, 0), np.uint8))
    torch.save({"config": {"kind": "other"}}, "kind.pt")
    torch.save({"config": {"kind": "points", "groups": ["Asian"]}, "ema": {}}, "old.pt")
    torch.save({"config": {"kind": "transunet", "size": "compact", "width": 16}, "ema": {}}, "bare.pt")
    pathlib.Path("empty.npz").write_text("")
    pathlib.Path("text.pt").write_text("no checkpoint")
    pathlib.Path("seg").mkdir()
    pathlib.Path("file").write_text("")
    return tmp_path


BAD = [
    (fairdiff, "phantom --size 1000", "32 to 512"), (fairdiff, "phantom --train -1", "from 0"),
    (fairdiff, "phantom --out file/x --train 1 --size 32 --test 0", "folder"),
    (fairdiff, "phantom --balance height", "invalid choice"), (fairdiff, "fairseg nowhere", "no .npz"),
    (fairdiff, "export nowhere.npz seg", "fairdiff.py phantom"), (fairdiff, "mix set.npz key.npz", "no array"),
    (fairdiff, "mix set.npz set.npz --target 0", "--target"), (fairdiff, "mix norace.npz set.npz", "known race"),
    (fairdiff, "mix set.npz odd.npz --target 30", "pixels"), (fairdiff, "report nowhere", "train.sh"),
    (fairdiff, "dance", "invalid choice"),
    (pointdiff, "train nowhere.npz", "fairdiff.py phantom"), (pointdiff, "train key.npz", "no array 'image'"),
    (pointdiff, "train shape.npz", "but mask"), (pointdiff, "train set.npz --group Martian", "no group 'Martian'"),
    (pointdiff, "train two.npz --group Asian", "Asian"), (pointdiff, "train norace.npz", "known race"),
    (pointdiff, "sample nowhere.pt", "pointdiff.py train"), (pointdiff, "sample text.pt", "readable"),
    (pointdiff, "score nowhere.pt set.npz set.npz", "pointdiff.py train"),
    (transunet, "train nowhere.npz", "fairdiff.py phantom"), (transunet, "train shape.npz", "but mask"),
    (transunet, "train odd.npz", "divisible by 16"), (transunet, "train set.npz --method magic", "invalid choice"),
    (transunet, "train set.npz --method adv --strength -1", "--strength"), (transunet, "train set.npz --val 1", "--val"),
    (transunet, "train norace.npz --method groupdro", "known race"),
    (transunet, "predict nowhere.pt set.npz", "transunet.py train"), (transunet, "predict kind.pt set.npz", "other"),
    (controlnet, "train-base key.npz", "no array 'image'"), (controlnet, "train-base odd.npz", "divisible by 8"),
    (controlnet, "train-control set.npz nowhere.pt", "train-base"), (controlnet, "sample kind.pt set.npz", "control"),
    (controlnet, "sample nowhere.pt set.npz", "train-control"), (controlnet, "agree nowhere.pt set.npz set.npz", "transunet"),
    (controlnet, "quality nowhere.pt b.pt c.pt set.npz set.npz set.npz", "transunet"),
    (controlnet, "train-control set.npz nowhere.pt --reader nowhere.pt", "train-base"),
    (fairness, "table nowhere.npz set.npz", "fairdiff.py phantom"), (fairness, "table set.npz two.npz", "names"),
    (fairness, "table norace.npz norace.npz", "known race"),
    # Numbers that make no sense, places that cannot be written, files that are something else.
    (fairdiff, "phantom --shift nan", "--shift nan: expected a finite"), (fairdiff, "phantom --seed 99999999999", "--seed"),
    (fairdiff, "phantom --train 0 --test 0", "one image"), (fairdiff, "fairseg seg --crop 0", "--crop 0"),
    (fairdiff, "fairseg seg", "no .npz"), (fairdiff, "export set.npz file", "cannot make"),
    (fairdiff, "mix set.npz empty.npz", "readable"), (fairdiff, "mix flat.npz set.npz", "expected uint8 (N, H, W)"),
    (fairdiff, "mix set.npz set2.npz --target 1000", "group Asian"), (fairdiff, "mix set.npz set2.npz --n-real 1000", "--n-real"),
    (fairdiff, "mix set.npz set2.npz --out seg", "is a folder"), (fairdiff, "mix set.npz set2.npz --out file/x", "no folder"),
    (pointdiff, "train set.npz --batch 0", "--batch 0"), (pointdiff, "train set.npz --lr -1", "more than 0"),
    (pointdiff, "train set.npz --width 7", "multiple of 8"), (pointdiff, "train set.npz --out file/x.pt", "no folder"),
    (pointdiff, "train set.npz --device abacus", "expected auto, cpu or cuda"), (pointdiff, "sample kind.pt --n 0", "--n 0"),
    (pointdiff, "sample old.pt", "not a checkpoint of this version"), (pointdiff, "score old.pt set.npz set.npz --steps 8 0", "--steps 0"),
    (transunet, "train set.npz --val nan", "--val nan"), (transunet, "train set.npz --weights set.npz", "ImageNet"),
    (transunet, "predict bare.pt set.npz", "not a checkpoint of this version"), (transunet, "predict seg set.npz", "readable"),
    (controlnet, "train-base set.npz --patch 3", "divisible by 12"), (controlnet, "sample kind.pt set.npz --guidance inf", "--guidance"),
    (controlnet, "quality kind.pt a b set.npz set.npz set.npz --n 0", "--n 0"), (fairness, "table set.npz set.npz --out x.md", ".md"),
    (fairness, "table set.npz set.npz set.npz", "taken"), (fairness, "table set.npz kind.pt", "no array 'image'"),
]
PROCESSES = [("fairdiff", "phantom --size 1000", "32 to 512"), ("fairdiff", "mix nowhere.npz set.npz", "fairdiff.py phantom"),
             ("pointdiff", "sample nowhere.pt", "pointdiff.py train"), ("transunet", "predict text.pt set.npz", "readable"),
             ("controlnet", "train-base odd.npz", "divisible by 8"), ("fairness", "table set.npz two.npz", "names")]


@pytest.mark.parametrize("module, line, what", BAD, ids=[f"{m.__name__} {b}" for m, b, _ in BAD])
def test_bad_input(bad, capsys, module, line, what):
    """Exit code 2, one line on stderr that says what is wrong, no new file."""
    before = sorted(p for p in bad.rglob("*"))
    assert module.main(line.split()) == 2
    err = capsys.readouterr().err
    assert what in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(p for p in bad.rglob("*")) == before


def test_bad_input_of_processes(bad):
    """The same of six real processes, all at once: exit code 2, that line alone, no traceback, no file."""
    before = sorted(p for p in bad.rglob("*"))
    running = [subprocess.Popen([sys.executable, ROOT / f"{module}.py", *line.split()], stderr=subprocess.PIPE, text=True)
               for module, line, _ in PROCESSES]
    for process, (module, line, what) in zip(running, PROCESSES, strict=True):
        err = process.communicate()[1]
        assert process.returncode == 2, line
        assert what in err and len(err.splitlines()) == 1 and err.startswith(f"{module}.py: "), err
    assert sorted(p for p in bad.rglob("*")) == before
