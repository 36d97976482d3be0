"""transunet.py: the published size, the loss, augmentation, the methods, overfitting, resuming."""
import numpy as np
import pytest
import torch

import fairdiff
import transunet
from transunet import TransUNet, augment, method_weights, seg_loss


def test_base_has_the_published_number_of_parameters():
    """R50-ViT-B/16 with three skips at 3 classes: 105.28 million."""
    with torch.device("meta"):
        net = TransUNet.base(3)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 105.28


@pytest.mark.parametrize("h, w", [(32, 32), (64, 48), (80, 112)])
def test_any_size_divisible_by_16(h, w):
    """Logits have the image's size, also for one image and non-square ones; other sizes are an error."""
    net = TransUNet(width=8).eval()
    assert net(torch.rand(1, 1, h, w)).shape == (1, 3, h, w)
    with pytest.raises(ValueError, match="multiples of 16"):
        net(torch.rand(1, 1, h + 8, w))


def test_loss_against_a_hand_computed_batch():
    """One pixel a class: uniform logits give CE = log 3 and each class's Dice from its sums."""
    mask = torch.tensor([[[0, 1, 2]]])
    p = 1 / 3
    dice = 1 - (2 * p + 1e-5) / (3 * p ** 2 + 1 + 1e-5)
    assert torch.allclose(seg_loss(torch.zeros(1, 3, 1, 3), mask), torch.tensor(0.5 * np.log(3) + 0.5 * dice).float())
    sure = 50.0 * torch.nn.functional.one_hot(mask, 3).movedim(-1, 1).float()
    assert seg_loss(sure, mask) < 1e-4


def test_augment_moves_image_and_mask_together():
    """An image that equals its mask still does after augmentation (up to interpolated edges), and it did move."""
    torch.manual_seed(0)
    mask = torch.zeros(16, 32, 32, dtype=torch.long)
    mask[:, 6:20, 8:14] = 1
    image, moved = augment(mask[:, None].float(), mask)
    assert ((image[:, 0] > 0.5).long() == moved).float().mean() > 0.98
    assert (moved != mask).any((1, 2)).float().mean() > 0.7
    assert (moved.sum((1, 2)) - 84).abs().max() < 12                    # rotations and flips keep areas


def test_oversampling_balances_groups_and_keeps_unknown():
    """Expected draws: equal for the groups present, the unknown at the mean rate."""
    data = {"image": np.zeros((12, 1, 1)), "race": np.array([0, 1, 1, 1] + [2] * 6 + [-1] * 2, np.int8)}
    w = method_weights(data, "race", "oversample").numpy()
    total = [w[data["race"] == g].sum() for g in (0, 1, 2)]
    assert np.allclose(total, 10 / 3) and np.allclose(w[data["race"] == -1], 1)
    assert (method_weights(data, "race", "plain") == 1).all()


def test_validation_is_stratified_and_real(phantom):
    """The held-out share comes from every group, and no synthetic image is in it."""
    data = phantom | {"synthetic": np.arange(60) < 30}
    rows, held = transunet.split_validation(data, "race", 0.2, seed=0)
    assert len(rows) + len(held) == 60 and not set(rows) & set(held) and not data["synthetic"][held].any()
    real = data["race"][30:]
    assert [(data["race"][held] == g).sum() for g in range(3)] == [round(0.2 * (real == g).sum()) for g in range(3)]


