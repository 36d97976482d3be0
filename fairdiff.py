"""Data, Equal Scale (Sections 2.4, 3.1), and what all files share: trainings and report.

    python fairdiff.py phantom --out data --train 1000 --test 2000 --size 64    drawn patients
    python fairdiff.py fairseg FOLDER --out data --size 224                     Harvard-FairSeg
    python fairdiff.py images IMAGES MASKS GROUPS.csv --out data --size 64      your pictures
    python fairdiff.py mix data/train.npz synthetic.npz --out mixed.npz         Eq. 6

The phantom is a caricature for teaching and testing and no medical evidence.
"""
import argparse
import contextlib
import copy
import csv
import html
import inspect
import os
import pathlib
import re
import sys
import tempfile
import typing
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

class InputError(Exception):
    """Bad input: one line, what was found, what was expected and what to do. Exit code 2."""

# ---- Equal Scale (Section 2.4) --------------------------------------------------------------
def equal_scale(real, synthetic, attribute, target=None, seed=0, n_real=None):
    """Top up every group to the same size with synthetic images, and cut larger ones, Eq. 6.
    target: images per group, None: round(N_real / G), "max": the largest group; n_real: first draw
    so many real images. No image occurs twice; unknown groups are left out. InputError: too few."""
    rng = np.random.default_rng(seed)
    code, names = group_codes(real, attribute)
    synthetic_code, _ = group_codes(synthetic, attribute, names)
    pool = rng.permutation(np.flatnonzero(code >= 0))[:n_real]
    sizes = np.bincount(code[pool], minlength=len(names))
    target = {None: round(len(pool) / len(names)), "max": sizes.max()}.get(target, target)
    mixed = []
    for g, name in enumerate(names):
        need = max(0, target - sizes[g])
        drawn = rng.permutation(np.flatnonzero(synthetic_code == g))
        if len(drawn) < need:
            raise InputError(f"group {name}: {len(drawn)} synthetic images; {need} are needed")
        mixed.append(subset(real, pool[code[pool] == g][:target]))      # D*_g,real
        mixed.append(subset(synthetic, drawn[:need]))                   # D*_g,synthetic
    mixed = concatenate(*mixed)                                         # Eq. 6
    return subset(mixed, rng.permutation(len(mixed["name"])))

# ---- A dataset: image, mask (1 rim, 2 cup) uint8 (N, H, W); name, synthetic, group columns (N,) -
def group_columns(data):
    """Names of the group columns: all text arrays but the names of images and of patients."""
    return [key for key in data if key not in ("image", "mask", "name", "synthetic", "patient")]

def group_codes(data, attribute, names=None):
    """The group of every image, codes int (N,), -1 unknown, and the names that they stand for.
    names: sorted, or those given. InputError: no such column, or nobody's group is known."""
    if attribute not in group_columns(data) or not any(data[attribute]):
        raise InputError(f"no group in {attribute!r}; --attribute is one of {group_columns(data)}")
    names = list(names or sorted(set(data[attribute].tolist()) - {""}))
    code = {name: i for i, name in enumerate(names)}
    return np.array([code.get(name, -1) for name in data[attribute].tolist()], int), names

def check_set(data, where):
    """Fill in what a dataset may lack and check it; InputError names what is wrong in `where`."""
    for key in ("image", "mask"):
        array = np.asarray(data.get(key))
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape != data["image"].shape:
            raise InputError(f"{where}: {key} {array.dtype} {array.shape}; both: uint8 (N, H, W)")
    n = len(data["image"])
    if data["mask"].size == 0 or data["mask"].max() > 2:
        raise InputError(f"{where}: {n} masks of {np.unique(data['mask'])[:9]}; expected 0, 1, 2")
    data = {"name": np.arange(n), "synthetic": np.zeros(n, bool)} | data
    for key in data.keys() - {"image", "mask"}:
        column = np.asarray(data[key])
        if column.shape != (n,) or column.dtype.kind not in "Uiub":
            raise InputError(f"{where}: {key} {column.dtype} {column.shape}; expected {n} texts")
        unknown = column.dtype.kind == "i" and column < 0               # negative codes
        data[key] = np.where(unknown, "", column.astype(str))
    data["synthetic"] = np.isin(data["synthetic"], ("True", "1"))
    if len(np.unique(data["name"])) < n:
        raise InputError(f"{where}: a name occurs twice; expected one for each image")
    return data

