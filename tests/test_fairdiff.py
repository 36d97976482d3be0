"""fairdiff.py: Equal Scale, the dataset file, the phantom, import and export."""
import os
import pathlib

import conftest
import numpy as np
import pytest
from PIL import Image

import fairdiff

y, x = np.mgrid[:48, :48]
EYE = ((x - 23) ** 2 + (y - 25) ** 2 < 150).astype(np.uint8) + ((x - 22) ** 2 + (y - 25) ** 2 < 40)     # 0, 1, 2
COUNT = ["Asian"] * 4 + ["Black"] * 6 + ["White"] * 20 + [""]

def run(*line):
    return conftest.run(fairdiff, line)

def tiny(column, synthetic=False, **more):
    """A dataset of 8 x 8 images, all different, with a column race."""
    n = len(column)
    image = np.arange(n, dtype=np.uint8)[:, None, None] + np.zeros((8, 8), np.uint8) + 100 * synthetic
    return {"image": image, "mask": image % 3, "name": np.array([f"{synthetic}-{i}" for i in range(n)]),
            "synthetic": np.full(n, synthetic), "race": np.array(column)} | more

def both(folder="data"):
    """What an import wrote, both parts together, by name."""
    parts = [fairdiff.load_set(f"{folder}/{part}.npz") for part in ("train", "test")]
    data = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {key: array[np.argsort(data["name"])] for key, array in data.items()}

def names(part):
    return sorted(fairdiff.load_set(f"data/{part}.npz")["name"].tolist())

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize("settings, size, real, synthetic", [
    ({}, 10, [4, 6, 10], [6, 4, 0]), ({"target": 5}, 5, [4, 5, 5], [1, 0, 0]),
    ({"target": "max"}, 20, [4, 6, 20], [16, 14, 0]), ({"target": 25, "n_real": 12}, 25, 12, 63)])
def test_equal_scale(settings, size, real, synthetic):
    """Eq. 6 by hand, of 4, 6 and 20 patients: N_real / G by default, a number, the largest group, fewer real images.
    Every row is one of a source, with its own picture, at most once; the unknown one is left out; the seed decides."""
    sources = tiny(COUNT), tiny(["Asian", "Black", "White"] * 25, True)
    mixed, again, other = (fairdiff.equal_scale(*sources, "race", seed=seed, **settings) for seed in (0, 0, 1))
    counts = [[((mixed["race"] == g) & (mixed["synthetic"] == kind)).sum() for g in ("Asian", "Black", "White")]
              for kind in (False, True)]
    assert np.sum(counts, 0).tolist() == [size] * 3
    assert (np.sum(counts, 1).tolist() if settings.get("n_real") else counts) == [real, synthetic]
    columns = [[s["name"].tolist(), s["image"][:, 0, 0].tolist(), s["race"].tolist()] for s in (*sources, mixed)]
    rows = [set(zip(*column, strict=True)) for column in columns]
    assert rows[2] < rows[0] | rows[1] and len(rows[2]) == len(mixed["name"]) == 3 * size
    assert mixed["name"].tolist() == again["name"].tolist() != other["name"].tolist()

def test_mix_joins_synthetic_files_and_says_what_is_lacking(here, capsys):
    """8 synthetic images are too few: group and number are named; with those of a second file they are enough."""
    fairdiff.save_set("real.npz", tiny(COUNT))
    for i, n in enumerate((8, 6)):
        some = tiny(["Asian", "Black"] * n, True)
        fairdiff.save_set(f"{i}.npz", some | {"name": np.char.add(f"{i}-", some["name"])})
    assert run("mix", "real.npz", "0.npz", "--target", "17") == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("Asian", "13", " 8 ")) and error.count("\n") == 1
    assert run("mix", "real.npz", "0.npz", "1.npz", "--target", "17") == 0
    assert np.unique(fairdiff.load_set("mixed.npz")["race"], return_counts=True)[1].tolist() == [17] * 3

