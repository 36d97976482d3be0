"""Tests of fairness.py: against plain loops, hand-made numbers, the paper's own tables and simulated truth.

Simulations use fixed seeds, so they pass or fail for good; the odds stated are those of a new seed to fail by
chance.
"""
import csv
import itertools
import math
import pathlib

import numpy as np
import pytest

import fairdiff
import fairness
from fairness import (
    compare,
    dice,
    essp,
    fair_report,
    frechet_distance,
    iou,
    mmd_cov,
    noise_floor,
    one_nna,
    surface_distance,
)

# Tables 2-5 of the paper, a row a method: ES-Dice, Dice, ES-IoU, IoU, each group's Dice, each group's IoU.
# The groups of Table 5 look swapped (the overall lies next to the small group); ES is blind to their order.
METHODS = ("TransUNet", "ADV", "GroupDRO", "FairSeg", "Equal Scale")
PAPER = {
    ("race", "cup"): """
        .8372 .8481 .7409 .7532 .8270 .8489 .8503 .7277 .7576 .7551
        .8325 .8410 .7345 .7432 .8246 .8417 .8426 .7260 .7482 .7440
        .8313 .8442 .7359 .7479 .8197 .8469 .8464 .7232 .7529 .7495
        .8350 .8464 .7374 .7497 .8248 .8484 .8484 .7247 .7550 .7513
        .8397 .8480 .7441 .7529 .8320 .8483 .8497 .7352 .7572 .7540""",
    ("race", "rim"): """
        .7604 .7927 .6393 .6706 .7457 .7307 .8106 .6160 .5991 .6913
        .7579 .7906 .6371 .6682 .7413 .7286 .8087 .6116 .5982 .6888
        .7564 .7896 .6351 .6674 .7470 .7229 .8080 .6183 .5899 .6887
        .7628 .7950 .6410 .6725 .7479 .7325 .8130 .6185 .6020 .6935
        .7697 .7999 .6494 .6797 .7565 .7427 .8165 .6279 .6114 .6994""",
    ("gender", "cup"): """
        .8448 .8481 .7502 .7532 .8458 .8513 .7508 .7564
        .8343 .8345 .7351 .7356 .8344 .8348 .7361 .7350
        .8426 .8478 .7473 .7522 .8441 .8528 .7483 .7575
        .8477 .8489 .7502 .7530 .8494 .8514 .7505 .7556
        .8461 .8505 .7522 .7564 .8474 .8548 .7531 .7610""",
    ("gender", "rim"): """
        .7895 .7927 .6673 .6706 .7951 .7894 .6736 .6665
        .7783 .7852 .6553 .6630 .7905 .7779 .6699 .6534
        .7901 .7917 .6681 .6699 .7930 .7900 .6716 .6677
        .7893 .7898 .6698 .6698 .7924 .7932 .6678 .6653
        .7945 .7981 .6745 .6780 .8007 .7944 .6811 .6737""",
    ("language", "cup"): """
        .8255 .8481 .7273 .7532 .8469 .8972 .8531 .7516 .8166 .7592
        .8071 .8312 .7056 .7323 .8296 .8833 .8338 .7301 .7990 .7376
        .8231 .8416 .7231 .7442 .8398 .8844 .8571 .7421 .7993 .7605
        .8277 .8481 .7289 .7523 .8467 .8934 .8562 .7504 .8109 .7619
        .8358 .8497 .7353 .7542 .8479 .8809 .8686 .7519 .8033 .7755""",
    ("language", "rim"): """
        .7721 .7927 .6525 .6706 .7940 .8165 .7633 .6721 .6950 .6398
        .7690 .7884 .6501 .6666 .7903 .7964 .7501 .6687 .6717 .6265
        .7691 .7857 .6468 .6613 .7867 .8057 .7628 .6625 .6800 .6355
        .7725 .7898 .6524 .6668 .7909 .8106 .7661 .6680 .6865 .6424
        .7783 .7959 .6578 .6743 .7970 .8161 .7711 .6755 .6969 .6469""",
    ("ethnicity", "cup"): """
        .8339 .8481 .7366 .7532 .8463 .8704 .7508 .7826
        .8171 .8320 .7149 .7315 .8304 .8561 .7294 .7622
        .8376 .8482 .7406 .7526 .8468 .8648 .7507 .7735
        .8388 .8483 .7412 .7542 .8501 .8661 .7515 .7764
        .8439 .8462 .7402 .7500 .8485 .8448 .7664 .7477""",
    ("ethnicity", "rim"): """
        .7848 .7927 .6650 .6706 .7914 .8057 .6695 .6815
        .7793 .7841 .6570 .6602 .7829 .7915 .6590 .6658
        .7924 .7943 .6694 .6733 .7936 .7901 .6728 .6646
        .7884 .7939 .6710 .6754 .7943 .8040 .6697 .6789
        .7886 .7902 .6666 .6670 .7917 .7888 .6649 .6657""",
}


