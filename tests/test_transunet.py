"""transunet.py: the published size and weights, losses against loops, methods, training and prediction."""
import re
import types

import numpy as np
import pytest
import torch
from conftest import run

import fairdiff
import transunet
from fairness import dice
from transunet import TransUNet, seg_loss, soft_dice

def test_size_of_network_and_images():
    """The base has the published 105.28 M parameters; logits have the image's size, which 16 must divide."""
    with torch.device("meta"):
        base = TransUNet.base(3)
    assert round(sum(p.numel() for p in base.parameters()) / 1e6, 2) == 105.28
    net = TransUNet(width=8).eval()
    assert net(torch.rand(1, 1, 80, 112)).shape == (1, 3, 80, 112)
    with pytest.raises(fairdiff.InputError, match="divisible by 16"):
        net(torch.rand(1, 1, 80, 120))

GOOGLE = {                              # our words to those of R50+ViT-B_16.npz
    "stem.root": "conv_root", "stem.gn_root": "gn_root", "stem.blocks.0.0": "block1/unit1",
    "stem.blocks.1.0": "block2/unit1", "stem.blocks.1.1": "block2/unit2", "stem.blocks.2.0": "block3/unit1",
    "downsample": "conv_proj", "embed": "embedding", "position": "Transformer/posembed_input/pos_embedding",
    "blocks.": "Transformer/encoderblock_", "norm1": "LayerNorm_0", "norm2": "LayerNorm_2",
    "norm.": "Transformer/encoder_norm.", "fc1": "MlpBlock_3/Dense_0", "fc2": "MlpBlock_3/Dense_1",
    ".q.": ".attention.query.", ".k.": ".attention.key.", ".v.": ".attention.value.", ".out.": ".attention.out.",
    "attention": "MultiHeadDotProductAttention_1", ".": "/"}

def test_load_npz_fills_stem_and_transformer(here):
    """Google's names and layouts land where they belong; other files are refused."""
    net, filled = (TransUNet(width=8, units=(1, 2, 1)).requires_grad_(False) for _ in range(2))
    file = {}
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p)
        key = name.replace("weight", "kernel" if p.ndim > 1 else "scale")
        for ours, theirs in GOOGLE.items():
            key = key.replace(ours, theirs)
        if name == "position":
            p = torch.nn.functional.pad(p.flatten(2).mT, (0, 0, 1, 0))  # the class token comes first
        elif p.ndim > 1:
            p = p.permute(2, 3, 1, 0) if p.ndim == 4 else p.T           # HWIO, or (in, out)
        if re.search("query|key|value", key):
            p = p.unflatten(-1, (4, 32))                                # four heads of 32
        file[key] = p.numpy()
    np.savez("vit.npz", **file)
    unfilled = filled.load_npz("vit.npz")
    assert {name.split(".")[0] for name in unfilled} == {"bridge", "ups", "head"}
    assert all(torch.equal(filled.get_parameter(name), p) for name, p in net.named_parameters() if name not in unfilled)
    with pytest.raises(fairdiff.InputError, match=r"set\.npz"):
        net.load_npz("set.npz")

def test_seg_loss_of_a_hand_computed_batch():
    """One pixel a class: uniform logits give log 3 and the Dice of each class's sums."""
    mask = torch.tensor([[[0, 1, 2]]])
    error = 1 - (2 / 3 + 1e-5) / (3 / 9 + 1 + 1e-5)
    assert seg_loss(torch.zeros(1, 3, 1, 3), mask).item() == pytest.approx(0.5 * np.log(3) + 0.5 * error)
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
    logits = torch.randn(4, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[0, 1, 2]], [[0, 0, 2]], [[1, 1, 1]], [[2, 0, 1]]])
    p = logits.softmax(1)
    each = [soft_dice(p[i:i + 1], mask[i:i + 1]).mean().item() for i in range(4)]
    error = {g: np.mean([e for e, h in zip(each, group, strict=True) if h == g]) for g in set(group) if g >= 0}
    scale = [np.tanh((min(error.values()) / error[g]) ** gamma) if g >= 0 else np.tanh(1) for g in group]
    scaled = p * torch.tensor(scale).view(4, 1, 1, 1)
    want = (soft_dice(scaled, mask).mean() + torch.nn.functional.cross_entropy(logits, mask)) / 2
    assert transunet.fairseg_loss(logits, mask, torch.tensor(group), 3, gamma).item() == pytest.approx(want.item())

def test_adversary_by_hand():
    """Weighted cross-entropy of the known images, 0 for unknown ones; the reversal turns the gradient around."""
    guess, group = torch.tensor([[2.0, 0, 1], [0, 1, 0], [5, 0, 0]]).log_softmax(1), torch.tensor([0, 2, -1])
    loss = transunet.adversary_loss(guess, group, torch.tensor([1.5, 9, 0.5]))
    assert loss.item() == pytest.approx(-(1.5 * guess[0, 0] + 0.5 * guess[1, 2]).item() / 3)
    net = types.SimpleNamespace(q=torch.ones(2), adversary=torch.nn.Linear(2, 2))
    token, group = torch.tensor([[1.0, 2]], requires_grad=True), torch.tensor([1])
    batch = torch.zeros(1, 3, 4, 4), token, torch.zeros(1, 4, 4, dtype=torch.long), group
    loss = transunet.method_loss(net, "adv", 0.5, 1e9, torch.ones(2), *batch)
    itself = transunet.adversary_loss(net.adversary(token), group, torch.ones(2))
    gradient, direct = (torch.autograd.grad(x, token)[0] for x in (loss, itself))
    assert torch.allclose(gradient, -0.5 * direct) and direct.abs().sum() > 0

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
    """Groups are drawn equally often, unknown images at the mean rate; balanced: also real and synthetic ones."""
    code = np.array([0] + [2] * 3 + [3] * 6 + [-1] * 2)
    synthetic = np.array([True] + [True, False, False] + [True] + [False] * 5 + [False] * 2)
    for method in ("oversample", "groupdro", "balanced"):
        weight = transunet.draw_weights(code, method, synthetic).numpy()
        totals = [weight[code == g].sum() for g in (0, 2, 3, -1)]
        assert np.allclose(totals / weight.mean(), [10 / 3] * 3 + [2])
        shares = [weight[(code == g) & synthetic].sum() / weight[code == g].sum() for g in (0, 2, 3)]
        assert np.allclose(shares, [1, 1 / 2, 1 / 2] if method == "balanced" else [1, 1 / 3, 1 / 6])
    assert len(set(transunet.draw_weights(code, "plain").tolist())) == 1

def test_two_images_are_learnt_by_heart(here):
    """The compact network overfits two images in 150 steps; predict writes its masks and keeps all else."""
    data = fairdiff.make_phantom(2, 32, seed=0)
    fairdiff.save_set("set.npz", data)
    assert run(transunet, "train", "set.npz", "--width", 8, "--batch", 2, "--steps", 150) == 0
    assert run(transunet, "predict", "seg.pt", "set.npz") == 0
    pred = fairdiff.load_set("pred.npz")
    assert [key for key in data if not np.array_equal(pred[key], data[key])] == ["mask"]
    assert min(dice(pred["mask"], data["mask"], label).min() for label in (1, 2)) > 0.9