def load_set(path):
    """Read a dataset file and check it, once and for all. InputError: missing or malformed."""
    try:
        data = dict(np.load(path, allow_pickle=False))
    except Exception as error:                          # zip and numpy raise a dozen types
        raise InputError(f"{path}: {error}; expected a dataset .npz of plain arrays") from None
    return check_set(data, path)

def save_set(path, data):
    """Check a dataset and write it, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **check_set(data, path))

def subset(data, index):
    """The rows of a dataset that index, int or bool, selects."""
    return {key: array[index] for key, array in data.items()}

def concatenate(*sets):
    """Datasets as one; a group column that some of them lack is unknown there."""
    sizes = {data["image"].shape[1:] for data in sets}
    if len(sizes) > 1:
        raise InputError(f"images of {sorted(sizes)} pixels; expected one size in all sets")
    joined = {}
    for key in dict.fromkeys(key for data in sets for key in data):
        joined[key] = np.concatenate([data.get(key, [""] * len(data["name"])) for data in sets])
    return check_set(joined, "the sets together")

@contextlib.contextmanager
def replacing(path):
    """A temporary path that takes the place of `path` if the block succeeds, else vanishes."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:    # same file system
        temporary = pathlib.Path(folder, path.name)
        yield temporary
        os.replace(temporary, path)

# ---- The phantom: fundus-like images of three races that differ in anatomy and appearance ----
MARGINALS = {                       # about as in Harvard-FairSeg; the missing share is unknown
    "race": {"Asian": 0.092, "Black": 0.148, "White": 0.760},
    "gender": {"Female": 0.585, "Male": 0.415},
    "ethnicity": {"Non-Hispanic": 0.94, "Hispanic": 0.04},
    "language": {"English": 0.924, "Spanish": 0.015, "Others": 0.010},
    "maritalstatus": {"Married": 0.58, "Not married": 0.40},
    "age": {"<60": 0.49, ">=60": 0.51},
}
PHANTOM = {                         # of Asian, Black, White; the other columns have no effect
    "radius": (0.200, 0.215, 0.200),            # of the disc, in image widths
    "ratio": (0.48, 0.61, 0.54),                # cup to disc
    "aspect": (1.18, 1.05, 1.08),               # height over width of the disc
    "fundus": (0.45, 0.26, 0.38),               # grey of the background, in [0, 1]
    "cup": (-0.20, 0.14, 0.18),                 # against the rim: in the rare group it is darker
    "vessel": (0.55, 0.40, 0.48),               # share of the light that a vessel takes away
}

def phantom_traits(race, shift):
    """The parameters of one race; with shift 0 those of the mean patient."""
    i = list(MARGINALS["race"]).index(race)
    shares = list(MARGINALS["race"].values())
    means = {key: np.dot(shares, values) for key, values in PHANTOM.items()}
    return {key: mean + shift * (PHANTOM[key][i] - mean) for key, mean in means.items()}

def inside_ellipse(rng, size, centre, radius, aspect, wave):
    """A wavy ellipse, bool (size, size): centre (x, y), radius in image widths, height / width."""
    c = (np.arange(size) + 0.5) / size
    x = (c[None] - centre[0]) * np.sqrt(aspect)
    y = (c[:, None] - centre[1]) / np.sqrt(aspect)
    ripple = 1.0
    for k in (2, 3, 4):
        phase = k * np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
        ripple += rng.normal(0, wave / k) * np.cos(phase)
    return np.hypot(x, y) < radius * ripple

def phantom_mask(rng, size, traits):
    """One mask uint8 (size, size): the disc, and a cup that wanders in it."""
    centre = 0.5 + rng.normal(0, 0.035, 2)
    radius = traits["radius"] * np.exp(rng.normal(0, 0.09))
    aspect = traits["aspect"] * np.exp(rng.normal(0, 0.04))
    disc = inside_ellipse(rng, size, centre, radius, aspect, 0.03)
    ratio = np.clip(traits["ratio"] + rng.normal(0, 0.085), 0.25, 0.82)
    centre = centre + np.clip(rng.normal(0, 0.3, 2), -0.4, 0.4) * (1 - ratio) * radius
    cup = inside_ellipse(rng, size, centre, ratio * radius, 1 + 0.6 * (aspect - 1), 0.04)
    return disc.astype(np.uint8) + (cup & ndimage.binary_erosion(disc))

