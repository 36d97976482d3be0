"""Table 1 with the paper's GANs: pix2pixHD, SPADE and OASIS, each as long in training as base and ControlNet.

    python tests/experiments/table1.py --run out --out table1

Trains compact versions on the training set of a finished run of train.sh, on one core, generates an image for every
mask of that run, and trains TransUNet on Equal Scale made with each, three seeds. Writes OUT/*.npz, OUT/grid.png and
table1.csv beside this file. Of the settings (16, 4e-4), (16, 1e-3), (32, 4e-4) the first had the lowest Frechet distance
to training images on seed 10: pix2pixHD 0.020, 0.030, 0.043; SPADE 0.020, 0.022, 0.026; OASIS 0.075, 0.081, 0.090.
"""
import pathlib
import sys
import time
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import fairness  # noqa: E402
import transunet  # noqa: E402

SETTINGS = dict.fromkeys(("pix2pixHD", "SPADE", "OASIS"), (16, 4e-4))   # width of both networks, their learning rate
TABLE = str(pathlib.Path(__file__).with_name("table1.csv"))

# ---- Generators: c (B, K, H, W), K conditions, to images (B, 1, H, W) in [-1, 1] ---------------------------------------
class SPADE(nn.Module):
    """Normalisation whose scale and shift come from the condition at every pixel (Park et al. 2019); a convolution."""
    def __init__(self, c_in, c_out, k):
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in, affine=False)
        self.shared = nn.Conv2d(k, 32, 3, padding=1)
        self.scale_shift = nn.Conv2d(32, 2 * c_in, 3, padding=1)
        self.conv = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))

    def forward(self, x, c):
        shared = F.relu(self.shared(F.interpolate(c, x.shape[2:])))     # c at the size of x
        scale, shift = self.scale_shift(shared).chunk(2, 1)
        return self.conv(F.leaky_relu(self.norm(x) * (1 + scale) + shift, 0.2))

class SPADEBlock(nn.Module):
    """Residual block with SPADE for normalisation."""
    def __init__(self, c_in, c_out, k):
        super().__init__()
        self.conv1, self.conv2 = SPADE(c_in, c_out, k), SPADE(c_out, c_out, k)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x, c):
        return self.skip(x) + self.conv2(self.conv1(x, c), c)

class SPADEGenerator(nn.Module):
    """From a noise vector to an image; with noise_3d, as in OASIS, the noise joins the condition at every layer."""
    def __init__(self, k, width, noise_3d, noise=32):
        super().__init__()
        self.noise_3d = noise_3d
        k = k + noise if noise_3d else k
        self.start = nn.Linear(noise, 64 * width)
        widths = (4, 4, 4, 2, 1, 1)                                     # at 1/16, 1/8, 1/4, 1/2 and 1
        self.blocks = nn.ModuleList(SPADEBlock(a * width, b * width, k) for a, b in pairwise(widths))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, c):
        z = torch.randn(len(c), self.start.in_features)
        if self.noise_3d:
            c = torch.cat([c, z[..., None, None].expand(-1, -1, *c.shape[2:])], 1)
        x = F.interpolate(self.start(z).view(len(z), -1, 4, 4), (c.shape[2] // 16, c.shape[3] // 16))
        for i, block in enumerate(self.blocks):
            x = block(F.interpolate(x, scale_factor=2, mode="nearest") if i else x, c)
        return torch.tanh(self.last(F.leaky_relu(x, 0.2)))

def conv_norm(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.InstanceNorm2d(c_out), nn.ReLU())

class Pix2pixHD(nn.Sequential):
    """Convolutional encoder, residual blocks, decoder (Wang et al. 2018); it has no noise."""
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    def __init__(self, k, width):
        a, b, c = width, 2 * width, 4 * width                           # at 1, 1/2 and 1/4
        blocks = [self.Residual(conv_norm(c, c), conv_norm(c, c)[:2]) for _ in range(4)]
        up = nn.Upsample(scale_factor=2)
        super().__init__(conv_norm(k, a), conv_norm(a, b, 2), conv_norm(b, c, 2), *blocks, up, conv_norm(c, b),
                         up, conv_norm(b, a), nn.Conv2d(a, 1, 3, padding=1), nn.Tanh())

# ---- Discriminators ---------------------------------------------------------------------------------------------------
class Trunk(nn.Module):
    """Strided convolutions, down to 1/8; the outputs of every layer."""
    def __init__(self, c_in, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2))
                                    for a, b in pairwise((c_in, width, 2 * width, 4 * width)))

    def forward(self, x):
        return list(accumulate(self.layers, lambda x, layer: layer(x), initial=x))[1:]

