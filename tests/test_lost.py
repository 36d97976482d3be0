"""Nothing is lost (kill, Ctrl-C, full disk, second run, NaN) and no one is let in (crafted files, odd text)."""
import fcntl
import importlib
import io
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

import controlnet
import fairdiff
import fairness
import pointdiff
import transunet

PROCESSES = multiprocessing.get_context("forkserver")                   # torch is loaded once, every child starts at once
PROCESSES.set_forkserver_preload(["torch", "scipy.ndimage", "scipy.spatial", "PIL.Image", "tqdm", "pytest"])


def child(folder, module, line, limit):
    """One command in a process of its own; limit: bytes that a file may have. Checkpoints every two steps."""
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    module = importlib.import_module(module)
    module.SAVE_EVERY = 2
    sys.exit(module.main(line.split()))


def run(folder, module, line, limit=None, kill_after=None, once=None):
    """Exit code and error lines of a command; kill_after seconds, once a file is there, it is sent SIGKILL."""
    process = PROCESSES.Process(target=child, args=(folder, module, line, limit))
    process.start()
    while once and not once.exists() and process.is_alive():
        time.sleep(0.002)
    process.join(kill_after)
    process.kill()
    process.join()
    return process.exitcode, spoken((folder / "stderr").read_text() if (folder / "stderr").exists() else "")


def spoken(error):
    """The lines of stderr but for progress bars."""
    return [line for line in error.splitlines() if line.strip() and not re.search(r"\d+/\d+ \[", line)]


TRAIN = {"points": ("pointdiff", "train set.npz --steps 7 --batch 16 --width 16 --points 64"),
         "plain": ("transunet", "train set.npz --steps 7 --batch 4 --width 8"),
         "base": ("controlnet", "train-base set.npz --steps 7 --batch 4 --width 8"),
         "control": ("controlnet", "train-control set.npz base.pt --steps 7 --batch 4")}
STAGES = TRAIN | {"phantom": ("fairdiff", "phantom --train 60 --test 0 --size 32"),
                  "masks": ("pointdiff", "sample points.pt --steps 4 --n 9 --rough"),
                  "synthetic": ("controlnet", "sample control.pt set.npz --steps 2"),
                  "predict": ("transunet", "predict plain.pt set.npz"),
                  "mix": ("fairdiff", "mix set.npz set2.npz"), "table": ("fairness", "table set.npz set.npz")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with what every stage reads."""
    folder = tmp_path_factory.mktemp("inputs")
    data = fairdiff.make_phantom(10, 32, seed=9, balance="race")
    fairdiff.save_set(folder / "set.npz", data)
    fairdiff.save_set(folder / "set2.npz", data | {"name": np.char.add("x", data["name"])})
    for name, (module, line) in TRAIN.items():
        steps = "--steps 80 --lr 1e-2" if name == "points" else "--steps 2"     # clouds must be readable
        assert run(folder, module, f"{line.replace('--steps 7', steps)} --out {name}.pt")[0] == 0
    return folder


@pytest.fixture
def work(inputs, tmp_path):
    """A copy of the inputs to work in."""
    return pathlib.Path(shutil.copytree(inputs, tmp_path / "work"))


def results(folder):
    """{file: what it holds} of what a stage wrote: every number of a checkpoint, every byte of another file."""
    return {p.name: flat(torch.load(p)) if p.suffix == ".pt" and zipfile.ZipFile(p).namelist()[0].endswith("data.pkl")
            else p.read_bytes() for p in folder.iterdir() if p.name[0] != "." and p.name[:3] != "std"}


def flat(x):
    """Nested dicts and lists as text and bytes that compare equal where every bit does."""
    if isinstance(x, dict):
        return {k: flat(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [flat(v) for v in x]
    return (str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()) if torch.is_tensor(x) else repr(x)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_as_if_it_had_not_been(stage, work):
    """SIGKILL at random moments, then once more to the end: every file is the unbroken run's, bit for bit."""
    module, line = STAGES[stage]
    out = "" if stage == "phantom" else "/set.csv" if stage == "table" else "/x.pt"
    started = time.monotonic()
    assert run(work, module, f"{line} --out a{out}") == (0, [])
    took = time.monotonic() - started
    moments = [(random.uniform(0, took), None)]
    if stage in TRAIN:                                                  # and right after its first checkpoint
        moments.insert(0, (random.uniform(0, 0.1), work / "b/x.pt"))
    codes = [run(work, module, f"{line} --out b{out}", kill_after=after, once=once)[0] for after, once in moments]
    assert set(codes) <= {-9, 0}, (codes, moments)
    assert run(work, module, f"{line} --out b{out}") == (0, []), moments
    assert results(work / "a") == results(work / "b"), moments
    assert stage not in TRAIN or not list((work / "b").glob(".*.part"))


def test_ctrl_c_is_one_line_that_says_how_to_continue(work):
    """A training and train.sh, each at a random moment: exit code 130 (or the signal's own) and that line alone."""
    env = os.environ | {"SCALE": "smoke", "OUT": "smoke", "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in ([sys.executable, ROOT / "transunet.py", "train", "set.npz", "--steps", "9999", "--out", "c.pt"],
                    ["bash", ROOT / "train.sh"]):
        process = subprocess.Popen(command, cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)
        moment = random.uniform(1, 6)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGINT)
        lines = spoken(process.communicate(timeout=60)[1])
        assert process.returncode in (130, -2), moment
        what = "continues" + " a training" * (command[1].suffix == ".py")
        assert lines == [f"{command[1].name}: interrupted; the same command again {what}"], moment


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_falls_into_a_callback_is_heard_all_the_same(capsys):
    """Raised where Python drops it, as in __del__, it comes again."""
    class Callback:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def work(args):
        Callback()
        time.sleep(20)
    parser = fairdiff.Parser(prog="x.py")
    parser.add_subparsers(dest="command").add_parser("go").set_defaults(run=work)
    started = time.monotonic()
    assert fairdiff.run_command(parser, ["go"]) == 130
    assert time.monotonic() - started < 10 and "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("stage", ["points", "plain", "base", "phantom", "masks", "predict"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(stage, work):
    """No file may exceed 1 kB: exit code 2, one line, earlier results intact, nothing half written."""
    module, line = STAGES[stage]
    before = results(work)
    code, error = run(work, module, f"{line} --out {'a' if stage == 'phantom' else 'a/x.pt'}", limit=1000)
    assert code == 2 and len(error) == 1 and ("disk full" in error[0] or "File too large" in error[0]), error
    assert {p.name for p in (work / "a").iterdir()} <= {".x.pt.lock"}
    shutil.rmtree(work / "a")
    assert results(work) == before