def draw_vessels(rng, size, centre, radius):
    """Vessels in [0, 1] (size, size): eight lines that leave the disc up- and downwards."""
    fine = max(2, 256 // size) * size                                   # drawn fine, then averaged
    canvas = Image.new("L", (fine, fine))
    for i in range(8):
        heading = (i % 2 - 0.5) * np.pi + rng.normal(0.45, 0.3) * (1 if i < 4 else -1)
        angle = heading + rng.normal(rng.normal(0, 0.03), 0.09, 22).cumsum()
        path = centre + 0.035 * np.stack([np.cos(angle), np.sin(angle)], 1).cumsum(0)
        width = max(1, round(rng.uniform(0.10, 0.17) * radius * fine))
        ImageDraw.Draw(canvas).line((path * fine).ravel().tolist(), fill=255, width=width)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255

def render_phantom(mask, race, seed, shift=1.0):
    """Grey images uint8 (N, S, S), as of a laser ophthalmoscope, of masks (N, S, S), races (N,).
    Image i depends on (seed, i), its mask and its race alone. shift 0: all races look alike."""
    images = np.empty(mask.shape, np.uint8)
    size = mask.shape[1]
    for i in range(len(mask)):
        rng = np.random.default_rng((seed, 1, i))
        traits = phantom_traits(race[i], shift)
        disc = (mask[i] > 0).astype(np.float32)
        centre = (np.array(ndimage.center_of_mass(disc + 1e-6))[::-1] + 0.5) / size
        vessels = draw_vessels(rng, size, centre, np.sqrt(disc.mean() / np.pi))
        disc = ndimage.gaussian_filter(disc, 0.013 * size)
        cup = ndimage.gaussian_filter((mask[i] == 2).astype(np.float32), 0.015 * size)
        texture = ndimage.zoom(rng.standard_normal((8, 8)), size / 8)
        image = traits["fundus"] + rng.normal(0, 0.035) + 0.03 * texture
        image += (0.18 + rng.normal(0, 0.025)) * disc
        image += (traits["cup"] + rng.normal(0, 0.03)) * cup
        image *= 1 - traits["vessel"] * vessels * (1 - 0.35 * cup)      # fainter inside the cup
        c = np.linspace(-1, 1, size)
        x, y = rng.normal(0, 0.25, 2)                                   # the light is not centred
        image *= 1.06 - 0.17 * ((c[None] - x) ** 2 + (c[:, None] - y) ** 2)
        speckle = ndimage.gaussian_filter(rng.standard_normal((size, size)), 0.5)
        image = np.clip(image, 0.02, 1) * (1 + 0.13 * speckle)          # it scales with the light
        images[i] = np.clip(255 * image, 0, 255)
    return images

def make_phantom(n, size, seed, shift=1.0, balance=None, rare=None):
    """A dataset of n phantom patients, size x size pixels, the same for the same seed.
    shift, balance, rare: as in the command phantom."""
    rng = np.random.default_rng((seed, 2))
    data = {"name": np.array([f"phantom-{seed}-{i:05d}" for i in range(n)])}
    for attribute, shares in MARGINALS.items():
        code = np.arange(n) % len(shares)
        if attribute != balance:        # quotas: a seed changes who is in a group, not how many
            code = np.searchsorted(np.cumsum(list(shares.values())), (np.arange(n) + 0.5) / n)
        data[attribute] = rng.permutation(np.array([*shares, ""])[code])
    if rare is not None:                # the patients of --rare 10 are among those of --rare 30
        data["race"][np.flatnonzero(data["race"] == "Asian")[rare:]] = "White"
    mask = np.empty((n, size, size), np.uint8)
    for i, race in enumerate(data["race"]):
        rng = np.random.default_rng((seed, 0, i))
        mask[i] = phantom_mask(rng, size, phantom_traits(race, shift))
    image = render_phantom(mask, data["race"], seed, shift)
    return check_set({"image": image, "mask": mask} | data, "the phantom")

# ---- Import and export --------------------------------------------------------------------------
FAIRSEG_IMAGE = ("slo_fundus", "fundus_slo", "fundus")                  # keys of the releases
FAIRSEG_MASK = ("disc_cup_mask", "disc_cup", "disc_cup_borders", "slo_disc_cup")
FAIRSEG_GROUPS = {key: list(MARGINALS[key]) for key in MARGINALS if key != "age"}   # names by code
FAIRSEG_GROUPS["maritalstatus"] += ["Not married"] * 3                  # codes 1 to 4

def to_grey(array):
    """A picture (H, W) or (H, W, 3 or 4) of numbers as its luminance, uint8 (H, W)."""
    array = np.squeeze(array)
    white = 65535 if array.dtype == np.uint16 or array.max() > 255 else 255
    white = 1 if array.dtype.kind in "bf" and array.max() <= 1 else white
    array = (array * (255.0 / white)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(array[..., :3]).convert("L")) if array.ndim == 3 else array

def crop_and_resize(image, mask, crop, size):
    """Cut a square out of image and mask, uint8 (H, W), and resize both to size x size.
    crop: side of the centred square, at most; or "disc": a square around the disc."""
    h, w = mask.shape
    y, x = np.nonzero(mask if crop == "disc" and mask.any() else np.ones_like(mask))
    side = min(h, w, 2.5 * max(np.ptp(y), np.ptp(x)) + 1 if crop == "disc" else crop)
    top = np.clip((y.min() + y.max() + 1 - side) / 2, 0, h - side)
    left = np.clip((x.min() + x.max() + 1 - side) / 2, 0, w - side)
    box = (left, top, left + side, top + side)
    image = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
    mask = Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST, box)
    return np.asarray(image), np.asarray(mask)

