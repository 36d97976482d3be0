"""What synthesis repairs, by number of rare patients: every row of the table, several seeds.

    python tests/experiments/study.py --out study --rare 10 30 92 --seeds 0 1 2 3 4

One cell is one run of train.sh with METHODS=all, and four more TransUNets: the losses of GroupDRO and FairSeg without
their groups, and the attribution: masks or images generated, the other half from the phantom. About 16 minutes a cell
on two cores; what is in study.csv is not made again. Writes study.csv and study.png beside this file.
Seeds 10, 11 and 12 are for choices, seeds 0 to 4 are reported. All of it is made on the phantom.
"""
import argparse
import concurrent.futures
import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
import fairdiff  # noqa: E402
import fairness  # noqa: E402

# rows that train.sh does not have: training set, further settings of transunet.py train
MORE = {
    "groupdro loss": ("data/train.npz", "--method groupdro --strength 0"),      # weights q stay equal
    "fairseg loss": ("data/train.npz", "--method fairseg --strength 0"),        # one scale for all
    "generated masks": ("rendered.npz", ""),                            # the phantom draws the images
    "generated images": ("painted.npz", ""),                            # over fresh real masks
}

SCALE = os.environ.get("SCALE", "cpu")
STEPS = {"smoke": "10", "cpu": "1120"}                  # as in train.sh

def run(out, name, *command):
    """One command of the project in a run's folder with one thread, unless it is done already."""
    done = out / "log" / f"study-{name.replace(' ', '-')}.done"
    if done.exists():
        return
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=out, env=env, capture_output=True)
    if result.returncode:
        raise SystemExit(f"{out} {name}: {result.stderr.decode().splitlines()[-1]}")
    done.with_suffix(".txt").write_bytes(result.stdout)
    done.touch()

def train(out, seed, name):
    """Train and apply one of the rows of MORE."""
    dataset, settings = MORE[name]
    file = name.replace(" ", "-")
    steps = ["--steps", STEPS[SCALE], "--seed", seed]
    run(out, name, "transunet.py", "train", dataset, *settings.split(), *steps, "--out", f"{file}.pt")
    run(out, f"predict {name}", "transunet.py", "predict", f"{file}.pt", "data/test.npz", "--out", f"pred/{file}.npz")

def cell(out, rare, seed):
    """Everything of one number of rare patients and one seed; returns {row: (scores, groups)}."""
    env = os.environ | {"OUT": str(out), "RARE": str(rare), "SEED": str(seed), "SCALE": SCALE, "METHODS": "all"}
    subprocess.run(["bash", ROOT / "train.sh"], env=env, check=True, stdout=subprocess.DEVNULL)
    masks = fairdiff.load_set(out / "masks-all.npz")
    if not (out / "rendered-all.npz").exists():
        image = fairdiff.render_phantom(masks["mask"], masks["race"], 1000 + seed)
        fairdiff.save_set(out / "rendered-all.npz", masks | {"image": image})
    run(out, "paint", "controlnet.py", "sample", "control-all.pt", "fresh/train.npz", "--seed", str(seed),
        "--out", "painted-all.npz")
    for name in ("rendered", "painted"):
        run(out, f"mix {name}", "fairdiff.py", "mix", "data/train.npz", f"{name}-all.npz", "--seed", str(seed),
            "--out", f"{name}.npz")
    run(out, "judge", "controlnet.py", "evaluate", "judge-1000.pt", "data/train.npz", "data/test.npz",
        "rendered-all.npz", "synthetic-all.npz", "--out", "judge.csv")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:              # one training a core
        list(pool.map(lambda name: train(out, str(seed), name), MORE))

