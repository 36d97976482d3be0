"""FairDiff, the two ends of the pipeline: data in, Equal Scale, report out (Sections 2.1, 2.4, 3.1).

    python fairdiff.py phantom --out data --train 1000 --test 2000 --size 64  # a stand-in for Harvard-FairSeg
    python fairdiff.py fairseg FOLDER --out data --size 224               # the real thing, one .npz a patient
    python fairdiff.py mix data/train.npz synthetic.npz --attribute race --out mixed.npz              # Eq. 6

The phantom is a caricature for teaching and testing and no medical evidence. Its race groups differ in
anatomy and in appearance, all other attributes have no effect. One core draws 250 to 450 images of 64 px a
second.

The second half of the file is the common ground of the other four: the dataset file, the checkpoint, EMA, the
device, the preview sheet and the one-line error. Nothing here imports another file of the project.
"""
import argparse
import atexit
import base64
import collections
import contextlib
import csv
import glob
import html
import math
import os
import pathlib
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from importlib import metadata

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

INTERRUPTED = "interrupted; the same command again continues a training"
WORLD = int(os.environ.get("WORLD_SIZE", 1))                            # processes, and which one this is:
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0                      # torchrun sets both


def _one_line(kind, error, trace):
    """A Ctrl-C before a command has begun, as while torch is loaded, is no traceback either."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print(f"{pathlib.Path(sys.argv[0]).name}: {INTERRUPTED}", file=sys.stderr)


def _interrupt(*_):
    """Ctrl-C. Raised inside a callback it would be lost, so again two seconds later, until it is heard."""
    signal.alarm(2)
    raise KeyboardInterrupt


sys.excepthook = _one_line
warnings.filterwarnings("ignore", "Mean of empty slice")                # the NaN in the result says it
# N images, H W pixels, G groups. torch takes two seconds to import, so only the functions that need it do.

# ------------------------------------------------------------------------------------------------------------
# Attributes: the codes of Harvard-FairSeg (Section 3.1), in the order in which the paper prints them

ATTRIBUTES = {
    "race": ("Asian", "Black", "White"),
    "gender": ("Female", "Male"),
    "ethnicity": ("Non-Hispanic", "Hispanic"),
    "language": ("English", "Spanish", "Others"),
    "maritalstatus": ("Married or Partnered", "Single", "Divorced", "Widowed", "Legally Separated"),
}
ATTRIBUTE_NAMES = (*ATTRIBUTES, "age")


def group_codes(data, attribute):
    """Group of every image under one sensitive attribute.

    data: dataset dict; attribute: a key of ATTRIBUTES or "age".
    Returns codes int8 (N,), -1 unknown, and the tuple of group names. As in FairSeg, age is split at 60 years
    (60 counts as ">=60") and marital status into married or not. ValueError for another attribute.
    """
    if attribute == "age":
        age = data["age"]
        return np.where(np.isnan(age), -1, age >= 60).astype(np.int8), ("<60", ">=60")
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute {attribute!r} is none of {', '.join(ATTRIBUTE_NAMES)}")
    code = data[attribute].astype(np.int8)
    if attribute == "maritalstatus":
        return np.where(code < 0, -1, code > 0).astype(np.int8), ("Married", "Not married")
    return code, ATTRIBUTES[attribute]


# ------------------------------------------------------------------------------------------------------------
# Data: the phantom

# How often each code occurs, about as in Harvard-FairSeg; the missing share is unknown (-1).
MARGINALS = {
    "race": (0.092, 0.148, 0.760),
    "gender": (0.585, 0.415),
    "ethnicity": (0.94, 0.04),
    "language": (0.924, 0.015, 0.010),
    "maritalstatus": (0.58, 0.27, 0.07, 0.05, 0.01),
}

# What race shifts in the phantom. Lengths in image widths, grey values in [0, 1].
#              Asian  Black  White
PHANTOM = {
    "radius": (0.200, 0.215, 0.200),        # mean radius of the disc
    "cdr": (0.54, 0.60, 0.54),              # cup-to-disc ratio
    "aspect": (1.18, 1.05, 1.08),           # height over width of the disc
    "tilt": (0.35, 0.10, 0.00),             # its axis against the vertical, radians
    "pigment": (0.45, 0.26, 0.38),          # grey of the fundus beside the disc
    "rim": (0.18, 0.17, 0.18),              # the rim against the fundus
    "cup": (-0.16, 0.14, 0.18),             # the cup against the rim: in the rare group it is *darker*
    "blot": (0.19, -0.18, -0.16),           # a blot in the rim: what the cup is in the other groups
    "blur": (0.014, 0.013, 0.013),          # standard deviation of the edges
    "vessel": (0.55, 0.40, 0.48),           # share of the light that a vessel takes away
}


def _group_look(race, shift):
    """Phantom parameters of one group; shift 0, or an unknown group, gives the mean patient's."""
    mean = {k: float(np.dot(MARGINALS["race"], v)) for k, v in PHANTOM.items()}
    return mean if race < 0 else {k: mean[k] + shift * (v[race] - mean[k]) for k, v in PHANTOM.items()}


