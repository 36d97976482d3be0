"""controlnet.py: Eq. 5 at initialisation and at the first steps, shapes, resuming, agreement."""
import copy
import csv

import numpy as np
import pytest
import torch

import controlnet
import fairdiff
import transunet
from controlnet import ControlNet, UNet
from pointdiff import DDPM


def live(net):
    """A network whose zero-initialised parts are not zero: as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def batch(size=32):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, 1, size, size, generator=g), torch.tensor([10, 900]), torch.tensor([0, -1]),
            torch.randint(3, (2, size, size), generator=g))


@pytest.mark.parametrize("size, patch", [(32, 2), (64, 4), (48, 2)])
def test_unet_shapes(size, patch):
    """Output has the input's shape, also for one image; the group and the step matter."""
    net = live(UNet(3, widths=(8, 16, 24), patch=patch))
    x, t, g, _ = batch(size)
    assert net(x, t, g).shape == x.shape and net(x[:1], t[:1], g[:1]).shape == x[:1].shape
    assert not torch.allclose(net(x, t, g), net(x, t, g + 1)) and not torch.allclose(net(x, t, g), net(x, t - 5, g))


def test_at_initialisation_the_controlnet_is_the_base_bit_for_bit():
    """Eq. 5 with zero convolutions: y_c = y, whatever the mask."""
    base = live(UNet(3, widths=(8, 16)))
    x, t, g, mask = batch()
    assert torch.equal(ControlNet(copy.deepcopy(base))(x, t, g, mask), base(x, t, g))


def test_guidance_moves_away_from_the_base():
    """y_c + w (y_c - y), y the base's own output."""
    base = live(UNet(3, widths=(8, 16)))
    net, (x, t, g, mask) = live(ControlNet(copy.deepcopy(base))), batch()
    net.base.load_state_dict(base.state_dict())
    y, y_c = base(x, t, g), net(x, t, g, mask)
    assert torch.allclose(net(x, t, g, mask, 0.7), y_c + 0.7 * (y_c - y), atol=1e-5) and not torch.allclose(y, y_c)


@pytest.mark.parametrize("lock", [True, False])
def test_zero_convolutions_learn(lock):
    """Step 1 moves only Phi_z2 (and the unlocked decoder); step 2 the hint's Phi_z1 and the copy, too."""
    net = ControlNet(live(UNet(3, widths=(8, 16))), lock)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3)
    x, t, g, mask = batch()

    def moved():
        optimizer.zero_grad()
        (net(x, t, g, mask) - 1).pow(2).mean().backward()
        optimizer.step()
        return {n for n, p in net.named_parameters() if not torch.equal(p, start[n])}
    decoder = {n for n in start if n.startswith("decoder")}
    first = moved()
    assert {n for n in start if n.startswith("z2")} <= first
    assert first <= {n for n in start if n.startswith("z2")} | (set() if lock else decoder)
    second = moved()
    assert any(n.startswith("z1") for n in second) and any(n.startswith("copy") for n in second)
    assert not any(n.startswith("base") for n in second) and (decoder & second == set()) == lock
    moved()
    assert any(n.startswith("hint") for n in moved())


def test_diffusion_trains_on_pixels():
    """The same DDPM, now on images: 30 steps lower the loss on a fixed batch by half."""
    torch.manual_seed(0)
    net, d = UNet(1, widths=(8, 16)), DDPM()
    x = torch.as_tensor(fairdiff.make_phantom(8, 32, 0)["image"])[:, None] / 127.5 - 1
    optimizer, g = torch.optim.Adam(net.parameters(), 3e-3), torch.zeros(8, dtype=torch.long)
    losses = []
    for _ in range(60):
        loss = d.loss(net, x, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])


@pytest.fixture
def trained(set_file, tmp_path):
    """A base and a control checkpoint of two steps each."""
    base, control = str(tmp_path / "base.pt"), str(tmp_path / "control.pt")
    common = ["--steps", "2", "--batch", "4"]
    assert controlnet.main(["train-base", set_file, "--out", base, "--width", "8", *common]) == 0
    assert controlnet.main(["train-control", set_file, base, "--out", control, *common]) == 0
    return base, control


def test_every_batch_and_seed_draws_noise_of_its_own(trained, phantom):
    """100 times the same mask, two full batches: all images differ, those of the second batch from those of the first, and by seed."""
    device = torch.device("cpu")
    mask, code = np.repeat(phantom["mask"][:1], 100, 0), np.zeros(100, np.int64)
    images = [controlnet.sample_images(*controlnet.load_painter(trained[1], "control", device), code, mask, (32, 32), 2, seed, device)
              for seed in (0, 1)]
    assert len(np.unique(np.concatenate(images).reshape(200, -1), axis=0)) == 200


