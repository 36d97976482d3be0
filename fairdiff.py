"""The two ends of FairDiff: data in, Equal Scale and the report out (Sections 2.1, 2.4 and 3.1).

    python fairdiff.py phantom --out data --train 1000 --test 2000 --size 64     a stand-in for patients
    python fairdiff.py fairseg FOLDER --out data --size 224                      Harvard-FairSeg
    python fairdiff.py images IMAGES MASKS GROUPS.csv --out data --size 64       your own pictures
    python fairdiff.py mix data/train.npz synthetic.npz --attribute race --out mixed.npz        Eq. 6

The file begins with the method, Equal Scale, and the dataset file that everything here is about. The phantom
is a caricature for teaching and testing, no medical evidence; one core draws 250 images of 64 px a second.
The end of the file is what the trainings share: device, checkpoint, EMA, pictures and the command line.
"""
import argparse
import base64
import contextlib
import copy
import csv
import html
import math
import os
import pathlib
import re
import sys
import time
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

class InputError(Exception):
    """Bad input: one line that says what was found, what was expected and what to do. Exit code 2."""


# -----------------------------------------------------------------------------
# Equal Scale (Section 2.4, Eq. 6)

def equal_scale(real, synthetic, attribute, target=None, seed=0, n_real=None):
    """Top up every group to the same size: D = union over g of (D*_g,real + D*_g,synthetic), Eq. 6.

    real, synthetic: datasets; target: images a group, None: round(N_real / G), "max": the largest group;
    n_real: first draw so many real images in natural proportion. Larger groups are cut by random choice. No
    image occurs twice. Returns a dataset in random order. InputError where synthetic images are lacking.
    """
    rng = np.random.default_rng(seed)
    code, names = group_codes(real, attribute)
    synthetic_code, _ = group_codes(synthetic, attribute, names)
    pool = rng.permutation(np.flatnonzero(code >= 0))[:n_real]
    sizes = np.bincount(code[pool], minlength=len(names))
    if target is None:
        target = round(len(pool) / len(names))
    elif target == "max":
        target = sizes.max()
    keep_real, keep_synthetic = [], []
    for g, name in enumerate(names):
        need = max(0, target - sizes[g])
        drawn = rng.permutation(np.flatnonzero(synthetic_code == g))
        if len(drawn) < need:
            raise InputError(f"group {name}: {need} synthetic images needed, {len(drawn)} found; generate "
                             f"more with `python pointdiff.py sample --group '{name}' --n {need}`")
        keep_real.append(pool[code[pool] == g][:target])                # D*_g,real
        keep_synthetic.append(drawn[:need])                             # D*_g,synthetic
    mixed = concatenate(subset(real, np.concatenate(keep_real)),
                        subset(synthetic, np.concatenate(keep_synthetic)))          # Eq. 6
    return subset(mixed, rng.permutation(len(mixed["name"])))


# -----------------------------------------------------------------------------
# A dataset: image, mask uint8 (N, H, W), name text (N,), synthetic bool (N,), and group columns, text (N,)

def group_columns(data):
    """Names of a dataset's group columns: every text array but the names of images and patients."""
    return [key for key in data if key not in ("image", "mask", "name", "synthetic", "patient")]

def group_codes(data, attribute, names=None):
    """The group of every image: codes int (N,), -1 unknown, and the names that they stand for.

    names: sorted, or those given. InputError where the column is missing or nobody's group is known.
    """
    if attribute not in group_columns(data):
        raise InputError(f"no group column {attribute!r}; found {', '.join(group_columns(data)) or 'none'}: "
                         "choose one as --attribute")
    column = data[attribute].tolist()
    names = list(names or sorted(set(column) - {""}))
    if not names:
        raise InputError(f"group column {attribute!r} is empty; expected a group for some images")
    return np.array([names.index(name) if name in names else -1 for name in column], int), names

def check_set(data, where):
    """Fill in what a dataset may lack and check it; InputError names what is wrong in `where`."""
    for key in ("image", "mask"):
        array = data.get(key, np.zeros(0))
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape != data["image"].shape:
            raise InputError(f"{where}: {key} is {array.dtype} {array.shape}; expected image and mask, both "
                             "uint8 (N, H, W)")
    n = len(data["image"])
    if n == 0 or data["mask"].max() > 2:
        raise InputError(f"{where}: {n} images, labels {np.unique(data['mask'])[:9]}; expected images, and "
                         "labels 0 background, 1 rim, 2 cup")
    data = {"name": np.char.zfill(np.arange(n).astype(str), 6), "synthetic": np.zeros(n, bool)} | data
    for key in data.keys() - {"image", "mask", "synthetic"}:
        column = np.asarray(data[key])
        if column.shape != (n,) or column.dtype.kind not in "Uiub":
            raise InputError(f"{where}: {key} is {column.dtype} {column.shape}; expected text ({n},)")
        unknown = column.dtype.kind == "i" and column < 0               # codes are read as text
        data[key] = np.where(unknown, "", column.astype(str))
    if len(set(data["name"].tolist())) < n:
        raise InputError(f"{where}: some names occur twice; expected a name of its own for every image")
    return data

def load_set(path):
    """Read a dataset file and check it, once and for all. InputError where it is missing or malformed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such dataset; expected a path that an earlier stage wrote") from None
    except Exception as error:                                          # zip and numpy raise a dozen types
        raise InputError(f"{path}: not a readable .npz of plain arrays ({error})") from None
    return check_set(data, path)

def save_set(path, data):
    """Check a dataset and write it, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **check_set(data, path))

