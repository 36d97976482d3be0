"""How much of the harm does synthesis repair, and which link loses the rest?  python tests/study.py

One cell is one seed of everything (data, generators, segmenters) and one number of rare training images. A cell is a
run of train.sh with those, and Equal Scale once more with nothing but synthetic images for those missing (share 1).
Where the rare group has its natural size, rows are added that replace one link of FairDiff by its real counterpart,
which only the phantom has: its masks by those of new patients, its images by renderings. Each cell appends its rows to
tests/study.csv and is skipped once it is there, so the study can be run in pieces; an interrupted cell continues. Two
cells at once, on one core each (OMP_NUM_THREADS=1), take less time than one after the other.

    python tests/study.py --seeds 0 --rare 10            one cell, a quarter of an hour on two cores
    python tests/study.py --table                        only the tables and assets/rarity.svg from tests/study.csv

Scores are the Dice of rim and cup, averaged, on the 2,000 test images of the seed. Where a row is trained several times
(--trainings; rows of links once), an image's score is its mean over them. share: of the distance from plain to oracle,
how much a row closes. Intervals in the CSV: 95 %, over test images, paired (the same resamples for every row); beside
them the standard deviation over the trainings. The tables show two intervals, see `pooled`.
"""
import argparse
import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
from scipy import stats

root = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import fairness  # noqa: E402
import transunet  # noqa: E402

NATURAL = 92                                            # images of the rare group in 1,000
MIXES = 5                                               # as in train.sh at SCALE=cpu
MAIN, OTHERS = ("plain", "oversample", "equal", "oracle"), ("adv", "groupdro", "fairseg", "synthetic-only")
LINKS = ("real masks, rendered", "drawn masks, rendered", "real masks, painted", "drawn masks, painted")
FIGURES = {"worst group": -3, "ES-Dice": -5}            # places in fairness._numbers
COLUMNS = ["seed", "rare", "row", "trainings", "figure"] + [
    f"{name}{end}" for name in ("value", "gain", "share", "more") for end in ("", "_lo", "_hi", "_sd")] + ["commit"]


def command(main, *argv):
    """Run one of the project's commands in this process; stop where it fails."""
    if code := main([str(a) for a in argv]):
        sys.exit(code)


def topped_up(out, link, share, seed):
    """The equal-scale set of one attribution row: the masks, or the images, or both are the phantom's own."""
    real, fresh = fairdiff.load_set(out / "data/train.npz"), fairdiff.load_set(out / "oracle/train.npz")
    drawn = fairdiff.load_set(out / "masks.npz")
    if link == "real masks, rendered":
        top_up = fresh
    elif link == "drawn masks, rendered":
        top_up = drawn | {"image": fairdiff.render_phantom(drawn["mask"], drawn["race"], 4 * seed + 2)}
    elif link == "real masks, painted":
        painted = out / "links/painted.npz"
        if not painted.exists():
            command(controlnet.main, "sample", out / "control.pt", out / "oracle/train.npz", "--seed", seed,
                    "--out", painted)
        top_up = fairdiff.load_set(painted)
    else:
        top_up = fairdiff.load_set(out / "synthetic.npz")
    return fairdiff.equal_scale(real, top_up, "race", seed=seed, share=share, mixes=MIXES)


def segmenter(out, link, share, seed):
    """Train a TransUNet on an attribution row's set as train.sh did on its sets. Returns its predictions' path."""
    name = f"{link.replace(', ', '-').replace(' ', '-')}-share{share:g}"
    same = fairdiff.load_checkpoint(out / "plain.pt")["config"]
    topped, checkpoint, predictions = out / f"links/{name}.npz", out / f"links/{name}.pt", out / f"pred/{name}.npz"
    if not predictions.exists():
        fairdiff.save_set(topped, topped_up(out, link, share, seed))
        command(transunet.main, "train", topped, "--steps", same["steps"], "--batch", same["batch"],
                "--seed", seed, "--out", checkpoint)
        command(transunet.main, "predict", checkpoint, out / "data/test.npz", "--out", predictions)
    return predictions


