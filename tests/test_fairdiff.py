"""fairdiff.py: the dataset file, the phantom, FairSeg files, Equal Scale, checkpoints."""
import numpy as np
import pytest
import torch

import fairdiff
from fairdiff import EMA, InputError


def test_group_codes_at_the_edges():
    """60 is >=60, unknown stays -1, marital status becomes married or not."""
    data = {"age": np.array([59.9, 60, np.nan], np.float32), "maritalstatus": np.array([0, 4, -1], np.int8),
            "race": np.array([2, 0, -1], np.int8)}
    assert fairdiff.group_codes(data, "age")[0].tolist() == [0, 1, -1]
    assert fairdiff.group_codes(data, "maritalstatus")[0].tolist() == [0, 1, -1]
    assert fairdiff.group_codes(data, "race")[0].tolist() == [2, 0, -1]
    with pytest.raises(ValueError, match="height"):
        fairdiff.group_codes(data, "height")


def test_phantom_is_deterministic_and_images_do_not_depend_on_the_set():
    """The same seed gives the same set; image i depends on (seed, i) alone, so a longer set starts alike."""
    a, b = fairdiff.make_phantom(6, 32, seed=3), fairdiff.make_phantom(6, 32, seed=3)
    assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)
    assert not np.array_equal(a["image"], fairdiff.make_phantom(6, 32, seed=4)["image"])
    again = fairdiff.render_phantom(a["mask"][:3], a["race"][:3], seed=3)
    assert np.array_equal(again, a["image"][:3])


def test_phantom_shift_zero_makes_groups_identical():
    """With shift 0 the same mask and seed give the same image whatever the race; with shift 1 they do not."""
    mask = fairdiff.make_phantom(1, 64, seed=1)["mask"]
    same = [fairdiff.render_phantom(mask, [r], seed=5, shift=0.0) for r in (-1, 0, 1, 2)]
    assert all(np.array_equal(same[0], s) for s in same)
    other = [fairdiff.render_phantom(mask, [r], seed=5) for r in (0, 2)]
    assert not np.array_equal(*other)


def test_phantom_masks_are_nested_and_groups_balanced():
    """Each mask has rim and cup, the cup never touches the background, balance is up to one image."""
    data = fairdiff.make_phantom(31, 64, seed=2, balance="race")
    assert np.bincount(data["race"]).tolist() in ([11, 10, 10], [10, 11, 10], [10, 10, 11])
    for m in data["mask"]:
        assert set(np.unique(m)) == {0, 1, 2}
        grown = np.zeros_like(m, bool)
        cup = m == 2
        grown[1:] |= cup[:-1]
        grown[:-1] |= cup[1:]
        grown[:, 1:] |= cup[:, :-1]
        grown[:, :-1] |= cup[:, 1:]
        assert (m[grown] > 0).all()


@pytest.mark.parametrize("size", [31, 513])
def test_phantom_size_limits(size):
    """Sizes outside 32..512 are refused."""
    with pytest.raises(InputError, match="32 to 512"):
        fairdiff.make_phantom(1, size, seed=0)


def test_set_round_trip_fills_what_is_missing(tmp_path):
    """A user's file with image, mask and one attribute becomes a whole set, and survives saving."""
    image = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    np.savez(tmp_path / "user.npz", image=image, mask=image % 3, gender=[0, 1])
    data = fairdiff.load_set(tmp_path / "user.npz")
    assert data["gender"].tolist() == [0, 1] and data["race"].tolist() == [-1, -1]
    assert np.isnan(data["age"]).all() and not data["synthetic"].any() and len(set(data["name"])) == 2
    fairdiff.save_set(tmp_path / "again.npz", data)
    again = fairdiff.load_set(tmp_path / "again.npz")
    assert all(np.array_equal(data[k], again[k], equal_nan=k == "age") for k in data)


@pytest.mark.parametrize("change, what", [
    ({"image": None}, "no array 'image'"), ({"mask": np.zeros((2, 8, 9), np.uint8)}, "but mask"),
    ({"mask": np.full((2, 8, 8), 3, np.uint8)}, "label 3"), ({"race": np.array([0, 5])}, "race"),
    ({"image": np.zeros((2, 8, 8))}, "uint8"), ({"gender": np.array([0])}, "gender"),
    ({"name": np.array(["a", "a"])}, "unique"), ({"name": np.array([object(), 1])}, "readable"),
])
def test_malformed_set_is_refused(tmp_path, change, what):
    """Every malformed file raises InputError with one line that says what is wrong."""
    arrays = {"image": np.zeros((2, 8, 8), np.uint8), "mask": np.zeros((2, 8, 8), np.uint8)} | change
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match=what) as error:
        fairdiff.load_set(tmp_path / "bad.npz")
    assert "\n" not in str(error.value)


