"""Point-mask generation (Section 2.2): masks to boundary points (Eq. 3-4), a PointNet DDPM, points to masks.

    python pointdiff.py train data/train.npz --attribute race --out points.pt
    python pointdiff.py train data/train.npz --group Asian --out asian.pt    # the paper's own model per group
    python pointdiff.py sample points.pt --group Asian --n 100 --out masks.npz

A mask becomes 512 points (x, y, z): x, y on the outlines of disc and cup, z = -1 disc, +1 cup. Noise is added
to the points until nothing is left of them, a network learns to take it away again. The network sees a set:
every point passes the same MLPs, and what it must know of the others comes through a symmetric pooling.

Which outline to draw is said by a shape code (Luo and Hu 2021, on whose code the authors built): 16 numbers
that a second PointNet reads from the clean cloud. Each group's codes get a Gaussian, from which sampling
draws. Without it the outlines were clean but too alike: half the real spread of cup-to-disc ratios.

Expect at SCALE=cpu on 2 cores with bf16 (without): 2,800 steps in 97 s (172), 1,002 masks in 24 s (38), 99 %
of the clouds valid (2026-11-24, seed 0, phantom). `score` says how like real masks they are.

Tried: explicit moments of the cloud as input (no better), a third block (fewer steps in the same time: discs
too small), a network for each group and --predict eps (the README has the figures).
"""
import fairdiff  # isort: skip  # noqa: F401  first, so that a Ctrl-C while torch loads is one line
import csv
import math
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from fairdiff import (
    ATTRIBUTE_NAMES,
    EMA,
    OUTLINE,
    RANK,
    WORLD,
    InputError,
    Parser,
    add_up,
    autocast,
    check_finished,
    check_finite,
    fingerprint,
    fitting,
    group_number,
    known_groups,
    load_checkpoint,
    load_set,
    mixed_seed,
    own_batches,
    own_rows,
    parallel,
    pick_device,
    replacing,
    resume,
    run_command,
    save_set,
    save_sheet,
    save_training,
)
from fairness import mmd_cov, one_nna

# B batch, N points, C channels, G groups, T diffusion steps, A angles of an outline.


# ------------------------------------------------------------------------------------------------------------
# Data: masks to points (Eq. 3-4)

ANGLES = np.linspace(-np.pi, np.pi, 512, endpoint=False)
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)              # (A, 2)


def _box(region):
    """The rows and columns (two slices) that a bool array fills."""
    rows, cols = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def _largest(region):
    """The largest connected component of a bool array (H, W), its holes filled."""
    wide, tall = region[:, 1:] & region[:, :-1], region[1:] & region[:-1]
    pixels, sides, corners = region.sum(), wide.sum() + tall.sum(), (wide[1:] & wide[:-1]).sum()
    labels, n = ndimage.label(region)
    if n == 1 and pixels - sides + corners == 1:                        # Euler: one component, no hole
        return region
    largest = 1 + np.argmax(np.bincount(labels.ravel())[1:])
    outside, _ = ndimage.label(np.pad(labels != largest, 1, constant_values=True))
    return (outside != outside[0, 0])[1:-1, 1:-1]                       # a hole is not joined to the corner


def _star_shaped(region):
    """The region star-shaped about its centroid that is nearest to a bool array (H, W).

    Along every ray the end is chosen that leaves the least area on the wrong side, then bays are filled until
    no flank is steeper than 1:2 against its ray, so that points in any order still tell the outline.
    """
    box, directions = _box(region), DIRECTIONS[::4]
    part = np.pad(region[box], 1)
    h, w = part.shape
    cx, cy = (part.sum(axis) @ np.arange(n) / part.sum() for axis, n in ((0, w), (1, h)))
    r = np.linspace(0, np.hypot(max(cx, w - cx), max(cy, h - cy)), 128)
    cols = (cx + directions[:, :1] * r).round().astype(int).clip(0, w - 1)
    rows = (cy + directions[:, 1:] * r).round().astype(int).clip(0, h - 1)
    inside = part[rows, cols]                                           # (A / 4, 128), nothing on the margin
    gain = np.cumsum(np.where(inside, r, -r), 1)                        # r dr: area won so far along the ray
    turn = np.abs(np.angle(np.exp(1j * (ANGLES[:, None] - ANGLES[::4]))))           # (A, A / 4)
    radius = (r[gain.argmax(1)] * np.exp(-2 * turn)).max(1).clip(min=1)   # of a thin arc, a dot
    corners = np.array((cx, cy)) + radius[:, None] * DIRECTIONS + (box[1].start - 1, box[0].start - 1)
    return _fill((2 * corners + 1) / region.shape[::-1] - 1, region.shape)


def _by_angle(xy, centre):
    """Angles (sorted), radii and order of points (M, 2) about a centre: how a set is read as an outline."""
    d = xy - centre
    angle = np.arctan2(d[:, 1], d[:, 0])
    order = np.argsort(angle, kind="stable")
    return angle[order], np.hypot(d[:, 0], d[:, 1])[order], order


