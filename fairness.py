"""Measure how evenly a segmenter serves the groups, and how alike two sets of images are.

    python fairness.py table data/test.npz plain=plain.npz equal=equal.npz --attribute race

Every image gets a Dice and an IoU. Their group means give the equity-scaled score (Eq. 7), the fairness of
Eq. 1 and what Tables 2-5 leave out: intervals, tests, and the gap that equal groups show by chance. The last
part compares generated with real sets (Section 3.2). 2,000 images of 64 px take seconds.
"""
import csv
import sys
from collections import namedtuple

import numpy as np
from scipy.spatial.distance import cdist

from fairdiff import InputError, Parser, group_codes, load_set, replacing, run_command

# N images, H W pixels, G groups, B resamples, D features. Group -1 is unknown: it counts in overall only.

# -----------------------------------------------------------------------------
# Scores of one image

def iou(pred, true, label):
    """Intersection over union |P and T| / |P or T| of a label in each image, float (N,) in [0, 1].

    pred, true: integer masks (N, H, W). Where neither has the label the score is 1, where one has it 0.
    """
    pred, true = np.asarray(pred) == label, np.asarray(true) == label
    either = (pred | true).sum((1, 2))
    return np.where(either > 0, (pred & true).sum((1, 2)) / np.maximum(either, 1), 1.0)


def dice(pred, true, label):
    """Dice coefficient 2 |P and T| / (|P| + |T|), a function of the IoU; everything else as in `iou`."""
    score = iou(pred, true, label)
    return 2 * score / (1 + score)


def structures(mask):
    """Names and labels of the structures in masks: cup and rim, or one where no label is 2."""
    return {"cup": 2, "rim": 1} if (mask == 2).any() else {"structure": 1}


# -----------------------------------------------------------------------------
# Fairness of group means

def group_sd(means):
    """Sample standard deviation of group means (..., G) over the groups; 0 for a single group."""
    means = np.asarray(means, float)
    return means.std(-1, ddof=1) if means.shape[-1] > 1 else np.zeros(means.shape[:-1])


def essp(overall, group_means):
    """Equity-scaled performance of overall (...) and group_means (..., G), Eq. 7; ValueError in percent."""
    if np.size(overall) and np.max(overall) > 1:
        raise ValueError(f"score {np.max(overall)}; expected scores in [0, 1], not in percent")
    return np.asarray(overall) / (1 + group_sd(group_means))            # Eq. 7


def fairness(group_means):
    """Minus the sample variance of the group means (..., G), Eq. 1 for one attribute. 0 is fair."""
    return 0.0 - group_sd(group_means) ** 2                             # Eq. 1


# -----------------------------------------------------------------------------
# Intervals and tests

Row = namedtuple("Row", "name n value lo hi")


def bootstrap(scores, group, n_boot, seed):
    """Overall (1 + B,) and group means (1 + B, G): of the sample, then of resamples within groups."""
    rng = np.random.default_rng(seed)                   # a seed draws the same images for every method
    codes, sizes = np.unique(group, return_counts=True)
    means = np.empty((1 + n_boot, len(codes)))
    for i, code in enumerate(codes):
        own = scores[group == code]
        means[0, i] = own.mean()
        means[1:, i] = own[rng.integers(len(own), size=(n_boot, len(own)))].mean(1)
    return means @ sizes / sizes.sum(), means[:, codes >= 0]


def summarise(overall, means):
    """The numbers of a report (B, G + 6) from overall (B,) and group means (B, G)."""
    worst, best = means.min(1), means.max(1)
    rest = [essp(overall, means), group_sd(means), worst, best - worst, fairness(means)]
    return np.column_stack([overall, means, *rest])


def report_rows(draws, group, names, p, ci):
    """List of Row from draws (1 + B, G + 6), the sample's numbers first; percentile intervals."""
    codes, sizes = np.unique(group[group >= 0], return_counts=True)
    labels = [str(code) if names is None else names[code] for code in codes]
    labels = ["overall", *labels, "es", "sd", "worst", "gap", "eq1"]
    counts = [len(group), *sizes.tolist(), len(group)] + [int(sizes.sum())] * 4
    lo, hi = np.quantile(draws[1:], [(1 - ci) / 2, (1 + ci) / 2], axis=0)
    rows = [Row(*row) for row in zip(labels, counts, draws[0], lo, hi, strict=True)]
    return rows + [Row("p", len(group), p, np.nan, np.nan)]


