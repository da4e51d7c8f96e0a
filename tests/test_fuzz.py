"""Any inputs, options and strides, by hypothesis: make test-fuzz. BARLOW_FUZZ=100000 tries that many (default: 1000).

The oracle is written here, in float64 and from the definition: nothing of the package computes it. What is promised is
held, or where the inputs themselves are hard, three times the error of the usual implementation in the same dtype.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from barlow_fused import barlow_twins_loss

pytestmark = pytest.mark.fuzz

PROMISED = {torch.float32: (1e-6, 2e-6), torch.float64: (1e-10, 1e-8), torch.bfloat16: (1e-4, 5e-3)}
ROUNDING = {torch.float32: 2**-23, torch.float64: 1e-11}
# (float64: the oracle is no more exact than what is tested, so only that nothing is rounded to less is seen)
TWO_VALUED = 10  # times the loss's promise, and three times the gradient's (README: sums that are rounded one way)
TINY = 1e-12  # a gradient of constant features
USUAL = 3  # times the usual implementation's error
EXAMPLES = int(os.environ.get("BARLOW_FUZZ", "1000"))


class Case(NamedTuple):
    n: int
    d: int
    dtype: torch.dtype
    route: str
    normalization: str
    lambd: float
    kind: str  # of the features
    correlation: float
    mean: float  # over the deviation
    scale: float
    columns: bool  # laid out column by column
    seed: int


cases = st.builds(
    Case,
    n=st.one_of(st.integers(2, 12), st.integers(13, 160)),
    d=st.one_of(st.integers(1, 40), st.integers(41, 700)),
    dtype=st.sampled_from(list(PROMISED)),
    route=st.sampled_from(["auto", "gram", "direct"]),
    normalization=st.sampled_from(["batch_norm", "std", "none"]),
    lambd=st.sampled_from([0.0, 1e-4, 0.0051, 1.0]),
    kind=st.sampled_from(["normal", "heavy", "two values", "some constant", "binary mask"]),
    correlation=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    columns=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)

    def randn() -> Tensor:
        return torch.randn(case.n, case.d, generator=generator, dtype=torch.float64)

    shared, views = randn(), []
    for _ in range(2):
        z = case.correlation**0.5 * shared + (1 - case.correlation) ** 0.5 * randn()
        if case.kind == "heavy":
            z = z**3
        elif case.kind == "two values":
            z = (z > 0).double()
        elif case.kind == "binary mask":
            z = z * (z > 0)
        elif case.kind == "some constant":
            z[:, ::3] = 0.1
        z = ((z + case.mean * (case.normalization != "none")) * case.scale).to(case.dtype)
        views.append(z.T.contiguous().T if case.columns else z)
    return views[0], views[1]


class Plain(NamedTuple):
    """What the usual implementation makes of it, and how exact that can be where float32 rounds the parts."""

    loss: Tensor
    grads: tuple[Tensor, ...]
    loss_parts: Tensor  # what the loss changes by where each C_ii, and ||C||^2 of the Gram route, changes by 1
    grad_parts: list[Tensor]  # the norm of each gradient before its parts cancel
    grads_of_c: list[Tensor]  # what each gradient changes by, likewise, where each C_ii changes by 1


def plain(z_a: Tensor, z_b: Tensor, case: Case, dtype: torch.dtype) -> Plain:
    leaves = [z.detach().to(dtype).requires_grad_() for z in (z_a, z_b)]
    hats = []
    for z in leaves:
        if case.normalization == "batch_norm":
            z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        elif case.normalization == "std":
            var = (z - z.mean(0)).square().sum(0) / (case.n - 1)
            std = torch.where(var > 0, var, 1.0).sqrt() * (var > 0)  # of a constant feature it has no derivative: 0
            z = (z - z.mean(0)) / (std + 1e-6)
        hats.append(z)
    c = hats[0].T @ hats[1] / case.n
    diagonal = c.diagonal()
    loss = (diagonal - 1).square().sum() + case.lambd * (c.square().sum() - diagonal.square().sum())
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    with torch.no_grad():
        loss_parts = 2 * ((diagonal - 1) * diagonal).abs().sum()
        if case.route == "gram":
            loss_parts += case.lambd * c.square().sum()
        weights = c * (case.lambd * 2 / case.n)
        of_c = case.lambd * diagonal.abs() if case.route == "gram" else 0.0  # which the Gram route adds and takes off
        weights.diagonal().copy_(((diagonal - 1).abs() + of_c) * (2 / case.n))
        grad_parts, grads_of_c = [], []
        for z, other, weight in ((leaves[0], hats[1], weights), (leaves[1], hats[0], weights.T)):
            s = z.std(0, correction=0)
            rstd = {"batch_norm": (s.square() + 1e-5).rsqrt(), "std": 1 / (s + 1e-6), "none": torch.ones_like(s)}
            size = (weight.square() @ other.square().sum(0)).sqrt()
            if case.n < 8:  # the directions of few samples' features are nearly parallel: parts add up
                size = weight.abs() @ other.norm(dim=0)
            grad_parts.append((rstd[case.normalization] * size).norm())
            grads_of_c.append((rstd[case.normalization] * diagonal * other.norm(dim=0)).norm() * (2 / case.n))
        return Plain(loss.detach(), grads, loss_parts, grad_parts, grads_of_c)


def off(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth.double()).norm().item()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases)
def test_any_call_is_as_exact_as_promised(case):
    z_a, z_b = inputs(case)
    truth = plain(z_a, z_b, case, torch.float64)
    low = torch.float32 if case.dtype == torch.bfloat16 else case.dtype
    usual = plain(z_a, z_b, case, low)
    leaves = [z.detach().requires_grad_() for z in (z_a, z_b)]
    options = {"lambd": case.lambd, "route": case.route, "normalization": case.normalization}
    loss = barlow_twins_loss(*leaves, **options)
    grads = torch.autograd.grad(loss, leaves)
    for_loss, for_grads = PROMISED[case.dtype]
    if case.kind == "two values":
        for_loss, for_grads = TWO_VALUED * for_loss, 3 * for_grads
    of_c = 3 * ROUNDING[low]
    rounded = of_c * truth.loss_parts + case.d * of_c**2
    allowed = max(for_loss * truth.loss, USUAL * off(usual.loss, truth.loss), rounded)
    assert off(loss, truth.loss) <= allowed, f"loss off by {off(loss, truth.loss) / allowed:.2f} of what is allowed"
    for view in range(2):
        size = max(truth.grads[view].norm(), truth.grad_parts[view])
        rounded = of_c * truth.grads_of_c[view] + TINY
        allowed = max(for_grads * size, USUAL * off(usual.grads[view], truth.grads[view]), rounded)
        is_off = off(grads[view], truth.grads[view])
        assert is_off <= allowed, f"gradient of view {view} off by {is_off / allowed:.2f} of what is allowed"
        assert grads[view].dtype == case.dtype