def test_a_full_disk_ends_train_sh(work, monkeypatch):
    """The whole pipeline without room for its first file: the stage's line, exit code 2."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.run(["bash", ROOT / "train.sh"], cwd=work, capture_output=True, text=True,
                             env=os.environ | {"SCALE": "smoke", "OUT": "full", "PATH": path},
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "File too large" in process.stderr
    assert not list((work / "full/data").iterdir())


def test_a_second_run_on_the_same_out_is_refused(work):
    """While one training is at it a second one, and a second train.sh, end with 2 and one line; the first goes on."""
    module, line = TRAIN["plain"]
    first = PROCESSES.Process(target=child, args=(work, module, line.replace("--steps 7", "--steps 9999") + " --out o/x.pt", 0))
    first.start()
    while not (work / "o/x.pt").exists():
        assert first.is_alive()
        time.sleep(0.05)
    again = line.replace("--steps 7", "--steps 9999").replace("set.npz", "../set.npz") + " --out x.pt"
    code, error = run(work / "o", module, again, kill_after=60)
    alive = first.is_alive()
    first.kill()
    first.join()
    assert code == 2 and len(error) == 1 and "another run" in error[0] and alive
    assert fairdiff.load_checkpoint(work / "o/x.pt")["step"] >= 2
    (work / "out/log").mkdir(parents=True)
    with open(work / "out/log/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        again = subprocess.run(["bash", ROOT / "train.sh"], cwd=work, capture_output=True, text=True,
                               env=os.environ | {"SCALE": "smoke", "PATH": path})
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "another run" in again.stderr
    assert [p.name for p in (work / "out").rglob("*")] == ["log", "lock"]


# ------------------------------------------------------------------------------------------------------------
# In this process

@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def refused(capsys, module, line, code=2):
    """The one line that a command ends with."""
    assert module.main(line.split()) == code
    line, = spoken(capsys.readouterr().err)
    return line


@pytest.mark.parametrize("name, module", [("points", pointdiff), ("plain", transunet), ("base", controlnet), ("control", controlnet)])
def test_a_checkpoint_cut_short_or_of_another_dataset_is_left_alone(name, module, here, capsys):
    """One line that says so; the file stays as it is."""
    line = TRAIN[name][1].replace("--steps 7", "--steps 80 --lr 1e-2" if name == "points" else "--steps 2") + f" --out {name}.pt"
    whole = (here / f"{name}.pt").read_bytes()
    (here / f"{name}.pt").write_bytes(whole[:-100])
    assert f"{name}.pt: not a readable checkpoint" in refused(capsys, module, line)
    assert (here / f"{name}.pt").read_bytes() == whole[:-100]
    (here / f"{name}.pt").write_bytes(whole)
    data = fairdiff.load_set("set.npz")
    fairdiff.save_set("set.npz", data | {"mask": data["mask"][::-1]})
    assert "is of another run (data" in refused(capsys, module, line)
    assert (here / f"{name}.pt").read_bytes() == whole


@pytest.mark.parametrize("name, module", [("points", pointdiff), ("plain", transunet), ("base", controlnet), ("control", controlnet)])
def test_a_loss_that_is_not_finite_stops_the_stage(name, module, here, capsys, monkeypatch):
    """From step 4 on the loss is NaN or, in one of them, infinite: exit code 1, the step is named, the checkpoint of step 2 stays."""
    calls, value = [], float("inf" if name == "plain" else "nan")

    def spoil(loss):
        def spoilt(*args, **more):
            calls.append(1)
            return loss(*args, **more) * (value if len(calls) > 3 else 1)
        return spoilt
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(*(transunet, "seg_loss", spoil(transunet.seg_loss)) if name == "plain" else
                        (pointdiff.DDPM, "loss", spoil(pointdiff.DDPM.loss)))
    line = refused(capsys, module, f"{TRAIN[name][1]} --out x.pt", code=1)
    assert "by step 4; x.pt keeps the last good state" in line
    state = fairdiff.load_checkpoint("x.pt")
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["ema"].values())


def test_a_point_model_that_is_not_finite_at_its_end_is_one_line(here, capsys, monkeypatch):
    """Without a checkpoint on the way, too: the loss is looked at before the shape codes are fitted."""
    real = pointdiff.DDPM.loss
    monkeypatch.setattr(pointdiff.DDPM, "loss", lambda *a, **k: real(*a, **k) * float("nan"))
    line = refused(capsys, pointdiff, f"{TRAIN['points'][1]} --out x.pt", code=1)
    assert "the loss became nan" in line and not pathlib.Path("x.pt").exists()


# ------------------------------------------------------------------------------------------------------------
# No one let in

class Payload:
    """Makes the file `ran` where it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


