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
PAPER = """
race cup 8372 8481 7409 7532 8270 8489 8503 7277 7576 7551 8325 8410 7345 7432 8246 8417 8426 7260 7482 7440 8313 8442
7359 7479 8197 8469 8464 7232 7529 7495 8350 8464 7374 7497 8248 8484 8484 7247 7550 7513 8397 8480 7441 7529 8320
8483 8497 7352 7572 7540;
race rim 7604 7927 6393 6706 7457 7307 8106 6160 5991 6913 7579 7906 6371 6682 7413 7286 8087 6116 5982 6888 7564 7896
6351 6674 7470 7229 8080 6183 5899 6887 7628 7950 6410 6725 7479 7325 8130 6185 6020 6935 7697 7999 6494 6797 7565
7427 8165 6279 6114 6994;
gender cup 8448 8481 7502 7532 8458 8513 7508 7564 8343 8345 7351 7356 8344 8348 7361 7350 8426 8478 7473 7522 8441
8528 7483 7575 8477 8489 7502 7530 8494 8514 7505 7556 8461 8505 7522 7564 8474 8548 7531 7610;
gender rim 7895 7927 6673 6706 7951 7894 6736 6665 7783 7852 6553 6630 7905 7779 6699 6534 7901 7917 6681 6699 7930
7900 6716 6677 7893 7898 6698 6698 7924 7932 6678 6653 7945 7981 6745 6780 8007 7944 6811 6737;
language cup 8255 8481 7273 7532 8469 8972 8531 7516 8166 7592 8071 8312 7056 7323 8296 8833 8338 7301 7990 7376 8231
8416 7231 7442 8398 8844 8571 7421 7993 7605 8277 8481 7289 7523 8467 8934 8562 7504 8109 7619 8358 8497 7353 7542
8479 8809 8686 7519 8033 7755;
language rim 7721 7927 6525 6706 7940 8165 7633 6721 6950 6398 7690 7884 6501 6666 7903 7964 7501 6687 6717 6265 7691
7857 6468 6613 7867 8057 7628 6625 6800 6355 7725 7898 6524 6668 7909 8106 7661 6680 6865 6424 7783 7959 6578 6743
7970 8161 7711 6755 6969 6469;
ethnicity cup 8339 8481 7366 7532 8463 8704 7508 7826 8171 8320 7149 7315 8304 8561 7294 7622 8376 8482 7406 7526 8468
8648 7507 7735 8388 8483 7412 7542 8501 8661 7515 7764 8439 8462 7402 7500 8485 8448 7664 7477;
ethnicity rim 7848 7927 6650 6706 7914 8057 6695 6815 7793 7841 6570 6602 7829 7915 6590 6658 7924 7943 6694 6733 7936
7901 6728 6646 7884 7939 6710 6754 7943 8040 6697 6789 7886 7902 6666 6670 7917 7888 6649 6657
"""

def simulate(rng, means, sizes, sd=0.1):
    """Normal scores (N,) and group codes (N,), from the mean, size and SD of every group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(np.array(means)[group], np.broadcast_to(sd, len(sizes))[group]), group

@pytest.mark.parametrize("label", [0, 1, 2])
def test_dice_and_iou_equal_a_pixel_loop(label):
    """Counts made one pixel at a time give the same scores; neither mask has the label: 1, one of them: 0."""
    pred, true = np.random.default_rng(0).integers(0, 3, (2, 6, 5, 7)).astype(np.uint8)
    pred[3:5], true[4:] = (label + 1) % 3, (label + 1) % 3
    for i in range(6):
        pixels = [(a == label, b == label) for a, b in zip(pred[i].flat, true[i].flat, strict=True)]
        both, either = sum(a and b for a, b in pixels), sum(a or b for a, b in pixels)
        want = (2 * both / (both + either), both / either) if either else (1, 1)
        assert (dice(pred, true, label)[i], iou(pred, true, label)[i]) == pytest.approx(want)

def test_essp_reproduces_the_papers_tables():
    """78 of the 80 printed ES cells follow from their own row within 0.00025; two of FairSeg's do not."""
    odd = []
    for attribute, structure, *numbers in map(str.split, PAPER.split(";")):
        for method, row in enumerate(np.array(numbers, float).reshape(5, -1) / 10000):
            dices, ious = np.split(row[4:], 2)
            for metric, es, overall, means in (("dice", *row[:2], dices), ("iou", *row[2:4], ious)):
                if abs(essp(overall, means) - es) > 0.00025:
                    odd.append((attribute, structure, method, metric))
    assert odd == [("race", "rim", 3, "dice"), ("gender", "rim", 3, "iou")]

