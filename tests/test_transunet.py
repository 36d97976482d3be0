"""transunet.py: the published size and weights, losses against loops, methods, training and prediction."""
import re

import numpy as np
import pytest
import torch
from conftest import run
from test_pointdiff import break_and_continue

import fairdiff
import transunet
from fairness import dice
from transunet import TransUNet, seg_loss

def test_size_of_network_and_images():
    """The base has the published 105.28 M parameters; logits have the image's size, which 16 must divide."""
    with torch.device("meta"):
        base = TransUNet.base(3)
    assert round(sum(p.numel() for p in base.parameters()) / 1e6, 2) == 105.28
    net = TransUNet(width=8).eval()
    for h, w in ((32, 32), (64, 48), (80, 112)):
        assert net(torch.rand(1, 1, h, w)).shape == (1, 3, h, w)
        with pytest.raises(fairdiff.InputError, match="divisible by 16"):
            net(torch.rand(1, 1, h, w + 8))

GOOGLE = {                              # our names to those of R50+ViT-B_16.npz
    r"^stem\.root": "conv_root", r"^stem\.": "", "downsample": "conv_proj", "^embed": "embedding",
    "^norm": "Transformer/encoder_norm", "^position": "Transformer/posembed_input/pos_embedding",
    r"^blocks\.(\d)\.": r"Transformer/encoderblock_\1/", "/norm1": "/LayerNorm_0", "/norm2": "/LayerNorm_2",
    "/fc1": "/MlpBlock_3/Dense_0", "/fc2": "/MlpBlock_3/Dense_1", r"/(q|k|v|out)\.": r"/MultiHead_1/\1.",
    "/q": "/query", "/k": "/key", "/v": "/value", "MultiHead": "MultiHeadDotProductAttention",
    r"(gn\w*|_norm|Norm_\d)\.weight": r"\1/scale", r"\.weight": "/kernel", r"\.": "/",
}

def google_file(weights):
    """Weights of stem and transformer under the names and in the layouts of R50+ViT-B_16.npz."""
    file = {}
    for name, a in weights.items():
        key = re.sub(r"blocks\.(\d)\.(\d)\.", lambda m: f"block{int(m[1]) + 1}/unit{int(m[2]) + 1}/", name)
        for ours, theirs in GOOGLE.items():
            key = re.sub(ours, theirs, key)
        if name == "position":                                          # the class token comes first
            a = np.insert(a.reshape(1, 128, 16).transpose(0, 2, 1), 0, 9, axis=1)
        elif a.ndim > 1:                                                # HWIO, or (in, out)
            a = a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
        if re.search("query|key|value|out/kernel", key):                # four heads of 32
            a = a.reshape(4, 32, 128) if "out" in key else a.reshape(*a.shape[:-1], 4, 32)
        file[key] = a
    return file

def test_load_npz_fills_stem_and_transformer(tmp_path):
    """Google's names and layouts land where they belong; other files are refused."""
    net, path, rng = TransUNet(width=8), str(tmp_path / "vit.npz"), np.random.default_rng(0)
    own = dict(net.named_parameters())
    want = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in own.items()
            if not name.startswith(("bridge", "ups", "head"))}
    file = google_file(want)
    np.savez(path, **file)
    assert set(net.load_npz(path)) == set(own) - set(want)
    assert all(np.allclose(own[name].detach(), value, atol=1e-5) for name, value in want.items())
    layer = "Transformer/encoderblock_2/"
    assert {"block3/unit1/gn_proj/bias", "block1/unit1/conv2/kernel", "conv_root/kernel", "gn_root/scale",
            "Transformer/encoder_norm/scale", f"{layer}MultiHeadDotProductAttention_1/query/kernel",
            f"{layer}MlpBlock_3/Dense_1/bias", f"{layer}LayerNorm_2/scale"} <= set(file)
    key = "embedding/bias"
    for other in ({k: v for k, v in file.items() if k != key}, file | {key: np.zeros(5, np.float32)}):
        np.savez(path, **other)
        with pytest.raises(fairdiff.InputError, match=r"vit\.npz"):
            net.load_npz(path)

