"""tests/experiments/table1.py: the losses on hand-made logits, three steps of each network, all rows of the table."""
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
    """Right answers cost nothing, wrong ones more; cross-entropy is weighted by the inverse share of each label."""
    good, bad = [[torch.ones(1, 1, 2, 2)]], [[-torch.ones(1, 1, 2, 2)]]
    assert table1.least_squares(good, 1) == 0 and table1.least_squares(bad, 1) == 4
    assert table1.hinge(good, 1) == table1.hinge(bad, -1) == 0 and table1.hinge(bad, 1) == table1.hinge(good, -1) == 2
    mask, logits = torch.tensor([[[0, 0, 0, 1]]]), torch.randn(1, 4, 1, 4)
    want = torch.nn.functional.cross_entropy(logits, mask, torch.tensor([4 / 3, 4, 1, 1]))
    assert table1.balanced_entropy(logits, mask, mask).item() == pytest.approx(want.item())

@pytest.mark.parametrize("method", table1.SETTINGS)
def test_three_steps(phantom, method):
    """Images depend on the mask, of SPADE and OASIS also on noise, of OASIS on noise in every layer."""
    code, names = fairdiff.group_codes(phantom, "race")
    ema = table1.train(method, (8, 4e-4), phantom, code, len(names), steps=3, batch=4)
    masks = phantom["mask"][:6]
    image, other = (table1.generate(ema, masks, code[:6], 3, seed) for seed in (0, 1))
    assert np.array_equal(image, other) == (method == "pix2pixHD")
    assert not np.array_equal(image, table1.generate(ema, 0 * masks, code[:6], 3, 0))
    if method != "pix2pixHD":
        torch.nn.init.zeros_(ema.module.start.weight)
        image, other = (table1.generate(ema, masks, code[:6], 3, seed) for seed in (0, 1))
        assert np.array_equal(image, other) == (method == "SPADE")

def test_the_table_has_all_rows(here, phantom):
    """On a folder like that of a run: a row for real images, every GAN and every ControlNet set."""
    for name in ("data/train", "data/test", "masks-all", "base-alone", "real-masks-all", "synthetic-all"):
        fairdiff.save_set(f"{name}.npz", phantom)
    pathlib.Path("log").mkdir()
    pathlib.Path("log/seconds.txt").write_text("     2 s  base\n     3 s  control-all\n")
    assert run(transunet, "train", "set.npz", "--steps", 2, "--width", 8, "--out", "oversample-0.pt") == 0
    table1.main(".", "t", steps=3, csv="t.csv", seeds=[])
    rows = [row["images"] for row in csv.DictReader(pathlib.Path("t.csv").read_text().splitlines())]
    assert rows == ["real", "base", "pix2pixHD", "SPADE", "OASIS", "without points", "with points"]
    assert pathlib.Path("t/grid.png").is_file()
