"""Mask-image generation (Section 2.3): an image diffusion UNet and its ControlNet copy, in pixel space.

    python controlnet.py train-base data/train.npz --attribute race --out base.pt
    python controlnet.py train-control data/train.npz base.pt --out control.pt
    python controlnet.py sample control.pt masks.npz --out synthetic.npz
    python controlnet.py agree judge.pt synthetic.npz data/test.npz --out agreement.csv
    python controlnet.py quality judge.pt base.pt control.pt synthetic.npz data/train.npz data/test.npz

The base learns what images of a group look like. The ControlNet (Zhang et al. 2023) is a trainable copy of
its encoder that also sees the mask and speaks to the base through 1x1 convolutions that start at zero (Eq.
5), so that training begins at the base and not at noise. They learn all the same: a zero convolution's output
is zero, but its gradient, the input times the error, is not, and once it has moved it passes gradient on.
Step 1 moves Phi_z2, step 2 the copy and Phi_z1, step 3 the layers that read the mask.

Expect at SCALE=cpu on 2 cores with bf16 (without): base 350 steps in 24 s (57), ControlNet 1,300 in 117 s
(247), 1,002 images in 36 s (84); a judge's Dice on them is 1.00 (rare group) to 1.03 of its Dice on real
images (2026-11-24, seed 0, phantom).
"""
import fairdiff  # isort: skip  # noqa: F401  first, so that a Ctrl-C while torch loads is one line
import copy
import csv
import math
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from tqdm import tqdm

from fairdiff import (
    ATTRIBUTE_NAMES,
    EMA,
    RANK,
    WORLD,
    InputError,
    Parser,
    add_up,
    autocast,
    check_finished,
    fingerprint,
    fitting,
    group_codes,
    known_groups,
    load_checkpoint,
    load_set,
    mixed_seed,
    outline,
    own_batches,
    parallel,
    pick_device,
    replacing,
    resume,
    run_command,
    save_set,
    save_sheet,
    save_training,
)
from fairness import dice, frechet_distance, mmd_cov, one_nna, surface_distance
from pointdiff import DDPM, timestep_embedding
from transunet import check_size, draw_batch, load_segmenter, method_weights, segment

# B batch, C channels, H W image, h w features, G groups, T diffusion steps.

HELP_BASE = "run `python controlnet.py train-base SET.npz --out base.pt` first"
HELP_CONTROL = "run `python controlnet.py train-control SET.npz base.pt --out control.pt` first"


# ------------------------------------------------------------------------------------------------------------
# Network: the base UNet

class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual path; step and group enter as scale and shift between them."""

    def __init__(self, cin, cout, emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.film = nn.Linear(emb, 2 * cout)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                            # every block starts as its residual path
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x)))                           # (B, cout, h, w)
        scale, shift = self.film(emb)[..., None, None].chunk(2, 1)      # (B, cout, 1, 1) each
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))                     # (B, cout, h, w)


class Attention(nn.Module):
    """Self-attention over the pixels of the coarsest grid, where a look around is cheap."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, dim)
        self.qkv, self.out = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, hw, C/heads)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


class Encoder(nn.Module):
    """The half of the UNet that reads: image, step and group in; one skip a level and the middle out."""

    def __init__(self, n_groups, widths, patch, emb):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(widths[0], emb), nn.SiLU(), nn.Linear(emb, emb))
        self.group = nn.Embedding(n_groups + 1, emb)                 # row 0 is the null embedding of group -1
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(patch * patch, widths[0], 3, padding=1))
        self.blocks = nn.ModuleList(ResBlock(c, c, emb) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.mid1, self.attention = ResBlock(widths[-1], widths[-1], emb), Attention(widths[-1])
        self.mid2 = ResBlock(widths[-1], widths[-1], emb)
        self.dim = widths[0]

    def forward(self, x, t, group, hint=0):
        emb = F.silu(self.time(timestep_embedding(t, self.dim)) + self.group(group + 1))         # (B, emb)
        h = self.stem(x) + hint                                         # (B, C0, H/p, W/p)
        skips = []
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else self.downs[i - 1](h), emb)       # (B, Ci, H/p/2^i, W/p/2^i)
            skips.append(h)
        h = self.mid2(self.attention(self.mid1(h, emb)), emb)           # (B, C_last, coarsest)
        return skips, h, emb


