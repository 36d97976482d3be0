"""fairdiff.py: Equal Scale, the dataset file, the phantom, import and export."""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import run
from PIL import Image

import fairdiff

y, x = np.mgrid[:48, :48]
EYE = ((x - 23) ** 2 + (y - 25) ** 2 < 150).astype(np.uint8) + ((x - 22) ** 2 + (y - 25) ** 2 < 40)     # 0, 1, 2
COUNT = ["Asian"] * 4 + ["Black"] * 6 + ["White"] * 20 + [""]

def tiny(column, synthetic=False, **more):
    """A dataset of 8 x 8 images, all different, with a column race."""
    n = len(column)
    image = np.arange(n, dtype=np.uint8)[:, None, None] + np.zeros((8, 8), np.uint8) + 100 * synthetic
    return {"image": image, "mask": image % 3, "name": np.array([f"{synthetic}-{i}" for i in range(n)]),
            "synthetic": np.full(n, synthetic), "race": np.array(column)} | more

def imported(*parts):
    """What an import wrote, by name: of the parts train and test, or of one."""
    data = fairdiff.concatenate(*[fairdiff.load_set(f"data/{part}.npz") for part in parts or ("train", "test")])
    return fairdiff.subset(data, np.argsort(data["name"]))

@pytest.mark.parametrize("settings, real, synthetic", [
    ({}, [4, 6, 10], [6, 4, 0]), ({"target": 5}, [4, 5, 5], [1, 0, 0]), ({"target": "max"}, [4, 6, 20], [16, 14, 0])])
def test_equal_scale(settings, real, synthetic):
    """Eq. 6 by hand, of 4, 6, 20 and an unknown patient; every row is one of a source, as it was, at most once."""
    sources = tiny(COUNT), tiny(["Asian", "Black", "White"] * 25, True)
    mixed, again, other = (fairdiff.equal_scale(*sources, "race", seed=seed, **settings) for seed in (0, 0, 1))
    for kind, counts in ((False, real), (True, synthetic)):
        own = mixed["race"][mixed["synthetic"] == kind].tolist()
        assert [own.count(name) for name in ("Asian", "Black", "White")] == counts
    source = fairdiff.concatenate(*sources)
    index = [source["name"].tolist().index(name) for name in mixed["name"]]
    assert len(set(index)) == len(index) and all(np.array_equal(source[key][index], mixed[key]) for key in source)
    assert mixed["name"].tolist() == again["name"].tolist() != other["name"].tolist()
    fewer = fairdiff.equal_scale(*sources, "race", 25, n_real=12)
    assert len(fewer["name"]) == 75 and (~fewer["synthetic"]).sum() == 12

def test_mix_joins_synthetic_files_and_says_what_is_lacking(here, refused):
    """8 synthetic images are too few: group and number are named; with those of a second file they are enough."""
    fairdiff.save_set("real.npz", tiny(COUNT))
    synthetic = tiny(["Asian", "Black"] * 14, True)
    fairdiff.save_set("0.npz", fairdiff.subset(synthetic, slice(16)))
    fairdiff.save_set("1.npz", fairdiff.subset(synthetic, slice(16, 28)))
    refused(fairdiff, "mix", "real.npz", "0.npz", "--target", 17, words="Asian 13 8")
    refused(fairdiff, "mix", "real.npz", "0.npz", "--target", "disc", words="'disc'")
    assert run(fairdiff, "mix", "real.npz", "0.npz", "1.npz", "--target", 17) == 0
    assert np.unique(fairdiff.load_set("mixed.npz")["race"], return_counts=True)[1].tolist() == [17] * 3

class Payload:                          # creates a file when it is unpickled
    def __reduce__(self):
        return open, ("ran", "w")

