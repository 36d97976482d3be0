"""pointdiff.py: masks to points and back, validity, the PointNet, the DDPM, the commands."""
import csv
import os
import pathlib
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import run

import fairdiff
import pointdiff
from fairness import iou
from pointdiff import DDPM, is_valid, mask_to_points, points_to_mask

def round_trip(mask):
    """IoU of cup, disc and rim of a mask (H, W) with what comes back of its shuffled points."""
    points = np.random.default_rng(0).permutation(mask_to_points(mask))
    a, b = mask[None], points_to_mask(points, mask.shape)[None]
    return [iou(a, b, 2)[0], iou(a > 0, b > 0, 1)[0], iou(a, b, 1)[0]]

@pytest.mark.parametrize("size, extra, n", [(64, 0, 20), (64, 40, 20), (128, 0, 12), (224, 0, 8), (512, 0, 5)])
def test_round_trip(size, extra, n):
    """Mask, 512 points in any order, mask: little is lost, also of wide images."""
    masks = fairdiff.make_phantom(n, size, seed=1, balance="race")["mask"]
    scores = [round_trip(np.pad(mask, ((0, 0), (0, extra)))) for mask in masks]
    assert (np.mean(scores, 0) >= (0.995, 0.995, 0.99)).all() and (np.min(scores, 0) >= (0.99, 0.99, 0.98)).all()

def test_a_flaw_of_the_outline_costs_no_more_than_itself():
    """A comb of hairs on the disc's edge, or a notch in it, moves no other part of the outline."""
    y, x = np.mgrid[:512, :512]
    radius = np.hypot(x - 256, y - 256)
    mask = (radius < 120).astype(np.uint8) + (radius < 60)
    hairs = (radius >= 120) & (radius < 130) & (x > 256) & (abs(y - 256) < 60) & (y % 4 == 0)
    notch = (abs(y - 255.5) < 5) & (x >= 336)
    for flawed in (np.where(hairs, 1, mask), np.where(notch, 0, mask)):
        _, disc, rim = round_trip(flawed)
        assert disc >= 0.99 and rim >= 0.985

def test_points_name_their_outline():
    """z is +1 on the cup and -1 on the disc, half each; all -1 without a cup; without a disc there are none."""
    mask = np.zeros((32, 32), np.uint8)
    with pytest.raises(ValueError, match="without disc"):
        mask_to_points(mask)
    mask[8:20, 10:24] = 1
    assert (mask_to_points(mask)[:, 2] == -1).all() and min(round_trip(mask)) > 0.95
    mask[12:16, 14:18] = 2
    z = mask_to_points(mask)[:, 2]
    assert (z == 1).sum() == (z == -1).sum() == 256
    assert points_to_mask(mask_to_points(mask)[:256], 32).max() == 1    # one outline is a disc, whatever its z

def test_validity():
    """Real clouds with a little noise are valid; a gap of 40 degrees, a cup outside or much noise are not."""
    rng = np.random.default_rng(0)
    for mask in fairdiff.make_phantom(20, 64, seed=2)["mask"]:
        cloud = mask_to_points(mask)
        assert is_valid(cloud + rng.normal(0, 0.005, cloud.shape))
        assert not is_valid(cloud + rng.normal(0, 0.1, cloud.shape))
        x, y = (cloud[:, :2] - cloud[256:, :2].mean(0)).T
        assert not is_valid(cloud[(cloud[:, 2] > 0) | (abs(np.arctan2(y, x)) > np.deg2rad(20))])
        assert not is_valid(cloud + 0.3 * (cloud[:, 2:] > 0) * (1, 0, 0))

def test_pointnet_is_permutation_equivariant():
    """Permuting the points permutes the output and leaves the latent code; step, group and code z matter."""
    torch.manual_seed(0)
    net = pointdiff.PointNet(3, width=32, latent=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)                               # nothing starts at zero
    x, t, g, z = torch.randn(2, 50, 3), torch.tensor([3, 700]), torch.tensor([0, -1]), torch.randn(2, 4)
    order, y = torch.randperm(50), net(x, t, g, z)
    assert torch.allclose(net(x[:, order], t, g, z), y[:, order], atol=1e-4)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(net.encode(x), net.encode(x[:, order]), strict=True))
    for other in (net(x, t + 100, g, z), net(x, t, g + 1, z), net(x, t, g, -z)):
        assert ((other - y).abs().amax((1, 2)) > 1e-3).all()

