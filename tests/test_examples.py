"""The examples run: two steps each, on bundled images."""

from __future__ import annotations

import importlib
import math

import pytest
from subprocesses import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch, tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)


def test_plain_loop():
    first, second = importlib.import_module("plain_loop").main(steps=2)
    assert math.isfinite(first)
    assert second != first


def test_lightly_script(capsys):
    lightly = pytest.importorskip("lightly.loss")
    from barlow_fused.integrations import unpatch

    own = lightly.BarlowTwinsLoss.forward
    try:
        first, second = importlib.import_module("lightly_script").main(steps=2)
        assert lightly.BarlowTwinsLoss.forward is not own
    finally:
        unpatch("lightly")
    assert math.isfinite(first)
    assert second != first
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_module(monkeypatch):
    pytest.importorskip("lightning")
    # stable-pretraining, whose loss alone is installed for the tests, wants to add callbacks to every trainer
    monkeypatch.setattr("lightning.fabric.utilities.registry.entry_points", lambda **_: ())
    module = importlib.import_module("lightning_module").main(
        steps=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    assert module.trainer.global_step == 2
    assert math.isfinite(module.trainer.callback_metrics["loss"])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60