def paper_cells():
    """Yields (attribute, structure, method, metric), printed ES, overall and group means of all 80 cells."""
    for (attribute, structure), text in PAPER.items():
        for method, line in zip(METHODS, text.strip().splitlines(), strict=True):
            v = np.array(line.split(), float)
            d, j = np.split(v[4:], 2)
            yield (attribute, structure, method, "dice"), v[0], v[1], d
            yield (attribute, structure, method, "iou"), v[2], v[3], j


def simulate(rng, means, sizes, sd=0.1):
    """One score a patient, normal around the mean of its group (0 and 1 are far off), and the codes."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.clip(rng.normal(np.array(means)[group], sd), 0, 1), group


def by_name(rows):
    return {row.name: row for row in rows}


# ------------------------------------------------------------------------------------------------------------
# Scores per image

@pytest.mark.parametrize(("label", "codes"), [("rim", [1]), ("cup", [2]), ("disc", [1, 2]), (0, [0])])
def test_dice_and_iou_equal_a_pixel_loop(label, codes):
    """Counts made one pixel at a time give the same scores."""
    pred, true = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 7)).astype(np.uint8)
    for i in range(4):
        pixels = [(a in codes, b in codes) for a, b in zip(pred[i].flat, true[i].flat, strict=True)]
        both, either = sum(a and b for a, b in pixels), sum(a or b for a, b in pixels)
        assert dice(pred, true, label)[i] == pytest.approx(2 * both / (both + either))
        assert iou(pred, true, label)[i] == pytest.approx(both / either)


def test_surface_distance_against_a_loop():
    """Mean distance between the outlines' pixels, both ways; a copy has 0, a missing structure NaN."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:20, :24]
    pred, true = np.zeros((2, 4, 20, 24), np.uint8)
    for p, t in zip(pred, true, strict=True):
        for m in (p, t):
            m[np.hypot(xx - rng.uniform(9, 13), yy - rng.uniform(8, 11)) < rng.uniform(4, 8)] = 1
    pred[2], pred[3] = true[2], 0

    def edge(m):
        n = np.pad(m, 1)
        return np.argwhere(m & ~(n[:-2, 1:-1] & n[2:, 1:-1] & n[1:-1, :-2] & n[1:-1, 2:]))

    got = surface_distance(pred, true, "disc")
    assert got[2] == 0 and np.isnan(got[3]) and np.isnan(surface_distance(pred, true, "cup")).all()
    for i in (0, 1):
        d = np.linalg.norm(edge(pred[i] > 0)[:, None] - edge(true[i] > 0)[None], axis=2)
        assert np.isclose(got[i], np.r_[d.min(0), d.min(1)].mean())
    with pytest.raises(ValueError, match="label"):
        surface_distance(pred, true, "vessel")


def test_empty_structures():
    """Both empty is NaN, one empty 0, equal 1; a mask of one pixel is scored like any other."""
    none, one, other = np.zeros((3, 2, 2), np.uint8)
    one[0, 0] = other[1, 1] = 2
    pred, true = np.stack([none, none, one, one, one]), np.stack([none, one, none, one, other])
    for score in (dice, iou):
        np.testing.assert_array_equal(score(pred, true, "cup"), [np.nan, 0, 0, 1, 0])
        assert np.isnan(score(pred, true, "rim")).all()
        assert score(pred[:0], true[:0], "cup").shape == (0,)


def test_masks_of_other_shapes_and_unknown_labels_are_errors():
    """A lone (H, W) mask, unequal shapes and a misspelt label raise ValueError."""
    masks = np.zeros((2, 4, 4), np.uint8)
    for args in ((masks, masks[:1], "cup"), (masks[0], masks[0], "cup"), (masks, masks, "cups")):
        with pytest.raises(ValueError):
            dice(*args)
        with pytest.raises(ValueError):
            iou(*args)


# ------------------------------------------------------------------------------------------------------------
# Fairness of group means

def test_essp_reproduces_tables_2_to_5():
    """78 of the 80 printed ES cells follow from their own row within 0.00025; the other two are FairSeg's."""
    cells = list(paper_cells())
    assert len(cells) == 80
    assert {key for key, es, overall, means in cells if abs(essp(overall, means) - es) > 0.00025} == {
        ("race", "rim", "FairSeg", "dice"), ("gender", "rim", "FairSeg", "iou")}


def test_essp_reproduces_tables_2_to_5_by_interval_arithmetic():
    """77 of the 80 printed cells can come from numbers that round to their row."""
    half, odd = 0.5e-4, set()
    for key, es, overall, means in paper_cells():
        corners = means + half * np.array(list(itertools.product((-1, 1), repeat=len(means))))
        near = np.clip(np.linspace(means.min(), means.max(), 500)[:, None], means - half, means + half)
        widest, tightest = np.std(corners, axis=1, ddof=1).max(), np.std(near, axis=1, ddof=1).min()
        if not (overall - half) / (1 + widest) - half <= es <= (overall + half) / (1 + tightest) + half:
            odd.add(key)
    assert odd == {("race", "rim", "FairSeg", "dice"), ("race", "rim", "FairSeg", "iou"),
                   ("gender", "rim", "FairSeg", "iou")}


