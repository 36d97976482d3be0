"""Table 1 with the paper's GANs: pix2pixHD, SPADE and OASIS, each as long in training as base and ControlNet.

    python tests/experiments/table1.py --run out --out table1            --trials: only try the settings

Trains compact versions of the three on the training set of a finished run of train.sh, generates an image for every
mask of that run, prints Table 1 and the judge's Dice, and trains TransUNet on Equal Scale made with each method, three
seeds. One core; what is done is skipped. Writes OUT/*.npz, OUT/grid.png and table1.csv beside this file.
The three share conditions (one-hot mask and group), SPADE block, discriminator trunk, Adam (betas 0 and 0.99), batches
of 8 and EMA. Each uses the setting in TRIALS that brought images over training masks nearest to training images, on
development seed 10 after a third of the time. Frechet distances, the mean of Black and White (--trials prints one of
all groups): pix2pixHD 0.036, 0.044, 0.090; SPADE 0.060, 0.029, 0.052; OASIS 0.078, 0.075, 0.113.
B batch, K channels of the condition c: 3 labels and G groups, C channels, H W image.
"""
import copy
import math
import pathlib
import re
import sys
import time
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import fairness  # noqa: E402
import transunet  # noqa: E402

TRIALS = ((16, 4e-4), (16, 1e-3), (32, 4e-4))           # width of both networks, their learning rate
SETTINGS = {"pix2pixHD": TRIALS[0], "SPADE": TRIALS[1], "OASIS": TRIALS[1]}
TABLE = str(pathlib.Path(__file__).with_name("table1.csv"))
NOISE = 32                                              # channels of the noise

# ---- Generators: c (B, K, H, W) to images (B, 1, H, W) in [-1, 1] ---------------------------------------------------
class SPADE(nn.Module):
    """Normalisation whose scale and shift come from the condition at every pixel (Park et al. 2019)."""
    def __init__(self, channels, k):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(k, 32, 3, padding=1)
        self.scale_shift = nn.Conv2d(32, 2 * channels, 3, padding=1)

    def forward(self, x, c):
        c = F.interpolate(c, x.shape[2:], mode="nearest")
        scale, shift = self.scale_shift(F.relu(self.shared(c))).chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift

class SPADEBlock(nn.Module):
    """Residual block with SPADE for normalisation."""
    def __init__(self, c_in, c_out, k):
        super().__init__()
        self.spade1, self.spade2 = SPADE(c_in, k), SPADE(c_out, k)
        self.conv1 = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x, c):
        y = self.conv1(F.leaky_relu(self.spade1(x, c), 0.2))
        return self.skip(x) + self.conv2(F.leaky_relu(self.spade2(y, c), 0.2))

