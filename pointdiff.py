"""Point-mask generation (Section 2.2): mask to boundary points, a PointNet DDPM, points to mask.

    python pointdiff.py train data/train.npz --attribute race --out points.pt
    python pointdiff.py sample points.pt --n 300 --out masks.npz
    python pointdiff.py evaluate masks.npz data/train.npz data/test.npz --attribute race

A mask becomes 512 points: x, y lie on the outline of disc or cup, z says which (Eq. 3-4). A network
that takes points in any order denoises them. B batch, N points, M any number, C channels, D latent.
"""
import math
import sys
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

from fairdiff import (InputError, Run, autocast, command_line, fingerprint, group_codes,
                      load_checkpoint, load_set, save_grid, save_set, setup)
from fairness import print_table, save_csv, set_distance

# ---- Masks to points (Eq. 3-4): an outline is a centre and a radius at each angle ---------------
ANGLES = np.linspace(-np.pi, np.pi, 720, endpoint=False)
SMOOTH = 16                             # harmonics of a sampled outline; higher ones are noise

def largest_component(region):
    """The largest part of a bool image, its holes filled; above 2,000 pixels without thin spurs."""
    region = ndimage.binary_opening(region) if region.sum() > 2000 else region
    labels, _ = ndimage.label(region)
    sizes = np.bincount(labels.ravel(), minlength=2)[1:]
    return ndimage.binary_fill_holes(labels == 1 + sizes.argmax())

def polar(xy):
    """A closed outline through points (M, 2): centre of its box, angles and radii (M + 1,)."""
    centre = (xy.min(0) + xy.max(0)) / 2
    dx, dy = (xy - centre).T
    angle = np.arctan2(dy, dx)
    order = np.append(angle.argsort(), angle.argmin())                  # close the outline
    angle = np.append(np.sort(angle), angle.min() + 2 * np.pi)
    return centre, angle, np.hypot(dx, dy)[order]

def boundary(region, n):
    """Boundary(I) of Eq. 3: n points (n, 2) in pixels, evenly along the outline of a bool image."""
    y, x = np.nonzero(region & ~ndimage.binary_erosion(region))
    centre, angle, radius = polar(np.stack([x, y], 1))
    radius = radius + 0.5                                               # to the pixels' border
    ring = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    length = np.r_[0, np.hypot(*np.diff(ring, axis=0).T).cumsum()]
    place = (np.arange(n) + 0.5) / n * length[-1]
    return np.stack([np.interp(place, length, ring[:, i]) for i in (0, 1)], 1)

def mask_to_points(mask, n_points=512):
    """Outlines (n_points, 3), float32 in [-1, 1], of a mask (H, W). ValueError: it has no disc."""
    if not mask.any():
        raise ValueError("mask without disc: it has no outline")
    padded = np.pad(mask, 1)                                            # a disc may touch the side
    disc = largest_component(padded > 0)
    cup = largest_component((padded == 2) & disc)
    n_cup = n_points // 2 if cup.any() else 0
    points = np.full((n_points, 3), -1.0, np.float32)                   # Eq. 4: z = -1 on the disc
    points[n_cup:, :2] = boundary(disc, n_points - n_cup)               # Eq. 3
    if n_cup:
        points[:n_cup, :2] = boundary(cup, n_cup)
        points[:n_cup, 2] = 1                                           # Eq. 4: z = +1 on the cup
    points[:, :2] = (2 * points[:, :2] - 1) / mask.shape[::-1] - 1      # pixels to [-1, 1]
    return points

# ---- Points to masks ----------------------------------------------------------------------------
def fit_outline(xy, harmonics):
    """The outline through points (M, 2): its centre and its radius at ANGLES."""
    centre, angle, radius = polar(xy)
    wave = np.fft.rfft(np.interp(ANGLES, angle[:-1], radius[:-1], period=2 * np.pi))
    wave[harmonics:] = 0
    return centre, np.fft.irfft(wave, len(ANGLES))

def depth_inside(outline, xy):
    """Distance (...) of points (..., 2) to an outline along its radius; negative outside."""
    centre, radius = outline
    dx, dy = np.moveaxis(xy - centre, -1, 0)
    return np.interp(np.arctan2(dy, dx), ANGLES, radius, period=2 * np.pi) - np.hypot(dx, dy)