BAD = [                                 # what is wrong, and a word for it in the message
    ({"site": np.ones(4)}, "site"), ({"site": np.array([Payload()] * 4)}, ""), ({"race": np.array(["a"])}, "race"),
    ({"mask": np.full((4, 8, 8), 3, np.uint8)}, "3"), ({"mask": np.zeros((4, 8, 9), np.uint8)}, "mask"),
    ({"mask": np.zeros(0)}, "mask"), ({"image": np.zeros((4, 8, 8))}, "image"), ({"name": np.array([*"aabc"])}, "name"),
    ({"synthetic": np.zeros(3)}, "synthetic"), (tiny([]), ""), (b"no set", ""), (b"PK\x03\x04 cut", ""), (None, "")]

@pytest.mark.parametrize("change, word", BAD)
def test_a_malformed_set_is_refused_in_one_line(here, refused, change, word):
    """Exit code 2, one line that names the file and what is wrong, and no pickled object is ever loaded."""
    if isinstance(change, dict):
        np.savez("bad.npz", **tiny([*"abab"]) | change)
    elif change:
        pathlib.Path("bad.npz").write_bytes(change)
    refused(fairdiff, "export", "bad.npz", "files", words=f"bad.npz {word}")
    assert not os.path.exists("ran") and not os.path.exists("files")

def test_an_interrupted_save_keeps_the_old_set(here, monkeypatch):
    """An error before its end leaves the old file as it was, and no other one."""
    fairdiff.save_set("set.npz", tiny(["a", "b"]))
    before = pathlib.Path("set.npz").read_bytes()
    monkeypatch.delattr(os, "replace")                                  # the last step of a save fails
    with pytest.raises(AttributeError):
        fairdiff.save_set("set.npz", tiny(["c", "d"]))
    assert os.listdir() == ["set.npz"] and pathlib.Path("set.npz").read_bytes() == before

def test_split_keeps_patients_together_and_groups_in_proportion(here):
    """Of 20 + 10 patients with two eyes each, 4 + 2 are held out, both eyes."""
    patient = np.concatenate([np.arange(40) % 20, 20 + np.arange(20) % 10])
    fairdiff.save_set("own.npz", tiny(["a"] * 40 + ["b"] * 20, patient=patient))
    assert run(fairdiff, "split", "own.npz", "--attribute", "race") == 0
    train, test = imported("train"), imported("test")
    assert not set(train["patient"]) & set(test["patient"]) and len(train["name"]) == 48
    assert sorted(test["race"]) == ["a"] * 8 + ["b"] * 4

def test_sets_of_ones_own_are_filled_in(here, capsys):
    """A folder of two parts, of one size or two, with image, mask and a column of integers: that becomes text, negative
    ones unknown, each image gets a name, none is synthetic. Codes stand for sorted names, or those given; else -1."""
    for part, side in (("train", 16), ("test", 32)):
        mask = np.random.default_rng(0).integers(0, 3, (6, side, side)).astype(np.uint8)
        np.savez(f"{part}.npz", image=9 * mask, mask=mask, site=np.arange(4, -2, -1))
    assert run(fairdiff, "split", ".") == 0 and "data/test.npz: 6 images" in capsys.readouterr().out
    data = fairdiff.load_set("data/test.npz")
    assert np.array_equal(data["mask"], mask) and np.array_equal(data["image"], 9 * mask)
    assert len(set(data["name"])) == 6 and data["synthetic"].dtype == bool and not data["synthetic"].any()
    codes, names = fairdiff.group_codes(data, "site")
    assert names == [*"01234"] and codes.tolist() == [4, 3, 2, 1, 0, -1]
    assert fairdiff.group_codes(data, "site", ["3", "1"])[0].tolist() == [-1, 0, -1, 1, -1, -1]

