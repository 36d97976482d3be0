"""TransUNet (Chen et al. 2021) and the fair training methods of Section 3, Tables 2-5.

    python transunet.py train data/train.npz --method plain --out plain.pt
    python transunet.py predict plain.pt data/test.npz --out plain.npz

B batch, N images, C channels, H W image, L tokens of width D, K classes, G groups; -1: unknown.
"""
import math
import re
import sys
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fairdiff import (InputError, Run, autocast, command_line, fingerprint, group_codes,
                      load_checkpoint, load_set, save_grid, save_set, setup)

# ---- Augmentation -------------------------------------------------------------------------------
def augment(image, mask):
    """Flip and rotate image (B, 1, H, W) and mask (B, H, W) alike, with the published odds."""
    b, _, h, w = image.shape
    kind = torch.rand(b, device=image.device)
    turns = 4 if h == w else 2
    # half are mirrored and make quarter turns, a quarter turns by up to 20 degrees, a quarter stays
    quarter = torch.randint(turns, (b,), device=image.device) * (2 * math.pi / turns)
    small = (torch.rand(b, device=image.device) - 0.5) * (40 * math.pi / 180)
    angle = torch.where(kind < 0.5, quarter, torch.where(kind < 0.75, small, 0.0))
    flip = torch.where(kind < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    zero = torch.zeros_like(angle)
    theta = torch.stack([flip * cos, -sin * h / w, zero, flip * sin * w / h, cos, zero], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), image.shape, align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    mask = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)
    return image, mask[:, 0].long()

# ---- TransUNet ----------------------------------------------------------------------------------
class StdConv2d(nn.Conv2d):
    """Convolution with filters of mean 0 and variance 1 (Qiao et al. 2019)."""
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), self.bias)

def group_norm(channels):
    """GroupNorm with 32 groups as published, fewer for few channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 2)), channels, eps=1e-6)

class Bottleneck(nn.Module):
    """ResNetV2 unit: 1x1, 3x3 (with stride s) and 1x1 convolutions, and a residual connection."""
    def __init__(self, c_in, c_mid, c_out, stride):
        super().__init__()
        self.conv1 = StdConv2d(c_in, c_mid, 1, bias=False)
        self.conv2 = StdConv2d(c_mid, c_mid, 3, stride, 1, bias=False)
        self.conv3 = StdConv2d(c_mid, c_out, 1, bias=False)
        self.gn1, self.gn2, self.gn3 = map(group_norm, (c_mid, c_mid, c_out))
        if stride != 1 or c_in != c_out:
            self.downsample = StdConv2d(c_in, c_out, 1, stride, bias=False)
            self.gn_proj = nn.GroupNorm(c_out, c_out)                   # one channel a group

    def forward(self, x):
        y = F.relu(self.gn1(self.conv1(x)))                             # (B, c_mid, H, W)
        y = F.relu(self.gn2(self.conv2(y)))                             # (B, c_mid, H/s, W/s)
        y = self.gn3(self.conv3(y))                                     # (B, c_out, H/s, W/s)
        if hasattr(self, "downsample"):
            x = self.gn_proj(self.downsample(x))                        # (B, c_out, H/s, W/s)
        return F.relu(x + y)

class ResNetV2(nn.Module):
    """The stem: (B, 3, H, W) -> features (B, 16w, H/16, W/16) and skips at 1/8, 1/4 and 1/2."""
    def __init__(self, units, width):
        super().__init__()
        self.root = StdConv2d(3, width, 7, 2, 3, bias=False)
        self.gn_root = group_norm(width)
        self.blocks = nn.ModuleList()
        c_in = width
        for i, n in enumerate(units):
            c_out = 4 * width * 2 ** i
            stage = [Bottleneck(c_in, c_out // 4, c_out, 1 if i == 0 else 2)]
            stage += [Bottleneck(c_out, c_out // 4, c_out, 1) for _ in range(n - 1)]
            self.blocks.append(nn.Sequential(*stage))
            c_in = c_out

    def forward(self, x):
        half = F.relu(self.gn_root(self.root(x)))                       # (B, w, H/2, W/2)
        x = F.max_pool2d(half, 3, 2)                                    # (B, w, H/4 - 1, W/4 - 1)
        quarter = self.blocks[0](x)                                     # (B, 4w, H/4 - 1, W/4 - 1)
        eighth = self.blocks[1](quarter)                                # (B, 8w, H/8, W/8)
        x = self.blocks[2](eighth)                                      # (B, 16w, H/16, W/16)
        return x, (eighth, F.pad(quarter, (0, 1, 0, 1)), half)

class Block(nn.Module):
    """Transformer encoder block: pre-norm attention and MLP."""
    def __init__(self, dim, heads, mlp, dropout):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1 = nn.Linear(dim, mlp)
        self.fc2 = nn.Linear(mlp, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        b, n, d = x.shape                                               # (B, L, D)
        y = self.norm1(x)
        layers = (self.q, self.k, self.v)
        q, k, v = (f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in layers)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])         # (B, heads, L, L)
        y = scores.softmax(-1) @ v                                      # (B, heads, L, D/heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))            # (B, L, D)
        y = self.drop(F.gelu(self.fc1(self.norm2(x))))                  # (B, L, mlp)
        return x + self.drop(self.fc2(y))                               # (B, L, D)

def conv_bn(c_in, c_out):
    """3x3 convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

