"""Measure how evenly a segmenter serves the groups, and how alike two sets of images are.

    python fairness.py table data/test.npz plain=plain.npz equal=equal.npz --attribute race

Group means of Dice and IoU give the equity-scaled score (Eq. 7) and the fairness of Eq. 1. Beside
them stand intervals, tests, and the gap that equal groups show by chance.
N images, H W pixels, G groups, B resamples, D features. Group -1, unknown, counts in overall.
"""
import csv
import html
import sys
from collections import namedtuple

import numpy as np
from scipy.spatial.distance import cdist

from fairdiff import InputError, command_line, group_codes, load_set, replacing

# ---- Scores of one image ------------------------------------------------------------------------
def iou(pred, true, label):
    """Intersection over union |P and T| / |P or T| of a label in each image, float (N,) in [0, 1].
    pred, true: integer masks (N, H, W). It is 1 where neither has the label, 0 where one has it."""
    pred, true = np.asarray(pred) == label, np.asarray(true) == label
    either = (pred | true).sum((1, 2))
    return np.where(either > 0, (pred & true).sum((1, 2)) / np.maximum(either, 1), 1.0)

def dice(pred, true, label):
    """Dice coefficient 2 |P and T| / (|P| + |T|), from the IoU; everything else as in `iou`."""
    score = iou(pred, true, label)
    return 2 * score / (1 + score)

def structures(mask):
    """Names and labels of the structures in masks: cup and rim, or one where no label is 2."""
    return {"cup": 2, "rim": 1} if (mask == 2).any() else {"structure": 1}

# ---- Fairness of group means --------------------------------------------------------------------
def group_sd(means):
    """Sample standard deviation of group means (..., G) over the groups; 0 for a single group."""
    means = np.asarray(means, float)
    return means.std(-1, ddof=1) if means.shape[-1] > 1 else np.zeros(means.shape[:-1])

def essp(overall, group_means):
    """Equity-scaled score of overall (...), group_means (..., G), Eq. 7. AssertionError: over 1."""
    assert np.max(overall, initial=0) <= 1, "expected scores in [0, 1], not in percent"
    return np.asarray(overall) / (1 + group_sd(group_means))            # Eq. 7

def fairness(group_means):
    """Minus the sample variance of the group means (..., G), Eq. 1 for one attribute. 0 is fair."""
    return 0.0 - group_sd(group_means) ** 2                             # Eq. 1, never -0.0

# ---- Intervals and tests ------------------------------------------------------------------------
Row = namedtuple("Row", "name n value lo hi")

def bootstrap(scores, group, n_boot, seed):
    """Numbers of a report (1 + B, G + 6): of the sample, then of B resamples within groups."""
    rng = np.random.default_rng(seed)                   # the same images for every method
    codes, sizes = np.unique(group, return_counts=True)
    means = np.empty((1 + n_boot, len(codes)))
    for i, code in enumerate(codes):
        own = scores[group == code]
        means[0, i] = own.mean()
        means[1:, i] = own[rng.integers(len(own), size=(n_boot, len(own)))].mean(1)
    overall = means @ sizes / sizes.sum()
    means = means[:, codes >= 0]
    rest = [essp(overall, means), group_sd(means), means.min(1), np.ptp(means, 1), fairness(means)]
    return np.column_stack([overall, means, *rest])

def report_rows(draws, group, names, p, ci):
    """List of Row from draws (1 + B, G + 6), the sample's numbers first; percentile intervals."""
    codes, sizes = np.unique(group[group >= 0], return_counts=True)
    labels = np.asarray(names)[codes] if names else codes.astype(str)
    labels = ["overall", *labels.tolist(), "es", "sd", "worst", "gap", "eq1"]
    counts = [len(group), *sizes.tolist(), len(group)] + [int(sizes.sum())] * 4
    lo, hi = np.quantile(draws[1:], [(1 - ci) / 2, (1 + ci) / 2], axis=0)
    return [*map(Row, labels, counts, draws[0], lo, hi), Row("p", counts[-1], p, np.nan, np.nan)]

def welch_statistic(scores, group):
    """Numerator of Welch's (1951) statistic (...) of scores (..., N): distance of group means."""
    codes, sizes = np.unique(group, return_counts=True)
    means = np.stack([scores[..., group == code].mean(-1) for code in codes], -1)
    variances = np.stack([scores[..., group == code].var(-1) for code in codes], -1)
    weights = sizes / np.maximum(variances, 1e-12)
    centre = (weights * means).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    return (weights * (means - centre) ** 2).sum(-1)