def counts(data, attribute="race"):
    code = fairdiff.group_codes(data, attribute)[0]
    return [(int((code == g)[~data["synthetic"]].sum()), int((code == g)[data["synthetic"]].sum()))
            for g in range(3)]


@pytest.fixture
def two_sets():
    """20 + 6 + 4 real images of three races and one unknown, 15 synthetic ones of each race."""
    def make(race, synthetic):
        n = len(race)
        return fairdiff.check_set({"image": np.arange(n, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2),
                                   "mask": np.zeros((n, 8, 8), np.uint8), "race": np.array(race, np.int8),
                                   "synthetic": np.full(n, synthetic),
                                   "name": np.array([f"{synthetic}-{i}" for i in range(n)])}, "test")
    return make([2] * 20 + [1] * 6 + [0] * 4 + [-1], False), make([0, 1, 2] * 15, True)


def test_equal_scale_counts(two_sets):
    """Eq. 6 by hand: N_real / G = 10 a group by default, a number, or the largest group."""
    real, synthetic = two_sets
    assert counts(fairdiff.equal_scale(real, synthetic, "race")) == [(4, 6), (6, 4), (10, 0)]
    assert counts(fairdiff.equal_scale(real, synthetic, "race", target=5)) == [(4, 1), (5, 0), (5, 0)]
    small = fairdiff.equal_scale(real, synthetic, "race", target=15, n_real=12)
    assert [a + b for a, b in counts(small)] == [15, 15, 15] and sum(a for a, _ in counts(small)) == 12
    mixed = fairdiff.equal_scale(real, synthetic, "race", seed=1)
    assert len(set(mixed["name"])) == 30 and (mixed["race"] >= 0).all()        # nothing twice, no unknown
    again = fairdiff.equal_scale(real, synthetic, "race", seed=1)
    assert mixed["name"].tolist() == again["name"].tolist()


def test_equal_scale_with_a_share_repeats_the_real_ones(two_sets):
    """Half of what 4 lack to 10 is drawn, the other half are 3 of the 4 once more, under names of their own."""
    real, synthetic = two_sets
    half = fairdiff.equal_scale(real, synthetic, "race", share=0.5)
    assert counts(half) == [(7, 3), (8, 2), (10, 0)] and len(set(half["name"])) == 30
    first = half["name"][(half["race"] == 0) & ~half["synthetic"]]
    assert len({name.removesuffix("+1") for name in first}) == 4 and sum("+1" in name for name in first) == 3
    none = fairdiff.equal_scale(real, synthetic, "race", target=15, share=0)
    first = none["name"][none["race"] == 0]
    assert counts(none)[0] == (15, 0) and max(sum(n.split("+")[0] == m for n in first) for m in real["name"]) == 4
    for name in first:                                                  # a repeat is the patient it repeats
        a, b = none["name"] == name, real["name"] == name.split("+")[0]
        assert (none["image"][a][0] == real["image"][b][0]).all()


def test_several_mixes_use_what_one_leaves_out(two_sets):
    """Five sets united: five times as many of each, the first of them as alone, and nearly all of the 20 White and of the 15
    synthetic Asian images, of which one set uses 10 and 6 (each is missed with odds of 2^-5 and 0.6^5)."""
    real, synthetic = two_sets
    five = fairdiff.equal_scale(real, synthetic, "race", mixes=5)
    assert counts(five) == [(20, 30), (30, 20), (50, 0)] and len(set(five["name"])) == 150
    origin = np.array([n.split("+")[0] for n in five["name"]])
    assert len(set(origin[five["race"] == 2])) > 15 and len(set(origin[(five["race"] == 0) & five["synthetic"]])) > 9
    assert all(n.split("+")[1].isdecimal() for n in five["name"] if "+" in n)
    for name in five["name"][:50]:
        source = synthetic if name.startswith("True") else real
        a, b = five["name"] == name, source["name"] == name.split("+")[0]
        assert (five["image"][a][0] == source["image"][b][0]).all() and five["race"][a][0] == source["race"][b][0]


