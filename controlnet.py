"""Mask-image generation (Section 2.3): a diffusion UNet, and a ControlNet that follows masks.

    python controlnet.py train-base data/train.npz --attribute race --out base.pt
    python controlnet.py train-control data/train.npz base.pt --out control.pt
    python controlnet.py sample control.pt masks.npz --out synthetic.npz
    python controlnet.py evaluate judge.pt data/train.npz data/test.npz generated=synthetic.npz

The base learns what images of a group look like, the ControlNet (Zhang et al. 2023) to follow a
mask. `evaluate` measures whether images show their masks.
B batch, C channels, H W image, p patch, h w features, E embedding.
"""
import copy
import csv
import math
import sys
from itertools import cycle, islice, pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from fairdiff import (InputError, Parser, Run, autocast, fingerprint, group_codes,
                      load_checkpoint, load_set, number_or, replacing, save_group_grid, save_set,
                      setup)
from fairness import dice, print_table, set_distance, structures
from pointdiff import DDPM, timestep_embedding
from transunet import draw_weights, load_segmenter, predict_masks

# ---- The base: a UNet ---------------------------------------------------------------------------
class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual; step and group scale and shift what is between them."""
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = zero_conv(c_out, 3)                # a block starts as its residual path
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x)))                           # (B, C, h, w)
        scale, shift = self.modulation(emb)[..., None, None].chunk(2, 1)        # (B, C, 1, 1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))                     # (B, C, h, w)

class Encoder(nn.Module):
    """The UNet's first half; returns one skip a level, the middle and the embedding."""
    def __init__(self, n_groups, widths, patch, emb):
        super().__init__()
        self.dim, self.patch = widths[0], patch
        self.time = nn.Sequential(nn.Linear(self.dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.group = nn.Embedding(n_groups + 1, emb)                    # row 0: unknown
        self.input_proj = nn.Conv2d(patch ** 2, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(c, c, emb) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.middle1 = ResBlock(widths[-1], widths[-1], emb)
        self.middle2 = ResBlock(widths[-1], widths[-1], emb)

    def forward(self, x, t, group, control=0):
        emb = F.silu(self.time(timestep_embedding(t, self.dim)) + self.group(group + 1))    # (B, E)
        h = self.input_proj(F.pixel_unshuffle(x, self.patch)) + control         # (B, C0, H/p, W/p)
        skips = []
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else self.downs[i - 1](h), emb)       # (B, Ci, H/p/2^i, W/p/2^i)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)                     # (B, C2, H/p/4, W/p/4)
        return skips, h, emb

class Decoder(nn.Module):
    """The UNet's second half: from the middle up, joining the skip of each level, to an image."""
    def __init__(self, widths, patch, emb):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(2 * c, c, emb) for c in widths)
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.norm = nn.GroupNorm(8, widths[0])
        self.output_proj = nn.Conv2d(widths[0], patch ** 2, 3, padding=1)
        self.patch = patch

    def forward(self, skips, h, emb):
        for i in reversed(range(len(self.blocks))):
            h = self.blocks[i](torch.cat([h, skips[i]], 1), emb)        # (B, Ci, H/p/2^i, W/p/2^i)
            if i > 0:
                h = F.interpolate(self.ups[i - 1](h), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.output_proj(F.silu(self.norm(h))), self.patch)  # (B, 1, H, W)

class UNet(nn.Module):
    """Denoiser of images (B, 1, H, W), H, W divisible by 4 patch; group long (B,), -1: unknown."""
    def __init__(self, n_groups, widths=(32, 64, 96), patch=2, emb=128):
        super().__init__()
        self.widths, self.patch = widths, patch
        self.encoder = Encoder(n_groups, widths, patch, emb)
        self.decoder = Decoder(widths, patch, emb)

    def forward(self, x, t, group, mask=None):                          # it ignores the mask
        return self.decoder(*self.encoder(x, t, group))                 # (B, 1, H, W)

# ---- The ControlNet (Eq. 5) ---------------------------------------------------------------------
def zero_conv(channels, size=1):
    """Z of Eq. 5: a convolution that starts at zero; it learns, as its gradient is not zero."""
    conv = nn.Conv2d(channels, channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv

class ControlNet(nn.Module):
    """y_c = F(x; Phi) + Z(F(x + Z(c; Phi_z1); Phi_c); Phi_z2), Eq. 5; mask long (B, H, W)."""
    def __init__(self, base, lock=False):
        super().__init__()
        self.encoder = base.encoder.requires_grad_(False)               # Phi
        self.copy = copy.deepcopy(base.encoder).requires_grad_(True)    # Phi_c
        self.decoder = base.decoder.requires_grad_(not lock)            # trained, too, unless lock
        w, p = base.widths, base.patch
        self.hint = nn.Sequential(nn.PixelUnshuffle(p), nn.Conv2d(3 * p * p, w[0], 3, padding=1),
                                  nn.SiLU(), nn.Conv2d(w[0], w[0], 3, padding=1), nn.SiLU())
        self.z1 = zero_conv(w[0])                                       # Phi_z1
        self.z2 = nn.ModuleList(map(zero_conv, (*w, w[-1])))            # Phi_z2: skips, middle

    def forward(self, x, t, group, mask):
        c = F.one_hot(mask, 3).movedim(-1, 1).to(x.dtype)               # (B, 3, H, W)
        with torch.no_grad():
            skips, h, emb = self.encoder(x, t, group)                   # F(x; Phi)
        control = self.z1(self.hint(c))                                 # (B, C0, H/p, W/p)
        control_skips, control_h, _ = self.copy(x, t, group, control)   # F(x + Z(c); Phi_c)
        for i in range(len(skips)):
            skips[i] = skips[i] + self.z2[i](control_skips[i])
        return self.decoder(skips, h + self.z2[-1](control_h), emb)     # Eq. 5

# ---- Training -----------------------------------------------------------------------------------
def build(config):
    """The network of a checkpoint's config, and its diffusion."""
    net = UNet(len(config["groups"]), config["widths"], config["patch"])
    if config["kind"] == "control":
        net = ControlNet(net, config["lock"])
    return net, DDPM()

def mask_weight(mask):
    """Weights (B, 1, H, W) of the loss: the disc counts fivefold, small cups as much as large."""
    disc = F.max_pool2d((mask[:, None] > 0).float(), 9, 1, 4)
    cup = (mask[:, None] == 2).float()
    share = 0.05 / cup.mean((1, 2, 3), keepdim=True).clamp(min=0.005)
    weight = 1 + 4 * disc + 5 * share * F.max_pool2d(cup, 5, 1, 2)
    return weight / weight.mean()

def train(args):
    """Train the base (train-base), or a ControlNet around it (train-control)."""
    device, world = setup(args.device)
    data = load_set(args.set)
    sides = data["image"].shape[1:]
    if args.command == "train-base":
        _, names = group_codes(data, args.attribute)
        fitting = [p for p in range(2, min(sides) // 32 + 1) if math.gcd(*sides) % (4 * p) == 0]
        patch = args.patch or max(fitting, default=2)
        config = {"kind": "base", "attribute": args.attribute, "groups": names, "patch": patch,
                  "widths": [args.width, 2 * args.width, 3 * args.width],
                  "mean": float(data["image"].mean()), "std": float(data["image"].std()) + 1e-6}
        torch.manual_seed(args.seed)
        net, ddpm = build(config)
    else:
        net, ddpm, config = load_generator(args.base, "cpu", ["base"])
        weights = fingerprint(*net.state_dict().values())
        config |= {"kind": "control", "lock": args.lock, "group": args.group, "base": weights}
        torch.manual_seed(args.seed)
        net = ControlNet(net, args.lock)
        if args.group:                                  # one ControlNet a group, as in the paper
            own = data[config["attribute"]] == args.group
            data = {key: array[own] for key, array in data.items()}
    if math.gcd(*sides) % (4 * config["patch"]):
        raise InputError(f"{sides} pixels; expected sides divisible by {4 * config['patch']}")
    code, _ = group_codes(data, config["attribute"], config["groups"])
    config |= {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed,
               "data": fingerprint(data["image"], data["mask"], code)}
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    run = Run(args.out, config, net, optimizer, 0.995)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    image = torch.as_tensor(data["image"], device=device)[:, None]      # (N, 1, H, W)
    mask = torch.as_tensor(data["mask"], device=device)                 # (N, H, W)
    group = torch.as_tensor(code, device=device)                        # (N,)
    odds = draw_weights(code, "oversample").to(device)                  # groups equally often
    for step in run.steps():
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 50, cosine)    # warm-up first
        index = torch.multinomial(odds, args.batch // world, replacement=True)
        x0 = (image[index] - config["mean"]) / config["std"]            # (B, 1, H, W)
        m = mask[index].long()                                          # (B, H, W)
        if torch.rand(()) < 0.5:                                        # left and right eyes
            x0, m = x0.flip(-1), m.flip(-1)
        weight = mask_weight(m) if config["kind"] == "control" else 1.0
        with autocast(device):
            loss = ddpm.loss(model, x0, group[index], m, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        run.update(loss)
    _, loss = np.mean(run.losses[-5:], 0)
    print(f"{config['kind']}: loss {loss:.4f} after {args.steps} steps")
    show = torch.multinomial(odds, 24, replacement=True).cpu().numpy()
    data = {key: array[show] for key, array in data.items()}
    data["image"] = sample_images(run.ema, ddpm, config, code[show], data["mask"], device)
    if config["kind"] == "base":
        data["mask"] *= 0                               # which the base has not seen
    save_group_grid(f"{args.out}.png", data, config["attribute"])

# ---- Sampling -----------------------------------------------------------------------------------
def load_generator(path, device, kinds=("base", "control")):
    """The trained network (EMA weights) of a checkpoint, its diffusion and its config."""
    state = load_checkpoint(path, kinds)
    net, ddpm = build(state["config"])
    net.load_state_dict(state["ema"])
    return net.to(device), ddpm, state["config"]

def sample_images(net, ddpm, config, code, mask, device, steps=10, seed=0, batch=100):
    """Images uint8 (N, H, W) of groups code (N,), over masks (N, H, W) if net is a ControlNet."""
    net.eval()
    mean, std = config["mean"], config["std"]
    generator = torch.Generator(device).manual_seed(seed)
    images = np.empty_like(mask)
    for i in tqdm(range(0, len(mask), batch), "images", leave=False, disable=None):
        group = torch.as_tensor(code[i:i + batch], device=device)
        m = torch.as_tensor(mask[i:i + batch], device=device).long()
        with autocast(device):
            x = ddpm.sample(net, (len(m), 1, *m.shape[1:]), group, m, steps=steps,
                            generator=generator, clip=(-mean / std, (255 - mean) / std))
        images[i:i + batch] = (x[:, 0] * std + mean).round().byte().cpu().numpy()
    return images

def sample(args):
    """Generate an image for every mask of a dataset."""
    device, _ = setup(args.device)
    data = load_set(args.masks)
    net, ddpm, config = load_generator(args.checkpoint, device)
    code, names = group_codes(data, config["attribute"], config["groups"])
    groups = [config["group"]] if config.get("group") else names
    n = round((code >= 0).sum() / len(names)) + 1 if args.n == "equal" else args.n
    rows = []
    for name in groups:
        own = np.flatnonzero(code == names.index(name))
        rows += islice(cycle(own), n or len(own))                       # masks in turn
    data = {key: array[rows] for key, array in data.items()}
    data["name"] = np.array([f"{name}-{i}" for i, name in enumerate(data["name"])])
    data["synthetic"][:] = True
    data["image"] = sample_images(net, ddpm, config, code[rows], data["mask"], device,
                                  args.steps, args.seed)
    save_set(args.out, data)
    save_group_grid(f"{args.out}.png", data, config["attribute"])
    print(f"{args.out}: {len(rows)} images")

# ---- Evaluation: do images show their masks, and are they like real ones (Table 1)? -------------
def judge_images(judge, images, device):
    """Predicted masks (N, H, W) of images uint8, and features (N, D): means in the decoder."""
    features = []
    hook = judge.ups[1].register_forward_hook(
        lambda module, inputs, output: features.append(output.float().mean((2, 3)).cpu().numpy()))
    masks = predict_masks(judge, images, device)
    hook.remove()
    return masks, np.concatenate(features).astype(float)

def evaluate(args):
    """Print the Dice of a judge on images against their masks, and Table 1, also as a CSV file."""
    device, _ = setup(args.device)
    judge = load_segmenter(args.judge, device)
    train = load_set(args.train)
    _, names = group_codes(train, args.attribute)
    results = {}                                        # by set: codes, Dice, features of each file
    for item in [f"real={args.test}", *args.sets]:
        label, _, path = item.rpartition("=")
        label = label or path.removesuffix(".npz").rpartition("-")[0]
        data = load_set(path)
        code, _ = group_codes(data, args.attribute, names)
        pred, features = judge_images(judge, data["image"], device)
        labels = structures(train["mask"]).values()
        scores = np.mean([dice(pred, data["mask"], k) for k in labels], 0)      # (N,)
        results.setdefault(label, []).append((code, scores, features))
    save_group_grid(f"{args.out}.png", data | {"mask": pred}, args.attribute)   # the last set
    lines, sets = [], {}
    for label, files in results.items():
        code, scores, features = map(np.concatenate, zip(*files, strict=True))
        sets[label] = [features[code == g] for g in range(len(names))]
        means = [np.mean(scores[code == g]) if g in code else np.nan for g in range(len(names))]
        lines.append([label, *map("{:.4f}".format, means)])
    print_table("the judge's Dice on images against their masks", ["images", *names], lines)
    halves = [np.array_split(own, 2) for own in sets["real"]]
    sets |= {"real": [half[0] for half in halves], "reference": [half[1] for half in halves]}
    sizes = [min(map(len, own)) for own in zip(*sets.values(), strict=True)]
    groups = [g for g in range(len(names)) if sizes[g] >= 4]
    if not groups:
        return print("no Table 1: expected 4 images of a group in every set, 8 in the test set")
    n = min(args.n, *(sizes[g] for g in groups))                        # of every group
    sets = {label: np.concatenate([own[g][:n] for g in groups]) for label, own in sets.items()}
    reference = sets.pop("reference")
    _, training = judge_images(judge, train["image"], device)
    lines = []
    for label, features in sets.items():
        distance = set_distance(features, reference, training)
        lines.append([label, *map("{:.4g}".format, distance.values())])
    heads = ["images", *distance]
    with replacing(args.out) as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *lines])
    print_table("Table 1, on features of the judge", heads, lines)

# ---- Command line -------------------------------------------------------------------------------
def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="controlnet.py", description="Images from masks: UNet and ControlNet.")
    p = parser.command("train-base", train, "train the image UNet")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--width", type=int, default=32, help="channels at first, divisible by 8")
    p.add_argument("--patch", type=int, help="p x p pixels become channels (side / 32)")
    p.add_argument("--out", default="base.pt", help="checkpoint")
    p.training_settings(steps=200, batch=8, lr=2e-3)
    p = parser.command("train-control", train, "train the ControlNet")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("base", help="what train-base wrote")
    p.add_argument("--group", help="train on this group alone, as the paper does")
    p.add_argument("--lock", action="store_true", help="freeze the decoder, too")
    p.add_argument("--out", default="control.pt", help="checkpoint")
    p.training_settings(steps=2600, batch=8, lr=2e-3)
    p = parser.command("sample", sample, "generate an image for every mask")
    p.add_argument("checkpoint", help="of train-control, or of train-base: masks are ignored")
    p.add_argument("masks", help="dataset .npz of masks")
    p.add_argument("--n", type=number_or("equal"), help="images a group, or equal: for Equal Scale")
    p.add_argument("--steps", type=int, default=10, help="sampler steps")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--out", default="synthetic.npz", help="the same rows with images")
    p.add_argument("--device", default="auto", help="as in train")
    p = parser.command("evaluate", evaluate, "Table 1, and a judge's Dice on the images")
    p.add_argument("judge", help="a TransUNet trained on real images, used for nothing else")
    p.add_argument("train", help="dataset .npz of real training images")
    p.add_argument("test", help="dataset .npz of real test images")
    p.add_argument("sets", nargs="+", help="NAME=FILE or NAME-n.npz; one name: joined")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--n", type=int, default=100, help="images a group at most")
    p.add_argument("--out", default="table1.csv", help="CSV file of Table 1")
    p.add_argument("--device", default="auto", help="as in train")
    return parser.run(argv)

if __name__ == "__main__":
    sys.exit(main())