def _phantom_mask(rng, size, look):
    """One label map uint8 (size, size): two nested star-shaped outlines, slightly wavy."""
    c = (np.arange(size, dtype=np.float32) + 0.5) / size                # pixel centres in [0, 1]
    x, y = np.meshgrid(c, c)

    def inside(cx, cy, radius, aspect, tilt, wave):
        dx, dy = x - cx, y - cy
        u = np.cos(tilt) * dx + np.sin(tilt) * dy                       # short axis
        v = -np.sin(tilt) * dx + np.cos(tilt) * dy                      # long axis
        theta = np.arctan2(v, u)
        ripple = 1 + sum(rng.normal(0, wave / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
                         for k in (2, 3, 4))
        return np.hypot(u * np.sqrt(aspect), v / np.sqrt(aspect)) / (radius * ripple)      # < 1 inside

    cx, cy = 0.5 + rng.normal(0, 0.035, 2)
    radius = look["radius"] * np.exp(rng.normal(0, 0.09))
    aspect = look["aspect"] * np.exp(rng.normal(0, 0.04))
    tilt = rng.normal(0, 0.15) + rng.choice((-1, 1)) * look["tilt"]
    disc = inside(cx, cy, radius, aspect, tilt, 0.025)
    cdr = np.clip(look["cdr"] + rng.normal(0, 0.085), 0.25, 0.82)
    off = np.clip(rng.normal(0, 0.35, 2), -0.45, 0.45) * (1 - cdr) * radius      # the cup wanders in the disc
    cup = inside(cx + off[0], cy + off[1], cdr * radius, 1 + 0.6 * (aspect - 1), tilt, 0.04)
    return ((disc < 1).astype(np.uint8) + ((cup < 1) & (disc < 0.9))).astype(np.uint8)


def _vessel_tree(rng, size, cx, cy, radius):
    """Vessel map in [0, 1] (size, size): four pairs of trunks that leave the disc and branch."""
    fine = max(2, 256 // size) * size                                  # drawn fine, averaged down: soft edges
    canvas = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(canvas)
    eye = rng.choice((-1, 1))                                           # left or right: where the macula lies
    side = np.array([1, 1, 1, 1, -1, -1, -1, -1])                       # temporal and nasal,
    up = np.array([1, 1, -1, -1, 1, 1, -1, -1])                   # upper and lower, an artery and a vein each
    lean = np.where(side > 0, rng.normal(0.25, 0.2, 8), rng.normal(0.7, 0.3, 8))
    heading = np.where(eye * side > 0, up * (np.pi / 2 - lean), np.pi - up * (np.pi / 2 - lean))
    bend = np.where(side > 0, -up * eye * rng.uniform(0.02, 0.055, 8), rng.normal(0, 0.02, 8))
    start = np.array([[cx - eye * rng.uniform(0.05, 0.3) * radius, cy + rng.normal(0, 0.15) * radius]] * 8)
    width = rng.uniform(0.10, 0.17, 8) * radius
    for forks in (2, 1, 0):                                             # trunks, branches, twigs
        turns = heading[:, None] + np.cumsum(rng.normal(bend[:, None], 0.09, (len(bend), 22)), 1)
        steps = 0.035 * np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 2), 1)
        path = np.concatenate([start[:, None], start[:, None] + steps], 1)
        for points, w in zip((path * fine).reshape(-1, 46).tolist(), width.tolist(), strict=True):
            for a in range(0, 44, 12):                                  # vessels thin out along their way
                pen.line(points[a:a + 14], fill=255, width=max(1, round(w * (1 - a / 80) * fine)))
        parent = np.repeat(np.arange(len(bend)), forks)
        at = rng.integers(5, 20, len(parent))
        start, bend, width = path[parent, at + 1], -0.5 * bend[parent], 0.62 * width[parent]
        heading = turns[parent, at] + rng.choice((-1, 1), len(parent)) * rng.uniform(0.4, 0.9, len(parent))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _cloud(rng, size, cells):
    """Smooth random field (size, size) with about `cells` bumps a side, unit variance before smoothing."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _phantom_image(rng, mask, look):
    """Grey image uint8 (S, S) that a scanning laser ophthalmoscope might see over one label map (S, S)."""
    size = len(mask)
    disc, cup = (mask > 0).astype(np.float32), (mask == 2).astype(np.float32)
    (cy, cx), (qy, qx) = ((np.array(ndimage.center_of_mass(r)) + 0.5) / size if r.any() else (0.5, 0.5)
                          for r in (disc, cup))
    radius = np.sqrt(disc.sum() / np.pi) / size if disc.any() else 0.2
    # The blot lies in the rim, away from the cup, and looks like the other groups' cups: which of the two is
    # the cup, only the rest of the image tells.
    way, far = np.arctan2(cy - qy, cx - qx) + rng.normal(0, 0.7), rng.uniform(0.4, 0.7) * radius
    x = (np.arange(size) + 0.5) / size
    blot = np.hypot(x - cx - far * np.cos(way), x[:, None] - cy - far * np.sin(way))
    blot = ((blot < 0.42 * radius * np.exp(rng.normal(0, 0.15))) & (mask == 1)).astype(np.float32)
    blur = look["blur"] * np.exp(rng.normal(0, 0.2)) * size
    reach = int(5 * blur) + 1                                         # a Gaussian is cut off at 4 sigma
    rows, cols = (np.flatnonzero(disc.any(axis)) if disc.any() else [0] for axis in (1, 0))
    near = tuple(slice(max(0, at[0] - reach), at[-1] + 1 + reach) for at in (rows, cols))
    for region, sigma in ((disc, blur), (cup, 1.15 * blur), (blot, blur)):
        region[near] = ndimage.gaussian_filter(region[near], sigma)
    c = np.linspace(-1, 1, size, dtype=np.float32)
    off = rng.normal(0, 0.25, 2)                                        # the light is not centred
    light = 1.06 - 0.34 * ((c[None] - off[0]) ** 2 + (c[:, None] - off[1]) ** 2) / 2          # and falls off
    light = light + rng.normal(0, 0.06) * c[None] + rng.normal(0, 0.06) * c[:, None]
    image = look["pigment"] + rng.normal(0, 0.035)
    image = image + 0.022 * _cloud(rng, size, 6) + 0.018 * _cloud(rng, size, 20)
    image += (look["rim"] + rng.normal(0, 0.025)) * disc * (1 + 0.12 * _cloud(rng, size, 5))
    image += (look["cup"] + rng.normal(0, 0.03)) * cup + (look["blot"] + rng.normal(0, 0.03)) * blot
    vessels = ndimage.gaussian_filter(_vessel_tree(rng, size, cx, cy, radius), 0.004 * size)
    image *= 1 - look["vessel"] * vessels * (1 - 0.35 * cup)            # fainter where they dive into the cup
    grain = ndimage.gaussian_filter(rng.standard_normal((size, size), np.float32), 0.5)
    image = np.clip(image * light, 0.02, 1) * (1 + 0.13 * grain)   # speckle: noise that scales with the light
    return np.clip(255 * image, 0, 255).astype(np.uint8)


def render_phantom(mask, race, seed, shift=1.0):
    """The phantom's images over given masks.

    mask: uint8 (N, S, S) square, labels 0, 1, 2; race: int (N,), -1 to 2; shift: 0 makes the groups
    identical, 1 is the default difference. Returns uint8 (N, S, S). Image i depends on (seed, i), its mask
    and its group alone.
    """
    images = np.empty(mask.shape, np.uint8)
    for i, (m, r) in enumerate(zip(mask, race, strict=True)):
        images[i] = _phantom_image(np.random.default_rng((seed, 1, i)), m, _group_look(int(r), shift))
    return images


def make_phantom(n, size, seed, shift=1.0, balance=None, rare=None):
    """A dataset of n phantom patients, size x size pixels, deterministic from its seed.

    size: 32 to 512; shift: how far the races differ; balance: an attribute whose groups are made equally
    large (up to one), None keeps MARGINALS; rare: how many of the rarest race stay, the others become of the
    most frequent one. Returns a dataset dict. Only race has an effect; the rest is the null control.
    """
    if not 32 <= size <= 512:
        raise InputError(f"phantom size {size} px: expected 32 to 512")
    rng = np.random.default_rng((seed, 2))
    data = {"age": np.clip(rng.normal(60, 16, n), 18, 95).astype(np.float32)}
    if balance == "age":                                # mirrored at 60: even rows below, odd ones not
        data["age"] = np.where(np.arange(n) % 2, np.maximum(data["age"], 120 - data["age"]),
                               np.minimum(data["age"], np.float32(119.9) - data["age"]))
    for attribute, share in MARGINALS.items():
        if attribute == balance:
            code = rng.permutation(np.arange(n))
            if attribute == "maritalstatus":                            # its groups are married and not
                code = np.where(code % 2, 1 + code // 2 % 4, 0)
            code = code % len(share)
        else:                                   # quotas, so that a seed changes the patients, not how many
            code = rng.permutation(np.searchsorted(np.cumsum(share), (np.arange(n) + 0.5) / n))
            code = np.where(code == len(share), -1, code)
        data[attribute] = code.astype(np.int8)
    race = data["race"]
    if rare is not None:                    # the patients of --rare 10 are among those of --rare 30
        race[np.flatnonzero(race == 0)[rare:]] = 2
    data["mask"] = np.empty((n, size, size), np.uint8)
    for i in range(n):
        look = _group_look(int(race[i]), shift)
        data["mask"][i] = _phantom_mask(np.random.default_rng((seed, 0, i)), size, look)
    data["image"] = render_phantom(data["mask"], race, seed, shift)
    data["synthetic"] = np.zeros(n, bool)
    data["name"] = np.array([f"phantom-{seed}-{i:05d}" for i in range(n)])
    return data


# ------------------------------------------------------------------------------------------------------------
# Data: Harvard-FairSeg files in and out (Section 3.1)

FAIRSEG_KEYS = {                                                        # the names seen in its releases
    "image": ("slo_fundus", "fundus_slo", "fundus"),
    "mask": ("disc_cup_mask", "disc_cup", "disc_cup_borders"),
    "gender": ("gender", "male"),
    "ethnicity": ("ethnicity", "hispanic"),
}
RACE_BOOKS = {"012": {0: 0, 1: 1, 2: 2}, "237": {2: 0, 3: 1, 7: 2}}     # Asian, Black, White


def _read_fairseg_file(path, crop, image_out, mask_out, seen):
    """One patient: fills image_out and mask_out, uint8 (size, size); returns {attribute: number}.

    Counts in `seen` what it took the file for. InputError names the file and the reason.
    """
    names = {want: FAIRSEG_KEYS.get(want, (want,)) for want in ("image", "mask", *ATTRIBUTES, "age")}
    found = read_arrays(path, sum(names.values(), ()))
    key = {want: next((k for k in names[want] if k in found), None) for want in names}
    for want in ("image", "mask"):
        if key[want] is None:
            raise InputError(f"{path}: no key {' or '.join(names[want])}; found {', '.join(found)}")
    image, mask = np.squeeze(found[key["image"]]), np.squeeze(found[key["mask"]])
    if image.ndim == 3:                                                # some releases repeat the grey channel
        image = image[..., 0] if image.shape[-1] in (3, 4) else image[0]
    if image.shape != mask.shape or image.ndim != 2 or not image.size:
        raise InputError(f"{path}: image {image.shape} and mask {mask.shape}; expected one shape (H, W)")
    if not {image.dtype.kind, mask.dtype.kind} <= set("buif") or not 0 <= image.min() <= image.max() <= 255:
        raise InputError(f"{path}: image {image.dtype}, mask {mask.dtype}; expected numbers, image 0 to 255")
    with np.errstate(invalid="ignore"):
        label = mask.astype(np.int8)
    low, high = label.min(), label.max()
    if (label != mask).any() or low < -2 or high > 2 or low < 0 < high:
        raise InputError(f"{path}: mask labels {np.unique(mask)[:6].tolist()}; expected 0, -1, -2 or 0, 1, 2")
    row = {}
    for k in (*ATTRIBUTES, "age"):
        value = np.ravel(found[key[k]] if key[k] else -1)
        if value.size != 1 or value.dtype.kind not in "buif" or np.isinf(value[0]):
            raise InputError(f"{path}: {key[k]} is {value.dtype} {value.shape}; expected one number")
        row[k] = -1.0 if np.isnan(value[0]) else float(value[0])
        codes = (0, 1, 2, 3, 7) if k == "race" else range(len(ATTRIBUTES.get(k, ())))
        if k != "age" and row[k] not in (-1, *codes):
            raise InputError(f"{path}: {key[k]} is {value[0]}; expected -1, {', '.join(map(str, codes))}")
    seen.update([("key", key["image"]), ("key", key["mask"]), ("size", "{}x{}".format(*image.shape))])
    seen.update(("label", v) for v in range(-2, 3) if (label == v).any())
    if image.dtype != np.uint8:
        image = (image * (255.0 if image.dtype.kind in "bf" and image.max() <= 1 else 1)).astype(np.uint8)
    side = min(*image.shape, crop)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    box, size = (left, top, left + side, top + side), mask_out.shape
    image_out[:] = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=3)
    mask = Image.fromarray(np.abs(label).view(np.uint8))                # both codes mean 1 rim, 2 cup
    mask_out[:] = mask.resize(size, Image.Resampling.NEAREST, box=box)                # labels never blend
    return row


def load_fairseg(folder, size, crop=512, race_codes=None, skip_bad=False):
    """All patients of a folder of Harvard-FairSeg .npz files, in name order, as one dataset dict.

    The largest centred square of at most crop pixels is cut out and resized to size (masks: nearest). Race
    comes in two books that share the code 2, so the book is decided over the whole folder; so is the unit of
    age. Prints what the files were taken for. InputError where a file cannot be used (all are listed with the
    reason; skip_bad: they are left out) or the book cannot be decided.
    """
    paths = sorted(pathlib.Path(folder).glob("*.npz"))
    if not paths:
        raise InputError(f"{folder}: no .npz files; expected Harvard-FairSeg's data_00001.npz, ...")
    images, masks = (np.empty((len(paths), size, size), np.uint8) for _ in range(2))
    names, rows, bad, seen = [], [], [], collections.Counter()
    for path in tqdm(paths, "fairseg"):
        try:
            rows.append(_read_fairseg_file(path, crop, images[len(rows)], masks[len(rows)], seen))
            names.append(path.stem)
        except InputError as e:
            bad.append(str(e))
    if bad:
        print(*map(printable, bad), sep="\n")
        if not skip_bad or not rows:
            raise InputError(f"{len(bad)} of {len(paths)} files cannot be used, all listed above, such as "
                             f"{bad[0]}; --skip-bad leaves them out")
        print(f"{len(bad)} of {len(paths)} files left out")
    column = {k: np.array([r[k] for r in rows]) for k in rows[0]}
    race = {int(r) for r in column["race"] if r >= 0}
    if race_codes is None:
        race_codes = "237" if race & {3, 7} else "012" if race & {0, 1} or not race else None
    if race_codes is None:
        raise InputError(f"{folder}: race is 2 in every file, White in one book and Asian in the other: "
                         "say --race-codes 012 or --race-codes 237")
    book = RACE_BOOKS[race_codes]
    if race - set(book):
        raise InputError(f"{folder}: race codes {sorted(race)}, expected {list(book)}, -1")
    column["race"] = np.array([book.get(r, -1) for r in column["race"]])
    age = np.where(column["age"] > 0, column["age"], np.nan)
    days = np.nanmedian(np.r_[age, 0]) > 150                            # one release counts days
    column["age"] = (age / 365.25 if days else age).astype(np.float32)
    for what, title in (("key", "keys"), ("size", "pixels"), ("label", "mask labels")):
        print(f"{title}: " + ", ".join(f"{v} ({n} files)" for (k, v), n in sorted(seen.items()) if k == what))
    print(f"race codes {', '.join(map(str, book))} are {', '.join(ATTRIBUTES['race'])}; "
          f"age in {'days' if days else 'years'}")
    column |= {"image": images[:len(rows)], "mask": masks[:len(rows)], "name": np.array(names)}
    return check_set(column, folder)


def _patient(text):
    """Name of a patient's file from a line of any machine, digits unpadded: 5 and 6 of them mean the same."""
    stem = text.strip().replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".npz")
    return re.sub(r"\d+", lambda digits: str(int(digits[0])), stem)


