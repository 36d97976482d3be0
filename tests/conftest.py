"""Fixtures that the tests share; the five files are imported from the repository's root."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fairdiff  # noqa: E402

def run(module, argv):
    """Run a command of a file as the command line does; returns the exit code."""
    words = [str(word) for word in argv]
    return fairdiff.command_line(getattr(module, words[0].replace("-", "_")), argv=words)

@pytest.fixture(scope="session")
def phantom():
    """60 phantom patients of 32 px, races equally frequent."""
    return fairdiff.make_phantom(60, 32, seed=9, balance="race")

@pytest.fixture
def set_file(tmp_path, phantom):
    """The phantom as a dataset file."""
    fairdiff.save_set(tmp_path / "set.npz", phantom)
    return str(tmp_path / "set.npz")