def test_sample_paints_every_mask(set_file, trained, tmp_path, phantom):
    """The same rows come back with images, marked synthetic; the same seed gives the same images."""
    for name in ("a", "b"):
        assert controlnet.main(["sample", trained[1], set_file, "--steps", "2",
                                "--out", str(tmp_path / f"{name}.npz")]) == 0
    a, b = (fairdiff.load_set(tmp_path / f"{n}.npz") for n in "ab")
    assert np.array_equal(a["image"], b["image"]) and a["image"].std() > 0
    assert np.array_equal(a["mask"], phantom["mask"]) and a["synthetic"].all()
    assert a["name"].tolist() == phantom["name"].tolist()


@pytest.mark.parametrize("command", ["train-base", "train-control"])
def test_killed_and_resumed_equals_unbroken(command, set_file, trained, tmp_path, monkeypatch):
    """Interrupted after a checkpoint and run again, training ends bit for bit where it would have ended."""
    argv = [command, set_file] + ([trained[0]] if command == "train-control" else ["--width", "8"])
    argv += ["--steps", "6", "--batch", "4", "--out"]
    monkeypatch.setattr(controlnet, "SAVE_EVERY", 2)
    assert controlnet.main([*argv, str(tmp_path / "whole.pt")]) == 0
    real, calls = DDPM.loss, []

    def dying(*a, **k):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(DDPM, "loss", dying)
    assert controlnet.main([*argv, str(tmp_path / "broken.pt")]) == 130
    monkeypatch.setattr(DDPM, "loss", real)
    assert controlnet.main([*argv, str(tmp_path / "broken.pt")]) == 0
    a, b = (fairdiff.load_checkpoint(tmp_path / n) for n in ("whole.pt", "broken.pt"))
    assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])


def test_agreement_of_real_images_with_themselves_is_one(set_file, tmp_path):
    """The same set as generated and as real: ratio 1 in every group and pooled."""
    judge = str(tmp_path / "judge.pt")
    assert transunet.main(["train", set_file, "--out", judge, "--steps", "150", "--batch", "8", "--width", "8"]) == 0
    assert controlnet.main(["agree", judge, set_file, set_file, "--out", str(tmp_path / "a.csv")]) == 0
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    assert {r["group"] for r in rows} == {"Asian", "Black", "White", "pooled"}
    assert all(float(r["ratio"]) == 1 for r in rows if r["figure"] == "dice" and float(r["real"]) > 0)
    assert {r["figure"] for r in rows} == {"dice", "distance", "missing"}


def test_a_group_that_the_judge_never_finds_stays_in_the_table(set_file, tmp_path, monkeypatch, phantom):
    """Dice 0 and all missing, not left out: else the worst failure would raise what is pooled."""
    truth, rare = phantom["mask"], phantom["race"] == 0
    monkeypatch.setattr(controlnet, "load_segmenter", lambda *a: None)
    read = iter([np.where(rare[:, None, None], 0, truth), truth])       # of the generated images, then of the real ones
    monkeypatch.setattr(controlnet, "segment", lambda *a, **k: next(read))
    assert controlnet.main(["agree", "judge.pt", set_file, set_file, "--out", str(tmp_path / "a.csv")]) == 0
    rows = {(r["group"], r["figure"]): r for r in csv.DictReader(open(tmp_path / "a.csv")) if r["structure"] == "cup"}
    assert float(rows["Asian", "dice"]["generated"]) == 0 and float(rows["Asian", "missing"]["generated"]) == 1
    assert rows["Asian", "distance"]["generated"] == "nan"
    assert float(rows["pooled", "dice"]["ratio"]) == pytest.approx(2 / 3, abs=1e-5)
    assert float(rows["pooled", "distance"]["generated"]) == 0


def test_default_patch_fits_every_size_that_is_promised():
    """Sides divisible by 16 always fit; the sizes of the dial keep 2, 4 and 7."""
    assert [controlnet.default_patch(s, s) for s in (32, 64, 128, 224, 512)] == [2, 2, 4, 7, 16]
    for h in range(16, 400, 16):
        for w in range(16, 400, 48):
            assert h % (4 * controlnet.default_patch(h, w)) == w % (4 * controlnet.default_patch(h, w)) == 0


class Stub(torch.nn.Module):
    """In Inception's place: two numbers an image, and torchscript's calling convention."""

    def forward(self, x, return_features: bool = False):
        y = x.float().mean((1, 3))
        return torch.stack([y.mean(1), y.std(1)], 1)