def subset(data, index):
    """The rows of a dataset that index, int or bool, selects."""
    return {key: array[index] for key, array in data.items()}

def concatenate(*sets):
    """Datasets of one image size as one; a group column that some of them lack is unknown there."""
    sizes = {data["image"].shape[1:] for data in sets}
    if len(sizes) > 1:
        raise InputError(f"images of {sorted(sizes)} pixels; expected one size in all sets")
    joined = {}
    for key in dict.fromkeys(key for data in sets for key in data):
        parts = [data.get(key, np.full(len(data["name"]), "")) for data in sets]
        joined[key] = np.concatenate(parts)
    return check_set(joined, "the sets together")

def split_rows(data, share, attribute, seed=0):
    """Row numbers (train, held out): a share of the patients of every group is held out."""
    patient = data.get("patient", data["name"])
    patient = np.where(patient == "", data["name"], patient)            # unknown: a patient of its own
    _, first, number = np.unique(patient, return_index=True, return_inverse=True)
    group = data[attribute][first]
    held_out = np.zeros(len(group), bool)
    for name in np.unique(group):
        members = np.random.default_rng(seed).permutation(np.flatnonzero(group == name))
        held_out[members[:round(share * len(members))]] = True
    return np.flatnonzero(~held_out[number]), np.flatnonzero(held_out[number])

@contextlib.contextmanager
def replacing(path):
    """A temporary path that takes the place of `path` if the block succeeds, and vanishes if it fails."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")      # same folder: rename is atomic
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

# -----------------------------------------------------------------------------
# The phantom: fundus-like images of three races that differ in anatomy and in appearance

MARGINALS = {                       # about as in Harvard-FairSeg; the share that is missing is unknown
    "race": {"Asian": 0.092, "Black": 0.148, "White": 0.760},
    "gender": {"Female": 0.585, "Male": 0.415},
    "ethnicity": {"Non-Hispanic": 0.94, "Hispanic": 0.04},
    "language": {"English": 0.924, "Spanish": 0.015, "Others": 0.010},
    "maritalstatus": {"Married": 0.58, "Not married": 0.40},
    "age": {"<60": 0.49, ">=60": 0.51},
}
PHANTOM = {                         # only race has an effect. Lengths in image widths, grey in [0, 1]
    #           Asian  Black  White
    "radius":  (0.200, 0.215, 0.200),       # mean radius of the disc
    "ratio":   (0.48, 0.61, 0.54),          # cup-to-disc ratio
    "aspect":  (1.18, 1.05, 1.08),          # height over width of the disc
    "tilt":    (0.35, 0.10, 0.00),          # of its long axis, radians
    "fundus":  (0.45, 0.26, 0.38),          # grey of the background
    "rim":     (0.18, 0.17, 0.18),          # the rim against the background
    "cup":     (-0.16, 0.14, 0.18),         # the cup against the rim: in the rare group it is darker
    "vessel":  (0.55, 0.40, 0.48),          # share of the light that a vessel takes away
}

def phantom_traits(race, shift):
    """The parameters of one race; with shift 0 those of the mean patient."""
    shares = MARGINALS["race"]
    own = list(shares).index(race)
    traits = {}
    for key, values in PHANTOM.items():
        mean = np.dot(list(shares.values()), values)
        traits[key] = mean + shift * (values[own] - mean)
    return traits

def inside_ellipse(rng, size, centre, radius, aspect, tilt, wave):
    """The pixels of a wavy, tilted ellipse, bool (size, size)."""
    c = (np.arange(size) + 0.5) / size
    dx, dy = c[None] - centre[0], c[:, None] - centre[1]
    u = np.cos(tilt) * dx + np.sin(tilt) * dy                           # along the short axis
    v = np.cos(tilt) * dy - np.sin(tilt) * dx                           # along the long axis
    angle = np.arctan2(v, u)
    ripple = 1.0
    for k in (2, 3, 4):
        ripple = ripple + rng.normal(0, wave / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u * np.sqrt(aspect), v / np.sqrt(aspect)) < radius * ripple

def phantom_mask(rng, size, traits):
    """One mask uint8 (size, size): the disc, and a cup that wanders in it."""
    centre = 0.5 + rng.normal(0, 0.035, 2)
    radius = traits["radius"] * np.exp(rng.normal(0, 0.09))
    aspect = traits["aspect"] * np.exp(rng.normal(0, 0.04))
    tilt = rng.normal(0, 0.15) + rng.choice((-1, 1)) * traits["tilt"]
    disc = inside_ellipse(rng, size, centre, radius, aspect, tilt, 0.025)
    ratio = np.clip(traits["ratio"] + rng.normal(0, 0.085), 0.25, 0.82)
    centre = centre + np.clip(rng.normal(0, 0.3, 2), -0.4, 0.4) * (1 - ratio) * radius
    cup = inside_ellipse(rng, size, centre, ratio * radius, 1 + 0.6 * (aspect - 1), tilt, 0.04)
    return disc.astype(np.uint8) + (cup & ndimage.binary_erosion(disc))

def draw_vessels(rng, size, centre, radius):
    """Vessels in [0, 1] (size, size): trunks that leave the disc up and down, branches and twigs."""
    fine = max(2, 256 // size) * size                                   # drawn fine, then averaged
    canvas = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(canvas)
    up = np.repeat((-1, 1), 4)
    side = np.tile((-1, -1, 1, 1), 2)                                   # an artery and a vein each
    heading = up * (np.pi / 2 - side * rng.normal(0.45, 0.3, 8))
    bend = up * side * rng.normal(-0.02, 0.02, 8)
    width = rng.uniform(0.10, 0.17, 8) * radius
    start = np.tile(centre, (8, 1))
    for forks in (2, 1, 0):                                             # trunks, branches, twigs
        angle = heading[:, None] + rng.normal(bend[:, None], 0.09, (len(bend), 22)).cumsum(1)
        steps = 0.035 * np.stack([np.cos(angle), np.sin(angle)], 2)
        path = start[:, None] + steps.cumsum(1)                         # (vessels, 22, 2)
        for points, w in zip((path * fine).reshape(-1, 44).tolist(), width, strict=True):
            for i in (0, 20):                                           # vessels thin out
                pen.line(points[i:i + 24], fill=255, width=max(1, round(w * (1 - i / 50) * fine)))
        parent = np.repeat(np.arange(len(bend)), forks)
        at = rng.integers(5, 20, len(parent))
        start = path[parent, at]
        turn = rng.choice((-1, 1), len(parent)) * rng.uniform(0.4, 0.9, len(parent))
        heading = angle[parent, at] + turn
        bend = -0.5 * bend[parent]
        width = 0.62 * width[parent]
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255

def random_field(rng, size, cells):
    """A smooth random field (size, size) with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))

