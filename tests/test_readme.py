"""The README points to lines that are there, and names commands and flags that exist."""
import re

import pytest
from conftest import ROOT

import controlnet
import fairdiff
import fairness
import pointdiff
import transunet

README = (ROOT / "README.md").read_text()
MAIN = {m.__name__: m.main for m in (controlnet, fairdiff, fairness, pointdiff, transunet)}


def test_equation_index_points_to_the_equations():
    """Eq. 1 to 7, each with a file and a line that says so and is no line of a docstring or header."""
    found = re.findall(r"\| Eq\. (\d) .*\[`([\w.]+):(\d+)`\]\(([\w.]+)#L(\d+)\)", README)
    assert [int(n) for n, *_ in found] == [1, 2, 3, 4, 5, 6, 7]
    for n, file, line, linked, anchor in found:
        assert (file, line) == (linked, anchor)
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        code, hash, comment = text.partition("#")
        assert hash and f"Eq. {n}" in comment, f"{file}:{line} is {text!r}"


def test_functions_and_files_named_are_there():
    """`file.py:name` names a function or class of that file; pictures exist."""
    for file, name in re.findall(r"`(\w+)\.py:([A-Za-z_][\w.]*)`", README):
        target = __import__(file)
        for part in name.split("."):
            target = getattr(target, part)
    pictures = re.findall(r"\]\((assets/[\w.]+)\)", README)
    assert len(pictures) > 3 and all((ROOT / p).stat().st_size for p in pictures)


COMMANDS = re.findall(r"python (\w+)\.py ([\w-]+)([^`\n#]*)", README)


@pytest.mark.parametrize("command", sorted({(f, c) for f, c, _ in COMMANDS}), ids=" ".join)
def test_commands_and_their_flags_exist(command, capsys):
    """Every `python FILE.py COMMAND --flag` of the README is one that --help knows."""
    with pytest.raises(SystemExit) as stop:
        MAIN[command[0]]([command[1], "--help"])
    known = capsys.readouterr().out
    assert stop.value.code == 0
    for file, name, rest in COMMANDS:
        if (file, name) == command:
            for flag in re.findall(r"--[\w-]+", rest):
                assert re.search(rf"{flag}\b", known), f"{file}.py {name} has no {flag}"