def test_a_phantom_is_made_by_its_seed():
    """The same seed gives the same patients; an image depends on its mask, its race and the seed."""
    data, again = (fairdiff.make_phantom(6, 32, seed=3) for _ in range(2))
    assert all(np.array_equal(data[key], again[key]) for key in data)
    mask = data["mask"]
    sources = (mask, "Asian", 1), (mask, "Asian", 1), (mask[::-1], "Asian", 1), (mask, "White", 1), (mask, "Asian", 2)
    images = [fairdiff.render_phantom(masks, [race] * 6, seed) for masks, race, seed in sources]
    assert [np.array_equal(images[0], image) for image in images[1:]] == [True, False, False, False]

def test_phantom_with_fewer_rare_patients_and_without_difference():
    """--rare 3: those patients are among those of --rare 6, pictures and all; --shift 0: the races look alike."""
    few, more = (fairdiff.make_phantom(120, 32, seed=1, rare=rare) for rare in (3, 6))
    few, more = ({image.tobytes() for image in s["image"][s["race"] == "Asian"]} for s in (few, more))
    assert (len(few), len(more)) == (3, 6) and few < more
    for shift, low, high in ((0, 0, 5), (1, 20, 99)):
        data = fairdiff.make_phantom(90, 32, 1, shift, "race")
        assert low < np.ptp([data["image"][data["race"] == g].mean() for g in ("Asian", "Black", "White")]) < high

def test_phantom_sets_of_one_seed_share_no_patient(here, refused):
    """Training, test and a balanced set share no picture and no name; a column that is not there is refused at once."""
    refused(fairdiff, "phantom", "--rare", 0, words="--rare 0 1")
    refused(fairdiff, "phantom", "--train", 6, "--size", 32, "--attribute", "site", words="'site' race")
    assert not os.path.exists("data") and run(fairdiff, "phantom", "--train", 30, "--test", 31, "--size", 32) == 0
    argv = ["--train", 32, "--test", 0, "--size", 32, "--balance", "age", "--out", "even"]
    assert run(fairdiff, "phantom", *argv) == 0 and not os.path.exists("even/test.npz")
    even = fairdiff.load_set("even/train.npz")
    assert np.unique(even["age"], return_counts=True)[1].tolist() == [16, 16]
    assert [len({row.tobytes() for row in (*imported()[key], *even[key])}) for key in ("image", "name")] == [93, 93]

IMAGES = ["images", "image", "mask", "groups.csv", "--size", "48"]

def write_images(n, mask=EYE, /, **columns):
    """Folders of n pictures, all different, and of their masks, and a table of them."""
    columns = {"file": [f"eye{i}.png" for i in range(n)], "scanner": (["A", "B"] * n)[:n]} | columns
    for folder in ("image", "mask"):
        os.makedirs(folder, exist_ok=True)
    for i, name in enumerate(columns["file"]):
        Image.fromarray(np.uint8(10 + i + 20 * (y > 20))).save(f"image/{name}")
        Image.fromarray(mask).save(f"mask/{name}")
    lines = map(",".join, zip(*columns.values(), strict=True))
    pathlib.Path("groups.csv").write_text("\n".join([",".join(columns), *lines]), encoding="utf-8")

MASK = Image.fromarray(EYE)
PALETTE = MASK.copy()
PALETTE.putpalette([0, 0, 0, 250, 120, 0, 9, 99, 250])
CUP = EYE // 2 * 2
COLOUR = Image.new("RGB", (48, 48), (200, 100, 50))
KINDS = {                               # folder, file, what becomes of it, options
    "L": ("mask", MASK, EYE, ""), "P": ("mask", PALETTE, EYE, ""), "RGB": ("mask", MASK.convert("RGB"), EYE, ""),
    "1": ("mask", Image.fromarray(EYE > 0), EYE > 0, ""), "I;16": ("mask", MASK.convert("I;16"), EYE, ""),
    "REFUGE": ("mask", Image.fromarray(np.array([255, 128, 0], np.uint8)[EYE]), EYE, "--labels 255,128,0"),
    "one structure": ("mask", Image.fromarray(np.uint8(255) * (EYE > 0)), EYE > 0, "--labels 0,255"),
    "crop": ("mask", Image.fromarray(CUP), CUP[12:36, 12:36].repeat(2, 0).repeat(2, 1), "--crop 24"),
    "luminance": ("image", COLOUR, 124, ""), "green": ("image", COLOUR, 100, "--channel green"),
    "palette": ("image", COLOUR.quantize(), 124, ""), "dark": ("image", Image.new("I;16", (48, 48), 200), 1, ""),
    "16 bits": ("image", Image.new("I;16", (48, 48), 23130), 90, "--channel green")}