def test_table_1_knows_copies_and_refuses_to_call_the_judge_fid(set_file, trained, tmp_path, capsys):
    """The training set itself as generated: all memorised and own group; FID is named only with --inception."""
    judge, stub, out = (str(tmp_path / n) for n in ("judge.pt", "stub.pt", "t.csv"))
    assert transunet.main(["train", set_file, "--out", judge, "--steps", "2", "--batch", "4", "--width", "8"]) == 0
    argv = ["quality", judge, *trained, set_file, set_file, set_file, "--steps", "2", "--out", out]
    assert controlnet.main(argv) == 0
    assert "no Frechet (judge)" in capsys.readouterr().out and "FID" not in open(out).read()
    rows = {r["set"]: r for r in csv.DictReader(open(out))}
    assert list(rows) == ["real", "base, no control", "w/o Point-Mask", "w/ Point-Mask"]
    assert float(rows["w/ Point-Mask"]["memorised"]) == 1 > float(rows["base, no control"]["memorised"])
    assert rows["base, no control"]["Dice read"] == "nan" != rows["real"]["Dice read"]
    torch.jit.script(Stub()).save(stub)
    assert controlnet.main([*argv, "--inception", stub]) == 0
    rows = {r["set"]: r for r in csv.DictReader(open(out))}
    assert 0 <= float(rows["real"]["FID"]) < float(rows["base, no control"]["FID"])
    assert controlnet.main([*argv, "--inception", set_file]) == 2 and "TorchScript" in capsys.readouterr().err
    other = str(tmp_path / "other.pt")
    assert controlnet.main(["train-base", set_file, "--out", other, "--width", "8", "--steps", "1", "--batch", "4"]) == 0
    argv[2] = other
    assert controlnet.main(argv) == 2 and "another base" in capsys.readouterr().err


def test_a_reader_along_the_way_changes_nothing(set_file, trained, tmp_path, capsys):
    """With --reader its Dice is in the log, and the weights are those of a training without."""
    judge, read = str(tmp_path / "judge.pt"), str(tmp_path / "read.pt")
    assert transunet.main(["train", set_file, "--out", judge, "--steps", "2", "--batch", "4", "--width", "8"]) == 0
    assert controlnet.main(["train-control", set_file, trained[0], "--steps", "2", "--batch", "4", "--out", read,
                            "--reader", judge]) == 0
    assert "step 2: the reader's Dice" in capsys.readouterr().out
    a, b = (fairdiff.load_checkpoint(p)["ema"] for p in (trained[1], read))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sampling_with_a_reader_keeps_the_better_of_two(set_file, trained, tmp_path, monkeypatch):
    """Of two drawings of a mask, the one whose brighter half is read: here a reader that reads only bright images."""
    judge, one, two = (str(tmp_path / n) for n in ("judge.pt", "one.npz", "two.npz"))
    assert transunet.main(["train", set_file, "--out", judge, "--steps", "2", "--batch", "4", "--width", "8"]) == 0
    mask, seen = fairdiff.load_set(set_file)["mask"], []

    def reads_bright(net, images, *_):
        seen.append(images.copy())
        return mask * (images.mean((1, 2)) > np.median(images.mean((1, 2))))[:, None, None].astype(np.uint8)
    monkeypatch.setattr(controlnet, "segment", reads_bright)
    argv = ["sample", trained[1], set_file, "--steps", "2", "--out"]
    assert controlnet.main([*argv, one]) == 0 and controlnet.main([*argv, two, "--reader", judge]) == 0
    first, second = seen
    bright = [x.mean((1, 2)) > np.median(x.mean((1, 2))) for x in (first, second)]
    kept = np.where((bright[1] & ~bright[0])[:, None, None], second, first)
    assert np.array_equal(fairdiff.load_set(two)["image"], kept) and not np.array_equal(kept, first)
    assert np.array_equal(fairdiff.load_set(one)["image"], first)


@pytest.mark.parametrize("size", [128, 256])
def test_larger_images_run_with_the_same_code(size, tmp_path):
    """Two steps of base and ControlNet and two of the sampler, at 128 and 256 px."""
    path, base, control = (str(tmp_path / n) for n in ("set.npz", "base.pt", "control.pt"))
    fairdiff.save_set(path, fairdiff.make_phantom(4, size, 0, balance="race"))
    common = ["--steps", "2", "--batch", "2"]
    assert controlnet.main(["train-base", path, "--out", base, "--width", "8", *common]) == 0
    assert controlnet.main(["train-control", path, base, "--out", control, *common]) == 0
    assert controlnet.main(["sample", control, path, "--steps", "2", "--out", str(tmp_path / "s.npz")]) == 0
    assert fairdiff.load_set(tmp_path / "s.npz")["image"].shape == (4, size, size)