def fair_report(scores, group, names=None, n_boot=2000, seed=0, ci=0.95):
    """List of Row: overall, each group present, es (Eq. 7), sd, worst, gap, eq1 (Eq. 1) and p.
    scores: (N,) in [0, 1]; group: codes (N,); names: of the codes. lo, hi: bootstrap within groups.
    p: permutation test of equal group means. sd and gap of equal groups: see `chance_level`."""
    known = scores[group >= 0]
    labels = group[group >= 0]
    shuffled = np.random.default_rng(seed).permuted(np.tile(known, (n_boot, 1)), axis=1)
    statistics = np.append(welch_statistic(shuffled, labels), welch_statistic(known, labels))
    p = np.mean(statistics >= statistics[-1] - 1e-9)    # never 0 (Phipson & Smyth 2010)
    draws = bootstrap(scores, group, n_boot, seed)
    return report_rows(draws, group, names, p, ci)

def chance_level(scores, group, n_boot=2000, seed=0):
    """Mean SD and mean gap that groups of equal means show, given their sizes and spreads."""
    means = bootstrap(scores, group, n_boot, seed)[:, 1:-5]
    noise = means[1:] - means[0]
    return group_sd(noise).mean(), np.ptp(noise, axis=1).mean()

def compare(scores_a, scores_b, group, names=None, n_boot=2000, seed=0, ci=0.95):
    """The rows of `fair_report` of a minus those of b, two methods on the same images.
    p: two-sided, by random sign flips of each image's difference, statistic |mean difference|."""
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (n_boot, len(group)))
    differences = scores_a - scores_b
    sums = np.append(abs(flips @ differences), abs(differences.sum()))
    p = np.mean(sums >= sums[-1] - 1e-9)
    draws = bootstrap(scores_a, group, n_boot, seed) - bootstrap(scores_b, group, n_boot, seed)
    return report_rows(draws, group, names, p, ci)

# ---- Distances between sets of features ---------------------------------------------------------
def frechet_distance(x, y):
    """|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2) of features (N, D) and (M, D) (Heusel et al. 2017);
    NaN where N or M is at most D, which is too few for a covariance."""
    if min(len(x), len(y)) <= x.shape[1]:
        return np.nan
    cx = np.cov(x, rowvar=False)
    cy = np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cx @ cy).real.clip(0))           # rounding may go below 0
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy) - 2 * roots.sum())

def mmd_cov(d):
    """Minimum matching distance and coverage (Achlioptas et al. 2018); d: (generated, real)."""
    return float(d.min(0).mean()), len(np.unique(d.argmin(1))) / d.shape[1]

def one_nna(gg, rr, gr):
    """How often a nearest neighbour tells two sets apart (Lopez-Paz & Oquab 2017); 0.5 is ideal.
    Distances within the generated set, within the real set and between them, (N, N) each."""
    infinite = np.diag(np.full(len(gg), np.inf))        # nobody is their own neighbour
    same = np.concatenate([(gg + infinite).min(1), (rr + infinite).min(1)])
    other = np.concatenate([gr.min(1), gr.min(0)])
    return float(((same < other) + 0.5 * (same == other)).mean())

def set_distance(generated, test, train):
    """Compare features (N, D) of generated and test items, as many as the smaller set has.
    memorised: share closer to a training item than 99 % of these are to their nearest neighbour."""
    n = min(len(generated), len(test))
    generated, test = generated[:n], test[:n]
    between = cdist(generated, test)
    mmd, cov = mmd_cov(between)
    nearest = np.partition(cdist(train, train), 1, axis=1)[:, 1]        # of other training items
    memorised = (cdist(generated, train).min(1) < np.quantile(nearest, 0.01)).mean()
    return {"n": n, "frechet": frechet_distance(generated, test), "mmd": mmd, "cov": cov,
            "1-nna": one_nna(cdist(generated, generated), cdist(test, test), between),
            "memorised": memorised}

# ---- Tables 2-5 ---------------------------------------------------------------------------------
def score_predictions(items, truth):
    """Scores {(method, structure, metric): {seed: (N,)}} of items NAME=FILE or NAME:SEED=FILE."""
    scores = {}
    for item in items:
        label, _, path = item.partition("=")
        method, _, seed = label.partition(":")
        pred = load_set(path)
        if pred["mask"].shape != truth["mask"].shape or (pred["name"] != truth["name"]).any():
            raise InputError(f"{path}: other images; expected predictions of this very set")
        for metric in (dice, iou):
            codes = structures(truth["mask"])
            own = {name: metric(pred["mask"], truth["mask"], codes[name]) for name in codes}
            own["mean"] = np.mean(list(own.values()), axis=0)
            for structure, values in own.items():
                scores.setdefault((method, structure, metric.__name__), {})[seed or "0"] = values
    return scores

