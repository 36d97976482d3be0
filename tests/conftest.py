"""What the tests share; the five files are imported from the repository's root."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fairdiff  # noqa: E402

def run(module, *argv):
    """Run a command of a file as the command line does; returns the exit code."""
    words = list(map(str, argv))
    return fairdiff.command_line(getattr(module, words[0].replace("-", "_")), argv=words)

@pytest.fixture
def refused(capsys):
    """A check that a command ends with exit code 2 and one line, which holds all of some words."""
    def check(module, *argv, words):
        capsys.readouterr()
        assert run(module, *argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and [word for word in words.split() if word not in error] == [], error
    return check

@pytest.fixture(scope="session")
def phantom():
    """60 phantom patients of 32 px, races equally frequent."""
    return fairdiff.make_phantom(60, 32, seed=9, balance="race")

@pytest.fixture
def here(tmp_path, monkeypatch, phantom):
    """A folder to work in, which holds the phantom as set.npz."""
    monkeypatch.chdir(tmp_path)
    fairdiff.save_set("set.npz", phantom)