def test_group_codes_are_names_in_order():
    """Any column and number of groups: sorted names, or those given; -1 for unknown and for names not given."""
    data = tiny(["White"] * 5, scanner=np.array(["b", "", "d", "a", "c"]))
    codes, groups = fairdiff.group_codes(data, "scanner")
    assert codes.tolist() == [1, -1, 3, 0, 2] and list(groups) == ["a", "b", "c", "d"]
    assert fairdiff.group_codes(data, "scanner", ["d", "b"])[0].tolist() == [1, -1, 0, -1, -1]
    with pytest.raises(fairdiff.InputError, match="'site'.*race.*scanner"):
        fairdiff.group_codes(data, "site")

def test_a_set_of_ones_own_is_filled_in(here):
    """image, mask and a column of integers: text with negative as unknown, names of their own, nothing synthetic."""
    np.savez("own.npz", **dict.fromkeys(("image", "mask"), np.zeros((12, 8, 8), np.uint8)), site=np.arange(12) - 2)
    data = fairdiff.load_set("own.npz")
    assert data["site"].tolist() == ["", "", *map(str, range(10))]
    assert len(set(data["name"])) == 12 and not data["synthetic"].any() and data["synthetic"].dtype == bool

class Payload:                          # creates a file when it is unpickled
    def __reduce__(self):
        return open, ("ran", "w")

BAD = {"float column": ({"site": np.ones(4)}, "site"), "pickle": ({"site": np.array([Payload()] * 4)}, ""),
       "label 3": ({"mask": np.full((4, 8, 8), 3, np.uint8)}, "3"), "no mask": ({"mask": np.zeros(0)}, "mask"),
       "dtype": ({"image": np.zeros((4, 8, 8))}, "image"), "short column": ({"race": np.array(["a"])}, "race"),
       "shapes": ({"mask": np.zeros((4, 8, 9), np.uint8)}, "mask"), "empty": (tiny([]), ""), "text": (b"no set", ""),
       "name twice": ({"name": np.array([*"aabc"])}, "name"), "damaged": (b"PK\x03\x04 cut", ""), "missing": (None, "")}

@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_set_is_refused_in_one_line(here, capsys, kind):
    """Exit code 2, one line that names the file and what is wrong, and no pickled object is ever loaded."""
    change, what = BAD[kind]
    if isinstance(change, dict):
        np.savez("bad.npz", **tiny([*"abab"]) | change)
    elif change:
        pathlib.Path("bad.npz").write_bytes(change)
    assert run("export", "bad.npz", "files") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.npz" in error and what in error
    assert not os.path.exists("ran") and not os.path.exists("files")

def test_an_interrupted_save_keeps_the_old_set(here, monkeypatch):
    """An error in the middle of writing leaves the old file as it was, and no other one."""
    fairdiff.save_set("set.npz", tiny(["a", "b"]))
    before = pathlib.Path("set.npz").read_bytes()
    def broken(file, **arrays):
        (file if hasattr(file, "write") else open(file, "wb")).write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="disk full"):
        fairdiff.save_set("set.npz", tiny(["c", "d"]))
    assert os.listdir() == ["set.npz"] and pathlib.Path("set.npz").read_bytes() == before

def test_split_keeps_patients_together_and_groups_in_proportion(here, capsys):
    """Of 20 + 10 patients with two eyes each, 4 + 2 are held out, both eyes; a folder of two parts stays as it is.
    A column that is not there is refused with the list of those that are."""
    patient = np.concatenate([np.arange(40) % 20, 20 + np.arange(20) % 10])
    fairdiff.save_set("own.npz", tiny(np.repeat(["a", "b"], (40, 20)), patient=patient))
    assert run("split", "own.npz", "--attribute", "site") == 2
    error = capsys.readouterr().err
    assert "'site'" in error and "race" in error and error.count("\n") == 1 and not os.path.exists("data")
    assert run("split", "own.npz", "--attribute", "race") == 0
    train, test = (fairdiff.load_set(f"data/{part}.npz") for part in ("train", "test"))
    assert not set(train["patient"]) & set(test["patient"]) and len(train["name"]) == 48
    assert [(test["race"] == g).sum() for g in "ab"] == [8, 4] and run("split", "data", "--out", "again") == 0
    assert all(np.array_equal(test[key], value) for key, value in fairdiff.load_set("again/test.npz").items())

