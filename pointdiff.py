"""Point-mask generation (Section 2.2): masks to boundary points, a PointNet DDPM of them, points to masks.

    python pointdiff.py train data/train.npz --attribute race --out points.pt
    python pointdiff.py sample points.pt --n 300 --out masks.npz
    python pointdiff.py evaluate masks.npz data/train.npz data/test.npz --attribute race

A mask becomes 512 points (x, y, z): x, y lie on the outlines of disc and cup, z names the outline (Eq. 3-4).
A network that treats the points as a set learns to remove noise from them, step by step, until pure noise
turns into outlines. A latent code z of the whole outline (Luo & Hu 2021) keeps the samples diverse.
At SCALE=cpu: 2,800 steps in about two minutes, a loss of about 0.1, and 98 % of the sampled clouds valid.
"""
import csv
import math
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fairdiff import (
    InputError,
    Parser,
    Run,
    add_training_settings,
    fingerprint,
    group_codes,
    load_checkpoint,
    load_set,
    positive,
    replacing,
    run_command,
    save_grid,
    save_set,
    setup,
)
from fairness import print_table, set_distance

# B batch, N points, C channels, G groups, D latent numbers. Points lie in [-1, 1] x [-1, 1] x {-1, 1}.

# -----------------------------------------------------------------------------
# Masks to points (Eq. 3-4). An outline is a radius for each angle around its centre.

ANGLES = np.linspace(-np.pi, np.pi, 720, endpoint=False)

def largest_component(region):
    """The largest component of a bool image, without holes, and without hairs where it is large."""
    if region.sum() > 2000:
        region = ndimage.binary_opening(region)
    labels, n = ndimage.label(region)
    if n > 1:
        region = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return ndimage.binary_fill_holes(region)

def polar(xy):
    """Centre of points (M, 2), the middle of their box, and their angles (M,), sorted, and radii (M,)."""
    centre = (xy.min(0) + xy.max(0)) / 2
    dx, dy = (xy - centre).T
    angle = np.arctan2(dy, dx)
    order = angle.argsort()
    return centre, angle[order], np.hypot(dx, dy)[order]

def boundary(region, n):
    """Boundary(I) of Eq. 3: n points (n, 2) in pixels, at equal distances on the outline of a bool image."""
    y, x = np.nonzero(region & ~ndimage.binary_erosion(region))         # the outermost pixels
    centre, angle, radius = polar(np.stack([x, y], 1))
    angle = np.append(angle, angle[0] + 2 * np.pi)                      # close the outline
    radius = np.append(radius, radius[0]) + 0.5                         # from a pixel's centre to its border
    ring = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    length = np.r_[0, np.hypot(*np.diff(ring, axis=0).T).cumsum()]
    place = (np.arange(n) + 0.5) / n * length[-1]
    return np.stack([np.interp(place, length, ring[:, i]) for i in (0, 1)], 1)

def mask_to_points(mask, n_points=512):
    """Outlines of a mask uint8 (H, W) as points float32 (n_points, 3) in [-1, 1], Eq. 3-4.

    z is +1 on the cup's outline and -1 on the disc's; half of the points each, or all on the disc's where
    there is no cup. Holes are filled and stray components dropped. ValueError for a mask without disc.
    """
    if not mask.any():
        raise ValueError("mask without disc: it has no outline")
    rows, columns = ndimage.find_objects(np.minimum(mask, 1))[0]        # its box, to save time
    part = np.pad(mask[rows, columns], 1)
    disc = largest_component(part > 0)
    cup = largest_component((part == 2) & disc)
    n_cup = n_points // 2 if cup.any() else 0
    points = np.full((n_points, 3), -1.0, np.float32)                   # Eq. 4: z = -1 on the disc
    points[n_cup:, :2] = boundary(disc, n_points - n_cup)               # Eq. 3
    if n_cup:
        points[:n_cup, :2] = boundary(cup, n_cup)
        points[:n_cup, 2] = 1                                           # Eq. 4: z = +1 on the cup
    points[:, :2] += (columns.start - 1, rows.start - 1)
    points[:, :2] = (2 * points[:, :2] + 1) / mask.shape[::-1] - 1      # pixels to [-1, 1]
    return points