class Up(nn.Module):
    """Double the size, join the skip, two 3x3 convolutions."""
    def __init__(self, c_in, c_skip, c_out):
        super().__init__()
        self.conv1 = conv_bn(c_in + c_skip, c_out)
        self.conv2 = conv_bn(c_out, c_out)

    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        if skip is not None:                                            # (B, c_skip, 2H, 2W)
            x = torch.cat([x, skip], 1)                                 # (B, c_in + c_skip, 2H, 2W)
        return self.conv2(self.conv1(x))                                # (B, c_out, 2H, 2W)

GOOGLE_NAMES = {                # regular expression in our names: replacement, applied in order
    r"stem\.blocks\.(\d)\.(\d)": lambda m: f"block{int(m[1]) + 1}/unit{int(m[2]) + 1}",
    "^stem.": "", "^root": "conv_root", "downsample": "conv_proj", "embed": "embedding",
    "^blocks.": "Transformer/encoderblock_", r"(norm.?|gn\w+)\.weight": r"\1.scale",
    "^norm": "Transformer/encoder_norm", "norm1": "LayerNorm_0", "norm2": "LayerNorm_2",
    "fc1": "MlpBlock_3/Dense_0", "fc2": "MlpBlock_3/Dense_1", "weight": "kernel",
    r"\.(q|k|v|out)\.": r"/MultiHeadDotProductAttention_1/\1.", "/q": "/query", "/k": "/key",
    "/v": "/value", r"\.": "/", "position": "Transformer/posembed_input/pos_embedding"}