class SPADEGenerator(nn.Module):
    """From a noise vector to an image; with noise_3d, as in OASIS, the noise joins the condition at every layer."""
    def __init__(self, k, width, noise_3d):
        super().__init__()
        self.noise_3d = noise_3d
        k = k + NOISE if noise_3d else k
        self.start = nn.Linear(NOISE, 64 * width)
        widths = (4, 4, 4, 2, 1, 1)                                     # at 1/16, 1/8, 1/4, 1/2 and 1
        self.blocks = nn.ModuleList(SPADEBlock(a * width, b * width, k) for a, b in pairwise(widths))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, c):
        z = torch.randn(len(c), NOISE, device=c.device)
        if self.noise_3d:
            c = torch.cat([c, z[..., None, None].expand(-1, -1, *c.shape[2:])], 1)
        x = F.interpolate(self.start(z).view(len(z), -1, 4, 4), (c.shape[2] // 16, c.shape[3] // 16))
        for i, block in enumerate(self.blocks):
            x = block(F.interpolate(x, scale_factor=2, mode="nearest") if i else x, c)
        return torch.tanh(self.last(F.leaky_relu(x, 0.2)))

def conv_in(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.InstanceNorm2d(c_out), nn.ReLU())

class Pix2pixHD(nn.Module):
    """Convolutional encoder, residual blocks, decoder (Wang et al. 2018); it has no noise."""
    def __init__(self, k, width):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.encoder = nn.Sequential(conv_in(k, a), conv_in(a, b, 2), conv_in(b, c, 2))
        self.blocks = nn.ModuleList(nn.Sequential(conv_in(c, c), conv_in(c, c)[:2]) for _ in range(4))
        up = nn.Upsample(scale_factor=2)
        self.decoder = nn.Sequential(up, conv_in(c, b), up, conv_in(b, a), nn.Conv2d(a, 1, 3, padding=1), nn.Tanh())

    def forward(self, c):
        x = self.encoder(c)                                             # (B, 4 width, H/4, W/4)
        for block in self.blocks:
            x = x + block(x)
        return self.decoder(x)

# ---- Discriminators ---------------------------------------------------------------------------------------------------
class Trunk(nn.Module):
    """Strided convolutions; the features of every layer, the last at 1/8."""
    def __init__(self, c_in, width):
        super().__init__()
        widths = (c_in, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(nn.Sequential(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2))
                                    for a, b in pairwise(widths))

    def forward(self, x):
        return list(accumulate(self.layers, lambda x, layer: layer(x), initial=x))[1:]

class PatchGAN(nn.Module):
    """Logits for patches of image and condition, at two scales, and the features on the way."""
    def __init__(self, k, width):
        super().__init__()
        self.trunks = nn.ModuleList(Trunk(1 + k, width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(4 * width, 1, 3, padding=1) for _ in range(2))

    def forward(self, x, c):
        x, logits, features = torch.cat([x, c], 1), [], []
        for trunk, head in zip(self.trunks, self.heads, strict=True):
            features += trunk(x)
            logits.append(head(features[-1]))
            x = F.avg_pool2d(x, 2)
        return logits, features

class Segmenter(nn.Module):
    """OASIS's discriminator: a U-Net with a class for every label and one for "generated" (Sushko et al. 2021)."""
    def __init__(self, width, groups):
        super().__init__()
        self.trunk = Trunk(1 + groups, width)
        self.ups = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 3, padding=1))
                                 for a, b in ((4 * width, 2 * width), (4 * width, width), (2 * width, width)))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x, c):
        half, quarter, x = self.trunk(torch.cat([x, c[:, 3:]], 1))      # it sees the group, not the mask
        for up, skip in zip(self.ups, (quarter, half, None), strict=True):
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
            x = x if skip is None else torch.cat([x, skip], 1)
        return self.head(x)                                             # (B, 4, H, W)

# ---- Losses -----------------------------------------------------------------------------------------------------------
def least_squares(logits, target):
    """LSGAN (Mao et al. 2017): mean squared distance of logits to 1 or 0."""
    return sum(((x - target) ** 2).mean() for x in logits)

def hinge(logits, sign):
    """The discriminator's hinge loss; sign 1 for real images, -1 for generated ones."""
    return sum(F.relu(1 - sign * x).mean() for x in logits)

def balanced_entropy(logits, label, mask):
    """Cross-entropy with pixels weighted by the inverse frequency of their label in the batch, mean weight 1."""
    share = F.one_hot(mask, 3).float().mean((0, 1, 2))
    weight = (1 / share.clamp(min=1e-3))[mask]
    return (weight / weight.mean() * F.cross_entropy(logits, label, reduction="none")).mean()

def generator_loss(method, d, fake, real, c, mask):
    """How far the discriminator is from taking generated images for real ones, and feature matching."""
    if method == "OASIS":
        return balanced_entropy(d(fake, c), mask, mask)
    logits, features = d(fake, c)
    adversarial = least_squares(logits, 1) if method == "pix2pixHD" else -sum(x.mean() for x in logits)
    matching = sum(F.l1_loss(a, b.detach()) for a, b in zip(features, d(real, c)[1], strict=True))
    return adversarial + 10 * matching                                  # as in pix2pixHD

