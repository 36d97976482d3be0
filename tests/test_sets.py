"""Whatever set a user brings goes through every stage, or is refused with the reason; FairSeg files, in and out."""
import csv
import re

import numpy as np
import pytest

import controlnet
import fairdiff
import fairness
import pointdiff
import transunet
from fairdiff import InputError


def main(module, line):
    """Run one command in this process."""
    return module.main(line.split())


# ------------------------------------------------------------------------------------------------------------
# Every stage

FEW = "--steps 2 --batch 8"
STAGES = (("points", pointdiff, "train set.npz --steps 40 --batch 16 --width 16 --points 64 --lr 1e-2 --out points.pt"),
          ("masks", pointdiff, "sample points.pt --steps 4 --rough --n 9 --out masks.npz"),
          ("plain", transunet, "train set.npz --steps {read} --batch 8 --width 8 --out plain.pt"),
          ("groupdro", transunet, f"train set.npz --method groupdro {FEW} --width 8 --out dro.pt"),
          ("predict", transunet, "predict plain.pt test.npz --out pred.npz"),
          ("base", controlnet, f"train-base set.npz {FEW} --width 8 --out base.pt"),
          ("control", controlnet, f"train-control set.npz base.pt {FEW} --out control.pt"),
          ("synthetic", controlnet, "sample control.pt masks.npz --steps 2 --out synthetic.npz"),
          ("mix", fairdiff, "mix set.npz synthetic.npz --target 9 --out mixed.npz"),
          ("agree", controlnet, "agree plain.pt set.npz test.npz"),
          ("quality", controlnet, "quality plain.pt base.pt control.pt synthetic.npz set.npz test.npz --steps 2 --n 4"),
          ("table", fairness, "table test.npz pred.npz"), ("report", fairdiff, "report ."))


def rows(data, index):
    return {k: v[index] for k, v in data.items()}


def race(change):
    """A set whose races are changed."""
    return lambda data: data | {"race": change(data["race"]).astype(np.int8)}


def same(data):
    return data


def wide(data):
    """24 x 32 images become 32 x 48."""
    return data | {k: np.pad(data[k], ((0, 0), (0, 0), (8, 8)), mode="edge") for k in ("image", "mask")}


REFUSED_UNKNOWN = {name: "known race" for name in ("points", "groupdro", "base", "table")}
ODD = {"plain": "divisible by 16", "groupdro": "divisible by 16", "predict": "divisible by 16", "base": "divisible by 8"}
KINDS = {                                                               # training set, test set, who refuses and why
    "one group only": (race(np.zeros_like), race(np.zeros_like), {}),
    "a group with one member": (race(lambda r: np.where(np.arange(len(r)) == 3, 0, 2)), same, {}),
    "a group absent in training, another in testing": (
        race(lambda r: np.where(r == 0, 2, r)), race(lambda r: np.where(r == 1, 2, r)), {}),
    "all of unknown group": (race(lambda r: np.full_like(r, -1)), race(lambda r: np.full_like(r, -1)), REFUSED_UNKNOWN),
    "no cup anywhere": (lambda d: d | {"mask": np.minimum(d["mask"], 1)},) * 2 + ({"agree": "rims and cups"},),
    "a batch larger than the set": (lambda d: rows(d, slice(0, 3)), same, {}),
    "sides not divisible": (lambda d: d | {k: d[k][:, 1:31, 1:31] for k in ("image", "mask")},) * 2 + (ODD,),
    "not square": (wide, wide, {}),
}


@pytest.fixture
def own(tmp_path, monkeypatch, phantom):
    """What a user's own set holds at least: image, mask and one group column. The folder to work in."""
    monkeypatch.chdir(tmp_path)
    return {k: phantom[k][:16].copy() for k in ("image", "mask", "race")}


def run_stages(capfd, train, test, read=2):
    """Run every stage; returns {stage: error line} of those that refused. A stage without its input is left out.
    read: steps of the segmenter; with few it finds nothing, and `agree` may say so."""
    np.savez("set.npz", **train)
    np.savez("test.npz", **test)
    refused = {}
    for name, module, line in STAGES:
        capfd.readouterr()
        code = main(module, line.format(read=read))
        error = capfd.readouterr().err
        assert code in (0, 2) and "Traceback" not in error
        if code and not re.search(r": no (dataset )?\w+\.(npz|pt): ", error):
            refused[name] = error.splitlines()[-1]
    if read == 2 and train["mask"].max() == 2:
        refused.pop("agree", None)
    return refused