def import_all(names, read, labels, size, crop, skip_bad):
    """A dataset of what read(name) returns: image uint8 and mask (H, W), a dict of text columns.
    The values `labels` of a mask become 0, 1, 2. InputError: a file cannot be used."""
    rows = []
    for name in tqdm(names, "import", disable=None):
        try:
            image, mask, groups = read(name)
            if mask.shape != image.shape or not np.isin(mask, labels).all():
                raise ValueError(f"image {image.shape}, mask {mask.shape} of {np.unique(mask)[:6]};"
                                 f" expected one shape and labels {labels}")
            mask = np.select([mask == value for value in labels], range(len(labels)))
            image, mask = crop_and_resize(image, mask.astype(np.uint8), crop, size)
            rows.append(groups | {"image": image, "mask": mask})
        except Exception as error:                      # damaged files raise a dozen types
            if not skip_bad:
                raise InputError(f"{name}: {error!r}; mend it, or use --skip-bad") from None
            print(f"left out {name}: {error!r}")
    if not rows:
        raise InputError(f"none of {len(names)} files can be used")
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}

def save_parts(out, attribute, **parts):
    """Write sets and pictures of them into the folder `out`, say what they hold, warn if odd."""
    for data in parts.values():
        group_codes(data, attribute)                    # InputError before anything is written
    for part, data in parts.items():
        save_set(f"{out}/{part}.npz", data)
        save_group_grid(f"{out}/{part}.npz.png", data, attribute)
    for part, data in parts.items():
        mask = data["mask"]
        print(f"{out}/{part}.npz: {len(mask)} images, labels {np.unique(mask)}, "
              f"{len(mask) - (mask == 2).any((1, 2)).sum()} masks without cup")
        for key in group_columns(data):
            counts = zip(*np.unique(data[key], return_counts=True), strict=True)
            print(f"  {key}:", ", ".join(f"{name or 'unknown'} {n}" for name, n in counts))
        edge = np.concatenate([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1)
        hole = np.array([(ndimage.binary_fill_holes(m == 2) & (m == 0)).any() for m in mask])
        odd = {"have no disc, perhaps by the crop": ~mask.any((1, 2)),
               "have a disc that the border cuts": edge.any(1),
               "have a cup with a hole or at the border: check --labels": (edge == 2).any(1) | hole,
               "are constant, or nearly": np.ptp(data["image"], axis=(1, 2)) < 16}
        for text, found in odd.items():
            start = "warning:" if found.any() else " "
            print(f"{start} {found.sum()} images {text}", *data["name"][found][:5], sep=", ")

def split_set(data, out, attribute, test_share):
    """Write both parts of a set: as its column split says, or a share of every group's patients."""
    part = data.pop("split", np.array([""]))
    data = check_set(data, out)
    attribute = attribute or [*group_columns(data), ""][0]
    if (part == "").all():
        code, _ = group_codes(data, attribute)
        patient = data.get("patient", data["name"])
        patient = np.where(patient == "", data["name"], patient)        # unknown: one of its own
        part = np.full(len(code), "train")
        for g in np.unique(code):
            own = np.random.default_rng(0).permutation(np.unique(patient[code == g]))
            part[np.isin(patient, own[:round(test_share * len(own))])] = "test"
    train, test = np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
    if not len(train) or not len(test):
        raise InputError(f"{len(train)} images to train, {len(test)} to test of {np.unique(part)}; "
                         "expected both, and train or test as their split")
    save_parts(out, attribute, train=subset(data, train), test=subset(data, test))
    print(f"{len(part) - len(train) - len(test)} images are in neither part")

def number_or(word):
    """An argparse type: a whole number, or this one word."""
    def number(text):
        return text if text == word else int(text)
    return number

def fairseg(folder, out="data", size=64, crop: number_or("disc") = 512, split: list = None,
            attribute: str = None, test_share=0.2, skip_bad=False):
    """Import a folder of Harvard-FairSeg files.
    crop: side of the centred square, or disc: around the disc; split: TRAIN.txt TEST.txt;
    attribute: the groups to split evenly and to show, by default the first column."""
    folder = pathlib.Path(folder)
    paths = sorted(folder.rglob("[!.]*.npz"))                           # macOS hides copies
    lists = split or [*folder.glob("train.txt"), *folder.glob("test.txt")]
    listed = {}                                         # part by number, of 5 digits or of 6
    for path, part in zip(lists, ("train", "test"), strict=False):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        listed |= dict.fromkeys(map(int, re.findall(r"(\d+)(?:\.npz)?\s*$", text, re.M)), part)
    if not paths or len(lists) not in (0, 2):
        raise InputError(f"{folder}: {len(paths)} .npz, {lists}; expected files, 2 lists or none")
    def read(path):
        found = dict(np.load(path, allow_pickle=False))
        image = [to_grey(found[key]) for key in FAIRSEG_IMAGE if key in found]
        mask = [abs(np.squeeze(found[key])) for key in FAIRSEG_MASK if key in found]
        if not image or not mask:
            raise ValueError(f"found {', '.join(found)}; expected slo_fundus and disc_cup_mask")
        part = {"Training": "train", "Test": "test"}.get(path.parent.name, "")
        if lists:
            part = listed.get(int(re.findall(r"\d+", path.stem)[-1]), "neither")
        groups = {"name": path.stem, "split": part}
        for key, names in FAIRSEG_GROUPS.items():
            alias = {"gender": "male", "ethnicity": "hispanic"}.get(key)
            code = int(np.ravel(found.get(key, found.get(alias, -1)))[0])
            groups[key] = dict(enumerate(names)).get(code, f"code {code}" if code > 0 else "")
        age = float(np.ravel(found.get("age", -1))[0])
        age = age / 365.25 if age > 150 else age        # one release counts days
        groups["age"] = "" if not age > 0 else "<60" if age < 60 else ">=60"
        return image[0], mask[0], groups                # -1 or 1 rim, -2 or 2 cup
    data = import_all(paths, read, [0, 1, 2], size, crop, skip_bad)
    if np.isin(data["race"], ("code 3", "code 7")).any():   # other book: 2 Asian, 3 Black, 7 White
        book = {"White": "Asian", "code 3": "Black", "code 7": "White"}
        data["race"] = np.array([book.get(name, "") for name in data["race"]])
    split_set(data, out, attribute, test_share)

def images(images, masks, groups, out="data", size=64, crop: number_or("disc") = 512,
           labels="0,1,2", channel: typing.Literal["all", "green"] = "all", attribute: str = None,
           test_share=0.2, skip_bad=False):
    """Import pictures, masks of the same name, and a table (CSV) whose first column names them.
    Its other columns are groups, or `patient`, or `split`: train or test. labels: mask values of
    background, rim and cup; channel all: the luminance; crop and attribute: see fairseg."""
    with open(groups, newline="", encoding="utf-8-sig") as file:
        table = {next(iter(row.values())): row for row in csv.DictReader(file, restval="")}
    pictures = {path.stem: path for path in pathlib.Path(images).iterdir()}
    masks = {path.stem: path for path in pathlib.Path(masks).iterdir()}
    def read(name):
        stem = name if name in pictures else pathlib.Path(name).stem
        picture, mask = Image.open(pictures[stem]), Image.open(masks[stem])
        if picture.mode == "P" or (channel == "green" and picture.mode[0] != "I"):  # I: 16 bits
            picture = picture.convert("RGB")
        image = np.asarray(picture)
        image = image[..., 1] if channel == "green" and image.ndim == 3 else to_grey(image)
        mask = mask.convert("L") if mask.mode.startswith("RGB") else mask
        return image, np.asarray(mask), dict(list(table[name].items())[1:]) | {"name": stem}
    print(f"{len(pictures)} pictures, {len(table)} rows in {groups}")
    labels = [int(value) for value in re.findall(r"\d+", labels)]
    data = import_all(list(table), read, labels, size, crop, skip_bad)
    split_set(data, out, attribute, test_share)

def split(dataset, out="data", attribute: str = None, test_share=0.2):
    """Check a dataset, one file or a folder with train.npz and test.npz, and write two parts."""
    if os.path.isfile(dataset):
        return split_set(load_set(dataset), out, attribute, test_share)
    parts = {part: load_set(f"{dataset}/{part}.npz") for part in ("train", "test")}
    save_parts(out, attribute or [*group_columns(parts["train"]), ""][0], **parts)

def export(dataset, folder, png=False):
    """Write a dataset as Harvard-FairSeg files, or with --png as pictures for other tools."""
    data, folder = load_set(dataset), pathlib.Path(folder)
    for name in ("", "image", "mask") if png else ("",):
        (folder / name).mkdir(parents=True)             # OSError if it exists: patients would mix
    for i in range(len(data["name"])):
        patient = subset(data, i)
        if png:
            for key in ("image", "mask"):
                Image.fromarray(patient[key]).save(folder / key / f"{i + 1:05d}.png")
            continue
        arrays = {"age": {"<60": 50, ">=60": 70}.get(str(patient.get("age")), -1)}
        for key, names in FAIRSEG_GROUPS.items():
            arrays[key] = names.index(patient[key]) if patient.get(key) in names else -1
        arrays |= dict.fromkeys(FAIRSEG_IMAGE, patient["image"])
        arrays |= dict.fromkeys(FAIRSEG_MASK, -patient["mask"].astype(np.int16))
        np.savez_compressed(folder / f"data_{i + 1:05d}.npz", **arrays)
    print(f"{folder}: {len(data['name'])} images")

# ---- What the trainings share -------------------------------------------------------------------
SAVE_EVERY = 200                                        # steps between checkpoints

def setup(name):
    """The device ("auto": CUDA if any) and torchrun's number of processes; only rank 0 prints."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = {"auto": local if torch.cuda.is_available() else "cpu", "cuda": local}.get(name, name)
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group()
        if torch.distributed.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device, world

def autocast(device):
    """Mixed precision with bf16 where the hardware multiplies it; elsewhere that is slow."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)

def fingerprint(*arrays):
    """A checksum, by which a checkpoint knows the set and the network that it was trained on."""
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))

