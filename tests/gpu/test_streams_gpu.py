"""On a GPU: other devices, streams, threads and graphs than the first, and what is measured or compiled on the way."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import answer, error
from on_gpu import GPU, HAS_GPU, KINDS, call, gpu, gpu_views, gram_truth, leaves, same, step
from subprocesses import ROOT, environment

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import why_unusable
from benchmarks import precompile

LIMITS = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-4, 5e-3), torch.float16: (1e-4, 5e-3)}


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """The backend's name."""
    if not HAS_GPU:
        pytest.skip("needs a CUDA GPU of compute capability >= 8.0")
    reason = why_unusable(request.param, GPU)
    if reason is not None:
        pytest.skip(reason)
    return request.param


# Devices and streams


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("n", "d", "dtype"), [(256, 8192, torch.bfloat16), (1024, 8192, torch.bfloat16)])
def test_a_second_device(backend, n, d, dtype):
    """While the first is the current one, which it stays."""
    reason = why_unusable(backend, torch.device("cuda", 1))
    if reason is not None:
        pytest.skip(reason)
    z_a, z_b = (z.to("cuda:1") for z in gpu_views(n, d, dtype))
    torch.cuda.set_device(0)
    got = answer(call(backend), z_a, z_b)
    assert torch.cuda.current_device() == 0
    assert got.grad_a.device == torch.device("cuda", 1)
    ref = gram_truth(z_a, z_b)
    assert error(got.loss, ref[0]) < LIMITS[dtype][0]
    for x, want in ((got.grad_a, ref[1]), (got.grad_b, ref[2])):
        assert ((x.double() - want).norm() / want.norm()).item() < LIMITS[dtype][1]