def test_image_mask_and_one_group_column_go_through_every_stage(own, capfd):
    """Nothing but image, mask and race: every stage works and says nothing but progress on stderr. A target below
    every group cuts, one above every group tops up; one that nobody can fill names the group."""
    assert run_stages(capfd, own, own, read=40) == {}
    for target, code in ((2, 0), (12, 0), (100, 2)):
        assert main(fairdiff, f"mix set.npz synthetic.npz --target {target} --out m{target}.npz") == code
    for target in (2, 12):
        assert np.bincount(fairdiff.load_set(f"m{target}.npz")["race"]).tolist() == [target] * 3
    assert "group Asian: " in capfd.readouterr().err
    assert fairdiff.load_set("mixed.npz")["synthetic"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sets_work_or_are_refused_with_the_reason(kind, own, capfd):
    """Every stage works on it, or exits with 2 and one line that says why."""
    train, test, why = KINDS[kind]
    refused = run_stages(capfd, train(own), test(own))
    assert set(refused) == set(why)
    for name, line in refused.items():
        assert why[name] in line


# ------------------------------------------------------------------------------------------------------------
# Harvard-FairSeg

def write_patient(path, **change):
    """One FairSeg file of 40 x 60 pixels; None leaves a key out."""
    mask = np.zeros((40, 60))
    mask[10:30, 20:40], mask[15:25, 25:35] = -1, -2
    arrays = {"slo_fundus": np.full((40, 60), 90, np.uint8), "disc_cup_mask": mask, "race": 0} | change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.fixture
def patients(tmp_path, monkeypatch):
    """Ten good files in the folder seg; the working directory is the folder above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seg").mkdir()
    for i in range(1, 11):
        write_patient(f"seg/data_{i:05d}.npz", race=i % 3, age=50.0 + i)
    return tmp_path


def names_of(split):
    return [int(name[-5:]) for name in fairdiff.load_set(f"data/{split}.npz")["name"]]


def test_lists_of_another_machine_split(patients, capsys):
    """Only the file name of a line counts: other folders, Windows, six digits, repeated lines. Files found beside the
    patients are used unasked; what is in no list stays out and is counted."""
    train = "/home/x/data_000003.npz\nC:\\y\\data_00007.npz\ndata_00001.npz\n\ndata_00001.npz\n"
    (patients / "a.txt").write_text(train)
    (patients / "b.txt").write_text("/z/data_00002.npz\n")
    assert main(fairdiff, "fairseg seg --size 16 --split a.txt b.txt") == 0
    assert names_of("train") == [1, 3, 7] and names_of("test") == [2]
    assert "6 patients in no part" in capsys.readouterr().out
    (patients / "seg/train.txt").write_text("data_00004.npz")
    (patients / "seg/test.txt").write_text("data_00005.npz\ndata_00006.npz")
    assert main(fairdiff, "fairseg seg --size 16") == 0
    assert names_of("train") == [4] and names_of("test") == [5, 6]


@pytest.mark.parametrize("yes, no", [("1", "0"), ("True", "False")])
def test_a_summary_splits(patients, yes, no):
    """data_summary.csv with a column `train`; the column of file names is found by what it holds."""
    with open("seg/data_summary.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "filename", "train"])
        writer.writerows([i, f"data_{i:05d}.npz", no if i in (2, 9) else yes] for i in range(1, 11))
    assert main(fairdiff, "fairseg seg --size 16") == 0
    assert names_of("train") == [1, 3, 4, 5, 6, 7, 8, 10] and names_of("test") == [2, 9]


def test_without_lists_the_first_8000_of_10000_train(tmp_path):
    """The usual split, and its share of other numbers."""
    for n, cut in ((10000, 8000), (10, 8)):
        train, test = fairdiff.split_fairseg(tmp_path, [f"data_{i + 1:05d}" for i in range(n)])
        assert train.tolist() == list(range(cut)) and test.tolist() == list(range(cut, n))


@pytest.mark.parametrize("a, b, what", [
    ("data_00001", "data_000001", "in both parts"), ("data_00001", "data_00077", "not in seg, such as data_77"),
    ("data_00001", "", "0 to test"), ("train\n1", None, "a column of file names"),
    ("filename,use\ndata_00001,1", None, "column `train`"), ("a", "b", "--split"), ("", None, "column `train`")])
def test_bad_splits_are_refused(patients, capsys, a, b, what):
    """A patient in both parts, a missing file, an empty part, a table without the columns: one line, nothing written."""
    (patients / "a.txt").write_text(a)
    (patients / "b.txt").write_text(b or "")
    split = "a.txt" if b is None else "a.txt b.txt" if a != "a" else "a.txt b.txt a.txt"
    assert main(fairdiff, f"fairseg seg --size 16 --split {split}") == 2
    assert what in capsys.readouterr().err.splitlines()[-1] and not (patients / "data").exists()


def test_bad_files_are_listed_or_left_out(patients, capsys):
    """Damaged, a missing key, another shape, odd labels, pickled, a bad code: all named with the reason and nothing
    written; with --skip-bad left out and counted. A listed file that is missing counts as bad, too."""
    good = (patients / "seg/data_00010.npz").read_bytes()
    (patients / "seg/data_00011.npz").write_bytes(good[:len(good) // 2])
    for i, change in enumerate(({"disc_cup_mask": None}, {"disc_cup_mask": np.zeros((40, 61))},
                                {"disc_cup_mask": np.full((40, 60), 7)}, {"race": np.array({}, object)}, {"gender": 5},
                                {"slo_fundus": np.full((40, 60), np.nan)}, {"language": "English"}), 12):
        write_patient(f"seg/data_{i:05d}.npz", **change)
    assert main(fairdiff, "fairseg seg --size 16") == 2
    out, err = capsys.readouterr()
    reasons = ("readable", "no key disc_cup_mask", "one shape", "labels [7]", "needs pickle", "gender is 5", "0 to 255",
               "expected one number")
    for i, reason in enumerate(reasons, 11):
        assert reason in next(line for line in out.splitlines() if f"data_{i:05d}.npz" in line)
    assert "8 of 18" in err.splitlines()[-1] and "--skip-bad" in err and not (patients / "data").exists()
    assert main(fairdiff, "fairseg seg --size 16 --skip-bad") == 0
    assert "8 of 18 files left out" in capsys.readouterr().out and names_of("train") + names_of("test") == list(range(1, 11))
    (patients / "a.txt").write_text("data_00001\ndata_00011\ndata_00099")
    (patients / "b.txt").write_text("data_00002")
    assert main(fairdiff, "fairseg seg --size 16 --skip-bad --split a.txt b.txt") == 0
    assert "2 listed files are not in seg" in capsys.readouterr().out and names_of("train") == [1]


def test_the_way_to_convert_pickled_arrays_works(patients):
    """The line that the refusal prints makes a file that is read."""
    write_patient("seg/data_00001.npz", race=np.array(2, object), age=np.array(61.5, object))
    with pytest.raises(InputError) as error:
        fairdiff.load_fairseg("seg", size=16)
    line = re.search(r"np\.savez\(NEW.*\.items\(\)\}\)", str(error.value))[0]
    exec(line, {"np": np, "NEW": "seg/data_00002.npz", "OLD": "seg/data_00001.npz"})
    (patients / "seg/data_00001.npz").unlink()
    assert fairdiff.load_fairseg("seg", size=16)["age"][0] == 61.5


@pytest.mark.parametrize("codes, flag, race, what", [
    ((0, 2, -1), None, [0, 2, -1], None), ((2, 3, 7), None, [0, 1, 2], None), ((2, -1), None, None, "--race-codes"),
    ((2, -1), "012", [2, -1], None), ((2, -1), "237", [0, -1], None), ((0, 3), None, None, "race codes"),
    ((2, 4), None, None, "race is 4"), ((-1, np.nan), None, [-1, -1], None)])
def test_race_books(tmp_path, codes, flag, race, what):
    """One book for the whole folder; where it cannot be decided, the flag is asked for."""
    for i, code in enumerate(codes):
        write_patient(tmp_path / f"data_{i:05d}.npz", race=code)
    if what:
        with pytest.raises(InputError, match=what):
            fairdiff.load_fairseg(tmp_path, 16, race_codes=flag)
    else:
        assert fairdiff.load_fairseg(tmp_path, 16, race_codes=flag)["race"].tolist() == race


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.float16, np.float64, lambda x: np.array([x]),
                                  lambda x: np.full((1, 1), x)])
def test_scalars_of_any_type(tmp_path, kind):
    """Any numeric type and shape of one number; unknown is -1 or missing; age in years or, over the folder, days."""
    write_patient(tmp_path / "data_00001.npz", race=kind(1), gender=kind(1), maritalstatus=kind(4), age=kind(71))
    write_patient(tmp_path / "data_00002.npz", race=-1, age=-1)
    data = fairdiff.load_fairseg(tmp_path, 16)
    assert data["race"].tolist() == [1, -1] and data["gender"].tolist() == [1, -1]
    assert data["maritalstatus"].tolist() == [4, -1] and data["age"][0] == 71 and np.isnan(data["age"][1])
    write_patient(tmp_path / "data_00003.npz", age=0.0)
    for i in (1, 4):
        write_patient(tmp_path / f"data_{i:05d}.npz", age=20000 + i)
    assert np.allclose(fairdiff.load_fairseg(tmp_path, 16)["age"], [54.76, np.nan, np.nan, 54.77], 1e-3, equal_nan=True)


@pytest.mark.parametrize("image, grey", [
    (np.full((40, 60), 0.5, np.float32), 127), (np.full((40, 60), 90.0), 90), (np.full((40, 60, 3), 7, np.int64), 7),
    (np.ones((40, 60), int), 1), (np.ones((1, 40, 60), bool), 255)])
def test_grey_values_of_any_type(tmp_path, image, grey):
    """Floats up to 1 are shares of white; other numbers are taken as they are."""
    write_patient(tmp_path / "data_00001.npz", slo_fundus=image)
    assert np.unique(fairdiff.load_fairseg(tmp_path, 16)["image"]).tolist() == [grey]


def test_what_a_folder_was_taken_for_is_printed(patients, capsys):
    """Keys, sizes, labels, the book, and counts of every attribute, unknown included."""
    write_patient("seg/data_00010.npz", race=-1, slo_fundus=None, fundus=np.ones((50, 60)), disc_cup_mask=np.zeros((50, 60)))
    assert main(fairdiff, "fairseg seg --size 16") == 0
    out = capsys.readouterr().out
    for line in ("fundus (1 files), slo_fundus (9 files)", "40x60 (9 files), 50x60 (1 files)", "-2 (9 files)", "0 (10 files)",
                 "race codes 0, 1, 2 are Asian, Black, White; age in years", "Asian 2, Black 3, White 3, unknown 0",
                 "Asian 1, Black 0, White 0, unknown 1", "<60 8, >=60 0, unknown 0"):
        assert line in out, line


@pytest.mark.parametrize("book, image, mask, age", [("012", "fundus_slo", "disc_cup", 1),
                                                    ("237", "fundus", "disc_cup_borders", 365)])
def test_export_is_what_the_published_loaders_read(patients, phantom, book, image, mask, age):
    """FairSeg's loaders and FairDiff's look for these keys, take .item() of scalars, recode the mask in place and, in
    FairDiff, race from 2, 3, 7 and age from days. Read back, both are the same set."""
    fairdiff.save_set("set.npz", fairdiff.take(phantom, slice(0, 6)))
    assert main(fairdiff, f"export set.npz out --race-codes {book}") == 0
    for i in range(6):
        data = np.load(f"out/data_{i + 1:05d}.npz", allow_pickle=False)
        label = data[mask]
        for code, ours in ((-2, 2), (-1, 1), (0, 0)):
            label[label == code] = ours
        assert np.array_equal(label, phantom["mask"][i]) and np.array_equal(data[image], phantom["image"][i])
        race = data["race"].item()
        assert (race if book == "012" else {2: 0, 3: 1, 7: 2}[race]) == phantom["race"][i]
        assert (data["age"].item() / age >= 60) == (phantom["age"][i] >= 60) and data["pid"].item() == i + 1
    back = fairdiff.load_fairseg("out", 32)
    assert all(np.array_equal(back[k], phantom[k][:6]) for k in ("image", "mask", *fairdiff.ATTRIBUTES))
    assert np.allclose(back["age"], phantom["age"][:6], equal_nan=True)
