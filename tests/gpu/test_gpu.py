"""The backends of own kernels, Triton's and CUDA's, on a GPU, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, views
from on_gpu import GPU, gpu, gpu_views, gram_truth, need_memory

from barlow_fused import barlow_twins_loss, choice
from barlow_fused.__main__ import main
from barlow_fused.backends import why_unusable
from barlow_fused.planning.plan import plan
from barlow_fused.verification import record
from barlow_fused.verification.key import key
from benchmarks.precompile import SIZES, SMALL

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """The backend's name."""
    reason = why_unusable(request.param, GPU)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def fused(backend):
    """The loss with that backend."""
    return lambda **kwargs: functools.partial(barlow_twins_loss, backend=backend, return_terms=True, **kwargs)


def test_gram_truth_is_the_oracle():
    z_a, z_b = views(20, 1100)
    got, ref = gram_truth(z_a, z_b), oracle(z_a, z_b)
    assert error(got[0], ref.loss) < 1e-12
    assert error(got[1], ref.grad_a) < 1e-10
    assert error(got[2], ref.grad_b) < 1e-10


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "route"), [*SIZES, (4096, 524288, "gram")])  # of the last, N D = 2^31
def test_accuracy_at_size(fused, n, d, route, dtype):
    need_memory(n, d, dtype, arrays=9)
    z_a, z_b = gpu_views(n, d, dtype)
    got, ref = answer(fused(route=route), z_a, z_b), gram_truth(z_a, z_b)
    assert error(got.loss, ref[0]) < (1e-6 if dtype == torch.float32 else 1e-4)
    for x, want in ((got.grad_a, ref[1]), (got.grad_b, ref[2])):  # on the GPU: these are gigabytes
        assert ((x.double() - want).norm() / want.norm()).item() < (2e-6 if dtype == torch.float32 else 5e-3)


@gpu
def test_offsets_beyond_32_bits(fused):
    """C has D^2 > 2^31 elements, and the partial sums of its rows many; N D = 2^31 is above."""
    n, d = 64, 65536
    need_memory(d, d, torch.bfloat16, arrays=2, doubles=0)
    z_a, z_b = gpu_views(n, d, torch.bfloat16)
    got, ref = answer(fused(route="direct"), z_a, z_b), gram_truth(z_a, z_b)
    assert error(got.loss, ref[0]) < 1e-3
    for x, want in ((got.grad_a, ref[1]), (got.grad_b, ref[2])):  # far from where this route is taken
        assert ((x.double() - want).norm() / want.norm()).item() < 2e-2


@gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_obeys_pytorchs_switch(fused, precision):
    before = torch.get_float32_matmul_precision()
    z_a, z_b = gpu_views(512, 4096, torch.float32)
    ref = gram_truth(z_a, z_b)
    try:
        torch.set_float32_matmul_precision(precision)
        got = answer(fused(route="gram"), z_a, z_b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(got.grad_a, ref[1]) < (2e-6 if precision == "highest" else 2e-3)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "route"), [*SIZES, (2048, 1024, "direct")])
def test_same_input_same_bits(fused, n, d, route, dtype):
    need_memory(n, d, dtype, arrays=13)
    z_a, z_b = gpu_views(n, d, dtype)
    first = answer(fused(route=route), z_a, z_b)
    for _ in range(20):
        again = answer(fused(route=route), z_a, z_b)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@gpu
@pytest.mark.parametrize(("n", "d", "route"), [*SIZES, (2048, 1024, "direct")])
def test_cuda_graph(fused, n, d, route):
    need_memory(n, d, torch.bfloat16, arrays=13)
    z_a, z_b = (z.requires_grad_() for z in gpu_views(n, d, torch.bfloat16))
    loss = fused(route=route)

    def step():
        terms = loss(z_a, z_b)
        return *terms, *torch.autograd.grad(terms.loss, (z_a, z_b))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        with torch.no_grad():
            z_a.copy_(torch.randn(n, d, device=GPU, generator=torch.Generator(GPU).manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "route"), SIZES)
def test_peak_memory(fused, backend, n, d, route, dtype):
    """At most 2 N D numbers, 3 min(N, D)^2 and 11 D float32 beyond inputs and gradients, as ``plan`` says."""
    need_memory(n, d, dtype, arrays=9)
    z_a, z_b = (z.requires_grad_() for z in gpu_views(n, d, dtype))
    fused(route=route)(z_a, z_b).loss.backward()
    z_a.grad = z_b.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # as asked for, before the allocator rounds up
    fused(route=route)(z_a, z_b).loss.backward()
    gradients = 2 * n * d * dtype.itemsize
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - gradients
    assert used <= 2 * n * d * dtype.itemsize + (3 * min(n, d) ** 2 + 11 * d) * 4
    made = plan(n, d, dtype, device=GPU, route=route, backend=backend)
    assert used == pytest.approx(made.fused.peak_memory, rel=0.01, abs=2**16)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says PyTorch
def test_backward_does_not_wait_for_the_gpu(fused):
    z_a, z_b = (z.requires_grad_() for z in gpu_views(256, 8192, torch.bfloat16))
    fused()(z_a, z_b).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused()(z_a, z_b).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Last, because Triton compiles anew for most of these: minutes.


@gpu
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize(("n", "d"), SMALL)
def test_accuracy(fused, n, d, normalization, dtype, route):
    z_a, z_b = (z.to(GPU) for z in views(n, d, dtype))
    loss = fused(route=route, normalization=normalization if normalization is not None else "none")
    assert_close(answer(loss, z_a, z_b), z_a, z_b, normalization)


@gpu
def test_verify_makes_a_record_that_auto_follows(tmp_path, monkeypatch):
    """In the time that it promises; what it has verified is right, and taken where it is faster."""
    monkeypatch.setenv("BARLOW_FUSED_CACHE_DIR", str(tmp_path))
    assert main(["verify", "--device", "cuda:0"]) == 0
    found = record.find(key(GPU))
    assert found.record is not None
    assert [o for o in found.record.outcomes if o.outcome == record.FAILED] == []
    choice.forget()
    try:
        for t in found.record.times:
            fastest = (*found.record.fastest(t.dtype, t.route, record.Cell.of(t.n, t.d)), "torch")[0]
            dtype = getattr(torch, t.dtype)
            assert choice.resolve_backend("auto", GPU, dtype, None, (t.n, t.d), t.route) == fastest
    finally:
        choice.forget()
