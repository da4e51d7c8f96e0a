"""What the tests that need a GPU share: the GPU, inputs and the truth at size, and the kinds of calls."""

from __future__ import annotations

import functools

import pytest
import torch

from barlow_fused import barlow_twins_loss
from benchmarks import precompile

GPU = torch.device("cuda", 0)
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability(GPU) >= (8, 0)
LAMBD, EPS = 0.0051, 1e-5
KINDS = [(c.n, c.d, c.route, getattr(torch, c.dtype), c.convention) for c in precompile.KINDS]


def gpu(test):
    """A test that needs a GPU."""
    skip = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU of compute capability >= 8.0")
    return pytest.mark.gpu(skip(test))


def need_memory(n, d, dtype, arrays, doubles=5):
    """Skip where ``arrays`` of (n, d) in the inputs' dtype and ``doubles`` in float64 do not fit onto the GPU."""
    needed = n * d * (arrays * dtype.itemsize + doubles * 8)
    free = torch.cuda.mem_get_info(GPU)[0] + torch.cuda.memory_reserved(GPU) - torch.cuda.memory_allocated(GPU)
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


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


def call(backend, route="gram", normalization="batch_norm"):
    """The loss, with its terms, by that backend."""
    options = {"backend": backend, "route": route, "normalization": normalization}
    return functools.partial(barlow_twins_loss, return_terms=True, **options)


def leaves(n, d, dtype):
    return [z.requires_grad_() for z in gpu_views(n, d, dtype)]


def step(loss, z_a, z_b):
    """The terms and the gradients, as one list of tensors."""
    terms = loss(z_a, z_b)
    return [*(t.detach() for t in terms), *torch.autograd.grad(terms.loss, (z_a, z_b))]


def same(got, want):
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