def p_value(null, observed):
    """Share of the null draws that reach the observed value; never 0 (Phipson & Smyth 2010)."""
    return (1 + np.count_nonzero(null >= observed - 1e-12)) / (1 + len(null))


def welch_statistic(scores, group):
    """Spread of the group means of scores (..., N), each in units of its own error (Welch 1951)."""
    codes, sizes = np.unique(group, return_counts=True)
    means = np.stack([scores[..., group == code].mean(-1) for code in codes], -1)
    variances = np.stack([scores[..., group == code].var(-1) for code in codes], -1)
    weights = sizes / np.maximum(variances, 1e-12)
    centre = (weights * means).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    return (weights * (means - centre) ** 2).sum(-1)


def fair_report(scores, group, names=None, n_boot=2000, seed=0, ci=0.95):
    """List of Row: overall, each group present, es (Eq. 7), sd, worst, gap, eq1 (Eq. 1) and p.

    scores: (N,) in [0, 1]; group: codes (N,), -1 unknown; names: of the codes. lo, hi: bootstrap within
    groups. p: permutation test of equal group means. sd and gap are never below 0: see `chance_level`.
    """
    known, labels = scores[group >= 0], group[group >= 0]
    shuffled = np.random.default_rng(seed).permuted(np.tile(known, (n_boot, 1)), axis=1)
    p = p_value(welch_statistic(shuffled, labels), welch_statistic(known, labels))
    draws = summarise(*bootstrap(scores, group, n_boot, seed))
    return report_rows(draws, group, names, p, ci)


def chance_level(scores, group, n_boot=2000, seed=0):
    """Mean SD and mean gap that groups of equal means show, given their sizes and spreads."""
    _, means = bootstrap(scores, group, n_boot, seed)
    noise = means[1:] - means[0]
    return group_sd(noise).mean(), np.ptp(noise, axis=1).mean()


def compare(scores_a, scores_b, group, names=None, n_boot=2000, seed=0, ci=0.95):
    """The rows of `fair_report` for the paired difference a - b of two methods on the same images.

    p: two-sided, by random sign flips of each image's difference, statistic |mean difference|.
    """
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (n_boot, len(group)))
    differences = scores_a - scores_b
    p = p_value(np.abs(flips @ differences) / len(group), abs(differences.mean()))
    draws = summarise(*bootstrap(scores_a, group, n_boot, seed))
    draws -= summarise(*bootstrap(scores_b, group, n_boot, seed))
    return report_rows(draws, group, names, p, ci)


# -----------------------------------------------------------------------------
# Distances between sets of features

def frechet_distance(x, y):
    """Distance of Gaussians fitted to features x (N, D) and y (M, D) (FID: Heusel et al. 2017).

    |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2); NaN where N or M is at most D, too few for a covariance.
    """
    if min(len(x), len(y)) <= x.shape[1]:
        return np.nan
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(cx)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T         # Cx^1/2
    values = np.linalg.eigvalsh(root @ cy @ root)       # those of Cx Cy, but never complex
    trace = np.trace(cx) + np.trace(cy) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + trace)


def mmd_cov(d):
    """Minimum matching distance and coverage (Achlioptas et al. 2018) of distances (generated, real).

    mmd: mean over the *real* items of the nearest generated one; the other way round a model that repeats
    one sample would win. cov: share of the real items that are nearest to some generated one.
    """
    return float(d.min(0).mean()), len(np.unique(d.argmin(1))) / d.shape[1]


def one_nna(gg, rr, gr):
    """Accuracy of a nearest neighbour at telling two sets apart (Lopez-Paz & Oquab 2017); ideal is 0.5.

    Distances within the generated set, within the real set and between them, (N, N) each.
    """
    infinite = np.diag(np.full(len(gg), np.inf))                        # nobody is their own neighbour
    same = np.concatenate([(gg + infinite).min(1), (rr + infinite).min(1)])
    other = np.concatenate([gr.min(1), gr.min(0)])
    return float(((same < other) + 0.5 * (same == other)).mean())


def set_distance(generated, test, train):
    """Compare features (N, D) of a generated set with a test set: n, frechet, mmd, cov, 1-nna, memorised.

    memorised: share closer to a training item than 99 % of the training items are to each other.
    """
    n = min(len(generated), len(test))                                  # 0.5 is chance only for equal N
    generated, test = generated[:n], test[:n]
    between, own = cdist(generated, test), cdist(train, train)
    threshold = np.quantile((own + np.diag(np.full(len(own), np.inf))).min(1), 0.01)
    mmd, cov = mmd_cov(between)
    nna = one_nna(cdist(generated, generated), cdist(test, test), between)
    return {"n": n, "frechet": frechet_distance(generated, test), "mmd": mmd, "cov": cov, "1-nna": nna,
            "memorised": (cdist(generated, train).min(1) < threshold).mean()}