def phantom_image(rng, mask, traits):
    """A grey image uint8 (S, S) as a scanning laser ophthalmoscope might see over a mask (S, S)."""
    size = len(mask)
    centre = np.full(2, 0.5)
    if mask.any():
        centre = (np.array(ndimage.center_of_mass(mask > 0))[::-1] + 0.5) / size
    radius = np.sqrt((mask > 0).mean() / np.pi)
    blur = 0.013 * np.exp(rng.normal(0, 0.2)) * size
    disc = ndimage.gaussian_filter((mask > 0).astype(np.float32), blur)
    cup = ndimage.gaussian_filter((mask == 2).astype(np.float32), 1.15 * blur)
    image = traits["fundus"] + rng.normal(0, 0.035)
    image = image + 0.022 * random_field(rng, size, 6) + 0.018 * random_field(rng, size, 20)
    image += (traits["rim"] + rng.normal(0, 0.025)) * disc * (1 + 0.12 * random_field(rng, size, 5))
    image += (traits["cup"] + rng.normal(0, 0.03)) * cup
    vessels = ndimage.gaussian_filter(draw_vessels(rng, size, centre, radius), 0.004 * size)
    image *= 1 - traits["vessel"] * vessels * (1 - 0.35 * cup)          # fainter inside the cup
    c = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = rng.normal(0, 0.25, 2)                                       # the light is not centred
    light = 1.06 - 0.17 * ((c[None] - x) ** 2 + (c[:, None] - y) ** 2)
    speckle = ndimage.gaussian_filter(rng.standard_normal((size, size)), 0.5)
    image = np.clip(image * light, 0.02, 1) * (1 + 0.13 * speckle)      # speckle scales with the light
    return np.clip(255 * image, 0, 255).astype(np.uint8)

def render_phantom(mask, race, seed, shift=1.0):
    """The phantom's images uint8 (N, S, S) over masks (N, S, S) of patients of a race, text (N,).

    Image i depends on (seed, i), its mask and its race alone. shift 0: all races look alike.
    """
    images = np.empty(mask.shape, np.uint8)
    for i in range(len(mask)):
        rng = np.random.default_rng((seed, 1, i))
        images[i] = phantom_image(rng, mask[i], phantom_traits(race[i], shift))
    return images

def make_phantom(n, size, seed, shift=1.0, balance=None, rare=None):
    """A dataset of n phantom patients, size x size pixels, the same for the same seed.

    shift: how far the races differ; balance: a column whose groups are made equally large; rare: how many
    of the rarest race stay, the others become of the most frequent one.
    """
    rng = np.random.default_rng((seed, 2))
    data = {"name": np.array([f"phantom-{seed}-{i:05d}" for i in range(n)])}
    for attribute, shares in MARGINALS.items():
        code = np.arange(n) % len(shares)
        if attribute != balance:        # quotas: a seed changes who is in a group, not how many
            code = np.searchsorted(np.cumsum(list(shares.values())), (np.arange(n) + 0.5) / n)
        data[attribute] = rng.permutation(np.array([*shares, ""])[code])
    if rare is not None:                # the patients of --rare 10 are among those of --rare 30
        data["race"][np.flatnonzero(data["race"] == "Asian")[rare:]] = "White"
    data["mask"] = np.empty((n, size, size), np.uint8)
    for i, race in enumerate(data["race"]):
        rng = np.random.default_rng((seed, 0, i))
        data["mask"][i] = phantom_mask(rng, size, phantom_traits(race, shift))
    data["image"] = render_phantom(data["mask"], data["race"], seed, shift)
    return check_set(data, "the phantom")

# -----------------------------------------------------------------------------
# Import and export

FAIRSEG_IMAGE = ("slo_fundus", "fundus_slo", "fundus")                  # keys seen in its releases
FAIRSEG_MASK = ("disc_cup_mask", "disc_cup", "disc_cup_borders", "slo_disc_cup")
FAIRSEG_GROUPS = {                                                      # names by code, -1 is unknown
    "race": ("Asian", "Black", "White"),                                # or codes 2, 3, 7 for these
    "gender": ("Female", "Male"),
    "ethnicity": ("Non-Hispanic", "Hispanic"),
    "language": ("English", "Spanish", "Others"),
    "maritalstatus": ("Married", *["Not married"] * 4),
}