def npz(path, **members):
    """A .npz whose members are given as bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


READERS = [(fairdiff, "mix {} set.npz"), (fairdiff, "fairseg seg"), (pointdiff, "train {}"), (transunet, "predict plain.pt {}"),
           (transunet, "train set.npz --weights {}"), (controlnet, "sample control.pt {}"), (fairness, "table set.npz {}")]
CHECKPOINT_READERS = [(pointdiff, "sample {}"), (transunet, "predict {} set.npz"), (transunet, "train set.npz --out {}"),
                      (controlnet, "sample {} set.npz"), (controlnet, "train-control set.npz {}"),
                      (controlnet, "train-control set.npz base.pt --reader {} --out y.pt")]


@pytest.mark.parametrize("module, line", READERS, ids=[f"{m.__name__} {line}" for m, line in READERS])
def test_no_pickle_in_a_dataset_is_run(module, line, here, capsys):
    """A payload where a command expects an array: refused, with the way to convert it; it did not run."""
    (here / "seg").mkdir()
    key = "conv_root/kernel" if "weights" in line else "image"
    arrays = {key: np.array(Payload(), object), "mask": np.zeros((2, 8, 8), np.uint8)}
    for path in ("evil.npz", "seg/data_00001.npz"):
        np.savez(path, **arrays, slo_fundus=arrays[key], disc_cup_mask=arrays["mask"][0])
    assert "needs pickle" in refused(capsys, module, line.format("evil.npz"))
    assert not (here / "ran").exists()
    with np.load("evil.npz", allow_pickle=True) as file:                # the payload is a live one
        file[key]
    assert (here / "ran").exists()


@pytest.mark.parametrize("module, line", CHECKPOINT_READERS, ids=[f"{m.__name__} {line}" for m, line in CHECKPOINT_READERS])
@pytest.mark.parametrize("form", ["zip", "bare", "legacy"])
def test_no_pickle_in_a_checkpoint_is_run(form, module, line, here, capsys):
    """A payload in a checkpoint, in torch's two formats and as a bare pickle: refused; it did not run."""
    state = {"config": {"kind": "points"}, "ema": Payload()}
    if form == "bare":
        (here / "evil.pt").write_bytes(pickle.dumps(state))
    else:
        torch.save(state, "evil.pt", _use_new_zipfile_serialization=form == "zip")
    assert "not a readable checkpoint" in refused(capsys, module, line.format("evil.pt"))
    assert not (here / "ran").exists()
    torch.load("evil.pt", weights_only=False) if form != "bare" else pickle.loads((here / "evil.pt").read_bytes())
    assert (here / "ran").exists()


