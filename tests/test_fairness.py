"""fairness.py, against loops, the paper's tables and simulations; odds are those of a new seed to fail for nothing."""
import csv
import pathlib

import numpy as np
import pytest
import scipy.linalg
from conftest import run
from scipy.spatial.distance import cdist

import fairdiff
import fairness
from fairness import chance_level, compare, dice, essp, fair_report, frechet_distance, iou, mmd_cov, one_nna

# Tables 2-5 of the paper, times 10,000. Of five methods: ES-Dice, Dice, ES-IoU, IoU, each group's Dice, then IoU.
PAPER = pathlib.Path(__file__).with_name("paper_tables.txt").read_text().splitlines()

def simulate(rng, means, sizes, sd=0.1):
    """Normal scores (N,) and group codes (N,), from the mean, size and SD of every group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(np.array(means)[group], np.broadcast_to(sd, len(sizes))[group]), group

@pytest.mark.parametrize("label", [0, 1, 2])
def test_dice_and_iou_equal_counted_pixels(label):
    """Both are as counted with Python's sets of pixels; neither mask has the label: 1, one of them: 0."""
    pred, true = np.random.default_rng(0).integers(0, 3, (2, 6, 5, 7)).astype(np.uint8)
    pred[3:5], true[4:] = (label + 1) % 3, (label + 1) % 3
    for i in range(6):
        p, t = (set(np.flatnonzero(mask[i] == label)) for mask in (pred, true))
        want = (2 * len(p & t) / (len(p) + len(t)), len(p & t) / len(p | t)) if p | t else (1, 1)
        assert (dice(pred, true, label)[i], iou(pred, true, label)[i]) == pytest.approx(want)

def test_essp_reproduces_the_papers_tables():
    """78 of the 80 printed ES cells follow from their own row within 0.00025; two of FairSeg's do not."""
    odd = []
    for attribute, structure, *numbers in map(str.split, PAPER):
        table = np.array(numbers, float).reshape(5, -1) / 10000
        dices, ious = np.split(table[:, 4:], 2, axis=1)
        error = {"dice": essp(table[:, 1], dices) - table[:, 0], "iou": essp(table[:, 3], ious) - table[:, 2]}
        for metric in error:
            odd += [(attribute, structure, metric, i) for i in range(5) if abs(error[metric][i]) > 0.00025]
    assert odd == [("race", "rim", "dice", 3), ("gender", "rim", "iou", 3)]

def test_fair_report_by_hand():
    """Five images, one unknown, no group b: all numbers by hand. A single group costs nothing; percent is refused."""
    scores, group = np.array([0.6, 0.8, 0.9, 0.9, 0.3]), np.array([0, 0, 2, 2, -1])
    rows = fair_report(scores, group, ("a", "b", "c"), n_boot=200)
    assert [row.name for row in rows] == ["overall", "a", "c", "es", "sd", "worst", "gap", "eq1", "p"]
    assert [row.n for row in rows] == [5, 2, 2, 5, 4, 4, 4, 4, 4]
    sd = 0.2 / np.sqrt(2)                                               # of 0.7 and 0.9
    np.testing.assert_allclose([r.value for r in rows[:-1]], [0.7, 0.7, 0.9, 0.7 / (1 + sd), sd, 0.7, 0.2, -0.02])
    # Resampled within groups the mean of a is 0.6, 0.7 or 0.8, and that of c always 0.9.
    np.testing.assert_allclose([rows[1][3:], rows[2][3:], rows[6][3:]], [(0.6, 0.8), (0.9, 0.9), (0.1, 0.3)])
    assert rows[-1].value == fair_report(scores[:4], group[:4], n_boot=200)[-1].value   # p is of known groups
    assert essp(0.88, [0.5]) == 0.88 and fairness.fairness([0.5]) == 0
    with pytest.raises(AssertionError, match="percent"):
        essp(85, [80, 90])

