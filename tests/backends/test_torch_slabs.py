"""The torch backend's shape for CPUs: whatever path it takes, the answer is the same."""

from __future__ import annotations

import functools

import pytest
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import slabs, torch_direct, torch_slabs


def torch_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="torch", return_terms=True, **kwargs)


@pytest.mark.parametrize(
    "threshold", ["KEEP_ELEMENTS", "KEEP_TALL", "ONEDNN_MIN_FLOPS", "ONEDNN_MAX_ROWS", "MIN_ONEDNN_OUTPUT"]
)
@pytest.mark.parametrize("value", [0, 1e18])
def test_every_path_gives_the_same_loss(threshold, value, monkeypatch):
    """Keeping the standardised features or not, oneDNN or not: the choice is about speed alone."""
    for module in (slabs, torch_direct, torch_slabs):
        if hasattr(module, threshold):
            monkeypatch.setattr(module, threshold, value)
    z_a, z_b = views(255, 1000)
    for route in ROUTES:
        assert_close(answer(torch_loss(route=route), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(slabs, "_ONEDNN", None)
    z_a, z_b = views(255, 1000)
    assert_close(answer(torch_loss(), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])
