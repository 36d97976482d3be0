"""Every number of the evaluation: how well each group is segmented, how sure that is, how alike two sets are.

FairDiff (MICCAI 2024) calls a segmenter fair if it scores evenly over the groups of an attribute (Section
2.1, Eq. 1), rates it by the equity-scaled score (Section 3.3, Eq. 7) and compares generated with real sets
(Section 3.2). Here are these numbers and what its tables leave out: intervals, tests, noise floors.

    python fairness.py table data/test.npz plain=plain.npz equal.npz --attribute race --out results.csv
    python fairness.py table data/test.npz plain:0=a.npz plain:1=b.npz            # two trainings of a method

prints Tables 2-5 of the paper (cup, then rim: ES-Dice, Dice, ES-IoU, IoU, each group's Dice and IoU) and how
evenly the Dice is spread. tables.md holds the same, results.csv every value for cup and rim. One core scores
2,000 predictions of 224 px in 0.6 s a method, once they are read.
"""
import csv
import functools
import html
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from fairdiff import (
    ATTRIBUTES,
    InputError,
    Parser,
    known_groups,
    load_set,
    printable,
    replacing,
    run_command,
)

# N images, H W pixels, G groups present, B resamples, R rows of a report, D features. Scores lie in [0, 1].
# A group is a code >= 0; -1 is unknown: such an image counts in overall and in no group.

# ------------------------------------------------------------------------------------------------------------
# Scores per image

LABELS = {"rim": 1, "cup": 2, "disc": None}             # mask codes; the disc is rim and cup together


def _areas(pred, true, label):
    """Pixels of `label` in both masks at once, in pred and in true: integers (3, N)."""
    pred, true = np.asarray(pred), np.asarray(true)
    if pred.ndim != 3 or pred.shape != true.shape:
        raise ValueError(f"masks must both be (N, H, W), not {pred.shape} and {true.shape}")
    if isinstance(label, str) and label not in LABELS:
        raise ValueError(f"label must be a mask code or one of {', '.join(LABELS)}, not {label!r}")
    code = LABELS.get(label, label)
    areas = np.empty((3, len(pred)), np.int64)
    for i, (p, t) in enumerate(zip(pred, true, strict=True)):       # one image at a time fits the cache
        p, t = (p > 0, t > 0) if code is None else (p == code, t == code)
        areas[:, i] = np.count_nonzero(p & t), np.count_nonzero(p), np.count_nonzero(t)
    return areas