def test_eq_1_and_eq_7_by_hand():
    """Means 0.7, 0.8, 0.9 have variance 0.01 and SD 0.1; one group costs nothing; percent is refused."""
    assert fairness.fairness([0.7, 0.8, 0.9]) == pytest.approx(-0.01)
    assert essp(0.88, [0.7, 0.8, 0.9]) == pytest.approx(0.8)
    assert essp(0.88, [0.5]) == 0.88 and fairness.fairness([0.5]) == 0
    with pytest.raises(ValueError, match="percent"):
        essp(85, [80, 90])

def test_fair_report_by_hand():
    """Five images, one unknown, no group b: names, counts and values worked out by hand."""
    scores, group = np.array([0.6, 0.8, 0.9, 0.9, 0.3]), np.array([0, 0, 2, 2, -1])
    rows = fair_report(scores, group, ("a", "b", "c"), n_boot=200)
    assert [row.name for row in rows] == ["overall", "a", "c", "es", "sd", "worst", "gap", "eq1", "p"]
    assert [row.n for row in rows] == [5, 2, 2, 5, 4, 4, 4, 4, 5]
    sd = 0.2 / np.sqrt(2)                                               # of 0.7 and 0.9
    np.testing.assert_allclose([r.value for r in rows[:-1]], [0.7, 0.7, 0.9, 0.7 / (1 + sd), sd, 0.7, 0.2, -0.02])
    # Resampled within groups the mean of a is 0.6, 0.7 or 0.8, and that of c always 0.9.
    np.testing.assert_allclose([rows[1][3:], rows[2][3:], rows[6][3:]], [(0.6, 0.8), (0.9, 0.9), (0.1, 0.3)])

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
    """SD and gap of 2,000 simulated sets with equal means, within 7 %, from 20 sets whose means differ."""
    rng = np.random.default_rng(3)
    sets = [simulate(rng, (0.5,) * 3, (20, 60, 120), (0.2, 0.1, 0.1)) for _ in range(2000)]
    means = np.array([[scores[group == g].mean() for g in range(3)] for scores, group in sets])
    shown = np.std(means, axis=1, ddof=1).mean(), np.ptp(means, axis=1).mean()
    estimated = [chance_level(scores + 0.1 * group, group, n_boot=500) for scores, group in sets[:20]]
    np.testing.assert_allclose(np.mean(estimated, 0), shown, rtol=0.07)

def test_frechet_distance_of_known_gaussians():
    """Diagonal: |mx - my|^2 + sum (sx - sy)^2. Others: with scipy's matrix root. Too few items: NaN."""
    cross = np.concatenate([np.eye(3), -np.eye(3)])                     # covariance 0.4 on the diagonal
    x, y = cross * (1, 2, 3), cross * (2, 2, 1) + (1, 0, 2)
    assert frechet_distance(x, y) == pytest.approx(5 + 0.4 * 5)
    x, y = np.random.default_rng(4).normal(size=(2, 8, 3)) @ [[1, 2, 0], [0, 1, 1], [0, 0, 1]] * (1, 2, 3)
    a, b = np.cov(x.T), np.cov(y.T)
    trace = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + trace)
    assert np.isnan(frechet_distance(x[:3], y)) and np.isnan(frechet_distance(x, y[:3]))