def liar(kind):
    """A file of some hundred bytes that claims 3 GB: in an array's header, in the archive's table, or as a checkpoint."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED) as file:
        header = io.BytesIO()
        shape = (3, 1000, 1000, 1000) if kind == "header" else (8, 8, 8)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.writestr("a/data.pkl" if kind == "checkpoint" else "image.npy", header.getvalue() + bytes(512))
        if kind != "header":
            file.filelist[-1].file_size = 3 * 10 ** 9
        if kind == "packed":
            file.filelist[-1].compress_size = 3 * 10 ** 9
    return data.getvalue()


@pytest.mark.parametrize("kind", ["header", "stored", "deflated", "packed", "checkpoint"])
def test_a_header_that_claims_too_much_takes_no_memory(kind, here, capsys):
    """Refused before anything of that size is asked for."""
    (here / "liar").write_bytes(liar(kind))
    tracemalloc.start()
    module, line = (transunet, "predict liar set.npz") if kind == "checkpoint" else (fairdiff, "mix liar set.npz")
    assert "claim" in refused(capsys, module, line)
    assert tracemalloc.get_traced_memory()[1] < 10 ** 8
    tracemalloc.stop()


def test_text_from_files_is_escaped(here, capsys):
    """Escape sequences, Markdown, HTML and formulas in names: nothing of it reaches terminal, tables or page raw."""
    evil = "\x1b[2J\x1b]0;title\x07"
    data = fairdiff.load_set("set.npz")
    fairdiff.save_set("names.npz", data | {"name": np.char.add(evil, data["name"])})
    np.savez("keys.npz", **{evil: np.zeros(3)})
    state = torch.load("points.pt")
    state["config"]["groups"] = [evil + name for name in state["config"]["groups"]]
    torch.save(state, "groups.pt")
    (here / f"data{evil}.npz").write_bytes(b"")
    for module, line in ((fairness, "table set.npz names.npz"), (fairdiff, "mix keys.npz set.npz"), (fairdiff, "fairseg ."),
                         (pointdiff, "sample groups.pt --group x"), (pointdiff, "sample groups.pt --steps 4 --n 1 --rough"),
                         (fairness, f"table set.npz =1+1{evil}<script>|=set.npz"), (transunet, f"predict {evil} set.npz"),
                         (controlnet, f"train-base set.npz --attribute {evil}")):
        module.main(line.split(" "))
        out, err = capsys.readouterr()
        assert not set(evil) & set("\x1b\x07") & set(out + err)
    names = fairdiff.load_set("masks.npz")["name"]
    assert len(names) == 3 and all(name.isprintable() for name in names)
    fairdiff.save_set("=cmd.npz", data)
    assert fairness.main(["table", "set.npz", "=cmd.npz", "a|b<script>=set.npz"]) == 0
    rows = (here / "results.csv").read_text().splitlines()[1:]
    assert {row.split(",")[1] for row in rows} == {"cmd", "a|b<script>"}
    assert "<script>" not in (here / "tables.md").read_text() and "a\\|b&lt;script" in (here / "tables.md").read_text()
    (here / "log").mkdir()
    (here / "log/table.txt").write_text("<script>")
    assert fairdiff.main(["report", "."]) == 0 and "<script>" not in (here / "report.html").read_text()


def test_inception_says_that_it_runs_the_file(capsys):
    """The one option that runs a program out of a file says so."""
    with pytest.raises(SystemExit):
        controlnet.main(["quality", "--help"])
    assert "*runs* the file's program" in " ".join(capsys.readouterr().out.split())
