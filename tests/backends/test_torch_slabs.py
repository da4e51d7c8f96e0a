"""The torch backend's shape for CPUs: whatever path it takes, the answer is the same."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, oracle, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import slabs, torch_small


def torch_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="torch", return_terms=True, **kwargs)


@pytest.mark.parametrize("threshold", ["KEEP_ELEMENTS", "ONEDNN_MIN_FLOPS", "ONEDNN_MAX_ROWS"])
@pytest.mark.parametrize("value", [0, math.inf])
def test_every_path_gives_the_same_loss(threshold, value, monkeypatch):
    """Keeping the standardised features or not, oneDNN or not: the choice is about speed alone."""
    monkeypatch.setattr(torch_small if threshold == "KEEP_ELEMENTS" else slabs, threshold, value)
    z_a, z_b = views(255, 1000)
    for route in ROUTES:
        assert_close(answer(torch_loss(route=route), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(slabs, "_ONEDNN", None)
    z_a, z_b = views(255, 1000)
    assert_close(answer(torch_loss(), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


GRAM = torch_loss(route="gram")


def test_samples_that_are_unlike_the_others(monkeypatch):
    """The first mean is that of a few samples: here of one, which is far from all others."""
    monkeypatch.setattr(slabs, "FEW_SAMPLES", 1)
    monkeypatch.setattr(slabs, "FEW_OF", 300)
    z_a, z_b = views(300, 3000)
    for z in (z_a, z_b):
        z[0] += 1000 * torch.randn(3000, generator=torch.Generator().manual_seed(int(z is z_b)))
    assert_close(answer(GRAM, z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


def test_a_sample_that_is_everything():
    """One row of each view, another one, has all variance: <K_a, K_b> is far below that of independent features."""
    z_a, z_b = views(600, 2333)
    z_a[7], z_b[500] = 1e8, 1e8
    want = float(oracle(z_a, z_b, NORMALIZATIONS["std"], lambd=1000.0).loss)
    got = float(torch_loss(route="gram", normalization="std", lambd=1000.0)(z_a, z_b).loss)
    assert abs(got - want) < 1e-5 * want


@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, 1e6])
def test_features_with_zero_variance(value, normalization):
    """Those of a few samples sum to a mean that is rounded."""
    z_a, z_b = views(300, 3000)
    z_a[:, ::3], z_b[:, ::5] = value, value
    loss = torch_loss(route="gram", normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize(("n", "d"), [(256, 3000), (64, 3000), (512, 2048), (100, 777)])
def test_two_valued_features_lose_nothing(n, d):
    """K's diagonal by a matrix product is biased there, by 3e-6: all of its summands are rounded alike."""
    generator = torch.Generator().manual_seed(n + d)
    shared, *own = (torch.randn(n, d, generator=generator) for _ in range(3))
    z_a, z_b = ((0.9**0.5 * shared + 0.1**0.5 * of_view > 0).float() for of_view in own)
    want = float(oracle(z_a, z_b, NORMALIZATIONS["batch_norm"], lambd=1.0).loss)
    assert abs(float(GRAM(z_a, z_b, lambd=1.0).loss) - want) < 4e-7 * want


def test_onednn_multiplies_on_cpus_alone():
    for device in ("cpu", "meta"):
        x = torch.empty(64, 4096, device=device)
        assert slabs._by_onednn(x, x) == (device == "cpu" and slabs._ONEDNN is not None)


def test_few_samples_and_very_many_features():
    """The bulk of K is left out of all of its sums: with it, the gradient would be off by more."""
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