@gpu
@pytest.mark.parametrize(("n", "d", "route", "dtype", "normalization"), KINDS)
def test_a_stream_that_is_not_the_default(backend, n, d, route, dtype, normalization):
    """All launches go there: its own work before is waited for, and the default stream is free to do another's."""
    loss = call(backend, route, normalization)
    z_a, z_b = leaves(n, d, dtype)
    want = step(loss, z_a, z_b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.zeros(4096, 4096, device=GPU)
    with torch.cuda.stream(stream), torch.no_grad():
        late = [torch.full_like(z, torch.nan) for z in (z_a, z_b)]
        for _ in range(20):
            busy = busy @ busy  # what comes too early reads NaN
        for z, value in zip(late, (z_a, z_b), strict=True):
            z.copy_(value)
    with torch.cuda.stream(stream):
        got = step(loss, *(z.requires_grad_() for z in late))
    torch.cuda.current_stream().wait_stream(stream)
    assert same(got, want)


@gpu
@pytest.mark.parametrize(("n", "d", "route", "dtype", "normalization"), KINDS)
def test_the_same_bits_while_another_stream_keeps_the_gpu_busy(backend, n, d, route, dtype, normalization):
    """Twenty times: programs arrive in another order each time."""
    loss = call(backend, route, normalization)
    z_a, z_b = leaves(n, d, dtype)
    want = step(loss, z_a, z_b)
    side = torch.cuda.Stream()
    x = torch.zeros(2048, 2048, device=GPU)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(side):
            for _ in range(4):
                torch.mm(x, x)
        assert same(step(loss, z_a, z_b), want)
    torch.cuda.synchronize()


# Graphs


@gpu
@pytest.mark.parametrize(("n", "d", "route", "dtype", "normalization"), KINDS)
def test_every_kind_of_call_is_captured_and_replayed(backend, n, d, route, dtype, normalization):
    loss = call(backend, route, normalization)
    z_a, z_b = leaves(n, d, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(loss, z_a, z_b)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, z_a, z_b)
    for seed in range(2):
        with torch.no_grad():
            z_a.copy_(torch.randn(n, d, device=GPU, generator=torch.Generator(GPU).manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, step(loss, z_a, z_b))


@gpu
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
@pytest.mark.parametrize(("n", "d", "route"), [(256, 8192, "gram"), (2048, 1024, "direct")])
def test_torch_compile_with_reduced_overhead(backend, n, d, route):
    """CUDA graphs of PyTorch's making, through the whole step."""
    z_a, z_b = leaves(n, d, torch.bfloat16)

    def loss(a, b):
        return barlow_twins_loss(2 * a, b, backend=backend, route=route)

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    try:
        for seed in range(5):  # warmed up, recorded, replayed
            with torch.no_grad():
                z_a.copy_(torch.randn(n, d, device=GPU, generator=torch.Generator(GPU).manual_seed(seed)))
            torch.compiler.cudagraph_mark_step_begin()
            value = compiled(z_a, z_b)
            got = [value.detach().clone(), *(g.clone() for g in torch.autograd.grad(value, (z_a, z_b)))]
            value = loss(z_a, z_b)
            want = [value.detach(), *torch.autograd.grad(value, (z_a, z_b))]
            assert same(got, want)
    finally:
        torch.compiler.reset()


def script(text):
    """Run in a new process, in which nothing was launched yet."""
    head = """
        import torch
        from barlow_fused import barlow_twins_loss
        from on_gpu import GPU, KINDS, call, leaves, same, step
    """
    code = textwrap.dedent(head) + textwrap.dedent(text)
    return subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)


WARM_UP_THEN_CAPTURE = """
    from barlow_fused.backends import cuda_backend
    x = torch.ones(8, device=GPU, requires_grad=True)
    torch.autograd.grad((x * x).sum(), x)  # autograd's thread
    inputs = [leaves(n, d, dtype) for n, d, _, dtype, _ in KINDS]
    count = cuda_backend.warm_up(GPU)
    assert count > 0
    torch.cuda.synchronize()
    for (n, d, route, dtype, normalization), (z_a, z_b) in zip(KINDS, inputs, strict=True):
        loss = call("cuda", route, normalization)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(loss, z_a, z_b)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, step(loss, z_a, z_b)), (n, d, route, dtype)
"""


@gpu
def test_after_warm_up_every_kernel_can_be_captured_at_its_first_call():
    reason = why_unusable("cuda", GPU)
    if reason is not None:
        pytest.skip(reason)
    done = script(WARM_UP_THEN_CAPTURE)
    assert done.returncode == 0, done.stderr


# Triton


def need_triton():
    reason = why_unusable("triton", GPU)
    if reason is not None:
        pytest.skip(reason)


TMA_IN_AUTOGRADS_THREAD = """
    import os, threading
    from barlow_fused.backends import accelerator, triton_backend, triton_launch
    made = []
    descriptor = triton_launch._descriptor
    triton_launch._descriptor = lambda *args: (made.append(threading.get_ident()), descriptor(*args))[1]
    loss = call("triton")
    z_a, z_b = leaves(1024, 8192, torch.bfloat16)
    os.environ["BARLOW_FUSED_TRITON_TMA"] = "0"
    terms = loss(z_a, z_b)
    assert not made
    os.environ["BARLOW_FUSED_TRITON_TMA"] = "1"
    got = torch.autograd.grad(terms.loss, (z_a, z_b))
    torch.cuda.synchronize()
    assert made and threading.get_ident() not in made, made
    triton_backend.forget()
    os.environ["BARLOW_FUSED_TRITON_TMA"] = "0"
    want = torch.autograd.grad(loss(z_a, z_b).loss, (z_a, z_b))
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y.double()).norm() / y.double().norm() < 5e-3
"""


@gpu
def test_tensor_descriptors_first_made_in_autograds_thread():
    need_triton()
    if torch.cuda.get_device_capability(GPU) < (9, 0) or torch.cuda.get_device_capability(GPU) >= (12, 0):
        pytest.skip("needs a GPU with a tensor memory accelerator")
    done = script(TMA_IN_AUTOGRADS_THREAD)
    assert done.returncode == 0, done.stderr


@gpu
@pytest.mark.parametrize(("n", "d", "route"), [(128, 1024, "gram"), (256, 128, "direct")])
def test_autotuning_changes_no_number(n, d, route, monkeypatch):
    """Each product is run with six choices of warps and stages, and is right with the one that was taken."""
    need_triton()
    from barlow_fused.backends import triton_backend

    loss = call("triton", route)
    z_a, z_b = leaves(n, d, torch.float32)
    want = step(loss, z_a, z_b)
    monkeypatch.setenv("BARLOW_FUSED_TRITON_AUTOTUNE", "1")
    triton_backend.forget()
    try:
        got = step(loss, z_a, z_b)
        assert all(error(x, y) < 4e-6 for x, y in zip(got, want, strict=True))
        assert same(step(loss, z_a, z_b), got)
    finally:
        monkeypatch.undo()
        triton_backend.forget()


def test_the_kinds_are_every_kernel():
    """Of Triton's, on an H200: what is captured above is all that there is."""
    kernels = pytest.importorskip("benchmarks.kernels", reason="needs the package triton")
    if kernels.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled")
    from barlow_fused.normalization import CONVENTIONS

    launched = itertools.chain.from_iterable(
        kernels.launches_of(90, n, d, dtype, route, CONVENTIONS[name]) for n, d, route, dtype, name in KINDS
    )
    assert {launch.name for launch in launched} == set(kernels.KERNELS)


def test_what_compute_sanitizer_runs(monkeypatch):
    """Its script, on the CPU, where PyTorch's operators play the backends."""
    import small_shapes_on_gpu

    from barlow_fused.backends.triton_kernels import configs

    called = []

    def loss(*args, backend, **options):
        called.append(backend)
        return barlow_twins_loss(*args, backend="torch", **options)

    monkeypatch.setattr(configs, "FLOAT32_ELEMENTS", configs.FLOAT32_ELEMENTS)  # which it changes
    monkeypatch.setattr(small_shapes_on_gpu, "why_unusable", lambda *args: None)
    monkeypatch.setattr(small_shapes_on_gpu, "barlow_twins_loss", loss)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for backend in ("cuda", "triton"):
        small_shapes_on_gpu.main([backend])
    assert called.count("triton") == len(precompile.SANITIZED)
    assert called.count("cuda") == len(small_shapes_on_gpu.EVERY) == 72
    with pytest.raises(SystemExit):
        small_shapes_on_gpu.main(["torch"])
