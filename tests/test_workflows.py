"""What CI does can be done here: its steps are targets of the Makefile."""

from __future__ import annotations

import re

import pytest
from subprocesses import ROOT

from barlow_fused import __version__

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*?[^\\])\n", MAKEFILE, re.MULTILINE | re.DOTALL)[1].replace("\\", "").split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_step_runs_nothing_but_targets(path):
    commands = re.findall(r"\brun:(.*)", path.read_text())
    assert commands
    for command in commands:
        program, *targets = command.split()
        assert program == "make"
        assert targets
        assert set(targets) <= TARGETS


def test_every_target_has_a_recipe():
    assert all(re.search(rf"^(?:[\w -]+ )?{target}(?: [\w -]+)?:", MAKEFILE, re.MULTILINE) for target in TARGETS)


def test_the_pythons_are_those_of_the_package():
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert named
    for path in WORKFLOWS:
        for tested in re.findall(r"python: \[(.*)\]", path.read_text()):
            assert [name.strip('" ') for name in tested.split(",")] == named


def test_the_citation_has_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