def perfect_net(ddpm, mean, variance):
    """The best possible network for data that are normal around `mean` with a variance; 0: the data are `mean`."""
    def net(x, t):
        alpha_bar = ddpm.alpha_bar[t].view(-1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = mean + alpha * variance / (alpha_bar * variance + sigma ** 2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        return eps if ddpm.predict == "eps" else alpha * eps - sigma * x0
    return net

@pytest.mark.parametrize("predict", ["v", "eps"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_perfect_network_samples_the_data(predict, schedule):
    """alpha_bar falls from 1 to 0; a net that knows x_0 has loss 0 and leads there, the best for N(1, 0.5^2) too."""
    ddpm = DDPM(1000, predict, schedule)
    assert 1 > ddpm.alpha_bar[0] > 0.999 and 0 < ddpm.alpha_bar[-1] < 1e-4 and (ddpm.alpha_bar.diff() < 0).all()
    x0, t, generator = torch.linspace(-2, 2, 320).view(64, 5), 15 * torch.arange(64), torch.Generator().manual_seed(0)
    net = perfect_net(ddpm, x0, 0.0)
    assert ddpm.loss(net, x0, t) < 1e-5 < 0.1 < ddpm.loss(lambda x, t: 0 * x, x0, t)
    for steps in (1, 10, 2000):
        assert torch.allclose(ddpm.sample(net, x0.shape, steps=steps, generator=generator), x0, atol=0.02)
    for eta, steps, error in ((0, 1000, 0.02), (1, 1000, 0.02), (0, 10, 0.04)):     # first order errs by 0.07 in 10
        x = ddpm.sample(perfect_net(ddpm, 1.0, 0.25), (20000, 1), steps=steps, eta=eta, generator=generator)
        assert x.mean().item() == pytest.approx(1, abs=0.02) and x.std().item() == pytest.approx(0.5, abs=error)

def test_steps_of_muon_are_orthogonal():
    """All directions of a matrix move about equally far, however unequal its gradient is."""
    p = torch.nn.Parameter(torch.zeros(40, 16))
    p.grad = torch.randn(40, 16) * torch.logspace(0, 1, 16)
    pointdiff.Muon([p], 1.0).step()
    assert torch.linalg.cond(p) < 2 and (p * p.grad).sum() < 0

def test_sample_writes_a_set_of_masks(here, refused):
    """n masks of every group, or of one, with its name; clouds of a model that knows nothing are refused."""
    argv = ["train", "set.npz", "--width", 8, "--points", 64, "--batch", 4, "--steps", 2]
    for lr in (0.001, 0.1):
        assert run(pointdiff, *argv, "--lr", lr, "--out", f"{lr}.pt") == 0
    refused(pointdiff, "sample", "0.001.pt", "--n", 5, words="valid")
    with mock.patch.object(pointdiff.PointNet, "fit_prior", side_effect=KeyboardInterrupt):
        assert run(pointdiff, *argv, "--out", "cut.pt") == 130 and not os.path.exists("cut.pt")     # no prior: not finished
    refused(pointdiff, "sample", "0.001.pt", "--n", 5, "--group", "Nobody", words="Nobody Asian Black White")
    assert not os.path.exists("masks.npz")
    with mock.patch("builtins.print", side_effect=BrokenPipeError), mock.patch("sys.stdout"):      # a reader that stops
        assert run(pointdiff, "sample", "0.001.pt", "--n", 5, "--keep-invalid") == 1 and os.path.exists("masks.npz")
    sets, black = [], ["--group", "Black", "--size", 48, "--n", 200]
    for argv in (["0.001.pt", "--n", 5], ["0.001.pt", *black], ["0.1.pt", *black]):
        assert run(pointdiff, "sample", *argv, "--steps", 3, "--keep-invalid") == 0
        sets.append(fairdiff.load_set("masks.npz"))
        assert sets[-1]["synthetic"].all() and not sets[-1]["image"].any()
    assert sets[0]["race"].tolist() == ["Asian"] * 5 + ["Black"] * 5 + ["White"] * 5
    assert set(sets[1]["race"]) == {"Black"}
    assert np.unique(sets[0]["mask"], axis=0).shape == (15, 32, 32)     # all differ
    assert np.unique(sets[1]["mask"], axis=0).shape == (200, 48, 48)
    assert not np.array_equal(sets[1]["mask"], sets[2]["mask"])         # the weights matter

def test_evaluate_compares_masks_group_by_group(here, phantom, capsys):
    """Copies of training masks are memorised; groups with too few masks are named and left out."""
    few = np.flatnonzero(phantom["race"] != "Black").tolist() + np.flatnonzero(phantom["race"] == "Black").tolist()[:2]
    fairdiff.save_set("few.npz", fairdiff.subset(phantom, few))
    assert run(pointdiff, "evaluate", "few.npz", "set.npz", "set.npz") == 0
    table = list(csv.DictReader(pathlib.Path("masks.csv").read_text().splitlines()))
    assert [row["group"] for row in table] == ["Asian", "Asian", "White", "White"]
    assert float(table[0]["memorised"]) == 1 and "Black: fewer" in capsys.readouterr().out