def test_a_folder_of_two_parts_needs_no_names(here, capsys):
    """train.npz and test.npz as the README makes them, of one size or two; a word that is no target is one line."""
    os.mkdir("own")
    for part, side in (("train", 16), ("test", 32)):
        zeros = np.zeros((6, side, side), np.uint8)
        np.savez(f"own/{part}.npz", image=zeros, mask=zeros, site=np.array([*"ababab"]))
    assert run("split", "own") == 0 and fairdiff.load_set("data/test.npz")["image"].shape == (6, 32, 32)
    assert "data/test.npz: 6 images" in capsys.readouterr().out
    for line in (["mix", "a", "b", "--target", "disc"], ["fairseg", "own", "--crop", "max"]):
        assert run(*line) == 2 and f"'{line[-1]}'" in capsys.readouterr().err

def test_phantom_is_made_by_its_seed():
    """The same seed gives the same set, another one another; an image depends on its mask, its race and the seed."""
    a, b, other = (fairdiff.make_phantom(6, 32, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a[key], b[key]) for key in a) and not set(a["name"]) & set(other["name"])
    mask, asian, white = a["mask"][:2], np.array(["Asian"] * 2), np.array(["White"] * 2)
    pictures = [fairdiff.render_phantom(*source) for source in (
        (mask, asian, 1), (mask, asian, 1), (mask[::-1], asian, 1), (mask, white, 1), (mask, asian, 2))]
    assert [np.array_equal(pictures[0], picture) for picture in pictures[1:]] == [True, False, False, False]

def test_phantom_with_fewer_rare_patients_and_without_difference(here):
    """--rare 3: those patients are among those of --rare 6, pictures and all; --shift 0: the races look alike."""
    few, more = (fairdiff.make_phantom(120, 32, seed=1, rare=rare) for rare in (3, 6))
    images = [{image.tobytes() for image in s["image"][s["race"] == "Asian"]} for s in (few, more)]
    assert [len(i) for i in images] == [3, 6] and images[0] < images[1] and (few["race"] != "").all()
    for shift, low, high in ((0, 0, 5), (1, 20, 99)):
        data = fairdiff.make_phantom(90, 32, 1, shift, "race")
        assert low < np.ptp([data["image"][data["race"] == g].mean() for g in ("Asian", "Black", "White")]) < high

def test_phantom_sets_of_one_seed_share_no_patient(here):
    """Training, test and a balanced set, which has equal groups, have no picture and no name in common."""
    assert run("phantom", "--train", 30, "--test", 31, "--size", 32) == 0
    assert run("phantom", "--train", 32, "--test", 0, "--size", 32, "--balance", "age", "--out", "even") == 0
    even = fairdiff.load_set("even/train.npz")
    assert np.unique(even["age"], return_counts=True)[1].tolist() == [16, 16] and not os.path.exists("even/test.npz")
    assert [len({row.tobytes() for row in (*both()[key], *even[key])}) for key in ("image", "name")] == [93, 93]