class Run:
    """One training: network, the EMA of its weights, optimizer, step and losses, in one file.
    Continues an interrupted training; InputError: the file holds another config. All that is random
    in a step comes from (seed, step), so on a CPU it ends bit for bit like an unbroken one."""
    def __init__(self, path, config, net, optimizer, decay):
        config = {key: config[key] for key in config if key not in ("dataset", "out", "device")}
        self.path, self.config, self.net, self.optimizer = path, config, net, optimizer
        self.ema = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay
        self.rank = int(os.environ.get("RANK", 0))
        self.step = 0
        self.losses = []
        if os.path.exists(path):
            state = load_checkpoint(path)
            for key, value in config.items():
                if state["config"].get(key) != value:
                    raise InputError(f"{path}: {key} was {state['config'].get(key)}, now {value}; "
                                     "expected the same, or another --out")
            net.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.losses = state["step"], state["losses"]

    def steps(self):
        """Yield the steps that are left, each with its own seed; save on the way and at the end."""
        total = self.config["steps"]
        for step in tqdm(range(self.step, total), self.config["kind"], total, initial=self.step,
                         disable=self.rank > 0 or None):
            numbers = np.random.SeedSequence((self.config["seed"], step, self.rank))
            torch.manual_seed(int(numbers.generate_state(1)[0]))
            yield step
            self.step = step + 1
            if self.rank == 0 and (self.step % SAVE_EVERY == 0 or self.step == total):
                with replacing(self.path) as temporary:
                    torch.save({"config": self.config, "step": self.step, "losses": self.losses,
                                "model": self.net.state_dict(), "ema": self.ema.state_dict(),
                                "optimizer": self.optimizer.state_dict()}, temporary)
        print(f"loss {np.mean(self.losses[-5:], 0)[1]:.4f} after {total} steps")

    def update(self, loss):
        """Move the EMA towards the weights and log the loss; FloatingPointError if not finite."""
        keep = min(self.decay, (1 + self.step) / (10 + self.step))      # at first shorter
        weights = self.net.state_dict()
        averages = {name: a for name, a in self.ema.state_dict().items() if a.is_floating_point()}
        new = [weights[name] for name in averages]
        torch._foreach_lerp_(list(averages.values()), new, 1 - keep)    # all in one call
        if self.step % 50 == 49 or self.step + 1 == self.config["steps"]:
            self.losses.append([self.step + 1, loss.item()])
            if not all(value.isfinite().all() for value in (loss, *weights.values())):
                raise FloatingPointError(f"loss {loss} at step {self.step + 1}; try a lower --lr")