def to_grey(array):
    """A picture (H, W), (H, W, 3 or 4) or (1 or 3, H, W) of numbers as grey uint8 (H, W): its luminance."""
    array = np.squeeze(array)
    if array.ndim == 3 and array.shape[0] == 3:
        array = np.moveaxis(array, 0, 2)
    if array.dtype.kind in "bf" and array.max() <= 1:
        array = array * 255.0
    elif array.max() > 255:                                             # 16 bits
        array = array / 257.0
    array = array.clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(array[..., :3]).convert("L")) if array.ndim == 3 else array

def crop_and_resize(image, mask, crop, size):
    """Cut a square out of image and mask, uint8 (H, W), and resize both to size x size.

    crop: the side of the largest centred square, or "disc": a square around the disc.
    """
    h, w = mask.shape
    side = min(h, w) if crop == "disc" else min(h, w, int(crop))
    top, left = (h - side) / 2, (w - side) / 2
    if crop == "disc" and mask.any():
        y, x = np.nonzero(mask)
        side = min(h, w, 2.5 * max(np.ptp(y), np.ptp(x)) + 1)
        top = np.clip((y.min() + y.max() - side) / 2, 0, h - side)
        left = np.clip((x.min() + x.max() - side) / 2, 0, w - side)
    box = (left, top, left + side, top + side)
    image = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3)
    mask = Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST, box)
    return np.asarray(image), np.asarray(mask)

def read_all(args, names, read):
    """A dataset of what read(name) returns for all names, and whether each mask had a disc before cropping.

    read: image and mask uint8 (H, W), and a dict of the patient's groups.
    """
    images, masks, rows, had_disc, bad = [], [], [], [], []
    for name in tqdm(names, "import"):
        try:
            image, mask, groups = read(name)
        except Exception as error:                                      # damaged files raise a dozen types
            bad.append(f"{name}: {error}")
            continue
        had_disc.append(mask.any())
        image, mask = crop_and_resize(image, mask, args.crop, args.size)
        images.append(image)
        masks.append(mask)
        rows.append({"name": pathlib.Path(name).stem} | groups)
    if bad:
        print("\n".join(bad))
        if not args.skip_bad or not rows:
            raise InputError(f"{len(bad)} of {len(names)} files cannot be used, such as {bad[0]}; mend them "
                             "or leave them out with --skip-bad")
    data = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return data | {"image": np.stack(images), "mask": np.stack(masks)}, np.array(had_disc)

def save_split(args, data, had_disc=True, split=None):
    """Check, describe and write a set in two parts; without a split a share of the patients is for testing."""
    data = check_set(data, args.out)
    sanity_report(data, had_disc)
    stratum = args.attribute or (group_columns(data) or ["name"])[0]
    if args.attribute:
        group_codes(data, args.attribute)
    train, test = split_rows(data, args.test_share, stratum)
    if split is not None and (split != "").any():
        train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    for part, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise InputError(f"{args.out}: no image is left to {part}; expected some in both parts")
        save_set(f"{args.out}/{part}.npz", subset(data, rows))
        print(f"{args.out}/{part}.npz: {len(rows)} images")
    print(f"{len(data['name']) - len(train) - len(test)} images in neither part")
    save_group_grid(f"{args.out}/train.npz.png", subset(data, train), stratum)

def sanity_report(data, had_disc):
    """Print what is in a set, after cropping, and warn of what looks wrong; had_disc: before, bool (N,)."""
    mask = data["mask"]
    border = np.concatenate([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1)
    disc = mask.any((1, 2))
    cut = border.any(1)
    hole = [(ndimage.binary_fill_holes(m == 2) & (m == 0)).any() for m in mask]
    print(f"{len(mask)} images, labels {np.unique(mask)}; masks without disc {(~disc).sum()}, without cup "
          f"{(~(mask == 2).any((1, 2))).sum()}, cut by the border {cut.sum()}")
    for key in group_columns(data):
        groups, counts = np.unique(data[key], return_counts=True)
        print(f"  {key}: " + ", ".join(map("{} {}".format, np.where(groups == "", "?", groups), counts)))
    for text, found, tolerance in (
            ("lost their disc in the crop", had_disc & ~disc, 0.01),
            ("have a disc that the border cuts", cut, 0.01),
            ("have a cup at the border or around background, see --labels", (border == 2).any(1) | hole, 0),
            ("are constant", np.ptp(data["image"], axis=(1, 2)) == 0, 0)):
        if found.sum() > tolerance * len(mask):
            print(f"warning: {found.sum()} images {text}: {', '.join(data['name'][found][:5])}")

def patient_name(text):
    """The name in a path, without folder, .npz and padding of numbers: lists write 5 digits or 6."""
    stem = text.strip().replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".npz")
    return re.sub(r"\d+", lambda digits: str(int(digits[0])), stem)