def save_csv(path, lines):
    """Write a CSV file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)

def save_chart(path, lines, names):
    """Write HTML: bars of Dice by method and group; lines: of the CSV file, the last ones count."""
    bars = {"": "<h2>Mean Dice by method and group, with 95 % intervals; bars from 0.5 to 1</h2>"}
    for _, method, _, structure, metric, group, _, value, lo, hi in lines:
        if (structure, metric) == ("mean", "dice") and group in names:
            hue = 210 + 360 * names.index(group) // len(names)          # one colour a group
            text = html.escape(f"{method}, {group}: {value:.4f} [{lo:.4f}, {hi:.4f}]")
            style = f"--hue: {hue}; --width: {max(0, 2 * value - 1):.2%}"   # of PAGE, fairdiff.py
            bars[method, group] = f"<div style='{style}'>{text}</div>"
    with replacing(path) as temporary:
        temporary.write_text("\n".join(bars.values()), encoding="utf-8")

def print_table(title, heads, lines):
    """Print a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    print(f"\n{title}\n")
    for line in [heads, ["-" * width for width in widths], *lines]:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")

def table(dataset, predictions: list, out="results.csv", attribute="race"):
    """Score predictions NAME=FILE, or NAME:SEED=FILE: write CSV and chart, print Tables 2-5."""
    truth = load_set(dataset)
    group, names = group_codes(truth, attribute)
    scores, reports, lines = score_predictions(predictions, truth), {}, []
    for key, trainings in scores.items():
        if len(trainings) > 1:                          # a score is its mean over the trainings
            trainings["mean"] = np.mean(list(trainings.values()), axis=0)
        for seed, values in trainings.items():
            report = fair_report(values, group, names)
            lines += [[attribute, key[0], seed, *key[1:], *row] for row in report]
        scores[key] = values                            # the last: the mean, if there are several
        reports[key] = {row.name: f"{row.value:.4f}" for row in report}
        reports[key]["interval"] = "{0.value:.4f} [{0.lo:.4f}, {0.hi:.4f}]".format(report[0])
    save_csv(out, ["attribute method seed structure metric group n value lo hi".split(), *lines])
    save_chart(f"{out}.html", lines, names)
    methods = list(dict.fromkeys(method for method, _, _ in scores))
    heads = ["method", "ES-Dice", "Dice [95 %]", *names, "ES-IoU", "IoU [95 %]", *names]
    for structure in structures(truth["mask"]):
        lines = [[method] for method in methods]
        for line in lines:
            for metric in ("dice", "iou"):
                own = reports[line[0], structure, metric]
                line += [own["es"], own["interval"], *map(own.get, names)]
        print_table(f"{structure}, by {attribute}", heads, lines)
    lines = []
    gain = {}
    for method in methods:
        own, first = scores[method, "mean", "dice"], scores[methods[0], "mean", "dice"]
        report = reports[method, "mean", "dice"]
        gap = f"{report['gap']} ({chance_level(own, group)[1]:.4f})"
        gain[method] = {row.name: row for row in compare(own, first, group, names)}
        difference = "{0.value:+.4f} [{0.lo:+.4f}, {0.hi:+.4f}]".format(gain[method]["worst"])
        lines.append([method, report["interval"], report["worst"], gap, difference])
    heads = ["trained on", "all patients", "worst", "gap (by chance)", f"worst - {methods[0]}"]
    print_table(f"mean Dice of {len(group)} images, by {attribute}, [95 %]", heads, lines)
    if methods[0] == "plain" and "twice" in gain:
        print(f"\nTwice the steps change plain's Dice by {gain['twice']['overall'].value:+.4f}.")
    if methods[0] == "plain" and {"equal", "oracle"} <= gain.keys():
        text = "shows no gain that can be told from chance"
        if gain["equal"]["worst"].lo > 0 and gain["oracle"]["worst"].lo > 0:
            share = gain["equal"]["worst"].value / gain["oracle"]["worst"].value
            text = f"closes {share:.0%} of the distance to the oracle"
        print(f"\nEqual Scale {text} in the worst group.")
    if truth["name"][0].startswith("phantom-"):
        print("\nPhantom images: a caricature for teaching and testing, no medical evidence.")

if __name__ == "__main__":
    sys.exit(command_line(table))
