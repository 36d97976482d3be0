"""What synthesis repairs, by number of rare patients: every row of the table, several seeds, on the phantom.

    python tests/experiments/study.py --out study --rare 10 30 92 --seeds 0 1 2 3 4

One cell is one run of train.sh with METHODS=all, about 12 minutes on two cores, and GroupDRO on the Equal Scale set.
With 30 rare images also four more TransUNets: the losses of GroupDRO and FairSeg without their groups, and the
attribution: masks or images generated, the other half from the phantom. What is in study.csv is not made again.
Writes study.csv beside this file and assets/study.svg. Seeds 10 to 12 are for choices, seeds 0 to 4 are reported.
"""
import concurrent.futures
import csv
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CSV = str(ROOT / "tests/experiments/study.csv")
sys.path.insert(0, str(ROOT))
import fairdiff  # noqa: E402
import fairness  # noqa: E402

# rows that train.sh does not have: training set, further settings of transunet.py train
MORE = {
    "equal groupdro": ("equal.npz", "--method groupdro"),               # does each add to the other?
    "groupdro loss": ("data/train.npz", "--method groupdro --strength 0"),      # weights q stay equal
    "fairseg loss": ("data/train.npz", "--method fairseg --strength 0"),        # one scale for all
    "generated masks": ("rendered.npz", ""),                            # the phantom draws the images
    "generated images": ("painted.npz", ""),                            # over fresh real masks
}
COLOURS = {"oversample": "#888", "groupdro": "#b80", "no-points": "#2a8", "equal": "#06c", "balanced": "#a3c"}

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
    run(out, name, "transunet.py", "train", dataset, *settings.split(), "--seed", seed, "--out", f"{file}.pt")
    run(out, f"predict {name}", "transunet.py", "predict", f"{file}.pt", "data/test.npz", "--out", f"pred/{file}.npz")

def cell(out, rare, seed):
    """Make everything of one number of rare patients and one seed."""
    env = {"METHODS": "all"} | os.environ | {"OUT": str(out), "RARE": str(rare), "SEED": str(seed), "SCALE": "cpu"}
    subprocess.run(["bash", ROOT / "train.sh"], env=env, check=True, stdout=subprocess.DEVNULL)
    train(out, str(seed), "equal groupdro")
    if rare != 30:
        return
    masks = fairdiff.load_set(out / "masks-all.npz")
    if not (out / "rendered-all.npz").exists():
        image = fairdiff.render_phantom(masks["mask"], masks["race"], 1000 + seed)
        fairdiff.save_set(out / "rendered-all.npz", masks | {"image": image})
    run(out, "paint", "controlnet.py", "sample", "control-all.pt", "fresh/train.npz", "--seed", str(seed),
        "--out", "painted-all.npz")
    for name in ("rendered", "painted"):
        run(out, f"mix {name}", "fairdiff.py", "mix", "data/train.npz", f"{name}-all.npz", "--seed", str(seed),
            "--out", f"{name}.npz")
    run(out, "judge", "controlnet.py", "evaluate", f"oversample-{seed}.pt", "data/train.npz", "data/test.npz",
        "rendered-all.npz", "synthetic-all.npz", "--out", "judge.csv")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:              # one training a core
        list(pool.map(lambda name: train(out, str(seed), name), MORE))

def measure(out, seed):
    """Rows (row, measure, value) of a finished cell: worst group, ES-Dice, all, gap; memorised shares, judge's Dice."""
    truth = fairdiff.load_set(out / "data/test.npz")
    group, names = fairdiff.group_codes(truth, "race")
    files = {path.stem.removesuffix(f"-{seed}"): path for path in sorted((out / "pred").glob("*.npz"))}
    for row, path in files.items():
        pred = fairdiff.load_set(path)["mask"]
        scores = np.mean([fairness.dice(pred, truth["mask"], label) for label in (1, 2)], 0)
        means = [scores[group == g].mean() for g in range(len(names))]
        yield from [(row, "worst", min(means)), (row, "es", fairness.essp(scores.mean(), means)),
                    (row, "overall", scores.mean()), (row, "gap", max(means) - min(means))]
    for file, key in (("masks-all.csv", "masks"), ("table1.csv", "images")):
        for line in csv.DictReader((out / file).read_text().splitlines()):
            label = " ".join([line.get("group", ""), line[key]]).strip()
            yield label, f"memorised {key}", line["memorised"]
    judge = out / "log/study-judge.txt"
    text = judge.read_text() if judge.exists() else ""
    for label, *values in re.findall(r"^\| (real|rendered|synthetic) +\| (\S+) +\| (\S+) +\| (\S+) +\|$", text, re.M):
        yield from [(label, f"judge {name}", value) for name, value in zip(names, values, strict=True)]