def fairseg_split(folder, lists):
    """"train" or "test" by patient name, from TRAIN.txt and TEST.txt or a SUMMARY.csv with a column train.

    lists: their paths; None: those that lie in the folder, if any.
    """
    usual = [folder / "train.txt", folder / "test.txt", folder / "data_summary.csv"]
    lists = [pathlib.Path(path) for path in lists or [path for path in usual if path.is_file()][:2]]
    part_of = {}
    if len(lists) == 2:
        for path, part in zip(lists, ("train", "test"), strict=True):
            for patient in {patient_name(line) for line in path.open() if line.strip()}:
                if part_of.setdefault(patient, part) != part:
                    raise InputError(f"{path}: {patient} is in both lists; expected it in one")
    elif lists and lists[0].suffix == ".csv":
        for row in csv.DictReader(lists[0].open(encoding="utf-8-sig")):
            part = "train" if row.get("train", "").lower() in ("1", "true") else "test"
            part_of |= {patient_name(field): part for field in row.values()}
    elif lists:
        raise InputError(f"{lists[0]}: a list for one part alone; expected --split TRAIN.txt TEST.txt, or a "
                         "SUMMARY.csv with a column train")
    return part_of

def fairseg(args):
    """Import a folder of Harvard-FairSeg files."""
    folder = pathlib.Path(args.folder)
    paths = sorted(path for path in folder.rglob("*.npz") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{folder}: no .npz files; expected Harvard-FairSeg's data_00001.npz, ...")
    part_of = fairseg_split(folder, args.split)
    folders = {"Training": "train", "Test": "test"}

    def read(path):
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
        image = next((to_grey(found[key]) for key in FAIRSEG_IMAGE if key in found), None)
        mask = next((np.squeeze(found[key]) for key in FAIRSEG_MASK if key in found), None)
        if image is None or mask is None or image.shape != mask.shape or np.abs(mask).max() > 2:
            raise ValueError(f"{', '.join(f'{k} {v.shape}' for k, v in found.items())}; expected slo_fundus and "
                             "disc_cup_mask of one shape with labels 0, -1, -2")
        groups = {"split": part_of.get(patient_name(path.name), folders.get(path.parent.name, ""))}
        for key, names in FAIRSEG_GROUPS.items():
            alias = {"gender": "male", "ethnicity": "hispanic"}.get(key)
            code = int(np.ravel(found.get(key, found.get(alias, -1)))[0])
            groups[key] = names[code] if 0 <= code < len(names) else f"code {code}" * (code > 0)
        age = float(np.ravel(found.get("age", -1))[0])
        age = age / 365.25 if age > 150 else age                        # one release counts days
        groups["age"] = "" if age <= 0 else "<60" if age < 60 else ">=60"
        return image, np.abs(mask).astype(np.uint8), groups             # -1 rim, -2 cup, or 1 and 2

    data, had_disc = read_all(args, paths, read)
    if np.isin(data["race"], ("code 3", "code 7")).any():               # the book in which Asian is 2
        book = {"White": "Asian", "code 3": "Black", "code 7": "White"}
        data["race"] = np.array([book.get(name, "") for name in data["race"]])
    save_split(args, data, had_disc, data.pop("split"))

def images(args):
    """Import pictures, masks of the same name, and a table whose first column names the file."""
    with open(args.groups, newline="", encoding="utf-8-sig") as file:
        table = {next(iter(row.values())): row for row in csv.DictReader(file)}
    labels = [int(value) for value in args.labels.split(",")]
    folders = {}
    for folder in (args.images, args.masks):
        folders[folder] = {path.stem: path for path in sorted(pathlib.Path(folder).glob("[!.]*"))}

    def read(name):
        stem = name if name in folders[args.images] else pathlib.Path(name).stem
        picture = Image.open(folders[args.images][stem])
        if picture.mode == "P" or args.channel == "green":
            picture = picture.convert("RGB")
        image = np.asarray(picture)[..., 1] if args.channel == "green" else to_grey(np.asarray(picture))
        mask = Image.open(folders[args.masks][stem])
        mask = np.asarray(mask.convert("L") if mask.mode.startswith("RGB") else mask).astype(int)
        if mask.shape != image.shape or not np.isin(mask, labels).all():
            raise ValueError(f"image {image.shape}, mask {mask.shape} with values {np.unique(mask)[:6]}; "
                             f"expected one shape and the values {labels}, see --labels")
        mask = np.select([mask == value for value in labels], range(len(labels)))
        return image, mask.astype(np.uint8), dict(list(table[name].items())[1:])

    data, had_disc = read_all(args, list(table), read)
    print(f"{len(folders[args.images]) - len(data['name'])} pictures are not in {args.groups}")
    save_split(args, data, had_disc, data.pop("split", None))

def split(args):
    """Check a dataset of one's own, a file or a folder with train.npz and test.npz, and split it in two."""
    if not os.path.isdir(args.set):
        return save_split(args, load_set(args.set))
    train, test = load_set(f"{args.set}/train.npz"), load_set(f"{args.set}/test.npz")
    parts = np.repeat(["train", "test"], [len(train["name"]), len(test["name"])])
    save_split(args, concatenate(train, test), split=parts)

def export(args):
    """Write a dataset as Harvard-FairSeg files, or with --png as pictures."""
    data, folder = load_set(args.set), pathlib.Path(args.folder)
    for path in (folder / "image", folder / "mask") if args.png else (folder,):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise InputError(f"{path}: holds files; expected a new or empty folder, or patients would mix")
    for i in tqdm(range(len(data["name"])), "export"):
        patient = subset(data, i)
        if args.png:
            Image.fromarray(patient["image"]).save(folder / f"image/{i + 1:05d}.png")
            Image.fromarray(patient["mask"]).save(folder / f"mask/{i + 1:05d}.png")
            continue
        arrays = {"age": {"<60": 50, ">=60": 70}.get(str(patient.get("age")), -1)}  # a year of each group
        for key, names in FAIRSEG_GROUPS.items():
            arrays[key] = names.index(patient[key]) if patient.get(key) in names else -1
        arrays |= dict.fromkeys(FAIRSEG_IMAGE, patient["image"])
        arrays |= dict.fromkeys(FAIRSEG_MASK, -patient["mask"].astype(np.int16))
        np.savez_compressed(folder / f"data_{i + 1:05d}.npz", **arrays)
    print(f"{folder}: {len(data['name'])} images")

# -----------------------------------------------------------------------------
# What the trainings share

SAVE_EVERY = 200                                                        # steps between checkpoints

def setup(name):
    """Choose where to compute; under torchrun join the other processes. Returns the device and their number.

    name: "auto" or any device that torch knows. Only the process of rank 0 prints and saves.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; expected one that works") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))             # the cores this process may use
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if torch.distributed.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device, world

def autocast(device):
    """Mixed precision with bf16 where the hardware multiplies it; elsewhere it is emulated and slow."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)

def fingerprint(*arrays):
    """A checksum, by which a checkpoint knows the set or the network that it was trained on."""
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))

