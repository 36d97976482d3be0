"""Mask-image generation (Section 2.3): a diffusion UNet and a ControlNet (Zhang et al. 2023).

    python controlnet.py train-base data/train.npz --attribute race --out base.pt
    python controlnet.py train-control data/train.npz base.pt --out control.pt
    python controlnet.py sample control.pt masks.npz --out synthetic.npz
    python controlnet.py evaluate judge.pt data/train.npz data/test.npz generated=synthetic.npz

B batch, N images, H W pixels, p patch, level i: Ci channels, h w pixels; E embedding, D features.
"""
import copy
import math
import pathlib
import sys
from itertools import cycle, islice, pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from fairdiff import (InputError, Run, autocast, command_line, fingerprint, group_codes, setup,
                      load_checkpoint, load_set, save_grid, save_group_grid, save_set, subset)
from fairness import dice, print_table, save_csv, set_distance, structures
from pointdiff import DDPM, Muon, timestep_embedding
from transunet import draw_weights, load_segmenter, predict_features

# ---- The base: a UNet ---------------------------------------------------------------------------
def zero_conv(channels, size=1):
    """Z of Eq. 5: a convolution that starts at zero; it learns, as its input is not zero."""
    conv = nn.Conv2d(channels, channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv

class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; step and group modulate the features between them."""
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = zero_conv(c_out, 3)                # a block starts as its shortcut
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x)))                           # (B, C, h, w)
        scale, shift = self.modulation(emb)[..., None, None].chunk(2, 1)        # (B, C, 1, 1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))                     # (B, C, h, w)

class Encoder(nn.Module):
    """The UNet's first half; returns one skip a level, the middle, the embedding (B, E)."""
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
        height, width = x.shape[2:]
        if math.gcd(height, width) % (4 * self.patch):
            raise InputError(f"{height} x {width} pixels; expected multiples of {4 * self.patch}")
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

    def forward(self, x, t, group, mask=None):                          # as a ControlNet is called
        return self.decoder(*self.encoder(x, t, group))                 # (B, 1, H, W)

# ---- The ControlNet (Eq. 5) ---------------------------------------------------------------------
class ControlNet(nn.Module):
    """y_c = F(x; Phi) + Z(F(x + Z(c; Phi_z1); Phi_c); Phi_z2), Eq. 5; F: encoder, c: mask hint."""
    def __init__(self, base, lock=False):
        super().__init__()
        self.encoder = base.encoder.requires_grad_(False)               # Phi
        self.copy = copy.deepcopy(base.encoder).requires_grad_(True)    # Phi_c
        self.decoder = base.decoder.requires_grad_(not lock)            # frozen in the paper
        w, p = base.widths, base.patch
        self.hint = nn.Sequential(nn.PixelUnshuffle(p), nn.Conv2d(3 * p * p, w[0], 3, padding=1),
                                  nn.SiLU(), nn.Conv2d(w[0], w[0], 3, padding=1), nn.SiLU())
        self.z1 = zero_conv(w[0])                                       # Phi_z1
        self.z2 = nn.ModuleList(map(zero_conv, (*w, w[-1])))            # Phi_z2: skips, middle

    def forward(self, x, t, group, mask):
        labels = F.one_hot(mask, 3).movedim(-1, 1).to(x.dtype)          # (B, 3, H, W)
        skips, h, emb = self.encoder(x, t, group)                       # F(x; Phi)
        control = self.z1(self.hint(labels))                            # Z(c), (B, C0, H/p, W/p)
        control_skips, control_h, _ = self.copy(x, t, group, control)   # F(x + Z(c); Phi_c)
        for i in range(len(skips)):
            skips[i] = skips[i] + self.z2[i](control_skips[i])
        return self.decoder(skips, h + self.z2[-1](control_h), emb)     # Eq. 5

# ---- Training -----------------------------------------------------------------------------------
def mask_weight(mask):
    """Loss weights (B, 1, H, W), mean 1: the disc counts fivefold, small cups more than large."""
    disc = F.max_pool2d((mask[:, None] > 0).float(), 9, 1, 4)           # 4 pixels wider
    cup = (mask[:, None] == 2).float()
    boost = 0.05 / cup.mean((1, 2, 3), keepdim=True).clamp(min=0.005)
    weight = 1 + 4 * disc + 5 * boost * F.max_pool2d(cup, 5, 1, 2)      # cup 2 pixels wider
    return weight / weight.mean()

def train_base(dataset, out="base.pt", attribute="race", width=32, patch: int = None, steps=200,
               batch=8, lr=4e-3, seed=0, device="auto"):
    """Train the UNet on the images of a dataset.
    width: channels of level 0; patch: p x p pixels become channels; default: by the size."""
    config = locals() | {"kind": "base", "widths": [width, 2 * width, 3 * width]}
    data = load_set(dataset)
    _, names = group_codes(data, attribute)
    sides = data["image"].shape[1:]
    fitting = [p for p in range(2, min(sides) // 32 + 1) if math.gcd(*sides) % (4 * p) == 0]
    config |= {"groups": names, "patch": patch or max(fitting, default=2),
               "mean": float(data["image"].mean()), "std": float(data["image"].std()) + 1e-6}
    torch.manual_seed(seed)
    fit(UNet(len(names), config["widths"], config["patch"]), config, data, out, device)

def train_control(dataset, base, out="control.pt", group: str = None, lock=False, steps=2200,
                  batch=8, lr=4e-3, seed=0, device="auto"):
    """Train a ControlNet around a base, on the images of all groups, or of one, as in the paper.
    lock: freeze the decoder, too, as the paper does."""
    settings = locals() | {"kind": "control"}
    data = load_set(dataset)
    net, config = load_generator(base, "cpu", ["base"])
    config |= settings | {"base": fingerprint(*net.state_dict().values())}
    if group and group not in config["groups"]:
        raise InputError(f"no group {group!r}; expected {', '.join(config['groups'])}")
    code, _ = group_codes(data, config["attribute"], [group] if group else config["groups"])
    data = subset(data, code >= 0) if group else data
    torch.manual_seed(seed)
    fit(ControlNet(net, lock), config, data, out, device)

def fit(net, config, data, out, device):
    """Train a network; groups are drawn equally often, images shifted and flipped."""
    device, world = setup(device)
    code, _ = group_codes(data, config["attribute"], config["groups"])
    config["data"] = fingerprint(data["image"], data["mask"], code)
    ddpm = DDPM()
    net = net.to(device)
    optimizer = Muon([p for p in net.parameters() if p.requires_grad], config["lr"])
    run = Run(out, config, net, optimizer, decay=0.995)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    pairs = np.stack([data["image"], data["mask"]], 1)
    h, w = pairs.shape[2:]
    margin = h // 16                                    # without shifts few images are memorised
    pairs = np.pad(pairs, [[0], [0], [margin], [margin]], "reflect")
    pairs = torch.as_tensor(pairs, device=device)       # (N, 2, H + 2 margin, W + 2 margin)
    group = torch.as_tensor(code, device=device)                        # (N,)
    odds = draw_weights(code, "oversample")
    for step in run.steps():
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / config["steps"])
        optimizer.param_groups[0]["lr"] = config["lr"] * min((step + 1) / 50, cosine)
        index = torch.multinomial(odds, max(1, config["batch"] // world), replacement=True)
        top, left = torch.randint(2 * margin + 1, (2,)).tolist()
        pair = pairs[index, :, top:top + h, left:left + w]              # (B, 2, H, W)
        pair = pair.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
        x0 = (pair[:, :1] - config["mean"]) / config["std"]             # (B, 1, H, W)
        m = pair[:, 1].long()                                           # (B, H, W)
        weight = mask_weight(m) if config["kind"] == "control" else 1.0
        t = torch.randint(ddpm.T, (len(x0),), device=device)            # (B,)
        with autocast(device):
            loss = ddpm.loss(model, x0, t, group[index], m, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        run.update(loss)

# ---- Sampling -----------------------------------------------------------------------------------
def load_generator(path, device, kinds=("base", "control")):
    """The trained network (EMA weights) of a checkpoint, and its config."""
    state = load_checkpoint(path, kinds)
    config = state["config"]
    net = UNet(len(config["groups"]), config["widths"], config["patch"])
    net = ControlNet(net, config["lock"]) if config["kind"] == "control" else net
    net.load_state_dict(state["ema"])
    return net.to(device), config

def sample_images(net, config, code, mask, device, steps=8, seed=0, batch=100):
    """Images uint8 (N, H, W) of groups code (N,), over masks (N, H, W) if net is a ControlNet."""
    mean, std = config["mean"], config["std"]
    generator = torch.Generator(device).manual_seed(seed)
    images = np.empty_like(mask)
    for i in tqdm(range(0, len(mask), batch), "images", leave=False, disable=None):
        group = torch.as_tensor(code[i:i + batch], device=device)
        m = torch.as_tensor(mask[i:i + batch], device=device).long()
        with autocast(device):
            x = DDPM().sample(net, (len(m), 1, *m.shape[1:]), group, m, steps=steps,
                              generator=generator, clip=(-mean / std, (255 - mean) / std))
        images[i:i + batch] = (x[:, 0] * std + mean).round().byte().cpu().numpy()
    return images

def sample(checkpoint, masks, out="synthetic.npz", n: int = None, equal=False, steps=8, seed=0,
           device="auto"):
    """Generate an image for every mask of known group, or n a group, with its masks in turn.
    checkpoint: of a ControlNet, or of a base, which ignores masks; equal: as many a group as Equal
    Scale needs, if masks are the real set; steps: of denoising."""
    device, _ = setup(device)
    data = load_set(masks)
    net, config = load_generator(checkpoint, device)
    code, names = group_codes(data, config["attribute"], config["groups"])
    groups = [config["group"]] if config.get("group") else names
    n = round((code >= 0).sum() / len(names)) + 1 if equal else n
    rows = []
    for name in groups:
        own = np.flatnonzero(code == names.index(name))
        rows += islice(cycle(own), n or len(own))                       # masks in turn
    if not rows:
        raise InputError(f"{masks}: no masks of {', '.join(groups)}; expected some")
    data = subset(data, rows)
    data["name"] = np.array([f"{name}-{i}" for i, name in enumerate(data["name"])])
    data["synthetic"][:] = True
    data["image"] = sample_images(net, config, code[rows], data["mask"], device, steps, seed)
    save_set(out, data)
    data["mask"] *= config["kind"] == "control"         # no outlines: a base sees no masks
    save_group_grid(f"{out}.png", data, config["attribute"])
    print(f"{out}: {len(rows)} images")

# ---- Evaluation: do images show their masks, and are they like real ones (Table 1)? -------------
def table_1(parts, training, n):
    """Distances of Table 1 by set, from features (N, D) by set and group, and of training images.
    Half of the real ones are the reference; all sets are cut to one number a group, at most n."""
    parts = parts | {"reference": [np.array_split(own, 2)[1] for own in parts["real"]]}
    sizes = [min(map(len, own)) for own in zip(*parts.values(), strict=True)]
    groups = [g for g, size in enumerate(sizes) if size >= 4]
    if not groups:
        return {}
    n = min(n, *(sizes[g] for g in groups))
    parts = {label: np.concatenate([own[g][:n] for g in groups]) for label, own in parts.items()}
    reference = parts.pop("reference")
    return {label: set_distance(own, reference, training) for label, own in parts.items()}

def evaluate(judge, train, test, sets: list, out="table1.csv", attribute="race", n=100,
             device="auto"):
    """Print a judge's Dice on images against their masks, and Table 1 on its features, also as CSV.
    judge: a TransUNet; sets: NAME=FILE, or NAME-PART.npz, joined by NAME; n: images a group."""
    device, _ = setup(device)
    judge = load_segmenter(judge, device)
    train = load_set(train)
    _, names = group_codes(train, attribute)
    classes = structures(train["mask"]).values()
    results = {}                                        # by set: codes, Dice, features of each file
    pictures = {}                                       # real beside generated, by group
    for item in [f"real={test}", *sets]:
        label, path = item.split("=", 1) if "=" in item else ("", item)
        label = label or pathlib.Path(path).stem.rsplit("-", 1)[0]
        if label == "real" and results:
            raise InputError(f"{item}: `real` is the test set; expected another name, as NAME=FILE")
        data = load_set(path)
        code, _ = group_codes(data, attribute, names)
        pred, features = predict_features(judge, data["image"], device)
        scores = np.mean([dice(pred, data["mask"], k) for k in classes], 0)     # (N,)
        results.setdefault(label, []).append((code, scores, features))
        for g in np.unique(code[code >= 0]):
            pictures[f"{names[g]}: {label}"] = data["image"][code == g][:8]
    agreement, parts = [], {}
    for label, files in results.items():
        code, scores, features = map(np.concatenate, zip(*files, strict=True))
        parts[label], means = [], []
        for g in range(len(names)):
            parts[label].append(features[code == g])
            means.append(scores[code == g].mean() if g in code else np.nan)
        agreement.append([label, *map("{:.4f}".format, means)])
    _, training = predict_features(judge, train["image"], device)
    distances = table_1(parts, training, n)
    lines = [[label, *map("{:.4g}".format, own.values())] for label, own in distances.items()]
    heads = ["images", *distances.get("real", ())]
    save_csv(out, [heads, *lines])
    pictures = dict(sorted(pictures.items(), key=lambda item: item[0].split(":")[0]))   # by group
    save_grid(f"{out}.png", list(pictures.values()), list(pictures))
    print_table("judge's Dice on images (nan: none of the group)", ["images", *names], agreement)
    if lines:
        print_table("Table 1, on features of the judge (nan: too few images)", heads, lines)
    else:
        print("no Table 1: expected 4 images of a group in every set, 8 in the test set")

# ---- Command line -------------------------------------------------------------------------------
if __name__ == "__main__":
    sys.exit(command_line(train_base, train_control, sample, evaluate))