def interval(values):
    """Mean and half the width of the 95 % interval over seeds (Student's t)."""
    values = np.asarray(values, float)
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return values.mean(), half

def share(table, rare, row, measure):
    """Share of the way from plain to the oracle that a row closes, one for each seed that has it."""
    seeds = [key[1] for key in table if key[0] == rare and key[2:] == (row, measure)]
    value, low, high = (np.array([table[rare, s, r, measure] for s in seeds]) for r in (row, "plain", "oracle"))
    return (value - low) / (high - low)

def summary(table):
    """Print, for every number of rare patients, the rows with their share of the way from plain to the oracle."""
    for rare in sorted({key[0] for key in table}):
        lines = []
        for row in dict.fromkeys(key[2] for key in table if key[0] == rare and key[3] == "worst"):
            seeds = [key[1] for key in table if key[0] == rare and key[2:] == (row, "worst")]
            line = [row, str(len(seeds))]
            for name in ("overall", "worst", "gap"):
                line.append("{:.4f} ± {:.4f}".format(*interval([table[rare, s, row, name] for s in seeds])))
            for name in ("worst", "es"):
                line.append("{:.0%} ± {:.0%}".format(*interval(share(table, rare, row, name))))
            gain = [table[rare, s, row, "worst"] - table[rare, s, "oversample", "worst"] for s in seeds]
            lines.append([*line, "{:+.4f} ± {:.4f}".format(*interval(gain))])
        heads = "trained on,seeds,all patients,worst group,gap,share in worst,share in ES,worst - oversample".split(",")
        fairness.print_table(f"{rare} rare images, phantom, 95 % intervals over seeds", heads, lines)

def chart(table, path):
    """Write an SVG of the share that each method closes, by number of rare patients, with intervals over seeds."""
    counts = sorted({key[0] for key in table})
    text = ["<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 720 380' font-family='sans-serif' font-size='13'>",
            "<rect width='720' height='380' fill='white'/><text x='10' y='20'>Share of the distance from plain to the "
            "oracle that is closed in the worst group (phantom)</text>"]
    for percent in (0, 25, 50, 75, 100):
        y = 340 - 2.8 * percent
        text.append(f"<path d='M50 {y}H560' stroke='#ddd'/><text x='10' y='{y + 4}'>{percent} %</text>")
    for i, rare in enumerate(counts):
        text.append(f"<text x='{90 + 170 * i}' y='365'>{rare} rare images</text>")
    for k, (row, colour) in enumerate(COLOURS.items()):
        points = []
        for i, rare in enumerate(counts):
            mean, half = interval(share(table, rare, row, "worst"))
            x, y = 110 + 170 * i + 10 * k, 340 - 280 * mean
            ends = np.clip([y - 280 * half, y + 280 * half], 30, 350)   # longer ones leave the picture
            points.append(f"{x},{y:.1f}")
            text.append(f"<path d='M{x} {ends[0]:.1f}V{ends[1]:.1f}' stroke='{colour}' stroke-width='2'/>"
                        f"<circle cx='{x}' cy='{y:.1f}' r='4' fill='{colour}'/>")
        text.append(f"<polyline points='{' '.join(points)}' fill='none' stroke='{colour}'/>"
                    f"<text x='580' y='{80 + 24 * k}' fill='{colour}'>{row}</text>")
    pathlib.Path(path).write_text("\n".join([*text, "</svg>\n"]), encoding="utf-8")

def main(out="study", rare: list = ("30",), seeds: list = ("0", "1", "2", "3", "4"), csv_file=CSV):
    """Make every cell that is not in the CSV file yet, print the summary and draw the chart."""
    table = {}
    if os.path.exists(csv_file):
        with open(csv_file, encoding="utf-8") as file:
            table = {(int(r), int(s), row, name): float(value) for r, s, row, name, value in list(csv.reader(file))[1:]}
    for seed in map(int, seeds):
        for n in map(int, rare):
            if (n, seed, "oracle", "worst") in table:
                continue
            folder = pathlib.Path(out).resolve() / f"{n}-{seed}"
            cell(folder, n, seed)
            table |= {(n, seed, row, name): float(value) for row, name, value in measure(folder, seed)}
            lines = [[*key, f"{value:.6f}"] for key, value in sorted(table.items())]
            fairness.save_csv(csv_file, [["rare", "seed", "row", "measure", "value"], *lines])
    summary(table)
    chart(table, ROOT / "assets/study.svg")

if __name__ == "__main__":
    sys.exit(fairdiff.command_line(main, argv=["main", *sys.argv[1:]]))