def _ratio(part, whole):
    """part / whole; NaN where neither mask has the structure: nothing to find is neither a hit nor a miss."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def dice(pred, true, label):
    """Dice coefficient 2 |P and T| / (|P| + |T|) of each image.

    pred, true: int masks (N, H, W), 0 background, 1 rim, 2 cup; label: "cup", "rim", "disc" (> 0) or code.
    Returns float (N,) in [0, 1]; both empty: NaN, one empty: 0. ValueError: unequal shapes, unknown label.
    """
    both, p, t = _areas(pred, true, label)
    return _ratio(2 * both, p + t)


def iou(pred, true, label):
    """Intersection over union |P and T| / |P or T| of each image; all else as in `dice`."""
    both, p, t = _areas(pred, true, label)
    return _ratio(both, p + t - both)


def surface_distance(pred, true, label):
    """Symmetric mean surface distance of each image in pixels: between the outlines' pixels, both ways.

    Arguments and errors as in `dice`. Returns float (N,) >= 0, NaN where the structure is missing in a mask.
    """
    _areas(pred[:1], true[:1], label)                                   # for its errors
    code = LABELS.get(label, label)
    out = np.full(len(pred), np.nan)
    for i, masks in enumerate(zip(pred, true, strict=True)):
        p, t = (m > 0 if code is None else m == code for m in masks)
        if p.any() and t.any():
            p, t = (m & ~ndimage.binary_erosion(m) for m in (p, t))     # a region at the border ends there
            far = [ndimage.distance_transform_edt(~b)[a] for a, b in ((p, t), (t, p))]
            out[i] = np.concatenate(far).mean()
    return out


# ------------------------------------------------------------------------------------------------------------
# Fairness of group means

def _sd(means):
    """Sample standard deviation (n - 1) over the last axis; NaN is left out, one value gives 0, none NaN."""
    known = ~np.isnan(means)
    n = known.sum(-1)
    centre = np.where(known, means, 0).sum(-1) / np.maximum(n, 1)
    squares = np.where(known, (means - centre[..., None]) ** 2, 0).sum(-1)
    return np.where(n > 0, np.sqrt(squares / np.maximum(n - 1, 1)), np.nan)


def _check_scores(*scores):
    """ValueError unless every score is NaN or in [0, 1]: in percent, Eq. 7 would mean something else."""
    if any(((s < 0) | (s > 1)).any() for s in scores):
        raise ValueError("scores must lie in [0, 1] (a Dice of 85 % is 0.85)")


def essp(overall, group_means):
    """Equity-scaled segmentation performance, Eq. 7: overall / (1 + standard deviation of the group means).

    overall: (...); group_means: (..., G), NaN is left out. Returns float (...); one group: overall; none:
    NaN. The deviation is the sample's (n - 1): only with it come the paper's tables out. ValueError: outside
    [0, 1].
    """
    overall, means = np.asarray(overall, float), np.asarray(group_means, float)
    _check_scores(overall, means)
    return (overall / (1 + _sd(means)))[()]             # Eq. 7; [()] turns a 0-d array into a number


def fairness(group_means):
    """Eq. 1 for one attribute: minus the sample variance of the group means (..., G); NaN is left out.

    Returns float (...) <= 0; 0 is fair; one group: 0; none: NaN. Eq. 1 sums this over the attributes.
    """
    return (0.0 - _sd(np.asarray(group_means, float)) ** 2)[()]     # Eq. 1; 0 - x, as -x would print -0.0


# ------------------------------------------------------------------------------------------------------------
# Intervals and tests

class Row(NamedTuple):
    """One number of a report: name, images that enter it, value, interval (NaN where there is none)."""
    name: str
    n: int
    value: float
    lo: float
    hi: float


def _sort(scores, group, names=None):
    """Drop images that are NaN in any of the score arrays (N,), sort the rest by group, unknown first.

    Returns the sorted arrays, sizes of the groups present (G,) and their names; errors as in `fair_report`.
    """
    scores, group = [np.asarray(s, float) for s in scores], np.asarray(group)
    if group.ndim != 1 or any(s.shape != group.shape for s in scores):
        raise ValueError(f"scores and group must be (N,), not {[s.shape for s in scores]} and {group.shape}")
    if group.size and (group.min() < -1 or (names is not None and group.max() >= len(names))):
        raise ValueError("a group code must be -1 (unknown) or the place of its name")
    _check_scores(*scores)
    keep = np.flatnonzero(~np.isnan(scores).any(0))
    keep = keep[np.argsort(group[keep], kind="stable")]
    codes, sizes = np.unique(group[keep], return_counts=True)
    labels = [str(c if names is None else names[c]) for c in codes if c >= 0]
    return [s[keep] for s in scores], sizes[codes >= 0], labels


# Both resamplings follow from the group sizes and the seed alone and are kept: all methods and metrics see
# the same draws, so that two cells of a table differ by their scores and never by the luck of the draw.

@functools.lru_cache(maxsize=4)
def _bootstrap(sizes, n_boot, seed):
    """Indices (B, N), drawn with replacement inside each stratum, so that every group keeps its size."""
    rng = np.random.default_rng([seed, 0])
    strata = zip(sizes, np.cumsum(sizes), strict=True)
    return np.concatenate([rng.integers(end - n, end or 1, (n_boot, n), np.int32)     # int32: half the memory
                           for n, end in strata], axis=1)       # or 1: nobody unknown, 0 to 0 is no range


@functools.lru_cache(maxsize=4)
def _permutation(n, n_perm, seed):
    """Indices (B, N), each row a random order of the images: the same as permuting their labels."""
    order = np.tile(np.arange(n, dtype=np.int32), (n_perm, 1))
    return np.random.default_rng([seed, 1]).permuted(order, axis=1)


def _group_means(scores, sizes):
    """Scores (..., N) sorted by group, unknown first -> mean of each group (..., G)."""
    starts = scores.shape[-1] - np.cumsum(sizes[::-1])[::-1]
    return np.add.reduceat(scores, starts, axis=-1) / sizes


def _numbers(scores, sizes):
    """Sorted scores (..., N) -> overall, each group, es, sd, worst, gap, eq1 (..., R - 1)."""
    overall = scores.sum(-1, keepdims=True) / (scores.shape[-1] or np.nan)
    groups = _group_means(scores, sizes)
    means = groups if sizes.size else np.full_like(overall, np.nan)     # no known group: NaN, not an error
    worst, best = means.min(-1), means.max(-1)
    rest = essp(overall[..., 0], means), _sd(means), worst, best - worst, fairness(means)
    return np.concatenate([overall, groups, np.stack(rest, -1)], -1)


def _estimate(scores, sizes, n_boot, seed):
    """The numbers of a sorted score array (R - 1,) and of its resamples (B, R - 1), composites in each."""
    order = _bootstrap((scores.size - int(sizes.sum()), *sizes.tolist()), n_boot, seed)
    return _numbers(scores, sizes), _numbers(scores[order], sizes)


def _null_means(scores, sizes, n_perm, seed):
    """Group means (B, G) under permuted labels among the images of known group."""
    known = scores[scores.size - sizes.sum():]
    return _group_means(known[_permutation(known.size, n_perm, seed)], sizes)


def _p_value(null, observed):
    """(1 + count) / (1 + B), never 0, as the observed order is one of them (Phipson and Smyth, 2010)."""
    if np.isnan(observed):
        return np.nan
    return float((1 + (null >= observed - 1e-12).sum()) / (1 + len(null)))      # 1e-12: equal up to rounding


def _rows(n, sizes, labels, value, draws, p, ci):
    """The report of n images: values (R - 1,), the percentile interval of their draws (B, R - 1), and p."""
    if not 0 < ci < 1:
        raise ValueError(f"ci must lie between 0 and 1, not {ci}")
    lo, hi = np.quantile(draws, [(1 - ci) / 2, (1 + ci) / 2], axis=0)
    names = ["overall", *labels, "es", "sd", "worst", "gap", "eq1", "p"]
    counts = [n, *sizes.tolist(), n] + [int(sizes.sum())] * 5
    numbers = [*zip(value.tolist(), lo.tolist(), hi.tolist(), strict=True), (p, np.nan, np.nan)]
    return [Row(name, count, *v) for name, count, v in zip(names, counts, numbers, strict=True)]


def fair_report(scores, group, names=None, n_boot=2000, seed=0, ci=0.95, n_perm=2000):
    """List of Row: overall, each group present, es (Eq. 7), sd, worst, gap (best - worst), eq1 (Eq. 1), p.

    scores: (N,) in [0, 1], NaN is skipped, n counts the rest; group: codes (N,), -1 unknown; names: of codes.
    lo, hi: percentile bootstrap, stratified by group. Resampling widens a spread, and sd and gap cannot fall
    below 0: their intervals can never say "no difference". Read them beside `noise_floor` and p. Where groups
    are nearly equal worst and es come out low and so do their intervals: a least of noisy means is too small.
    p: share of n_perm permutations of the labels whose sd reaches the observed one; NaN below two groups. It
    asks if all scores are of one distribution: groups of one mean but unequal spread can have a small p, too.
    ValueError: unequal shapes, a score outside [0, 1], a code without a name, ci outside (0, 1).
    """
    (scores,), sizes, labels = _sort([scores], group, names)
    value, draws = _estimate(scores, sizes, n_boot, seed)
    null = _sd(_null_means(scores, sizes, n_perm, seed))
    p = _p_value(null, value[-4]) if len(labels) > 1 else np.nan        # value[-4] is sd
    return _rows(scores.size, sizes, labels, value, draws, p, ci)


def noise_floor(scores, group, n_perm=2000, seed=0):
    """Mean sd and mean gap of the group means under permuted labels: what groups that do not differ show.

    Arguments and errors as in `fair_report`. Returns two floats; 0 for one group, NaN for none.
    """
    (scores,), sizes, labels = _sort([scores], group)
    if not labels:
        return np.nan, np.nan
    null = _null_means(scores, sizes, n_perm, seed)     # the same permutations as p
    return float(_sd(null).mean()), float(np.ptp(null, axis=-1).mean())


def compare(scores_a, scores_b, group, names=None, n_boot=2000, seed=0, ci=0.95, n_perm=2000):
    """The rows of `fair_report` for the paired difference a - b of two methods on the same images.

    An image that is NaN in either is skipped, so the difference need not be that of two reports. A resample
    draws the same images for both, which makes the intervals narrower than those of two reports. p:
    two-sided, n_perm random sign flips of each image's difference, statistic |mean difference| overall.
    Arguments and errors as in `fair_report`.
    """
    (a, b), sizes, labels = _sort([scores_a, scores_b], group, names)
    pairs = zip(_estimate(a, sizes, n_boot, seed), _estimate(b, sizes, n_boot, seed), strict=True)
    value, draws = (x - y for x, y in pairs)
    flips = 2.0 * np.random.default_rng([seed, 2]).integers(0, 2, (n_perm, a.size), np.int8) - 1
    p = _p_value(np.abs(flips @ (a - b)) / max(a.size, 1), abs(value[0]))
    rows = _rows(a.size, sizes, labels, value, draws, p, ci)
    return [*rows[:-1], rows[-1]._replace(n=a.size)]    # images of unknown group are flipped too


# ------------------------------------------------------------------------------------------------------------
# Distances between sets

def frechet_distance(x, y):
    """Frechet distance of the Gaussians fitted to two sets: |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2).

    x: features (N, D), y: (M, D); returns float >= 0 in their squared unit (FID: Heusel et al., 2017). Biased
    upwards for few images: give equal N and print it. ValueError: N or M <= D, unequal D, NaN.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not np.isfinite(x.sum() + y.sum()):
        raise ValueError(f"features must be finite, (N, D) and (M, D), not {x.shape} and {y.shape}")
    if min(len(x), len(y)) <= x.shape[1]:
        raise ValueError(f"covariance of {x.shape[1]} features from {min(len(x), len(y))} images: give more")
    cx, cy = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (x, y))
    values, vectors = np.linalg.eigh(cx)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T         # Cx^1/2
    # Cx Cy has the eigenvalues of the symmetric Cx^1/2 Cy Cx^1/2: never complex, below 0 by rounding alone.
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cy @ root), 0)).sum()
    return float(max(0, ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * trace))