def test_overfits_two_images():
    """The compact network learns two images by heart in 60 steps."""
    torch.manual_seed(0)
    data = fairdiff.make_phantom(2, 32, seed=0)
    x, y = torch.as_tensor(data["image"])[:, None] / 255, torch.as_tensor(data["mask"]).long()
    net = TransUNet(width=8, dropout=0)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    first = seg_loss(net(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = seg_loss(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15 * first


def test_every_parameter_gets_a_gradient():
    """Nothing in the network is idle."""
    net = TransUNet(width=8)
    seg_loss(net(torch.rand(2, 1, 32, 32)), torch.randint(3, (2, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if ".k.bias" not in n)


def train(set_file, out, steps, monkeypatch=None, kill_at=None):
    """Run the command; with kill_at the process 'dies' in that step, after the checkpoint of an earlier one."""
    argv = ["train", set_file, "--out", str(out), "--steps", str(steps), "--batch", "4", "--width", "8", "--seed", "3"]
    if kill_at is None:
        return transunet.main(argv)
    real, calls = transunet.augment, []

    def dying(*a):
        calls.append(1)
        if len(calls) > kill_at:
            raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(transunet, "augment", dying)
    code = transunet.main(argv)
    monkeypatch.setattr(transunet, "augment", real)
    return code


def test_killed_and_resumed_equals_unbroken(set_file, tmp_path, monkeypatch):
    """Interrupted after a checkpoint and run again, training ends bit for bit where it would have ended."""
    monkeypatch.setattr(transunet, "SAVE_EVERY", 4)
    assert train(set_file, tmp_path / "a.pt", 10) == 0
    assert train(set_file, tmp_path / "b.pt", 10, monkeypatch, kill_at=6) == 130
    assert fairdiff.load_checkpoint(tmp_path / "b.pt")["step"] == 4
    assert train(set_file, tmp_path / "b.pt", 10) == 0
    a, b = (fairdiff.load_checkpoint(tmp_path / n) for n in ("a.pt", "b.pt"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


def test_checkpoint_of_another_run_is_not_overwritten(set_file, tmp_path, capsys):
    """Another seed on the same file: exit code 2, the difference is named, the file stays."""
    assert train(set_file, tmp_path / "a.pt", 2) == 0
    before = (tmp_path / "a.pt").read_bytes()
    assert transunet.main(["train", set_file, "--out", str(tmp_path / "a.pt"), "--steps", "2", "--batch", "4",
                           "--width", "8", "--seed", "4"]) == 2
    assert "seed 3 -> 4" in capsys.readouterr().err and (tmp_path / "a.pt").read_bytes() == before


def google_names(net):
    """Random arrays under the names and in the layouts of R50+ViT-B_16.npz, and the weights they should give."""
    rng, file, want = np.random.default_rng(0), {}, {}

    def put(name, key, shape, turn):
        file[key] = rng.normal(size=shape).astype(np.float32)
        want[name] = turn(file[key])
    conv = lambda a: a.transpose(3, 2, 0, 1)  # noqa: E731
    put("stem.root.weight", "conv_root/kernel", (7, 7, 3, 8), conv)
    put("embed.weight", "embedding/kernel", (1, 1, 128, 128), conv)
    for i, (cin, cmid) in enumerate(((8, 8), (32, 16), (64, 32))):
        unit = f"block{i + 1}/unit1"
        here = f"stem.blocks.{i}.0."
        for k, shape in (("1", (1, 1, cin, cmid)), ("2", (3, 3, cmid, cmid)), ("3", (1, 1, cmid, 4 * cmid)),
                         ("_proj", (1, 1, cin, 4 * cmid))):
            put(here + ("downsample" if k == "_proj" else f"conv{k}") + ".weight", f"{unit}/conv{k}/kernel", shape, conv)
            for part, theirs in (("weight", "scale"), ("bias", "bias")):
                put(f"{here}gn{k}.{part}", f"{unit}/gn{k}/{theirs}", (1, 1, 1, shape[-1]), np.ravel)
    for i in range(3):
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            key = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/{theirs}"
            put(f"blocks.{i}.{ours}.weight", f"{key}/kernel", (128, 4, 32), lambda a: a.reshape(128, 128).T)
            put(f"blocks.{i}.{ours}.bias", f"{key}/bias", (4, 32), np.ravel)
        key = f"Transformer/encoderblock_{i}/"
        put(f"blocks.{i}.out.weight", f"{key}MultiHeadDotProductAttention_1/out/kernel", (4, 32, 128),
            lambda a: a.reshape(128, 128).T)
        put(f"blocks.{i}.out.bias", f"{key}MultiHeadDotProductAttention_1/out/bias", (128,), np.ravel)
        for fc, cin, cout in ((1, 128, 256), (2, 256, 128)):
            put(f"blocks.{i}.fc{fc}.weight", f"{key}MlpBlock_3/Dense_{fc - 1}/kernel", (cin, cout), np.transpose)
            put(f"blocks.{i}.fc{fc}.bias", f"{key}MlpBlock_3/Dense_{fc - 1}/bias", (cout,), np.ravel)
        for norm, layer in ((1, 0), (2, 2)):
            put(f"blocks.{i}.norm{norm}.weight", f"{key}LayerNorm_{layer}/scale", (128,), np.ravel)
            put(f"blocks.{i}.norm{norm}.bias", f"{key}LayerNorm_{layer}/bias", (128,), np.ravel)
    for ours, theirs, n in (("stem.gn_root", "gn_root", 8), ("norm", "Transformer/encoder_norm", 128)):
        put(f"{ours}.weight", f"{theirs}/scale", (n,), np.ravel)
        put(f"{ours}.bias", f"{theirs}/bias", (n,), np.ravel)
    put("embed.bias", "embedding/bias", (128,), np.ravel)
    put("position", "Transformer/posembed_input/pos_embedding", (1, 1 + 4 * 4, 128),
        lambda a: a[:, 1:].transpose(0, 2, 1).reshape(1, 128, 4, 4))
    return file, want


def test_load_npz_fills_stem_and_transformer(tmp_path):
    """Google's names and layouts land where they belong; what is not filled is the decoder, and is named."""
    net = TransUNet(width=8)
    file, want = google_names(net)
    np.savez(tmp_path / "vit.npz", **file)
    left = net.load_npz(tmp_path / "vit.npz")
    own = dict(net.named_parameters())
    for name, value in want.items():
        assert torch.equal(own[name], torch.as_tensor(value.copy())), name
    assert set(own) == set(left) | set(want) and not set(left) & set(want)
    assert all(n.startswith(("bridge", "ups", "head")) for n in left)
    del file["embedding/bias"]
    np.savez(tmp_path / "vit.npz", **file)
    with pytest.raises(fairdiff.InputError, match="embedding/bias"):
        net.load_npz(tmp_path / "vit.npz")