def test_essp_and_eq1_by_hand():
    """Means 0.7, 0.8, 0.9 have sample deviation 0.1; NaN is left out; one group costs nothing; none: NaN."""
    assert essp(0.88, [0.7, 0.8, 0.9]) == pytest.approx(0.8)
    assert fairness.fairness([0.7, 0.8, 0.9]) == pytest.approx(-0.01)
    assert essp(0.88, [0.7, np.nan, 0.8, 0.9]) == pytest.approx(0.8)
    assert essp(0.88, [0.5]) == essp(0.88, [0.5, np.nan]) == 0.88
    assert math.copysign(1, fairness.fairness([0.5])) == 1 and fairness.fairness([0.5]) == 0
    assert np.isnan(essp(0.88, [])) and np.isnan(fairness.fairness([np.nan]))
    assert isinstance(essp(0.88, [0.7, 0.9]), float)
    np.testing.assert_allclose(essp([0.88, 0.5], [[0.7, 0.8, 0.9], [0.4, 0.4, 0.4]]), [0.8, 0.5])


@pytest.mark.parametrize(("overall", "means"), [(85, [0.8]), (0.8, [80, 90]), (-0.1, [0.1]), (0.5, [np.inf])])
def test_essp_refuses_scores_outside_0_to_1(overall, means):
    """Percent would silently change the meaning of Eq. 7."""
    with pytest.raises(ValueError, match="0, 1"):
        essp(overall, means)


# ------------------------------------------------------------------------------------------------------------
# Intervals and tests

def test_fair_report_by_hand():
    """Values and counts of six images, one unknown, one NaN, with an absent group, worked out by hand."""
    scores, group = [0.6, 0.8, 0.9, 0.9, 0.3, np.nan], [0, 0, 2, 2, -1, 2]
    rows = fair_report(scores, group, ("a", "b", "c"), n_boot=50, n_perm=50)
    assert [r.name for r in rows] == ["overall", "a", "c", "es", "sd", "worst", "gap", "eq1", "p"]
    assert [r.n for r in rows] == [5, 2, 2, 5, 4, 4, 4, 4, 4]
    sd = 0.2 / math.sqrt(2)                             # of 0.7 and 0.9
    expected = [0.7, 0.7, 0.9, 0.7 / (1 + sd), sd, 0.7, 0.2, -0.02]
    np.testing.assert_allclose([r.value for r in rows[:-1]], expected)
    assert np.isnan([rows[-1].lo, rows[-1].hi]).all()
    # The mean of a is 0.6, 0.7 or 0.8 by the draw, that of c always 0.9: only if the strata are kept apart.
    found = by_name(rows)
    assert (found["a"].lo, found["a"].hi) == pytest.approx((0.6, 0.8))
    assert (found["c"].lo, found["c"].hi) == pytest.approx((0.9, 0.9))
    assert (found["gap"].lo, found["gap"].hi) == pytest.approx((0.1, 0.3))