@pytest.mark.parametrize("folder, file, expected, options", KINDS.values(), ids=KINDS)
def test_files_of_every_kind_are_read(here, folder, file, expected, options):
    """Labels come out as 0, 1, 2 at their place, whatever mode, coding and crop; pictures of any mode become grey."""
    write_images(10)
    for path in pathlib.Path(folder).iterdir():
        file.save(path)
    assert run(fairdiff, *IMAGES, *options.split()) == 0
    found = imported()[folder].astype(int)
    assert abs(found - expected).max() <= (folder == "image")             # grey is rounded

def test_crop_disc_finds_the_disc(here):
    """A small disc in a corner comes to the middle of the picture."""
    write_images(10, ((x - 38) ** 2 + (y - 9) ** 2 < 17).astype(np.uint8))
    assert run(fairdiff, *IMAGES, "--crop", "disc") == 0
    mask = imported()["mask"][0]
    assert abs(np.argwhere(mask).mean(0) - 23.5).max() < 3 and 0.08 < mask.mean() < 0.2

def test_columns_of_the_table(here):
    """Rows keep picture and group; splits are followed, else patients stay together; names of any letters, no ending."""
    own = [f"Jos\u00e9 \u7720 1.{i:02d}" for i in range(20)]
    columns = {"file": [f"{name}.png" for name in own], "scanner": ["\u00c5", "B"] * 10, "mask": ["m.png"] * 20}
    write_images(20, **columns, split=["test", "train", "", "train"] * 5)
    assert run(fairdiff, *IMAGES) == 0
    assert imported("test")["name"].tolist() == own[::4] and imported("train")["name"].tolist() == own[1::2]
    write_images(20, **columns, patient=[f"p{i % 10}" for i in range(20)])
    pathlib.Path("groups.csv").write_text(pathlib.Path("groups.csv").read_text("utf-8").replace(".png", ""), "utf-8")
    assert run(fairdiff, *IMAGES) == 0 and len({name[-1] for name in imported("test")["name"]}) == 2
    data = imported()
    assert data["scanner"].tolist() == columns["scanner"] and data["image"].min((1, 2)).tolist() == [*range(10, 30)]

@pytest.mark.parametrize("spoil", [
    os.remove, lambda path: os.truncate(path, 60), lambda path: Image.fromarray(EYE[:40]).save(path),
    lambda path: Image.fromarray(EYE * np.uint8(90)).save(path)], ids=["missing", "damaged", "shape", "labels"])
def test_a_bad_file_is_named_and_may_be_skipped(here, refused, spoil):
    """Exit code 2 and a line that names it; --skip-bad leaves it out and keeps the rest."""
    write_images(12)
    spoil("mask/eye7.png")
    refused(fairdiff, *IMAGES, words="eye7")
    assert not os.path.exists("data") and run(fairdiff, *IMAGES, "--skip-bad") == 0
    assert len(imported()["name"]) == 11 and "eye7" not in imported()["name"]

@pytest.mark.parametrize("text, file, bad, options", [
    ("labels", "mask/eye13.png", 2 - EYE, []), ("crop", "mask/eye13.png", np.roll(EYE, 23, 1), ["--crop", "12"]),
    ("constant", "image/eye13.png", 0 * EYE, [])])