def _distances(*matrices):
    """The matrices as float copies; ValueError unless each is a non-empty table of distances."""
    matrices = [np.array(m, float) for m in matrices]
    if any(m.ndim != 2 or not m.size or not (m >= 0).all() for m in matrices):
        raise ValueError("distances must be a non-empty (rows, columns) array of numbers >= 0")
    return matrices


def mmd_cov(d):
    """Minimum matching distance and coverage (Achlioptas et al., 2018) from distances d (n_gen, n_ref).

    Returns mmd, the mean over the *reference* of the nearest generated one (over the generated, a model that
    repeats one training sample would win), and cov in [0, 1], the share of the reference that is nearest to
    some generated one. ValueError: d is empty, not 2-D, negative or NaN.
    """
    d, = _distances(d)
    return float(d.min(axis=0).mean()), np.unique(d.argmin(axis=1)).size / d.shape[1]


def one_nna(gg, rr, gr):
    """Leave-one-out accuracy of a nearest neighbour at telling the sets apart (Lopez-Paz and Oquab, 2017).

    gg (n, n), rr (m, m), gr (n, m): distances within and between the sets. Returns a share: 0.5 is ideal, 1
    tells apart, 0 means copies; a tie counts half. Give n = m, or chance is not 0.5. Errors as in `mmd_cov`.
    """
    gg, rr, gr = _distances(gg, rr, gr)
    if gg.shape != (len(gr),) * 2 or rr.shape != (gr.shape[1],) * 2:
        raise ValueError(f"distances must be (n, n), (m, m), (n, m), not {gg.shape}, {rr.shape}, {gr.shape}")
    np.fill_diagonal(gg, np.inf)                        # nobody is their own neighbour
    np.fill_diagonal(rr, np.inf)
    own, other = np.concatenate([gg.min(1), rr.min(1)]), np.concatenate([gr.min(1), gr.min(0)])
    return float(((own < other) + 0.5 * (own == other)).mean())


