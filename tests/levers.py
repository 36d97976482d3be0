"""Which changes of Equal Scale's training set, or of all training, are worth keeping?  python tests/levers.py

Runs on cells of tests/study.py that are complete (--out): each lever trains TransUNets as the cell's rows were trained,
with one thing changed, and is compared with the row that it changes. "one mix" is Equal Scale with --mixes 1. One lever
of one seed appends its rows to tests/levers.csv and is skipped once it is there.

    python tests/levers.py --seeds 0 1 --rare 30
    python tests/levers.py --table

Numbers and intervals are those of tests/study.py, but for the spread over trainings: it is taken to be the same for all
levers on one row and estimated from all, since two trainings a seed say little about their own.
"""
import argparse
import csv
import pathlib
import subprocess

import numpy as np
import study
import torch
from scipy import stats

import controlnet
import fairdiff
import transunet

root = study.root


def read_dice(out):
    """Mean Dice of rim and cup (N,) of the plain TransUNet on the cell's generated images; 0 where it finds none."""
    made, (device, dtype) = fairdiff.load_set(out / "synthetic.npz"), fairdiff.pick_device("auto")
    plain = transunet.load_segmenter(out / "plain.pt", device)
    return np.nan_to_num(controlnet.read_dice(plain, made["image"], made["mask"], device, dtype)).mean(0)


def mixed(out, seed, share=0.5, target=None, odds=None, mixes=1, made="synthetic.npz"):
    """Equal Scale of the cell. odds(Dice): of a generated image to be among those used, instead of equal ones."""
    real, made = fairdiff.load_set(out / "data/train.npz"), fairdiff.load_set(out / made)
    if odds:                                            # Efraimidis and Spirakis, 2006: without replacement
        code, names = fairdiff.group_codes(made, "race")
        have = np.bincount(fairdiff.group_codes(real, "race")[0], minlength=len(names))
        order = np.argsort(np.random.default_rng(seed).exponential(size=len(code)) / odds(read_dice(out)))
        need = [round(share * max(0, round(have.sum() / len(names)) - n)) for n in have]
        made = fairdiff.take(made, np.concatenate([order[code[order] == g][:n] for g, n in enumerate(need)]))
    return fairdiff.equal_scale(real, made, "race", target, seed, share=share, mixes=mixes)


def longer_control(out, seed):
    """Equal Scale with the images of a ControlNet that was trained twice as long."""
    checkpoint, images = out / "levers/control.pt", out / "levers/synthetic.npz"
    same = fairdiff.load_checkpoint(out / "control.pt")["config"]
    if not images.exists():
        study.command(controlnet.main, "train-control", out / "data/train.npz", out / "base.pt", "--steps",
                      2 * same["steps"], "--batch", same["batch"], "--seed", seed, "--out", checkpoint)
        study.command(controlnet.main, "sample", checkpoint, out / "masks.npz", "--steps", 10, "--seed", seed,
                      "--out", images)
    return mixed(out, seed, made="levers/synthetic.npz")


SETS = {                                                # row that is changed, what is changed: the set
    "one mix": mixed,
    "one mix, five united": lambda out, seed: mixed(out, seed, mixes=5),
    "one mix, share 1, five united": lambda out, seed: mixed(out, seed, share=1, mixes=5),
    "one mix, share 0.25": lambda out, seed: mixed(out, seed, share=0.25),
    "one mix, share 0.75": lambda out, seed: mixed(out, seed, share=0.75),
    "one mix, half as many again a group": lambda out, seed: mixed(out, seed, target=500),
    "one mix, as many a group as the largest has": lambda out, seed: mixed(out, seed, share=0.42, target="max"),
    "one mix, images that are read badly": lambda out, seed: mixed(out, seed, odds=lambda dice: 1 - dice + 1e-3),
    "one mix, images that are read well": lambda out, seed: mixed(out, seed, odds=lambda dice: np.exp(20 * dice)),
    "one mix, ControlNet trained twice as long": longer_control,
    "plain, intensity": lambda out, seed: fairdiff.load_set(out / "data/train.npz"),
    "oversample, intensity": lambda out, seed: fairdiff.load_set(out / "data/train.npz"),
    "one mix, intensity": mixed,
    "oracle, intensity": lambda out, seed: fairdiff.load_set(out / "oracle/train.npz"),
}


