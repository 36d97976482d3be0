"""Tests import the five files from the repository's root and share one small phantom."""
import pathlib
import signal
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background ignores it, and so would all children


@pytest.fixture(scope="session")
def phantom():
    """60 phantom patients of 32 px, races equally frequent."""
    import fairdiff
    return fairdiff.make_phantom(60, 32, seed=9, balance="race")


@pytest.fixture
def set_file(tmp_path, phantom):
    """The phantom as a dataset file."""
    import fairdiff
    fairdiff.save_set(tmp_path / "set.npz", phantom)
    return str(tmp_path / "set.npz")
