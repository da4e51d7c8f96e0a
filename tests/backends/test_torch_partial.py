"""The torch backend on one rank's part of a batch, by itself: a part that is everything is the loss of one process.

Over several ranks: tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
from cases import NORMALIZATIONS, error, gradient_size, oracle, views
from tracing import Trace

from barlow_fused.backends import torch_partial as ops
from barlow_fused.backends import torch_whole
from barlow_fused.backends.torch_partial import Result, Segments


@pytest.fixture(params=["for caches", "for accelerators"])
def shape(request, monkeypatch):
    monkeypatch.setattr(ops, "for_caches", lambda device: request.param == "for caches")
    monkeypatch.setattr(torch_whole, "CHUNK_BYTES", 2**18)  # several chunks


def gram(z_a, z_b, convention, lambd):
    """off_diag, c and both gradients, as distributed/gram.py composes them."""
    n, d = z_a.shape
    segments = Segments((n,), (n,), (1.0,))
    stats = [None if convention is None else ops.moments(z, (n,)) for z in (z_a, z_b)]
    both = [ops.View(z, m, convention, segments) for z, m in zip((z_a, z_b), stats, strict=True)]
    flats, taus = zip(*(ops.partial_gram(view) for view in both), strict=True)
    c = ops.diagonal(*both) / n
    inner, product = ops.join_gram(flats, torch.stack(taus), (n,), d, both[0].product_dtype)
    one = torch.ones((), dtype=torch.float64)
    result = Result("gram", n, d, product, c, torch.stack(taus), one, one * lambd)
    return inner / n**2 - c.double().square().sum(), c, [ops.input_grad(both, view, result) for view in range(2)]


@pytest.mark.usefixtures("shape")
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d"), [(17, 100), (140, 1000), (20, 3000)])
def test_everything_on_one_rank(n, d, dtype, normalization):
    z_a, z_b = views(n, d, dtype)
    off_diag, c, grads = gram(z_a, z_b, normalization, 0.02)
    ref = oracle(z_a, z_b, normalization, lambd=0.02)
    size = gradient_size(z_a, z_b, normalization) if n <= 1 + d / 256 else 0.0
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    assert error(off_diag, ref.off_diag) < tolerance
    assert error((c.double() - 1).square().sum(), ref.on_diag) < tolerance
    for got, want in zip(grads, (ref.grad_a, ref.grad_b), strict=True):
        assert error(got, want, at_least=size) < tolerance


@pytest.mark.parametrize("sizes", [(300,), (100, 200)])
def test_the_bulk_is_taken_out_before_k_is_rounded(sizes):
    """In half precision the product is the nearest to that in float32."""
    n, d = sum(sizes), 5000
    flats = [torch.randn(sum(ops.panel_sizes(n))) for _ in range(2)]
    taus = torch.full((2, len(sizes)), float(d), dtype=torch.float64)
    exact, rounded = (ops.join_gram(flats, taus, sizes, d, dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.bfloat16(), rounded)
    assert error(exact[0, : sizes[0], : sizes[0]].mean(), torch.tensor(1 / sizes[0])) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_on_an_accelerator(dtype):
    """A rank's K of one view: each of its panels once a chunk, however wide its part is."""
    z = torch.empty(256, 8192, dtype=dtype, device="meta")
    with Trace() as trace:
        view = ops.View(z, ops.moments(z, (256,)), NORMALIZATIONS["batch_norm"], Segments((256,), (256,), (1.0,)))
        ops.partial_gram(view)
    assert len(trace.operators) <= 40, trace.operators