def split_outlines(points):
    """Points (M, 2) of the disc and, if more than 2 % have z > 0, of the cup."""
    on_cup = points[:, 2] > 0
    parts = [points[~on_cup, :2], points[on_cup, :2]]
    return parts if on_cup.mean() > 0.02 else parts[:1]

def points_to_mask(points, size, harmonics=256):
    """Mask uint8 (H, W) of points (N, 3); size: a side or (H, W); harmonics: SMOOTH drops noise."""
    h, w = (size, size) if isinstance(size, int) else size
    x = (2 * np.arange(w) + 1) / w - 1                                  # of pixels, in [-1, 1]
    y = (2 * np.arange(h) + 1) / h - 1
    pixels = np.stack(np.meshgrid(x, y), 2)                             # (H, W, 2)
    mask = np.zeros((h, w), np.uint8)
    for below, xy in enumerate(filter(len, split_outlines(points))):    # disc on 0, cup on 1
        inside = depth_inside(fit_outline(xy, harmonics), pixels) >= 0
        mask += inside & (mask == below)
    return mask

def is_valid(points):
    """Whether a cloud (N, 3) shows smooth outlines without gaps, the cup's inside the disc's."""
    parts = split_outlines(points)
    if min(map(len, parts)) < 8:
        return False
    outlines = [fit_outline(xy, SMOOTH) for xy in parts]
    depth = np.concatenate(list(map(depth_inside, outlines, parts)))
    smooth = (np.abs(depth) <= 0.03).mean() >= 0.95                     # 1.5 % of the side
    gaps = [np.diff(polar(xy)[1]).max() for xy in parts]                # radians, of neighbours
    centre, radius = outlines[-1]
    ring = centre + radius[:, None] * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
    nested = len(parts) == 1 or depth_inside(outlines[0], ring).min() >= 0
    return smooth and nested and max(gaps) <= np.pi / 6                 # 30 degrees