def test_seg_loss_of_a_hand_computed_batch():
    """One pixel a class: uniform logits give log 3 and the Dice of each class's sums."""
    mask = torch.tensor([[[0, 1, 2]]])
    soft_dice = 1 - (2 / 3 + 1e-5) / (3 / 9 + 1 + 1e-5)
    assert seg_loss(torch.zeros(1, 3, 1, 3), mask).item() == pytest.approx(0.5 * np.log(3) + 0.5 * soft_dice)
    assert seg_loss(50.0 * torch.eye(3).view(1, 3, 1, 3), mask) < 1e-4

def test_groupdro_by_hand():
    """Group 2 is absent, the last image unknown: q_2 and q_0 + q_1 stay, the worse group gains weight."""
    losses, start = torch.tensor([0.1, 0.5, 0.8, 0.9], requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    loss, q = transunet.groupdro_loss(losses, torch.tensor([0, 0, 1, -1]), start, rate=2.0)
    a, b = 0.2 * np.exp(2 * 0.3), 0.3 * np.exp(2 * 0.8)
    assert loss.item() == pytest.approx((3 * (a * 0.3 + b * 0.8) / (a + b) + 0.9) / 4)
    assert q.tolist() == pytest.approx([0.5 * a / (a + b), 0.5 * b / (a + b), 0.5])
    loss.backward()
    assert losses.grad.tolist() == pytest.approx([3 / 8 * a / (a + b)] * 2 + [3 / 4 * b / (a + b), 0.25])
    loss, q = transunet.groupdro_loss(losses, torch.full((4,), -1), start, rate=2.0)
    assert loss.item() == pytest.approx(losses.mean().item()) and torch.equal(q, start)

@pytest.mark.parametrize("group", [[0, 0, 1, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [2, 0, 1, 1]])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_fairseg_against_a_loop(group, gamma):
    """Scale, Dice and cross-entropy of four images of three pixels, with absent groups and unknown images."""
    p = np.random.default_rng(0).dirichlet(np.ones(3), (4, 3))          # (B, pixels, K)
    mask = np.array([[0, 1, 2], [0, 0, 2], [1, 1, 1], [2, 0, 1]])
    true = np.eye(3)[mask]

    def soft_dice(p, true):
        return 1 - (2 * (p * true).sum() + 1e-5) / ((p ** 2).sum() + true.sum() + 1e-5)

    each = [np.mean([soft_dice(p[i, :, k], true[i, :, k]) for k in range(3)]) for i in range(4)]
    error = {g: np.mean([e for e, h in zip(each, group, strict=True) if h == g]) for g in set(group) if g >= 0}
    scale = [np.tanh((min(error.values()) / error[g]) ** gamma) if g >= 0 else np.tanh(1) for g in group]
    scaled = p * np.array(scale)[:, None, None]
    want = np.mean([soft_dice(scaled[..., k], true[..., k]) for k in range(3)]) - np.log(p[true == 1]).mean()
    logits = torch.tensor(np.log(p)).movedim(-1, 1)[:, :, None].float()             # (B, K, 1, 3)
    loss = transunet.fairseg_loss(logits, torch.tensor(mask)[:, None], torch.tensor(group), 3, gamma)
    assert loss.item() == pytest.approx(want / 2, rel=1e-5)

def test_adversary_by_hand():
    """Weighted cross-entropy of the known images, 0 for unknown ones; the reversal turns the gradient around."""
    guess, group = torch.tensor([[2.0, 0, 1], [0, 1, 0], [5, 0, 0]]).log_softmax(1), torch.tensor([0, 2, -1])
    loss = transunet.adversary_loss(guess, group, torch.tensor([1.5, 9, 0.5]))
    assert loss.item() == pytest.approx(-(1.5 * guess[0, 0] + 0.5 * guess[1, 2]).item() / 3)
    net = torch.nn.Module()
    net.q, net.adversary = torch.ones(2), torch.nn.Linear(2, 2)
    logits, mask, group = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), torch.tensor([1])
    grads = []
    for strength in (-1.0, 0.5):                                        # -1: the gradient itself
        token = torch.tensor([[1.0, 2]], requires_grad=True)
        transunet.method_loss(net, "adv", strength, 1e9, torch.ones(2), logits, token, mask, group).backward()
        grads.append(token.grad)
    assert torch.allclose(grads[1], -0.5 * grads[0]) and grads[0].abs().sum() > 0

def test_augment_moves_image_and_mask_together():
    """An image that equals its mask still does, up to interpolated edges; most move and keep their area."""
    torch.manual_seed(0)
    mask = torch.zeros(32, 32, 32, dtype=torch.long)
    mask[:, 6:20, 8:14] = 1
    image, moved = transunet.augment(mask[:, None].float(), mask)
    assert ((image[:, 0] > 0.5) == moved).float().mean() > 0.98
    assert (moved != mask).any((1, 2)).float().mean() > 0.5
    assert (moved.sum((1, 2)) - 84).abs().max() < 12

def test_draw_weights_balance_the_groups():
    """Each group present is drawn equally often, unknown images at the mean rate; balanced: real as often as synthetic
    in a group that has both; plain draws all alike."""
    code = np.array([0] + [2] * 3 + [3] * 6 + [-1] * 2)
    synthetic = np.array([True] + [True, False, False] + [True] + [False] * 5 + [False] * 2)
    for method in ("oversample", "groupdro", "balanced"):
        weight = transunet.draw_weights(code, method, synthetic).numpy()
        totals = [weight[code == g].sum() for g in (0, 2, 3, -1)]
        assert np.allclose(totals / weight.mean(), [10 / 3] * 3 + [2])
        shares = [weight[(code == g) & synthetic].sum() / weight[code == g].sum() for g in (0, 2, 3)]
        assert np.allclose(shares, [1, 1 / 2, 1 / 2] if method == "balanced" else [1, 1 / 3, 1 / 6])
    assert len(set(transunet.draw_weights(code, "plain").tolist())) == 1

def test_overfits_two_images():
    """The compact network learns two images by heart."""
    torch.manual_seed(0)
    data = fairdiff.make_phantom(2, 32, seed=0)
    x, y = torch.as_tensor(data["image"])[:, None] / 255, torch.as_tensor(data["mask"]).long()
    net = TransUNet(width=8)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        seg_loss(net(x), y).backward()
        optimizer.step()
    assert min(dice(net(x).argmax(1), y, label).min() for label in (1, 2)) > 0.9

@pytest.mark.parametrize("method", transunet.METHODS)
def test_killed_and_continued_equals_unbroken(phantom, tmp_path, monkeypatch, method):
    """Of every method, with unknown patients: training ends bit for bit as without the break, and predicts."""
    path, out = str(tmp_path / "set.npz"), str(tmp_path / "pred.npz")
    fairdiff.save_set(path, phantom | {"race": np.where(np.arange(60) % 3 == 0, "", phantom["race"])})
    argv = ["train", path, "--method", method, "--batch", "4", "--width", "8"]
    seg = break_and_continue(transunet, argv, transunet, "augment", tmp_path, monkeypatch)
    assert run(transunet, ["predict", seg, path, "--out", out]) == 0
    pred = fairdiff.load_set(out)
    assert pred["name"].tolist() == phantom["name"].tolist() and np.array_equal(pred["image"], phantom["image"])
    assert not np.array_equal(pred["mask"], phantom["mask"])

@pytest.mark.parametrize("size, disc, codes", [(32, 0, {2}), (16, 1, {0, 2})], ids=["empty masks", "16 px"])
def test_odd_sets_train_or_are_refused(tmp_path, capsys, size, disc, codes):
    """Only empty masks: exit code 2 and one line. The smallest images one by one: that, or they train."""
    data, path = fairdiff.make_phantom(8, size, seed=0), str(tmp_path / "set.npz")
    fairdiff.save_set(path, data | {"mask": disc * data["mask"]})
    code = run(transunet, ["train", path, "--batch", "1", "--steps", "2", "--width", "8", "--out", f"{path}.pt"])
    assert code in codes and len(capsys.readouterr().err.splitlines()) == code / 2