class Run:
    """One training: network, the EMA of its weights, optimizer, step and losses, in one checkpoint file.

    Continues an interrupted training of the same config. Everything random in a step comes from (seed,
    step), so that on a CPU it ends bit for bit like an unbroken one. InputError if the config differs.
    """
    def __init__(self, path, config, net, optimizer, decay):
        self.path, self.config, self.net, self.optimizer, self.decay = path, config, net, optimizer, decay
        self.ema = copy.deepcopy(net).requires_grad_(False)
        self.step = 0
        self.losses = []
        self.rank = int(os.environ.get("RANK", 0))
        if not os.path.exists(path):
            return
        state = load_checkpoint(path)
        for key, value in config.items():
            old = state["config"].get(key)
            if old != value:
                raise InputError(f"{path}: made with {key} {old}, now {value}; expected the same, or another --out")
        net.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]

    def steps(self):
        """Yield the steps that are left, each with its own seed; save now and then and at the end."""
        total = self.config["steps"]
        bar = tqdm(range(self.step, total), self.config["kind"], total, initial=self.step, disable=self.rank > 0 or None)
        for step in bar:
            numbers = np.random.SeedSequence((self.config["seed"], step, self.rank))
            torch.manual_seed(int(numbers.generate_state(1)[0]))
            yield step
            self.step = step + 1
            if self.step % SAVE_EVERY == 0 or self.step == total:
                self.save()

    def update(self, loss):
        """Move the EMA towards the weights and log the loss; FloatingPointError where it is not finite.

        The decay warms up as (1 + step) / (10 + step), so that a short training forgets its start.
        """
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = self.net.state_dict()
        for name, average in self.ema.state_dict().items():
            if average.is_floating_point():
                average.lerp_(weights[name], 1 - keep)
        if self.step % 50 == 49 or self.step + 1 == self.config["steps"]:
            self.losses.append([self.step + 1, loss.item()])
            if not all(torch.isfinite(value).all() for value in (loss, *weights.values())):
                raise FloatingPointError(f"the loss became {loss.item()} by step {self.step + 1}; {self.path} "
                                         "keeps the last good state: try a smaller --lr")

    def save(self):
        """Write the checkpoint, whole or not at all."""
        if self.rank == 0:
            state = {"config": self.config, "step": self.step, "losses": self.losses,
                     "model": self.net.state_dict(), "ema": self.ema.state_dict(),
                     "optimizer": self.optimizer.state_dict()}
            with replacing(self.path) as temporary:
                torch.save(state, temporary)