def test_intervals_cover_the_truth():
    """95 % intervals of overall, groups and a paired difference; they cover 92 to 95 %, odds 1 in 1,000."""
    rng, hits = np.random.default_rng(0), np.zeros(4, int)
    for seed in range(200):
        scores, group = simulate(rng, (0.5, 0.7), (50, 100))
        other = scores - rng.normal(0.02, 0.05, 150)
        rows = fair_report(scores, group, n_boot=200, seed=seed)[:3]
        rows.append(compare(scores, other, group, n_boot=200, seed=seed)[0])
        hits += [row.lo <= truth <= row.hi for row, truth in zip(rows, (1.9 / 3, 0.5, 0.7, 0.02), strict=True)]
    assert (hits >= 171).all() and (hits <= 199).all(), hits

def test_p_has_its_size_and_power_where_a_rare_group_spreads_more():
    """20 of 200 spread three times as much: 5 % false alarms, not 35; a gap of one SD is found. Odds 1 in 3,000."""
    rng, p = np.random.default_rng(1), []
    for seed in range(320):
        scores, group = simulate(rng, (0.5 if seed < 300 else 0.65, 0.5), (20, 180), (0.15, 0.05))
        p.append(fair_report(scores, group, n_boot=199, seed=seed)[-1].value)
    alarms = np.array(p) <= 0.05
    assert 4 <= alarms[:300].sum() <= 30 and alarms[300:].sum() > 16

def test_compare_is_paired():
    """Methods that agree image by image have a narrow interval, though their scores spread; equal ones have 0."""
    rng = np.random.default_rng(2)
    a, group = simulate(rng, (0.6, 0.8), (40, 60))
    b = a - 0.03 + rng.normal(0, 0.01, 100)
    rows, unpaired = compare(a, b, group), compare(a, rng.permutation(b), group)
    assert rows[0].hi - rows[0].lo < 0.3 * (unpaired[0].hi - unpaired[0].lo) and rows[-1].value < 0.001
    for row, x, y in zip(rows[:-1], fair_report(a, group), fair_report(b, group), strict=False):
        assert row.value == pytest.approx(x.value - y.value)
    same = compare(a, a, group)
    assert all(row[2:] == (0, 0, 0) for row in same[:-1]) and same[-1].value == 1

def test_chance_level_is_what_equal_groups_show():
    """The means of two groups differ by a normal number around 0: its mean size, and the SD of two numbers by hand."""
    scores, group = simulate(np.random.default_rng(3), (0.5, 0.9), (100, 400), (0.2, 0.1))
    variance = sum(scores[group == g].var() / n for g, n in ((0, 100), (1, 400)))
    gap = np.sqrt(2 / np.pi * variance)
    assert chance_level(scores, group, n_boot=20000) == pytest.approx((gap / np.sqrt(2), gap), rel=0.02)

def test_frechet_distance_of_gaussians():
    """|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2) with scipy's matrix root; NaN of too few items."""
    x, y = np.random.default_rng(4).normal(size=(2, 8, 3)) @ [[1, 2, 0], [0, 1, 1], [0, 0, 1]] * (1, 2, 3)
    a, b = np.cov(x.T), np.cov(y.T)
    trace = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + trace)
    assert np.isnan(frechet_distance(x[:3], y)) and np.isnan(frechet_distance(x, y[:3]))

def test_mmd_coverage_and_one_nna_by_hand():
    """Two real items lie 0 and 5 from the nearest generated one, one is never nearest; 1-NNA equals a loop."""
    assert mmd_cov(np.array([[1.0, 5.0], [0.0, 7.0], [1.0, 6.0]])) == (2.5, 0.5)
    points = np.random.default_rng(5).normal(size=(20, 2)) + 0.7 * (np.arange(20) < 10)[:, None]
    d = cdist(points, points)
    np.fill_diagonal(d, 9)                                              # nobody is their own neighbour
    right = np.mean([(i < 10) == (d[i].argmin() < 10) for i in range(20)])
    assert 0.5 < one_nna(d[:10, :10], d[10:, 10:], d[:10, 10:]) == right
    assert one_nna(*[1 - np.eye(4)] * 3) == 0 and one_nna(*np.zeros((3, 4, 4))) == 0.5      # copies, ties