def measure(truth, predictions, than="oversample"):
    """Rows of the CSV from {row: paths of the predictions of its trainings}.

    A row's numbers are its value, gain over plain, share closed and how much more it has than the row `than`. Their
    standard deviation compares the k-th training of each row with the k-th of the others; it is empty where a row has
    one training. That of the share, a ratio, is linearised: a distance of one training alone can be near 0.
    """
    def score(path):
        mask = fairdiff.load_set(path)["mask"]
        return sum(fairness.dice(mask, truth["mask"], s) for s in ("rim", "cup")) / 2

    code, names = fairdiff.group_codes(truth, "race")
    scores, sizes, _ = fairness._sort([score(p) for paths in predictions.values() for p in paths], code, names)
    scores = iter(scores)
    scores = {row: [next(scores) for _ in paths] for row, paths in predictions.items()}
    resampled = {row: fairness._estimate(np.mean(s, 0), sizes, 2000, 0) for row, s in scores.items()}
    single = {row: np.array([fairness._numbers(x, sizes) for x in s]) for row, s in scores.items()}

    def compared(at, row):                              # arrays of equal length: values of resamples, or of trainings
        n = min(len(at[r]) for r in (row, "plain", "oracle", than))
        x, plain, oracle, other = (at[r][:n] for r in (row, "plain", "oracle", than))
        return x, x - plain, (x - plain) / (oracle - plain), x - other

    rows = []
    for figure, place in FIGURES.items():
        over_images = {row: np.r_[v[place], draws[:, place]] for row, (v, draws) in resampled.items()}
        over_trainings = {row: v[:, place] for row, v in single.items()}
        for row in predictions:
            cells, images, trainings = [], compared(over_images, row), list(compared(over_trainings, row))
            gain, distance = trainings[1], compared(over_trainings, "oracle")[1][:len(trainings[1])]
            trainings[2] = (gain - images[2][0] * distance) / distance.mean()
            for x, each in zip(images, trainings, strict=True):
                cells += [f"{v:.5f}" for v in (x[0], *np.quantile(x[1:], (0.025, 0.975)))]
                cells.append(f"{np.std(each, ddof=1):.5f}" if len(each) > 1 else "")
            rows.append([row, len(predictions[row]), figure, *cells])
    return rows