class TransUNet(nn.Module):
    """Images (B, 1, H, W) in [0, 1], sides divisible by 16, to logits (B, K, H, W)."""
    def __init__(self, n_classes=3, units=(1, 1, 1), width=16, dim=128, depth=3, heads=4, mlp=256,
                 decoder=(64, 32, 16, 8), bridge=128, grid=4, dropout=0.0):
        super().__init__()
        self.stem = ResNetV2(units, width)
        self.embed = nn.Conv2d(16 * width, dim, 1)
        self.position = nn.Parameter(torch.zeros(1, dim, grid, grid))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.bridge = conv_bn(dim, bridge)
        skips = (8 * width, 4 * width, width, 0)
        self.ups = nn.ModuleList(map(Up, (bridge, *decoder), skips, decoder))
        self.head = nn.Conv2d(decoder[-1], n_classes, 3, padding=1)

    @classmethod
    def base(cls, n_classes=3):
        """The published R50-ViT-B/16: 105.28 M parameters at 3 classes and 224 px."""
        return cls(n_classes, units=(3, 4, 9), width=64, dim=768, depth=12, heads=12, mlp=3072,
                   decoder=(256, 128, 64, 16), bridge=512, grid=14, dropout=0.1)

    def forward(self, x, with_tokens=False):
        """Logits (B, K, H, W); with_tokens: and the mean token (B, D). InputError: other sides."""
        if x.shape[-1] % 16 or x.shape[-2] % 16:
            raise InputError(f"images {tuple(x.shape)}; expected sides divisible by 16")
        x, skips = self.stem(x.repeat(1, 3, 1, 1))                      # the stem expects colour
        x = self.embed(x)                                               # (B, D, H/16, W/16)
        b, d, h, w = x.shape
        position = F.interpolate(self.position, (h, w), mode="bilinear", align_corners=True)
        x = self.drop((x + position).flatten(2).transpose(1, 2))        # (B, L, D)
        for block in self.blocks:
            x = block(x)                                                # (B, L, D)
        tokens = self.norm(x)                                           # (B, L, D)
        x = self.bridge(tokens.transpose(1, 2).reshape(b, d, h, w))     # (B, bridge, H/16, W/16)
        for up, skip in zip(self.ups, (*skips, None), strict=True):
            x = up(x, skip)                                             # 1/8, 1/4, 1/2, then 1
        logits = self.head(x)                                           # (B, K, H, W)
        return (logits, tokens.float().mean(1)) if with_tokens else logits

    @torch.no_grad()
    def load_npz(self, path):
        """Fill from Google's R50+ViT-B_16.npz; returns the names not filled. InputError: not it."""
        own = dict(self.named_parameters())
        unfilled = [name for name in own if name.startswith(("bridge", "ups", "head"))]
        try:
            file = np.load(path, allow_pickle=False)
            for name in own.keys() - unfilled:
                key, shape = name, own[name].shape
                for ours, theirs in GOOGLE_NAMES.items():
                    key = re.sub(ours, theirs, key)
                value = torch.as_tensor(file[key])
                if name == "position":
                    value = value[:, 1:].transpose(1, 2)                # (1, D, 14 * 14)
                elif len(shape) == 4:
                    value = value.permute(3, 2, 0, 1)                   # HWIO -> OIHW
                elif len(shape) == 2:
                    value = value.reshape(shape[1], shape[0]).T         # merges the heads
                own[name].copy_(value.reshape(shape))
        except Exception as error:                      # KeyError, ValueError, zip errors
            raise InputError(f"{path}: {error}; expected R50+ViT-B_16.npz, and --base") from None
        return unfilled

# ---- Losses -------------------------------------------------------------------------------------
def soft_dice(p, mask, dims=(0, 2, 3)):
    """1 - Dice (K,) of p (B, K, H, W) and mask (B, H, W); dims (2, 3): of each image, (B, K)."""
    true = F.one_hot(mask, p.shape[1]).movedim(-1, 1)                   # (B, K, H, W)
    return 1 - (2 * (p * true).sum(dims) + 1e-5) / ((p ** 2).sum(dims) + true.sum(dims) + 1e-5)

def seg_loss(logits, mask):
    """Half cross-entropy, half soft Dice, as published, of (B, K, H, W) and mask (B, H, W)."""
    logits = logits.float()                                             # bf16 sums badly
    return 0.5 * F.cross_entropy(logits, mask) + 0.5 * soft_dice(logits.softmax(1), mask).mean()

# ---- Fair methods -------------------------------------------------------------------------------
def group_means(values, group, n_groups):
    """Mean of values (B,) in every group, 0 where it is absent, and its count: (G,), (G,)."""
    member = F.one_hot(group + 1, n_groups + 1)[:, 1:].to(values.dtype)     # (B, G)
    count = member.sum(0)
    return values @ member / count.clamp(min=1), count

def groupdro_loss(losses, group, q, rate):
    """GroupDRO (Sagawa et al. 2020, Algorithm 1) of losses (B,) and weights q (G,): loss, new q.
    Batches draw the groups equally often, as published. A group that is not in the batch keeps its
    q, where the published code lets it decay; unknown images weigh 1."""
    mean, count = group_means(losses, group, len(q))
    present = (count > 0).to(q.dtype)
    grown = present * q * (rate * mean.detach()).exp()
    share = grown / grown.sum().clamp(min=1e-30)                        # (G,), 0 where absent
    unknown = (losses * (group < 0)).sum()
    loss = (count.sum() * (share * mean).sum() + unknown) / len(losses)
    return loss, q * (1 - present) + share * (q * present).sum()