class PatchGAN(nn.Module):
    """Two trunks, for the image with its condition and for half of its size; their last outputs are logits."""
    def __init__(self, k, width):
        super().__init__()
        self.trunks = nn.ModuleList(Trunk(1 + k, width) for _ in range(2))
        for trunk in self.trunks:
            trunk.layers.append(nn.Conv2d(4 * width, 1, 3, padding=1))

    def forward(self, x, c):
        x = torch.cat([x, c], 1)
        return self.trunks[0](x), self.trunks[1](F.avg_pool2d(x, 2))

class Segmenter(nn.Module):
    """OASIS's discriminator: a U-Net with a class for every label and one for "generated" (Sushko et al. 2021)."""
    def __init__(self, width, groups):
        super().__init__()
        self.trunk = Trunk(1 + groups, width)
        widths = ((4 * width, 2 * width), (4 * width, width), (2 * width, width))
        self.ups = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), spectral_norm(nn.Conv2d(a, b, 3, padding=1)),
                                               nn.LeakyReLU(0.2)) for a, b in widths)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x, c):
        half, quarter, eighth = self.trunk(torch.cat([x, c[:, 3:]], 1))  # it sees the group, not the mask
        x = torch.cat([self.ups[0](eighth), quarter], 1)
        x = torch.cat([self.ups[1](x), half], 1)
        return self.head(self.ups[2](x))                                # (B, 4, H, W)

# ---- Losses -----------------------------------------------------------------------------------------------------------
def least_squares(logits, target):
    """LSGAN (Mao et al. 2017): mean squared distance of the logits of every scale to 1 or 0."""
    return sum(((scale[-1] - target) ** 2).mean() for scale in logits)

def hinge(logits, sign):
    """The discriminator's hinge loss; sign 1 for real images, -1 for generated ones."""
    return sum(F.relu(1 - sign * scale[-1]).mean() for scale in logits)

def balanced_entropy(logits, label, mask):
    """Cross-entropy with pixels weighted by the inverse frequency of their label in the batch, mean weight 1."""
    share = F.one_hot(mask, 3).float().mean((0, 1, 2))
    weight = (1 / share.clamp(min=1e-3))[mask]
    return (weight / weight.mean() * F.cross_entropy(logits, label, reduction="none")).mean()

def generator_loss(method, d, fake, real, c, mask):
    """How far the discriminator is from taking generated images for real ones, and feature matching."""
    if method == "OASIS":
        return balanced_entropy(d(fake, c), mask, mask)
    of_fake, of_real = d(fake, c), d(real, c)
    adversarial = least_squares(of_fake, 1) if method == "pix2pixHD" else -sum(scale[-1].mean() for scale in of_fake)
    matching = sum(F.l1_loss(of_fake[i][j], of_real[i][j].detach()) for i in range(2) for j in range(3))
    return adversarial + 10 * matching                                  # as in pix2pixHD

def discriminator_loss(method, d, fake, real, c, mask):
    """How badly the discriminator tells generated from real images; OASIS: also LabelMix consistency."""
    fake = fake.detach()
    of_real, of_fake = d(real, c), d(fake, c)
    if method == "pix2pixHD":
        return 0.5 * (least_squares(of_real, 1) + least_squares(of_fake, 0))
    if method == "SPADE":
        return hinge(of_real, 1) + hinge(of_fake, -1)
    swap = (torch.rand(len(mask), 3) < 0.5).float()                     # LabelMix: some labels of each image
    m = swap.gather(1, mask.flatten(1)).view_as(mask)[:, None]
    consistency = ((d(m * real + (1 - m) * fake, c) - (m * of_real + (1 - m) * of_fake)) ** 2).mean()
    return (balanced_entropy(of_real, mask, mask) + balanced_entropy(of_fake, torch.full_like(mask, 3), mask)
            + 10 * consistency)

# ---- Training ---------------------------------------------------------------------------------------------------------
def condition(mask, code, groups):
    """One-hot mask and group (B, 3 + G, H, W) of mask long (B, H, W) and code (B,)."""
    group = F.one_hot(code, groups)[..., None, None].expand(-1, -1, *mask.shape[1:])
    return torch.cat([F.one_hot(mask, 3).movedim(-1, 1), group], 1).float()