def write_images(masks, picture=lambda i: Image.fromarray(np.uint8(10 + i + (y > 20))), names=None, columns=None):
    names = names or [f"eye{i}" for i in range(len(masks))]
    columns = columns or {"scanner": ["A", "B"] * 10}
    for folder in ("pic", "mask"):
        os.makedirs(folder, exist_ok=True)
    for i, (name, mask) in enumerate(zip(names, masks, strict=True)):
        picture(i).save(f"pic/{name}.png")
        if mask is not None:
            (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(f"mask/{name}.png")
    rows = zip(("file", *(f"{name}.png" for name in names)), *([key, *columns[key]] for key in columns), strict=False)
    pathlib.Path("groups.csv").write_text("\n".join(map(",".join, rows)), encoding="utf-8")

def images(*options):
    attribute = pathlib.Path("groups.csv").read_text(encoding="utf-8").split("\n")[0].split(",")[1]
    return run("images", "pic", "mask", "groups.csv", "--attribute", attribute, "--size", "48", *options)

PALETTE = Image.fromarray(EYE).copy()
PALETTE.putpalette([0, 0, 0, 250, 120, 0, 9, 99, 250])
COLOUR = Image.fromarray(np.full((48, 48, 3), (200, 100, 50), np.uint8))
KINDS = {                               # masks and what becomes of them; pictures and their grey
    "L": (EYE, EYE, ""), "P": (PALETTE, EYE, ""), "RGB": (np.stack([EYE] * 3, 2), EYE, ""),
    "1": (Image.fromarray(EYE > 0), EYE > 0, ""), "I;16": (EYE.astype(np.uint16), EYE, ""),
    "REFUGE": (np.array([255, 128, 0], np.uint8)[EYE], EYE, "--labels 255,128,0"),
    "one structure": (np.uint8(255) * (EYE > 0), EYE > 0, "--labels 0,255"),
    "crop": (EYE // 2 * 2, (EYE // 2 * 2)[12:36, 12:36].repeat(2, 0).repeat(2, 1), "--crop 24"),
    "luminance": (COLOUR, 124, ""), "green": (COLOUR, 100, "--channel green"),
    "16 bits": (Image.new("I;16", (48, 48), 90 * 257), 90, ""), "palette": (COLOUR.quantize(), 124, "")}

@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_are_read(here, kind):
    """Labels come out as 0, 1, 2 at their place, whatever mode, coding and crop; pictures of any mode become grey."""
    source, expected, options = KINDS[kind]
    grey = isinstance(expected, int)
    write_images([EYE if grey else source] * 10, *[lambda i: source] * grey)
    assert images(*options.split()) == 0
    data = both()
    assert (data["mask"] == (EYE if grey else expected)).all() and data["scanner"].tolist() == ["A", "B"] * 5
    shades = [expected] * 10 if grey else range(10, 20)                             # every mask has its own picture
    assert abs(data["image"].min((1, 2)) - np.array(shades)).max() <= grey

def test_crop_disc_finds_the_disc(here):
    """A small disc in a corner comes to the middle of the picture."""
    write_images([((x - 38) ** 2 + (y - 9) ** 2 < 17).astype(np.uint8)] * 10)
    assert images("--crop", "disc") == 0
    mask = both()["mask"][0]
    assert abs(np.argwhere(mask).mean(0) - 23.5).max() < 3 and 0.08 < mask.mean() < 0.2

def test_table_columns_split_and_patient(here):
    """A column split is followed, a patient's eyes stay together without it; names may hold spaces and any letters."""
    own = [f"Jos\u00e9 \u7720 {i:02d}" for i in range(20)]
    write_images([EYE] * 20, names=own, columns={"site": ["\u00c5"] * 20, "split": ["test", "train", "", "train"] * 5})
    assert images() == 0
    assert names("test") == own[::4] and names("train") == own[1::2] and set(both()["site"]) == {"\u00c5"}
    write_images([EYE] * 20, names=own, columns={"site": ["A"] * 20, "mask": ["m.png"] * 20, "patient": [f"p{i % 10}" for i in range(20)]})
    assert images() == 0
    test = names("test")
    assert len(test) == 4 and len({name[-1] for name in test}) == 2 and set(both()["site"]) == {"A"}

@pytest.mark.parametrize("kind", ["label", "missing mask", "damaged", "shape"])
def test_a_bad_file_is_named_and_may_be_skipped(here, capsys, kind):
    """Exit code 2 and a line that names it; --skip-bad leaves it out and keeps the rest."""
    bad = {"label": EYE * np.uint8(90), "missing mask": None, "shape": EYE[:40]}.get(kind, EYE)
    write_images([EYE] * 7 + [bad] + [EYE] * 4)
    if kind == "damaged":
        os.truncate("pic/eye7.png", 60)
    assert images() == 2
    assert "eye7" in capsys.readouterr().err.splitlines()[-1] and not os.path.exists("data")
    assert images("--skip-bad") == 0 and len(both()["name"]) == 11 and "eye7" not in both()["name"]

@pytest.mark.parametrize("text, bad, options", [
    ("labels", 2 - EYE, []), ("crop", np.roll(EYE, 23, 1), ["--crop", "12"]), ("constant", 0 * EYE, [])])
def test_a_suspicious_import_warns(here, capsys, text, bad, options):
    """Inverted coding, a disc lost by the crop, a constant picture: a warning names the file; a good set has none."""
    write_images([EYE] * 20)
    assert images(*options) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if "warning" in line and text in line]
    Image.fromarray(bad).save("pic/eye13.png" if text == "constant" else "mask/eye13.png")
    assert images(*options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line and text in line]
    assert len(lines) == 1 and "eye13" in lines[0]

def write_patient(path, **change):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    arrays = {"slo_fundus": EYE + np.uint8(90), "disc_cup_mask": -EYE.astype(int), "race": 0} | change
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})