def load_checkpoint(path, kinds=()):
    """Read a checkpoint without running pickled code; with kinds, a finished one of these kinds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = state["config"]
    except Exception as error:                                          # torch raises a dozen types
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: {reason}; expected a checkpoint: run its train command") from None
    if kinds and (config["kind"] not in kinds or state["step"] < config["steps"]):
        raise InputError(f"{path}: {config['kind']} after {state['step']} of {config['steps']} steps; expected "
                         f"a finished {' or '.join(kinds)}: run its train command")
    return state

# -----------------------------------------------------------------------------
# Pictures and report

def overlay(image, mask):
    """RGB uint8 (H, W, 3): a grey image (H, W) with the outlines of its disc, blue, and cup, orange."""
    rgb = np.repeat(image[..., None], 3, 2)
    for label, colour in ((1, (80, 170, 255)), (2, (255, 190, 60))):
        region = mask >= label
        rgb[region & ~ndimage.binary_erosion(region)] = colour
    return rgb

def save_grid(path, rows, labels, note=""):
    """Write a PNG with one labelled row of pictures, uint8 (H, W) or (H, W, 3) of one size, per entry."""
    h, w = rows[0][0].shape[:2]
    zoom = max(1, 128 // h)
    left = 20 + 8 * max(map(len, labels))
    size = (left + max(map(len, rows)) * (w * zoom + 2), 20 + len(rows) * (h * zoom + 2))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    pen.text((6, 3), note, "black", font_size=12)
    for i, row in enumerate(rows):
        y = 20 + i * (h * zoom + 2)
        pen.text((6, y + h * zoom // 2 - 8), labels[i], "black", font_size=13)
        for j, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
            grid.paste(tile, (left + j * (w * zoom + 2), y))
    with replacing(path) as temporary:
        grid.save(temporary, "PNG")

def save_group_grid(path, data, attribute):
    """Write a PNG of eight images of every group of a set, and below each the same with its outlines."""
    rows, labels = [], []
    for name in np.unique(data[attribute])[:12]:
        part = subset(data, np.flatnonzero(data[attribute] == name)[:8])
        rows += [list(part["image"]), list(map(overlay, part["image"], part["mask"]))]
        labels += [name or "unknown", ""]
    save_grid(path, rows, labels)

COLOURS = ("#3b82c4", "#d9770a", "#2f9e6e", "#c2508f", "#8b6fd0", "#b0912b", "#5aa9b5", "#888888")

def dice_chart(path):
    """SVG of results.csv: the mean Dice of every group, a colour each, by method, with 95 % intervals."""
    with open(path, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["structure"], row["metric"]) == ("mean", "dice")]
    last = {(row["method"], row["group"]): row for row in rows}         # of several trainings their mean
    numbers = ("overall", "es", "sd", "worst", "gap", "eq1", "p")
    groups = [name for name in dict.fromkeys(row["group"] for row in rows) if name not in numbers]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lowest = min(float(last[m, g]["lo"]) for m in methods for g in groups)
    bottom = math.floor(20 * lowest) / 20                               # to the next 0.05

    def y(value):
        return 30 + 240 * (1 - float(value)) / (1 - bottom)

    width = 80 + 100 * len(methods)
    out = [f"<svg viewBox='0 0 {width} 330' style='max-width:{width}px' role='img' font-size='13' "
           "fill='currentColor'><title>mean Dice of each group by method</title>"]
    for tick in np.arange(bottom, 1.001, 0.05):
        out.append(f"<path d='M50 {y(tick)}H{width}' stroke='currentColor' opacity='.2'/>"
                   f"<text x='44' y='{y(tick) + 4}' text-anchor='end'>{tick:.2f}</text>")
    for i, method in enumerate(methods):
        x = 100 + 100 * i
        out.append(f"<text x='{x}' y='290' text-anchor='middle'>{html.escape(method)}</text>")
        for j, group in enumerate(groups):
            row, at = last[method, group], x + 60 * ((j + 0.5) / len(groups) - 0.5)
            out.append(f"<g fill='{COLOURS[j % 8]}' stroke='{COLOURS[j % 8]}' stroke-width='2'><circle cx='{at}' "
                       f"cy='{y(row['value'])}' r='3'/><path d='M{at} {y(row['lo'])}V{y(row['hi'])}'/></g>")
    for j, group in enumerate(groups):
        out.append(f"<text x='{60 + j * (width - 60) // len(groups)}' y='318' fill='{COLOURS[j % 8]}'>"
                   f"&#9679; {html.escape(group)}</text>")
    return "\n".join([*out, "</svg>"])

SECTIONS = {                            # of the report: titles, then the logs and pictures below them
    "Result": ("log/table.txt",),
    "Data": ("log/data.txt", "data/train.npz.png"),
    "Points to masks (Section 2.2)": ("log/score-masks.txt", "masks.npz.png", "masks.csv.png"),
    "Masks to images (Section 2.3)": ("base.pt.png", "control.pt.png", "synthetic.npz.png"),
    "Are the images like real ones? (Table 1)": ("log/score-images.txt", "table1.csv.png"),
    "Equal Scale (Eq. 6)": ("log/mix.txt", "mixed.npz.png"),
    "Segmentations": ("plain.pt.png", "equal.pt.png"),
    "Seconds": ("log/seconds.txt",),
}

def report(args):
    """Write OUT/report.html: the result, the pictures and the tables of a run in one file."""
    out = pathlib.Path(args.out)
    if not (out / "results.csv").is_file():
        raise InputError(f"{out}: no results.csv; expected the folder of a finished `bash train.sh`")
    page = ["<!doctype html><html lang=en><meta charset=utf-8><title>FairDiff</title>"
            "<meta name=viewport content='width=device-width'><style>:root{color-scheme:light dark}"
            "body{font:16px/1.5 sans-serif;max-width:60em;margin:auto;padding:1em}pre{overflow-x:auto;"
            "font-size:13px}img{max-width:100%}</style><h1>FairDiff</h1>", dice_chart(out / "results.csv")]
    for title, names in SECTIONS.items():
        page.append(f"<h2>{title}</h2>")
        for path in [out / name for name in names]:
            if path.suffix == ".txt" and path.is_file():
                page.append(f"<pre>{html.escape(path.read_text(errors='replace'))}</pre>")
            elif path.is_file():
                code = base64.b64encode(path.read_bytes()).decode()
                page.append(f"<p><img alt='{path.name}' src='data:image/png;base64,{code}'>")
    with replacing(out / "report.html") as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    print(f"report: {out / 'report.html'}")

# -----------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and one method that adds a command."""
    def error(self, message):
        raise InputError(f"{message}; see `python {self.prog} --help`")

    def command(self, name, run, text):
        if self._subparsers is None:
            self.commands = self.add_subparsers(dest="command", required=True)
        p = self.commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        return p

def positive(text):
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)

def add_training_settings(p, steps, batch, lr):
    """The settings that all trainings share, with their defaults."""
    p.add_argument("--steps", type=positive, default=steps, help="optimizer steps")
    p.add_argument("--batch", type=positive, default=batch, help="items a step")
    p.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="draws weights, batches and noise")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (auto: cuda if there is one)")

