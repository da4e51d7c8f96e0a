"""The torch backend's direct route on CPUs, over several slabs of rows, or kept whole: the answer is the same."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import NORMALIZATIONS, answer, assert_close, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import slabs, torch_small

N, D = 6000, 130


@pytest.fixture(params=[0, 1e18], ids=["made again", "kept"], autouse=True)
def keep(request, monkeypatch):
    monkeypatch.setattr(torch_small, "KEEP_ELEMENTS", request.param)
    monkeypatch.setattr(torch_small, "KEEP_HALVES", request.param)


def check(z_a, z_b, normalization="batch_norm"):
    assert len(list(slabs._slabs(*z_a.shape))) > 1
    loss = functools.partial(barlow_twins_loss, backend="torch", return_terms=True, normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("normalization", ["batch_norm", "std", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_conventions_and_dtypes(dtype, normalization):
    check(*views(N, D, dtype), normalization)


@pytest.mark.parametrize("ratio", [10.0, 1e3])
def test_large_means_lose_nothing(ratio):
    z_a, z_b = views(N, D)
    check(z_a - z_a.mean(0) + ratio, z_b - z_b.mean(0) - ratio * torch.linspace(0.5, 1, D))


def test_rows_that_are_unlike_the_others(monkeypatch):
    """The first mean is that of a few rows: here of one, which is far from all others."""
    monkeypatch.setattr(slabs, "FEW_SAMPLES", 1)
    monkeypatch.setattr(slabs, "FEW_OF", N)
    z_a, z_b = views(N, D)
    for z in (z_a, z_b):
        z[0] += 1000 * torch.randn(D, generator=torch.Generator().manual_seed(int(z is z_b)))
    check(z_a, z_b)


@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_features_with_zero_variance(value, normalization, monkeypatch):
    monkeypatch.setattr(slabs, "FEW_OF", 60)  # a hundred, whose mean is rounded
    z_a, z_b = views(N, D)
    z_a[:, ::3], z_b[:, ::5] = value, value
    check(z_a, z_b, normalization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_onednn(dtype, monkeypatch):
    """As where a CPU has no AVX-512: the product is added to what is in its place."""
    monkeypatch.setattr(slabs, "_ONEDNN", None)
    check(*views(N, D, dtype))


def test_one_gradient_of_strided_views():
    """A view that needs no gradient, and rows that are not next to each other."""
    a, b = (z.T.contiguous().T for z in views(N, D))
    whole = [z.clone().requires_grad_() for z in (a, b)]
    expected = torch.autograd.grad(barlow_twins_loss(*whole), whole)
    for view in range(2):
        z = [a, b]
        z[view] = z[view].clone().requires_grad_()
        (grad,) = torch.autograd.grad(barlow_twins_loss(*z), z[view])
        torch.testing.assert_close(grad, expected[view], rtol=1e-4, atol=1e-8)