def split_fairseg(folder, names, files=None, skip_missing=False):
    """Row numbers (train, test) of patients called names (N,), both sorted.

    files: [TRAIN.txt, TEST.txt], lines that end in a file name; or [SUMMARY.csv] with a column `train` (1 or
    0) and one that names the files; None: FOLDER's train.txt and test.txt or its data_summary.csv; without
    any, the first 80 % in name order. Prints how many patients are in no list. InputError where a listed
    file is missing (skip_missing: printed) or in both parts, or a part empty.
    """
    usual = [("train.txt", "test.txt"), ("data_summary.csv",)]
    usual = [[pathlib.Path(folder, name) for name in group] for group in usual]
    files = files or next((group for group in usual if all(f.is_file() for f in group)), [])
    n, place = len(names), {_patient(name): i for i, name in enumerate(names)}
    parts = np.split(np.arange(n), [round(0.8 * n)])
    where = " and ".join(map(str, files)) or f"name order, {len(parts[0])} to train"
    if files:
        tables = [pathlib.Path(f).read_text("utf-8-sig", errors="replace").splitlines() for f in files]
        if len(files) == 1:
            rows = list(csv.DictReader(tables[0]))
            part = [{"1": 0, "true": 0, "0": 1, "false": 1}.get(str(r.get("train")).lower()) for r in rows]
            columns = [c for c in rows[0] if c is not None] if rows else [""]
            column = max(columns, key=lambda c: sum(_patient(r[c] or "") in place for r in rows))
            if None in part or not any(_patient(r[column] or "") in place for r in rows):
                raise InputError(f"{where}: expected a column `train` of 1 and 0 and a column of file names")
            tables = [[r[column] or "" for r, p in zip(rows, part, strict=True) if p == k] for k in (0, 1)]
        listed = [{_patient(line) for line in table if line.strip()} for table in tables]
        missing = sorted(set().union(*listed) - set(place))
        if both := sorted(listed[0] & listed[1]):
            raise InputError(f"{where}: {len(both)} patients are in both parts, such as {both[0]}")
        if missing:
            line = f"{where}: {len(missing)} listed files are not in {folder}, such as {missing[0]}"
            if not skip_missing:
                raise InputError(f"{line}; --skip-bad leaves them out")
            print(printable(line))
        parts = [np.sort(np.array([place[p] for p in part if p in place], int)) for part in listed]
    if not all(map(len, parts)):
        raise InputError(f"{folder}: {n} patients split by {where} leave {len(parts[0])} to train and "
                         f"{len(parts[1])} to test; expected one or more")
    print(f"split by {where}; {n - sum(map(len, parts))} patients in no part")
    return parts


