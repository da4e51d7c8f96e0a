"""The torch backend's shape for CPUs: whatever path it takes, the answer is the same."""

from __future__ import annotations

import functools

import pytest
import torch
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


def test_onednn_multiplies_on_cpus_alone():
    for device in ("cpu", "meta"):
        x = torch.empty(64, 4096, device=device)
        assert slabs._by_onednn(x, x) == (device == "cpu" and slabs._ONEDNN is not None)


def test_few_samples_and_very_many_features():
    """K's sums over slabs are kept in float64 where N is small: in float32 the gradient would be off by 4e-6 here."""
    generator = torch.Generator().manual_seed(1)
    shared, *own = (torch.randn(16, 131072, generator=generator) for _ in range(3))
    z_a, z_b = (0.98**0.5 * shared + 0.02**0.5 * of_view for of_view in own)
    got = torch.autograd.grad(barlow_twins_loss(z_a.requires_grad_(), z_b, route="gram"), z_a)[0]
    exact = z_a.detach().double().requires_grad_()
    a, b = ((z - z.mean(0)) * (z.var(0, correction=0) + 1e-5).rsqrt() for z in (exact, z_b.double()))
    c = (a * b).mean(0)
    off_diag = ((a @ a.T) * (b @ b.T)).sum() / 16**2 - c.square().sum()
    want = torch.autograd.grad((c - 1).square().sum() + 0.0051 * off_diag, exact)[0]
    assert (got - want).norm() < 2e-6 * want.norm()


@pytest.mark.parametrize("d", [1, 2])
def test_off_diag_is_never_negative(d):
    """It is a difference of sums that are nearly equal there."""
    for seed in range(30):
        assert barlow_twins_loss(*views(20, d, seed=seed), route="gram", return_terms=True).off_diag >= 0