# ---- A PointNet (Qi et al. 2017) denoises; a latent z tells the shape (Luo & Hu 2021) ------------
def timestep_embedding(t, dim):
    """Sinusoids (B, dim) of the diffusion step t (B,)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)

class PointBlock(nn.Module):
    """A residual MLP that all points share, modulated by pooled features and the condition."""
    def __init__(self, width):
        super().__init__()
        self.pool = nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)                                 # starts as the identity
        nn.init.zeros_(self.fc2.bias)

    def forward(self, h, condition):
        pooled = torch.cat([h.max(1).values, h.mean(1)], 1)             # (B, 2C)
        condition = F.silu(condition + self.pool(pooled))               # (B, C)
        scale, shift = self.modulation(condition)[:, None].chunk(2, 2)  # (B, 1, C)
        y = self.fc1(h) * (1 + scale) + shift                           # (B, N, C)
        return h + self.fc2(F.silu(y))                                  # (B, N, C)

class PointNet(nn.Module):
    """Denoiser of clouds x (B, N, 3), given step t (B,), group (B,) and latent z (B, D)."""
    def __init__(self, n_groups, width=96, latent=16):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.group = nn.Embedding(n_groups + 1, width)                  # row 0: unknown
        self.latent = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width))
        self.input_proj = nn.Linear(3, width)
        self.blocks = nn.ModuleList(PointBlock(width) for _ in range(2))
        self.output_proj = nn.Linear(width, 3)
        nn.init.zeros_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.to_latent = nn.Linear(2 * width, 2 * latent)
        self.register_buffer("prior_mean", torch.zeros(n_groups, latent))
        self.register_buffer("prior_root", torch.eye(latent))

    def forward(self, x, t, group, z=None):
        condition = self.time(timestep_embedding(t, self.width)) + self.group(group + 1)
        if z is not None:
            condition = condition + self.latent(z)                      # (B, C)
        h = self.input_proj(x)                                          # (B, N, C)
        for block in self.blocks:
            h = block(h, condition)                                     # (B, N, C)
        return self.output_proj(F.silu(h))                              # (B, N, 3): v or eps

    def encode(self, x):
        """Variational encoder q(z | x) of clean clouds x (B, N, 3): mean and variance (B, D)."""
        h = F.silu(self.encoder(x))                                     # (B, N, C)
        h = self.to_latent(torch.cat([h.max(1).values, h.mean(1)], 1))  # (B, 2D)
        mean, log_variance = h.float().chunk(2, 1)
        return mean, log_variance.clamp(-10, 2).exp()

    @torch.no_grad()
    def fit_prior(self, x, group):
        """Fit p(z | group) of clouds x (M, N, 3), for sampling: Gaussians of equal covariance."""
        latents = [self.encode(part) for part in x.split(256)]
        mean = torch.cat([m for m, _ in latents])                       # (M, D)
        within = torch.cat([v for _, v in latents]).mean(0).diag()      # (D, D): variance of q
        self.prior_mean[:] = mean.mean(0)                               # for a group without clouds
        for g in group.unique():
            self.prior_mean[g] = mean[group == g].mean(0)
        centred = mean - self.prior_mean[group]
        covariance = centred.T @ centred / len(centred) + within
        self.prior_root[:] = torch.linalg.cholesky(covariance)

    def sample_prior(self, group, generator):
        """Latents z (B, D) from p(z | group), of groups (B,)."""
        mean = self.prior_mean[group]
        z = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + z @ self.prior_root.T

# ---- Diffusion ----------------------------------------------------------------------------------
class DDPM:
    """Denoising diffusion (Ho et al. 2020) of tensors (B, ...): as published with "eps", "linear";
    by default with "v" (Salimans & Ho 2022) and "cosine" (Nichol & Dhariwal 2021)."""
    def __init__(self, T=1000, predict="v", schedule="cosine"):
        self.T, self.predict = T, predict
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        if schedule == "cosine":
            t = torch.arange(T + 1, dtype=torch.float64) / T
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        self.alpha_bar = torch.cumprod(1 - beta, 0).float()             # (T,)

    def scales(self, t, x):
        """sqrt(alpha_bar), here alpha, and sqrt(1 - alpha_bar), sigma, at t (B,), to suit x."""
        alpha_bar = self.alpha_bar.to(x.device)[t].view(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noise(self, x0, t, eps):
        """The forward process: x_t of clean x0 and noise eps, both (B, ...), at steps t (B,)."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps                                 # q(x_t | x_0)

    def loss(self, net, x0, t, *condition, weight=1.0):
        """Mean squared error at steps t (B,) (their Algorithm 1); weight: of the elements of x0."""
        eps = torch.randn_like(x0)
        alpha, sigma = self.scales(t, x0)
        target = eps if self.predict == "eps" else alpha * eps - sigma * x0
        prediction = net(self.noise(x0, t, eps), t, *condition).float()
        return (weight * (prediction - target) ** 2).mean()

    @torch.no_grad()
    def sample(self, net, shape, *condition, steps, generator, eta=0.0, clip=(-math.inf, math.inf)):
        """Samples by DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2); clip: bounds of x_0.
        eta 1: by DDIM with new noise in every step (Song et al. 2021), which varies more."""
        x = torch.randn(shape, generator=generator, device=generator.device)
        # a raised cosine: steps lie densest at strong noise, and near the last one, t = 0.024 T
        angle = torch.linspace(0, 0.9 * math.pi, steps)
        times = ((self.T - 1) * (0.5 + 0.5 * angle.cos())).round().long().unique().flip(0)
        alpha = self.alpha_bar[times].sqrt()                            # (steps,)
        sigma = (1 - self.alpha_bar[times]).sqrt()
        h = (alpha / sigma).log().diff()                                # steps in log SNR / 2
        slope = F.pad(h[1:] / h[:-1] / 2, (1, 0))                       # 1 / 2r_i, at first 0
        x0_before = x
        for i, step in enumerate(times):
            prediction = net(x, step.expand(len(x)).to(x.device), *condition).float()
            x0 = alpha[i] * x - sigma[i] * prediction
            if self.predict == "eps":
                x0 = (x - sigma[i] * prediction) / alpha[i]
            x0 = x0.clamp(*clip)
            if i + 1 == len(times):
                return x0
            target = x0 + (1 - eta) * slope[i] * (x0 - x0_before)       # D_i: where x0 is heading
            kept = sigma[i + 1] / sigma[i] * (-eta * h[i]).exp()
            x = kept * x + alpha[i + 1] * (1 - (-(1 + eta) * h[i]).exp()) * target
            if eta > 0:
                std = sigma[i + 1] * (1 - (-2 * eta * h[i]).exp()).sqrt()
                x = x + std * torch.randn(shape, generator=generator, device=x.device)
            x0_before = x0