def export_fairseg(data, folder, race_codes="012"):
    """Write one FairSeg-format .npz a patient: data_00001.npz, ... with masks coded 0, -1 rim, -2 cup.

    Image and mask come under every name that FairSeg's and FairDiff's loaders look for. race_codes "012" is
    what FairSeg's read, age in years; "237" what FairDiff's do, age in days.
    """
    folder = make_folder(folder)
    code = {v: k for k, v in RACE_BOOKS[race_codes].items()} | {-1: -1}
    for i in tqdm(range(len(data["image"])), "export"):
        scalars = {k: np.int64(data[k][i]) for k in ATTRIBUTES}
        scalars |= {"race": np.int64(code[data["race"][i]]), "pid": np.int64(i + 1), "age": np.float64(
            -1 if np.isnan(data["age"][i]) else data["age"][i] * (1 if race_codes == "012" else 365.25))}
        mask = -data["mask"][i].astype(np.int16)
        with replacing(folder / f"data_{i + 1:05d}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **dict.fromkeys(FAIRSEG_KEYS["image"], data["image"][i]),
                                **dict.fromkeys(FAIRSEG_KEYS["mask"], mask), **scalars)


# ------------------------------------------------------------------------------------------------------------
# Equal Scale (Section 2.4, Eq. 6)

def take_again(data, index):
    """`take`, but a row that comes again is called NAME+1, NAME+2, ..."""
    order, part = np.argsort(index, kind="stable"), take(data, index)
    turn = np.empty(len(index), int)                                    # how often it was there before
    turn[order] = np.arange(len(index)) - np.searchsorted(index[order], index[order])
    again = np.char.add(part["name"], np.array([f"+{k}" for k in turn], str))
    return part | {"name": np.where(turn, again, part["name"])}


def equal_scale(real, synthetic, attribute, target=None, seed=0, n_real=None, share=1.0, mixes=1):
    """Top up every group of one attribute to the same size: D = U_g (D*_g,real + D*_g,synthetic), Eq. 6.

    real, synthetic: dataset dicts of one image size; target: images a group, None round(N_real / G) which
    keeps the size of the set, "max" the largest group; n_real: first draw that many real images in natural
    proportion; share: of what is missing, how much is synthetic, in [0, 1]; the rest repeats the group's real
    images in turn; mixes: so many such sets are drawn and united, as if each epoch had its own: more of the
    synthetic images are used, and of the real ones in groups that are cut. Returns a dataset dict in random
    order; repeated images are called NAME+1, NAME+2, ... Images of unknown group are left out, with one mix
    and share 1 (Eq. 6) nothing is repeated. InputError where the synthetic images do not suffice, naming
    group, need, have and the command.
    """
    rng = np.random.default_rng(seed)
    code, names = group_codes(real, attribute)
    pool = np.flatnonzero(code >= 0)
    if n_real is not None:
        if n_real > len(pool):
            raise InputError(f"--n-real {n_real}: only {len(pool)} real images have a known {attribute}")
        pool = rng.permutation(pool)[:n_real]
    groups = [g for g in range(len(names)) if (code == g).any()]        # a group nobody belongs to is none
    count = {g: int((code[pool] == g).sum()) for g in groups}
    if not groups:
        raise InputError(f"no image has a known {attribute}; mix needs at least one group")
    if target is None:
        target = round(len(pool) / len(groups))
    elif target == "max":
        target = max(count.values())
    synthetic_code = group_codes(synthetic, attribute)[0]
    keep_real, keep_synthetic = [], []
    for g in groups * mixes:
        own, drawn = pool[code[pool] == g], np.flatnonzero(synthetic_code == g)
        missing = max(0, target - len(own))
        need = round(share * missing) if len(own) else missing          # nobody to repeat
        if need > len(drawn):
            raise InputError(f"group {names[g]}: {need} synthetic images needed, {len(drawn)} there: "
                             f"draw them with `python pointdiff.py sample --group {names[g]} --n {need}`")
        keep_real.append(np.resize(rng.permutation(own), min(target, len(own)) + missing - need))
        keep_synthetic.append(rng.permutation(drawn)[:need])            # D*_g,synthetic: what is missing
    mixed = join_sets(take_again(real, np.concatenate(keep_real)),
                      take_again(synthetic, np.concatenate(keep_synthetic)))                 # Eq. 6
    return take(mixed, rng.permutation(len(mixed["name"])))


def count_table(data, attribute):
    """Lines of text: real and synthetic images per group of one attribute."""
    code, names = group_codes(data, attribute)
    rows = [(name, code == g) for g, name in enumerate(names)] + [("unknown", code < 0), ("all", code >= -1)]
    made = data["synthetic"]
    return "\n".join(f"  {name:<20} {(who & ~made).sum():>6} real {(who & made).sum():>6} synthetic"
                     for name, who in rows)


# ------------------------------------------------------------------------------------------------------------
# Common ground: errors, files, datasets

class InputError(Exception):
    """Bad input; its one line says what was found, what was expected, which command helps. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose own complaints are one line too, and that knows which numbers make no sense anywhere."""

    def error(self, message):
        raise InputError(f"{message} (see `python {self.prog} --help`)")

    def check(self, args):
        """InputError, before any work, where a number is not finite, too small or --out cannot be written."""
        out = pathlib.Path(getattr(args, "out", "."))
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"{out}: cannot be made, {above} is no folder that can be written to")
        for name, value in vars(args).items():
            least = 0 if name in ("seed", "train", "test", "rare", "val") else WORLD if name == "batch" else 1
            for v in value if isinstance(value, list) else [value]:
                want = None
                if type(v) is int and not least <= v < 2 ** 31:
                    want = f"a whole number from {least} to {2 ** 31 - 1}"
                elif name == "width" and v % 8:
                    want = "a multiple of 8"
                elif type(v) is float and not (math.isfinite(v) and (v > 0 or name != "lr")):
                    want = "a finite number" + ", more than 0" * (name == "lr")
                if want:
                    self.error(f"--{name.replace('_', '-')} {v}: expected {want}")


def run_command(parser, argv):
    """Parse argv and call args.run(args). Exit codes: 0 done, 2 bad input, 1 failed, 130 interrupted."""
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler      # in the background it does not
    try:
        if heeds:
            signal.signal(signal.SIGALRM, _interrupt)
            signal.signal(signal.SIGINT, _interrupt)
        args = parser.parse_args(argv)
        parser.check(args)
        started = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
            args.run(args)
            print(f"{parser.prog} {args.command}: {time.perf_counter() - started:.0f} s")
        return 0
    except InputError as e:
        code, line = 2, str(e)
    except OSError as e:                                            # no such folder, no permission, disk full
        code, line = 2, f"{_clean(e.filename or '')}: {_clean(e.strerror or e)}"
    except FloatingPointError as e:
        code, line = 1, str(e)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not re.search("(out of|allocate|enough) memory", str(e)):
            raise
        code, line = 1, f"out of memory: a smaller --batch or --size helps ({_clean(e)})"
    except KeyboardInterrupt:
        code, line = 130, INTERRUPTED
    finally:
        if heeds:
            signal.alarm(0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if not RANK or code != 2:                                           # bad input is the same for all
        print(f"{parser.prog}: {printable(line)}", file=sys.stderr)
    return code


def printable(text):
    """Text from outside as one line without escape sequences for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _clean(text):
    """Text from outside as one printable line that is not endless."""
    return printable(" ".join(str(text).split()))[:200]


def make_folder(path):
    """Create a folder with its parents; InputError where that is impossible. Returns a pathlib.Path."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot make this folder ({e.strerror})") from None
    return pathlib.Path(path)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path that takes the place of `path` on success and vanishes on failure.

    Of several processes only the first one's file stays.
    """
    path = pathlib.Path(path)
    make_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")      # same folder: rename is atomic there
    try:
        yield temporary
        if not RANK:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def take(data, index):
    """The rows of a dataset dict that index (int or bool (N,)) selects, as a new dict."""
    return {k: v[index] for k, v in data.items()}


def join_sets(*sets):
    """Concatenate dataset dicts of one image size; InputError where sizes differ or a name occurs twice."""
    shapes = {s["image"].shape[1:] for s in sets if len(s["image"])}
    if len(shapes) > 1:
        raise InputError(f"images of {' and '.join(str(s) for s in sorted(shapes))} pixels cannot be one set")
    sets = [s for s in sets if len(s["image"])] or list(sets[:1])
    return check_set({k: np.concatenate([s[k] for s in sets]) for k in sets[0]}, "the joined set")


def check_set(data, where):
    """Complete and validate a dataset dict (the layout is in the README). InputError says what is wrong in