def discriminator_loss(method, d, fake, real, c, mask):
    """How badly the discriminator tells generated from real images; OASIS: also LabelMix consistency."""
    if method == "pix2pixHD":
        return 0.5 * (least_squares(d(real, c)[0], 1) + least_squares(d(fake, c)[0], 0))
    if method == "SPADE":
        return hinge(d(real, c)[0], 1) + hinge(d(fake, c)[0], -1)
    of_real, of_fake = d(real, c), d(fake, c)
    swap = (torch.rand(len(mask), 3) < 0.5).float()                     # LabelMix: some labels of each image
    m = torch.gather(swap, 1, mask.flatten(1)).view_as(mask)[:, None]
    consistency = ((d(m * real + (1 - m) * fake, c) - (m * of_real + (1 - m) * of_fake)) ** 2).mean()
    return (balanced_entropy(of_real, mask, mask) + balanced_entropy(of_fake, torch.full_like(mask, 3), mask)
            + 10 * consistency)

# ---- Training ---------------------------------------------------------------------------------------------------------
def build(method, groups, width):
    """Generator and discriminator."""
    k = 3 + groups
    generator = Pix2pixHD(k, width) if method == "pix2pixHD" else SPADEGenerator(k, width, method == "OASIS")
    return generator, Segmenter(width, groups) if method == "OASIS" else PatchGAN(k, width)

def condition(mask, code, groups):
    """One-hot mask and group (B, 3 + G, H, W) of mask long (B, H, W) and code (B,)."""
    group = F.one_hot(code, groups)[..., None, None].expand(-1, -1, *mask.shape[1:])
    return torch.cat([F.one_hot(mask, 3).movedim(-1, 1), group], 1).float()

def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def train(method, setting, data, code, groups, seconds=math.inf, steps=math.inf, batch=8):
    """Train for so many seconds of a core, or steps; returns the EMA of the generator."""
    torch.manual_seed(0)
    width, rate = setting
    g, d = build(method, groups, width)
    ema = copy.deepcopy(g).requires_grad_(False)
    optimizer_g = torch.optim.Adam(g.parameters(), rate, (0.0, 0.99))
    optimizer_d = torch.optim.Adam(d.parameters(), rate, (0.0, 0.99))
    image, mask = torch.as_tensor(data["image"])[:, None], torch.as_tensor(data["mask"])
    odds = transunet.draw_weights(code, "oversample")                   # groups equally often, as in controlnet.py
    code, start, step = torch.as_tensor(code), time.process_time(), 0
    while step < steps and time.process_time() - start < seconds:
        index = torch.multinomial(odds, batch, replacement=True)
        real, m = image[index].float() / 127.5 - 1, mask[index].long()
        if torch.rand(()) < 0.5:                                        # left and right eyes
            real, m = real.flip(-1), m.flip(-1)
        c = condition(m, code[index], groups)
        with fairdiff.autocast(c.device):
            fake = g(c)
            loss = discriminator_loss(method, d, fake.detach(), real, c, m)
        update(optimizer_d, loss)
        with fairdiff.autocast(c.device):
            loss = generator_loss(method, d, fake, real, c, m)
        update(optimizer_g, loss)
        step += 1
        for average, value in zip(ema.state_dict().values(), g.state_dict().values(), strict=True):
            if value.is_floating_point():
                average.lerp_(value, max(0.005, 9 / (10 + step)))
    print(f"{method}, width {width}, rate {rate}: {step} steps in {time.process_time() - start:.0f} s", flush=True)
    return ema

