"""tests/experiments/table1.py: the losses on hand-made logits, three steps of each network, and all rows of the table."""
import csv
import pathlib
import sys

import numpy as np
import pytest
import torch
from conftest import run

import fairdiff
import transunet

sys.path.insert(0, str(pathlib.Path(__file__).parent / "experiments"))
import table1  # noqa: E402

def test_losses_of_hand_made_logits():
    """Right answers cost nothing or little, wrong ones more; the generator gains where the discriminator errs."""
    good, bad = [torch.ones(1, 1, 2, 2)], [-torch.ones(1, 1, 2, 2)]
    assert table1.least_squares(good, 1) == 0 and table1.least_squares(bad, 1) == 4
    assert table1.hinge(good, 1) == table1.hinge(bad, -1) == 0 and table1.hinge(bad, 1) == table1.hinge(good, -1) == 2
    mask = torch.tensor([[[0, 0, 0, 1]]])
    logits = torch.zeros(1, 4, 1, 4)
    even = table1.balanced_entropy(logits, mask, mask)
    assert even.item() == pytest.approx(np.log(4))
    logits[0, 1, 0, 3] = 5                                              # the rare pixel counts as much as three others
    half = np.log(np.exp(5) + 3) - 5
    assert table1.balanced_entropy(logits, mask, mask).item() == pytest.approx(np.log(4) / 2 + half / 2, rel=1e-4)

@pytest.mark.parametrize("method", table1.METHODS)
def test_three_steps(phantom, method):
    """Each trains; images have the masks' size and depend on the mask; SPADE and OASIS also on their noise."""
    code, names = fairdiff.group_codes(phantom, "race")
    ema = table1.train(method, phantom, code, len(names), steps=3, batch=4)
    masks = phantom["mask"][:6]
    images = [table1.generate(ema, m, code[:6], 3, seed) for m, seed in ((masks, 0), (masks, 1), (0 * masks, 0))]
    assert images[0].shape == masks.shape and images[0].dtype == np.uint8 and np.ptp(images[0]) > 0
    assert np.array_equal(images[0], images[1]) == (method == "pix2pixHD")
    assert not np.array_equal(images[0], images[2])

def test_noise_joins_the_condition_of_oasis_at_every_layer():
    """With the noise's first layer at zero, images of SPADE no longer depend on it, those of OASIS do."""
    c = table1.condition(torch.zeros(1, 32, 32, dtype=torch.long), torch.tensor([1]), 3)
    for noise_3d in (False, True):
        net = table1.SPADEGenerator(6, 8, noise_3d).eval()
        torch.nn.init.zeros_(net.start.weight)
        assert torch.equal(net(c), net(c)) != noise_3d

def test_the_table_has_all_rows(phantom, tmp_path, monkeypatch):
    """On a folder like that of a run: a row for real images, every GAN and every ControlNet set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "log").mkdir()
    (tmp_path / "log/seconds.txt").write_text("     2 s  base\n     3 s  control-all\n")
    for name in ("data/train", "data/test", "masks-all", "base-alone", "real-masks-all", "synthetic-all"):
        fairdiff.save_set(tmp_path / f"{name}.npz", phantom)
    train = ["train", str(tmp_path / "data/train.npz"), "--steps", "2", "--batch", "4", "--width", "8"]
    assert run(transunet, [*train, "--out", str(tmp_path / "judge-1000.pt")]) == 0
    argv = ["--run", str(tmp_path), "--out", str(tmp_path / "t"), "--steps", "3", "--csv", str(tmp_path / "t.csv")]
    assert table1.main([*argv, "--seeds"]) == 0
    rows = [row["images"] for row in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())]
    assert rows == ["real", "base", "pix2pixHD", "SPADE", "OASIS", "without points", "with points"]
    assert (tmp_path / "t/grid.png").is_file()