`where`."""
    for key in ("image", "mask"):
        if key not in data:
            raise InputError(f"{where}: no array {key!r}; found {', '.join(map(_clean, data)) or 'nothing'}")
        if data[key].ndim != 3 or data[key].dtype != np.uint8 or 0 in data[key].shape[1:]:
            raise InputError(f"{where}: {key} is {data[key].dtype} {data[key].shape}; "
                             "expected uint8 (N, H, W)")
    n = len(data["image"])
    if data["image"].shape != data["mask"].shape:
        raise InputError(f"{where}: image {data['image'].shape} but mask {data['mask'].shape}")
    if n and data["mask"].max() > 2:
        raise InputError(f"{where}: mask has label {data['mask'].max()}; expected 0 background, 1 rim, 2 cup")
    full = {"image": data["image"], "mask": data["mask"]}
    default = {k: (-1, np.int8) for k in ATTRIBUTES}
    default |= {"age": (np.nan, np.float32), "synthetic": (False, np.bool_)}
    for key, (value, kind) in default.items():
        column = data[key] if key in data else np.full(n, value, kind)
        if column.shape != (n,) or column.dtype.kind not in "biuf":
            raise InputError(f"{where}: {key} is {column.dtype} {column.shape}; expected numbers ({n},)")
        if key in ATTRIBUTES and not np.isin(column, range(-1, len(ATTRIBUTES[key]))).all():
            raise InputError(f"{where}: {key} holds {_clean(np.unique(column)[:8])}; expected -1 to "
                             f"{len(ATTRIBUTES[key]) - 1} ({', '.join(ATTRIBUTES[key])})")
        full[key] = column.astype(kind)
    name = data["name"] if "name" in data else np.array([f"{i:06d}" for i in range(n)], "U6")
    if name.shape != (n,) or name.dtype.kind != "U" or len(np.unique(name)) != n:
        raise InputError(f"{where}: name is {name.dtype} {name.shape}; expected {n} unique strings")
    return full | {"name": name}


def check_archive(path):
    """Refuse a zip archive (.npz, .pt) that claims more than it holds, before memory is taken for it.

    FileNotFoundError; ValueError or zipfile.BadZipFile says what is wrong. An array that needs pickle is
    refused here, too.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(m.compress_size for m in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its members claim more bytes than the file has")
        for m in archive.infolist():                    # deflate packs 1032 bytes into one at the very most
            if m.file_size > m.compress_size * (1032 if m.compress_type == zipfile.ZIP_DEFLATED else 1):
                raise ValueError(f"{m.filename} claims {m.file_size} bytes, packed in {m.compress_size}")
            if m.filename.endswith(".npy"):
                with archive.open(m) as file:
                    lib, version = np.lib.format, np.lib.format.read_magic(file)
                    read = lib.read_array_header_1_0 if version == (1, 0) else lib.read_array_header_2_0
                    shape, _, dtype = read(file)
                    rest = m.file_size - file.tell()
                if dtype.hasobject:
                    raise ValueError(f"{m.filename} needs pickle, which can run code and is never loaded; if "
                                     "you trust it: np.savez(NEW, **{k: np.array(v.tolist()) for k, v in "
                                     "np.load(OLD, allow_pickle=True).items()})")
                if math.prod(shape) * dtype.itemsize != rest:
                    raise ValueError(f"{m.filename} claims {dtype} {shape} and holds {rest} bytes")


def read_arrays(path, wanted=None):
    """The arrays of a .npz by name, None for those not wanted; FileNotFoundError, InputError if damaged."""
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] if wanted is None or k in wanted else None for k in file.files}
    except FileNotFoundError:
        raise
    except Exception as e:                                      # zip, zlib and numpy raise a dozen types
        raise InputError(f"{path}: not a readable .npz ({e})") from None


def load_set(path, help="`python fairdiff.py phantom --out FOLDER` makes one"):
    """Read and validate a dataset file: a dict of arrays. InputError where it is missing or malformed."""
    try:
        return check_set(read_arrays(path), path)
    except FileNotFoundError:
        raise InputError(f"no dataset {path}: {help}") from None


def save_set(path, data):
    """Validate and write one dataset file, whole or not at all."""
    data = check_set(data, path)
    if RANK:
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **data)


def known_groups(data, attribute):
    """group_codes of an attribute that somebody in the set must have; InputError otherwise."""
    code, names = group_codes(data, attribute)
    if not (code >= 0).any():
        raise InputError(f"no image has a known {attribute}; choose another --attribute")
    return code, names


def group_number(names, group):
    """Code of a group given by its name; InputError lists the names there are."""
    if group not in names:
        raise InputError(f"no group {group!r}; expected {', '.join(names)}")
    return names.index(group)


# ------------------------------------------------------------------------------------------------------------
# Common ground: training

def pick_device(name="auto"):
    """Choose where to compute, print it with the reason. Returns torch.device and the autocast dtype or None.

    bf16 is used where the hardware multiplies it: CUDA from Ampere on, CPUs with AVX512-BF16. Elsewhere it is
    emulated and ten times slower than fp32.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d)?", name):
        raise InputError(f"--device {name}: expected auto, cpu or cuda")
    if name == "auto":
        name, why = ("cuda", "CUDA works") if torch.cuda.is_available() else ("cpu", "no CUDA device")
    else:
        why = "--device"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if name.startswith("cuda"):
        there, last = torch.cuda.device_count(), int((name + ":0").split(":")[1])
        if (wanted := int(os.environ["LOCAL_WORLD_SIZE"]) if WORLD > 1 else last + 1) > there:
            raise InputError(f"{wanted} GPUs wanted, {there} here: lower GPUS or --device")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True                           # shapes stay: the fastest kernel pays
        bf16 = torch.cuda.get_device_capability(name)[0] >= 8           # is_bf16_supported counts emulation
    else:
        bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
    if WORLD > 1 and name.startswith("cuda"):                           # each process has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    print(f"device: {name} ({why}), {'bf16 autocast' if bf16 else 'fp32 (no bf16 arithmetic here)'}"
          + f", {WORLD} processes" * (WORLD > 1))
    return torch.device(name), torch.bfloat16 if bf16 else None


def autocast(device, dtype):
    """The mixed-precision context of pick_device's choice."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# More than one process, under torchrun: each draws the same whole batch, times and noise from (seed, step),
# takes its own rows of them, and DistributedDataParallel averages the gradients. So the result is that of one
# process, up to rounding, and no sampler is needed.

def parallel(net, device, compiled=False):
    """The network as a training step calls it: wrapped so that gradients are averaged over the processes, and
    compiled if asked. It shares its weights with `net`."""
    import torch

    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, [device] if device.type == "cuda" else None)
    return torch.compile(net) if compiled else net