def measure(out, seed):
    """Rows (row, measure, value) of a finished cell: worst group, ES-Dice, all patients; memorised shares."""
    truth = fairdiff.load_set(out / "data/test.npz")
    group, names = fairdiff.group_codes(truth, "race")
    files = {path.stem.removesuffix(f"-{seed}"): path for path in sorted((out / "pred").glob("*.npz"))}
    for row, path in files.items():
        if row == "judge-1000":
            continue
        pred = fairdiff.load_set(path)["mask"]
        scores = np.mean([fairness.dice(pred, truth["mask"], label) for label in (1, 2)], 0)
        means = [scores[group == g].mean() for g in range(len(names))]
        yield from [(row, "worst", min(means)), (row, "es", fairness.essp(scores.mean(), means)),
                    (row, "overall", scores.mean()), (row, "gap", max(means) - min(means))]
    for file, key in (("masks-all.csv", "masks"), ("table1.csv", "images")):
        for line in csv.DictReader((out / file).read_text().splitlines()):
            label = " ".join([line.get("group", ""), line[key]]).strip()
            yield label, f"memorised {key}", line["memorised"]
    lines = (out / "log/study-judge.txt").read_text().splitlines()
    heads = [word.strip() for word in next(line for line in lines if "Asian" in line).split("|")]
    for line in lines:
        words = [word.strip() for word in line.split("|")]
        if len(words) > 2 and words[1] in ("real", "rendered-all", "synthetic-all", "rendered", "synthetic"):
            if len(words) == len(heads):
                yield from [(words[1], f"judge {name}", words[heads.index(name)]) for name in names]

def interval(values):
    """Mean and half the width of the 95 % interval over seeds (Student's t)."""
    values = np.asarray(values, float)
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return values.mean(), half

def summary(table):
    """Print, for every number of rare patients, the rows with their share of the way from plain to the oracle."""
    for rare in sorted({key[0] for key in table}):
        seeds = sorted({key[1] for key in table if key[0] == rare})
        rows = dict.fromkeys(key[2] for key in table if key[0] == rare and key[3] == "worst")
        lines = []
        for row in rows:
            own = [seed for seed in seeds if (rare, seed, row, "worst") in table]
            line = [row, str(len(own))]
            for name in ("overall", "worst", "gap"):
                mean, half = interval([table[rare, seed, row, name] for seed in own])
                line.append(f"{mean:.4f} ± {half:.4f}")
            for name in ("worst", "es"):
                lo, hi = (np.array([table[rare, seed, r, name] for seed in own]) for r in ("plain", "oracle"))
                value = np.array([table[rare, seed, row, name] for seed in own])
                mean, half = interval((value - lo) / (hi - lo))
                line.append(f"{mean:.0%} ± {half:.0%}")
            mean, half = interval([table[rare, s, row, "worst"] - table[rare, s, "oversample", "worst"] for s in own])
            lines.append([*line, f"{mean:+.4f} ± {half:.4f}"])
        heads = ["trained on", "seeds", "all patients", "worst group", "gap", "share, worst", "share, ES",
                 "worst - oversample"]
        fairness.print_table(f"{rare} rare images, phantom, 95 % intervals over seeds", heads, lines)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="study", help="folder of the runs")
    parser.add_argument("--rare", type=int, nargs="+", default=[30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--csv", default=str(HERE / "study.csv"))
    args = parser.parse_args()
    table = {}
    if os.path.exists(args.csv):
        with open(args.csv, encoding="utf-8") as file:
            table = {(int(r), int(s), row, name): float(value) for r, s, row, name, value in list(csv.reader(file))[1:]}
    for seed in args.seeds:
        for rare in args.rare:
            if (rare, seed, "oracle", "worst") in table:
                continue
            out = pathlib.Path(args.out).resolve() / f"{rare}-{seed}"
            cell(out, rare, seed)
            table |= {(rare, seed, row, name): float(value) for row, name, value in measure(out, seed)}
            with fairdiff.replacing(args.csv) as path, open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["rare", "seed", "row", "measure", "value"],
                                            *([*key, f"{value:.6f}"] for key, value in sorted(table.items()))])
    summary(table)

if __name__ == "__main__":
    main()