# ------------------------------------------------------------------------------------------------------------
# Command line

def read_predictions(items, truth, seed=0):
    """Read `[METHOD[:SEED]=]FILE` one by one; yields method, seed, masks (N, H, W) in the order of truth.

    Without a SEED (of the training, int) it is `seed`; a method may come several times, once for each seed.
    """
    names, seen = truth["name"].tolist(), set()
    for item in items:
        method, equals, path = item.partition("=")
        if not equals or Path(item).exists():           # a path may hold a "=", too
            method, path = Path(item).stem, item
        stem, colon, number = method.rpartition(":")
        run = (stem, int(number)) if colon and number.isdecimal() else (method, seed)
        run = printable(run[0]).lstrip("=+-@"), run[1]  # a spreadsheet would take those for a formula
        if not run[0] or run in seen:
            raise InputError(f"{item!r}: method {run[0]!r} is empty or taken; name it, as in plain=FILE, or "
                             "its trainings, as in plain:0=FILE plain:1=FILE")
        seen.add(run)
        data = load_set(path, "`python transunet.py predict` makes it")
        place = {name: i for i, name in enumerate(data["name"].tolist())}
        if odd := sorted(set(names) ^ set(place)):
            raise InputError(f"{path}: {len(odd)} names, such as {odd[0]!r}, are not in both files: "
                             "run `python transunet.py predict` on this very set")
        if data["mask"].shape != truth["mask"].shape:
            raise InputError(f"{path}: masks {data['mask'].shape}; the set has {truth['mask'].shape}")
        order = np.array([place[name] for name in names], int)
        in_place = np.array_equal(order, np.arange(len(order)))         # as a rule; spares a copy
        yield *run, data["mask"] if in_place else data["mask"][order]