def _boundary(region, n):
    """Boundary(I) of Eq. 3: n points (x, y) (n, 2) at equal distances along a bool array's outline.

    In pixels from the array's corner; the outline runs midway between the centres of inner and outer pixels.
    """
    for again in (False, True):
        part = _star_shaped(region) if again else region
        box = _box(part)
        inside = np.pad(part[box], 1)                                 # a region at the border is closed there
        i, j = np.nonzero(inside[:, 1:] != inside[:, :-1])              # left-right neighbours that differ
        k, m = np.nonzero(inside[1:] != inside[:-1])                 # neighbours above each other that differ
        xy = np.concatenate([np.stack([j, i - 0.5], 1), np.stack([m - 0.5, k], 1)])         # (M, 2), pixels
        xy = xy[_by_angle(xy, xy.mean(0))[2]]
        ring = np.concatenate([xy, xy[:1]])
        steps = np.hypot(*np.diff(ring, axis=0).T)
        if steps.max() < 3:                                             # else it is not star-shaped
            break
    along = np.r_[0, np.cumsum(steps)]
    at = (np.arange(n) + 0.5) / n * along[-1]
    return np.stack([box[1].start + np.interp(at, along, ring[:, 0]),
                     box[0].start + np.interp(at, along, ring[:, 1])], 1)


def mask_to_points(mask, n_points=512):
    """Outlines of disc and cup as a point cloud float32 (n_points, 3), Eq. 3-4.

    mask: uint8 (H, W), labels 0, 1 rim, 2 cup. Half of the points lie on each outline, all on the disc's
    where there is no cup. x runs right and y down, both [-1, 1] over the image; z = g(x, y) is +1 on the cup,
    -1 on the disc. Holes are filled, stray components dropped. An outline that is not star-shaped about its
    centroid becomes the nearest one that is: a disc with a bay, a quarter as wide as itself, down to its
    centre keeps IoU 0.83. ValueError for a mask without disc.
    """
    if not (mask > 0).any():
        raise ValueError("mask without disc: there is no outline to draw points from")
    box = _box(mask > 0)
    disc = _largest(mask[box] > 0)
    cup = (mask[box] == 2) & disc
    n_cup = n_points // 2 if cup.any() else 0
    points = np.full((n_points, 3), -1.0, np.float32)                   # -z_0 of Eq. 4 on the disc, z_0 = 1
    points[n_cup:, :2] = _boundary(disc, n_points - n_cup)              # Eq. 3: f(I), disc and
    if n_cup:
        points[:n_cup, :2] = _boundary(_largest(cup), n_cup)            # cup
        points[:n_cup, 2] = 1                                           # Eq. 4: g = z_0 on the cup
    points[:, :2] = 2 * (points[:, :2] + (box[1].start, box[0].start)) / mask.shape[::-1] - 1
    return points


# ------------------------------------------------------------------------------------------------------------
# Data: points to masks

def read_outline(xy):
    """The star-shaped outline drawn through a set of points (M, 2): centre (2,) and radii (A,) at ANGLES.

    The radius as a function of the angle is a Fourier series whose high harmonics are cut. Which? The points'
    noise is estimated from each point's distance to the chord between its two neighbours, and harmonics go as
    long as all that goes is less than that noise (Morozov's discrepancy principle). ValueError for fewer than
    8 points.
    """
    if len(xy) < 8:
        raise ValueError(f"{len(xy)} points on an outline: at least 8 are needed")
    centre = xy.mean(0)                                                 # then the area's own, by shoelace
    here = xy[_by_angle(xy, centre)[2]]
    there = np.concatenate([here[1:], here[:1]])
    cross = here[:, 0] * there[:, 1] - there[:, 0] * here[:, 1]
    if abs(cross.sum()) > 1e-9:
        centre = cross @ (here + there) / (3 * cross.sum())
    angle, radius, _ = _by_angle(xy, centre)
    curve = np.interp(ANGLES, angle, radius, period=2 * np.pi)          # (A,)
    # A point's distance from the chord between its neighbours: white noise of variance s^2 gives it the
    # variance s^2 (1 + u^2 + (1 - u)^2), u the place between them.
    angle = np.r_[angle[-1] - 2 * np.pi, angle, angle[0] + 2 * np.pi]
    u = (angle[1:-1] - angle[:-2]) / np.maximum(angle[2:] - angle[:-2], 1e-9)
    ring = np.r_[radius[-1], radius, radius[0]]
    off = radius - (1 - u) * ring[:-2] - u * ring[2:]
    variance = np.mean(off ** 2 / (1 + u ** 2 + (1 - u) ** 2))
    wave = np.fft.rfft(curve) / len(ANGLES)
    tail = np.cumsum((2 * np.abs(wave) ** 2)[::-1])[::-1]               # variance of the harmonics from k on
    keep = max(3, int((tail > 0.65 * variance).sum()))                  # interpolation keeps two thirds
    wave[keep:] = 0
    return centre, np.fft.irfft(wave * len(ANGLES), len(ANGLES))


def _split(points):
    """Outlines of disc and cup in a cloud (N, 3); no cup (None) where at most 2 % of the points are its."""
    on_cup = points[:, 2] > 0                                           # the sign of z names the outline
    if not np.isfinite(points).all():
        raise ValueError("points that are not finite")
    disc = read_outline(points[~on_cup, :2])
    return disc, read_outline(points[on_cup, :2]) if on_cup.mean() > 0.02 else None


def _corners(outline):
    """An outline's points (A, 2)."""
    centre, radius = outline
    return centre + radius.clip(min=0)[:, None] * DIRECTIONS