def fairseg_loss(logits, mask, group, n_groups, gamma):
    """FairSeg's error-bound scaling (Tian et al. 2024): cross-entropy and a Dice of scaled p.
    Only groups in the batch are compared; as published, an absent one would make all scales 0."""
    logits = logits.float()
    p = logits.softmax(1)
    error, count = group_means(soft_dice(p.detach(), mask, (2, 3)).mean(1), group, n_groups)
    error = torch.where(count > 0, error.clamp(min=1e-6), torch.inf)    # (G,)
    ratio = F.pad(error.min() / error, (1, 0), value=1.0)[group + 1]    # (B,), unknown: 1
    scale = ratio.pow(gamma).tanh()[:, None, None, None]
    return 0.5 * F.cross_entropy(logits, mask) + 0.5 * soft_dice(p * scale, mask).mean()

def adversary_loss(logits, group, weight):
    """ADV (Madras et al. 2018): cross-entropy of guesses (B, G), weight (G,); unknown images 0."""
    loss = F.cross_entropy(logits.float(), group.clamp(min=0), weight, reduction="none")
    return (loss * (group >= 0)).mean()

# ---- Training -----------------------------------------------------------------------------------
METHODS = ("plain", "oversample", "balanced", "groupdro", "adv", "fairseg")
STRENGTH = {"groupdro": 0.01, "adv": 0.1, "fairseg": 0.3}       # best of 3, phantom seeds 10-12

def draw_weights(code, method, synthetic=0):
    """Odds (N,) of drawing an image: equal for all, or for all groups; "balanced" (ours): equal for
    real and synthetic (bool (N,)) images of a group, too. Unknown groups: the average odds."""
    weight = np.ones(len(code))
    if method in ("oversample", "balanced", "groupdro"):
        part = np.zeros(len(code)) + synthetic * (method == "balanced")
        groups = np.unique(code[code >= 0])
        for g in groups:
            _, kind, counts = np.unique(part[code == g], return_inverse=True, return_counts=True)
            weight[code == g] = 1 / len(counts) / counts[kind]
        weight[code < 0] = len(groups) / (code >= 0).sum()
    return torch.as_tensor(weight)

def build(config, device):
    """The network of a checkpoint's config, on a device, and what its method learns with it."""
    net = TransUNet.base() if config["base"] else TransUNet(width=config["width"])
    n_groups = len(config["groups"])
    net.register_buffer("q", torch.ones(n_groups) / n_groups)           # GroupDRO's weights
    if config["method"] == "adv":
        layers = nn.Linear(net.position.shape[1], 64), nn.ReLU(), nn.Linear(64, n_groups)
        net.adversary = nn.Sequential(*layers)
    if device.type == "cpu":                            # convolutions of few channels run faster so
        for layer in (net.ups[-2].conv2, net.ups[-1], net.head):
            layer.to(memory_format=torch.channels_last)
    if device.type == "cuda" and config["base"]:        # a seventh faster on an H100
        net.to(memory_format=torch.channels_last)
    return net.to(device)

def method_loss(net, method, strength, progress, rarity, logits, token, mask, group):
    """Loss of a method on a batch; progress 0 to 1, rarity (G,), token (B, D); updates net.q."""
    if method == "fairseg":
        return fairseg_loss(logits, mask, group, len(net.q), strength)
    if method == "groupdro":
        losses = [seg_loss(*pair) for pair in zip(logits.split(1), mask.split(1), strict=True)]
        loss, net.q = groupdro_loss(torch.stack(losses), group, net.q, strength)
        return loss
    loss = seg_loss(logits, mask)
    if method == "adv":
        ramp = 2 / (1 + math.exp(-10 * progress)) - 1                   # as Ganin et al. 2016
        turn = 1 + strength * ramp                          # reverses: gradient * -strength * ramp
        guess = net.adversary(turn * token.detach() + (1 - turn) * token)
        loss = loss + adversary_loss(guess, group, rarity)
    return loss

