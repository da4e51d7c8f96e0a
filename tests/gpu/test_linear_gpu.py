"""The loss with the last layer in it on a GPU: every route and backend, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import error

from barlow_fused import barlow_twins_loss, linear_barlow_twins_loss
from barlow_fused.backends import why_unusable
from barlow_fused.reference import reference_loss

GPU = torch.device("cuda", 0)
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability(GPU) >= (8, 0)
WAYS = [("hidden", "torch"), *((route, b) for route in ("gram", "direct") for b in ("torch", "triton", "cuda"))]
TOLERANCE = {torch.float32: (1e-6, 4e-6), torch.bfloat16: (2e-3, 2e-2), torch.float16: (5e-4, 5e-3)}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU of compute capability >= 8.0"),
]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request):
    """A route and a backend that can take it here."""
    route, backend = request.param
    reason = why_unusable(backend, GPU)
    if reason is not None:
        pytest.skip(reason)
    return {"route": route, "backend": backend}


def tensors(n, h, d, dtype):
    generator = torch.Generator().manual_seed(0)
    shared, *own = (torch.randn(n, h, generator=generator) for _ in range(3))
    weight = torch.randn(d, h, generator=generator) / h**0.5
    inputs = *((shared + 0.4 * x).relu() for x in own), weight
    return [x.to(GPU, dtype).requires_grad_() for x in inputs]


def shape(route):
    return (512, 96, 700) if route == "direct" else (256, 96, 20000)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_accuracy(way, dtype):
    inputs = tensors(*shape(way["route"]), dtype)
    loss = linear_barlow_twins_loss(*inputs, **way)
    grads = torch.autograd.grad(loss, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference_loss(exact[0] @ exact[2].T, exact[1] @ exact[2].T, 0.0051).loss
    wanted = torch.autograd.grad(want, exact)
    for got, ref, tolerance in ((loss, want, TOLERANCE[dtype][0]), *zip(grads, wanted, [TOLERANCE[dtype][1]] * 3)):  # noqa: B905
        assert error(got.detach(), ref.detach()) < tolerance


def test_same_input_same_bits(way):
    inputs = tensors(*shape(way["route"]), torch.bfloat16)
    runs = []
    for _ in range(3):
        loss = linear_barlow_twins_loss(*inputs, **way)
        runs.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(x, first) for run in runs[1:] for x, first in zip(run, runs[0], strict=True))


def test_nothing_waits_for_the_gpu(way):
    inputs = tensors(*shape(way["route"]), torch.bfloat16)
    torch.autograd.grad(linear_barlow_twins_loss(*inputs, **way), inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(linear_barlow_twins_loss(*inputs, **way), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_embeddings_never_exist():
    """At N=512, H=256, D=131072 at most a chunk's share of what the layer and the loss need by themselves."""
    inputs = tensors(512, 256, 131072, torch.bfloat16)
    peaks = {}
    for name, call in {
        "separate": lambda a, b, w: barlow_twins_loss(a @ w.T, b @ w.T, backend="torch"),
        "gram": lambda a, b, w: linear_barlow_twins_loss(a, b, w, route="gram", backend="torch", chunk_features=2048),
        "hidden": lambda a, b, w: linear_barlow_twins_loss(a, b, w, route="hidden", chunk_features=2048),
    }.items():
        torch.cuda.reset_peak_memory_stats(GPU)
        before = torch.cuda.memory_allocated(GPU)
        grads = torch.autograd.grad(call(*inputs), inputs)
        peaks[name] = torch.cuda.max_memory_allocated(GPU) - before - sum(g.nbytes for g in grads)
        del grads
    assert peaks["gram"] < peaks["separate"] / 10
    assert peaks["hidden"] < peaks["separate"] / 10