def intensity(augment):
    """`transunet.augment` and then contrast x 0.7 to 1.3 and brightness -0.1 to 0.1."""
    def wrapped(image, mask):
        image, mask = augment(image, mask)
        contrast, brightness = torch.rand(2, len(image), 1, 1, 1, device=image.device) * 2 - 1
        mean = image.mean((1, 2, 3), keepdim=True)
        return ((image - mean) * (1 + 0.3 * contrast) + mean + 0.1 * brightness).clamp(0, 1), mask
    return wrapped


def train(out, lever, seed, training):
    """Train and read as the cell did, on the lever's set. Returns the predictions' path."""
    name = lever.replace(",", "").replace(" ", "-")
    same = fairdiff.load_checkpoint(out / "plain.pt")["config"]
    path, checkpoint, predictions = (out / f"levers/{name}{end}" for end in (
        ".npz", f"-{training}.pt", f"-{training}-read.npz"))
    if not predictions.exists():
        fairdiff.save_set(path, SETS[lever](out, seed))
        method = ["--method", "oversample", "--attribute", "race"] if lever.startswith("oversample") else []
        usual = transunet.augment
        if lever.endswith("intensity"):
            transunet.augment = intensity(usual)
        study.command(transunet.main, "train", path, *method, "--steps", same["steps"], "--batch", same["batch"],
                      "--seed", training, "--out", checkpoint)
        transunet.augment = usual
        study.command(transunet.main, "predict", checkpoint, out / "data/test.npz", "--out", predictions)
    return predictions


def main():
    """Run the levers that are missing, then print the table."""
    parser = argparse.ArgumentParser(description="Levers on Equal Scale; see the top of the file.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="cells of the study")
    parser.add_argument("--rare", type=int, default=30, help="cells of the study")
    parser.add_argument("--trainings", type=int, default=2, help="TransUNets a lever and seed; the rows have three")
    parser.add_argument("--levers", nargs="+", choices=SETS, default=list(SETS)[1:], metavar="LEVER")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("study"), help="folder of the study's cells")
    parser.add_argument("--csv", type=pathlib.Path, default=root / "tests/levers.csv", help="rows are appended here")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()

    def lines():
        return list(csv.DictReader(args.csv.open())) if args.csv.exists() else []

    for seed in args.seeds if not args.table else ():
        out = args.out / f"seed{seed}-rare{args.rare}"
        truth = fairdiff.load_set(out / "data/test.npz")
        rows = {m: [p for k in range(3) if (p := out / f"pred/{m if k == 0 else f'{m}-{seed + 10 * k}'}.npz").exists()]
                for m in study.MAIN}
        rows["one mix"] = [train(out, "one mix", seed, seed + 10 * k) for k in range(len(rows["plain"]))]
        for lever in args.levers:
            if any((x["seed"], x["rare"], x["row"]) == (str(seed), str(args.rare), lever) for x in lines()):
                continue
            changed = [train(out, lever, seed, seed + 10 * k) for k in range(args.trainings)]
            measured = study.measure(truth, rows | {lever: changed}, than=lever.split(",")[0])
            commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
            with open(args.csv, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if not file.tell():
                    writer.writerow(study.COLUMNS)
                writer.writerows([seed, args.rare, *r, commit.stdout.strip()] for r in measured if r[0] == lever)
    table(lines(), args.rare)


def table(lines, rare):
    """Print a Markdown table of all levers: mean over the seeds and half of its 95 % interval."""
    lines = [x for x in lines if int(x["rare"]) == rare]
    print("| row, change | worst group | more than the row unchanged | ES-Dice, more |\n|---|---|---|---|")
    for lever in list(SETS)[1:]:
        cells = []
        for figure in study.FIGURES:
            every = [x for x in lines if x["figure"] == figure and x["row"].split(",")[0] == lever.split(",")[0]
                     and int(x["trainings"]) > 1]
            mine = [x for x in every if x["row"] == lever]      # a single training shows no spread
            spread = [(float(x["more_sd"]) ** 2, int(x["trainings"]) - 1) for x in every]
            if mine:
                freedom = sum(n for _, n in spread)
                variance = sum(v * n for v, n in spread) / freedom
                over_images = np.sqrt(sum((float(x["more_hi"]) - float(x["more_lo"])) ** 2 for x in mine)) / 2 / len(mine)
                error = np.sqrt(variance * sum(1 / int(x["trainings"]) for x in mine)) / len(mine)
                half = np.hypot(over_images, stats.t.ppf(0.975, freedom) * error)
                cells.append(f"{np.mean([float(x['more']) for x in mine]):+.4f} ± {half:.4f}")
        if cells:
            worst = np.mean([float(x["value"]) for x in lines if (x["row"], x["figure"]) == (lever, "worst group")])
            print(f"| {lever} | {worst:.4f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