def own_rows(n):
    """This process' rows of a batch of n, as a slice; the parts differ by one row at most."""
    return slice(RANK * n // WORLD, (RANK + 1) * n // WORLD)


def own_batches(n, batch):
    """This process' share of the batches of rows 0 to n, as slices. It leaves all other rows 0; `add_up` then
    fills them in from the other processes."""
    return [slice(i, min(n, i + batch)) for i in range(RANK * batch, n, WORLD * batch)]


def add_up(array, device):
    """The sum of an array over the processes: what each has filled in, the rest being 0. Returns it."""
    import torch

    if WORLD > 1:
        whole = torch.as_tensor(array, device=device)
        torch.distributed.all_reduce(whole)
        array = whole.cpu().numpy()
    return array


def mixed_seed(*numbers):
    """One seed for torch from several numbers, such as seed and step; a CPU generator uses 32 bits alone.

    Zeros at the end do not count: (5,) and (5, 0) give the same.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fingerprint(*arrays):
    """32-bit checksum of arrays: tells a checkpoint whether it still sees the data that it was trained on."""
    crc = 0
    for a in arrays:
        crc = zlib.crc32(np.ascontiguousarray(a).view(np.uint8), crc)
    return crc


class EMA:
    """Exponential moving average of a network's weights and buffers; the copy is what samples and predicts.

    The decay warms up as (1 + step) / (10 + step), so that short trainings do not remember their start.
    """

    def __init__(self, net, decay=0.995):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def update(self, net, step):
        """Move the average towards the network after optimizer step number `step` (from 0)."""
        import torch

        keep = min(self.decay, (1 + step) / (10 + step))
        now = net.state_dict()                                          # detached from the graph
        moving = [k for k, v in now.items() if v.is_floating_point()]   # all but BatchNorm's counters
        torch._foreach_lerp_([self.state[k] for k in moving], [now[k] for k in moving], 1 - keep)


def save_checkpoint(path, **state):
    """Write one plain dict with torch.save, whole or not at all; of several processes the first writes."""
    import torch

    if RANK:
        return
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:                         # its name would enter the archive
                torch.save(state, file)
        except RuntimeError as e:                                       # what torch makes of a full disk
            raise InputError(f"{path}: cannot be written, is the disk full? ({_clean(e)})") from None


def load_checkpoint(path, kind=None, help="train it first"):
    """Read a checkpoint, running no pickled code. InputError where it is missing, damaged or another kind."""
    import torch

    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no {path}: {help}") from None
    except Exception as e:                                         # torch raises a dozen types for a bad file
        why = _clean(e).split(". ")[0]
        raise InputError(f"{path}: not a readable checkpoint ({why}): remove it, {help}") from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise InputError(f"{path}: not a checkpoint of this project")
    if kind and state["config"].get("kind") != kind:
        raise InputError(f"{path}: holds {_clean(state['config'].get('kind'))!r}; expected {kind!r}: {help}")
    if isinstance(groups := state["config"].get("groups"), list):       # they get printed
        state["config"]["groups"] = [_clean(g) for g in groups]
    return state


def check_finished(path, state):
    """InputError where the training that a checkpoint belongs to has not come to its end."""
    if state["step"] < (steps := state["config"]["steps"]):
        raise InputError(f"{path}: {state['step']} of {steps} steps done; run the same train command again")


@contextlib.contextmanager
def fitting(path):
    """InputError where what a checkpoint holds does not build or fill its network."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path}: not a checkpoint of this version ({_clean(e)}): remove it and train again"
                         ) from None


def resume(path, config, net, ema, optimizer):
    """Continue an interrupted training in place. Returns the step to go on with and the log so far.

    Every draw of a training step comes from (seed, step), so the step is all there is to remember of chance.
    InputError where the file belongs to another configuration or dataset (it is never overwritten), or where
    another process is training into it.
    """
    import fcntl

    path = pathlib.Path(path)
    state = load_checkpoint(path) if path.exists() else None
    old = state["config"] if state else config
    changed = [f"{k} {_clean(old.get(k))} -> {_clean(config.get(k))}" for k in sorted({*old, *config})
               if old.get(k) != config.get(k)]
    if changed:
        raise InputError(f"{path} is of another run ({'; '.join(changed[:3])}): "
                         "choose another --out or remove it")
    if not RANK:
        ema.lock = open(make_folder(path.parent) / f".{path.name}.lock", "a")  # held as long as the average
        try:
            fcntl.flock(ema.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run trains it; wait, or choose another --out") from None
        for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):     # by a run killed midway
            left.unlink()
    if state is None:
        return 0, []
    with fitting(path):
        net.load_state_dict(state["model"])
        ema.state = {k: v.to(ema.state[k].device) for k, v in state["ema"].items()}
        optimizer.load_state_dict(state["optimizer"])
        print(f"continuing {path} at step {int(state['step'])}")
        return state["step"], state["log"]


def check_finite(path, net, step, log):
    """FloatingPointError if one of the last losses logged or any weight is not finite. (A bad weight would
    show in the loss only a step later.)"""
    bad = [(at, f"the loss became {loss}") for at, loss, *_ in log[-8:] if not np.isfinite(loss)]
    if not all(v.isfinite().all() for v in net.state_dict().values()):
        bad.append((step, "weights became infinite"))
    if bad:
        raise FloatingPointError(f"{bad[0][1]} by step {bad[0][0]}; {path} keeps the last good state: try a "
                                 "smaller --lr")


def save_training(path, config, net, ema, optimizer, step, log):
    """Checkpoint a training after `step` steps; nothing is written where `check_finite` raises."""
    check_finite(path, net, step, log)
    save_checkpoint(path, config=config, model=net.state_dict(), ema=ema.state,
                    optimizer=optimizer.state_dict(), step=step, log=log)


# ------------------------------------------------------------------------------------------------------------
# Common ground: pictures

OUTLINE = {1: (80, 170, 255), 2: (255, 190, 60)}                        # disc blue, cup orange


def outline(image, mask):
    """RGB picture uint8 (H, W, 3): a grey image (H, W) with its mask's disc and cup outlines drawn on it."""
    rgb = np.repeat(image[..., None], 3, 2)
    for label, colour in OUTLINE.items():
        inside = mask >= label
        rgb[inside & ~ndimage.binary_erosion(inside)] = colour
    return rgb


def save_sheet(path, rows, labels, zoom=2, note=""):
    """Write a PNG with one labelled row of pictures per entry of rows.

    rows: lists of uint8 (H, W) or (H, W, 3) of one size; labels: text per row; zoom: integer magnification.
    """
    h, w = rows[0][0].shape[:2]
    h, w, left, top = h * zoom, w * zoom, 90, 16 if note else 0
    sheet = Image.new("RGB", (left + max(map(len, rows)) * (w + 2), top + len(rows) * (h + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 1), note, fill="black", font_size=12)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pen.text((4, top + i * (h + 2) + h // 2 - 7), label, fill="black", font_size=13)
        for j, picture in enumerate(row):
            tile = Image.fromarray(picture).convert("RGB").resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + j * (w + 2), top + i * (h + 2)))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
    print(f"picture: {path}")


# ------------------------------------------------------------------------------------------------------------
# Report

# A group or a method has one colour and one mark in every chart, legible on white and on black.
COLOURS = ("#3b82c4", "#d9770a", "#2f9e6e", "#c2508f", "#8b6fd0", "#b0912b", "#5aa9b5", "#888888")
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5l5 9h-10z", "M0-5l5 5-5 5-5-5z",
         "M-5-2h10v4h-10z", "M-2-5h4v10h-4z", "M0 5l5-9h-10z", "M-4-4l8 8M4-4l-8 8")