def train(dataset, out="seg.pt", method: Literal[METHODS] = "plain", strength: float = None,
          attribute="race", optimizer: Literal["adamw", "sgd"] = "adamw", width=16, base=False,
          weights: str = None, steps=1120, batch=8, lr: float = None, seed=0, device="auto"):
    """Train a TransUNet; every method takes the same number of optimizer steps.
    strength: of adv, groupdro or fairseg, by default as in STRENGTH; width: channels of the compact
    network's first layer; base: the published R50-ViT-B/16; weights: its R50+ViT-B_16.npz."""
    strength = STRENGTH.get(method) if strength is None else strength
    config = locals() | {"kind": "transunet"}           # all the settings above
    device, world = setup(device)
    data = load_set(dataset)
    code, names = group_codes(data, attribute)
    if not data["mask"].any():
        raise InputError(f"{dataset}: all masks are empty; expected labels 1 and 2 in some")
    if batch < world or batch // world == 1 and data["mask"][0].size == 256:    # BatchNorm fails
        raise InputError(f"--batch {batch} on {world} devices; expected more, or larger images")
    lr = lr or {"adamw": 4e-3, "sgd": 0.01}[optimizer]
    config |= {"groups": names, "data": fingerprint(data["image"], data["mask"], code)}
    torch.manual_seed(seed)
    net = build(config, device)
    if weights:
        net.load_npz(weights)
    updater = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=device.type != "mps")
    if optimizer == "sgd":
        updater = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    run = Run(out, config, net, updater, decay=0.995)
    if world > 1 and device.type == "cuda":             # converts net in place
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    odds = draw_weights(code, method, data["synthetic"])
    image = torch.as_tensor(data["image"], device=device)
    mask = torch.as_tensor(data["mask"], device=device)
    group = torch.as_tensor(code, device=device)
    rarity = len(code) / len(names) / torch.bincount(group[group >= 0], minlength=len(names))
    for step in run.steps():
        done = step / steps
        factor = min(10 * done + 0.01, 0.5 + 0.5 * math.cos(math.pi * done))    # warm-up, cosine
        if optimizer == "sgd":                                          # as published
            factor = (1 - done) ** 0.9
        updater.param_groups[0]["lr"] = lr * factor
        index = torch.multinomial(odds, batch // world, replacement=True)
        x, y = augment(image[index, None].float() / 255, mask[index].long())
        with autocast(device):
            logits, token = model(x, with_tokens=True)                  # (B, K, H, W), (B, D)
        loss = method_loss(net, method, strength, done, rarity, logits, token, y, group[index])
        updater.zero_grad()
        loss.backward()
        updater.step()
        run.update(loss)
    pred = predict_masks(run.ema, data["image"][:8], device)
    pictures = [data["image"][:8], 127 * data["mask"][:8], 127 * pred]
    save_grid(f"{out}.png", pictures, ["image", "truth", "predicted"])

# ---- Prediction ---------------------------------------------------------------------------------
@torch.no_grad()
def predict_masks(net, images, device, batch=100):
    """Masks uint8 (N, H, W) that a network predicts for grey images uint8 (N, H, W)."""
    net.eval()
    masks = []
    for part in torch.as_tensor(images).split(batch):
        with autocast(device):
            logits = net(part[:, None].to(device).float() / 255)        # (B, K, H, W)
        masks.append(logits.argmax(1).byte().cpu().numpy())
    return np.concatenate(masks)

def predict_features(net, images, device):
    """Predicted masks (N, H, W) of images uint8, and features (N, D): means in the decoder."""
    features = []
    with net.ups[1].register_forward_hook(
            lambda module, inputs, output: features.append(output.float().mean((2, 3)).cpu())):
        masks = predict_masks(net, images, device)
    return masks, np.concatenate(features).astype(float)

def load_segmenter(path, device):
    """The trained network of a checkpoint, its EMA weights."""
    state = load_checkpoint(path, ("transunet",))
    net = build(state["config"], device)
    net.load_state_dict(state["ema"])
    return net.eval()

def predict(checkpoint, dataset, out="pred.npz", device="auto"):
    """Write a dataset whose masks are the network's."""
    device, _ = setup(device)
    data = load_set(dataset)
    pred = predict_masks(load_segmenter(checkpoint, device), data["image"], device)
    save_set(out, data | {"mask": pred})
    print(f"{out}: {len(pred)} predictions")

# ---- Command line -------------------------------------------------------------------------------
if __name__ == "__main__":
    sys.exit(command_line(train, predict))