def cell(args, seed, rare):
    """Run one cell and append its rows, all at once."""
    out = args.out / f"seed{seed}-rare{rare}"
    natural = rare == NATURAL
    trainings = [seed + 10 * k for k in range(args.trainings)]          # seeds of the TransUNets
    dials = {"SCALE": "cpu", "SEED": str(seed), "OUT": str(out)} | ({} if natural else {"RARE": str(rare)})
    runs = [{"METHODS": " ".join(MAIN), "SEEDS": " ".join(map(str, trainings))}]
    for run in runs + [{"METHODS": "all"}] * natural:
        subprocess.run(["bash", str(root / "train.sh")], env=os.environ | dials | run, check=True)
    predictions = {m: [out / f"pred/{m if t == seed else f'{m}-{t}'}.npz" for t in trainings] for m in MAIN}
    if natural:
        predictions |= {m: [out / f"pred/{m}.npz"] for m in OTHERS}
    for link in LINKS:                                      # drawn and painted at share 0.5 is the row "equal"
        for share in (1, 0.5) if link != LINKS[-1] else (1,):
            if natural or link == LINKS[-1]:
                predictions[f"{link}, share {share:g}"] = [segmenter(out, link, share, seed)]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    lines = [[seed, rare, *row, commit.stdout.strip()] for row in measure(fairdiff.load_set(out / "data/test.npz"), predictions)]
    with open(args.csv, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerows(lines)


def pooled(lines, row, rare, figure, name):
    """Mean over the seeds, half-widths of two intervals, and the seeds' own values.

    The first interval is over test images and, where a seed has several trainings, over these as well: for these data
    and generators. The second (Student's t over the seeds) is for others as well; seeds are independent.
    """
    def find(row, name):
        return {x["seed"]: float(x[name]) for x in lines if (x["row"], int(x["rare"]), x["figure"]) == (row, rare, figure)}

    mine = [x for x in lines if (x["row"], int(x["rare"]), x["figure"]) == (row, rare, figure)]
    value = each = np.array([float(x[name]) for x in mine])
    if name == "share":                                 # of the mean distance, which no seed can bring near 0
        distance = np.array([find("oracle", "gain")[x["seed"]] for x in mine])
        gain = np.array([float(x["gain"]) for x in mine])
        value = gain.sum() / distance.sum()
        value = value + (gain - value * distance) / distance.mean()     # linearised, of this mean
    half = np.array([(float(x[f"{name}_hi"]) - float(x[f"{name}_lo"])) / 2 for x in mine])
    half = np.sqrt((half ** 2).sum()) / len(mine)
    n = np.array([int(x["trainings"]) for x in mine])
    if n.max() > 1:
        variance = sum(float(x[f"{name}_sd"] or 0) ** 2 * (int(x["trainings"]) - 1) for x in mine) / (n - 1).sum()
        half = np.hypot(half, stats.t.ppf(0.975, (n - 1).sum()) * np.sqrt(variance * (1 / n).sum()) / len(mine))
    across = stats.t.ppf(0.975, len(value) - 1) * value.std(ddof=1) / len(value) ** 0.5 if len(value) > 1 else np.nan
    return value.mean(), half, across, each


def tables(lines):
    """Print one Markdown table a figure and number of rare images; in brackets intervals over seeds."""
    lines = sorted(lines, key=lambda x: int(x["seed"]))
    for figure in FIGURES:
        for rare in sorted({int(x["rare"]) for x in lines}):
            rows = list(dict.fromkeys(x["row"] for x in lines if int(x["rare"]) == rare))
            seeds = list(dict.fromkeys(x["seed"] for x in lines if int(x["rare"]) == rare))
            rows.sort(key=lambda r: pooled(lines, r, rare, figure, "value")[0])
            print(f"\n{figure}, {rare} images of the rare group, seeds {', '.join(seeds)}\n\n"
                  "| row (trainings a seed) | Dice | gain | share closed | seeds | more than oversampling |\n" + "|---" * 6 + "|")
            for row in rows:
                cells = [pooled(lines, row, rare, figure, n) for n in ("value", "gain", "share", "more")]
                (value, *_), (gain, a, *_), (share, b, d, each), (more, c, e, _) = cells
                n = next(x["trainings"] for x in lines if (x["row"], int(x["rare"])) == (row, rare))
                print(f"| {row} ({n}) | {value:.4f} | " + ("– | – | – |" if row == "plain" else
                      f"{gain:.3f} ± {a:.3f} | {share:.0%} ± {b:.0%}{f' ({d:.0%})' * int(d == d)} | {', '.join(f'{x:.0%}' for x in each)} |")
                      + (f" {more:+.4f} ± {c:.4f}{f' ({e:.4f})' * int(e == e)} |" if row not in ("plain", "oversample") else " – |"))


def chart(lines, path):
    """SVG: share of the distance closed (worst group) against the number of rare images, a line a method."""
    counts = sorted({int(x["rare"]) for x in lines})
    series = {}
    for row, label in (("oversample", "oversampling"), ("drawn masks, painted, share 1", "Eq. 6, share 1"),
                       ("equal", "Equal Scale, share 0.5")):
        share, half = (100 * np.array(v) for v in zip(*(pooled(lines, row, n, "worst group", "share")[:2]
                                                        for n in counts), strict=True))
        series[label] = range(len(counts)), share, (share - half, share + half)
    text = fairdiff.chart("Share of the distance from plain to oracle closed, worst group", "images of the rare group "
                          "among 1,000 in training", "% of the distance from plain to oracle that is closed, worst group",
                          series, {i: str(n) for i, n in enumerate(counts)})
    pathlib.Path(path).write_text(text.replace("<svg ", '<svg style="background:white" ', 1) + "\n")
    print(f"picture: {path}")


def main():
    """Run the missing cells, then print the tables and draw the chart."""
    parser = argparse.ArgumentParser(description="The rarity study; see the top of the file.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rare", type=int, nargs="+", default=[NATURAL, 30, 10], help="rare images in training")
    parser.add_argument("--trainings", type=int, default=3, help="TransUNets of plain, oversample, equal, oracle")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("study"), help="folder of the cells' runs")
    parser.add_argument("--csv", type=pathlib.Path, default=root / "tests/study.csv", help="rows are appended here")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()

    def lines():
        found = list(csv.DictReader(args.csv.open())) if args.csv.exists() else []
        if found and list(found[0]) != COLUMNS:
            sys.exit(f"{args.csv}: columns of another version; choose another --csv")
        return found

    lines()
    for rare in args.rare if not args.table else ():
        for seed in args.seeds:
            if not any((x["seed"], x["rare"]) == (str(seed), str(rare)) for x in lines()):
                cell(args, seed, rare)
    tables(lines())
    chart(lines(), root / "assets/rarity.svg" if args.csv == root / "tests/study.csv" else args.csv.with_suffix(".svg"))


if __name__ == "__main__":
    main()