class Decoder(nn.Module):
    """The half that writes: from the middle up, taking the skip of each level, to an image."""

    def __init__(self, widths, patch, emb):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(2 * c, c, emb) for c in widths)
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.leave = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(),
                                   nn.Conv2d(widths[0], patch * patch, 3, padding=1), nn.PixelShuffle(patch))

    def forward(self, skips, h, emb):
        for i in reversed(range(len(self.blocks))):
            h = self.blocks[i](torch.cat([h, skips[i]], 1), emb)        # (B, Ci, H/p/2^i, W/p/2^i)
            if i:                                                # narrow first, then enlarge: four times less
                h = F.interpolate(self.ups[i - 1](h), scale_factor=2, mode="nearest")
        return self.leave(h)                                            # (B, 1, H, W)


class UNet(nn.Module):
    """Group-conditional image denoiser: x (B,1,H,W), t, group long (B,), -1 unknown -> (B,1,H,W).

    patch: side of the pixel-unshuffle that folds p x p pixels into channels before the first convolution;
    widths: channels a level; H and W divisible by patch * 2^(levels - 1).
    """

    def __init__(self, n_groups, widths=(32, 64, 96), patch=2, emb=128):
        super().__init__()
        self.encoder, self.decoder = Encoder(n_groups, widths, patch, emb), Decoder(widths, patch, emb)
        self.widths, self.patch = widths, patch

    def forward(self, x, t, group):
        return self.decoder(*self.encoder(x, t, group))


# ------------------------------------------------------------------------------------------------------------
# Network: the ControlNet (Eq. 5)

