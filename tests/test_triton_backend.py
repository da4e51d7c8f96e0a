"""The Triton backend against the float64 oracle: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import why_unusable
from barlow_fused.plan import plan

GPU = torch.device("cuda", 0)
HAS_GPU = torch.cuda.is_available() and why_unusable("triton", GPU) is None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAMBD, EPS = 0.0051, 1e-5
SIZES = [  # (n, d, route)
    (256, 8192, "gram"),
    (2048, 8192, "gram"),
    (1024, 65536, "gram"),
    (2048, 65536, "gram"),
    (2048, 262144, "gram"),
    (8192, 2048, "direct"),
]


def gpu(test):
    """A test that needs a GPU."""
    skip = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU of compute capability >= 8.0, and Triton")
    return pytest.mark.gpu(skip(test))


def need_memory(n, d, dtype, arrays):
    """Skip where ``arrays`` of (n, d) in the inputs' dtype and five in float64 do not fit onto the GPU."""
    needed = n * d * (arrays * dtype.itemsize + 5 * 8)
    free = torch.cuda.mem_get_info(GPU)[0] + torch.cuda.memory_reserved(GPU) - torch.cuda.memory_allocated(GPU)
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


def triton_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="triton", return_terms=True, **kwargs)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_in_the_interpreter():
    """All kernels, on shapes, dtypes and conventions: triton_interpreter_checks.py, with none of its tests left out."""
    checks = pathlib.Path(__file__).with_name("triton_interpreter_checks.py")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x", checks]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=checks.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert re.match(r"\d+ passed", summary), summary
    assert "skipped" not in summary


def test_float64_is_left_to_pytorch():
    for device in (GPU, torch.device("cpu")):
        assert "float64" in why_unusable("triton", device, torch.float64)


# On a GPU


def gram_truth(z_a, z_b):
    """(loss, grad_a, grad_b) in float64 without a (D, D) matrix: a slab of columns at a time, by autograd."""
    n, d = z_a.shape
    slabs = [slice(start, start + 1024) for start in range(0, d, 1024)]

    def hat(z):
        z = z - z.mean(0)
        return z * (z.square().mean(0) + EPS).rsqrt()

    k_a, k_b = (sum(x @ x.T for x in (hat(z[:, s].double()) for s in slabs)) for z in (z_a, z_b))
    loss = LAMBD * (k_a * k_b).sum() / n**2
    grads = torch.empty(2, n, d, dtype=torch.float64, device=z_a.device)
    for s in slabs:
        a, b = (z[:, s].double().requires_grad_() for z in (z_a, z_b))
        a_hat, b_hat = hat(a), hat(b)
        c = (a_hat * b_hat).mean(0)
        diagonal = ((c - 1).square() - LAMBD * c.square()).sum()
        through_k = (k_b @ a_hat * a_hat).sum() + (k_a @ b_hat * b_hat).sum()
        grads[0, :, s], grads[1, :, s] = torch.autograd.grad(diagonal + LAMBD / n**2 * through_k, (a, b))
        loss += diagonal.detach()
    return loss, grads[0], grads[1]


def gpu_views(n, d, dtype):
    generator = torch.Generator(GPU).manual_seed(0)
    z_a = torch.randn(n, d, device=GPU, generator=generator)
    z_b = z_a + 0.5 * torch.randn(n, d, device=GPU, generator=generator)
    mean = torch.randn(d, device=GPU, generator=generator)
    return (z_a + mean).to(dtype), (z_b - mean).to(dtype)


def test_gram_truth_is_the_oracle():
    z_a, z_b = views(20, 1100)
    got, ref = gram_truth(z_a, z_b), oracle(z_a, z_b)
    assert error(got[0], ref.loss) < 1e-12
    assert error(got[1], ref.grad_a) < 1e-10
    assert error(got[2], ref.grad_b) < 1e-10