# -----------------------------------------------------------------------------
# Points to masks

SMOOTH = 16                             # harmonics of a sampled outline; higher ones are the points' noise

def fit_outline(xy, harmonics):
    """The outline through points (M, 2), in any order: its centre and its radius at ANGLES."""
    centre, angle, radius = polar(xy)
    wave = np.fft.rfft(np.interp(ANGLES, angle, radius, period=2 * np.pi))
    wave[harmonics:] = 0
    return centre, np.fft.irfft(wave, len(ANGLES))

def inside(outline, xy):
    """Whether points (..., 2) lie within an outline."""
    centre, radius = outline
    dx, dy = xy[..., 0] - centre[0], xy[..., 1] - centre[1]
    return np.hypot(dx, dy) <= np.interp(np.arctan2(dy, dx), ANGLES, radius, period=2 * np.pi)

def split_outlines(points):
    """The points (M, 2) of the disc, and those of the cup, which are none where at most 2 % have z > 0."""
    on_cup = points[:, 2] > 0
    return points[~on_cup, :2], points[on_cup & (on_cup.mean() > 0.02), :2]

def points_to_mask(points, size, harmonics=256):
    """The mask uint8 (H, W) whose outlines points (N, 3) mark, in any order; size: pixels a side or (H, W).

    The cup is cut to the disc. ValueError where there are fewer than 8 points on an outline.
    """
    h, w = (size, size) if isinstance(size, int) else size
    mask = np.zeros((h, w), np.uint8)
    for label, xy in enumerate(split_outlines(points), 1):
        if 0 < len(xy) < 8 or (label == 1 and not len(xy)):
            raise ValueError(f"{len(xy)} points on an outline: at least 8 are needed")
        if len(xy):
            outline = fit_outline(xy, harmonics)
            reach = outline[1].max()
            low = ((outline[0] - reach + 1) / 2 * (w, h)).clip(0, (w, h)).astype(int)
            high = ((outline[0] + reach + 1) / 2 * (w, h) + 1).clip(0, (w, h)).astype(int)
            x, y = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
            pixels = (2 * np.stack([x, y], 2) + 1) / (w, h) - 1
            part = mask[low[1]:high[1], low[0]:high[0]]
            part[inside(outline, pixels) & (part == label - 1)] = label
    return mask

def is_valid(points):
    """Whether a sampled cloud (N, 3) shows clean, closed and nested outlines.

    95 % of the points lie within 0.03 of the smooth outlines through them, no outline has a gap of more than
    30 degrees, and the cup's outline lies inside the disc's.
    """
    disc, cup = split_outlines(points)
    distances = []
    for xy in (disc, cup) if len(cup) else (disc,):
        if len(xy) < 8:
            return False
        _, angle, radius = polar(xy)
        smooth = np.interp(angle, ANGLES, fit_outline(xy, SMOOTH)[1], period=2 * np.pi)
        distances.append(np.abs(radius - smooth))
        if np.diff(angle, append=angle[0] + 2 * np.pi).max() > np.pi / 6:
            return False
    if len(cup):
        centre, radius = fit_outline(cup, SMOOTH)
        ring = centre + radius[:, None] * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
        if not inside(fit_outline(disc, SMOOTH), ring).all():
            return False
    return (np.concatenate(distances) <= 0.03).mean() >= 0.95

# -----------------------------------------------------------------------------
# PointNet (Qi et al. 2017) as denoiser

def timestep_embedding(t, dim):
    """Sinusoids (B, dim) of the diffusion step t (B,)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)

class PointBlock(nn.Module):
    """A residual MLP that all points share, modulated by the cloud's pooled features and the condition."""
    def __init__(self, width):
        super().__init__()
        self.pool = nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)                                 # a block starts as the identity
        nn.init.zeros_(self.fc2.bias)

    def forward(self, h, condition):
        pooled = torch.cat([h.amax(1), h.mean(1)], 1)                   # (B, 2C): permutation invariant
        condition = F.silu(condition + self.pool(pooled))               # (B, C)
        scale, shift = self.modulation(condition)[:, None].chunk(2, 2)  # (B, 1, C)
        y = self.fc1(h) * (1 + scale) + shift                           # (B, N, C)
        return h + self.fc2(F.silu(y))                                  # (B, N, C)

