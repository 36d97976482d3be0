"""controlnet.py: Eq. 5 at the start and after some steps, shapes, and the commands from base to evaluation."""
import copy
import csv

import numpy as np
import pytest
import torch
from conftest import run
from test_pointdiff import break_and_continue

import controlnet
import fairdiff
import transunet
from controlnet import ControlNet, UNet
from pointdiff import DDPM

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
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3)
    moved = []
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, t, g, mask) - 1).pow(2).mean().backward()
        optimizer.step()
        moved.append({name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, start[name])})
    decoder = set() if lock else {"decoder"}
    assert moved[0] == {"z2"} | decoder and moved[3] == {"z2", "z1", "hint", "copy"} | decoder
    assert not torch.allclose(net(x, t, g, mask), net(x, t, g, (mask + 1) % 3))

TRAIN = ["--batch", "4", "--steps", "2", "--out"]

def test_from_base_to_evaluation(set_file, phantom, tmp_path, capsys):
    """Every command on a tiny phantom; a sampled set keeps masks, names and groups, and depends on the seed alone."""
    judge, base, control, one = (str(tmp_path / f"{name}.pt") for name in ("judge", "base", "control", "one"))
    assert run(transunet, ["train", set_file, "--width", "8", *TRAIN, judge]) == 0
    assert run(controlnet, ["train-base", set_file, "--width", "8", *TRAIN, base]) == 0
    assert run(controlnet, ["train-control", set_file, base, *TRAIN, control]) == 0
    assert run(controlnet, ["train-control", set_file, base, "--group", "White", *TRAIN, one]) == 0
    images = {}
    for name, argv in {"a": [control], "b": [control], "c": [control, "--seed=1"], "d": [base], "e": [one]}.items():
        out = str(tmp_path / f"{name}.npz")
        assert run(controlnet, ["sample", *argv, set_file, "--steps", "2", "--out", out]) == 0
        data = fairdiff.load_set(out)
        data["name"] = np.array([name.rpartition("-")[0] for name in data["name"].tolist()])
        names = data["name"].tolist()
        own = phantom["race"] == "White" if name == "e" else phantom["race"] != ""      # a model of one group
        row = [names.index(name) for name in phantom["name"][own]]
        assert len(names) == own.sum()
        assert all(np.array_equal(data[key][row], phantom[key][own]) for key in ("mask", "name", "race"))
        images[name] = data["image"]
    assert np.array_equal(images["a"], images["b"])
    assert len({images[name].tobytes() for name in "acde"}) == 4
    assert len(np.unique(images["a"], axis=0)) == 60                    # each has noise of its own
    sets, out = [f"control={tmp_path}/a.npz", f"copy={set_file}"], tmp_path / "table1.csv"
    assert run(controlnet, ["evaluate", judge, set_file, set_file, *sets, "--out", str(out)]) == 0
    table = csv.DictReader(out.read_text().splitlines())
    memorised = {row["images"]: float(row["memorised"]) for row in table}
    assert list(memorised) == ["real", "control", "copy"] and memorised["control"] < memorised["copy"] == 1

def test_killed_and_continued_equals_unbroken(set_file, tmp_path, monkeypatch):
    """Base and ControlNet, interrupted after a checkpoint and run again, end bit for bit as without the break."""
    argv = ["train-base", set_file, "--width", "8", "--batch", "4"]
    base = break_and_continue(controlnet, argv, DDPM, "loss", tmp_path / "base", monkeypatch)
    argv = ["train-control", set_file, base, "--batch", "4"]
    break_and_continue(controlnet, argv, DDPM, "loss", tmp_path / "control", monkeypatch)

def test_sides_that_do_not_fit(tmp_path, capsys):
    """36 px cannot be halved three times: exit code 2 and one line."""
    fairdiff.save_set(tmp_path / "set.npz", fairdiff.make_phantom(4, 36, seed=0))
    assert run(controlnet, ["train-base", str(tmp_path / "set.npz"), *TRAIN, str(tmp_path / "base.pt")]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "36" in line and "divisible by 8" in line
