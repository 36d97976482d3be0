"""pointdiff.py: the round trip mask -> points -> mask, validity, the PointNet, the DDPM."""
import numpy as np
import pytest
import torch
from PIL import Image

import fairdiff
import pointdiff
from pointdiff import DDPM, PointNet, is_valid, mask_to_points, points_to_mask


def overlap(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def outlines(h, w, n, seed):
    """n label maps (h, w): eccentric, tilted, wavy, mildly concave outlines, star-shaped about their centroid."""
    rng = np.random.default_rng(seed)
    side = min(h, w)
    y, x = np.mgrid[:h, :w] + 0.5
    masks = np.zeros((n, h, w), np.uint8)
    for mask in masks:
        cx, cy = w / 2 + rng.normal(0, 0.05) * side, h / 2 + rng.normal(0, 0.05) * side
        tilt, r = rng.uniform(0, np.pi), rng.uniform(0.17, 0.26) * side
        for label, scale in ((1, 1.0), (2, rng.uniform(0.35, 0.75))):
            u = np.cos(tilt) * (x - cx) + np.sin(tilt) * (y - cy)
            v = np.cos(tilt) * (y - cy) - np.sin(tilt) * (x - cx)
            theta = np.arctan2(v, u)
            wave = 1 + sum(rng.normal(0, 0.06 / k) * np.cos(k * theta + rng.uniform(0, 6)) for k in (2, 3, 4, 5))
            mask[(np.hypot(u * 1.12, v / 1.12) < scale * r * wave) & (mask == label - 1)] = label
    return masks


@pytest.mark.parametrize("h, w", [(64, 64), (64, 100), (128, 128), (300, 200), (512, 512), (1024, 1024)])
def test_round_trip_of_shuffled_points(h, w):
    """Mask -> 512 points -> any order -> mask: mean IoU 0.99 cup, 0.99 disc, 0.98 rim, worst 0.97, 0.98, 0.94."""
    rng, scores = np.random.default_rng(0), []
    for mask in outlines(h, w, 4 if h > 512 else 12, seed=h):
        points = mask_to_points(mask)
        assert points.shape == (512, 3) and points.dtype == np.float32 and is_valid(points)
        assert (points[:, 2] == 1).sum() == 256 and (points[:, 2] == -1).sum() == 256
        back = points_to_mask(rng.permutation(points), (h, w))
        scores.append([overlap(mask == 2, back == 2), overlap(mask > 0, back > 0), overlap(mask == 1, back == 1)])
    assert (np.mean(scores, 0) >= (0.99, 0.99, 0.98)).all() and (np.min(scores, 0) >= (0.97, 0.98, 0.94)).all()


def test_points_have_the_stated_coordinates():
    """A disc of columns 2..5, rows 4..5 in 8 x 16 pixels: its outline runs midway to the neighbours' centres."""
    mask = np.zeros((8, 16), np.uint8)
    mask[4:6, 2:6] = 1
    points = mask_to_points(mask)
    x, y = 2 * (np.arange(16) + 0.5) / 16 - 1, 2 * (np.arange(8) + 0.5) / 8 - 1
    assert np.isclose(points[:, 0].min(), (x[1] + x[2]) / 2) and np.isclose(points[:, 0].max(), (x[5] + x[6]) / 2)
    assert np.isclose(points[:, 1].min(), (y[3] + y[4]) / 2) and np.isclose(points[:, 1].max(), (y[5] + y[6]) / 2)
    assert (points[:, 2] == -1).all()                                   # no cup: all of it is disc
    assert np.array_equal(points_to_mask(points, (8, 16)), mask)


def test_odd_masks():
    """No disc is an error; one pixel, a disc at the border, a cup of one pixel, holes and crumbs all come back."""
    with pytest.raises(ValueError, match="without disc"):
        mask_to_points(np.zeros((16, 16), np.uint8))
    one = np.zeros((16, 16), np.uint8)
    one[3, 4] = 1
    assert np.array_equal(points_to_mask(mask_to_points(one), 16), one)
    yy, xx = np.mgrid[:64, :64]
    border = ((xx - 5) ** 2 + (yy - 30) ** 2 < 400).astype(np.uint8)
    assert overlap(points_to_mask(mask_to_points(border), 64) > 0, border > 0) > 0.98
    clean = ((xx - 30) ** 2 + (yy - 30) ** 2 < 400).astype(np.uint8)
    clean[28, 31] = 2
    dirty = clean.copy()
    dirty[40, 40], dirty[2:4, 60:62] = 0, 1                             # a hole and a crumb
    dirty[60:62, 60:62] = 2                                         # a larger cup outside the disc is one, too
    assert np.array_equal(points_to_mask(mask_to_points(dirty), 64), clean)


def test_cups_at_the_edge_and_of_a_few_pixels():
    """A cup that touches the disc's edge keeps its area within 2 %, one of 3 to 12 pixels within 2 pixels."""
    yy, xx = np.mgrid[:64, :64]
    disc = (xx - 30) ** 2 + (yy - 30) ** 2 < 400
    touching = disc.astype(np.uint8) + (disc & ((xx - 41) ** 2 + (yy - 30) ** 2 < 81))
    back = points_to_mask(mask_to_points(touching), 64)
    assert abs(int((back == 2).sum()) - int((touching == 2).sum())) <= 0.02 * (touching == 2).sum()
    for h, w in ((1, 3), (2, 2), (3, 3), (3, 4)):
        tiny = disc.astype(np.uint8)
        tiny[28:28 + h, 31:31 + w] = 2
        assert abs(int((points_to_mask(mask_to_points(tiny), 64) == 2).sum()) - h * w) <= 2


def test_an_outline_that_is_not_star_shaped_is_read_as_well_as_it_can_be():
    """A disc with a deep bay: one closed outline comes back, most of the area with it."""
    yy, xx = np.mgrid[:64, :64]
    bay = ((xx - 32) ** 2 + (yy - 32) ** 2 < 400) & ~((abs(yy - 32) < 5) & (xx > 30))
    back = points_to_mask(mask_to_points(bay.astype(np.uint8)), 64)
    assert overlap(back > 0, bay) > 0.8
    arc = (abs(np.hypot(xx - 32, yy - 32) - 19) < 1) & (xx < 36)        # its centroid lies outside: a dot is left
    assert mask_to_points(arc.astype(np.uint8)).shape == (512, 3)


def test_noisy_points_give_smooth_outlines():
    """With scatter 0.01 the outline stays within 0.005 of the true circle (noise alone would be 0.01 and more)."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 256)
    xy = 0.4 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.01, (256, 2))
    centre, radius = pointdiff.read_outline(xy)
    assert np.sqrt(np.mean((radius - 0.4) ** 2)) < 0.005
    clean = 0.4 * np.stack([np.cos(angle), np.sin(angle)], 1) * (1 + 0.05 * np.cos(9 * angle))[:, None]
    centre, radius = pointdiff.read_outline(clean)                      # fine detail of clean points stays
    assert 0.04 < (radius.max() - radius.min()) / 2 / 0.4 < 0.06


def test_unreadable_points_are_an_error():
    """Too few points, or none that are finite: ValueError, and not valid."""
    for points in (np.zeros((5, 3)), np.full((512, 3), np.nan)):
        with pytest.raises(ValueError):
            points_to_mask(points, 32)
        assert not is_valid(points)


def test_validity_rejects_noise():
    """Of 100 clouds of pure noise, and of 100 masks with noise 0.2 added, at most 5 % are valid."""
    rng = np.random.default_rng(0)
    assert np.mean([is_valid(rng.normal(size=(512, 3))) for _ in range(100)]) <= 0.05
    clouds = [mask_to_points(m) for m in fairdiff.make_phantom(100, 64, seed=2)["mask"]]
    assert np.mean([is_valid(c) for c in clouds]) == 1
    assert np.mean([is_valid(c + rng.normal(0, 0.2, c.shape)) for c in clouds]) <= 0.05


def test_validity_sees_gaps_and_crossings():
    """A missing eighth of the disc, or a cup that sticks out of it, makes a cloud invalid."""
    cloud = mask_to_points(fairdiff.make_phantom(1, 64, seed=2)["mask"][0])
    disc = cloud[cloud[:, 2] < 0]
    angle = np.arctan2(*(disc[:, :2] - disc[:, :2].mean(0)).T)
    assert not is_valid(np.concatenate([cloud[cloud[:, 2] > 0], disc[np.abs(angle) > np.pi / 8]]))
    moved = cloud.copy()
    moved[moved[:, 2] > 0, 0] += 0.4
    assert is_valid(cloud) and not is_valid(moved)


def live(net):
    """A network whose zero-initialised parts are not zero, so that it can be wrong."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net.eval()


def test_pointnet_is_permutation_equivariant():
    """Permuting the points permutes the output; t, the group and the other points all matter."""
    net = live(PointNet(3, width=32, depth=2))
    x, t, g = torch.randn(2, 50, 3), torch.tensor([3, 700]), torch.tensor([0, -1])
    order = torch.randperm(50)
    y = net(x, t, g)
    assert torch.allclose(net(x[:, order], t, g), y[:, order], atol=1e-5)
    assert not torch.allclose(net(x, t + 100, g), y) and not torch.allclose(net(x, t, g + 1), y)
    changed = x.clone()
    changed[:, 0] += 5
    assert not torch.allclose(net(changed, t, g)[:, 1:], y[:, 1:], atol=1e-4)


def test_shape_codes_do_not_depend_on_the_order_of_points():
    """encode sees a set."""
    net, x = PointNet(3), torch.randn(2, 50, 3)
    for a, b in zip(net.encode(x), net.encode(x[:, torch.randperm(50)]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_prior_draws_codes_with_the_moments_of_its_group():
    """20,000 draws of a group of many clouds have its codes' moments (truncated), a group of none everybody's."""
    torch.manual_seed(0)
    net = PointNet(3, latent=4)
    group = torch.arange(3000) % 2
    x = torch.randn(3000, 16, 3) * (1 + group[:, None, None])
    net.fit_prior(x, group)
    mean, variance = (m.detach() for m in net.encode(x))
    generator = torch.Generator().manual_seed(0)
    for g, of in ((0, group == 0), (1, group == 1), (2, group >= 0), (-1, group >= 0)):
        drawn = net.draw_shape(torch.full((20000,), g), generator)
        cov = torch.cov(mean[of].T) + torch.diag(variance.mean(0))
        assert torch.allclose(drawn.mean(0), mean[of].mean(0), atol=0.05)       # 5 standard errors
        assert torch.allclose(torch.cov(drawn.T), pointdiff.SPREAD ** 2 * cov, atol=0.06)


def test_scores_see_copies_shifts_and_lost_spread():
    """Copies of training masks are all memorised, real masks score like the reference, moved ones do not."""
    known, a, b, c = (fairdiff.make_phantom(60, 64, seed=s)["mask"] for s in range(4))
    fresh = {name: (x, y) for name, x, y in pointdiff.compare_masks(c, known, a, b)}
    assert fresh["memorised"][0] < 0.2 and abs(fresh["1-NNA"][0] - fresh["1-NNA"][1]) < 0.25
    copied = {name: (x, y) for name, x, y in pointdiff.compare_masks(known, known, a, b)}
    assert copied["memorised"][0] == 1 and copied["area, KS"][0] == copied["area, KS"][1]
    moved = {name: (x, y) for name, x, y in pointdiff.compare_masks(np.roll(c[:1].repeat(60, 0), 12, 2), known, a, b)}
    assert moved["centre x, shift in sd"][0] > 2 and moved["area, spread"][0] < 0.01 and moved["1-NNA"][0] > 0.95


def test_null_group_is_not_the_last_group():
    """Group -1 has an embedding of its own."""
    net = live(PointNet(3, width=32, depth=1))
    x, t = torch.randn(1, 20, 3), torch.tensor([5])
    out = [net(x, t, torch.tensor([g])) for g in (-1, 0, 1, 2)]
    assert all(not torch.allclose(out[0], o) for o in out[1:])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_ends(schedule):
    """Almost no noise at t = 0, almost no signal at t = T - 1, falling in between."""
    a = DDPM(1000, schedule=schedule).alpha_bar
    assert a[0] > 0.999 and 0 < a[-1] < 1e-4 and (a.diff() < 0).all()


def test_noise_at_both_ends():
    """x_0 is nearly the data and x_{T-1} nearly the noise."""
    d, x0, eps = DDPM(), torch.randn(4, 7, 3), torch.randn(4, 7, 3)
    assert torch.allclose(d.noise(x0, torch.zeros(4, dtype=torch.long), eps), x0, atol=0.05)
    assert torch.allclose(d.noise(x0, torch.full((4,), 999), eps), eps, atol=0.02)


@pytest.mark.parametrize("predict", ["v", "eps"])
@pytest.mark.parametrize("steps, eta", [(1, 0.0), (10, 0.0), (50, 1.0), (5000, 0.0)])
def test_analytic_noise_drives_the_sampler_back_to_x0(predict, steps, eta):
    """A network that knows x0 and answers with the exact target makes the sampler return x0."""
    d = DDPM(predict=predict)
    x0 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    def oracle(x, t):
        signal, sigma = d._levels(t, x)
        eps = (x - signal * x0) / sigma
        return eps if predict == "eps" else signal * eps - sigma * x0
    out = d.sample(oracle, (2, 5, 3), steps=steps, eta=eta, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(out, x0, atol=0.02 if predict == "eps" else 2e-3)


def test_score_prints_every_group_and_the_curve_over_sampler_steps(tmp_path, capsys, monkeypatch):
    """Real clouds in the sampler's place score as real ones: all valid, and every figure is in print and CSV."""
    for seed, path in ((0, "train"), (1, "test")):
        fairdiff.save_set(tmp_path / f"{path}.npz", fairdiff.make_phantom(60, 64, seed, balance="race"))
    clouds = np.stack([mask_to_points(m) for m in fairdiff.make_phantom(60, 64, 2)["mask"]])
    monkeypatch.setattr(pointdiff, "sample_clouds", lambda *a, frames=None, first=0: (
        frames.extend([clouds, clouds]) if frames is not None else None, clouds[:a[4]])[1])
    monkeypatch.setattr(pointdiff, "load_points", lambda *a: (
        None, None, {"attribute": "race", "group": None, "image": [64, 64], "groups": ["Asian", "Black", "White"]}))
    out = tmp_path / "score.csv"
    assert pointdiff.main(["score", "x", *(f"{tmp_path}/{p}.npz" for p in ("train", "test")), "--steps", "8", "16",
                           "--out", str(out)]) == 0
    printed, rows = capsys.readouterr().out, out.read_text().splitlines()
    assert "Asian 10, Black 10, White 10" in printed and "8 steps" in printed and "16 steps" in printed
    figures = {r.split(",", 3)[3].rsplit(",", 2)[0].strip('"') for r in rows[1:]}
    assert len(rows) == 1 + 2 * 3 * len(figures) and all(f in printed for f in figures)
    assert [r.split(",")[4] for r in rows if ",valid," in r] == ["1.0"] * 6
    with Image.open(f"{out}.png") as picture:
        assert picture.size == (90 + 13 * 130, 16 + 3 * 130)


def test_loss_is_zero_for_the_oracle_and_draws_both_ends():
    """The exact target has loss 0; over many draws both t = 0 and t = T - 1 occur (missed by chance: e^-20)."""
    d, seen = DDPM(T=50), set()
    x0 = torch.randn(1000, 4)

    def oracle(x, t):
        seen.update(t.tolist())
        signal, sigma = d._levels(t, x)
        return signal * (x - signal * x0) / sigma - sigma * x0
    assert d.loss(oracle, x0) < 1e-6 and {0, 49} <= seen
    assert d.loss(lambda x, t: torch.zeros_like(x), x0) > 0.5


def test_sampling_depends_on_the_generator_alone():
    """The same generator seed gives the same clouds, another seed others."""
    net, d = live(PointNet(2, width=16, depth=1)), DDPM()
    draw = [d.sample(net, (2, 9, 3), torch.tensor([0, 1]), steps=4, generator=torch.Generator().manual_seed(s))
            for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_model_for_each_group(set_file, tmp_path, monkeypatch, capsys):
    """As in the paper: each draws its own group, whatever else it is asked for is refused; so is half a training."""
    monkeypatch.chdir(tmp_path)
    for group in ("Asian", "White"):
        assert pointdiff.main(["train", set_file, "--group", group, "--out", f"{group}.pt", "--width", "16", "--lr", "1e-2",
                               "--steps", "90", "--points", "64"]) == 0
    draw = ["--n", "3", "--steps", "4", "--rough"]
    assert pointdiff.main(["sample", "White.pt", "Asian.pt", *draw]) == 0
    assert fairdiff.load_set("masks.npz")["race"].tolist() == [0] * 3 + [2] * 3
    (tmp_path / "masks.npz").unlink()
    state = fairdiff.load_checkpoint("Asian.pt")
    fairdiff.save_checkpoint("half.pt", **state | {"step": 45})
    capsys.readouterr()
    for argv, why in ((["Asian.pt", "--group", "White"], "trained on Asian alone"), (["half.pt"], "45 of 90 steps"),
                      (["Asian.pt", "White.pt", "Asian.pt"], "one checkpoint a group")):
        assert pointdiff.main(["sample", *argv, *draw]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert why in line and not (tmp_path / "masks.npz").exists()


def test_every_batch_group_and_seed_draws_noise_of_its_own():
    """Two full batches, two groups, two seeds: no cloud comes twice; the later ones are drawn alone as well."""
    net, config = PointNet(2, width=16).eval(), {"mean": [0, 0, 0], "std": [1, 1, 1]}
    draw = [pointdiff.sample_clouds(net, DDPM(), config, g, 200, 2, seed) for g in (0, 1) for seed in (0, 1)]
    assert len(np.unique(np.concatenate(draw)[:, 0], axis=0)) == 800
    later = pointdiff.sample_clouds(net, DDPM(), config, 0, 100, 2, 0, first=100)
    assert np.allclose(later, draw[0][100:], atol=1e-5)
