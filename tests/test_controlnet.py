"""controlnet.py: Eq. 5 at the start and after some steps, shapes, and the commands from base to evaluation."""
import copy
import csv
import pathlib

import numpy as np
import pytest
import torch
from conftest import run

import controlnet
import fairdiff
import transunet
from controlnet import ControlNet, UNet

def trained_unet(h=32, w=32, patch=2):
    """A small UNet without weights at zero, and images, steps, groups (one unknown) and masks to put in."""
    torch.manual_seed(0)
    net = UNet(3, widths=(8, 16, 24), patch=patch)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net, torch.randn(2, 1, h, w), torch.tensor([10, 900]), torch.tensor([0, -1]), torch.randint(3, (2, h, w))

@pytest.mark.parametrize("h, w, patch", [(32, 32, 2), (64, 64, 4), (32, 80, 4), (48, 24, 2)])
def test_at_initialisation_the_controlnet_is_the_base_bit_for_bit(h, w, patch):
    """Eq. 5 with zero convolutions: y_c = y, whatever the mask; y has the shape of x, and step and group matter."""
    base, x, t, g, mask = trained_unet(h, w, patch)
    y = base(x, t, g)
    assert torch.equal(ControlNet(copy.deepcopy(base))(x, t, g, mask), y) and y.shape == x.shape
    assert not torch.allclose(base(x, t - 5, g), y) and not torch.allclose(base(x, t, g + 1), y)

@pytest.mark.parametrize("lock", [True, False])
def test_zero_convolutions_learn(lock):
    """Step 1 moves Phi_z2 alone, later steps hint, Phi_z1 and copy; never the encoder, nor a locked decoder."""
    base, x, t, g, mask = trained_unet()
    net = ControlNet(base, lock)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = controlnet.Muon([p for p in net.parameters() if p.requires_grad], 0.01)
    moved = []
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, t, g, mask) - 1).pow(2).mean().backward()
        optimizer.step()
        moved.append({name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, start[name])})
    decoder = set() if lock else {"decoder"}
    assert moved[0] == {"z2"} | decoder and moved[3] == {"z2", "z1", "hint", "copy"} | decoder
    assert not torch.allclose(net(x, t, g, mask), net(x, t, g, (mask + 1) % 3))

def test_training_shifts_image_and_mask_alike(here, monkeypatch):
    """Where an image is bright its mask is 1, and that is at one place in one step and at another in the next."""
    mask = np.zeros((2, 32, 32), np.uint8)
    mask[:, 4:10, 20:29] = 1
    fairdiff.save_set("set.npz", {"image": 200 * mask, "mask": mask, "race": np.array([*"ab"])})
    loss, seen = controlnet.DDPM.loss, set()
    def look(ddpm, net, x0, t, group, m, weight):
        seen.add((torch.equal(x0[:, 0] > 0, m > 0), m[0].numpy().tobytes()))
        return loss(ddpm, net, x0, t, group, m)
    monkeypatch.setattr(controlnet.DDPM, "loss", look)
    assert run(controlnet, "train-base", "set.npz", "--width", 8, "--steps", 9) == 0
    assert {alike for alike, _ in seen} == {True} and len(seen) > 3

def test_from_base_to_evaluation(here, phantom, refused):
    """Every command on a tiny phantom; a sampled set keeps masks, names and groups, and depends on the seed alone."""
    short = ["--batch", 4, "--steps", 2, "--out"]
    assert run(transunet, "train", "set.npz", "--width", 8, *short, "judge.pt") == 0
    assert run(controlnet, "train-base", "set.npz", "--width", 8, *short, "base.pt") == 0
    assert run(controlnet, "train-control", "set.npz", "base.pt", *short, "all.pt") == 0
    assert run(controlnet, "train-control", "set.npz", "base.pt", "--group", "White", *short, "one.pt") == 0
    order, images = np.argsort(phantom["race"], kind="stable"), {}
    for name, argv in {"a": "all.pt", "b": "all.pt", "c": "all.pt --seed=1", "d": "base.pt", "e": "one.pt"}.items():
        assert run(controlnet, "sample", *argv.split(), "set.npz", "--steps", 2, "--out", f"{name}.npz") == 0
        data = fairdiff.load_set(f"{name}.npz")
        own = fairdiff.subset(phantom, order[40:] if name == "e" else order)        # the last 20 are White
        assert np.array_equal(data["mask"], own["mask"]) and data["race"].tolist() == own["race"].tolist()
        assert all(map(str.startswith, data["name"].tolist(), own["name"].tolist()))
        images[name] = data["image"]
    assert np.array_equal(images["a"], images["b"])
    assert len({images[name].tobytes() for name in "acde"}) == 4
    assert len(np.unique(images["a"], axis=0)) == 60                    # each has noise of its own
    fairdiff.save_set("a=b.npz", phantom)
    refused(controlnet, "evaluate", "judge.pt", "set.npz", "set.npz", "real=a.npz", words="real=a.npz NAME=FILE")
    assert run(controlnet, "evaluate", "judge.pt", "set.npz", "set.npz", "control=a.npz", "copy=a=b.npz") == 0
    table = csv.DictReader(pathlib.Path("table1.csv").read_text().splitlines())
    memorised = {row["images"]: float(row["memorised"]) for row in table}
    assert list(memorised) == ["real", "control", "copy"] and memorised["control"] < memorised["copy"] == 1