def test_equal_scale_says_what_is_missing(two_sets):
    """Too few synthetic images: group, need, have and the command are named."""
    real, synthetic = two_sets
    with pytest.raises(InputError, match="group Asian: 16 synthetic images needed, 15 there.*pointdiff.py sample"):
        fairdiff.equal_scale(real, synthetic, "race", target="max")


def test_fairseg_round_trip(tmp_path, phantom):
    """export writes what fairseg reads: same masks, images and attributes at the same size."""
    fairdiff.export_fairseg(fairdiff.take(phantom, slice(0, 10)), tmp_path / "seg")
    data = fairdiff.load_fairseg(tmp_path / "seg", size=32)
    for key in ("mask", "image", *fairdiff.ATTRIBUTES):
        assert np.array_equal(data[key], phantom[key][:10]), key
    assert np.allclose(data["age"], phantom["age"][:10])


def write_patient(path, **change):
    arrays = {"slo_fundus": np.zeros((40, 60), np.uint8), "disc_cup_mask": np.zeros((40, 60)), "race": 0}
    np.savez(path, **{k: v for k, v in (arrays | change).items() if v is not None})


def test_fairseg_dialects(tmp_path):
    """Other keys, the other race book, positive mask codes, days as age, centre crop."""
    mask = np.zeros((40, 60), np.int8)
    mask[18:22, 28:32], mask[0, 0] = 2, 1
    for i, race in enumerate((2, 3, 7)):
        write_patient(tmp_path / f"data_{i:06d}.npz", slo_fundus=None, fundus_slo=np.full((40, 60), i, np.uint8),
                      disc_cup_mask=None, disc_cup=mask, race=race, age=365.25 * 70)
    data = fairdiff.load_fairseg(tmp_path, size=20, crop=20)
    assert data["race"].tolist() == [0, 1, 2] and np.allclose(data["age"], 70)
    assert data["image"].shape == (3, 20, 20) and data["image"][2].max() == 2
    assert (data["mask"][0] == 2).sum() == 16 and not (data["mask"] == 1).any()     # the corner was cut off


@pytest.mark.parametrize("change, what", [
    ({"disc_cup_mask": None}, "no key disc_cup_mask"), ({"disc_cup_mask": np.full((40, 60), 7)}, "labels"),
    ({"disc_cup_mask": np.zeros((40, 61))}, "one shape"), ({"race": 2}, "--race-codes"),
])
def test_fairseg_bad_files(tmp_path, change, what):
    """A bad file is named with the reason."""
    write_patient(tmp_path / "data_00001.npz", **change)
    with pytest.raises(InputError, match=what):
        fairdiff.load_fairseg(tmp_path, size=20)


def test_checkpoint_keeps_the_old_file_and_runs_no_pickle(tmp_path):
    """A crafted checkpoint is refused and its payload does not run; a failed save leaves the old file."""
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"config": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(InputError):
        fairdiff.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    fairdiff.save_checkpoint(tmp_path / "a.pt", config={"kind": "x"}, step=1)
    with pytest.raises(Exception, match="pickle"):
        fairdiff.save_checkpoint(tmp_path / "a.pt", config={"kind": "x"}, step=lambda: 0)
    assert fairdiff.load_checkpoint(tmp_path / "a.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "evil.pt"]


def test_ema_is_the_average_it_says():
    """After the warm-up the average moves by 1 - decay; at step 0 by 0.9; BatchNorm's statistics move along."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    ema = EMA(net, decay=0.9)
    before = ema.state["0.weight"].clone()
    with torch.no_grad():
        net[0].weight += 1
        net[1].running_mean += 2
    ema.update(net, step=0)
    assert torch.allclose(ema.state["0.weight"], before + 0.9)
    assert torch.allclose(ema.state["1.running_mean"], torch.tensor([1.8]))
    ema.update(net, step=10 ** 6)
    assert torch.allclose(ema.state["0.weight"], before + 0.91)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    """NaN in the log: FloatingPointError, and nothing is written."""
    net = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 50"):
        fairdiff.save_training(tmp_path / "x.pt", {}, net, EMA(net), torch.optim.Adam(net.parameters()), 50,
                               [[50, float("nan")]])
    assert not list(tmp_path.iterdir())