# -----------------------------------------------------------------------------
# Tables 2-5

def score_predictions(items, truth):
    """Scores {(method, structure, metric): {seed: (N,)}} of items "NAME=FILE" or "NAME:SEED=FILE"."""
    scores = {}
    for item in items:
        label, _, path = item.partition("=")
        method, _, seed = label.partition(":")
        if not method or not path:
            raise InputError(f"{item!r}: expected NAME=FILE or NAME:SEED=FILE")
        masks = load_set(path)
        if not np.array_equal(masks["name"], truth["name"]):
            raise InputError(f"{path}: other images than the set's; expected predictions of this very set")
        for metric in (dice, iou):
            own = {}
            for structure, label in structures(truth["mask"]).items():
                own[structure] = metric(masks["mask"], truth["mask"], label)
            own["mean"] = np.mean(list(own.values()), axis=0)
            for structure, values in own.items():
                scores.setdefault((method, structure, metric.__name__), {})[seed or "0"] = values
    return scores


def print_table(title, heads, lines):
    """Print a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    print(f"\n{title}\n")
    for line in [heads, ["-" * width for width in widths], *lines]:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


def table(args):
    """Score predictions by group: write every value to a CSV file, then print Tables 2-5 and the result."""
    truth = load_set(args.set)
    group, names = group_codes(truth, args.attribute)
    scores, reports, lines = score_predictions(args.predictions, truth), {}, []
    for key, trainings in scores.items():
        if len(trainings) > 1:                          # an image's score is its mean over the trainings
            trainings["mean"] = np.mean(list(trainings.values()), axis=0)
        for seed, values in trainings.items():
            report = fair_report(values, group, names)
            lines += [[args.attribute, key[0], seed, *key[1:], *row] for row in report]
        scores[key], reports[key] = values, {row.name: row for row in report}       # the mean, if any
    with replacing(args.out) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("attribute method seed structure metric group n value lo hi".split())
        writer.writerows(lines)

    def cell(key, name, interval=False):
        row = reports[key][name]
        return f"{row.value:.4f}" + (f" [{row.lo:.4f}, {row.hi:.4f}]" if interval else "")

    methods = list(dict.fromkeys(key[0] for key in scores))
    present = [name for code, name in enumerate(names) if (group == code).any()]
    heads = ["method", "ES-Dice", "Dice [95 %]", "ES-IoU", "IoU"]
    heads += [f"{name} {metric}" for metric in ("Dice", "IoU") for name in present]
    for structure in structures(truth["mask"]):
        lines = []
        for method in methods:
            d, j = (method, structure, "dice"), (method, structure, "iou")
            line = [method, cell(d, "es"), cell(d, "overall", True), cell(j, "es"), cell(j, "overall")]
            lines.append(line + [cell(key, name) for key in (d, j) for name in present])
        print_table(f"{structure}, by {args.attribute}", heads, lines)
    first, lines = scores[methods[0], "mean", "dice"], []
    for method in methods:
        key = method, "mean", "dice"
        gap = chance_level(scores[key], group)[1]
        rows = {row.name: row for row in compare(scores[key], first, group, names)}
        more = f"{rows['worst'].value:+.4f} [{rows['worst'].lo:+.4f}, {rows['worst'].hi:+.4f}]"
        lines.append([method, cell(key, "overall", True), cell(key, "worst"), f"{cell(key, 'gap')} ({gap:.4f})",
                      more if method != methods[0] else "-"])
    heads = ["trained on", "all patients [95 %]", "worst", "gap (by chance)", f"worst - {methods[0]} [95 %]"]
    print_table(f"mean Dice of {' and '.join(structures(truth['mask']))}, by {args.attribute}", heads, lines)
    print(f"\n{len(group)} images: " + ", ".join(f"{n} {(group == i).sum()}" for i, n in enumerate(names)))
    if truth["name"][0].startswith("phantom-"):
        print("Phantom images: a caricature for teaching and testing, no medical evidence.")


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="fairness.py", description="Scores, fairness and distances between sets.")
    p = parser.command("table", table, "score predictions by group, Tables 2-5")
    p.add_argument("set", help="the images that were predicted, with their true masks")
    p.add_argument("predictions", nargs="+", help="NAME=FILE, or NAME:SEED=FILE for several trainings")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--out", default="results.csv", help="CSV file with every value")
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