def _fill(corners, size):
    """Bool image (H, W) of the pixels whose centre lies inside a polygon (A, 2) in [-1, 1]."""
    h, w = size
    x, y = (corners[:, 0] + 1) * w / 2 - 0.5, (corners[:, 1] + 1) * h / 2 - 0.5             # in pixels
    slope = np.diff(x, append=x[0]) / (np.diff(y, append=y[0]) + 1e-12)
    first, last = np.sort(np.ceil([y, np.roll(y, -1)]).clip(0, h).astype(int), 0)   # rows that an edge meets
    edge = np.repeat(np.arange(len(y)), last - first)
    row = np.arange(len(edge)) + np.repeat(last - np.cumsum(last - first), last - first)
    column = np.ceil(x[edge] + (row - y[edge]) * slope[edge]).clip(0, w).astype(int)
    order = np.lexsort((column, row))                                   # in a row: enter, leave, enter, ...
    inside = np.zeros(size, bool)
    for i, a, b in zip(row[order][::2], column[order][::2], column[order][1::2], strict=True):
        inside[i, a:b] = True
    return inside


def points_to_mask(points, size):
    """The label map uint8 (H, W) whose outlines a set of points (N, 3), in any order, marks.

    size: int or (H, W). Outlines are read as star-shaped about their centroid. The cup is cut to the disc.
    ValueError where no outline can be read.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    disc, cup = _split(np.asarray(points, np.float64))
    inside = _fill(_corners(disc), size)
    if not inside.any():
        raise ValueError("the disc's outline encloses no pixel")
    mask = inside.astype(np.uint8)
    if cup is not None:
        mask[_fill(_corners(cup), size) & inside] = 2
    return mask


def is_valid(points):
    """Whether a cloud (N, 3) shows two clean nested outlines, judged on the cloud itself before any repair.

    95 % of its points lie within 0.03 of the outlines drawn through it, neither outline has an angular gap
    over 30 degrees, and the cup's outline as drawn lies inside the disc's.
    """
    points = np.asarray(points, np.float64)
    try:
        disc, cup = _split(points)
    except ValueError:
        return False
    near, on_cup = 0, points[:, 2] > 0
    for outline, xy in ((disc, points[~on_cup, :2]), (cup, points[on_cup, :2])):
        if outline is None:
            continue
        centre, radius = outline
        angle, r, _ = _by_angle(xy, centre)
        near += (np.abs(r - np.interp(angle, ANGLES, radius, period=2 * np.pi)) <= 0.03).sum()
        if max(np.diff(angle).max(), angle[0] + 2 * np.pi - angle[-1]) > np.pi / 6:
            return False
    if cup is not None:
        angle, r, _ = _by_angle(_corners(cup), disc[0])
        if (r > np.interp(angle, ANGLES, disc[1], period=2 * np.pi)).any():
            return False
    return bool(near >= 0.95 * len(points))


# ------------------------------------------------------------------------------------------------------------
# Network

def timestep_embedding(t, dim):
    """Sinusoids (B, dim) of the diffusion step t (B,), their periods 2 pi to 10,000 times that."""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


class PointBlock(nn.Module):
    """Residual MLP shared by all points, modulated by the cloud's pooled features and what it is told.

    No normalisation: it would hide how far out a point lies, and it takes time.
    """

    def __init__(self, width):
        super().__init__()
        self.pool, self.film = nn.Linear(2 * width, width), nn.Linear(width, 2 * width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)                                 # every block starts as the identity
        nn.init.zeros_(self.fc2.bias)

    def forward(self, h, c):
        pooled = torch.cat([h.amax(1), h.mean(1)], 1)                # (B, 2C): symmetric, so order is nothing
        scale, shift = self.film(F.silu(c + self.pool(pooled)))[:, None].chunk(2, 2)      # (B, 1, C) each
        y = torch.addcmul(shift, self.fc1(h), 1 + scale)                # (B, N, C)
        return h + self.fc2(F.silu(y))                                  # (B, N, C)


# A Gaussian's tails reach shapes that no mask has, such as cups that cross the disc. Drawn at 1, 0.95, 0.9 of
# the deviation (a GAN's truncation trick, Brock et al. 2019) 98.9, 99.2, 99.6 % of 1,200 clouds are valid.
SPREAD = 0.92


class PointNet(nn.Module):
    """Denoiser of point clouds: x (B,N,3), t long (B,), group long (B,) with -1 unknown -> (B,N,3).

    Permuting the points permutes the output (Qi et al. 2017). shape (B, D) is the code of the cloud to be
    drawn, as encode reads it from a clean one or draw_shape from the group's prior; None stands for zeros.
    n_groups: groups of the sensitive attribute; latent: D.
    """

    def __init__(self, n_groups, width=96, depth=2, latent=16):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.group = nn.Embedding(n_groups + 1, width)               # row 0 is the null embedding of group -1
        self.shape = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(3, width)
        self.blocks = nn.ModuleList(PointBlock(width) for _ in range(depth))
        self.leave = nn.Linear(width, 3)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.look = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.code = nn.Linear(2 * width, 2 * latent)
        self.register_buffer("prior_mean", torch.zeros(n_groups + 1, latent))     # row 0: everybody
        self.register_buffer("prior_root", torch.eye(latent).repeat(n_groups + 1, 1, 1))

    def forward(self, x, t, group, shape=None):
        shape = torch.zeros_like(self.prior_mean[group + 1]) if shape is None else shape
        c = self.time(timestep_embedding(t, self.width)) + self.group(group + 1) + self.shape(shape)  # (B, C)
        h = self.enter(x)                                               # (B, N, C)
        for block in self.blocks:
            h = block(h, c)                                             # (B, N, C)
        return self.leave(F.silu(h))                                    # (B, N, 3)

    def encode(self, x):
        """Mean and variance (B, D) each of the shape codes of clean clouds x (B, N, 3)."""
        h = self.look(x)                                                # (B, N, C)
        mean, log_variance = self.code(torch.cat([h.amax(1), h.mean(1)], 1)).float().chunk(2, 1)
        return mean, log_variance.clamp(-10, 2).exp()

    @torch.no_grad()
    def fit_prior(self, x, group):
        """Fit a Gaussian to each group's shape codes: its own mean, a covariance drawn towards all groups'.

        x (M, N, 3) clean clouds, group long (M,). A rare group has too few clouds for D^2 / 2 numbers: its
        covariance weighs n / (n + 3 D) against the one within all groups. Row 0, and a group
        of fewer than two clouds, is everybody.
        """
        codes = [self.encode(part) for part in x.split(256)]
        mean, variance = (torch.cat(c).float() for c in zip(*codes, strict=True))
        spread = torch.diag(variance.mean(0))                           # what encode itself is unsure of
        everybody = mean.mean(0), torch.cov(mean.T, correction=int(len(mean) > 1)) + spread
        groups = [(g, mean[group == g]) for g in range(len(self.prior_mean) - 1)]
        centred = torch.cat([m - m.mean(0) for _, m in groups])
        within = centred.T @ centred / len(centred)
        self.prior_mean[:], self.prior_root[:] = everybody[0], torch.linalg.cholesky(everybody[1])
        for g, m in groups:
            if len(m) > 1:
                own = len(m) / (len(m) + 3 * m.shape[1])
                self.prior_mean[g + 1] = m.mean(0)
                covariance = own * torch.cov(m.T) + (1 - own) * within + spread
                self.prior_root[g + 1] = torch.linalg.cholesky(covariance)

    def draw_shape(self, group, generator):
        """Shape codes (B, D) from the priors of groups (B,), at SPREAD of their deviation."""
        mean, root = self.prior_mean[group + 1], self.prior_root[group + 1]             # (B, D), (B, D, D)
        z = SPREAD * torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + (root @ z[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------
# Diffusion

class DDPM:
    """Denoising diffusion (Ho et al. 2020) of tensors (B, ...): 512 x 3 points here, pixels elsewhere.

    T: steps; predict: what the network is asked for, "v" (Salimans & Ho 2022) or "eps" (the paper's);
    schedule: "cosine" (Nichol & Dhariwal 2021) or "linear" (Ho et al.).
    """

    def __init__(self, T=1000, predict="v", schedule="cosine"):
        self.T, self.predict = T, predict
        if schedule == "cosine":
            f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)                # keeps alpha_bar > 0, a divisor
        else:
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - beta, 0).float()             # (T,), share of the signal's variance

    def _levels(self, t, x):
        """Signal and noise amplitudes at step t (B,), shaped to multiply x (B, ...)."""
        self.alpha_bar = self.alpha_bar.to(x.device)                    # once: a copy waits for the device
        a = self.alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        return a.sqrt(), (1 - a).sqrt()

    def noise(self, x0, t, eps):
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps; x0, eps (B, ...), t long (B,) in 0..T-1."""
        signal, sigma = self._levels(t, x0)
        return signal * x0 + sigma * eps

    def loss(self, net, x0, *cond, weight=1.0):
        """Mean squared error of net(x_t, t, *cond) against the target, at steps and noise drawn afresh.

        weight (B, ...) may depend on what the network is told, here the mask, but not on x0 or eps: then it
        moves effort between pixels, and the best answer at each is still the mean target given the input.
        Of several processes each works on its own rows, and their mean is the loss of the batch.
        """
        t = torch.randint(self.T, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        rows = own_rows(len(x0))                                        # all of them without torchrun
        part = WORLD * (rows.stop - rows.start) / len(x0)
        weight = weight[rows] if torch.is_tensor(weight) else weight
        x0, t, eps, *cond = (a[rows] for a in (x0, t, eps, *cond))
        signal, sigma = self._levels(t, x0)
        target = eps if self.predict == "eps" else signal * eps - sigma * x0
        return part * (weight * (net(self.noise(x0, t, eps), t, *cond).float() - target) ** 2).mean()

    @torch.no_grad()
    def sample(self, net, shape, *cond, steps=50, generator=None, clip=None, eta=1.0, frames=None):
        """Draw x0 of a shape (B, ...) from pure noise in `steps` steps (Song et al. 2021).

        eta 1 is the DDPM's own variance, 0 the deterministic DDIM; clip = (lo, hi) bounds the estimate of x0;
        frames: a list that receives x of every step. Noise comes from the generator, on whose device x lives.
        """
        device = generator.device if generator is not None else self.alpha_bar.device
        x = torch.randn(shape, generator=generator, device=device)
        times = torch.linspace(self.T - 1, 0, min(steps, self.T)).round().long().tolist()
        for i, step in enumerate(times):
            if frames is not None:
                frames.append(x)
            t = torch.full(shape[:1], step, device=device)
            out = net(x, t, *cond).float()
            signal, sigma = self._levels(t, x)
            x0 = signal * x - sigma * out if self.predict == "v" else (x - sigma * out) / signal
            x0 = x0 if clip is None else x0.clamp(*clip)
            if i + 1 == len(times):
                if frames is not None:
                    frames.append(x0)
                return x0                                               # no noise at the last step
            eps = (x - signal * x0) / sigma
            signal2, sigma2 = self._levels(torch.full_like(t, times[i + 1]), x)
            fresh = eta * sigma2 / sigma * (1 - (signal / signal2) ** 2).clamp(min=0).sqrt()
            x = signal2 * x0 + (sigma2 ** 2 - fresh ** 2).clamp(min=0).sqrt() * eps
            if eta > 0:
                x = x + fresh * torch.randn(shape, generator=generator, device=device)


# ------------------------------------------------------------------------------------------------------------
# Training

SAVE_EVERY = 200                                        # steps between checkpoints: seconds on a laptop


def build(config):
    """The network and the diffusion that a checkpoint's config describes."""
    net = PointNet(len(config["groups"]), config["width"], config["depth"], config["latent"])
    return net, DDPM(config["T"], config["predict"], config["schedule"])


def train(args):
    """Train one point model: for all groups of an attribute, or with --group the paper's own model of one."""
    device, dtype = pick_device(args.device)
    data = load_set(args.set)
    code, names = known_groups(data, args.attribute)
    rows = np.flatnonzero((data["mask"] > 0).any((1, 2)))               # an image without disc has no outline
    if args.points > 512:
        raise InputError(f"--points {args.points}: a cloud has 512")
    if args.group:
        rows = rows[code[rows] == group_number(names, args.group)]
    if not len(rows):
        raise InputError(f"{args.set}: no mask with a disc in group {args.group or 'any'}")
    points = np.stack([mask_to_points(m) for m in tqdm(data["mask"][rows], "points", leave=False,
                                                     disable=RANK > 0)])
    mean, std = points.mean((0, 1)), points.std((0, 1)) + 1e-6          # constants of the training set, kept
    config = {"kind": "points", "groups": list(names), "image": list(data["mask"].shape[1:]), "T": 1000,
              "mean": mean.tolist(), "std": std.tolist(), "data": fingerprint(data["mask"], code),
              "share": -(-int((code >= 0).sum()) // len(np.unique(code[code >= 0])))}
    config |= {k: getattr(args, k) for k in ("attribute", "group", "width", "depth", "latent", "points",
                                             "predict", "schedule", "steps", "batch", "lr", "seed")}
    clouds = torch.as_tensor((points - mean) / std, device=device)
    group = torch.as_tensor(code[rows].astype(np.int64), device=device)
    torch.manual_seed(args.seed)
    net, ddpm = build(config)
    net = net.to(device)
    ema, optimizer = EMA(net, 0.998), torch.optim.Adam(net.parameters(), args.lr, fused=True)
    start, log = resume(args.out, config, net, ema, optimizer)
    run = parallel(net, device, args.compile)
    bar = tqdm(range(start, args.steps), "points", initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        torch.manual_seed(mixed_seed(args.seed, step))                  # chance is a function of (seed, step)
        for g in optimizer.param_groups:                                # warm up, then half a cosine to zero
            g["lr"] = args.lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        index = torch.randint(len(clouds), (args.batch,), device=device)
        seen = torch.randperm(512, device=device)[:args.points]         # a set's shape shows in a part of it
        x0 = clouds[index][:, seen]                                     # (B, N, 3)
        with autocast(device, dtype):
            mu, var = net.encode(x0)
            shape = mu + var.sqrt() * torch.randn_like(mu)
            loss = ddpm.loss(run, x0, group[index], shape)
        kl = 0.5 * (mu ** 2 + var - var.log() - 1).sum(1).mean()        # holds the codes together
        optimizer.zero_grad(set_to_none=True)
        (loss + 1e-5 * kl).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net, step)
        if step % 50 == 49 or step + 1 == args.steps:                  # reading the loss waits for the device
            log.append([step + 1, float(add_up(loss.detach(), device)) / WORLD])
            bar.set_postfix(loss=f"{log[-1][1]:.3f}")
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < args.steps:
            save_training(args.out, config, net, ema, optimizer, step + 1, log)
    check_finite(args.out, net, args.steps, log)
    net.load_state_dict(ema.state)                                      # the prior is fitted to what samples
    net.fit_prior(clouds, group)
    ema.state = net.state_dict()
    save_training(args.out, config, net, ema, optimizer, args.steps, log)
    loss = np.mean([v for _, v in log[-5:]])
    print(f"points: loss {loss:.4f} after {args.steps} steps on {len(clouds)} masks")


# ------------------------------------------------------------------------------------------------------------
# Sampling

def load_points(path, device):
    """The trained network (EMA weights, eval mode), its diffusion and its config."""
    state = load_checkpoint(path, "points", "run `python pointdiff.py train SET.npz --out points.pt` first")
    with fitting(path):
        net, ddpm = build(state["config"])
        net.load_state_dict(state["ema"])
        check_finished(path, state)
    return net.to(device).eval(), ddpm, state["config"]


def sample_clouds(net, ddpm, config, group, n, steps, seed, first=0, batch=100, frames=None):
    """Clouds number first to first + n of one group (its code), float32 (n, 512, 3), in mask coordinates.

    Every batch draws from (seed, group, its first cloud) alone, whichever process works on it. frames: as in
    DDPM.sample, and then every process draws all of them.
    """
    std, mean = np.float32(config["std"]), np.float32(config["mean"])
    out, device = np.zeros((n, 512, 3), np.float32), net.prior_mean.device
    for rows in own_batches(n, batch) if frames is None else [slice(0, n)]:
        generator = torch.Generator(device).manual_seed(mixed_seed(seed, group, first + rows.start))
        code = torch.full((rows.stop - rows.start,), group, device=device)
        shape = net.draw_shape(code, generator)
        x = ddpm.sample(net, (len(code), 512, 3), code, shape, steps=steps, generator=generator,
                        clip=(-4, 4), frames=frames)                    # no point lies 4 sd out
        out[rows] = x.cpu().numpy() * std + mean
    if frames is None:
        return add_up(out, device)
    frames[:] = [x.cpu().numpy() * std + mean for x in frames]
    return out


def is_readable(points, size=64):
    """Whether points_to_mask can make anything of a cloud at a size, however rough."""
    try:
        points_to_mask(points, size)
    except ValueError:
        return False
    return True


def sample_valid(net, ddpm, config, group, n, steps, seed, accept=is_valid):
    """n valid clouds of one group, how many were drawn and kept for them; InputError below 20 % valid."""
    kept, drawn = [], 0
    while len(kept) < n:
        clouds = sample_clouds(net, ddpm, config, group, n - len(kept) + 4, steps, seed, first=drawn)
        drawn += len(clouds)
        kept += [c for c in clouds if accept(c)]
        if drawn >= 40 and len(kept) < min(n, 0.2 * drawn):
            raise InputError(f"only {len(kept)} of {drawn} sampled clouds show readable, nested outlines; "
                             "train longer with `python pointdiff.py train --steps`")
    return np.stack(kept[:n]), drawn, len(kept)


def load_models(paths, group, device):
    """{group: (network, diffusion, config)} of one checkpoint for all groups, or of several for one each.

    group: the name of the only one to be drawn, or None. InputError where checkpoints do not fit together.
    """
    models = {}
    for path in paths:
        net, ddpm, config = load_points(path, device)
        names, own = tuple(config["groups"]), config["group"] or group
        if group and group != own:
            raise InputError(f"{path}: trained on {own} alone; it cannot draw {group}")
        mine = [group_number(names, own)] if own else range(len(names))
        if set(mine) & set(models):
            raise InputError(f"{path}: expected one checkpoint a group, this is another for {names[mine[0]]}")
        models |= {g: (net, ddpm, config) for g in mine}
    if len({(c["attribute"], *c["image"]) for *_, c in models.values()}) > 1:
        raise InputError(f"{' '.join(paths)}: expected one attribute and one size of masks")
    return models


def read_masks(clouds, size):
    """Masks uint8 (M, H, W) of sampled clouds (M, N, 3); InputError where one is smaller than a pixel."""
    try:
        return np.stack([points_to_mask(c, size) for c in clouds])
    except ValueError as e:
        raise InputError(f"a sampled cloud gives no mask of {size} pixels ({e}): train longer or give a "
                         "larger --size") from None


def sample(args):
    """Draw masks of one group, or of every group, into a dataset file whose images are 0.

    Several checkpoints: each draws the group that it was trained on, as the paper does.
    """
    device, _ = pick_device(args.device)
    models = load_models(args.checkpoint, args.group, device)
    config = next(iter(models.values()))[2]                             # alike in all that is read of it here
    names = config["groups"]
    size = (args.size, args.size) if args.size else tuple(config["image"])
    n = args.n or config["share"]                                      # what Equal Scale asks for at most
    masks, codes, rows, groups = [], [], [], sorted(models)
    for g in groups:
        clouds, drawn, valid = sample_valid(*models[g], g, n, args.steps, args.seed,
                                            (lambda c: is_readable(c, size)) if args.rough else is_valid)
        note = f"; --rough kept {n}, {sum(map(is_valid, clouds))} of them valid" if args.rough else ""
        print(f"{names[g]}: {n} masks, {drawn - valid} of {drawn} clouds rejected ({valid / drawn:.1%} "
              f"{'readable' if args.rough else 'valid'}){note}")
        masks += [*read_masks(clouds, size)]
        codes += [g] * n
        rows.append([m * 127 for m in masks[-n:][:8]])
    mask, code = np.stack(masks), np.array(codes, np.int8)
    attribute = config["attribute"]
    column = ({"age": np.where(code > 0, 70, 50).astype(np.float32)} if attribute == "age" else
              {attribute: code})                                # a synthetic row knows only its own attribute
    name = np.array([f"synthetic-{names[g]}-{args.seed}-{i:05d}" for i, g in enumerate(code)])
    save_set(args.out, {"image": np.zeros_like(mask), "mask": mask, "name": name,
                        "synthetic": np.ones(len(mask), bool)} | column)
    save_sheet(f"{args.out}.png", rows, [names[g] for g in groups])


# ------------------------------------------------------------------------------------------------------------
# Evaluation: sampled masks beside held-out real ones

def shape_figures(mask):
    """Vertical cup-to-disc ratio, disc area (share of the image), disc centre x and y in [-1, 1]: (M, 4).

    mask: uint8 (M, H, W), every one with a disc.
    """
    disc, (h, w) = mask > 0, mask.shape[1:]
    ratio = (mask == 2).any(2).sum(1) / disc.any(2).sum(1)
    area = disc.sum((1, 2))
    x = disc.sum(1) @ (2 * np.arange(w) + 1) / (w * area) - 1
    y = disc.sum(2) @ (2 * np.arange(h) + 1) / (h * area) - 1
    return np.stack([ratio, area / (h * w), x, y], 1)


def chamfer(a, b):
    """Chamfer distances (len(a), len(b)): the mean distance to the nearest point, both ways, added.

    a, b: clouds float32 (n, P, 3); with z = -1 and 1 a point's nearest is hardly ever on the other outline.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    out = torch.empty(len(a), len(b))
    # |p - q|^2 = |p|^2 - 2 p.q + |q|^2 is one product; 50 clouds at a time stay in the cache.
    left = torch.cat([(a ** 2).sum(2, keepdim=True), -2 * a, torch.ones_like(a[..., :1])], 2)
    right = torch.cat([torch.ones_like(b[..., :1]), b, (b ** 2).sum(2, keepdim=True)], 2)
    for j in range(0, len(b), 50):
        part = right[j:j + 50].reshape(-1, 5).T.contiguous()                            # (5, 50 P)
        for i, cloud in enumerate(left):
            d = (cloud @ part).view(len(cloud), -1, b.shape[1])                         # (P, 50, P), squared
            out[i, j:j + 50] = sum(d.amin(k).clamp(min=0).sqrt().mean(m) for k, m in ((2, 0), (0, 1)))
    return out.numpy()


def compare_masks(made, known, held, other):
    """Rows (figure, sampled, reference) for sampled, training and two disjoint held-out sets of masks.

    The shape figures' reference is the training masks against the first held-out set, that of 1-NNA, COV and
    MMD the second held-out set against the first, that of the memorised share the first held-out set. A mask
    counts as memorised if its nearest training mask is closer than 99 % of these are to their own nearest.
    """
    from scipy.stats import ks_2samp  # a second to import, for this alone

    rows = []
    for name, x, y, z in zip(("cup/disc", "area", "centre x", "centre y"),
                             *(shape_figures(m).T for m in (made, held, known)), strict=True):
        rows += [(f"{name}, shift in sd", (x.mean() - y.mean()) / y.std(), (z.mean() - y.mean()) / y.std()),
                 (f"{name}, spread", x.std() / y.std(), z.std() / y.std()),
                 (f"{name}, KS", ks_2samp(x, y).statistic, ks_2samp(z, y).statistic)]
    made, known, held, other = (np.stack([mask_to_points(m, 128) for m in part])
                                for part in (made, known, held, other))
    hh, mh, oh = (chamfer(a, held) for a in (held, made, other))
    rows += [("1-NNA", one_nna(chamfer(made, made), hh, mh), one_nna(chamfer(other, other), hh, oh))]
    rows += zip(("MMD", "COV"), mmd_cov(mh), mmd_cov(oh), strict=True)
    itself = chamfer(known[:500], known)
    np.fill_diagonal(itself, np.inf)
    near = np.quantile(itself.min(1), 0.01)
    return [*rows, ("memorised", *((chamfer(a, known).min(1) < near).mean() for a in (made, held)))]


def score(args):
    """Are sampled masks like held-out real masks of their group, and are they new?"""
    device, _ = pick_device(args.device)
    models, parts = load_models(args.checkpoint, None, device), []
    attribute = next(iter(models.values()))[2]["attribute"]
    for path in (args.train, args.test):
        data = load_set(path)
        code, names = known_groups(data, attribute)
        parts.append([data["mask"][(code == g) & (data["mask"] > 0).any((1, 2))] for g in range(len(names))])
    there = [g for g, (known, held) in enumerate(zip(*parts, strict=True))
             if len(known) > 1 and len(held) > 3 and g in models]
    if not there:
        raise InputError(f"{args.test}: no group with 4 masks that have a disc")
    table, sheet = [], []
    for steps in args.steps:
        for g in there:
            known, held = parts[0][g], parts[1][g]
            n, started = min(args.n, len(held) // 2), time.perf_counter()      # two held-out sets of a size
            clouds, drawn, valid = sample_valid(*models[g], g, n, steps, args.seed)
            rows = [("ms a cloud", 1000 * (time.perf_counter() - started) / drawn, 0.0),
                    ("valid", valid / drawn, 1.0)]
            made = read_masks(clouds, held.shape[1:])
            rows += compare_masks(made, known, held[:n], held[n:2 * n])
            table += [(names[g], n, steps, *row) for row in rows]
            if steps == args.steps[-1]:
                cloud, = sample_clouds(*models[g], g, 1, steps, args.seed, frames=(frames := []))
                far = chamfer(cloud[None, ::4], np.stack([mask_to_points(m, 128) for m in known]))[0]
                picked = np.linspace(0, len(frames) - 1, 8).round().astype(int)
                tiles = [draw_cloud(frames[i][0]) for i in picked]
                tiles += [draw_mask(m) for m in (points_to_mask(cloud, 128), *known[np.argsort(far)[:3]])]
                sheet.append([*tiles, draw_histogram(shape_figures(held)[:, 0], shape_figures(made)[:, 0])])
    with replacing(args.out) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("group", "n", "steps", "figure", "sampled", "reference"))
        writer.writerows(table)
    print_scores(table)
    save_sheet(f"{args.out}.png", sheet, [names[g] for g in there], zoom=1,
               note="from noise | its mask | the nearest training masks | cup/disc: grey real, red sampled")


def print_scores(table):
    """The last number of sampler steps group by group, and the mean of the groups at all of them, if several.

    table: rows (group, n, steps, figure, sampled, reference).
    """
    groups, curve, figures = (list(dict.fromkeys(row[i] for row in table)) for i in (0, 2, 3))
    cell = {(group, steps, figure): pair for group, _, steps, figure, *pair in table}
    print(f"{'sampled | reference':<24}" + "".join(f"{name:>20}" for name in groups))
    for figure in figures:
        pairs = [cell[name, curve[-1], figure] for name in groups]
        print(f"{figure:<24}" + "".join(f"{a:>11.3f} |{b:>7.3f}" for a, b in pairs))
    sizes = {row[0]: row[1] for row in table}
    print(f"{curve[-1]} sampler steps, masks a side: {', '.join(f'{name} {sizes[name]}' for name in groups)}")
    if len(curve) > 1:
        print(f"{'mean of the groups':<24}" + "".join(f"{n:>6} steps" for n in curve) + "   reference")
        for figure in figures:
            mean = [np.mean([cell[name, steps, figure] for name in groups], 0) for steps in curve]
            print(f"{figure:<24}" + "".join(f"{a:>12.3f}" for a, _ in mean) + f"{mean[-1][1]:>12.3f}")


# ------------------------------------------------------------------------------------------------------------
# Pictures

def draw_cloud(points, side=128):
    """A cloud (N, 3) as a picture uint8 (side, side, 3): disc blue, cup orange."""
    tile = np.full((side, side, 3), 255, np.uint8)
    column, row = ((points[:, :2].T + 1) / 2 * side).clip(0, side - 1).astype(int)
    tile[row, column] = np.where(points[:, 2:] > 0, OUTLINE[2], OUTLINE[1])
    return tile


def draw_mask(mask, side=128):
    """A mask (H, W) as a picture uint8 (side, side, 3)."""
    grey = Image.fromarray(mask * 127).resize((side, side), Image.Resampling.NEAREST)
    return np.asarray(grey.convert("RGB"))


def draw_histogram(real, made, side=128, bins=16):
    """Two samples' histograms over [0, 1] as a picture uint8 (side, side, 3): real grey, made a red line."""
    tile = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(tile)
    a, b = (np.histogram(x, bins, (0, 1))[0] / len(x) for x in (real, made))
    top, w = max(a.max(), b.max()), side / bins
    for i in range(bins):
        pen.rectangle((i * w, side - 1 - a[i] / top * (side - 8), (i + 1) * w - 1, side - 1), "#bbbbbb")
    pen.line([((i + 0.5) * w, side - 1 - b[i] / top * (side - 8)) for i in range(bins)], "#cc2222", 2)
    return np.asarray(tile)


# ------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="pointdiff.py", description="PointNet DDPM of mask boundaries")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("train", help="train the point model")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("--out", default="points.pt", help="checkpoint; an interrupted training continues from it")
    p.add_argument("--attribute", choices=ATTRIBUTE_NAMES, default="race", help="sensitive attribute")
    p.add_argument("--group", help="train on this group alone, as the paper does")
    p.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    p.add_argument("--batch", type=int, default=32, help="clouds a step")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--width", type=int, default=96, help="channels of a point's features")
    p.add_argument("--depth", type=int, default=2, help="residual blocks")
    p.add_argument("--latent", type=int, default=16, help="numbers in a shape code")
    p.add_argument("--points", type=int, default=256, help="points of a cloud that a step looks at")
    p.add_argument("--predict", choices=("v", "eps"), default="v", help="the paper's: eps")
    p.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="noise schedule")
    p.add_argument("--seed", type=int, default=0, help="draws weights, batches, times and noise")
    p.add_argument("--compile", action="store_true", help="torch.compile: slow at first, then faster")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=train)
    p = sub.add_parser("score", help="compare sampled masks with held-out real ones")
    p.add_argument("checkpoint", nargs="+", help="what train wrote; several: one for each group")
    p.add_argument("train", help="dataset .npz that it was trained on")
    p.add_argument("test", help="dataset .npz of held-out masks")
    p.add_argument("--out", default="points.csv", help="the table; a picture is written beside it")
    p.add_argument("--n", type=int, default=500, help="masks a group, at most half of the held-out ones")
    p.add_argument("--steps", type=int, default=[32], nargs="+", help="sampler steps; several: a curve")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=score)
    p = sub.add_parser("sample", help="draw masks")
    p.add_argument("checkpoint", nargs="+", help="what train wrote; several: one for each group")
    p.add_argument("--out", default="masks.npz", help="dataset file of masks, images 0")
    p.add_argument("--group", help="one group's name; without it every group")
    p.add_argument("--n", type=int, help="masks a group (default: the equal share of the training set)")
    p.add_argument("--size", type=int, help="pixels a side (default: the training masks')")
    p.add_argument("--steps", type=int, default=32, help="sampler steps")
    p.add_argument("--rough", action="store_true", help="keep invalid clouds, too: for smoke tests alone")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=sample)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
