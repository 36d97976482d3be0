"""Mask-image generation (Section 2.3): a diffusion UNet of images, and a ControlNet that makes it follow masks.

    python controlnet.py train-base data/train.npz --attribute race --out base.pt
    python controlnet.py train-control data/train.npz base.pt --out control.pt
    python controlnet.py sample control.pt masks.npz --out synthetic.npz
    python controlnet.py evaluate judge.pt base.pt control.pt synthetic.npz data/train.npz data/test.npz

The base learns what images of a group look like. The ControlNet (Zhang et al. 2023) is a trainable copy of its
encoder that also sees the mask. It speaks to the base through 1x1 convolutions that start at zero (Eq. 5), so
that training begins with exactly the base. There is no latent space: images are small, pixels are fine.
The loss falls to about 0.1; whether images show their masks is what `evaluate` measures with a judge.
"""
import copy
import csv
import math
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fairdiff import (
    InputError,
    Parser,
    Run,
    add_training_settings,
    autocast,
    concatenate,
    fingerprint,
    group_codes,
    load_checkpoint,
    load_set,
    overlay,
    positive,
    replacing,
    run_command,
    save_grid,
    save_set,
    setup,
    subset,
)
from fairness import dice, print_table, set_distance, structures
from pointdiff import DDPM, timestep_embedding
from transunet import draw_weights, load_segmenter, predict_masks

# B batch, C channels, H W image, p patch, h w features, G groups.

# -----------------------------------------------------------------------------
# The base: a UNet

class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; step and group scale and shift what is between them."""
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                               # a block starts as its residual path
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x)))                           # (B, C, h, w)
        scale, shift = self.modulation(emb)[..., None, None].chunk(2, 1)            # (B, C, 1, 1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))                     # (B, C, h, w)

class Attention(nn.Module):
    """Self-attention over the pixels of the coarsest level."""
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)                         # (B, heads, hw, C/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))

class Encoder(nn.Module):
    """The UNet's first half: image, step and group in; one skip a level, the middle and the embedding out."""
    def __init__(self, n_groups, widths, patch, emb):
        super().__init__()
        self.dim = widths[0]
        self.time = nn.Sequential(nn.Linear(self.dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.group = nn.Embedding(n_groups + 1, emb)                    # row 0: unknown
        self.input_proj = nn.Conv2d(patch ** 2, widths[0], 3, padding=1)
        self.patch = patch
        self.blocks = nn.ModuleList(ResBlock(c, c, emb) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.middle1 = ResBlock(widths[-1], widths[-1], emb)
        self.attention = Attention(widths[-1])
        self.middle2 = ResBlock(widths[-1], widths[-1], emb)

    def forward(self, x, t, group, control=0):
        emb = F.silu(self.time(timestep_embedding(t, self.dim)) + self.group(group + 1))    # (B, emb)
        h = self.input_proj(F.pixel_unshuffle(x, self.patch)) + control             # (B, C0, H/p, W/p)
        skips = []
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else self.downs[i - 1](h), emb)       # (B, Ci, H/p/2^i, W/p/2^i)
            skips.append(h)
        h = self.middle2(self.attention(self.middle1(h, emb)), emb)     # (B, C2, coarsest)
        return skips, h, emb

class Decoder(nn.Module):
    """The UNet's second half: from the middle up, joining the skip of each level, to an image."""
    def __init__(self, widths, patch, emb):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(2 * c, c, emb) for c in widths)
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:], strict=False))
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
    """Denoiser of images: x (B, 1, H, W), t long (B,), group long (B,), -1 unknown -> (B, 1, H, W).

    widths: channels a level; patch: p x p pixels become channels first; H, W divisible by 4 p.
    """
    def __init__(self, n_groups, widths=(32, 64, 96), patch=2, emb=128):
        super().__init__()
        self.widths = widths
        self.patch = patch
        self.encoder = Encoder(n_groups, widths, patch, emb)
        self.decoder = Decoder(widths, patch, emb)

    def forward(self, x, t, group):
        return self.decoder(*self.encoder(x, t, group))

# -----------------------------------------------------------------------------
# The ControlNet (Eq. 5)

def zero_conv(channels):
    """Z of Eq. 5: a 1x1 convolution whose weight and bias start at zero.

    It learns all the same: its output is zero, but its gradient, the input times the error, is not.
    """
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv

