"""transunet.py: the published size, the loss, augmentation, the methods, overfitting, resuming."""
import numpy as np
import pytest
import torch
from scipy import ndimage

import fairdiff
import transunet
from transunet import (
    Fair,
    Reverse,
    TransUNet,
    adversary_loss,
    augment,
    fairseg_loss,
    groupdro_loss,
    image_loss,
    method_weights,
    seg_loss,
)


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


def test_image_loss_is_the_loss_of_each_image_alone():
    """What the fair methods compare: seg_loss of batches of one."""
    logits, mask = torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6))
    alone = torch.stack([seg_loss(logits[i:i + 1], mask[i:i + 1]) for i in range(4)])
    assert torch.allclose(image_loss(logits, mask), alone, atol=1e-6)


def test_groupdro_by_hand():
    """Groups 0 and 1 are there, 2 is absent, the last image unknown: q_2 stays, q_0 + q_1 stays, worse weighs more."""
    losses, group = torch.tensor([0.1, 0.5, 0.8, 0.9], requires_grad=True), torch.tensor([0, 0, 1, -1])
    loss, q = groupdro_loss(losses, group, torch.tensor([0.2, 0.3, 0.5]), rate=2.0)
    a, b = 0.2 * np.exp(2 * 0.3), 0.3 * np.exp(2 * 0.8)
    assert loss.item() == pytest.approx((3 * (a * 0.3 + b * 0.8) / (a + b) + 0.9) / 4)
    assert q.tolist() == pytest.approx([0.5 * a / (a + b), 0.5 * b / (a + b), 0.5]) and not q.requires_grad
    loss.backward()
    assert losses.grad.tolist() == pytest.approx([3 / 8 * a / (a + b)] * 2 + [3 / 4 * b / (a + b), 0.25])
    loss, q = groupdro_loss(losses, torch.full((4,), -1), torch.tensor([0.2, 0.3, 0.5]), rate=2.0)
    assert loss.item() == pytest.approx(losses.mean().item()) and q.tolist() == pytest.approx([0.2, 0.3, 0.5])


@pytest.mark.parametrize("group", [[0, 0, 1, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [2, 0, 1, 1]])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_fairseg_against_a_loop(group, gamma):
    """Scale, Dice and cross-entropy of four images of three pixels summed up one by one, with absent and unknown."""
    p = np.random.default_rng(0).dirichlet(np.ones(3), (4, 3))          # (B, pixels, K)
    mask = np.array([[0, 1, 2], [0, 0, 2], [1, 1, 1], [2, 0, 1]])
    true = np.eye(3)[mask]

    def dice_loss(p, true):
        return 1 - (2 * (p * true).sum() + 1e-5) / ((p ** 2).sum() + true.sum() + 1e-5)

    each = [np.mean([dice_loss(p[i, :, k], true[i, :, k]) for k in range(3)]) for i in range(4)]
    error = {g: np.mean([e for e, h in zip(each, group, strict=True) if h == g]) for g in set(group) if g >= 0}
    scale = [np.tanh((min(error.values()) / error[g]) ** gamma) if g >= 0 else np.tanh(1) for g in group]
    small = p * np.array(scale)[:, None, None]
    want = 0.5 * np.mean([dice_loss(small[..., k], true[..., k]) for k in range(3)]) - 0.5 * np.log(p[true == 1]).mean()
    logits = torch.tensor(np.log(p)).movedim(-1, 1)[:, :, None].float().requires_grad_()              # (B, K, 1, 3)
    loss = fairseg_loss(logits, torch.tensor(mask)[:, None], torch.tensor(group), 3, gamma)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad.abs().sum((1, 2, 3)) > 0).all()    # nobody is scaled to 0


def test_adversary_by_hand():
    """Weighted cross-entropy over the known, the unknown count 0; the reversal turns the encoder's gradient alone."""
    guess, group = torch.tensor([[2.0, 0, 1], [0, 1, 0], [5, 0, 0]]).log_softmax(1), torch.tensor([0, 2, -1])
    loss = adversary_loss(guess, group, torch.tensor([1.5, 9, 0.5]))
    assert loss.item() == pytest.approx(-(1.5 * guess[0, 0] + 0.5 * guess[1, 2]).item() / 3)
    assert adversary_loss(guess, torch.full((3,), -1), torch.ones(3)) == 0
    x, w = torch.tensor([1.0, 2], requires_grad=True), torch.tensor([3.0, 4], requires_grad=True)
    (Reverse.apply(x, 0.5) * w).sum().backward()
    assert x.grad.tolist() == [-1.5, -2] and w.grad.tolist() == [1, 2]


def test_state_of_a_fair_method():
    """A group nobody belongs to has no weight; balanced accuracy is the mean recall of the groups seen so far."""
    fair = Fair("adv", torch.tensor([10, 0, 30]), dim=4)
    assert fair.q.tolist() == [0.5, 0, 0.5] and fair.weight[[0, 2]].tolist() == pytest.approx([2, 2 / 3])
    guess = torch.eye(3)[[0, 2, 0, 2, 1]]
    assert fair.watch(guess, torch.tensor([0, 0, 2, 2, -1])).item() == pytest.approx(0.5)
    assert fair.watch(guess[:2], torch.tensor([0, 2])).item() > 0.6      # both right


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