class PointNet(nn.Module):
    """Denoiser of point clouds: x (B, N, 3), t long (B,), group long (B,), -1 unknown -> (B, N, 3).

    Permuting the points permutes the output. z (B, D) is the latent code of the cloud: `encode` reads it from
    a clean cloud, `sample_prior` draws it from the Gaussian of a group; None: zeros.
    """
    def __init__(self, n_groups, width=96, depth=2, latent=16):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.group = nn.Embedding(n_groups + 1, width)                  # row 0: unknown
        self.latent = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width))
        self.input_proj = nn.Linear(3, width)
        self.blocks = nn.ModuleList(PointBlock(width) for _ in range(depth))
        self.output_proj = nn.Linear(width, 3)
        nn.init.zeros_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.to_latent = nn.Linear(2 * width, 2 * latent)
        self.register_buffer("prior_mean", torch.zeros(n_groups, latent))
        self.register_buffer("prior_root", torch.eye(latent).repeat(n_groups, 1, 1))

    def forward(self, x, t, group, z=None):
        condition = self.time(timestep_embedding(t, self.width)) + self.group(group + 1)    # (B, C)
        if z is not None:
            condition = condition + self.latent(z)
        h = self.input_proj(x)                                          # (B, N, C)
        for block in self.blocks:
            h = block(h, condition)                                     # (B, N, C)
        return self.output_proj(F.silu(h))                              # (B, N, 3)

    def encode(self, x):
        """q(z | x) of clean clouds x (B, N, 3): mean and variance (B, D)."""
        h = self.encoder(x)                                             # (B, N, C)
        h = self.to_latent(torch.cat([h.amax(1), h.mean(1)], 1))        # (B, 2D)
        mean, log_variance = h.float().chunk(2, 1)
        return mean, log_variance.clamp(-10, 2).exp()

    @torch.no_grad()
    def fit_prior(self, x, group):
        """Fit p(z | group), a Gaussian, to the codes of all clean clouds x (M, N, 3) of groups (M,).

        A rare group has too few clouds for a covariance of its own: it leans on that within all groups.
        """
        codes = [self.encode(part) for part in x.split(256)]
        mean = torch.cat([m for m, _ in codes])                         # (M, D)
        noise = torch.cat([v for _, v in codes]).mean(0).diag()
        self.prior_mean[:] = mean.mean(0)                               # for a group without clouds
        for g in group.unique():
            self.prior_mean[g] = mean[group == g].mean(0)
        centred = mean - self.prior_mean[group]
        within = centred.T @ centred / len(centred)
        self.prior_root[:] = torch.linalg.cholesky(within + noise)
        for g in group.unique():
            own = centred[group == g]
            share = len(own) / (len(own) + 3 * within.shape[0])
            covariance = share * own.T @ own / len(own) + (1 - share) * within + noise
            self.prior_root[g] = torch.linalg.cholesky(covariance)

    def sample_prior(self, group, generator, spread=0.92):
        """Codes z (B, D) of groups (B,). Slightly less than the whole spread: no cups that cross the disc."""
        z = torch.randn(self.prior_mean[group].shape, generator=generator, device=group.device)
        return self.prior_mean[group] + spread * torch.einsum("bij,bj->bi", self.prior_root[group], z)

# -----------------------------------------------------------------------------
# Diffusion