def chart(title, x_label, y_label, series, ticks=None, join=True):
    """One SVG as text: for each series a line, and a mark at every point (of 20 or more: at about ten) with
    its interval if it has one.

    series: {label: (x (n,), y (n,), interval (2, n) or None)}; ticks: {x: text} instead of numbers, and each
    series beside the others; join=False: no lines. Points that are NaN are left out.
    """
    points = {}
    for i, (label, (x, y, interval)) in enumerate(series.items()):
        x = np.asarray(x, float) + (0.4 * ((i + 0.5) / len(series) - 0.5) if ticks else 0)
        table = np.stack([x, y, *(interval if interval is not None else (y, y))])
        points[label] = table[:, np.isfinite(table).all(0)]
    everything = np.concatenate(list(points.values()), 1)
    if not everything.size:
        return "<p><i>Nothing to draw.</i>"
    x0, x1 = (min(ticks) - 0.5, max(ticks) + 0.5) if ticks else (0, everything[0].max())
    y0, y1 = everything[1:].min(), everything[1:].max()
    power = 10 ** np.floor(np.log10(y1 - y0 or 1))
    step = power * next(k for k in (0.2, 0.5, 1, 2) if y1 - y0 <= 6 * k * power)              # a round number
    lines = np.arange(np.floor(y0 / step), np.ceil(y1 / step) + 1) * step
    y0, y1 = lines[0], max(lines[-1], lines[0] + step)

    def px(x):
        return f"{60 + 560 * (x - x0) / (x1 - x0):.1f}"

    def py(y):
        return f"{250 - 210 * (y - y0) / (y1 - y0):.1f}"

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {322 + 18 * ((len(series) - 1) // 4)}" '
           f'role="img" font-family="sans-serif" font-size="13" fill="currentColor">'
           f'<title>{html.escape(title)}</title><text x="8" y="18">{html.escape(y_label)}</text>'
           f'<text x="340" y="288" text-anchor="middle">{html.escape(x_label)}</text>']
    out += [f'<path d="M60 {py(y)}H620" stroke="currentColor" opacity=".25"/><text x="52" y="{py(y)}" dy="4" '
            f'text-anchor="end">{y:.10g}</text>' for y in lines]
    out += [f'<text x="{px(x)}" y="268" text-anchor="middle">{html.escape(text)}</text>'
            for x, text in (ticks or {x: f"{x:.0f}" for x in np.linspace(x0, x1, 5)}).items()]
    for i, (label, table) in enumerate(points.items()):
        mark, colour = MARKS[i % 7], COLOURS[i % 8]         # 56 series before two look alike
        out.append(f'<g fill="{colour}" stroke="{colour}">')
        if join:
            out.append('<polyline fill="none" stroke-width="1.5" points="'
                       + " ".join(f"{px(x)},{py(y)}" for x, y in table[:2].T) + '"/>')
        for x, y, lo, hi in table.T[::max(1, table.shape[1] // 10)]:
            out.append(f'<path d="M{px(x)} {py(lo)}V{py(hi)}" stroke-width="2"/>'
                       f'<path d="{mark}" transform="translate({px(x)} {py(y)})"><title>{html.escape(label)} '
                       f'{y:.4g} [{lo:.4g}, {hi:.4g}]</title></path>')
        x, y = 70 + 142 * (i % 4), 306 + 18 * (i // 4)
        out.append(f'<path d="{mark}" transform="translate({x} {y})"/></g>'
                   f'<text x="{x + 10}" y="{y + 4}">{html.escape(label)}</text>')
    return "\n".join([*out, "</svg>"])


def group_charts(text):
    """A chart for each attribute and structure in the text of results.csv: every group's Dice by method."""
    rows = [r for r in csv.DictReader(text.splitlines()) if r["metric"] == "dice"
            and r["group"] not in ("overall", "es", "sd", "worst", "gap", "eq1", "p")]
    pooled = {r["method"] for r in rows if r["seed"] == "mean"}         # of several trainings only their mean
    rows = [r for r in rows if r["method"] not in pooled or r["seed"] == "mean"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for key in dict.fromkeys((r["attribute"], r["structure"]) for r in rows):
        series = {r["group"]: [] for r in rows if (r["attribute"], r["structure"]) == key}
        for r in rows:
            if (r["attribute"], r["structure"]) == key:
                at = methods.index(r["method"]), *(float(r[k]) for k in ("value", "lo", "hi"))
                series[r["group"]].append(at)
        series = {g: (v[0], v[1], v[2:]) for g, v in ((g, np.transpose(v)) for g, v in series.items())}
        yield chart(f"Dice of the {key[1]} by group of {key[0]} and method", "method",
                    f"Dice of the {key[1]}, by {key[0]}; 95 % interval over images", series,
                    dict(enumerate(methods)), join=False)


def loss_charts(out):
    """Two charts of the losses that the checkpoints in a folder have logged; of a row trained
    several times (equal.pt, equal-1.pt) the first alone."""
    diffusion, segmenters = {}, {}
    for path in sorted(p for p in out.glob("*.pt") if not (out / f"{p.stem.rpartition('-')[0]}.pt").exists()):
        state = load_checkpoint(path)
        kind = segmenters if state["config"].get("kind") == "transunet" else diffusion
        kind[path.stem] = *np.array([row[:2] for row in state["log"]]).reshape(-1, 2).T, None
    for words, series in {"diffusion: squared error": diffusion,
                          "TransUNet: cross-entropy and Dice": segmenters}.items():
        if series:
            yield chart(f"Training loss, {words}", "optimizer step", f"loss of one batch, {words}", series)


def report(args):
    """Write OUT/report.html: the pictures, tables and charts of a run, in one file that needs no other."""
    out = pathlib.Path(args.out)
    if not out.is_dir():
        raise InputError(f"no folder {out}: `bash train.sh` makes it")

    def text(name):                                                     # what a stage wrote or printed
        lines = (out / name).read_text(errors="replace").splitlines() if (out / name).is_file() else []
        return "\n".join(x for x in lines if not x.startswith(("device:", "picture:", "written:")))

    def pre(name):
        return f"<pre>{html.escape(text(name))}</pre>" if text(name) else ""

    def picture(stem, alt):
        found = [p for p in sorted(out.rglob("*.png")) if p.name.startswith(f"{stem}.")]
        words = [html.escape(f"{alt} ({p.relative_to(out)})") for p in found]
        data = [base64.b64encode(p.read_bytes()).decode() for p in found]
        return "".join(f"<figure><img alt='{text}' src='data:image/png;base64,{png}'>"
                       f"<figcaption>{text}</figcaption></figure>"
                       for png, text in zip(data, words, strict=True))

    seconds = [(int(p.read_text().split()[0]), p.stem) for p in out.rglob("*.done")]
    sections = {
        "The data": (pre("log/data.txt"), picture(
            "data.train", "Training patients of each group; again with disc (blue), cup (orange) outlined")),
        "Points to masks (Section 2.2)": (
            pre("log/masks.txt"), pre("log/score.txt"),
            picture("points", "From noise to boundary points, mask, nearest real ones, cup-to-disc ratios"),
            picture("masks", "Masks drawn for each group: disc grey, cup white")),
        "Masks to images (Section 2.3)": (
            picture("base", "Real images, and below them those of the base, which sees no mask"),
            picture("control", "Real images, and below them images painted over the same masks"),
            picture("synthetic", "Images painted over drawn masks, each again with its mask outlined")),
        "Do the images show their masks?": (pre("log/agree.txt"),),
        "Table 1: how like real images?": (pre("log/quality.txt"), picture(
            "table1", "A mask, its image, two other seeds, the nearest training image, twice")),
        "Equal Scale (Eq. 6), before and after": (
            pre("log/mix.txt"), picture("mixed", "The mixed set, synthetic images first")),
        "Tables 2-5: TransUNet by group": (*group_charts(text("results.csv")), pre("log/table.txt")),
        "Training curves": (*loss_charts(out),),
        "Seconds a stage": ("<pre>" + "\n".join(f"{s:>7} {n}" for s, n in sorted(seconds, reverse=True))
                            + f"\n{sum(s for s, _ in seconds):>7} in the stages</pre>" if seconds else "",)}
    page = ["<!doctype html><html lang=en><meta charset=utf-8><title>FairDiff</title>",
            "<meta name=viewport content='width=device-width,initial-scale=1'>",
            "<style>:root{color-scheme:light dark}pre{overflow-x:auto;font-size:13px}",
            "body{font:16px/1.5 sans-serif;max-width:60em;margin:auto;padding:1em}",
            "img{max-width:100%;background:#fff}figure{margin:1em 0}figcaption{font-size:14px}",
            "div{overflow-x:auto}svg{width:100%;min-width:36em;max-width:48em}</style>",
            "<h1>FairDiff</h1>"]
    if "fairdiff.py phantom" in text("log/data.txt"):
        page.append("<p><b>Phantom images: a caricature for teaching and testing, no medical evidence.</b>")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "numpy", "scipy", "pillow", "tqdm"))
    page.append(f"{pre('log/command.txt')}<p>Python {sys.version.split()[0]}, {versions}.")
    for title, parts in sections.items():
        page += [f"<h2>{title}</h2><div>", "".join(parts) or "<p><i>This stage has not run.</i>", "</div>"]
    with replacing(out / "report.html") as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    print(f"report: {out / 'report.html'}")


# ------------------------------------------------------------------------------------------------------------
# Command line

def sample_sheet(path, data, attribute="race"):
    """Eight images of every group, and once more with their outlines."""
    code, names = group_codes(data, attribute)
    rows, labels = [], []
    for g in np.unique(code):
        show = np.flatnonzero(code == g)[:8]
        rows += [list(data["image"][show]),
                 [outline(data["image"][i], data["mask"][i]) for i in show]]
        labels += [names[g] if g >= 0 else "unknown", ""]
    save_sheet(path, rows, labels, zoom=max(1, 128 // data["image"].shape[1]))


def phantom(args):
    """Write OUT/train.npz and OUT/test.npz of phantom patients."""
    if not args.train + args.test:
        raise InputError("--train 0 --test 0: expected one image at least")
    for split, n in (("train", args.train), ("test", args.test)):
        if n:                                       # a natural and a balanced set of one seed share nobody
            seed = 4 * args.seed + (split == "test") + 2 * bool(args.balance)
            data = make_phantom(n, args.size, seed, args.shift, args.balance,
                                args.rare if split == "train" else None)
            save_set(f"{args.out}/{split}.npz", data)
            print(f"{args.out}/{split}.npz\n{count_table(data, args.balance or 'race')}")
            sample_sheet(f"{args.out}/data.{split}.png", data)


def fairseg(args):
    """Write OUT/train.npz and OUT/test.npz from a folder of Harvard-FairSeg files."""
    if args.split and len(args.split) > 2:
        raise InputError(f"--split {' '.join(args.split)}: expected TRAIN.txt TEST.txt or one SUMMARY.csv")
    data = load_fairseg(args.folder, args.size, args.crop, args.race_codes, args.skip_bad)
    parts = split_fairseg(args.folder, data["name"].tolist(), args.split, args.skip_bad)
    for split, index in zip(("train", "test"), parts, strict=True):
        part = take(data, index)
        save_set(f"{args.out}/{split}.npz", part)
        print(f"{args.out}/{split}.npz: {len(index)} patients")
        for attribute in ATTRIBUTE_NAMES:
            code, names = group_codes(part, attribute)
            counts = zip((*names, "unknown"), np.bincount(code % (len(names) + 1), minlength=len(names) + 1),
                         strict=True)
            print(f"  {attribute:<14}" + ", ".join(f"{name} {count}" for name, count in counts))
        sample_sheet(f"{args.out}/data.{split}.png", part)


def export(args):
    """Write a dataset as FairSeg-format files."""
    data = load_set(args.set)
    export_fairseg(data, args.folder, args.race_codes)
    print(f"{args.folder}: {len(data['name'])} files")


def mix(args):
    """Equal Scale of a real and a synthetic set, with the counts before and after."""
    real, synthetic = load_set(args.real), load_set(args.synthetic, "`python controlnet.py sample` makes it")
    target = args.target
    if target not in (None, "max"):
        if not target.isdecimal() or not int(target):
            raise InputError(f"--target {target}: expected a number of images from 1, or max")
        target = int(target)
    if not 0 <= args.share <= 1:
        raise InputError(f"--share {args.share}: expected a number from 0 to 1")
    mixed = equal_scale(real, synthetic, args.attribute, target, args.seed, args.n_real, args.share,
                        args.mixes)
    both = {k: np.concatenate([real[k], synthetic[k]]) for k in (args.attribute, "synthetic")}
    print(f"before\n{count_table(both, args.attribute)}\n"
          f"after{f', {args.mixes} mixes' if args.mixes > 1 else ''}\n{count_table(mixed, args.attribute)}")
    save_set(args.out, mixed)
    made_first = np.argsort(~mixed["synthetic"], kind="stable")
    sample_sheet(f"{args.out}.png", take(mixed, made_first), args.attribute)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="fairdiff.py", description="data in, Equal Scale, report out")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("phantom", help="draw phantom patients: a caricature, no medical evidence")
    p.add_argument("--out", default="data", help="folder for train.npz and test.npz")
    p.add_argument("--train", type=int, default=1000, help="training images")
    p.add_argument("--test", type=int, default=2000, help="test images")
    p.add_argument("--size", type=int, default=64, help="pixels a side, 32 to 512")
    p.add_argument("--shift", type=float, default=1.0, help="how far the races differ; 0 not at all")
    p.add_argument("--balance", choices=ATTRIBUTE_NAMES, help="make this attribute's groups equally large")
    p.add_argument("--rare", type=int, help="training images of the rarest race at most (default: 9.2 %%)")
    p.add_argument("--seed", type=int, default=0, help="draws everything")
    p.set_defaults(run=phantom)
    p = sub.add_parser("fairseg", help="read Harvard-FairSeg files")
    p.add_argument("folder", help="folder of one .npz a patient")
    p.add_argument("--out", default="data", help="folder for train.npz and test.npz")
    p.add_argument("--size", type=int, default=224, help="pixels a side")
    p.add_argument("--crop", type=int, default=512, help="largest centred square cut out, pixels")
    p.add_argument("--race-codes", choices=tuple(RACE_BOOKS), help="which codes mean Asian, Black, White")
    p.add_argument("--split", nargs="+", help="TRAIN.txt TEST.txt, or a SUMMARY.csv with a column `train` "
                   "(default: FOLDER's train.txt and test.txt or data_summary.csv, else 8,000 and 2,000)")
    p.add_argument("--skip-bad", action="store_true", help="leave out, and count, files that cannot be used")
    p.set_defaults(run=fairseg)
    p = sub.add_parser("export", help="write FairSeg-format files")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("folder", help="folder for one .npz a patient")
    p.add_argument("--race-codes", choices=tuple(RACE_BOOKS), default="012",
                   help="012 as FairSeg's loaders read, 237 (and age in days) as FairDiff's")
    p.set_defaults(run=export)
    p = sub.add_parser("mix", help="Equal Scale, Eq. 6")
    p.add_argument("real", help="dataset .npz of real images")
    p.add_argument("synthetic", help="dataset .npz of synthetic images")
    p.add_argument("--attribute", choices=ATTRIBUTE_NAMES, default="race", help="whose groups are made equal")
    p.add_argument("--target", help="images a group; max: the largest group (default: real images / groups)")
    p.add_argument("--n-real", type=int, help="first draw this many real images in natural proportion")
    p.add_argument("--share", type=float, default=1, help="of what is missing, how much is synthetic")
    p.add_argument("--mixes", type=int, default=1, help="draw so many such sets and unite them")
    p.add_argument("--out", default="mixed.npz", help="the mixed dataset")
    p.add_argument("--seed", type=int, default=0, help="draws who is kept")
    p.set_defaults(run=mix)
    p = sub.add_parser("report", help="one page of a run's pictures and tables")
    p.add_argument("out", help="the folder of the run")
    p.set_defaults(run=report)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
