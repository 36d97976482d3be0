"""The study's arithmetic on scores that anyone can check; its cells are runs of train.sh, which test_pipeline has."""
import csv
import xml.etree.ElementTree

import levers
import numpy as np
import pytest
import study

import fairdiff


@pytest.fixture
def lines(tmp_path, phantom):
    """Lines of the CSV where plain misses the rare group, oracle misses nothing, the others a part of it."""
    rng, paths = np.random.default_rng(0), {}
    for row, keep in (("plain", 0.2), ("oversample", 0.4), ("equal", 0.6), ("oracle", 1.0),
                      ("drawn masks, painted, share 1", 0.5)):
        mask = phantom["mask"].copy()
        for i in np.flatnonzero(phantom["race"] == 0):
            mask[i] *= rng.random(mask[i].shape) < keep
        paths[row] = [tmp_path / f"{row}.npz"]
        fairdiff.save_set(paths[row][0], phantom | {"mask": mask})
    return [dict(zip(study.COLUMNS, [seed, 10, *row, "0"], strict=True))
            for seed in (0, 1) for row in study.measure(phantom, paths)]


def test_measure_by_hand(lines):
    """A pixel kept with odds p scores about 2p / (1 + p): 1/3, 4/7, 3/4, 1. Shares follow from these."""
    worst = {x["row"]: x for x in lines if x["figure"] == "worst group" and x["seed"] == 0}
    for row, expected in (("plain", 1 / 3), ("oversample", 4 / 7), ("equal", 3 / 4), ("oracle", 1)):
        assert float(worst[row]["value"]) == pytest.approx(expected, abs=0.03)
        share = (float(worst[row]["value"]) - float(worst["plain"]["value"])) / (1 - float(worst["plain"]["value"]))
        assert float(worst[row]["share"]) == pytest.approx(share, abs=1e-4)
        assert float(worst[row]["share_lo"]) <= share + 1e-4 and share - 1e-4 <= float(worst[row]["share_hi"])
    more = float(worst["equal"]["value"]) - float(worst["oversample"]["value"])
    assert float(worst["equal"]["more"]) == pytest.approx(more, abs=1e-4)
    assert float(worst["equal"]["more_lo"]) > 0


def test_pooled_interval(lines):
    """Two independent sets of equal width: the mean's interval is narrower by the root of two."""
    (one,) = (x for x in lines if (x["row"], x["figure"], x["seed"]) == ("equal", "ES-Dice", 1))
    value, half, across, each = study.pooled(lines, "equal", 10, "ES-Dice", "share")
    assert value == pytest.approx(float(one["share"]), abs=1e-4) and len(each) == 2      # both seeds are the same
    assert across == pytest.approx(0, abs=1e-9)
    assert half == pytest.approx((float(one["share_hi"]) - float(one["share_lo"])) / 2 / np.sqrt(2))


def test_share_is_of_the_mean_distance(lines):
    """Gains 0.1 of 0.1 and 0.1 of 0.3 are 0.2 of 0.4: half, where the mean of the shares would be two thirds."""
    lines = [x | {"gain": {"oracle": (0.1, 0.3), "equal": (0.1, 0.1)}[x["row"]][x["seed"]],
                  "share": {"oracle": (1, 1), "equal": (1, 1 / 3)}[x["row"]][x["seed"]]}
             for x in lines if x["row"] in ("oracle", "equal")]
    value, _, across, each = study.pooled(lines, "equal", 10, "ES-Dice", "share")
    # Residuals 0.1 - 0.05 and 0.1 - 0.15, over the mean distance 0.2: +- 0.25; t with 1 degree of freedom is 12.706.
    assert value == pytest.approx(0.5) and across == pytest.approx(12.706 * 0.25 * 2 ** 0.5 / 2 ** 0.5, rel=1e-3)
    assert each.tolist() == pytest.approx([1, 1 / 3])