# ---- The optimizer ------------------------------------------------------------------------------
def orthogonal(x):
    """About the nearest orthonormal matrix to x (n, m), by Newton-Schulz iterations."""
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    factor = eye = torch.eye(len(x), device=x.device)
    square = x @ x.T                                                    # (n, n)
    for _ in range(5):                                                  # numbers as published
        step = 3.4445 * eye + (2.0315 * square - 4.7750 * eye) @ square
        factor = step @ factor
        square = step @ square @ step
    return factor @ x                                                   # (n, m)

class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (Jordan et al. 2024); here it needs half of Adam's steps."""
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)                        # Nesterov's momentum
            if p.ndim > 1:                                              # a row for each filter
                update = orthogonal(update.flatten(1)).reshape(p.shape)
            rms = update.square().mean().sqrt() + 1e-12
            p.sub_(0.2 * self.param_groups[0]["lr"] / rms * update)     # as long as Adam's

# ---- Training -----------------------------------------------------------------------------------
def build(config, device="cpu"):
    """The network, on a device, and the diffusion of a checkpoint's config."""
    net = PointNet(len(config["groups"]), config["width"], config["latent"]).to(device)
    return net, DDPM(predict=config["predict"], schedule=config["schedule"])

def train(dataset, out="points.pt", attribute="race", group: str = None, width=96, latent=16,
          points=192, predict: Literal["v", "eps"] = "v",
          schedule: Literal["cosine", "linear"] = "cosine", steps=1200, batch=16, lr=4e-3, seed=0,
          device="auto"):
    """Train on the clouds of all groups or, as the paper does, of one group alone.
    width: channels; latent: numbers in z; points: how many of the 512 each step takes."""
    config = locals() | {"kind": "points"}
    device, world = setup(device)
    data = load_set(dataset)
    code, names = group_codes(data, attribute)
    members = data[attribute] == group if group else code >= 0
    rows = np.flatnonzero(members & data["mask"].any((1, 2)))
    if not len(rows):
        raise InputError(f"{dataset}: no mask with a disc of {group or 'any group'}")
    clouds = np.stack([mask_to_points(data["mask"][i]) for i in tqdm(rows, "points", disable=None)])
    mean = clouds.mean((0, 1))
    std = clouds.std((0, 1)) + 1e-6
    x = torch.as_tensor((clouds - mean) / std, device=device)           # (M, 512, 3)
    config |= {"groups": names, "size": list(data["mask"].shape[1:]), "mean": mean.tolist(),
               "std": std.tolist(), "n_equal": round((code >= 0).sum() / len(names)) + 1,
               "data": fingerprint(data["mask"], code)}
    code = torch.as_tensor(code[rows], device=device)                   # (M,)
    torch.manual_seed(seed)
    net, ddpm = build(config, device)
    optimizer = Muon(net.parameters(), lr)
    run = Run(out, config, net, optimizer, decay=0.998)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    for step in run.steps():
        rate = min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate                     # warm up, then cosine
        index = torch.randint(len(x), (max(1, batch // world),), device=device)
        part = torch.randperm(512, device=device)[:points]              # the same of each cloud
        x0 = x[index][:, part]                                          # (B, N, 3)
        place = torch.rand(1, device=device) + torch.arange(len(x0), device=device) / len(x0)
        t = (place % 1 * ddpm.T).long()     # (B,), spread evenly (Kingma et al. 2021)
        with autocast(device):
            mu, var = net.encode(x0)
            z = mu + var.sqrt() * torch.randn_like(mu)
            kl = 0.5 * (mu ** 2 + var - var.log() - 1).sum(1).mean()    # KL(q(z|x) || N(0, I))
            loss = ddpm.loss(model, x0, t, code[index], z)
        optimizer.zero_grad()
        (loss + 1e-5 * kl).backward()                                   # small, or z tells nothing
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        run.update(loss)
        if step + 1 == steps:
            run.ema.fit_prior(x, code)                  # sampling draws z from it

# ---- Sampling -----------------------------------------------------------------------------------
def sample(checkpoint, out="masks.npz", group: str = None, n: int = None, size: int = None,
           points=256, steps=32, keep_invalid=False, seed=0, device="auto"):
    """Sample n masks a group, with black images, of one or of all; default: as Equal Scale needs.
    size: default as trained; points: of a cloud, more leave fewer gaps; keep_invalid: keep all."""
    device, _ = setup(device)
    state = load_checkpoint(checkpoint, ("points",))
    config = state["config"]
    net, ddpm = build(config, device)
    net.load_state_dict(state["ema"])
    names = [config["group"]] if config["group"] else config["groups"]
    if group and group not in names:
        raise InputError(f"no group {group!r}; expected {', '.join(names)}")
    names = [group] if group else names
    n = n or config["n_equal"]
    masks, lines = [], []
    for name in names:
        g = config["groups"].index(name)
        generator = torch.Generator(device).manual_seed(1000 * seed + g)
        clouds, drawn = [], 0
        while len(clouds) < n:
            code = torch.full((min(100, n - len(clouds) + 4),), g, device=device)   # 4 to spare
            z = net.sample_prior(code, generator)
            with autocast(device):
                x = ddpm.sample(net, (len(code), points, 3), code, z, steps=steps, eta=1.0,
                                generator=generator, clip=(-4, 4))
            x = x.cpu().numpy() * np.float32(config["std"]) + np.float32(config["mean"])
            clouds += [cloud for cloud in x if keep_invalid or is_valid(cloud)]
            drawn += len(code)
            if len(clouds) < 0.2 * drawn:
                raise InputError(f"{len(clouds)} of {drawn} clouds valid; train for more steps")
        masks += [points_to_mask(cloud, size or config["size"], SMOOTH) for cloud in clouds[:n]]
        lines.append(f"{name}: {n} masks, {len(clouds) / drawn:.1%} of {drawn} clouds kept")
    mask = np.stack(masks)
    groups = np.repeat(names, n)
    unique = [f"synthetic-{seed}-{name}-{i:05d}" for i, name in enumerate(groups)]
    save_set(out, {"image": np.zeros_like(mask), "mask": mask, config["attribute"]: groups,
                   "name": np.array(unique), "synthetic": np.ones(len(mask), bool)})
    save_grid(f"{out}.png", 127 * mask.reshape(len(names), n, *mask.shape[1:])[:, :8], names)
    print("\n".join(lines))

# ---- Evaluation ---------------------------------------------------------------------------------
def outline_features(masks):
    """Features (M, 36) of masks (M, H, W): centre and 16 radii of disc and cup; no cup: 0."""
    features = np.zeros((len(masks), 36))
    for i, mask in enumerate(masks):
        for j, xy in enumerate(split_outlines(mask_to_points(mask))):
            centre, radius = fit_outline(xy, SMOOTH)
            features[i, 18 * j:][:18] = [*centre, *radius[::len(ANGLES) // 16]]
    return features

def evaluate(masks, train, test, out="masks.csv", attribute="race"):
    """Compare generated with half of the test masks, by group; below, the other half for scale."""
    names, features = None, []
    for path in (masks, train, test):
        data = load_set(path)
        code, names = group_codes(data, attribute, names)               # the names of the first set
        code[~data["mask"].any((1, 2))] = -1
        features.append([outline_features(data["mask"][code == g]) for g in range(len(names))])
    lines, distance = [], {}
    for name, generated, train, test in zip(names, *features, strict=True):
        if min(len(generated), len(train), len(test)) < 4:
            print(f"{name}: fewer than 4 generated, training or test masks, left out")
            continue
        half = len(test) // 2
        for label, part in (("generated", generated[:half]), ("real", test[half:])):
            ratio = part[:, 20:].mean(1) / part[:, 2:18].mean(1)        # mean radius, cup / disc
            distance = set_distance(part, test[:half], train)
            lines.append([name, label, f"{ratio.mean():.3f}", f"{ratio.std():.3f}",
                          *map("{:.4g}".format, distance.values())])
    heads = ["group", "masks", "cup/disc", "its SD", *distance]
    save_csv(out, [heads, *lines])
    print_table("sampled masks beside test masks (nan: too few)", heads, lines)

# ---- Command line -------------------------------------------------------------------------------
if __name__ == "__main__":
    sys.exit(command_line(train, sample, evaluate))