def test_p_equals_the_exact_permutation_test():
    """Of the 20 ways to label 3 + 3 images, 2 split them fully: p is 0.1, 0.02 off is 5 standard errors."""
    scores, group = [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [0, 0, 0, 1, 1, 1]
    assert fair_report(scores, group, n_boot=2, n_perm=6000)[-1].value == pytest.approx(0.1, abs=0.02)
    assert fair_report(scores, group, n_boot=2, n_perm=1)[-1].value in (0.5, 1)     # never 0


def test_noise_floor_equals_the_mean_over_all_labellings():
    """Two images in two groups: each labelling shows their difference. Unknown and NaN ones take no part."""
    sd, gap = noise_floor([0.2, 0.6, 0.9, np.nan], [0, 1, -1, 0], n_perm=10)
    assert (sd, gap) == pytest.approx((0.4 / math.sqrt(2), 0.4))
    scores = np.array([0.1, 0.2, 0.4, 0.8])
    gaps = [abs(scores[list(pair)].mean() - np.delete(scores, pair).mean())
            for pair in itertools.combinations(range(4), 2)]
    floor = noise_floor(scores, [0, 0, 1, 1], n_perm=20000)[1]
    assert floor == pytest.approx(np.mean(gaps), abs=0.005)         # 5 standard errors
    assert noise_floor([0.2, 0.6], [1, 1]) == (0, 0) and np.isnan(noise_floor([0.2], [-1])).all()


def test_intervals_bracket_the_value_and_follow_seed_and_level():
    """With a real disparity each interval holds its value; the seed repeats it; 50 % lies inside 95 %."""
    scores, group = simulate(np.random.default_rng(1), (0.6, 0.7, 0.8), (30, 60, 110))
    rows = fair_report(scores, group)
    assert all(r.lo < r.value < r.hi for r in rows[:-1])
    assert rows[:-1] == fair_report(scores, group)[:-1]
    assert rows[0].lo != fair_report(scores, group, seed=1)[0].lo
    assert noise_floor(scores, group) == noise_floor(scores, group) != noise_floor(scores, group, seed=1)
    narrow = fair_report(scores, group, ci=0.5)
    assert all(w.lo < n.lo < n.hi < w.hi for w, n in zip(rows[:-1], narrow[:-1], strict=True))


def test_bootstrap_interval_has_the_normal_width():
    """1.96 standard errors of a stratified mean each way, within 10 % (2,000 draws: 4 sigma)."""
    scores, group = simulate(np.random.default_rng(2), (0.3, 0.8), (100, 300), 0.05)
    row = fair_report(scores, group, n_perm=1)[0]
    error = math.sqrt(100 * scores[:100].var() + 300 * scores[100:].var()) / 400    # pooled: 4 times that
    assert row.hi - row.lo == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_unknown_group_counts_in_overall_only():
    """Images of group -1 move overall and es, and no other row; their stratum keeps its size."""
    scores, group = simulate(np.random.default_rng(3), (0.6, 0.8), (20, 30))
    base = by_name(fair_report(scores, group, n_boot=100))
    more = by_name(fair_report(np.append(scores, [0.1] * 50), np.append(group, [-1] * 50), n_boot=100))
    assert base.keys() == more.keys()
    assert more["overall"].value == pytest.approx((scores.sum() + 5) / 100) and more["overall"].n == 100
    assert more["es"].value == pytest.approx(more["overall"].value / (1 + base["sd"].value))
    assert more["overall"].hi < 0.45                    # 50 of the 100 are 0.1 in every resample
    for name in ("0", "1", "sd", "worst", "gap", "eq1", "p"):
        assert (more[name].n, more[name].value) == pytest.approx((base[name].n, base[name].value))


def test_nan_scores_are_skipped():
    """A report with NaN images equals the one without them, intervals included."""
    scores, group = simulate(np.random.default_rng(4), (0.6, 0.8), (20, 30))
    holes = np.insert(scores, [0, 25, 50], np.nan)
    full = fair_report(holes, np.insert(group, [0, 25, 50], [1, 0, -1]), n_boot=100)
    assert full == fair_report(scores, group, n_boot=100)


def test_one_group_no_group_no_image():
    """One group: sd 0, es = overall, p NaN. Unknown images alone: overall alone. No image: NaN and n 0."""
    one = by_name(fair_report([0.5, 0.7], [1, 1], ("a", "b"), n_boot=20))
    assert list(one) == ["overall", "b", "es", "sd", "worst", "gap", "eq1", "p"]
    assert (one["sd"].value, one["gap"].value, one["eq1"].value) == (0, 0, 0)
    assert one["es"].value == one["overall"].value == one["worst"].value and np.isnan(one["p"].value)
    unknown = by_name(fair_report([0.5, 0.7], [-1, -1], n_boot=20))
    assert unknown.pop("overall").value == 0.6 and np.isnan([r.value for r in unknown.values()]).all()
    for rows in (fair_report([], []), fair_report([np.nan], [0]), compare([], [], [])):
        assert all(np.isnan(r.value) and r.n == 0 for r in rows)


@pytest.mark.parametrize("args", [
    dict(scores=[85, 90], group=[0, 1]), dict(scores=[0.5, 0.6], group=[0]), dict(scores=[0.5], group=[-2]),
    dict(scores=[0.5], group=[2], names=("a", "b")), dict(scores=[0.5], group=[0], ci=95)])
def test_fair_report_refuses_bad_input(args):
    """Percent, unequal lengths, a code below -1, a code without a name and a level of 95 are errors."""
    with pytest.raises(ValueError):
        fair_report(**args)


@pytest.mark.parametrize("attribute", fairdiff.ATTRIBUTE_NAMES)
def test_permutation_test_rejects_at_its_nominal_rate(attribute):
    """400 sets of equal groups, as frequent as in the phantom: p <= 0.05 in 5 %, p <= 0.5 in 50 %.

    Binomial counts of 400 leave [4, 42] with 5e-6 and [155, 245] with 5e-6: a new seed fails once in 16,000.
    """
    rng = np.random.default_rng(5)
    share = np.r_[np.array(fairdiff.MARGINALS.get(attribute, (0.5, 0.5))), 1]
    p = []
    for seed in range(400):                             # quotas, in the order that an independent column has
        code = np.searchsorted(np.cumsum(share[:-1]), (rng.permutation(150) + 0.5) / 150)
        group = np.where(code == len(share) - 1, -1, code)
        if attribute == "maritalstatus":
            group = np.minimum(group, 1)
        p.append(fair_report(rng.beta(8, 2, 150), group, n_boot=2, n_perm=99, seed=seed)[-1].value)
    assert 4 <= np.sum(np.array(p) <= 0.05) <= 42 and 155 <= np.sum(np.array(p) <= 0.5) <= 245


@pytest.mark.parametrize("shift", [0, 1])
def test_phantom_differs_by_race_and_only_with_shift(shift):
    """Six sets of 60 phantom patients, read by someone who calls the brighter half of the disc its cup.

    That fails where the cup is dark: race is found in every set. All else is null, and so is race with shift 0:
    of 30 or 36 tests at 0.05 at most 10 reject (binomial: 9e-7 for more).
    """
    data = fairdiff.make_phantom(360, 32, seed=3, shift=shift)
    disc = np.where(data["mask"] > 0, data["image"], np.nan)
    read = 2 * (disc > np.nanmean(disc, (1, 2), keepdims=True)).astype(np.uint8)
    scores = dice(read, data["mask"], "cup").reshape(6, 60)
    p = {a: [fair_report(s, g, n_boot=2, n_perm=999)[-1].value
             for s, g in zip(scores, fairdiff.group_codes(data, a)[0].reshape(6, 60), strict=True)]
         for a in fairdiff.ATTRIBUTE_NAMES}
    assert not shift or max(p.pop("race")) < 0.01
    assert np.sum(np.array(list(p.values())) <= 0.05) <= 10, p


def test_permutation_p_is_small_with_a_disparity():
    """A gap of two standard deviations in 30 of 200 images is found in each of 20 sets."""
    rng = np.random.default_rng(6)
    for seed in range(20):
        scores, group = simulate(rng, (0.5, 0.7), (30, 170))
        report = by_name(fair_report(scores, group, n_boot=2, n_perm=199, seed=seed))
        assert report["p"].value == 1 / 200             # 10 standard errors: no permutation comes near
        assert report["sd"].value > 3 * noise_floor(scores, group, n_perm=199, seed=seed)[0]


def test_intervals_cover_the_truth():
    """95 % intervals of overall, of a group and of a paired difference over 400 sets with a real disparity.

    Percentile intervals of 300 draws from groups of 50 and 100 truly cover 93.1 to 94.9 % (1,500 sets), so
    binomial counts of 400 leave [348, 396] on a new seed about once in 100,000, all five together.
    """
    rng = np.random.default_rng(7)
    hits = np.zeros(5, int)
    for seed in range(400):
        a, group = simulate(rng, (0.55, 0.75), (50, 100))
        b, _ = simulate(rng, (0.60, 0.72), (50, 100), 0.05)
        shared = rng.normal(0, 0.05, 150)               # how hard the image is: what makes them a pair
        a, b = np.clip(a + shared, 0, 1), np.clip(b + shared, 0, 1)
        alone = by_name(fair_report(a, group, n_boot=300, n_perm=1, seed=seed))
        both = by_name(compare(a, b, group, n_boot=300, n_perm=1, seed=seed))
        truth = [(alone["overall"], 2.05 / 3), (alone["0"], 0.55), (both["overall"], 2.05 / 3 - 0.68),
                 (both["0"], -0.05), (both["gap"], 0.08)]
        hits += [row.lo <= value <= row.hi for row, value in truth]
    assert (348 <= hits).all() and (hits <= 396).all(), hits


def test_compare_is_antisymmetric_and_paired():
    """a - b is minus b - a, value and ends; a constant difference has no width although the scores spread."""
    scores, group = simulate(np.random.default_rng(8), (0.6, 0.7, 0.8), (20, 30, 50))
    other = np.clip(scores + np.random.default_rng(9).normal(0.02, 0.05, 100), 0, 1)
    ab, ba = (compare(*pair, group, n_boot=200) for pair in ((scores, other), (other, scores)))
    for x, y in zip(ab[:-1], ba[:-1], strict=True):
        assert (x.name, x.n) == (y.name, y.n)
        assert (x.value, x.lo, x.hi) == pytest.approx((-y.value, -y.hi, -y.lo))
    assert ab[-1].value == ba[-1].value
    a, b = by_name(fair_report(scores, group, n_boot=2)), by_name(fair_report(other, group, n_boot=2))
    assert all(x.value == pytest.approx(a[x.name].value - b[x.name].value) for x in ab[:-1])
    shift = by_name(compare(scores / 2 + 0.1, scores / 2, group, n_boot=200))
    assert (shift["overall"].lo, shift["overall"].hi) == pytest.approx((0.1, 0.1))
    assert (shift["gap"].lo, shift["gap"].hi) == pytest.approx((0, 0), abs=1e-12)


def test_sign_flips_by_hand():
    """Equal differences: 2 of 2^n sign patterns reach them. No difference: p is 1. NaN in one: skipped."""
    a, group = np.array([0.6, 0.7, 0.8, np.nan]), [0, 0, -1, 1]
    p = compare(a, [0.5, 0.6, 0.7, 0.9], group, n_boot=2, n_perm=8000)[-1]
    assert p.n == 3 and p.value == pytest.approx(0.25, abs=0.025)       # 5 standard errors
    assert compare(a, a, group, n_boot=2)[-1].value == 1
    assert [r.n for r in compare(a, a[::-1], group, n_boot=2)] == [2, 1, 2, 1, 1, 1, 1, 2]
    many = np.linspace(0.2, 0.8, 100)
    assert compare(many, many - 0.1, np.zeros(100, int), n_boot=2)[-1].value == 1 / 2001


# ------------------------------------------------------------------------------------------------------------
# Distances between sets

def exact_moments(rng, n, mean, cov):
    """Features (n, D) whose sample mean and covariance are exactly those given."""
    x = rng.normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |mx - my|^2 + sum (sx - sy)^2; a rotation changes nothing; 2 x 2 closed form."""
    rng = np.random.default_rng(10)
    mx, my, sx, sy = np.array([0, 1, 2]), np.array([1, 1, 0]), np.array([1, 2, 3]), np.array([2, 2, 1])
    x, y = exact_moments(rng, 50, mx, np.diag(sx**2)), exact_moments(rng, 40, my, np.diag(sy**2))
    assert frechet_distance(x, y) == pytest.approx(5 + 5)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(10)
    # Covariances that do not commute: tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2.
    a, b = np.array([[2, 1], [1, 3]]), np.array([[4, -1], [-1, 1]])
    x, y = exact_moments(rng, 30, [0, 0], a), exact_moments(rng, 30, [0, 0], b)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(5 + 5 - 2 * root)
    assert frechet_distance(x[:, :1], y[:, :1]) == pytest.approx((math.sqrt(2) - 2) ** 2)   # one feature


def test_frechet_distance_at_the_edges():
    """0 for a set and itself, real for singular covariances; an error for N <= D, other D, NaN."""
    x = np.random.default_rng(11).normal(size=(8, 7))
    assert 0 <= frechet_distance(x, x) < 1e-6
    flat = np.repeat(x[:, :1], 4, axis=1)               # rank 1
    assert frechet_distance(flat, flat + 1) == pytest.approx(4, abs=1e-5)
    for bad in ((x[:7], x), (x, x[:7]), (x, x[:, :6]), (x, x * np.nan), (x[:, 0], x[:, 0])):
        with pytest.raises(ValueError):
            frechet_distance(*bad)


def test_mmd_cov_by_hand():
    """Three generated, two references. Taken over the generated, both would be 2 / 3."""
    d = np.array([[1.0, 5.0],
                  [0.0, 7.0],
                  [1.0, 6.0]])
    assert mmd_cov(d) == (2.5, 0.5)                     # nearest gen: 0 and 5; all three point to reference 0
    assert mmd_cov(d.T) == pytest.approx((2 / 3, 2 / 3))
    memoriser = np.array([[0.0, 9.0, 9.0]] * 5)         # repeats reference 0
    assert mmd_cov(memoriser) == (6.0, 1 / 3)
    for bad in (np.empty((0, 3)), np.ones(3), -d, d * np.nan):
        with pytest.raises(ValueError):
            mmd_cov(bad)


def test_one_nna_equals_a_loop():
    """Each point asks its nearest other point which set it is from; two sets of unequal size."""
    rng = np.random.default_rng(12)
    points, is_gen = rng.normal(size=(25, 2)), np.arange(25) < 10
    points[is_gen] += 0.7
    d = np.linalg.norm(points[:, None] - points, axis=-1)
    right = 0
    for i in range(25):
        nearest = min((j for j in range(25) if j != i), key=lambda j: d[i, j])
        right += is_gen[nearest] == is_gen[i]
    assert one_nna(d[:10, :10], d[10:, 10:], d[:10, 10:]) == right / 25


def test_one_nna_extremes():
    """Same distribution about 0.5 (off by 0.1: 4 standard errors), far apart 1, copies 0, ties 0.5."""
    rng = np.random.default_rng(13)

    def accuracy(x, y):
        d = np.linalg.norm(np.concatenate([x, y])[:, None] - np.concatenate([x, y]), axis=-1)
        return one_nna(d[:len(x), :len(x)], d[len(x):, len(x):], d[:len(x), len(x):])

    x, y = rng.normal(size=(2, 300, 2))
    assert accuracy(x, y) == pytest.approx(0.5, abs=0.1)
    assert accuracy(x, y + 100) == 1
    assert accuracy(x, x) == 0
    assert accuracy(np.zeros((3, 2)), np.zeros((3, 2))) == 0.5
    keep = np.zeros((2, 2))
    one_nna(keep, keep, keep)
    assert (keep == 0).all()                            # the caller's diagonal stays as it was
    with pytest.raises(ValueError):
        one_nna(np.zeros((2, 2)), np.zeros((3, 3)), np.zeros((3, 2)))


# ------------------------------------------------------------------------------------------------------------
# The command

@pytest.fixture
def files(tmp_path, monkeypatch):
    """A set of 24 images (one of unknown race, none Black) and three predictions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(14)
    mask = np.zeros((24, 16, 16), np.uint8)
    mask[:, 3:13, 3:13] = 1
    mask[:, 6:10, 6:10] = 2
    truth = {"image": np.zeros_like(mask), "mask": mask, "race": np.tile(np.array([0, 2, 2], np.int8), 8),
             "name": np.array([f"p{i}" for i in range(24)])}
    truth["race"][5] = -1
    fairdiff.save_set("set.npz", truth)
    for name, flips in (("good", 0.02), ("bad", 0.2), ("mid", 0.1)):
        noise = rng.integers(0, 3, mask.shape, np.uint8)
        noisy = np.where(rng.random(mask.shape) < flips, noise, mask)
        order = rng.permutation(24)                     # rows are matched by name, not by place
        shuffled = {"image": mask * 0, "mask": noisy[order], "name": truth["name"][order]}
        fairdiff.save_set(f"{name}.npz", shuffled)
    return truth


def matched(name, truth):
    """Masks of one prediction file in the order of truth."""
    pred = fairdiff.load_set(f"{name}.npz")
    place = pred["name"].tolist()
    return pred["mask"][[place.index(n) for n in truth["name"]]]


def test_table_end_to_end(files, capsys):
    """The CSV holds every number of the library, the Markdown the paper's columns with the best in bold."""
    args = ["set.npz", "bad.npz", "a|b\n=good.npz", "--out", "deep/r.csv", "--seed", "3"]
    assert fairness.main(["table", *args]) == 0
    with open("deep/r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "attribute method seed structure metric group value lo hi n".split()
    names = ["overall", "Asian", "White", "es", "sd", "worst", "gap", "eq1", "p"]       # no Black: not a row
    assert [(r["method"], r["structure"], r["metric"], r["group"]) for r in rows] == [
        *itertools.product(("bad", "a|b?"), ("cup", "rim"), ("dice", "iou"), names)]
    assert {(r["attribute"], r["seed"]) for r in rows} == {("race", "3")}
    scores = iou(matched("good", files), files["mask"], "rim")
    expected = fair_report(scores, files["race"], fairdiff.ATTRIBUTES["race"], seed=3)
    for got, want in zip(rows[-9:], expected, strict=True):
        assert (got["group"], int(got["n"])) == (want.name, want.n)
        np.testing.assert_allclose([float(got[k]) for k in ("value", "lo", "hi")], want[2:], atol=1e-6)

    text, printed = open("deep/tables.md", encoding="utf-8").read(), capsys.readouterr().out
    lines = text.splitlines()
    assert lines[2].strip("| ").split(" | ") == ["method", "ES-Dice", "Dice [95 %]", "ES-IoU", "IoU",
                                                 "Asian Dice", "White Dice", "Asian IoU", "White IoU"]
    assert lines[4].startswith("| bad | 0.") and lines[5].startswith("| a\\|b? | **0.")
    assert lines[4].count("**") == 0 and lines[5].count("**") == 2 * 8
    assert [line for line in lines if line.startswith("##")] == [
        "## cup, by race", "## Dice of cup, by race", "## rim, by race", "## Dice of rim, by race",
        "## mean Dice of rim and cup, by race"]
    assert "Asian 8, Black 0, White 15, unknown 1" in text and "Phantom" not in text
    for structure in ("cup", "rim"):
        assert f"{structure}, by race" in printed
    for row in rows:                                    # every value of the paper's columns is printed
        if row["group"] in ("overall", "es", "Asian", "White"):
            assert f"{float(row['value']):.4f}" in printed


def test_the_best_of_a_column():
    """High or low is best as told, printed ties all are, NaN never is, nor is a lone method."""
    rows = [fairness.Row("gap", 9, value, 0.0, 1.0) for value in (0.3, 0.1, 0.10001, math.nan, 0.2)]
    assert fairness.column("gap", rows, 1)[2] == [True, False, False, False, False]
    assert fairness.column("gap", rows, -1)[2] == [False, True, True, False, False]
    assert not any(fairness.column("p", rows)[2] + fairness.column("gap", rows[:1], 1)[2])
    assert fairness.column("gap", rows[2:4], interval=True)[1] == ["0.1000 [0.0000, 1.0000]", "-"]


def test_table_of_spread(files, capsys):
    """The last table: Dice, worst group, gap and SD with their floors, Eq. 1, p, difference to the first."""
    assert fairness.main(["table", "set.npz", "good.npz", "mid.npz", "--attribute", "race"]) == 0
    lines = open("tables.md", encoding="utf-8").read().split("## mean Dice")[1].splitlines()
    good, mid = ([c.strip("* ") for c in line.split("|")[1:-1]] for line in lines[4:6])
    first, second = (sum(dice(matched(name, files), files["mask"], label) for label in ("cup", "rim")) / 2
                     for name in ("good", "mid"))
    r, d = by_name(fair_report(second, files["race"])), by_name(compare(second, first, files["race"]))
    sd, gap = noise_floor(second, files["race"])

    def with_interval(row):
        return f"{row.value:.4f} [{row.lo:.4f}, {row.hi:.4f}]"

    assert good[0] == "good" and good[-2:] == ["-", "-"]
    assert mid == ["mid", with_interval(r["overall"]), f"{r['worst'].value:.4f}",
                   f"{r['gap'].value:.4f} ({gap:.4f})", f"{r['sd'].value:.4f} ({sd:.4f})",
                   f"{1000 * r['eq1'].value:.4f}", f"{r['p'].value:.4f}", with_interval(d["overall"]), with_interval(d["worst"])]
    # Of gaps the small one is in bold.
    smaller = by_name(fair_report(first, files["race"]))["gap"].value < r["gap"].value
    assert ["**" in line.split(" | ")[3] for line in lines[4:6]] == [smaller, not smaller]


def test_trainings_of_a_method(files, capsys):
    """Three trainings: rows of each seed and of the mean over them; their spread stands in columns of its own."""
    runs = {0: "good", 1: "mid", 4: "bad"}
    assert fairness.main(["table", "set.npz", "one=mid.npz", *(f"some:{s}={n}.npz" for s, n in runs.items())]) == 0
    rows = list(csv.DictReader(open("results.csv", newline="", encoding="utf-8")))
    assert list(dict.fromkeys((r["method"], r["seed"]) for r in rows)) == [
        ("one", "0"), ("some", "0"), ("some", "1"), ("some", "4"), ("some", "mean")]
    scores = np.array([dice(matched(n, files), files["mask"], "cup") for n in runs.values()])
    found = {(r["method"], r["seed"], r["group"]): float(r["value"]) for r in rows
             if (r["structure"], r["metric"]) == ("cup", "dice")}
    want = by_name(fair_report(scores.mean(0), files["race"], fairdiff.ATTRIBUTES["race"]))
    assert all(found["some", "mean", name] == pytest.approx(row.value, abs=1e-6) for name, row in want.items())
    cells = next(line for line in capsys.readouterr().out.split("Dice of cup")[1].splitlines()
                 if line.startswith("some")).split()
    worst = [fair_report(s, files["race"])[-4].value for s in scores]
    assert [float(c) for c in cells[-2:]] == pytest.approx([np.std(scores.mean(1), ddof=1), np.std(worst, ddof=1)],
                                                           abs=6e-5)


@pytest.mark.parametrize(("args", "message"), [
    (["none.npz"], "none.npz"),
    (["good.npz", "good.npz"], "taken"),
    (["good.npz", "=bad.npz"], "empty"),
    (["few.npz"], "p3"),
    (["more.npz"], "new"),
    (["small.npz"], "(24, 8, 8)"),
    (["good.npz", "--attribute", "gender"], "gender"),
    (["good.npz", "--attribute", "zodiac"], "zodiac"),
    (["good.npz", "--seed", "-1"], "--seed"),
    (["good.npz", "--out", "out.md"], ".md"),
    (["plain:1=good.npz", "plain:1=bad.npz"], "taken"),
])
def test_table_refuses_bad_input(files, capsys, args, message):
    """Exit code 2 and one line on stderr that names what is wrong; nothing is written."""
    image, mask, name = files["image"], files["mask"], files["name"]
    sets = {"few": (np.delete(image, 3, 0), np.delete(mask, 3, 0), np.delete(name, 3)),
            "more": (np.append(image, image[:1], 0), np.append(mask, mask[:1], 0), np.append(name, "new")),
            "small": (image[:, ::2, ::2], mask[:, ::2, ::2], name)}
    for stem, arrays in sets.items():
        fairdiff.save_set(f"{stem}.npz", dict(zip(("image", "mask", "name"), arrays, strict=True)))
    assert fairness.main(["table", "set.npz", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not [p.name for p in pathlib.Path().iterdir() if p.suffix in (".csv", ".md")]


def test_table_of_the_phantom_says_so(files):
    """Numbers made on drawn images carry their warning; one method is not in bold; a set scores itself 1."""
    fairdiff.save_set("phantom.npz", files | {"name": np.array([f"phantom-0-{i}" for i in range(24)])})
    assert fairness.main(["table", "phantom.npz", "phantom.npz"]) == 0
    text = open("tables.md", encoding="utf-8").read()
    assert "no medical evidence" in text and "**" not in text and "| phantom | 1.0000 |" in text
