"""The torch backend's shape for accelerators: launches, memory, and what it does where a call does not fit at once.

That it is right over the grid of shapes, dtypes and conventions is test_torch_backend.py's.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, views
from tracing import Trace

from barlow_fused import backends, barlow_twins_loss
from barlow_fused.backends import accelerator, torch_whole
from barlow_fused.normalization import CONVENTIONS

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SYNCHRONISE = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


def whole_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="torch", return_terms=True, **kwargs)


@pytest.fixture
def on_cpu(monkeypatch):
    """This shape where there are numbers to look at."""
    monkeypatch.setattr(backends, "load", lambda name, device: torch_whole)


def traced(n, d, dtype, normalization="batch_norm", route="auto"):
    """What a forward and backward pass does on tensors without data."""
    z_a, z_b = (torch.empty(n, d, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    accelerator.widest(z_a), accelerator.matmul(z_a.detach()[:1], z_b.detach()[:1].T)  # found out once a device type
    convention = normalization if normalization is not None else "none"
    with Trace() as trace:
        loss = barlow_twins_loss(z_a, z_b, normalization=convention, route=route, backend="torch")
        torch.autograd.grad(loss, (z_a, z_b))
    return trace


@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(256, 8192), (2048, 8192), (8192, 2048)])
def test_few_launches(n, d, dtype, normalization):
    """The usual implementation has 36, and (D, D) matrices."""
    most = 60 if normalization == CONVENTIONS["batch_norm"] else 75
    operators = traced(n, d, dtype, normalization).operators
    assert len(operators) <= most, operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_of_a_wide_input(dtype):
    assert len(traced(1024, 65536, dtype).operators) <= 150


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_device_and_nothing_comes_from_the_host(dtype, normalization, route):
    trace = traced(300, 1000, dtype, normalization, route)
    assert not set(SYNCHRONISE) & set(trace.operators)
    assert trace.devices == {torch.device("meta")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d"), [(256, 8192), (2048, 8192), (1024, 65536), (2048, 65536), (2048, 262144), (8192, 2048), (8192, 65536)]
)
def test_peak_memory(n, d, dtype):
    """2 N D numbers, 3 min(N, D)^2 in float32, and a chunk; statistics and factors of each feature."""
    peak = traced(n, d, dtype).peak - 2 * n * d * dtype.itemsize  # the gradients
    size = max(4, dtype.itemsize)
    assert peak <= 2 * n * d * dtype.itemsize + 3 * min(n, d) ** 2 * size + torch_whole.CHUNK_BYTES + 40 * d * size


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("normalization", ["batch_norm", "std", "none"])
@pytest.mark.parametrize("chunk", [2**27, 2**17, 1])
def test_chunks_slices_and_panels(chunk, normalization, dtype, route, monkeypatch):
    """Columns in chunks, K in panels of rows, D in slices, all at once or one after the other."""
    monkeypatch.setattr(torch_whole, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(torch_whole, "SUM_LENGTH", 200)
    monkeypatch.setattr(torch_whole, "MANY_ROWS", 30)
    z_a, z_b = views(130, 1100, dtype)
    got = answer(whole_loss(route=route, normalization=normalization), z_a, z_b)
    assert_close(got, z_a, z_b, CONVENTIONS[normalization])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (1, -2, 0.5)])
def test_each_term_and_each_view(weights, route):
    z_a, z_b = views(40, 200)
    ref = functools.partial(barlow_twins_loss, backend="reference", return_terms=True)
    grads = []
    for loss, dtype in ((whole_loss(route=route), torch.float32), (ref, torch.float64)):
        a, b = (z.to(dtype, copy=True).requires_grad_() for z in (z_a, z_b))
        grads.append(torch.autograd.grad(sum(w * t for w, t in zip(weights, loss(a, b), strict=True) if w), (a, b)))
    assert error(grads[0][0], grads[1][0]) < 2e-6
    assert error(grads[0][1], grads[1][1]) < 2e-6
    a = z_a.clone().requires_grad_()
    assert error(torch.autograd.grad(whole_loss(route=route)(a, z_b).loss, a)[0], oracle(z_a, z_b).grad_a) < 2e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("route", ROUTES)
def test_a_device_without_float64(route, monkeypatch):
    about = accelerator.Accelerator("none", float64=False)
    monkeypatch.setattr(accelerator, "of", lambda device: about)
    z_a, z_b = views(64, 1000)
    assert_close(answer(whole_loss(route=route), z_a, z_b), z_a, z_b, CONVENTIONS["batch_norm"])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("route", ROUTES)
def test_any_strides_and_one_compiled_call(route):
    z_a, z_b = views(60, 300, torch.bfloat16)
    want = answer(whole_loss(route=route), z_a, z_b)
    for strided in (lambda z: z.T.contiguous().T, lambda z: torch.stack((z, z), 2)[..., 0]):
        got = answer(whole_loss(route=route), strided(z_a), strided(z_b))
        assert all(error(x, y) < 5e-3 for x, y in zip(got, want, strict=True))
    compiled = torch.compile(whole_loss(route=route), fullgraph=True, backend="aot_eager")
    assert all(error(x, y) < 1e-4 for x, y in zip(answer(compiled, z_a, z_b), want, strict=True))


@pytest.mark.parametrize("normalization", [CONVENTIONS["batch_norm"], None], ids=["batch_norm", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "route"),
    [(40, 500, "gram"), (40, 500, "direct"), (900, 200, "direct"), (400, 1000, "direct"), (500, 1000, "direct")],
)
def test_what_is_saved_is_what_is_promised(n, d, route, dtype, normalization):
    """To torch.compile: shapes, dtypes and strides."""
    z_a, z_b = views(n, d, dtype)
    x = torch_whole.normalize(z_a, z_b, normalization)
    _, product = (torch_whole.gram if route == "gram" else torch_whole.correlate)(x, 0.1, 1.0, True)
    promised = torch_whole.empty_saved(z_a, route, normalization)
    assert [(t.shape, t.dtype, t.stride()) for t in (product, *x.saved())] == [
        (t.shape, t.dtype, t.stride()) for t in promised
    ]


def test_a_gpu_gets_this_shape_and_a_cpu_the_other():
    assert backends.load("torch", torch.device("cuda", 1)) is torch_whole
    assert backends.load("torch", torch.device("xpu")) is torch_whole
    assert backends.load("torch", torch.device("cpu")) is not torch_whole
