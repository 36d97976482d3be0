"""TransUNet (Chen et al. 2021), its loss and its training: the segmenter of Section 3.

    python transunet.py train data/train.npz --method plain --out plain.pt
    python transunet.py train data/train.npz --method groupdro --attribute race --out groupdro.pt
    python transunet.py predict plain.pt data/test.npz --out plain.npz

A ResNetV2 stem turns the image into features at 1/2, 1/4, 1/8 and 1/16 of its size; a ViT mixes the last
grid; a cascaded upsampler climbs back, taking one skip at each of the three finer sizes. TransUNet.base() is
the published R50-ViT-B/16 with 105.28 M parameters, the default is the same class with smaller numbers
(1.0 M).

Expect at 64 px, batch 16, 2 cores: 11 steps a second with bf16, 6 without; 280 steps reach a Dice (mean of
rim and cup) of 0.89 on the phantom's test split, 0.81 in the rare group. There oversampling and GroupDRO lift
the rare group to 0.86, FairSeg's scaling and ADV (0.81) do not lift it (2026-11-24, seed 0).
"""
import fairdiff  # isort: skip  # noqa: F401  first, so that a Ctrl-C while torch loads is one line
import math
import re
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
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
    own_rows,
    parallel,
    pick_device,
    read_arrays,
    resume,
    run_command,
    save_set,
    save_sheet,
    save_training,
    take,
)
from fairness import dice

# B batch, C channels, H W image, L tokens of the last grid, D their width, K classes.


# ------------------------------------------------------------------------------------------------------------
# Data