def load_checkpoint(path, kinds=()):
    """Read a checkpoint without running pickled code; with kinds, a finished one of these."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = state["config"]
    except Exception as error:                          # torch raises a dozen types
        raise InputError(f"{path}: {str(error).splitlines()[0]}; expected a checkpoint") from None
    if kinds and (config["kind"] not in kinds or state["step"] < config["steps"]):
        raise InputError(f"{path}: {config['kind']}, {state['step']} of {config['steps']} steps; "
                         f"expected a finished {' or '.join(kinds)}: run its train command")
    return state

# ---- Pictures and report ------------------------------------------------------------------------
def save_grid(path, rows, labels):
    """Write a PNG with one labelled row of pictures, uint8 (H, W) or (H, W, 3), per entry."""
    zoom = max(1, 128 // len(rows[0][0]))
    h, w = zoom * np.array(rows[0][0].shape[:2])
    left = 20 + 8 * max(map(len, labels))
    grid = Image.new("RGB", (left + max(map(len, rows)) * (w + 2), len(rows) * (h + 2)), "white")
    for i, row in enumerate(rows):
        ImageDraw.Draw(grid).text((6, i * (h + 2) + h // 2), labels[i], "black")
        for j, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST)
            grid.paste(tile, (left + j * (w + 2), i * (h + 2)))
    grid.save(path)

def save_group_grid(path, data, attribute):
    """Write a PNG of eight images a group, each again with outlines of its disc and its cup."""
    cross = ndimage.generate_binary_structure(2, 1)[None]               # each image on its own
    rows, labels = [], []
    for name in np.unique(data[attribute])[:12]:
        part = subset(data, np.flatnonzero(data[attribute] == name)[:8])
        outlined = np.repeat(part["image"][..., None], 3, 3)            # RGB (N, H, W, 3)
        for label, colour in ((1, (80, 170, 255)), (2, (255, 190, 60))):    # blue, orange
            region = part["mask"] >= label
            outlined[region & ~ndimage.binary_erosion(region, cross)] = colour
        rows += [part["image"], outlined]
        labels += [str(name) or "unknown", ""]
    save_grid(path, rows, labels)

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>FairDiff</title>
<meta name=viewport content='width=device-width'><style>:root {color-scheme: light dark}
body {font: 16px/1.5 sans-serif; max-width: 60em; margin: auto; padding: 1em}
pre {overflow-x: auto; font-size: 13px} img {max-width: 100%} div {margin: 2px; padding: 0 .3em;
background: linear-gradient(hsl(var(--hue) 50% 50%) 0 0) no-repeat 0 / var(--width) 100%}</style>"""