class DDPM:
    """Denoising diffusion (Ho et al. 2020) of tensors (B, ...): points here, images in controlnet.py.

    predict: "v" (Salimans & Ho 2022) or "eps", the paper's; schedule: "cosine" (Nichol & Dhariwal 2021) or
    "linear", the paper's.
    """
    def __init__(self, T=1000, predict="v", schedule="cosine"):
        self.T = T
        self.predict = predict
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        if schedule == "cosine":
            t = torch.arange(T + 1, dtype=torch.float64) / T
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        self.alpha_bar = torch.cumprod(1 - beta, 0).float()             # (T,)

    def scales(self, t, x):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of steps t (B,), shaped to multiply x (B, ...)."""
        self.alpha_bar = self.alpha_bar.to(x.device)
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noise(self, x0, t, eps):
        """The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def loss(self, net, x0, *condition, weight=1.0):
        """Mean squared error of the prediction at random steps (Algorithm 1); weight: of the elements."""
        t = torch.randint(self.T, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        alpha, sigma = self.scales(t, x0)
        target = eps if self.predict == "eps" else alpha * eps - sigma * x0
        prediction = net(self.noise(x0, t, eps), t, *condition).float()
        return (weight * (prediction - target) ** 2).mean()

    @torch.no_grad()
    def sample(self, net, shape, *condition, steps=50, generator=None, clip=None, frames=None):
        """Samples x_0 of a shape (B, ...) from noise (Algorithm 2), on `steps` of the T steps (DDIM, eta = 1).

        clip: bounds of x_0; frames: a list to which the x_t of every step is added.
        """
        device = self.alpha_bar.device if generator is None else generator.device
        x = torch.randn(shape, generator=generator, device=device)
        times = torch.linspace(self.T - 1, 0, min(steps, self.T)).round().long().tolist()
        for step, next_step in zip(times, times[1:] + [None], strict=True):
            if frames is not None:
                frames.append(x)
            t = torch.full(shape[:1], step, device=device)
            alpha, sigma = self.scales(t, x)
            prediction = net(x, t, *condition).float()
            x0 = alpha * x - sigma * prediction
            if self.predict == "eps":
                x0 = (x - sigma * prediction) / alpha
            x0 = x0 if clip is None else x0.clamp(*clip)
            if next_step is None:
                return x0                                               # no noise after the last step
            eps = (x - alpha * x0) / sigma
            alpha_next, sigma_next = self.scales(torch.full_like(t, next_step), x)
            std = sigma_next / sigma * (1 - (alpha / alpha_next) ** 2).clamp(min=0).sqrt()
            x = alpha_next * x0 + (sigma_next ** 2 - std ** 2).clamp(min=0).sqrt() * eps
            x = x + std * torch.randn(shape, generator=generator, device=device)

# -----------------------------------------------------------------------------
# Training

def build(config):
    """The network and the diffusion of a checkpoint's config."""
    net = PointNet(len(config["groups"]), config["width"], config["depth"], config["latent"])
    return net, DDPM(config["T"], config["predict"], config["schedule"])

def train(args):
    """Train a model of the clouds of all groups, or with --group of one, as the paper does."""
    device, world = setup(args.device)
    data = load_set(args.set)
    code, names = group_codes(data, args.attribute)
    rows = np.flatnonzero(data["mask"].any((1, 2)) & (code >= 0))
    if args.group:
        rows = rows[data[args.attribute][rows] == args.group]
    if not len(rows):
        raise InputError(f"{args.set}: no mask with a disc in {args.group or 'any group'}; expected some")
    points = np.stack([mask_to_points(data["mask"][i]) for i in tqdm(rows, "masks to points")])
    mean, std = points.mean((0, 1)), points.std((0, 1)) + 1e-6
    x = torch.as_tensor((points - mean) / std, device=device)           # (M, 512, 3)
    group = torch.as_tensor(code[rows], device=device)                  # (M,)
    settings = ("attribute", "group", "steps", "batch", "lr", "seed", "width", "depth", "latent", "points", "T",
                "predict", "schedule")
    config = {key: getattr(args, key) for key in settings} | {
        "kind": "points", "groups": names, "size": list(data["mask"].shape[1:]), "mean": mean.tolist(),
        "std": std.tolist(), "n_equal": round((code >= 0).sum() / len(names)) + 1,
        "data": fingerprint(data["mask"], code)}
    torch.manual_seed(args.seed)
    net, ddpm = build(config)
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    run = Run(args.out, config, net, optimizer, 0.998)
    model = DistributedDataParallel(net) if world > 1 else net
    for step in run.steps():
        for options in optimizer.param_groups:                          # warm up, then half a cosine
            options["lr"] = args.lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        index = torch.randint(len(x), (args.batch // world,), device=device)
        part = torch.randperm(512, device=device)[:args.points]         # a part of a set shows its shape
        x0 = x[index][:, part]                                          # (B, N, 3)
        mu, var = net.encode(x0)
        z = mu + var.sqrt() * torch.randn_like(mu)
        kl = 0.5 * (mu ** 2 + var - var.log() - 1).sum(1).mean()        # KL(q(z|x) || N(0, I))
        loss = ddpm.loss(model, x0, group[index], z)
        optimizer.zero_grad()
        (loss + 1e-5 * kl).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        run.update(loss)
    run.ema.fit_prior(x, group)
    run.save()
    print(f"points: loss {np.mean([loss for _, loss in run.losses[-5:]]):.4f} after {args.steps} steps")

# -----------------------------------------------------------------------------
# Sampling

def sample_clouds(net, ddpm, config, g, n, steps, seed, frames=None):
    """n sampled clouds float32 (n, points, 3) of group number g; seed: whole numbers."""
    generator = torch.Generator(net.prior_mean.device)
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    group = torch.full((n,), g, device=net.prior_mean.device)
    z = net.sample_prior(group, generator)
    x = ddpm.sample(net, (n, config["points"], 3), group, z, steps=steps, generator=generator, clip=(-4, 4), frames=frames)
    return x.cpu().numpy() * np.float32(config["std"]) + np.float32(config["mean"])

def sample(args):
    """Sample masks of one group or of all: a dataset whose images are 0. Invalid clouds are drawn again."""
    device, _ = setup(args.device)
    state = load_checkpoint(args.checkpoint, ("points",))
    config = state["config"]
    net, ddpm = build(config)
    net.load_state_dict(state["ema"])
    net = net.to(device).eval()
    only = args.group or config["group"]
    if only and only not in config["groups"]:
        raise InputError(f"no group {only!r}; expected {', '.join(config['groups'])}")
    n, size = args.n or config["n_equal"], args.size or config["size"]
    masks, names, rows = [], [], []
    for g, name in enumerate(config["groups"]):
        if only and name != only:
            continue
        kept, drawn, valid = [], 0, 0
        while len(kept) < n:
            more = min(100, n - len(kept) + 4)
            clouds = sample_clouds(net, ddpm, config, g, more, args.steps, (args.seed, g, drawn))
            good = [cloud for cloud in clouds if is_valid(cloud)]
            kept += list(clouds) if args.keep_invalid else good
            drawn, valid = drawn + len(clouds), valid + len(good)
            if not args.keep_invalid and valid < 0.2 * drawn:
                raise InputError(f"{args.checkpoint}: {valid} of {drawn} clouds of {name} are valid; expected "
                                 "20 %: train longer, or --keep-invalid")
        masks += [points_to_mask(cloud, size, SMOOTH) for cloud in kept[:n]]
        names += [name] * n
        rows.append([127 * mask for mask in masks[-n:][:8]])
        print(f"{name}: {n} masks, {valid / drawn:.1%} of {drawn} clouds valid")
    mask = np.stack(masks)
    save_set(args.out, {"image": np.zeros_like(mask), "mask": mask, config["attribute"]: np.array(names),
                        "name": np.array([f"synthetic-{args.seed}-{g}-{i:05d}" for i, g in enumerate(names)]),
                        "synthetic": np.ones(len(mask), bool)})
    save_grid(f"{args.out}.png", rows, list(dict.fromkeys(names)), "generated masks")

# -----------------------------------------------------------------------------
# Evaluation

def outline_features(masks):
    """Centre and radii at 16 angles of both outlines of masks (N, H, W): features (N, 36), 0 without cup."""
    features = np.zeros((len(masks), 2, 18))
    for i, mask in enumerate(masks):
        for j, xy in enumerate(split_outlines(mask_to_points(mask))):
            if len(xy):
                centre, radius = fit_outline(xy, SMOOTH)
                features[i, j] = [*centre, *radius[::len(ANGLES) // 16]]
    return features.reshape(len(masks), 36)

def evaluate(args):
    """Compare sampled masks with test masks, group by group; below each the same for real masks."""
    sets = [load_set(path) for path in (args.masks, args.train, args.test)]
    sets = [{"mask": s["mask"][rows], args.attribute: s[args.attribute][rows]}
            for s in sets for rows in [s["mask"].any((1, 2)) & (group_codes(s, args.attribute)[0] >= 0)]]
    lines, pictures, labels = [], [], []
    for name in group_codes(sets[0], args.attribute)[1]:
        masks = [s["mask"][s[args.attribute] == name] for s in sets]
        if min(map(len, masks)) < 4:
            print(f"{name}: {[len(m) for m in masks]} masks (generated, train, test), too few to compare")
            continue
        generated, train, test = map(outline_features, masks)
        half = len(test) // 2
        for label, a, b in (("generated", generated[:half], test[:half]), ("real", test[half:], test[:half])):
            ratio = a[:, 20:].mean(1) / a[:, 2:18].mean(1)
            distance = set_distance(a, b, train)
            lines.append([name, label, f"{ratio.mean():.3f}", f"{ratio.std():.3f}", *(
                f"{v:.4g}" for v in distance.values())])
        nearest = cdist(generated[:4], train).argmin(1)
        pictures.append([127 * m for i in range(4) for m in (masks[0][i], masks[1][nearest[i]])])
        labels.append(name)
    heads = ["group", "masks", "cup/disc", "its SD", *(distance if lines else ())]
    with replacing(args.out) as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *lines])
    if lines:
        print_table("sampled masks beside test masks", heads, lines)
        save_grid(f"{args.out}.png", pictures, labels, "a generated mask, then the nearest training mask")

# -----------------------------------------------------------------------------
# Command line

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="pointdiff.py", description="PointNet DDPM of mask boundaries.")
    p = parser.command("train", train, "train the point model")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--group", help="train on this group alone, as the paper does")
    p.add_argument("--out", default="points.pt", help="checkpoint; an interrupted training continues")
    p.add_argument("--width", type=positive, default=96, help="channels of a point's features")
    p.add_argument("--depth", type=positive, default=2, help="residual blocks")
    p.add_argument("--latent", type=positive, default=16, help="numbers in a latent code")
    p.add_argument("--points", type=positive, default=256, help="points of a cloud that a step looks at")
    p.add_argument("--T", type=positive, default=1000, help="diffusion steps")
    p.add_argument("--predict", choices=("v", "eps"), default="v", help="the paper's: eps")
    p.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="the paper's: linear")
    add_training_settings(p, steps=2800, batch=32, lr=2e-3)
    p = parser.command("sample", sample, "sample masks")
    p.add_argument("checkpoint", help="what train wrote")
    p.add_argument("--group", help="of this group alone")
    p.add_argument("--n", type=positive, help="masks a group (default: what Equal Scale needs at most)")
    p.add_argument("--size", type=positive, help="pixels a side (default: the training masks')")
    p.add_argument("--steps", type=positive, default=32, help="sampler steps")
    p.add_argument("--keep-invalid", action="store_true", help="for models that are hardly trained")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--device", default="auto", help="as in train")
    p.add_argument("--out", default="masks.npz", help="dataset of masks, images 0")
    p = parser.command("evaluate", evaluate, "compare sampled masks with test masks")
    p.add_argument("masks", help="what sample wrote")
    p.add_argument("train", help="dataset .npz of training masks")
    p.add_argument("test", help="dataset .npz of test masks")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--out", default="masks.csv", help="CSV file of the table")
    return run_command(parser, argv)

if __name__ == "__main__":
    sys.exit(main())