def augment(image, mask):
    """Random flips and rotations, the same for image and mask, as in TransUNet's published training.

    image: float (B,1,H,W) in [0,1]; mask: long (B,H,W). Half of the images turn by a multiple of 90 degrees
    and are mirrored, one in four turns by up to 20 degrees, one in four stays. What enters from outside is
    the border's grey, and background. Images that are not square turn by 0 or 180 degrees.
    """
    b, _, h, w = image.shape
    kind = torch.rand(b, device=image.device)
    turns = 4 if h == w else 2
    quarter = torch.randint(turns, (b,), device=image.device) * (2 * math.pi / turns)
    small = (torch.rand(b, device=image.device) - 0.5) * (40 * math.pi / 180)
    angle = torch.where(kind < 0.5, quarter, torch.where(kind < 0.75, small, torch.zeros_like(small)))
    flip = torch.where(kind < 0.5, -1.0, 1.0)                           # with the turns: every mirror image
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([flip * cos, -sin * h / w, zero], 1),
                         torch.stack([flip * sin * w / h, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, image.shape, align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    mask = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    return image, mask


def draw_batch(weight, size):
    """Indices (size,) drawn with replacement; weight: float (N,), the odds of each image."""
    return torch.multinomial(weight, size, replacement=True)


# ------------------------------------------------------------------------------------------------------------
# Network

class Total(torch.autograd.Function):
    """The sum of a tensor over the processes. Its gradient is a sum, too: each process' loss depends on the
    x of every process."""

    @staticmethod
    def forward(ctx, x):
        torch.distributed.all_reduce(x := x.clone(memory_format=torch.contiguous_format))
        return x

    @staticmethod
    def backward(ctx, grad):
        torch.distributed.all_reduce(grad := grad.clone(memory_format=torch.contiguous_format))
        return grad


def gather_rows(x, n):
    """The rows (n, ...) of all processes from those that own_rows gave to this one, for a loss of all rows.

    Every process then computes the same loss. Going back, Total adds up the WORLD equal gradients of it and
    DistributedDataParallel divides by WORLD, so that what remains is the gradient of the loss.
    """
    if WORLD == 1:
        return x
    mine = own_rows(n)
    return Total.apply(F.pad(x.float(), (0, 0) * (x.ndim - 1) + (mine.start, n - mine.stop)))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over the `batch` images of all processes, a number that train sets; torch's SyncBatchNorm
    does that on GPUs alone."""

    def forward(self, x):
        if WORLD == 1 or not self.training:
            return super().forward(x)
        y, dims = x.float(), (0, 2, 3)
        n = self.batch * y[0, 0].numel()
        mean = Total.apply(y.sum(dims)) / n                             # (C,)
        y = y - mean[:, None, None]
        var = Total.apply((y ** 2).sum(dims)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (y * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Dropout(nn.Dropout):
    """Dropout whose zeros fall where they would if one process had the whole `batch`, set by train."""

    def forward(self, x):
        if WORLD == 1 or not self.training:
            return super().forward(x)
        kept = super().forward(x.new_ones(self.batch, *x.shape[1:]))
        return x * kept[own_rows(self.batch)]


class StdConv2d(nn.Conv2d):
    """Convolution whose filters are standardised to mean 0 and variance 1 first (Qiao et al. 2019)."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), self.bias)


def group_norm(channels, eps=1e-6):
    """GroupNorm with 32 groups as published, fewer where a compact network has not the channels for it."""
    groups = next(g for g in range(min(32, channels // 2), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


class Bottleneck(nn.Module):
    """ResNetV2 unit: 1x1, 3x3 (stride), 1x1 convolutions with a residual path."""

    def __init__(self, cin, cmid, cout, stride):
        super().__init__()
        self.conv1, self.gn1 = StdConv2d(cin, cmid, 1, bias=False), group_norm(cmid)
        self.conv2, self.gn2 = StdConv2d(cmid, cmid, 3, stride, 1, bias=False), group_norm(cmid)
        self.conv3, self.gn3 = StdConv2d(cmid, cout, 1, bias=False), group_norm(cout)
        self.project = stride != 1 or cin != cout
        if self.project:                                                # one group a channel, as published
            self.downsample = StdConv2d(cin, cout, 1, stride, bias=False)
            self.gn_proj = nn.GroupNorm(cout, cout)

    def forward(self, x):
        skip = self.gn_proj(self.downsample(x)) if self.project else x
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(skip + self.gn3(self.conv3(y)))


class ResNetV2(nn.Module):
    """The convolutional stem. (B,3,H,W) -> last grid (B,16w,H/16,W/16) and skips at 1/8, 1/4, 1/2."""

    def __init__(self, units, width):
        super().__init__()
        self.root, self.gn_root = StdConv2d(3, width, 7, 2, 3, bias=False), group_norm(width)
        self.blocks = nn.ModuleList()
        cin = width
        for i, n in enumerate(units):                                   # strides 1, 2, 2 at their first unit
            mid, cout = width * 2 ** i, width * 4 * 2 ** i
            self.blocks.append(nn.Sequential(*(
                Bottleneck(cin if j == 0 else cout, mid, cout, 2 if i and j == 0 else 1) for j in range(n))))
            cin = cout

    def forward(self, x):
        h, w = x.shape[-2:]
        x = F.relu(self.gn_root(self.root(x)))                          # (B, w,   H/2,  W/2)
        skips = [x]
        x = F.max_pool2d(x, 3, 2)                                # (B, w,   H/4-1, W/4-1): unpadded, published
        x = self.blocks[0](x)                                           # (B, 4w,  H/4-1, W/4-1)
        skips.append(F.pad(x, (0, w // 4 - x.shape[-1], 0, h // 4 - x.shape[-2])))
        x = self.blocks[1](x)                                           # (B, 8w,  H/8,  W/8)
        skips.append(x)
        return self.blocks[2](x), skips[::-1]                           # (B, 16w, H/16, W/16)


class Block(nn.Module):
    """Transformer encoder block: pre-norm attention and MLP."""

    def __init__(self, dim, heads, mlp, dropout):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2, self.drop = nn.Linear(dim, mlp), nn.Linear(mlp, dim), Dropout(dropout)

    def forward(self, x):
        b, n, d = x.shape                                               # (B, L, D)
        y = self.norm1(x)
        q, k, v = (f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, L, D/heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        y = self.drop(F.gelu(self.fc1(self.norm2(x))))
        return x + self.drop(self.fc2(y))                               # (B, L, D)


class Up(nn.Module):
    """Double the size, join the skip, two 3x3 convolutions."""

    def __init__(self, cin, skip, cout):
        super().__init__()
        self.conv1, self.conv2 = conv_bn(cin + skip, cout), conv_bn(cout, cout)

    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


def conv_bn(cin, cout):
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), BatchNorm(cout), nn.ReLU())


class TransUNet(nn.Module):
    """TransUNet, Fig. 1 of Chen et al. 2021: (B,1,H,W) in [0,1], sides divisible by 16, to logits (B,K,H,W).

    units: bottlenecks in the three stages of the stem; width: channels of its root; dim, depth, heads, mlp:
    the ViT; decoder: channels of the four upsampling steps; grid: side of the token grid that the position
    embedding is trained on (other sizes interpolate it).
    """

    def __init__(self, n_classes=3, units=(1, 1, 1), width=16, dim=128, depth=3, heads=4, mlp=256,
                 decoder=(64, 32, 16, 16), bridge=128, grid=4, dropout=0.1):
        super().__init__()
        self.stem = ResNetV2(units, width)
        self.embed = nn.Conv2d(16 * width, dim, 1)
        self.position = nn.Parameter(torch.zeros(1, dim, grid, grid))
        self.drop = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.bridge = conv_bn(dim, bridge)
        sizes = zip((bridge, *decoder), (8 * width, 4 * width, width, 0), decoder, strict=False)
        self.ups = nn.ModuleList(Up(cin, skip, cout) for cin, skip, cout in sizes)
        self.head = nn.Conv2d(decoder[-1], n_classes, 3, padding=1)

    @classmethod
    def base(cls, n_classes=3):
        """The published R50-ViT-B/16: 105.28 M parameters at 3 classes and 224 px."""
        return cls(n_classes, units=(3, 4, 9), width=64, dim=768, depth=12, heads=12, mlp=3072,
                   decoder=(256, 128, 64, 16), bridge=512, grid=14)

    @torch.no_grad()
    def load_npz(self, path):
        """Fill stem and ViT from Google's ImageNet-21k file R50+ViT-B_16.npz (HWIO).

        The position embedding is interpolated to this network's grid, its class token dropped. Returns the
        names of the parameters that the file does not fill (decoder and head). InputError where the file is
        missing, lacks a key or has another shape.
        """
        keys = {"stem.root.weight": "conv_root/kernel", "embed.weight": "embedding/kernel",
                "embed.bias": "embedding/bias", "position": "Transformer/posembed_input/pos_embedding"}
        for ours, theirs in (("stem.gn_root", "gn_root"), ("norm", "Transformer/encoder_norm")):
            keys |= {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}
        for i, stage in enumerate(self.stem.blocks):
            for j, unit in enumerate(stage):
                there, here = f"block{i + 1}/unit{j + 1}", f"stem.blocks.{i}.{j}"
                for k in (1, 2, 3, "_proj")[:4 if unit.project else 3]:
                    conv = "downsample" if k == "_proj" else f"conv{k}"
                    keys |= {f"{here}.{conv}.weight": f"{there}/conv{k}/kernel",
                             f"{here}.gn{k}.weight": f"{there}/gn{k}/scale",
                             f"{here}.gn{k}.bias": f"{there}/gn{k}/bias"}
        parts = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_2", "fc1": "MlpBlock_3/Dense_0",
                 "fc2": "MlpBlock_3/Dense_1"}
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            parts[ours] = f"MultiHeadDotProductAttention_1/{theirs}"
        for i in range(len(self.blocks)):
            for ours, theirs in parts.items():
                weight = "scale" if ours.startswith("norm") else "kernel"
                there = f"Transformer/encoderblock_{i}/{theirs}"
                keys |= {f"blocks.{i}.{ours}.weight": f"{there}/{weight}",
                         f"blocks.{i}.{ours}.bias": f"{there}/bias"}
        own = dict(self.named_parameters())
        try:
            file = read_arrays(path, set(keys.values()))
            arrays = {k: torch.as_tensor(np.asarray(file[v], np.float32)) for k, v in keys.items()}
        except (OSError, ValueError, KeyError, InputError) as e:
            raise InputError(f"{path}: not the R50+ViT-B_16.npz of ImageNet-21k ({e})") from None
        for name, a in arrays.items():
            p = own[name]
            if name == "position":                                      # (1, 1 + L, D) -> (1, D, side, side)
                side = math.isqrt(a.shape[1] - 1)
                a = a[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
                a = F.interpolate(a, p.shape[-2:], mode="bilinear", align_corners=True)      # as ndimage.zoom
            elif p.ndim == 4:
                a = a.permute(3, 2, 0, 1)                               # HWIO -> OIHW
            elif p.ndim == 2:  # (in, out), one of them split in heads
                a = a.reshape(p.shape[1], p.shape[0]).T
            if a.numel() != p.numel():
                raise InputError(f"{path}: {keys[name]} has {a.numel()} numbers; {name} needs {p.numel()}")
            p.copy_(a.reshape(p.shape))
        return sorted(set(own) - set(keys))

    def tokens(self, x):
        """Mixed tokens of the last grid, (B,D,H/16,W/16), and the three skips."""
        x, skips = self.stem(x.repeat(1, 3, 1, 1))                      # the published stem expects colour
        x = self.embed(x)                                               # (B, D, H/16, W/16)
        p = self.position
        if p.shape[-2:] != x.shape[-2:]:
            p = F.interpolate(p, x.shape[-2:], mode="bilinear", align_corners=True)
        b, d, h, w = x.shape
        x = self.drop((x + p).flatten(2).transpose(1, 2).contiguous())  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).transpose(1, 2).reshape(b, d, h, w), skips

    def forward(self, x, pooled=False):
        """Logits; with pooled also the bottleneck's mean token (B,D), from which ADV guesses the group."""
        if x.shape[-1] % 16 or x.shape[-2] % 16:
            raise ValueError(f"image of {tuple(x.shape[-2:])} pixels: TransUNet needs multiples of 16")
        tokens, skips = self.tokens(x)                                  # (B, D, H/16, W/16)
        x = self.bridge(tokens)                                         # (B, bridge, H/16, W/16)
        for up, skip in zip(self.ups, (*skips, None), strict=True):
            x = up(x, skip)                                             # 1/8, 1/4, 1/2, 1
        logits = self.head(x)                                           # (B, K, H, W)
        return (logits, tokens.float().mean((2, 3))) if pooled else logits


# ------------------------------------------------------------------------------------------------------------
# Loss

def soft_dice(p, mask, dims=(0, 2, 3)):
    """1 - Dice of probabilities p (B,K,H,W) and labels mask (B,H,W), summed over dims.

    Returns (K,) over batch and pixels (as published), (B,K) with dims=(2, 3): each image for itself.
    """
    true = F.one_hot(mask, p.shape[1]).movedim(-1, 1).to(p.dtype)       # (B, K, H, W)
    overlap, size = (p * true).sum(dims), (p ** 2).sum(dims) + true.sum(dims)
    return 1 - (2 * overlap + 1e-5) / (size + 1e-5)


def seg_loss(logits, mask):
    """Half cross-entropy, half soft Dice over batch and class, background included (as published).

    logits: (B,K,H,W); mask: long (B,H,W). Returns a scalar.
    """
    logits = logits.float()                             # bf16 keeps 8 bits: too few for a sum over a batch
    return 0.5 * F.cross_entropy(logits, mask) + 0.5 * soft_dice(logits.softmax(1), mask).mean()


def image_loss(logits, mask):
    """The same for each image alone, (B,): what a method that compares groups needs."""
    logits = logits.float()
    pixels = F.cross_entropy(logits, mask, reduction="none").mean((1, 2))
    return 0.5 * pixels + 0.5 * soft_dice(logits.softmax(1), mask, (2, 3)).mean(1)


# ------------------------------------------------------------------------------------------------------------
# Fair losses: the methods that Tables 2-5 compare with. group: long (B,), -1 unknown; a group may be absent
# from a batch. The authors' code of the paper holds none of these three.

def group_means(values, group, n_groups):
    """Mean of values (B,) in each group (G,), 0 where the group is absent, and how many entered it (G,)."""
    member = F.one_hot(group + 1, n_groups + 1)[:, 1:].to(values.dtype)        # (B, G); unknown: a row of 0
    count = member.sum(0)
    return values @ member / count.clamp(min=1), count


def groupdro_loss(losses, group, q, rate):
    """GroupDRO (Sagawa et al. 2020, Algorithm 1) on each image's cross-entropy and Dice.

    q_g grows by exp(rate * loss_g), the loss is the q-weighted mean of the groups' losses. losses: (B,); q:
    (G,) > 0, sums to 1. Returns the loss and the new q. Departures: the groups present share among them the q
    they had, as the published code lets an absent group decay (its loss is 0), and their weights are divided
    by their sum, so that a batch without the worst group is no smaller step; unknown images keep weight 1.
    """
    mean, count = group_means(losses, group, len(q))
    here = (count > 0).to(q.dtype)
    grown = here * q * (rate * mean.detach()).exp()
    share = grown / grown.sum().clamp(min=1e-30)                        # (G,), 0 where absent
    unknown = (losses * (group < 0)).sum()
    loss = (count.sum() * (share * mean).sum() + unknown) / len(losses)
    return loss, q * (1 - here) + share * (q * here).sum()


def fairseg_loss(logits, mask, group, n_groups, gamma):
    """FairSeg's fair error-bound scaling (Tian et al. 2024): cross-entropy and a *scaled* batch Dice.

    Each image's probabilities shrink by tanh((least / error_g)^gamma) before the Dice, where error_g is its
    group's mean Dice loss and least the smallest of them: a group that is read badly can never reach a small
    loss. Departures: only groups present are compared (in the published code an absent one makes every scale
    0, and with it the gradient); unknown images get the best group's scale (there -1 is the last group);
    error_g is the mean over images, not one Dice over the group's pixels.
    """
    logits = logits.float()
    p = logits.softmax(1)
    error, count = group_means(soft_dice(p.detach(), mask, (2, 3)).mean(1), group, n_groups)
    error = error.clamp(min=1e-6)                                       # a perfect group: no 0 / 0
    least = torch.where(count > 0, error, torch.inf).min()
    ratio = torch.where(count > 0, least / error, 1.0)                  # (G,), 1 for the best group
    scale = torch.cat([ratio.new_ones(1), ratio])[group + 1].pow(gamma).tanh()                # (B,)
    scaled = soft_dice(p * scale[:, None, None, None], mask)
    return 0.5 * F.cross_entropy(logits, mask) + 0.5 * scaled.mean()


class Reverse(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015): x forward, -strength * gradient backward."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.strength * grad, None


def adversary_loss(guess, group, weight):
    """ADV (Madras et al. 2018): cross-entropy of an adversary that names the group from the bottleneck.

    guess: logits (B,G), weight: (G,), rare groups count as much as frequent ones. Returns a scalar; unknown
    images count 0. It says nothing about pixels: the segmentation loss is added to it. Departures from the
    paper, which is about representations for classifiers: one adversary on the mean of the bottleneck's
    tokens, trained in the same step through `Reverse`, ramped as by Ganin & Lempitsky.
    """
    each = F.cross_entropy(guess.float(), group.clamp(min=0), weight, reduction="none")
    return (each * (group >= 0)).mean()


class Fair(nn.Module):
    """What a fair method keeps from step to step. A part of the network while it trains, so that the
    checkpoint holds it. count: images of each group in the training set (G,); dim: D."""

    def __init__(self, method, count, dim):
        super().__init__()
        present = count > 0
        self.register_buffer("q", present / present.sum())              # GroupDRO: weight of each group
        self.register_buffer("weight", count.sum() / present.sum() / count.clamp(min=1))
        self.register_buffer("recall", torch.zeros(2, len(count)))      # right guesses, images: fading
        if method == "adv":
            self.adversary = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, len(count)))

    def watch(self, guess, group):
        """Balanced accuracy of the adversary over about the last 50 steps, as a tensor; chance is 1 / G."""
        right, count = group_means((guess.argmax(1) == group).float(), group, guess.shape[1])
        self.recall.lerp_(torch.stack([right * count, count]), 0.02)
        seen = self.recall[1] > 0
        return torch.where(seen, self.recall[0] / self.recall[1], torch.nan).nanmean()


# ------------------------------------------------------------------------------------------------------------
# Training

# Chosen by the ES of the mean Dice on the validation part (compact network, 64 px phantom, 280 steps, --val
# 0.2, seed 0: 200 images, 18 of the rare group, differences below 0.02 mean little; plain 0.828). Tried: adv
# 0.1 0.828, 0.3 0.831, 1 0.831; groupdro 0.01 0.851, 0.1 0.854, 1 0.854; fairseg 0.5 0.830, 1 0.823, 3 0.807.
# The optimizer by the Dice there: AdamW 1e-3 0.886, 2e-3 0.886, 4e-3 0.893, 8e-3 0.875 (seed 1: 2e-3 0.888,
# 4e-3 0.883, 8e-3 0.878); SGD 0.01 0.856, 0.05 0.881, 0.2 0.874.
STRENGTH = {"adv": 1.0, "groupdro": 1.0, "fairseg": 0.5}
METHODS = ("plain", "oversample", *STRENGTH)
SAVE_EVERY = 200                                        # steps between checkpoints: 20 s on a laptop


def split_validation(data, attribute, share, seed):
    """Row numbers (train, validation): a share of the real images of every group is held out; seeded.

    An image that mix has repeated (NAME+1) is held out once, and none of its copies is trained on.
    """
    code, rng, held = group_codes(data, attribute)[0], np.random.default_rng((seed, 7)), []
    origin = np.array([re.sub(r"\+\d+$", "", name) for name in data["name"]])
    for g in np.unique(code):
        own = list(dict.fromkeys(origin[(code == g) & ~data["synthetic"]]))         # each once, in order
        held.extend(rng.permutation(own)[:round(share * len(own))])
    out = np.isin(origin, held)
    return np.flatnonzero(~out), np.flatnonzero(out & (origin == data["name"]) & ~data["synthetic"])


def method_weights(data, attribute, method):
    """Sampling odds (N,): uniform, or equal for every group (oversampling; unknown keeps the mean odds)."""
    weight = np.ones(len(data["image"]))
    if method == "oversample":
        code = known_groups(data, attribute)[0]
        present, count = np.unique(code[code >= 0], return_counts=True)
        for g, n in zip(present, count, strict=True):
            weight[code == g] = count.sum() / len(present) / n
    return torch.as_tensor(weight)


def build(config):
    """The network that a checkpoint's config describes."""
    return TransUNet.base() if config["size"] == "base" else TransUNet(width=config["width"])


def make_optimizer(net, name, lr):
    """SGD as published (momentum 0.9, weight decay 1e-4) or AdamW; the learning rate follows poly 0.9."""
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4, fused=True)
    return torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2, fused=True)


def train(args):
    """Train one TransUNet; every method takes the same number of optimizer steps."""
    device, dtype = pick_device(args.device)
    data = load_set(args.set)
    check_size(data, args.set)
    lr = args.lr or {"sgd": 0.01, "adamw": 2e-3}[args.optimizer]
    strength = STRENGTH.get(args.method, 0) if args.strength is None else args.strength
    if not strength >= 0 or not 0 <= args.val < 1:
        raise InputError(f"--strength {strength} --val {args.val}: expected 0 or more, and a share below 1")
    config = {"kind": "transunet", "size": "base" if args.base else "compact", "width": args.width, "lr": lr,
              "method": args.method, "strength": strength, "attribute": args.attribute, "steps": args.steps,
              "batch": args.batch, "optimizer": args.optimizer, "weights": args.weights or "",
              "val": args.val, "seed": args.seed,
              "data": fingerprint(data["image"], data["mask"], data[args.attribute])}
    rows, held = split_validation(data, args.attribute, args.val, args.seed)
    weight = method_weights(take(data, rows), args.attribute, args.method).to(device)
    image = torch.as_tensor(data["image"][rows], device=device)     # uint8: the whole set stays on the device
    mask = torch.as_tensor(data["mask"][rows], device=device)
    code, names = group_codes(data, args.attribute)
    group = torch.as_tensor(code[rows], dtype=torch.long, device=device)
    torch.manual_seed(args.seed)
    net = build(config)
    if args.weights:
        left = net.load_npz(args.weights)
        parts = ", ".join(sorted({name.split(".")[0] for name in left}))
        print(f"{args.weights}: fills all parameters but {len(left)}, those of {parts}")
    if args.method in STRENGTH:
        known_groups(data, args.attribute)                              # an error where nobody has one
        count = torch.as_tensor(np.bincount(code[rows][code[rows] >= 0], minlength=len(names)))
        net.fair = Fair(args.method, count, net.norm.normalized_shape[0])
    net = net.to(device, memory_format=torch.channels_last)
    ema, optimizer = EMA(net), make_optimizer(net, args.optimizer, lr)
    start, log = resume(args.out, config, net, ema, optimizer)
    run, mine = parallel(net, device, args.compile), own_rows(args.batch)
    for module in net.modules():
        if isinstance(module, (BatchNorm, Dropout)):
            module.batch = args.batch
    bar = tqdm(range(start, args.steps), f"transunet {args.method}", initial=start, total=args.steps,
               disable=RANK > 0)
    for step in bar:
        torch.manual_seed(mixed_seed(args.seed, step))                  # chance is a function of (seed, step)
        for options in optimizer.param_groups:
            options["lr"] = lr * (1 - step / args.steps) ** 0.9
        index = draw_batch(weight, args.batch)
        x, y = augment(image[index, None].float() / 255, mask[index].long())
        g = group[index]
        with autocast(device, dtype):
            logits, token = (gather_rows(a, args.batch) for a in run(x[mine], pooled=True))     # (B, K, H, W)
        if args.method == "groupdro":
            loss, net.fair.q = groupdro_loss(image_loss(logits, y), g, net.fair.q, strength)
        elif args.method == "fairseg":
            loss = fairseg_loss(logits, y, g, len(names), strength)
        else:
            loss = seg_loss(logits, y)
        total = loss                                                    # what is logged is loss alone
        if args.method == "adv":
            ramp = 2 / (1 + math.exp(-10 * step / args.steps)) - 1      # the adversary learns first
            guess = net.fair.adversary(Reverse.apply(token, strength * ramp))                    # (B, G)
            total = loss + adversary_loss(guess, g, net.fair.weight)
            accuracy = net.fair.watch(guess.detach(), g)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        ema.update(net, step)
        if step % 50 == 49 or step + 1 == args.steps:                  # reading the loss waits for the device
            log.append([step + 1, loss.item()] + ([accuracy.item()] if args.method == "adv" else []))
            bar.set_postfix_str(" ".join(f"{name} {x:.3f}" for name, x in
                                         zip(("loss", "adversary"), log[-1][1:], strict=False)))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_training(args.out, config, net, ema, optimizer, step + 1, log)
    net.load_state_dict(ema.state)
    spread = np.linspace(0, len(rows) - 1, min(500, len(rows))).astype(int)     # sets may be sorted by group
    sample = take(data, held if len(held) else rows[spread])
    pred = segment(net, sample["image"], device, dtype)
    score = np.mean([dice(pred, sample["mask"], s) for s in ("rim", "cup")], 0)
    means = {name: np.nanmean(score[g]) for i, name in enumerate(names)
             if np.isfinite(score[g := group_codes(sample, args.attribute)[0] == i]).any()}
    print(f"transunet {args.method}: Dice {np.nanmean(score):.4f} on {len(pred)} "
          f"{'held-out' if len(held) else 'training'} images (" +
          ", ".join(f"{name} {value:.4f}" for name, value in means.items()) + ")" +
          (f"; balanced accuracy of the adversary {log[-1][2]:.2f}, chance {1 / len(means):.2f}"
           if args.method == "adv" else ""))
    show = np.arange(min(8, len(pred)))
    save_sheet(f"{args.out}.png", [[outline(sample["image"][i], sample["mask"][i]) for i in show],
                                   [outline(sample["image"][i], pred[i]) for i in show]], ["truth", "read"])


# ------------------------------------------------------------------------------------------------------------
# Prediction

@torch.no_grad()
def segment(net, images, device, dtype=None, batch=100):
    """Label maps uint8 (N,H,W) that the network reads in grey images uint8 (N,H,W)."""
    net.eval()
    out = np.zeros(images.shape, np.uint8)
    for rows in own_batches(len(images), batch):
        x = torch.as_tensor(images[rows, None], device=device).float() / 255
        with autocast(device, dtype):
            out[rows] = net(x).argmax(1).byte().cpu().numpy()
    return add_up(out, device)


def load_segmenter(path, device):
    """The trained network (EMA weights, eval mode) of a checkpoint."""
    state = load_checkpoint(path, "transunet", "run `python transunet.py train SET.npz --out seg.pt` first")
    with fitting(path):
        net = build(state["config"])
        net.load_state_dict({k: v for k, v in state["ema"].items() if not k.startswith("fair.")})
        check_finished(path, state)
    return net.to(device, memory_format=torch.channels_last).eval()


def check_size(data, path, unit=16, who="TransUNet"):
    """InputError where the images are none or their sides not divisible by unit pixels."""
    n, h, w = data["image"].shape
    if not n or h % unit or w % unit:
        raise InputError(f"{path}: {n} images of {h}x{w} pixels; {who} needs sides divisible by {unit}")


def predict(args):
    """Write a dataset file whose masks are the network's."""
    device, dtype = pick_device(args.device)
    data = load_set(args.set)
    check_size(data, args.set)
    pred = segment(load_segmenter(args.checkpoint, device), data["image"], device, dtype)
    save_set(args.out, data | {"mask": pred})
    print(f"{args.out}: {len(pred)} predictions")


# ------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="transunet.py", description="TransUNet: train and predict")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("train", help="train one segmenter")
    p.add_argument("set", help="dataset .npz: real, synthetic or mixed")
    p.add_argument("--out", default="seg.pt", help="checkpoint; an interrupted training continues from it")
    p.add_argument("--method", choices=METHODS, default="plain", help="Tables 2-5")
    p.add_argument("--strength", type=float, help="adv: of the reversal; groupdro: rate; fairseg: gamma")
    p.add_argument("--attribute", choices=ATTRIBUTE_NAMES, default="race", help="groups that a method knows")
    p.add_argument("--steps", type=int, default=400, help="optimizer steps")
    p.add_argument("--batch", type=int, default=16, help="images a step")
    p.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="the paper's code: sgd")
    p.add_argument("--lr", type=float, help="learning rate (adamw 2e-3, sgd 1e-2)")
    p.add_argument("--width", type=int, default=16, help="channels of the compact network's root")
    p.add_argument("--base", action="store_true", help="the published R50-ViT-B/16")
    p.add_argument("--weights", help="with --base: ImageNet-21k weights, R50+ViT-B_16.npz")
    p.add_argument("--val", type=float, default=0, help="share of real images held out to choose by")
    p.add_argument("--seed", type=int, default=0, help="draws weights, batches and augmentation")
    p.add_argument("--compile", action="store_true", help="torch.compile: slow at first, then faster")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=train)
    p = sub.add_parser("predict", help="segment a dataset")
    p.add_argument("checkpoint", help="what train wrote")
    p.add_argument("set", help="dataset .npz")
    p.add_argument("--out", default="pred.npz", help="the same rows with predicted masks")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.set_defaults(run=predict)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
