"""What the documents say of the package is what the package says."""

from __future__ import annotations

import re

import pytest
from subprocesses import ROOT

TRAINING = (ROOT / "docs" / "training.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that has such a heading, without code marks."""
    lines = TRAINING[TRAINING.index(heading) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_presets_is_that_of_the_presets():
    pytest.importorskip("tomli_w")
    from barlow_fused.train.presets import PRESETS

    networks = {"tiny": "tiny ResNet", "resnet18": "ResNet-18, small stem", "resnet50": "ResNet-50"}
    table = rows("| preset | data | network |")
    assert [row[0] for row in table] == list(PRESETS)
    for name, data, network, projector, optimiser, epochs, kappa in table:
        preset = PRESETS[name]
        assert data.split(",")[0].partition(":")[0] == preset["data"].partition(":")[0]
        assert network == networks[preset["backbone"]]
        assert projector == preset["projector"]
        assert epochs == f"{preset['epochs']}, {preset['batch_size']}"
        assert float(kappa) == float(f"{preset['kappa']:.3g}")
        kind, *rates = optimiser.split(", ")
        assert kind.lower() == preset["optimizer"]
        wanted = [preset["lr_weights"], preset["lr_biases"]][: len(rates)]  # for each 256 images
        got = [float(re.sub("^biases ", "", rate)) for rate in rates]
        assert got == pytest.approx([rate * preset["batch_size"] / 256 for rate in wanted])


def test_the_table_of_environment_variables_has_all_of_them():
    sources = [*(ROOT / "barlow_fused").rglob("*.py"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"BARLOW_FUSED_[A-Z_]*[A-Z]", path.read_text())}
    listed = re.findall(r"^\| `(BARLOW_FUSED_\w+)`", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(listed) == read


def test_the_table_of_commands_has_all_of_them():
    from barlow_fused.__main__ import _parser

    (commands,) = (action for action in _parser()._actions if action.metavar == "command")
    listed = re.findall(r"^\| `barlow-fused (\w+)`", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert listed == list(commands.choices)