class ControlNet(nn.Module):
    """y_c = F(x; Phi) + Z(F(x + Z(c; Phi_z1); Phi_c); Phi_z2), Eq. 5, around a trained base.

    x (B, 1, H, W), t (B,), group (B,), mask long (B, H, W) -> (B, 1, H, W). The base is frozen; a copy of its
    decoder is trained, too, unless lock, as in the authors' code. At first the output is the base's.
    """
    def __init__(self, base, lock=False):
        super().__init__()
        self.encoder = base.encoder.requires_grad_(False)               # Phi
        self.copy = copy.deepcopy(base.encoder).requires_grad_(True)    # Phi_c
        self.decoder = base.decoder.requires_grad_(not lock)
        w, p = base.widths, base.patch
        self.hint = nn.Sequential(nn.PixelUnshuffle(p), nn.Conv2d(3 * p * p, w[0], 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(w[0], w[0], 3, padding=1), nn.SiLU())
        self.z1 = zero_conv(w[0])                                       # Phi_z1
        self.z2 = nn.ModuleList(map(zero_conv, (*w, w[-1])))            # Phi_z2: the skips, then the middle

    def forward(self, x, t, group, mask):
        c = F.one_hot(mask, 3).movedim(-1, 1).to(x.dtype)               # (B, 3, H, W)
        with torch.no_grad():
            skips, h, emb = self.encoder(x, t, group)                   # F(x; Phi)
        control_skips, control_h, _ = self.copy(x, t, group, self.z1(self.hint(c)))     # F(x + Z(c); Phi_c)
        skips = [skip + z(s) for skip, z, s in zip(skips, self.z2, control_skips, strict=False)]
        return self.decoder(skips, h + self.z2[-1](control_h), emb)     # Eq. 5

# -----------------------------------------------------------------------------
# Training

def build(config):
    """The network of a checkpoint's config, and its diffusion."""
    net = UNet(len(config["groups"]), tuple(config["widths"]), config["patch"])
    if config["kind"] == "control":
        net = ControlNet(net, config["lock"])
    return net, DDPM()

def default_patch(h, w):
    """About the shorter side / 32 and at least 2, such that the UNet's three levels fit."""
    fitting = [p for p in range(2, min(h, w) // 32 + 1) if math.gcd(h, w) % (4 * p) == 0]
    return max(fitting, default=2)

def mask_weight(mask):
    """Weights (B, 1, H, W) of the loss: the disc counts fivefold, a small cup as much as a large one."""
    disc = F.max_pool2d((mask[:, None] > 0).float(), 9, 1, 4)
    cup = (mask[:, None] == 2).float()
    share = 0.05 / cup.mean((1, 2, 3), keepdim=True).clamp(min=0.005)
    weight = 1 + 4 * disc + 5 * share * F.max_pool2d(cup, 5, 1, 2)
    return weight / weight.mean()

def train(args):
    """Train the base (train-base), or a ControlNet around it (train-control)."""
    device, world = setup(args.device)
    data = load_set(args.set)
    h, w = data["image"].shape[1:]
    config = {key: getattr(args, key) for key in ("steps", "batch", "lr", "seed")}
    if args.command == "train-base":
        code, names = group_codes(data, args.attribute)
        config |= {"kind": "base", "attribute": args.attribute, "groups": names,
                   "widths": [args.width, 2 * args.width, 3 * args.width],
                   "patch": args.patch or default_patch(h, w),
                   "mean": float(data["image"].mean()), "std": float(data["image"].std()) + 1e-6}
        torch.manual_seed(args.seed)
        net, ddpm = build(config)
    else:
        state = load_checkpoint(args.base, ("base",))
        config = state["config"] | config
        code, names = group_codes(data, config["attribute"], config["groups"])
        if args.group:                                                  # one ControlNet a group, as the paper
            data = subset(data, data[config["attribute"]] == args.group)
            code = code[code == names.index(args.group)]
        net, ddpm = build(config)
        net.load_state_dict(state["ema"])
        torch.manual_seed(args.seed)
        net = ControlNet(net, args.lock)
        weights = [value.numpy() for value in state["ema"].values()]
        config |= {"kind": "control", "lock": args.lock, "base": fingerprint(*weights)}
    if h % (4 * config["patch"]) or w % (4 * config["patch"]):
        raise InputError(f"{args.set}: {h} x {w} pixels; the UNet needs sides divisible by {4 * config['patch']}")
    config["data"] = fingerprint(data["image"], data["mask"], code)
    net = net.to(device, memory_format=torch.channels_last)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.0)
    run = Run(args.out, config, net, optimizer, 0.995)
    model = DistributedDataParallel(net) if world > 1 else net
    image = (torch.as_tensor(data["image"], device=device)[:, None].float() - config["mean"]) / config["std"]
    mask = torch.as_tensor(data["mask"], device=device)
    group = torch.as_tensor(code, device=device)
    odds = draw_weights(code, "oversample").to(device)                  # groups equally often
    for step in run.steps():
        for options in optimizer.param_groups:                          # warm up, then half a cosine
            options["lr"] = args.lr * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        index = torch.multinomial(odds, args.batch // world, replacement=True)
        x0, m = image[index], mask[index].long()                        # (B, 1, H, W), (B, H, W)
        if torch.rand(()) < 0.5:
            x0, m = x0.flip(-1), m.flip(-1)                             # left eyes and right eyes
        condition, weight = (group[index],), 1.0
        if config["kind"] == "control":
            condition, weight = (group[index], m), mask_weight(m)
        with autocast(device):
            loss = ddpm.loss(model, x0, *condition, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        run.update(loss)
    print(f"{config['kind']}: loss {np.mean([loss for _, loss in run.losses[-5:]]):.4f} after {args.steps} steps")
    show = np.concatenate([np.flatnonzero(code == g)[:8] for g in range(len(names))])
    generated = sample_images(run.ema, ddpm, config, code[show], data["mask"][show], device)
    rows, labels = [], []
    for g, name in enumerate(names):
        real = subset(data, show[code[show] == g])
        rows += [list(map(overlay, real["image"], real["mask"])),
                 list(map(overlay, generated[code[show] == g], real["mask"]))
                 if config["kind"] == "control" else list(generated[code[show] == g])]
        labels += [f"{name} real", "generated"]
    save_grid(f"{args.out}.png", rows, labels)

# -----------------------------------------------------------------------------
# Sampling

def load_generator(path, device):
    """The trained network (EMA weights) of a checkpoint, its diffusion and its config."""
    state = load_checkpoint(path, ("base", "control"))
    net, ddpm = build(state["config"])
    net.load_state_dict(state["ema"])
    return net.to(device, memory_format=torch.channels_last), ddpm, state["config"]

def sample_images(net, ddpm, config, code, mask, device, steps=10, seed=0):
    """Images uint8 (N, H, W) of groups code (N,), over masks uint8 (N, H, W) if net is a ControlNet."""
    net.eval()
    mean, std = config["mean"], config["std"]
    generator = torch.Generator(device).manual_seed(seed)
    batch = 50 if device.type == "cpu" else 250
    images = np.empty_like(mask)
    for i in tqdm(range(0, len(mask), batch), "images", leave=False, disable=None):
        condition = [torch.as_tensor(code[i:i + batch], device=device)]
        if config["kind"] == "control":
            condition.append(torch.as_tensor(mask[i:i + batch], device=device).long())
        shape = (len(condition[0]), 1, *mask.shape[1:])
        with autocast(device):
            x = ddpm.sample(net, shape, *condition, steps=steps, generator=generator,
                            clip=(-mean / std, (255 - mean) / std))
        images[i:i + batch] = (x[:, 0] * std + mean).round().clamp(0, 255).byte().cpu().numpy()
    return images

def sample(args):
    """Generate an image for every mask of a dataset."""
    device, _ = setup(args.device)
    data = load_set(args.masks)
    net, ddpm, config = load_generator(args.checkpoint, device)
    code, names = group_codes(data, config["attribute"], config["groups"])
    rows = np.concatenate([np.flatnonzero(code == g)[:args.n] for g in np.unique(code)])
    data, code = subset(data, rows), code[rows]
    images = sample_images(net, ddpm, config, code, data["mask"], device, args.steps, args.seed)
    save_set(args.out, data | {"image": images, "synthetic": np.ones(len(images), bool)})
    rows = []
    for g in np.unique(code):
        part = np.flatnonzero(code == g)[:4]
        rows.append([picture for i in part for picture in (images[i], overlay(images[i], data["mask"][i]))])
    save_grid(f"{args.out}.png", rows, [names[g] if g >= 0 else "unknown" for g in np.unique(code)])
    print(f"{args.out}: {len(images)} images")

# -----------------------------------------------------------------------------
# Evaluation: are generated images like real ones (Table 1), and do they show what their masks say?

@torch.no_grad()
def judge_features(judge, images, device, batch=100):
    """Features (N, D) of images uint8 (N, H, W): means of the judge's second decoder stage, in float32."""
    features = []
    for part in torch.as_tensor(images).split(batch):
        tokens, skips = judge.encode(part[:, None].to(device).float() / 255)
        features.append(judge.decode(tokens, skips)[1].mean((2, 3)).cpu().numpy())
    return np.concatenate(features).astype(float)

def evaluate(args):
    """Print Table 1 of generated sets, and the Dice of a judge on their images against their masks, by group.

    The judge is a TransUNet trained on real images and used for nothing else.
    """
    device, _ = setup(args.device)
    judge = load_segmenter(args.judge, device)
    train, test = load_set(args.train), load_set(args.test)
    names = group_codes(train, args.attribute)[1]
    sets = {"real": test}
    for item in args.sets:
        label, _, path = item.rpartition("=")
        known = [sets[label]] if label in sets else []
        sets[label] = concatenate(*known, load_set(path))
    rows = {}                                                           # of every set, by group
    for label, data in sets.items():
        code, _ = group_codes(data, args.attribute, names)
        rows[label] = [np.flatnonzero(code == g) for g in range(len(names))]
    lines = []
    for label, data in sets.items():
        pred = predict_masks(judge, data["image"], device)
        scores = [dice(pred, data["mask"], k) for k in structures(train["mask"]).values()]
        means = [np.mean(scores, 0)[own].mean() if len(own) else np.nan for own in rows[label]]
        lines.append([label, *(f"{mean:.4f}" for mean in means)])
    print_table("the judge's Dice on images against their masks", ["images", *names], lines)

    rows["reference"] = [own[:len(own) // 2] for own in rows["real"]]   # two sets of test images
    rows["real"] = [own[len(own) // 2:] for own in rows["real"]]
    groups = [g for g in range(len(names)) if min(len(rows[label][g]) for label in rows) >= 4]
    if not groups:
        print("no Table 1: expected 4 images of a group in every set, and 8 in the test set")
        return
    n = min(args.n, *(len(rows[label][g]) for label in rows for g in groups))       # a group, in every set
    features, pictures = {}, [[] for _ in groups]
    for label in rows:
        images = sets.get(label, test)["image"][np.concatenate([rows[label][g][:n] for g in groups])]
        features[label] = judge_features(judge, images, device)
        for i, row in enumerate(pictures):
            row += list(images[i * n:i * n + 2])
    training = judge_features(judge, train["image"], device)
    lines = []
    for label in sets:
        distance = set_distance(features[label], features["reference"], training)
        lines.append([label, *(f"{value:.4g}" for value in distance.values())])
    heads = ["images", *distance]
    with replacing(args.out) as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *lines])
    print_table("Table 1, on features of the judge", heads, lines)
    save_grid(f"{args.out}.png", pictures, [names[g] for g in groups], "two each: " + ", ".join(rows))

# -----------------------------------------------------------------------------
# Command line

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="controlnet.py", description="Images from masks: a UNet and its ControlNet.")
    p = parser.command("train-base", train, "train the image UNet")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("--attribute", default="race", help="group column")
    p.add_argument("--width", type=int, default=32, help="channels of the finest level, divisible by 8")
    p.add_argument("--patch", type=positive, help="p x p pixels become channels (default: about side / 32)")
    p.add_argument("--out", default="base.pt", help="checkpoint; an interrupted training continues")
    add_training_settings(p, steps=500, batch=8, lr=1e-3)
    p = parser.command("train-control", train, "train the ControlNet")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("base", help="what train-base wrote")
    p.add_argument("--group", help="train on this group alone, as the paper does")
    p.add_argument("--lock", action="store_true", help="freeze the decoder, too")
    p.add_argument("--out", default="control.pt", help="checkpoint; an interrupted training continues")
    add_training_settings(p, steps=1500, batch=8, lr=1e-3)
    p = parser.command("sample", sample, "generate an image for every mask")
    p.add_argument("checkpoint", help="what train-control wrote, or train-base, which ignores the masks")
    p.add_argument("masks", help="dataset .npz of masks")
    p.add_argument("--n", type=positive, help="masks a group at most (default: all)")
    p.add_argument("--steps", type=positive, default=10, help="sampler steps")
    p.add_argument("--seed", type=int, default=0, help="draws the noise")
    p.add_argument("--out", default="synthetic.npz", help="the same rows with images")
    q = parser.command("evaluate", evaluate, "Table 1, and a judge's Dice on the images")
    q.add_argument("judge", help="a TransUNet trained on real images and used for nothing else")
    q.add_argument("train", help="dataset .npz of real training images")
    q.add_argument("test", help="dataset .npz of real test images")
    q.add_argument("sets", nargs="+", help="NAME=FILE of generated datasets; those of one name are joined")
    q.add_argument("--attribute", default="race", help="group column")
    q.add_argument("--n", type=positive, default=100, help="images a group at most")
    q.add_argument("--out", default="table1.csv", help="CSV file of Table 1")
    for command in (p, q):
        command.add_argument("--device", default="auto", help="as in train")
    return run_command(parser, argv)

if __name__ == "__main__":
    sys.exit(main())
