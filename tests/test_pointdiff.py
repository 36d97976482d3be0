"""pointdiff.py: masks to points and back, validity, the PointNet, the DDPM, the commands."""
import csv

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

@pytest.mark.parametrize("flaw", ["hairs", "notch"])
def test_a_flaw_of_the_outline_costs_no_more_than_itself(flaw):
    """A comb of hairs on the disc's edge, or a notch in it, moves no other part of the outline."""
    y, x = np.mgrid[:512, :512]
    radius = np.hypot(x - 256, y - 256)
    mask = (radius < 120).astype(np.uint8) + (radius < 60)
    hairs = (radius >= 120) & (radius < 130) & (x > 256) & (abs(y - 256) < 60) & (y % 4 == 0)
    notch = (abs(y - 255.5) < 5) & (x >= 336)
    mask = np.where(hairs, 1, mask) if flaw == "hairs" else np.where(notch, 0, mask)
    _, disc, rim = round_trip(mask)
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

each_ddpm = pytest.mark.parametrize("ddpm", [DDPM(1000, p, s) for p in ("v", "eps") for s in ("cosine", "linear")])

def perfect_net(ddpm, mean, variance):
    """The best possible network for data that are normal around `mean` with a variance; 0: the data are `mean`."""
    def net(x, t):
        alpha_bar = ddpm.alpha_bar[t].view(-1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = mean + alpha * variance / (alpha_bar * variance + sigma ** 2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        return eps if ddpm.predict == "eps" else alpha * eps - sigma * x0
    return net

@each_ddpm
def test_a_perfect_network_samples_the_data(ddpm):
    """One that knows x_0 has loss 0 and leads there; the best one for N(1, 0.5^2) samples it within 0.02."""
    x0, generator = torch.linspace(-2, 2, 320).view(64, 5), torch.Generator().manual_seed(0)
    net = perfect_net(ddpm, x0, 0.0)
    assert ddpm.loss(net, x0) < 1e-5 < 0.1 < ddpm.loss(lambda x, t: 0 * x, x0)
    for steps in (1, 10, 2000):
        assert torch.allclose(ddpm.sample(net, x0.shape, steps=steps, generator=generator), x0, atol=0.02)
    x = ddpm.sample(perfect_net(ddpm, 1.0, 0.25), (20000, 1), steps=1000, generator=generator)
    assert x.mean().item() == pytest.approx(1, abs=0.02) and x.std().item() == pytest.approx(0.5, abs=0.02)

@each_ddpm
def test_noise_has_the_stated_variance(ddpm):
    """alpha_bar falls within (0, 1), from almost no noise to almost no signal; x_t has that mean and variance."""
    a, eps = ddpm.alpha_bar, torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    assert 1 > a[0] > 0.999 and 0 < a[-1] < 1e-4 and (a.diff() < 0).all()
    for t in (0, 300, 999):
        x = ddpm.noise(torch.full((20000, 1), 2.0), torch.full((20000,), t), eps)
        assert x.mean().item() == pytest.approx(2 * a[t].sqrt().item(), abs=0.04)   # 5 standard errors
        assert x.var().item() == pytest.approx(1 - a[t].item(), rel=0.05, abs=1e-6)

def break_and_continue(module, argv, owner, name, tmp_path, monkeypatch):
    """Train unbroken; then with Ctrl-C in step 6, a call of owner.name, and again: the same bits. Returns a path."""
    whole, broken = str(tmp_path / "whole.pt"), str(tmp_path / "broken.pt")
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == 8 + 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(fairdiff, "SAVE_EVERY", 4)
    monkeypatch.setattr(owner, name, interrupted)
    codes = [run(module, [*argv, "--steps", "8", "--out", path]) for path in (whole, broken, broken)]
    assert codes == [0, 130, 0] and len(calls) == 8 + 6 + 4             # it goes on after step 4
    a, b = map(fairdiff.load_checkpoint, (whole, broken))
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])
    return broken

TRAIN = ["--batch", "4", "--width", "8", "--points", "64"]

def test_killed_and_continued_equals_unbroken(set_file, tmp_path, monkeypatch, capsys):
    """Interrupted after a checkpoint and run again, training ends bit for bit as without; other settings: exit 2."""
    argv = ["train", set_file, *TRAIN]
    path = break_and_continue(pointdiff, argv, DDPM, "loss", tmp_path, monkeypatch)
    assert run(pointdiff, [*argv, "--steps", "8", "--out", path, "--lr", "0.5"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "lr" in line and "0.002" in line and "0.5" in line

def test_sample_writes_a_set_of_masks(set_file, tmp_path, capsys):
    """n masks of every group, or of one, with its name; clouds of a model that knows nothing are refused."""
    points, out = str(tmp_path / "points.pt"), str(tmp_path / "masks.npz")
    assert run(pointdiff, ["train", set_file, *TRAIN, "--steps", "2", "--out", points]) == 0
    draw = ["sample", points, "--steps", "3", "--n", "5", "--out", out]
    assert run(pointdiff, draw) == 2 and not (tmp_path / "masks.npz").exists()
    assert "valid" in capsys.readouterr().err.splitlines()[-1]
    for argv, groups, n, side in (([], ["Asian", "Black", "White"], 5, 32),
                                  (["--group", "Black", "--size", "48", "--n", "200"], ["Black"], 200, 48)):
        assert run(pointdiff, [*draw, "--keep-invalid", *argv]) == 0
        data = fairdiff.load_set(out)
        assert data["race"].tolist() == [name for name in groups for _ in range(n)]
        assert data["synthetic"].all() and not data["image"].any()
        assert np.unique(data["mask"], axis=0).shape == (n * len(groups), side, side)      # all differ
    assert run(pointdiff, [*draw, "--group", "Nobody"]) == 2
    assert run(pointdiff, ["train", set_file, *TRAIN, "--steps", "2", "--lr", "0.1", "--out", f"{out}.pt"]) == 0
    assert run(pointdiff, [draw[0], f"{out}.pt", *draw[2:], "--keep-invalid", *argv]) == 0
    assert not np.array_equal(fairdiff.load_set(out)["mask"], data["mask"])         # the weights matter

def test_evaluate_compares_masks_group_by_group(set_file, phantom, tmp_path, capsys):
    """Copies of training masks are memorised; groups with too few masks are named and left out."""
    few, out = str(tmp_path / "few.npz"), tmp_path / "masks.csv"
    rows = np.concatenate([np.flatnonzero(phantom["race"] == name)[:n] for name, n in (("Black", 2), ("White", 20))])
    for n, groups in ((22, ["White", "White"]), (2, [])):
        fairdiff.save_set(few, fairdiff.subset(phantom, rows[:n]))
        assert run(pointdiff, ["evaluate", few, set_file, set_file, "--out", str(out)]) == 0
        table = list(csv.DictReader(out.read_text().splitlines()))
        assert [row["group"] for row in table] == groups and all(float(row["memorised"]) == 1 for row in table[:1])
        assert "Black" in capsys.readouterr().out