def report(out):
    """Write OUT/report.html: the result, then pictures and logs of all stages in their order."""
    out = pathlib.Path(out)
    result = (out / "log/table.txt").read_text(errors="replace").partition("mean Dice")
    page = [PAGE, f"<h1>FairDiff</h1><pre>{html.escape(''.join(result[1:]))}</pre>",
            (out / "results.csv.html").read_text(encoding="utf-8")]
    for path in sorted([*out.glob("log/*.txt"), *out.rglob("*.png")], key=os.path.getmtime):
        name = html.escape(str(path.relative_to(out)))
        content = f"<img alt='{name}' src='{name}'>"
        if path.suffix == ".txt":
            content = f"<pre>{html.escape(path.read_text(errors='replace'))}</pre>"
        page.append(f"<h2>{name}</h2>{content}")
    (out / "report.html").write_text("\n".join(page), encoding="utf-8")

# ---- Command line -------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, too."""
    def error(self, message):
        raise InputError(f"{message}; see `python {self.prog} --help`")

def add_command(commands, function):
    """A command for a function: its parameters are arguments, or options if they have a default.
    An annotation is the type: a list takes several words, a typing.Literal one of its words."""
    text = inspect.getdoc(function)
    p = commands.add_parser(function.__name__.replace("_", "-"), description=text,
                            help=text.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    p.set_defaults(function=function)
    for name, parameter in inspect.signature(function).parameters.items():
        default, kind = parameter.default, parameter.annotation
        option = "--" + name.replace("_", "-")
        extra = {"nargs": "+"} if kind is list else {}
        if default is parameter.empty:
            p.add_argument(name, **extra)
        elif default is False:
            p.add_argument(option, action="store_true")
        elif typing.get_args(kind):
            p.add_argument(option, default=default, choices=typing.get_args(kind))
        else:
            kind = {parameter.empty: type(default), list: str}.get(kind, kind)
            p.add_argument(option, type=kind, default=default, help=f"default: {default}", **extra)

def command_line(*functions, argv=None):
    """Run the one of the functions that the command line names, with the settings there.
    Returns the exit code: 0 done, 1 the work failed, 2 bad input, 130 interrupted."""
    sys.stdout.reconfigure(errors="replace")            # for an ASCII terminal
    parser = Parser()
    commands = parser.add_subparsers(required=True)
    for function in functions:
        add_command(commands, function)
    try:
        settings = vars(parser.parse_args(argv))
        for key, value in settings.items():
            lowest = 0 if key in ("seed", "test") else 1
            if type(value) is int and value < lowest:
                raise InputError(f"--{key.replace('_', '-')} {value}; expected {lowest} or more")
            if key == "width" and value % 8:            # GroupNorm splits the channels
                raise InputError(f"--width {value}; expected a multiple of 8")
        settings.pop("function")(**settings)
        return 0
    except BrokenPipeError:                             # `... | head` has read enough
        sys.stdout = open(os.devnull, "w")
        return 1
    except (InputError, OSError, UnicodeError) as error:
        code, line = 2, error
    except (FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        code, line = 1, error
    except KeyboardInterrupt:
        code, line = 130, "interrupted; the same command continues a training"
    print(f"{parser.prog}: {line}", file=sys.stderr)
    return code

def phantom(out="data", train=1000, test=2000, size=64, seed=0, shift=1.0, balance: str = None,
            rare: int = None, attribute="race"):
    """Draw phantom patients: OUT/train.npz and, unless --test is 0, OUT/test.npz.
    shift: how far the races differ; balance: a column whose groups are made equal in size; rare:
    so many Asian patients stay, others become White; attribute: the column in the picture."""
    seed = 4 * seed + 2 * bool(balance)                 # the three sets of a seed share nobody
    parts = {"train": make_phantom(train, size, seed, shift, balance, rare)}
    if test:
        parts["test"] = make_phantom(test, size, seed + 1, shift, balance)
    save_parts(out, balance or attribute, **parts)

def mix(real, synthetic: list, out="mixed.npz", attribute="race", target: number_or("max") = None,
        n_real: int = None, seed=0):
    """Write the Equal Scale set (Eq. 6) of a real set and synthetic ones, and print the counts.
    target: images a group, or max: of the largest; n_real: draw so many real images first."""
    real, synthetic = load_set(real), concatenate(*map(load_set, synthetic))
    mixed = equal_scale(real, synthetic, attribute, target, seed, n_real)
    save_set(out, mixed)
    save_group_grid(f"{out}.png", mixed, attribute)
    for name in group_codes(real, attribute)[1]:
        own = mixed["synthetic"][mixed[attribute] == name]
        print(f"{name}: {(~own).sum()} real and {own.sum()} synthetic images")

if __name__ == "__main__":
    sys.exit(command_line(phantom, fairseg, images, split, export, mix, report))
