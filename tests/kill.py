"""Kill train.sh at random moments, run it again, compare with an unbroken run. Not run by pytest: it takes long.

    python tests/kill.py            a hundred kills, at SCALE=smoke
    python tests/kill.py 20 3       20 kills, random moments from seed 3

The copy that is killed writes checkpoints every 5 steps instead of 200, so that most kills fall between two
of them. A run is killed again and again until it comes to its end; then every array of every .npz, every
tensor of every checkpoint and both tables must equal the unbroken run's, bit for bit.
"""
import collections
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ["fairdiff.py", "fairness.py", "pointdiff.py", "transunet.py", "controlnet.py", "train.sh", "requirements.txt"]


def flat(x):
    """Nested dicts and lists with tensors as bytes: equal where every bit is."""
    if isinstance(x, dict):
        return {k: flat(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [flat(v) for v in x]
    return (str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()) if torch.is_tensor(x) else repr(x)


def results(out):
    """{file: what it holds} of a run."""
    held = {p.relative_to(out): flat(torch.load(p, weights_only=True)) for p in out.rglob("*.pt")}
    for p in out.rglob("*.npz"):
        with np.load(p) as file:
            held[p.relative_to(out)] = {k: (file[k].dtype.str, file[k].shape, file[k].tobytes()) for k in file.files}
    return held | {p.relative_to(out): p.read_bytes() for p in [*out.rglob("*.csv"), *out.rglob("*.md"), *out.rglob("*.png")]}


def run(folder, out, kill_after=None):
    """Exit code of train.sh into folder/out and the stage that it had come to; kill_after: seconds to SIGKILL."""
    env = os.environ | {"SCALE": "smoke", "OUT": out, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(folder / "stdout", "w") as log, open(folder / "stderr", "w") as error:
        process = subprocess.Popen(["bash", "train.sh"], cwd=folder, env=env, stdout=log, stderr=error, start_new_session=True)
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    stages = re.findall("^== ([^ ]+): (?!complete)", (folder / "stdout").read_text(), re.M)
    return process.returncode, stages[-1] if stages else "start or end"


def main(kills=100, seed=None):
    """Returns the exit code: 0 where every killed run ended like the unbroken one."""
    seed = random.randrange(10 ** 6) if seed is None else seed
    draw, folder = random.Random(seed), pathlib.Path(tempfile.mkdtemp())
    for name in FILES:
        text = (ROOT / name).read_text().replace("SAVE_EVERY = 200", "SAVE_EVERY = 5")
        (folder / name).write_text(text)
    started = time.monotonic()
    if run(folder, "whole")[0]:
        sys.exit((folder / "stderr").read_text())
    whole, took = results(folder / "whole"), time.monotonic() - started
    print(f"seed {seed}; the unbroken run: {took:.0f} s, {len(whole)} files", flush=True)
    done, where = 0, collections.Counter()
    for number in range(kills):
        out = f"killed-{number}"
        while True:
            code, stage = run(folder, out, draw.uniform(0, took / 8) if done < kills else None)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                sys.exit(f"exit code {code} in {stage}:\n" + (folder / "stderr").read_text())
            done += 1
            where[stage] += 1
        killed = results(folder / out)
        odd = [str(k) for k in {*whole, *killed} if whole.get(k) != killed.get(k)]
        print(f"{done} kills, {time.monotonic() - started:.0f} s: " + (f"differ in {odd}" if odd else "equal"), flush=True)
        if odd:
            return 1
        shutil.rmtree(folder / out)
        if done >= kills:
            break
    print(f"{done} kills, every run ended like the unbroken one; while in: " + ", ".join(f"{k} {n}" for k, n in where.most_common()))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