@gpu
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize(("n", "d"), [(17, 256), (64, 1000), (255, 4097), (300, 2000), (1100, 2304)])
def test_accuracy(n, d, normalization, dtype, route):
    z_a, z_b = (z.to(GPU) for z in views(n, d, dtype))
    loss = triton_loss(route=route, normalization=normalization if normalization is not None else "none")
    assert_close(answer(loss, z_a, z_b), z_a, z_b, normalization)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "route"), SIZES)
def test_accuracy_at_size(n, d, route, dtype):
    need_memory(n, d, dtype, arrays=9)
    z_a, z_b = gpu_views(n, d, dtype)
    got, ref = answer(triton_loss(route=route), z_a, z_b), gram_truth(z_a, z_b)
    assert error(got.loss, ref[0]) < (1e-6 if dtype == torch.float32 else 1e-4)
    for x, want in ((got.grad_a, ref[1]), (got.grad_b, ref[2])):  # on the GPU: these are gigabytes
        assert ((x.double() - want).norm() / want.norm()).item() < (2e-6 if dtype == torch.float32 else 5e-3)


@gpu
def test_offsets_beyond_32_bits():
    """C has D^2 > 2^31 elements, and the partial sums of its rows many; 2 N D > 2^31 is among the sizes above."""
    n, d = 64, 65536
    need_memory(d, d, torch.bfloat16, arrays=1)
    z_a, z_b = gpu_views(n, d, torch.bfloat16)
    got, ref = answer(triton_loss(route="direct"), z_a, z_b), gram_truth(z_a, z_b)
    assert error(got.loss, ref[0]) < 1e-3
    for x, want in ((got.grad_a, ref[1]), (got.grad_b, ref[2])):  # far from where this route is taken
        assert ((x.double() - want).norm() / want.norm()).item() < 2e-2


@gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_obeys_pytorchs_switch(precision):
    before = torch.get_float32_matmul_precision()
    z_a, z_b = gpu_views(512, 4096, torch.float32)
    ref = gram_truth(z_a, z_b)
    try:
        torch.set_float32_matmul_precision(precision)
        got = answer(triton_loss(route="gram"), z_a, z_b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(got.grad_a, ref[1]) < (2e-6 if precision == "highest" else 2e-3)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "route"), [*SIZES, (2048, 1024, "direct")])
def test_same_input_same_bits(n, d, route, dtype):
    need_memory(n, d, dtype, arrays=13)
    z_a, z_b = gpu_views(n, d, dtype)
    first = answer(triton_loss(route=route), z_a, z_b)
    for _ in range(20):
        again = answer(triton_loss(route=route), z_a, z_b)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@gpu
@pytest.mark.parametrize(("n", "d", "route"), [*SIZES, (2048, 1024, "direct")])
def test_cuda_graph(n, d, route):
    need_memory(n, d, torch.bfloat16, arrays=13)
    z_a, z_b = (z.requires_grad_() for z in gpu_views(n, d, torch.bfloat16))
    loss = triton_loss(route=route)

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
def test_peak_memory(n, d, route, dtype):
    """At most 2 N D numbers and 3 min(N, D)^2 float32 beyond inputs and gradients, as ``plan`` says."""
    need_memory(n, d, dtype, arrays=9)
    z_a, z_b = (z.requires_grad_() for z in gpu_views(n, d, dtype))
    triton_loss(route=route)(z_a, z_b).loss.backward()
    z_a.grad = z_b.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # as asked for, before the allocator rounds up
    triton_loss(route=route)(z_a, z_b).loss.backward()
    gradients = 2 * n * d * dtype.itemsize
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - gradients
    assert used <= 2 * n * d * dtype.itemsize + 3 * min(n, d) ** 2 * 4
    made = plan(n, d, dtype, device=GPU, route=route, backend="triton")
    assert used == pytest.approx(made.fused.peak_memory, rel=0.01, abs=2**16)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says PyTorch
def test_backward_does_not_wait_for_the_gpu():
    z_a, z_b = (z.requires_grad_() for z in gpu_views(256, 8192, torch.bfloat16))
    triton_loss()(z_a, z_b).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_loss()(z_a, z_b).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