def zero_conv(channels):
    """Z(.; .) of Eq. 5: a 1x1 convolution whose weight and bias start at zero."""
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ControlNet(nn.Module):
    """y_c = F(x; Phi) + Z(F(x + Z(c; Phi_z1); Phi_c); Phi_z2), Eq. 5, around a trained UNet.

    forward(x (B,1,H,W), t, group, mask long (B,H,W) with labels 0, 1, 2) -> (B,1,H,W). The base is frozen; a
    copy of its decoder is trained along unless lock. At initialisation the output is the base's, bit for bit.
    guidance w > 0 moves the output away from the base's, y_c + w (y_c - y): classifier-free guidance (Ho and
    Salimans 2022), the base being the network that has not seen the mask.
    """

    def __init__(self, base, lock=False):
        super().__init__()
        self.base = base.requires_grad_(False)                          # Phi
        self.copy = copy.deepcopy(base.encoder).requires_grad_(True)    # Phi_c
        self.decoder = copy.deepcopy(base.decoder).requires_grad_(not lock)
        w, p = base.widths, base.patch
        self.hint = nn.Sequential(nn.PixelUnshuffle(p), nn.Conv2d(3 * p * p, w[0], 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(w[0], w[0], 3, padding=1), nn.SiLU())       # c_f = E(c_i)
        self.z1 = zero_conv(w[0])                                       # Phi_z1
        self.z2 = nn.ModuleList(zero_conv(c) for c in (*w, w[-1]))    # Phi_z2: one a skip, one for the middle

    def forward(self, x, t, group, mask, guidance=0.0):
        c = F.one_hot(mask, 3).movedim(-1, 1).to(x.dtype)               # (B, 3, H, W)
        with torch.no_grad():
            skips, h, emb = self.base.encoder(x, t, group)              # F(x; Phi)
        more, h_c, _ = self.copy(x, t, group, self.z1(self.hint(c)))    # F(x + Z(c; Phi_z1); Phi_c)
        told = [s + z(m) for s, z, m in zip(skips, self.z2, more, strict=False)]
        y_c = self.decoder(told, h + self.z2[-1](h_c), emb)             # Eq. 5 at every level
        return y_c + guidance * (y_c - self.base.decoder(skips, h, emb)) if guidance else y_c


# ------------------------------------------------------------------------------------------------------------
# Training

SAVE_EVERY = 200                                        # steps between checkpoints: 20 to 50 s on a laptop


def build(config):
    """The network that a checkpoint's config describes, and its diffusion."""
    net = UNet(len(config["groups"]), tuple(config["widths"]), config["patch"])
    if config["kind"] == "control":
        net = ControlNet(net, config["lock"])
    return net, DDPM(config["T"])


def load_painter(path, kind, device):
    """The trained network (EMA weights) of a "base" or "control" checkpoint, its diffusion and its config."""
    state = load_checkpoint(path, kind, HELP_BASE if kind == "base" else HELP_CONTROL)
    with fitting(path):
        net, ddpm = build(state["config"])
        net.load_state_dict(state["ema"])
        check_finished(path, state)
    return net.to(device, memory_format=torch.channels_last), ddpm, state["config"]


def train(args):
    """Train the base UNet (train-base) or the ControlNet around it (train-control)."""
    device, dtype = pick_device(args.device)
    data = load_set(args.set)
    control = args.command == "train-control"
    state = load_checkpoint(args.base, "base", HELP_BASE) if control else None
    if control:
        check_finished(args.base, state)
    reader = load_segmenter(args.reader, device) if control and args.reader else None
    if reader:
        check_size(data, args.set)
    attribute = state["config"]["attribute"] if control else args.attribute
    code, names = known_groups(data, attribute)
    shared = state["config"] if control else {
        "widths": [args.width, 2 * args.width, 3 * args.width],
        "patch": args.patch or default_patch(*data["image"].shape[1:]),
        "mean": float(data["image"].mean()), "std": float(data["image"].std()) + 1e-6}
    config = {k: shared[k] for k in ("widths", "patch", "mean", "std")}
    config |= {"kind": "control" if control else "base", "attribute": attribute, "groups": list(names),
               "T": 1000, "steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed,
               "data": fingerprint(data["image"], data["mask"], code)}
    check_grid(data, args.set, config)
    torch.manual_seed(args.seed)
    net, ddpm = build(config | {"kind": "base"})
    if control:
        config |= {"lock": args.lock, "base": fingerprint(*(v.numpy() for v in state["ema"].values()))}
        net.load_state_dict(state["ema"])
        net = ControlNet(net, args.lock)                                # copies what the base has learned
    net = net.to(device, memory_format=torch.channels_last)
    image, mask, group = (torch.as_tensor(a, device=device) for a in (data["image"], data["mask"], code))
    weight = method_weights(data, attribute, "oversample").to(device)   # the rare groups need the steps most
    trained = [p for p in net.parameters() if p.requires_grad]
    ema, optimizer = EMA(net, 0.995), torch.optim.AdamW(trained, args.lr, weight_decay=0.0, fused=True)
    start, log = resume(args.out, config, net, ema, optimizer)
    run = parallel(net, device, args.compile)
    bar = tqdm(range(start, args.steps), config["kind"], initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        torch.manual_seed(mixed_seed(args.seed, step))                  # chance is a function of (seed, step)
        for g in optimizer.param_groups:                              # warm up, then half a cosine to a tenth
            g["lr"] = args.lr * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        index = draw_batch(weight, args.batch)
        # Unit variance, as the schedule assumes: scaled to [-1, 1] grey images would drown in noise early.
        x0, cond = (image[index, None].float() - config["mean"]) / config["std"], (group[index].long(),)
        focus = torch.ones_like(x0)
        if control:                             # The disc counts fivefold, the cup 5 x (0.05 / its share of
            cond += (mask[index].long(),)       # the image) more: small ones as much as large, 0.05 is usual
            disc, cup = ((cond[1] >= label).float()[:, None] for label in (1, 2))
            share = 0.05 / cup.mean((1, 2, 3), keepdim=True).clamp(min=0.005)
            focus = 1 + 4 * F.max_pool2d(disc, 9, 1, 4) + 5 * share * F.max_pool2d(cup, 5, 1, 2)
        if torch.rand(()) < 0.5:                                        # left and right eyes are mirrored
            x0, focus, *cond = (a.flip(-1) if a.ndim > 2 else a for a in (x0, focus, *cond))
        with autocast(device, dtype):
            loss = ddpm.loss(run, x0, *cond, weight=focus / focus.mean())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(net, step)
        if step % 50 == 49 or step + 1 == args.steps:                  # reading the loss waits for the device
            log.append([step + 1, float(add_up(loss.detach(), device)) / WORLD])
            bar.set_postfix(loss=f"{log[-1][1]:.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_training(args.out, config, net, ema, optimizer, step + 1, log)
            if reader and ((step + 1) % (2 * SAVE_EVERY) == 0 or step + 1 == args.steps):
                made, real = read_along(reader, net, ema, ddpm, config, data, code, device, dtype)
                bar.write(f"control, step {step + 1}: the reader's Dice is {made:.3f} on generated images, "
                          f"{real:.3f} on the real ones of these masks", file=sys.stdout)
    print(f"{config['kind']}: loss {np.mean([v for _, v in log[-5:]]):.4f} after {args.steps} steps")
    net.load_state_dict(ema.state)
    preview(args.out, net, ddpm, config, data, code, device, dtype)


def read_along(reader, net, ema, ddpm, config, data, code, device, dtype):
    """A segmenter's Dice, mean of rim and cup, on images over eight masks a group, generated and real."""
    rows = np.concatenate([np.flatnonzero(code == g)[:8] for g in np.unique(code[code >= 0])])
    averaged, mask = copy.deepcopy(net), data["mask"][rows]
    averaged.load_state_dict(ema.state)
    made = sample_images(averaged, ddpm, config, code[rows], mask, mask.shape[1:], 10, 0, device, dtype)
    return [np.nanmean(read_dice(reader, x, mask, device, dtype)) for x in (made, data["image"][rows])]


def preview(out, net, ddpm, config, data, code, device, dtype):
    """The sheet beside a checkpoint: real images and generated ones of every group, over masks if any."""
    control = config["kind"] == "control"
    rows, labels = [], []
    for g in np.unique(code[code >= 0]):
        show = np.flatnonzero(code == g)[:8]
        images = sample_images(net, ddpm, config, code[show], data["mask"][show] if control else None,
                               data["image"].shape[1:], 20, 0, device, dtype)
        real = data["image"][show]
        if control:
            real, images = ([outline(i, m) for i, m in zip(x, data["mask"][show], strict=True)]
                            for x in (real, images))
        rows += [list(real), list(images)]
        labels += [f"{config['groups'][g]} real", "generated"]
    save_sheet(f"{out}.png", rows, labels)


def default_patch(h, w):
    """About the shorter side / 32, such that the UNet's three levels fit; 2 where nothing fits better."""
    fits = [p for p in range(2, min(h, w) // 32 + 1) if math.gcd(h, w) % (4 * p) == 0]
    return max(fits, default=2)


def check_grid(data, path, config):
    """InputError where the images do not fit the UNet's grid."""
    check_size(data, path, config["patch"] * 2 ** (len(config["widths"]) - 1), "the UNet")


# ------------------------------------------------------------------------------------------------------------
# Sampling

GUIDANCE = 0.3          # settled by measurement, see the README


@torch.no_grad()
def sample_images(net, ddpm, config, code, mask, size, steps, seed, device, dtype=None, guidance=GUIDANCE):
    """Images uint8 (N,H,W) of groups code (N,), over masks uint8 (N,H,W) or, None, freely.

    Every batch draws from (seed, its first image) alone, whichever process works on it.
    """
    net.eval()
    batch = 50 if device.type == "cpu" else 250                         # what fills it
    mean, std = config["mean"], config["std"]
    out = np.zeros((len(code), *size), np.uint8)
    for rows in tqdm(own_batches(len(code), batch), "images", leave=False, disable=RANK > 0):
        generator = torch.Generator(device).manual_seed(mixed_seed(seed, rows.start))
        cond = [torch.as_tensor(code[rows].astype(np.int64), device=device)]
        if mask is not None:
            cond += [torch.as_tensor(mask[rows].astype(np.int64), device=device), guidance]
        with autocast(device, dtype):
            x = ddpm.sample(net, (len(cond[0]), 1, *size), *cond, steps=steps, generator=generator,
                            clip=(-mean / std, (255 - mean) / std))
        out[rows] = (x[:, 0] * std + mean).round().clamp(0, 255).byte().cpu().numpy()
    return add_up(out, device)


def sample(args):
    """Paint an image over every mask of a dataset file."""
    device, dtype = pick_device(args.device)
    data = load_set(args.masks, "`python pointdiff.py sample` makes masks")
    net, ddpm, config = load_painter(args.checkpoint, "control", device)
    check_grid(data, args.masks, config)
    code, names = group_codes(data, config["attribute"])
    reader = load_segmenter(args.reader, device) if args.reader else None
    if reader:
        check_size(data, args.masks)

    def draw(seed):
        return sample_images(net, ddpm, config, code, data["mask"], data["mask"].shape[1:], args.steps, seed,
                             device, dtype, args.guidance)

    images = draw(args.seed)
    if reader:                                                          # of two, keep what it reads better
        again = draw(mixed_seed(args.seed))
        first, second = (np.nan_to_num(read_dice(reader, x, data["mask"], device, dtype), nan=1).sum(0)
                         for x in (images, again))                      # NaN: no cup, and none read
        images[second > first] = again[second > first]
    save_set(args.out, data | {"image": images, "synthetic": np.ones(len(images), bool)})
    print(f"{args.out}: {len(images)} images")
    groups = np.unique(code)
    rows = [[picture for i in np.flatnonzero(code == g)[:4]
             for picture in (images[i], outline(images[i], data["mask"][i]))] for g in groups]
    save_sheet(f"{args.out}.png", rows, [names[g] if g >= 0 else "unknown" for g in groups])


# ------------------------------------------------------------------------------------------------------------
# Agreement

def read_dice(reader, images, mask, device, dtype=None):
    """Dice of rim and cup, (2, N), that a segmenter reads in images uint8 (N,H,W) painted over masks."""
    pred = segment(reader, images, device, dtype)
    return np.stack([dice(pred, mask, structure) for structure in ("rim", "cup")])


def read_back(judge, data, code, n_groups, device, dtype=None):
    """What a judge reads in the images of a dataset against their masks, float (G, 3, 3).

    Rim, cup and their mean; Dice, surface distance in pixels where it found the structure, and the share of
    images where only one of mask and reading has it. NaN for a group without images; where it finds nothing,
    Dice is 0, missing 1, the distance NaN. code: group of each image (N,).
    """
    pred = segment(judge, data["image"], device, dtype)
    out = np.full((n_groups, 3, 3), np.nan)
    for j, structure in enumerate(("rim", "cup")):
        scores, distance = (f(pred, data["mask"], structure) for f in (dice, surface_distance))
        for g in range(n_groups):
            there = (code == g) & np.isfinite(scores)
            found = there & np.isfinite(distance)
            if there.any():
                out[g, j] = scores[there].mean(), np.nanmean(distance[there]), 1 - found.sum() / there.sum()
    out[:, 2] = out[:, :2].mean(1)
    return out


def agree(args):
    """A judge's reading of generated images beside that of real ones: do they show what their masks say?"""
    device, dtype = pick_device(args.device)
    judge = load_segmenter(args.judge, device)
    sides, n = [], None
    for path in (args.synthetic, args.real):
        data = load_set(path)
        check_size(data, path)
        code, names = known_groups(data, args.attribute)
        sides.append(read_back(judge, data, code, len(names), device, dtype))
        n = np.bincount(code[code >= 0], minlength=len(names)) if n is None else n
    both = np.isfinite(sides[0] * sides[1])[..., 0].all(1)              # a group that is never found stays
    if not both.any():
        raise InputError(f"no group of {args.attribute} has rims and cups in the masks of both "
                         f"{args.synthetic} and {args.real}")
    rows = [(names[g], n[g], *(s[g] for s in sides)) for g in np.flatnonzero(both)]
    rows.append(("pooled", n[both].sum(), *(np.nanmean(s[both], 0) for s in sides)))    # groups count alike
    print(f"{'agreement':<12}{'structure':<10}{'n':>6}{'Dice':>8}{'real':>8}{'ratio':>8}"
          f"{'px off':>8}{'real':>8}{'ratio':>8}{'missing':>9}{'real':>8}")
    with replacing(args.out) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("group", "structure", "figure", "n", "generated", "real", "ratio"))
        for name, n, generated, real in rows:
            for structure, a, b in zip(("rim", "cup", "mean"), generated, real, strict=True):
                ratio = a / np.maximum(b, 1e-9)
                for i, figure in enumerate(("dice", "distance", "missing")):
                    writer.writerow((name, structure, figure, n, f"{a[i]:.6f}", f"{b[i]:.6f}",
                                     f"{ratio[i]:.6f}" if figure != "missing" else ""))
                print(f"{name:<12}{structure:<10}{n:>6}" + "".join(
                    f"{a[i]:>8.3f}{b[i]:>8.3f}{ratio[i]:>8.3f}" for i in (0, 1))
                      + f"{a[2]:>9.1%}{b[2]:>8.1%}")


# ------------------------------------------------------------------------------------------------------------
# Table 1

def judge_features(judge, images, device, dtype=None, batch=100):
    """What a segmenter sees in images uint8 (N,H,W): float64 (N, D), D <= 64.

    Averages over the image of its first decoder stage with at most 64 channels.
    """
    out = []
    with torch.no_grad(), autocast(device, dtype):
        for i in range(0, len(images), batch):
            x, skips = judge.tokens(torch.as_tensor(images[i:i + batch, None], device=device).float() / 255)
            x = judge.bridge(x)
            for up, skip in zip(judge.ups, (*skips, None), strict=True):
                x = up(x, skip)
                if x.shape[1] <= 64:
                    break
            out.append(x.mean((2, 3)).double().cpu().numpy())
    return np.concatenate(out)


def inception_features(path, images, device, batch=50):
    """Features float64 (N, 2048) of images uint8 (N,H,W), read by FID's usual TorchScript file."""
    try:
        net = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            parts = [net(torch.as_tensor(images[i:i + batch, None], device=device).repeat(1, 3, 1, 1),
                         return_features=True).double().cpu().numpy() for i in range(0, len(images), batch)]
    except (RuntimeError, ValueError, OSError) as e:
        raise InputError(f"{path}: expected the TorchScript Inception of FID, inception-2015-12-05.pt "
                         f"({str(e).strip().splitlines()[-1][:80]})") from None
    return np.concatenate(parts)


def quality(args):
    """Table 1: images without control, over training masks and over sampled ones, against held-out images."""
    device, dtype = pick_device(args.device)
    judge = load_segmenter(args.judge, device)
    nets = [load_painter(args.base, "base", device), load_painter(args.control, "control", device)]
    attribute = nets[1][2]["attribute"]
    if nets[1][2]["base"] != fingerprint(*(v.cpu().numpy() for v in nets[0][0].state_dict().values())):
        raise InputError(f"{args.base}: {args.control} was trained around another base")
    sets = [load_set(path) for path in (args.synthetic, args.train, args.test)]
    codes = [np.where((s["mask"] > 0).any((1, 2)), known_groups(s, attribute)[0], -1) for s in sets]
    names = group_codes(sets[2], attribute)[1]
    for data, path in zip(sets, (args.synthetic, args.train, args.test), strict=True):
        check_size(data, path)
        check_grid(data, path, nets[1][2])
        if data["image"].shape[1:] != sets[0]["image"].shape[1:]:
            raise InputError(f"{path}: images of another size than in {args.synthetic}")
    synthetic, train, test = sets
    counts = np.array([np.bincount(c[c >= 0], minlength=len(names)) for c in codes])
    counts[2] //= 2                                                     # two disjoint sets of held-out images
    groups = np.flatnonzero(counts.min(0) > 1)
    if not len(groups):
        raise InputError(f"no group of {attribute} has 2 images with a disc in {args.synthetic} and in "
                         f"{args.train}, and 4 in {args.test}")
    n = min(args.n, counts[:, groups].min())                            # images a group, in every set
    rng = np.random.default_rng(args.seed)
    drawn = [[rng.permutation(np.flatnonzero(c == g)) for g in groups] for c in codes]
    made, known, held, other = (np.concatenate([d[part] for d in drawn[k]]) for k, part in (
        (0, slice(n)), (1, slice(n)), (2, slice(n)), (2, slice(n, 2 * n))))
    group = np.repeat(groups, n)

    def paint(k, code, mask, seed):
        return sample_images(*nets[k], code, mask, test["image"].shape[1:], args.steps, seed, device, dtype,
                             args.guidance)

    rows = {"real": (test["image"][other], test["mask"][other]),
            "base, no control": (paint(0, group, None, args.seed), None),
            "w/o Point-Mask": (paint(1, group, train["mask"][known], args.seed), train["mask"][known]),
            "w/ Point-Mask": (synthetic["image"][made], synthetic["mask"][made])}

    def look(images):
        if args.inception:
            return inception_features(args.inception, images, device)
        return judge_features(judge, images, device, dtype)

    reference, training = look(test["image"][held]), look(train["image"][codes[1] >= 0])
    apart = cdist(training[:2000], training)
    np.fill_diagonal(apart, np.inf)
    near = np.quantile(apart.min(1), 0.01)
    itself, table = cdist(reference, reference), []
    for name, (images, mask) in rows.items():
        seen = look(images)
        far = cdist(seen, reference)
        nearest = np.stack([far[:, group == g].min(1) for g in groups], 1)          # (N, G), to each group
        read = np.nan if mask is None else np.nanmean(read_dice(judge, images, mask, device, dtype))
        frechet = frechet_distance(seen, reference) if len(seen) > seen.shape[1] else np.nan
        table.append((name, len(seen), frechet, *mmd_cov(far), one_nna(cdist(seen, seen), itself, far), read,
                      np.mean(groups[nearest.argmin(1)] == group),
                      np.mean(cdist(seen, training).min(1) < near)))
    heads = ("set", "n", "FID" if args.inception else "Frechet (judge)", "MMD", "COV", "1-NNA", "Dice read",
             "own group", "memorised")
    with replacing(args.out) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows([*row[:2], *(f"{x:.6g}" for x in row[2:])] for row in table)
    print(f"{heads[0]:<18}{heads[1]:>6}{heads[2]:>17}" + "".join(f"{h:>11}" for h in heads[3:]))
    for name, count, *values in table:
        cells = ["-" if np.isnan(v) else f"{v:.4f}" for v in values]
        print(f"{name:<18}{count:>6}{cells[0]:>17}" + "".join(f"{c:>11}" for c in cells[1:]))
    if len(seen) <= seen.shape[1]:
        print(f"{len(seen)} images cannot fix the covariance of {seen.shape[1]} features: no {heads[2]}")
    print("w/ Point-Mask, distance to the nearest real image of:  " + "  ".join(names[g] for g in groups))
    for g in groups:
        print(f"  {names[g]:<20}" + "".join(f"{x:>11.4f}" for x in nearest[group == g].mean(0)))
    tiles, show = [], [made[np.flatnonzero(group == g)[:2]] for g in groups]
    for g, pair in zip(groups, show, strict=True):
        mask, code = synthetic["mask"][pair], np.full(len(pair), g)
        again = [paint(1, code, mask, args.seed + k) for k in (1, 2)]
        twin = np.flatnonzero(codes[1] >= 0)[cdist(look(synthetic["image"][pair]), training).argmin(1)]
        tiles.append([tile for i, k in enumerate(pair) for tile in (
            mask[i] * np.uint8(127), outline(synthetic["image"][k], mask[i]), again[0][i], again[1][i],
            train["image"][twin[i]])])
    save_sheet(f"{args.out}.png", tiles, [names[g] for g in groups],
               note="mask | its image | two other seeds | nearest training image, twice")


# ------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="controlnet.py", description="images from masks: base UNet and ControlNet")
    sub = parser.add_subparsers(dest="command", required=True)
    for command, text in (("train-base", "train the image UNet"), ("train-control", "train the ControlNet")):
        p = sub.add_parser(command, help=text)
        p.add_argument("set", help="dataset .npz")
        if command == "train-base":
            p.add_argument("--attribute", choices=ATTRIBUTE_NAMES, default="race", help="sensitive attribute")
            p.add_argument("--width", type=int, default=32, help="channels of the finest level, by 8")
            p.add_argument("--patch", type=int, help="pixel-unshuffle (default: about side / 32, at least 2)")
        else:
            p.add_argument("base", help="what train-base wrote")
            p.add_argument("--lock", action="store_true", help="freeze the base's decoder too")
            p.add_argument("--reader", help="a segmenter, plain.pt, that reads images along the way")
        p.add_argument("--out", default="base.pt" if command == "train-base" else "control.pt",
                       help="checkpoint; an interrupted training continues from it")
        p.add_argument("--steps", type=int, default=500, help="optimizer steps")
        p.add_argument("--batch", type=int, default=8, help="images a step")
        p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
        p.add_argument("--seed", type=int, default=0, help="draws weights, batches, times and noise")
        p.add_argument("--compile", action="store_true", help="torch.compile: slow at first, then faster")
        p.add_argument("--device", default="auto", help="auto, cpu or cuda")
        p.set_defaults(run=train)
    p = sub.add_parser("sample", help="paint images over masks")
    p.add_argument("checkpoint", help="what train-control wrote")
    p.add_argument("masks", help="dataset .npz of masks")
    p.add_argument("--out", default="synthetic.npz", help="the same rows with images")
    p.add_argument("--reader", help="a segmenter, plain.pt: draw twice, keep the image that it reads better")
    p.add_argument("--steps", type=int, default=10, help="sampler steps")
    p.add_argument("--guidance", type=float, default=GUIDANCE, help="weight w; 0: what the ControlNet says")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=sample)
    p = sub.add_parser("agree", help="how well generated images show their masks")
    p.add_argument("judge", help="checkpoint of a segmenter trained on real images and used for nothing else")
    p.add_argument("synthetic", help="generated dataset .npz")
    p.add_argument("real", help="real test dataset .npz")
    p.add_argument("--attribute", choices=ATTRIBUTE_NAMES, default="race", help="groups to report")
    p.add_argument("--out", default="agreement.csv", help="the table")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=agree)
    p = sub.add_parser("quality", help="Table 1: generated images beside held-out ones")
    p.add_argument("judge", help="checkpoint of a segmenter trained on real images and used for nothing else")
    p.add_argument("base", help="what train-base wrote")
    p.add_argument("control", help="what train-control wrote")
    p.add_argument("synthetic", help="what sample painted over masks of the point model")
    p.add_argument("train", help="real training dataset .npz")
    p.add_argument("test", help="real test dataset .npz: held-out images")
    p.add_argument("--n", type=int, default=100, help="images a group at most, the same number in each")
    p.add_argument("--inception", help="TorchScript Inception for FID; this *runs* the file's program")
    p.add_argument("--steps", type=int, default=10, help="sampler steps")
    p.add_argument("--guidance", type=float, default=GUIDANCE, help="weight w; 0: what the ControlNet says")
    p.add_argument("--out", default="table1.csv", help="the table; a picture is written beside it")
    p.add_argument("--seed", type=int, default=0, help="draws images and noise")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=quality)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