def column(head, rows, best=0, interval=False, floor=None):
    """A column of a printed table from one Row a method: its head, its cells, and which of them are best.

    best: 1 the highest, -1 the lowest, 0 none; ties in the printed digits are all best. floor: in brackets.
    """
    cells = ["-" if np.isnan(r.value) else f"{r.value:.4f}" for r in rows]
    if interval:
        cells = [c if c == "-" else f"{c} [{r.lo:.4f}, {r.hi:.4f}]" for c, r in zip(cells, rows, strict=True)]
    if floor:
        cells = [f"{c} ({x:.4f})" for c, x in zip(cells, floor, strict=True)]
    rank = [-np.inf if np.isnan(r.value) else best * round(r.value, 4) for r in rows]
    return head, cells, [best != 0 and len(rows) > 1 and x == max(rank) > -np.inf for x in rank]


def layout(columns, markdown=False):
    """Lines of a table, as aligned text or as Markdown with the best cells in bold."""
    if not markdown:
        columns = [[head, *cells] for head, cells, _ in columns]
        padded = [[c.ljust(max(map(len, cells))) for c in cells] for cells in columns]
        return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    marked = []
    for head, cells, bold in columns:
        cells = [html.escape(c, False).replace("\\", "\\\\").replace("|", "\\|") for c in [head, *cells]]
        marked.append([f"**{c}**" if b else c for c, b in zip(cells, [False, *bold], strict=True)])
    lines = ["| " + " | ".join(line) + " |" for line in zip(*marked, strict=True)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


KINDS = [(structure, metric) for structure in ("cup", "rim") for metric in (dice, iou)]


def table(args):
    """Score prediction files against their set; print the tables, write them as CSV and as Markdown."""
    markdown = Path(args.out).with_name("tables.md")
    if Path(args.out).suffix == ".md":
        raise InputError(f"--out {args.out}: expected a CSV file; tables.md goes beside it")
    truth = load_set(args.set)
    group, names = known_groups(truth, args.attribute)
    scores, seeds = {}, {}                              # scores: method, seed, structure, metric -> (N,)
    for method, seed, mask in read_predictions(args.predictions, truth, args.seed):
        seeds.setdefault(method, []).append(seed)
        for structure, metric in KINDS:
            scores[method, seed, structure, metric.__name__] = metric(mask, truth["mask"], structure)
        cup, rim = (scores[method, seed, structure, "dice"] for structure in ("cup", "rim"))
        scores[method, seed, "both", "dice"] = (cup + rim) / 2
    methods, first = list(seeds), next(iter(seeds))
    report = {run: fair_report(s, group, names, seed=args.seed) for run, s in scores.items()}
    for method, trained in seeds.items():                # an image's score is its mean over the trainings
        for structure, metric in [(k, m.__name__) for k, m in KINDS] + [("both", "dice")]:
            runs = np.stack([scores[method, seed, structure, metric] for seed in trained])
            mean = _ratio(np.nansum(runs, 0), (~np.isnan(runs)).sum(0))
            run = method, "mean", structure, metric
            scores[run], report[run] = mean, report[method, trained[0], structure, metric]
            if len(trained) > 1:
                report[run] = fair_report(mean, group, names, seed=args.seed)

    def pick(reports, name):                            # a group without any score has no row
        return [next((r for r in rows if r.name == name), Row(name, 0, *[np.nan] * 3)) for rows in reports]

    def over_seeds(structure, name):                    # standard deviation over the trainings of each method
        runs = [pick([report[m, seed, structure, "dice"] for seed in trained], name)
                for m, trained in seeds.items()]
        return [Row(name, len(r), np.std([x.value for x in r], ddof=1) if len(r) > 1 else np.nan,
                    np.nan, np.nan) for r in runs]

    heads = ("method", methods, [False] * len(methods))
    present = [names[g] for g in np.unique(group) if g >= 0]
    tables, several = {}, max(map(len, seeds.values())) > 1
    for structure, title in (("cup", "cup"), ("rim", "rim"), ("both", "mean Dice of rim and cup")):
        d = [report[m, "mean", structure, "dice"] for m in methods]
        if structure != "both":                         # the columns of Tables 2-5
            j = [report[m, "mean", structure, "iou"] for m in methods]
            tables[f"{title}, by {args.attribute}"] = [
                heads, column("ES-Dice", pick(d, "es"), 1),
                column("Dice [95 %]", pick(d, "overall"), 1, interval=True),
                column("ES-IoU", pick(j, "es"), 1), column("IoU", pick(j, "overall"), 1),
                *[column(f"{g} Dice", pick(d, g), 1) for g in present],
                *[column(f"{g} IoU", pick(j, g), 1) for g in present]]
            title = f"Dice of {structure}"
        mine = [scores[m, "mean", structure, "dice"] for m in methods]
        sd_floor, gap_floor = zip(*(noise_floor(s, group, seed=args.seed) for s in mine), strict=True)
        paired = [[], *(compare(s, mine[0], group, names, seed=args.seed) for s in mine[1:])]
        eq1 = [r._replace(value=1000 * r.value) for r in pick(d, "eq1")]
        tables[f"{title}, by {args.attribute}"] = [
            heads, column("Dice [95 %]", pick(d, "overall"), 1, interval=True),
            column("worst group", pick(d, "worst"), 1),
            column("gap (by chance)", pick(d, "gap"), -1, floor=gap_floor),
            column("SD (by chance)", pick(d, "sd"), -1, floor=sd_floor),
            column("1000 x Eq. 1", eq1, 1), column("p", pick(d, "p")),
            column(f"Dice - {first} [95 %]", pick(paired, "overall"), interval=True),
            column(f"worst - {first} [95 %]", pick(paired, "worst"), interval=True)]
        if several:
            tables[f"{title}, by {args.attribute}"] += [
                column("Dice, SD over seeds", over_seeds(structure, "overall")),
                column("worst, SD over seeds", over_seeds(structure, "worst"))]

    sizes = ", ".join(f"{name} {np.count_nonzero(group == g)}" for g, name in enumerate(names))
    notes = [f"{len(group)} images: {sizes}, unknown {np.count_nonzero(group < 0)}.",
             "ES = overall / (1 + SD of the group means). By chance: the mean under permuted group labels. "
             "p: permutation of the labels, statistic SD. Intervals are over images."]
    if several:
        notes += ["An image's score is its mean over a method's trainings, of which there are " +
                  ", ".join(f"{len(trained)} of {m}" for m, trained in seeds.items()) + "."]
    if any(name.startswith("phantom-") for name in truth["name"].tolist()):
        notes += ["Phantom images: a caricature for teaching and testing, no medical evidence."]
    text = []
    for title, columns in tables.items():
        print(f"{title}\n", *layout(columns), "", sep="\n")
        text += [f"## {title}", "", *layout(columns, markdown=True), ""]
    print(*notes, f"written: {args.out}, {markdown}", sep="\n")
    with (replacing(markdown) as note, replacing(args.out) as path,
          open(path, "w", newline="", encoding="utf-8") as file):
        note.write_text("\n".join(text + [html.escape(n, False) for n in notes]) + "\n", encoding="utf-8")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("attribute method seed structure metric group value lo hi n".split())
        for (method, seed, structure, metric), rows in report.items():
            if structure != "both" and (seed != "mean" or len(seeds[method]) > 1):
                writer.writerows([args.attribute, method, seed, structure, metric, r.name,
                                  *(f"{x:.6g}" for x in r[2:]), r.n] for r in rows)      # Eq. 1 can be 1e-6


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="fairness.py", description="Every number of the evaluation.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("table", help="score predictions by group")
    p.add_argument("set", metavar="SET.npz", help="the images that were predicted, with their true masks")
    p.add_argument("predictions", metavar="[METHOD[:SEED]=]PRED.npz", nargs="+",
                   help="METHOD: the stem of the file; SEED: of its training")
    p.add_argument("--attribute", choices=[*ATTRIBUTES, "age"], default="race", help="the groups to compare")
    p.add_argument("--out", default="results.csv", help="CSV file; the tables go beside it as tables.md")
    p.add_argument("--seed", type=int, default=0, help="of the resampling, and of trainings without SEED")
    p.set_defaults(run=table)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
