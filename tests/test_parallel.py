"""Two gloo processes do what one does: trainings, killed ones too, sampling and prediction. And torch.compile."""
import importlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import fairdiff

PROCESSES = multiprocessing.get_context("forkserver")                   # torch is loaded once, every child starts at once
PROCESSES.set_forkserver_preload(["torch", "scipy.ndimage", "scipy.spatial", "PIL.Image", "tqdm", "pytest"])


def child(folder, module, line, environment, die_at):
    """One process of torchrun's, in fp32 and without kinks: bf16 rounds what the two compute differently, and a ReLU or
    a maximum that falls the other way would make of a rounding error another gradient."""
    os.environ.update(environment)
    sys.modules.pop("fairdiff", None)                                   # so that it reads them
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.cpu._is_avx512_bf16_supported = lambda: False
    F.relu, torch.nn.ReLU, F.max_pool2d = F.silu, torch.nn.SiLU, F.avg_pool2d
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    module = importlib.import_module(module)
    module.SAVE_EVERY = 2
    if die_at is not None:
        draw = torch.manual_seed
        torch.manual_seed = lambda seed: os._exit(9) if seed == fairdiff.mixed_seed(0, die_at) else draw(seed)
    sys.exit(module.main(line.split()))


def run(folder, module, line, processes=1, die_at=None):
    """Exit codes of one command in several processes as torchrun starts them; die_at: the step they end at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    several = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port} for i in range(processes)] if processes > 1 else [{}]
    running = [PROCESSES.Process(target=child, args=(folder, module, line, e, die_at)) for e in several]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a set and what the commands below read."""
    folder = tmp_path_factory.mktemp("parallel")
    fairdiff.save_set(folder / "set.npz", fairdiff.make_phantom(30, 32, seed=9, balance="race"))
    assert run(folder, "controlnet", "train-base set.npz --steps 8 --batch 4 --width 8 --out base.pt") == [0]
    return folder


# Batches of 5: two processes get 2 and 3 of them.
TRAIN = {"points": ("pointdiff", "train set.npz --steps 6 --batch 5 --width 16 --points 64"),
         "base": ("controlnet", "train-base set.npz --steps 6 --batch 5 --width 8"),
         "control": ("controlnet", "train-control set.npz base.pt --steps 6 --batch 5"),
         **{m: ("transunet", f"train set.npz --method {m} --steps 6 --batch 5 --width 8 --optimizer sgd --lr 1e-3")
            for m in ("plain", "adv", "groupdro", "fairseg")}}


@pytest.mark.parametrize("stage", TRAIN)
def test_two_processes_train_as_one_and_continue(stage, work):
    """Same gradients (their running means) and losses within float tolerance, batches of 5 split as 2 and 3; stopped at
    step 5 and continued from step 4: the same bits. (Weights part where Adam divides one rounding error by another.)"""
    module, line = TRAIN[stage]
    assert run(work, module, f"{line} --out {stage}1.pt") == [0]
    assert run(work, module, f"{line} --out {stage}2.pt", 2) == [0, 0]
    assert not (work / "stdout1").read_text() and not (work / "stderr1").read_text()        # the first one speaks
    assert run(work, module, f"{line} --out {stage}3.pt", 2, die_at=5) == [9, 9]
    assert torch.load(work / f"{stage}3.pt")["step"] == 4
    assert run(work, module, f"{line} --out {stage}3.pt", 2) == [0, 0]
    one, two, again = (torch.load(work / f"{stage}{i}.pt") for i in (1, 2, 3))
    assert len(one["model"]) > 5 and one["step"] == two["step"] == 6
    assert all(torch.equal(two[s][k], again[s][k]) for s in ("model", "ema") for k in two[s])
    key = "exp_avg" if "exp_avg" in one["optimizer"]["state"][0] else "momentum_buffer"
    a, b = (torch.cat([s[key].flatten() for s in x["optimizer"]["state"].values()]) for x in (one, two))
    assert a.norm() > 1e-3 and len(a) > 1000 and 0 < (a - b).norm() < 1e-4 * a.norm()
    assert np.allclose(one["log"], two["log"], rtol=1e-4)


def test_two_processes_draw_the_same_files(work):
    """points sample, images sample and predict: every byte of the dataset is one process'."""
    assert run(work, "pointdiff", "train set.npz --steps 90 --batch 16 --width 16 --lr 1e-2 --out p.pt") == [0]
    assert run(work, "transunet", "train set.npz --steps 60 --batch 4 --width 8 --out s.pt") == [0]
    assert run(work, "controlnet", "train-control set.npz base.pt --steps 2 --batch 2 --out c.pt") == [0]
    fairdiff.save_set(work / "many.npz", fairdiff.make_phantom(230, 32, 1))         # batches of 50 and of 100
    for module, line in (("pointdiff", "sample p.pt --n 130 --steps 4 --rough"), ("controlnet", "sample c.pt many.npz --steps 2"),
                         ("transunet", "predict s.pt many.npz")):
        for processes in (1, 2):
            assert run(work, module, f"{line} --out out{processes}.npz", processes) == [0] * processes, (work / "stderr").read_text()
        one, two = (fairdiff.load_set(work / f"out{i}.npz") for i in (1, 2))
        assert all(np.array_equal(one[k], two[k], equal_nan=k == "age") for k in one), line
        assert len(np.unique(one["mask"].reshape(len(one["mask"]), -1), axis=0)) > 100
        (work / "out2.npz").unlink()


def test_torchrun_itself_and_a_batch_too_small(work):
    """The command of the README; a batch that leaves a process without a row is refused in one line."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "transunet.py", "train",
              "set.npz", "--steps", "2", "--width", "8", "--out", "t.pt", "--batch"]
    done = subprocess.run([*launch, "4"], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("2 processes") == 1 and (work / "t.pt").exists(), done.stderr
    assert run(work, "transunet", "train set.npz --batch 1 --out none.pt", 2) == [2, 2]
    assert "--batch 1" in (work / "stderr0").read_text() and not (work / "stderr1").read_text()


@pytest.mark.skipif(not shutil.which("g++"), reason="no toolchain for torch.compile here")
def test_compiled_training_is_the_same(work):
    """--compile: the point model's weights within float tolerance of the eager ones."""
    module, line = TRAIN["points"]
    for name, flag in (("eager", ""), ("compiled", " --compile")):
        assert run(work, module, f"{line} --out {name}.pt{flag}") == [0], (work / "stderr").read_text()[-2000:]
    a, b = (torch.load(work / f"{name}.pt")["model"] for name in ("eager", "compiled"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def test_rows_of_all_processes_make_the_batch(monkeypatch):
    """own_rows and own_batches: every row once, whatever the number of processes."""
    for world in (1, 2, 3, 5):
        rows, batches = [], []
        for rank in range(world):
            monkeypatch.setattr(fairdiff, "RANK", rank)
            monkeypatch.setattr(fairdiff, "WORLD", world)
            rows += range(*fairdiff.own_rows(17).indices(17))
            batches += [i for b in fairdiff.own_batches(17, 4) for i in range(*b.indices(17))]
        assert rows == list(range(17)) and sorted(batches) == rows