def train(method, setting, data, code, groups, seconds=1e9, steps=1e9, batch=8):
    """Train for so many seconds of a core, or steps; returns the EMA of the generator."""
    torch.manual_seed(0)
    width, rate = setting
    k = 3 + groups
    g = Pix2pixHD(k, width) if method == "pix2pixHD" else SPADEGenerator(k, width, method == "OASIS")
    d = Segmenter(width, groups) if method == "OASIS" else PatchGAN(k, width)
    ema = AveragedModel(g, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    optimizers = [torch.optim.Adam(net.parameters(), rate, (0.0, 0.99)) for net in (d, g)]
    pairs = np.stack([data["image"], data["mask"]], 1)
    h, w = pairs.shape[2:]
    margin = h // 16                                                    # shifted and flipped, as in controlnet.py
    pairs = torch.as_tensor(np.pad(pairs, [(0, 0), (0, 0), (margin, margin), (margin, margin)], "reflect"))
    odds = transunet.draw_weights(code, "oversample")                   # groups equally often, as in controlnet.py
    code, start, step = torch.as_tensor(code), time.process_time(), 0
    while step < steps and (spent := (time.process_time() - start) / seconds) < 1:
        index = torch.multinomial(odds, batch, replacement=True)
        top, left = torch.randint(2 * margin + 1, (2,)).tolist()
        pair = pairs[index, :, top:top + h, left:left + w].flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
        real, m = pair[:, :1].float() / 127.5 - 1, pair[:, 1].long()
        c = condition(m, code[index], groups)
        with fairdiff.autocast(c.device):
            fake = g(c)
        for loss_function, optimizer in zip((discriminator_loss, generator_loss), optimizers, strict=True):
            with fairdiff.autocast(c.device):
                loss = loss_function(method, d, fake, real, c, m)
            optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * spent)     # constant, then linearly down, as SPADE's
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ema.update_parameters(g)
        step += 1
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
    fairdiff.mix(f"{run}/data/train.npz", [path], f"{name}-mixed.npz")
    transunet.train(f"{name}-mixed.npz", f"{name}.pt", seed=int(seed))                      # does nothing if done
    transunet.predict(f"{name}.pt", f"{run}/data/test.npz", f"{name}.npz")
    truth = fairdiff.load_set(f"{run}/data/test.npz")
    scores = fairness.score_predictions([f"{label}={name}.npz"], truth)[label, "mean", "dice"]["0"]
    return min(scores[truth["race"] == name].mean() for name in np.unique(truth["race"]))

def main(run="out", out="table1", steps=10 ** 9, seeds: list = ("0", "1", "2"), csv=TABLE):
    """Make Table 1 from the folder `run` of a finished train.sh, in the folder `out`.
    steps: of each training, at most; seeds: of TransUNet."""
    run, out = pathlib.Path(run), pathlib.Path(out)
    log = map(str.split, (run / "log/seconds.txt").read_text().splitlines())            # of 257 s  control-all
    seconds = sum(int(line[0]) for line in log if line[-1] in ("base", "control-all"))
    masks, data = (fairdiff.load_set(run / name) for name in ("masks-all.npz", "data/train.npz"))
    code, names = fairdiff.group_codes(data, "race")
    mask_code, _ = fairdiff.group_codes(masks, "race", names)
    sets = {"base": run / "base-alone.npz"}
    for label, setting in SETTINGS.items():
        sets[label] = out / f"{label}.npz"
        if not sets[label].exists():
            ema = train(label, setting, data, code, len(names), seconds, steps)
            fairdiff.save_set(sets[label], masks | {"image": generate(ema, masks["mask"], mask_code, len(names))})
    sets |= {"without points": run / "real-masks-all.npz", "with points": run / "synthetic-all.npz"}
    named = [f"{label}={path}" for label, path in sets.items()]
    controlnet.evaluate(run / "oversample-0.pt", run / "data/train.npz", run / "data/test.npz", named, csv)
    rows = np.concatenate([np.flatnonzero(mask_code == g)[:4] for g in range(len(names))])
    columns = [fairdiff.load_set(sets[label])["image"][rows] for label in (*SETTINGS, "with points")]
    fairdiff.save_grid(out / "grid.png", [127 * masks["mask"][rows], *columns], ["mask", *SETTINGS, "ControlNet"])
    for label, path in list(sets.items())[1:] if seeds else ():
        worst = [downstream(run, out, label, path, seed) for seed in seeds]
        half = 4.30 * np.std(worst, ddof=1) / np.sqrt(3) if len(worst) == 3 else np.nan     # Student's t, 2 degrees
        print(f"TransUNet on Equal Scale, images of {label}: worst group {np.mean(worst):.4f} ± {half:.4f}", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(fairdiff.command_line(main, argv=["main", *sys.argv[1:]]))