def run_command(parser, argv):
    """Parse argv and call args.run(args). Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                            # an ASCII terminal
    try:
        args = parser.parse_args(argv)
        started = time.perf_counter()
        args.run(args)
        print(f"{parser.prog} {args.command}: {time.perf_counter() - started:.0f} s")
        return 0
    except BrokenPipeError:                                             # `... | head` has read enough
        sys.stdout = open(os.devnull, "w")
        return 1
    except (InputError, OSError) as error:
        code, line = 2, str(error)
    except (FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        code, line = 1, str(error)
    except KeyboardInterrupt:
        code, line = 130, "interrupted; the same command continues a training"
    print(f"{parser.prog}: {line}", file=sys.stderr)
    return code

def phantom(args):
    """Write OUT/train.npz and OUT/test.npz of phantom patients; with --test 0 the first one only."""
    if args.attribute not in (None, *MARGINALS):
        raise InputError(f"--attribute {args.attribute}: the phantom has {', '.join(MARGINALS)}")
    for number, (part, n) in enumerate((("train", args.train), ("test", args.test))):
        if n:                           # a natural and a balanced set of one seed share nobody
            seed = 4 * args.seed + number + 2 * bool(args.balance)
            data = make_phantom(n, args.size, seed, args.shift, args.balance, args.rare if part == "train" else None)
            save_set(f"{args.out}/{part}.npz", data)
            save_group_grid(f"{args.out}/{part}.npz.png", data, "race")
            print(f"{args.out}/{part}.npz")
            sanity_report(data, False)

def mix(args):
    """Write the Equal Scale set of a real set and synthetic ones, and print the counts."""
    real = load_set(args.real)
    synthetic = concatenate(*map(load_set, args.synthetic))
    target = args.target if args.target in (None, "max") else positive(args.target)
    mixed = equal_scale(real, synthetic, args.attribute, target, args.seed, args.n_real)
    save_set(args.out, mixed)
    order = np.argsort(~mixed["synthetic"], kind="stable")
    save_group_grid(f"{args.out}.png", subset(mixed, order), args.attribute)
    for name in group_codes(real, args.attribute)[1]:
        counts = [((data[args.attribute] == name) & (data["synthetic"] == kind)).sum()
                  for data, kind in ((real, False), (mixed, False), (mixed, True))]
        print(f"{name:<16}{counts[0]:>6} real before, {counts[1]:>6} real and {counts[2]:>6} synthetic after")

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="fairdiff.py", description="Data, Equal Scale and report of FairDiff.")
    p = parser.command("phantom", phantom, "draw phantom patients: a caricature, no medical evidence")
    p.add_argument("--train", type=positive, default=1000, help="training images")
    p.add_argument("--test", type=int, default=2000, help="test images")
    p.add_argument("--shift", type=float, default=1.0, help="how far the races differ; 0: not at all")
    p.add_argument("--balance", choices=MARGINALS, help="make the groups of this column equally large")
    p.add_argument("--rare", type=int, help="training images of the rarest race (default: 9.2 %%)")
    p.add_argument("--seed", type=int, default=0, help="draws everything")
    sources = [p]
    p = parser.command("fairseg", fairseg, "import Harvard-FairSeg files")
    p.add_argument("folder", help="one .npz a patient")
    p.add_argument("--split", nargs="+", help="TRAIN.txt TEST.txt or SUMMARY.csv (default: those in FOLDER)")
    sources.append(p)
    p = parser.command("images", images, "import pictures, masks and a table of groups")
    p.add_argument("images", help="folder of grey or colour pictures")
    p.add_argument("masks", help="folder of masks with the same names")
    p.add_argument("groups", help="CSV: the file's name, then group columns; also patient, split")
    p.add_argument("--labels", default="0,1,2", help="mask values of background, rim and cup")
    p.add_argument("--channel", choices=("luminance", "green"), default="luminance", help="of colour pictures")
    sources.append(p)
    p = parser.command("split", split, "check and split a dataset of one's own")
    p.add_argument("set", help="dataset .npz, or a folder with train.npz and test.npz")
    sources.append(p)
    for p in sources:
        p.add_argument("--out", default="data", help="folder for train.npz and test.npz")
        p.add_argument("--attribute", help="group column that must be there (default: the first)")
        p.add_argument("--files", help="a checksum of the files, to notice that they have changed")
        p.add_argument("--size", type=positive, default=64, help="pixels a side")
        p.add_argument("--crop", default="512", help="side of the centred square, or disc")
        p.add_argument("--test-share", type=float, default=0.2, help="of the patients, where no split is given")
        p.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used")
    p = parser.command("export", export, "write Harvard-FairSeg files or pictures")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("folder", help="a new folder")
    p.add_argument("--png", action="store_true", help="pictures, for other tools")
    p = parser.command("mix", mix, "Equal Scale, Eq. 6")
    p.add_argument("real", help="dataset .npz of real images")
    p.add_argument("synthetic", nargs="+", help="datasets .npz of synthetic images")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--target", help="images a group; max: the largest group (default: real images / groups)")
    p.add_argument("--n-real", type=positive, help="first draw so many real images in natural proportion")
    p.add_argument("--seed", type=int, default=0, help="draws who is kept")
    p.add_argument("--out", default="mixed.npz", help="the mixed dataset")
    p = parser.command("report", report, "write one page with everything that a run made")
    p.add_argument("out", help="the folder of the run")
    return run_command(parser, argv)

if __name__ == "__main__":
    sys.exit(main())