def test_trainings_by_hand(phantom, tmp_path):
    """Two trainings, one perfect, one a third wrong: the value is their mean, the deviation theirs, not the images'."""
    half = phantom["mask"].copy()
    half[phantom["race"] == 0] = 0                          # the rare group scores 0
    paths = {name: tmp_path / f"{name}.npz" for name in ("bad", "good")}
    fairdiff.save_set(paths["bad"], phantom | {"mask": half})
    fairdiff.save_set(paths["good"], phantom)
    bad, good = paths["bad"], paths["good"]
    rows = study.measure(phantom, {"plain": [bad, bad], "oversample": [bad, bad], "oracle": [good, good],
                                   "equal": [bad, good], "one": [good]})
    lines = [dict(zip(study.COLUMNS, [seed, 10, *row, "0"], strict=True)) for seed in (0, 1) for row in rows]
    equal, one = (next(x for x in lines if (x["row"], x["figure"]) == (row, "worst group")) for row in ("equal", "one"))
    assert [float(equal[k]) for k in ("value", "gain", "share", "more")] == pytest.approx([0.5] * 4)
    assert [float(equal[f"{k}_sd"]) for k in ("value", "gain", "share")] == pytest.approx([0.5 ** 0.5] * 3, abs=1e-4)
    assert (equal["trainings"], one["trainings"], one["value_sd"]) == (2, 1, "")
    assert float(one["share"]) == 1
    value, interval, *_ = study.pooled(lines, "equal", 10, "worst group", "share")
    # Four trainings of two seeds: 2 degrees of freedom, t = 4.303; standard error 0.7071 / 2. Over images: none.
    assert value == pytest.approx(0.5) and interval == pytest.approx(4.303 * 0.7071 / 2, abs=1e-3)
    assert study.pooled(lines, "one", 10, "worst group", "share")[1] == 0


def test_tables_and_chart_read_the_file_back(lines, tmp_path, capsys):
    """The table names every row with its share, the chart is XML with a mark for every share and seed."""
    with open(tmp_path / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, study.COLUMNS)
        writer.writeheader()
        writer.writerows(lines + [x | {"rare": 30} for x in lines])
    read = list(csv.DictReader(open(tmp_path / "study.csv")))
    study.tables(read)
    study.chart(read, tmp_path / "chart.svg")
    printed = capsys.readouterr().out
    assert printed.count("| equal (1) |") == 4 and "worst group, 30 images" in printed
    tree = xml.etree.ElementTree.parse(tmp_path / "chart.svg")
    drawn = [e.text for e in tree.iter() if e.tag.endswith("title") and "[" in e.text]
    (share, *_) = study.pooled(read, "equal", 10, "worst group", "share")
    assert len(drawn) == 3 * 2 and f"Equal Scale, share 0.5 {100 * share:.4g} [" in " ".join(drawn)


def test_levers_change_what_they_say(tmp_path, phantom, monkeypatch):
    """Counts of a mix by group and kind; odds that favour one image draw it."""
    rare = fairdiff.take(phantom, np.r_[np.flatnonzero(phantom["race"] == 0)[:4], np.flatnonzero(phantom["race"] > 0)])
    made = fairdiff.make_phantom(90, 32, 5, balance="race") | {"synthetic": np.ones(90, bool)}
    fairdiff.save_set(tmp_path / "data/train.npz", rare)
    fairdiff.save_set(tmp_path / "synthetic.npz", made)

    def counts(data):
        return [[int(((data["race"] == g) & (data["synthetic"] == s)).sum()) for s in (False, True)] for g in range(3)]
    assert counts(levers.mixed(tmp_path, 0)) == [[9, 6], [15, 0], [15, 0]]     # 44 images, 15 a group; Asian 4 + 5 + 6
    assert counts(levers.mixed(tmp_path, 0, share=1, target="max")) == [[4, 16], [20, 0], [20, 0]]
    first = np.arange(90) == np.flatnonzero(made["race"] == 0)[-1]
    monkeypatch.setattr(levers, "read_dice", lambda out: first.astype(float))
    drawn = levers.mixed(tmp_path, 0, odds=lambda dice: np.where(dice == 1, 1e9, 1e-9))
    assert made["name"][first][0] in drawn["name"] and counts(drawn) == counts(levers.mixed(tmp_path, 0))
    assert counts(levers.mixed(tmp_path, 0, mixes=5)) == [[45, 30], [75, 0], [75, 0]]


def test_a_chart_of_nine_rows_has_nine_kinds_of_marks():
    """No two of the nine segmenters of METHODS=all look alike."""
    series = {str(i): ([0, 1], [i, i + 1], None) for i in range(9)}
    tree = xml.etree.ElementTree.fromstring(fairdiff.chart("t", "x", "y", series))
    groups = [e for e in tree.iter() if e.tag.endswith("}g")]
    look = {(g.get("fill"), [p.get("d") for p in g if p.get("transform")][0]) for g in groups}
    assert len(groups) == len(look) == 9


@pytest.mark.parametrize("module, file, show", [(study, "study.csv", study.tables), (levers, "levers.csv", lambda x: levers.table(x, 30))])
def test_the_results_that_are_kept_can_be_printed(module, file, show, capsys):
    """tests/*.csv have today's columns, and the README's bold row is among what is printed of them."""
    lines = list(csv.DictReader((study.root / "tests" / file).open()))
    assert list(lines[0]) == study.COLUMNS
    show(lines)
    printed = capsys.readouterr().out
    assert "five united | 0.86" in printed if module is levers else "worst group, 92 images" in printed and "nan" not in printed