def test_fairseg_files_come_back_as_they_were(here, phantom, capsys):
    """export, then import, gives back all; so do the pictures of --png; a folder that holds files is refused."""
    fairdiff.save_set("set.npz", {key: array[:30] for key, array in phantom.items()})
    assert run("export", "set.npz", "files") == 0 and run("fairseg", "files", "--size", 32) == 0
    assert [key for key in phantom if not np.array_equal(both()[key], phantom[key][:30])] == ["name"]
    assert run("export", "set.npz", "files") == 2 and "files" in capsys.readouterr().err.splitlines()[-1]
    assert run("export", "set.npz", "png", "--png") == 0
    pathlib.Path("t.csv").write_text("\n".join(["file,site", *(f"{i:05d}.png,{i % 2}" for i in range(1, 31))]))
    assert run("images", "png/image", "png/mask", "t.csv", "--attribute", "site", "--size", 32) == 0
    assert all(np.array_equal(both()[key], phantom[key][:30]) for key in ("image", "mask")) and "race" not in both()

def test_dialects_of_fairseg(here):
    """Race codes 2, 3, 7, age in days, FairDomain's key, folders Training and Test, hidden files of a Mac."""
    for i in range(9):
        write_patient(f"f/{'Test' if i > 5 else 'Training'}/data_{i:05d}.npz", race=(2, 3, 7)[i % 3],
                      disc_cup_mask=None, slo_disc_cup=EYE, age=365.25 * (50 + 2 * i))
    pathlib.Path("f/Training/._data_00000.npz").write_text("a fork of a file")
    assert run("fairseg", "f", "--size", 48) == 0
    data = both()
    assert data["race"].tolist() == ["Asian", "Black", "White"] * 3 and (data["mask"] == EYE).all()
    assert data["age"].tolist() == ["<60"] * 5 + [">=60"] * 4 and len(names("test")) == 3

def test_lists_split_fairseg_and_broken_links_count_as_damaged(here, capsys):
    """train.txt and test.txt are followed; one alone, or a patient in both, is refused. A broken link is listed."""
    for i in range(6):
        write_patient(f"f/data_{i:05d}.npz")
    os.symlink("nowhere", "f/data_00009.npz")
    assert run("fairseg", "f") == 2 and "data_00009" in capsys.readouterr().err
    assert run("fairseg", "f", "--skip-bad") == 0 and len(both()["name"]) == 6
    os.remove("f/data_00009.npz")
    pathlib.Path("f/train.txt").write_text("/home/x/data_000003.npz\nC:\\y\\data_00004.npz\n")
    assert run("fairseg", "f") == 2 and "train.txt" in capsys.readouterr().err.splitlines()[-1]
    pathlib.Path("f/test.txt").write_text("data_00004\n")
    assert run("fairseg", "f") == 2 and "both" in capsys.readouterr().err.splitlines()[-1]
    pathlib.Path("f/test.txt").write_text("data_00001\ndata_00002\n")
    assert run("fairseg", "f") == 0 and [[n[-1] for n in names(p)] for p in ("train", "test")] == [[*"34"], [*"12"]]