def test_a_suspicious_import_warns(here, capsys, text, file, bad, options):
    """Inverted coding, a disc lost by the crop, a constant picture: a warning names the file; a good set has none."""
    write_images(20)
    for n_bad in (0, 1):
        assert run(fairdiff, *IMAGES, *options) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line and text in line]
        assert len(lines) == n_bad and all("eye13" in line for line in lines)
        Image.fromarray(bad).save(file)

def test_fairseg_files_come_back_as_they_were(here, phantom, refused):
    """export, then import, gives back all; so do the pictures of --png; a folder that holds files is refused."""
    few = fairdiff.subset(phantom, slice(30))
    fairdiff.save_set("set.npz", few)
    assert run(fairdiff, "export", "set.npz", "files") == 0 and run(fairdiff, "fairseg", "files", "--size", 32) == 0
    assert [key for key in few if not np.array_equal(imported()[key], few[key])] == ["name"]
    refused(fairdiff, "export", "set.npz", "files", "--png", words="files")
    assert run(fairdiff, "export", "set.npz", "png", "--png") == 0
    pathlib.Path("t.csv").write_text("\n".join(["file,site", *(f"{i:05d}.png,{i % 2}" for i in range(1, 31))]))
    argv = ["png/image", "png/mask", "t.csv", "--attribute", "site", "--size", 32]
    assert run(fairdiff, "images", *argv) == 0 and "race" not in imported()
    assert all(np.array_equal(imported()[key], few[key]) for key in ("image", "mask"))

def test_dialects_and_lists_of_fairseg(here, refused):
    """Race codes 2, 3, 7, age in days, FairDomain's key, folders Training and Test, hidden files of a Mac. Lists split
    in place of folders; one alone is refused; a patient in both is not trained on. A broken link is listed as damaged."""
    for i in range(9):
        path = pathlib.Path("f", "Test" if i < 3 else "Training", f"data_{i:05d}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, slo_fundus=EYE + 90, slo_disc_cup=EYE, race=(2, 3, 7)[i % 3], age=365.25 * (50 + 2 * i))
    pathlib.Path("f/Training/._data_00000.npz").write_text("a fork of a file")
    assert run(fairdiff, "fairseg", "f", "--size", 48) == 0
    data = imported()
    assert data["race"].tolist() == ["Asian", "Black", "White"] * 3 and (data["mask"] == EYE).all()
    assert data["age"].tolist() == ["<60"] * 5 + [">=60"] * 4
    assert [name[-1] for name in imported("test")["name"]] == [*"012"]
    os.symlink("nowhere", "f/data_00009.npz")
    refused(fairdiff, "fairseg", "f", words="data_00009")
    pathlib.Path("f/train.txt").write_text("/home/x/data_000003.npz\nC:\\y\\data_00004.npz\n")
    refused(fairdiff, "fairseg", "f", words="train.txt")
    pathlib.Path("f/test.txt").write_text("data_00099\n")
    refused(fairdiff, "fairseg", "f", "--skip-bad", "--split", *["f/test.txt"] * 2, words="0 to test")  # other files
    pathlib.Path("f/test.txt").write_text("data_00001\ndata_00004\n")
    assert run(fairdiff, "fairseg", "f", "--skip-bad") == 0
    assert [name[-1] for part in ("train", "test") for name in imported(part)["name"]] == [*"314"]

@pytest.mark.parametrize("pipe, env", [("| head -n 0", "PYTHONUNBUFFERED=1"), ("", "PYTHONIOENCODING=ascii LC_ALL=C")])
def test_a_closed_pipe_and_an_ascii_terminal_do_no_harm(here, pipe, env):
    """A reader that stops, and letters that a terminal lacks: no traceback, and the files are there."""
    fairdiff.save_set("own.npz", tiny(["\u00c5s", "\u7720"] * 10))
    command = f'{env} "{sys.executable}" "{os.path.abspath(fairdiff.__file__)}" split own.npz {pipe}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    assert len(imported()["name"]) == 20