@torch.no_grad()
def generate(ema, masks, code, groups, seed=0):
    """Images uint8 (N, H, W) over masks (N, H, W); batch statistics are the running ones."""
    torch.manual_seed(seed)
    c = condition(torch.as_tensor(masks).long(), torch.as_tensor(code), groups)
    images = torch.cat([ema.eval()(part) for part in c.split(50)])
    return ((images[:, 0] + 1) * 127.5).round().byte().numpy()

def downstream(run, out, label, path, seed):
    """Worst-group Dice of a TransUNet trained on Equal Scale with these synthetic images."""
    name = f"{out}/{label}-{seed}".replace(" ", "-")
    if not pathlib.Path(f"{name}.npz").exists():
        fairdiff.mix(f"{run}/data/train.npz", [path], f"{name}-mixed.npz")
        transunet.train(f"{name}-mixed.npz", f"{name}.pt", seed=int(seed))
        transunet.predict(f"{name}.pt", f"{run}/data/test.npz", f"{name}.npz")
    truth, pred = fairdiff.load_set(f"{run}/data/test.npz"), fairdiff.load_set(f"{name}.npz")["mask"]
    scores = np.mean([fairness.dice(pred, truth["mask"], label) for label in (1, 2)], 0)
    return min(scores[truth["race"] == name].mean() for name in np.unique(truth["race"]))

def main(run="out", out="table1", trials=False, steps: int = None, seeds: list = ("0", "1", "2"), csv=TABLE):
    """Make Table 1 from the folder `run` of a finished train.sh, in the folder `out`.
    trials: compare the settings in TRIALS, on the training part; steps: of each training, at most; seeds: of TransUNet."""
    run, out = pathlib.Path(run), pathlib.Path(out)
    log = (run / "log/seconds.txt").read_text()
    seconds = sum(map(int, re.findall(r"(\d+) s  (?:base|control-all)$", log, re.M)))
    jobs, test, masks = SETTINGS, f"{run}/data/test.npz", fairdiff.load_set(run / "masks-all.npz")
    data = fairdiff.load_set(run / "data/train.npz")
    if trials:
        jobs = {f"{method} {setting}": setting for method in SETTINGS for setting in TRIALS}
        seconds, test, masks, csv = seconds / 3, f"{run}/data/train.npz", data, out / "trials.csv"
    print(f"{seconds:.0f} s of one core for each training; base and ControlNet took as long together, with --trials 3 x")
    code, names = fairdiff.group_codes(data, "race")
    mask_code, _ = fairdiff.group_codes(masks, "race", names)
    sets = {"base": run / "base-alone.npz"}
    for label, setting in jobs.items():
        sets[label] = out / f"{label}.npz"
        if not sets[label].exists():
            ema = train(label.split()[0], setting, data, code, len(names), seconds, steps or math.inf)
            image = generate(ema, masks["mask"], mask_code, len(names))
            fairdiff.save_set(sets[label], masks | {"image": image})
    sets |= {"without points": run / "real-masks-all.npz", "with points": run / "synthetic-all.npz"}
    items = [f"{label}={path}" for label, path in sets.items()]
    controlnet.evaluate(run / "judge-1000.pt", run / "data/train.npz", test, items, csv)
    if trials:
        return
    rows = np.concatenate([np.flatnonzero(mask_code == g)[:4] for g in range(len(names))])
    columns = [fairdiff.load_set(sets[label])["image"][rows] for label in (*SETTINGS, "with points")]
    fairdiff.save_grid(out / "grid.png", [127 * masks["mask"][rows], *columns], ["mask", *SETTINGS, "ControlNet"])
    for label, path in list(sets.items())[1:] if seeds else ():
        worst = [downstream(run, out, label, path, seed) for seed in seeds]
        half = 4.30 * np.std(worst, ddof=1) / np.sqrt(3) if len(worst) == 3 else np.nan     # Student's t, 2 degrees
        print(f"TransUNet on Equal Scale with {label}: worst group {np.mean(worst):.4f} ± {half:.4f}", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(fairdiff.command_line(main, argv=["main", *sys.argv[1:]]))