def test_mmd_coverage_and_one_nna_by_hand():
    """Two real items lie 0 and 5 from the nearest generated one, one is never nearest; 1-NNA equals a loop."""
    assert mmd_cov(np.array([[1.0, 5.0], [0.0, 7.0], [1.0, 6.0]])) == (2.5, 0.5)
    assert mmd_cov(np.array([[0.0, 9.0, 9.0]] * 5)) == (6, 1 / 3)       # one real item, again and again
    points = np.random.default_rng(5).normal(size=(20, 2)) + 0.7 * (np.arange(20) < 10)[:, None]
    d = cdist(points, points) + np.diag(np.full(20, np.inf))
    right = np.mean([(i < 10) == (d[i].argmin() < 10) for i in range(20)])
    np.fill_diagonal(d, 0)
    assert 0.5 < one_nna(d[:10, :10], d[10:, 10:], d[:10, 10:]) == right
    assert one_nna(d, d, d) == 0 and one_nna(*np.zeros((3, 4, 4))) == 0.5       # copies, ties

def test_set_distance_knows_a_memoriser():
    """Copies of training items are all memorised; fresh items nearly never, and nothing tells them from real."""
    train, test, fresh = np.random.default_rng(6).normal(size=(3, 200, 4))
    copied, good = (fairness.set_distance(x, test, train) for x in (train, fresh))
    assert list(good) == ["n", "frechet", "mmd", "cov", "1-nna", "memorised"] and good["n"] == 200
    assert copied["memorised"] == 1 and good["memorised"] < 0.05
    assert good["frechet"] < 0.3 and 0.4 < good["1-nna"] < 0.6          # 3 standard errors

@pytest.fixture
def files(tmp_path, monkeypatch, phantom):
    """In the current folder: set.npz, one patient of unknown race, and its predictions good and bad."""
    monkeypatch.chdir(tmp_path)
    truth = phantom | {"race": np.where(np.arange(60) == 5, "", phantom["race"])}
    fairdiff.save_set("set.npz", truth)
    for name, dx in (("good", 1), ("bad", 4)):
        fairdiff.save_set(f"{name}.npz", truth | {"mask": np.roll(truth["mask"], dx, 2)})
    return truth

def run_table(*args):
    """Run the command; its CSV as {(method, seed, structure, metric, group): (n, value, lo, hi)}."""
    assert run(fairness, ["table", "set.npz", *args, "--out", "deep/results.csv"]) == 0
    table = csv.DictReader(pathlib.Path("deep/results.csv").read_text().splitlines())
    return {tuple(row[key] for key in ("method", "seed", "structure", "metric", "group")):
            [float(row[key]) for key in ("n", "value", "lo", "hi")] for row in table}

@pytest.mark.parametrize("metric", [dice, iou])
def test_table_holds_what_fair_report_says(files, capsys, metric):
    """Every number of the CSV is the library's, of each training and of the images' mean over the trainings."""
    found = run_table("one=good.npz", "two:1=good.npz", "two:2=bad.npz")
    printed, (group, names) = capsys.readouterr().out, fairdiff.group_codes(files, "race")
    good, bad = (np.stack([metric(np.roll(files["mask"], dx, 2), files["mask"], k) for k in (2, 1)]) for dx in (1, 4))
    trainings = {("one", "0"): good, ("two", "1"): good, ("two", "2"): bad, ("two", "mean"): (good + bad) / 2}
    for key, own in trainings.items():
        for structure, scores in zip(("cup", "rim", "mean"), (*own, own.mean(0)), strict=True):
            want = fair_report(scores, group, names)
            for row in want:
                np.testing.assert_allclose(found[(*key, structure, metric.__name__, row.name)], row[1:])
            if structure != "mean" and key[1] in ("0", "mean"):         # Tables 2-5
                assert all(f"{row.value:.4f}" in printed for row in want[:5])
    assert len(found) == 4 * 3 * 2 * len(want) and "no medical evidence" in printed

def test_table_of_a_single_structure_and_of_other_images(files, capsys):
    """Masks without label 2 have one structure; other images are exit code 2 and one line that names the file."""
    fairdiff.save_set("set.npz", files | {"mask": np.minimum(files["mask"], 1)})
    assert {key[2] for key in run_table("a=set.npz")} == {"structure", "mean"}
    assert "structure, by race" in capsys.readouterr().out
    for data in (fairdiff.subset(files, np.arange(59)), files | {"name": files["name"][::-1]}):
        fairdiff.save_set("other.npz", data)
        assert run(fairness, ["table", "set.npz", "a=other.npz"]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert "other.npz" in line