def test_set_distance_knows_a_memoriser():
    """Copies of training items are all memorised; fresh items nearly never, and nothing tells them from real."""
    train, test, fresh = np.random.default_rng(6).normal(size=(3, 200, 4))
    copied, good = (fairness.set_distance(x, test, train) for x in (train, fresh))
    assert list(good) == ["n", "frechet", "mmd", "cov", "1-nna", "memorised"] and good["n"] == 200
    assert copied["memorised"] == 1 and good["memorised"] < 0.05
    assert good["frechet"] < 0.3 and 0.4 < good["1-nna"] < 0.6          # 3 standard errors

@pytest.mark.parametrize("metric", [dice, iou])
@pytest.mark.parametrize("structure, labels", [("cup", [2]), ("rim", [1]), ("mean", [2, 1])])
def test_table_holds_what_fair_report_says(here, phantom, capsys, metric, structure, labels):
    """Every number of the CSV is the library's, of each training and of the images' mean over the trainings."""
    truth = phantom | {"race": np.where(np.arange(60) == 5, "", phantom["race"])}
    fairdiff.save_set("set.npz", truth)
    group, names = fairdiff.group_codes(truth, "race")
    scores = {}
    for name, dx in (("good", 1), ("b=d", 4)):
        mask = np.roll(truth["mask"], dx, 2)
        fairdiff.save_set(f"{name}.npz", truth | {"mask": mask})
        scores[name] = np.mean([metric(mask, truth["mask"], label) for label in labels], 0)
    argv = ["set.npz", "one=good.npz", "two:1=good.npz", "two:2=b=d.npz", "--out", "deep/results.csv"]
    assert run(fairness, "table", *argv) == 0
    printed = capsys.readouterr().out
    lines = list(csv.reader(pathlib.Path("deep/results.csv").read_text().splitlines()))
    assert lines[0] == "attribute method seed structure metric group n value lo hi".split()
    found = {tuple(line[1:6]): list(map(float, line[6:])) for line in lines[1:]}
    trainings = {"one 0": scores["good"], "two 1": scores["good"], "two 2": scores["b=d"]}
    for key, own in (trainings | {"two mean": (scores["good"] + scores["b=d"]) / 2}).items():
        want = fair_report(own, group, names)
        for row in want:
            np.testing.assert_allclose(found[(*key.split(), structure, metric.__name__, row.name)], row[1:])
        if structure != "mean" and key in ("one 0", "two mean"):        # Tables 2-5
            assert all(f"{row.value:.4f}" in printed for row in want[:5])
    assert len(found) == 4 * 3 * 2 * len(want) and "no medical evidence" in printed

def test_the_table_says_what_equal_scale_gains(here, phantom, capsys):
    """Of predictions 0, 2 and 4 pixels off: how far the middle one goes; that nothing is gained where it is as bad."""
    for dx in (0, 2, 4):
        fairdiff.save_set(f"{dx}.npz", phantom | {"mask": np.roll(phantom["mask"], dx, 2)})
    for equal in (2, 4):
        assert run(fairness, "table", "set.npz", "plain=4.npz", "twice=2.npz", f"equal={equal}.npz", "oracle=0.npz") == 0
    printed = capsys.readouterr().out
    plain, middle = (float(printed.split(f"| {name} ")[-1].split("|")[2]) for name in ("plain", "twice"))
    assert f"closes {(middle - plain) / (1 - plain):.0%} of the distance" in printed
    assert "no gain" in printed[printed.rindex("Twice the steps"):] and f"Dice by {0:+.4f}" not in printed

def test_predictions_of_other_images_are_refused(here, phantom, refused):
    """Exit code 2 and one line that names the file."""
    for data in (fairdiff.subset(phantom, slice(59)), phantom | {"name": phantom["name"][::-1]}):
        fairdiff.save_set("other.npz", data)
        refused(fairness, "table", "set.npz", "a=other.npz", words="other.npz")
