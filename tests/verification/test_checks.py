"""The checks by themselves, with the torch backend as the one to verify: right as it is, and made wrong."""

from __future__ import annotations

import pytest
import torch
from cases import oracle

from barlow_fused.backends import torch_partial, torch_small
from barlow_fused.normalization import CONVENTIONS
from barlow_fused.reference import standardize
from barlow_fused.verification import checks
from barlow_fused.verification.checks import WrongError
from barlow_fused.verification.guard import GuardBands
from barlow_fused.verification.record import Unit

CPU = torch.device("cpu")
UNITS = [
    Unit("torch", dtype, route, ranks)
    for dtype in ("float32", "bfloat16", "float16")
    for route in ("gram", "direct")
    for ranks in (False, True)
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_is_right_passes_every_check(unit, monkeypatch):
    """But for the largest shapes, which take a CPU seconds."""
    monkeypatch.setattr(checks, "SHAPES", ((2, 3), (17, 100), (33, 1001), (300, 77), (32, 4096)))
    names = []
    for name, run in checks.checks(unit, CPU):
        run()
        names.append(name)
    assert len(names) == len(set(names)) == (6 if unit.ranks else 15)


@pytest.mark.parametrize(("n", "d"), [(17, 100), (20, 33)])
def test_the_truth_is_that_of_the_reference(n, d):
    z_a, z_b = checks.inputs(Unit("torch", "float32", "gram"), CPU, n, d)
    hats = [standardize(z.double(), CONVENTIONS["batch_norm"]) for z in (z_a, z_b)]
    ref = oracle(z_a, z_b, lambd=checks.LAMBD)
    for got, want in zip(checks.true_loss(*hats), ref[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_what_is_off_is_wrong(monkeypatch, route, factor):
    name = "gram" if route == "gram" else "correlate"
    operation = getattr(torch_small, name)

    def off(*args):
        terms, product = operation(*args)
        return terms._replace(loss=terms.loss * factor), product

    monkeypatch.setattr(torch_small, name, off)
    name, run = next(checks.checks(Unit("torch", "float32", route), CPU))
    with pytest.raises(WrongError, match="loss is off by"):
        run()


@pytest.mark.parametrize("route", ["gram", "direct"])
def test_what_is_off_over_ranks_is_wrong(monkeypatch, route):
    input_grad = torch_partial.input_grad
    monkeypatch.setattr(torch_partial, "input_grad", lambda *args: input_grad(*args) * 1.001)
    _, run = next(checks.checks(Unit("torch", "float32", route, True), CPU))
    with pytest.raises(WrongError, match="the gradient of z_a is off by"):
        run()


@pytest.mark.parametrize("offset", [-1, 100])
@pytest.mark.parametrize("make", [
    lambda: torch.empty(10, 10), lambda: torch.zeros(1).new_empty(10, 10), lambda: torch.empty_like(torch.zeros(10, 10))
])  # fmt: skip
def test_a_byte_beside_a_tensor_is_seen(make, offset):
    with GuardBands() as bands:
        x = make()
        x.fill_(1.0)
        assert bands.broken() == 0
        x.as_strided((1,), (1,), x.storage_offset() + offset).fill_(1.0)
    assert 1 <= bands.broken() <= 4


def test_inputs_between_bands_keep_their_strides():
    with GuardBands() as bands:
        x = bands.around(torch.randn(5, 7).T)
        assert x.stride() == (1, 7)
        x.as_strided((1,), (1,), x.storage_offset() + 35).fill_(0.0)
    assert bands.broken()