def test_validation_is_not_trained_on_as_a_copy(phantom):
    """Of a set with repeated images, as mix writes, no held-out patient is trained on; each is held out once."""
    rare = fairdiff.take(phantom, np.r_[np.flatnonzero(phantom["race"] == 0)[:4], np.flatnonzero(phantom["race"] > 0)])
    mixed = fairdiff.equal_scale(rare, fairdiff.take(rare, slice(0, 0)), "race", share=0.0)
    rows, held = transunet.split_validation(mixed, "race", 0.5, seed=0)
    patients = [{n.split("+")[0] for n in mixed["name"][part]} for part in (rows, held)]
    assert not patients[0] & patients[1] and len(patients[1]) == len(held)
    assert (mixed["race"][held] == 0).sum() == 2 and patients[0] | patients[1] == {n.split("+")[0] for n in mixed["name"]}


@pytest.mark.parametrize("width", [8, 24, 40, 56, 72])
def test_every_width_that_is_accepted_works(width):
    """Channels that 32 does not divide get fewer groups, not an error."""
    assert TransUNet(width=width)(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)


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


def train(set_file, out, steps, monkeypatch=None, kill_at=None, method="plain"):
    """Run the command; with kill_at the process 'dies' in that step, after the checkpoint of an earlier one."""
    argv = ["train", set_file, "--out", str(out), "--steps", str(steps), "--batch", "4", "--width", "8", "--seed", "3",
            "--method", method]
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


@pytest.mark.parametrize("method", transunet.METHODS)
def test_killed_and_resumed_equals_unbroken(phantom, tmp_path, monkeypatch, capsys, method):
    """Interrupted after a checkpoint and run again, training ends bit for bit where it would have ended: weights
    and what the method remembers. Half of the patients are of unknown race, nobody is White."""
    race = np.where(phantom["race"] == 2, -1, phantom["race"])
    race[::2] = -1
    set_file = str(tmp_path / "set.npz")
    fairdiff.save_set(set_file, phantom | {"race": race})
    monkeypatch.setattr(transunet, "SAVE_EVERY", 4)
    assert train(set_file, tmp_path / "a.pt", 10, method=method) == 0
    assert ("balanced accuracy" in capsys.readouterr().out) == (method == "adv")
    assert train(set_file, tmp_path / "b.pt", 10, monkeypatch, 6, method) == 130
    assert fairdiff.load_checkpoint(tmp_path / "b.pt")["step"] == 4
    assert train(set_file, tmp_path / "b.pt", 10, method=method) == 0
    a, b = (fairdiff.load_checkpoint(tmp_path / n) for n in ("a.pt", "b.pt"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    out = tmp_path / "pred.npz"                                         # the adversary is no part of the segmenter
    assert transunet.main(["predict", str(tmp_path / "a.pt"), set_file, "--out", str(out)]) == 0


def test_the_seed_draws_every_step(set_file, tmp_path, monkeypatch):
    """Batches differ between seeds and steps: a torch generator on a CPU forgets what stands above 32 bits."""
    drawn, real = [], transunet.draw_batch
    monkeypatch.setattr(transunet, "draw_batch", lambda *a: drawn.append(real(*a)) or drawn[-1])
    for seed in ("0", "1"):
        assert transunet.main(["train", set_file, "--out", str(tmp_path / seed), "--steps", "3", "--width", "8", "--seed", seed]) == 0
    assert len({tuple(batch.tolist()) for batch in drawn}) == 6


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


@pytest.mark.parametrize("grid", [2, 4, 6])
def test_positions_on_another_grid(tmp_path, grid):
    """Interpolated when the file is read or in each forward is the same; corners stay corners, as in ndimage.zoom."""
    file, _ = google_names(TransUNet(width=8))
    np.savez(tmp_path / "vit.npz", **file)
    nets = [TransUNet(width=8, grid=g).eval() for g in (4, grid)]
    nets[1].load_state_dict({k: v for k, v in nets[0].state_dict().items() if k != "position"}, strict=False)
    for net in nets:
        net.load_npz(tmp_path / "vit.npz")
    x = torch.rand(1, 1, 16 * grid, 16 * grid)
    assert torch.allclose(*(net(x) for net in nets), atol=1e-5)
    there = file["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(4, 4, 128)
    zoomed = ndimage.zoom(there, (grid / 4, grid / 4, 1), order=1)      # what the original does
    assert np.allclose(nets[1].position[0].detach().permute(1, 2, 0), zoomed, atol=1e-5)


@pytest.mark.parametrize("key, shape", [("conv_root/kernel", (7, 7, 3, 9)), ("embedding/bias", (5,)), (None, None)])
def test_load_npz_refuses_other_files(tmp_path, key, shape):
    """A wrong shape, or no file at all, is one line that names file and key."""
    net = TransUNet(width=8)
    file, _ = google_names(net)
    if key:
        np.savez(tmp_path / "vit.npz", **file | {key: np.zeros(shape, np.float32)})
    with pytest.raises(fairdiff.InputError, match=f"vit.npz: {key or 'not the R50'}"):
        net.load_npz(tmp_path / "vit.npz")
