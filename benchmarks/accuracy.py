"""The float64 truth, and the verdict on a method's loss and gradients.

The truth is ``barlow_fused.reference.reference_loss`` in float64 with autograd. Its (D, D) matrices outgrow any machine
as D grows; beyond that the truth is ``gram_truth``, the same number through (N, N) matrices, written here independently
of the package: only K_a, K_b and one slab of columns exist at a time, and each slab's gradient is autograd's.

A method is right when its relative errors, |loss - truth| / |truth| and the larger of the two gradients'
||g - truth|| / ||truth||, are within

    dtype       loss    gradient   the usual implementation reaches about
    float64     1e-12   1e-10      1e-15, 4e-15
    float32     1e-5    1e-4       3e-7,  1e-6
    bfloat16    2e-2    1e-1       5e-3,  1e-2 to 8e-2   (it rounds C itself)
    float16     1e-2    5e-2       4e-4,  1e-3

float16 gradients are taken of the loss times 1024 and divided again, as a GradScaler does in training.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from barlow_fused.reference import reference_loss

from .peers import EPS, LAMBD, LossFunction

TOLERANCES = {  # dtype -> (loss, gradient)
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-2, 1e-1),
    torch.float16: (1e-2, 5e-2),
}
GRAD_SCALES = {torch.float16: 1024.0}
SLAB_ELEMENTS = 2**22  # of a slab of columns in gram_truth: 32 MiB


@dataclasses.dataclass(frozen=True)
class Truth:
    """The loss and its two gradients in float64."""

    method: str  # "reference", "gram" or "own" (of a method that is not the same loss)
    loss: float
    grads: tuple[Tensor, Tensor]  # [N, D] each


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A method's loss, its errors relative to the truth, and what is wrong with them (None: nothing)."""

    loss: float
    loss_error: float
    grad_errors: tuple[float, float]
    wrong: str | None


def gradients(loss: Tensor, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
    """The backward pass, in float16 of the scaled loss (``GRAD_SCALES``)."""
    scale = GRAD_SCALES.get(z_a.dtype)
    return torch.autograd.grad(loss, (z_a, z_b), None if scale is None else torch.full_like(loss, scale))


def find_truth(z_a: Tensor, z_b: Tensor, free_bytes: float) -> Truth:
    """The truth for these inputs, by the reference where its matrices fit into ``free_bytes``.

    Raises:
        MemoryError: even the (N, N) matrices and the float64 gradients would not fit.
    """
    n, d = z_a.shape
    if 8 * (6 * d * d + 8 * n * d) <= free_bytes:
        return reference_truth(z_a, z_b)
    needed = 8 * (4 * n * n + 2 * n * d) + 10 * 8 * min(SLAB_ELEMENTS, n * d)
    if needed > free_bytes:
        raise MemoryError(f"the float64 truth needs {needed / 1e9:.3g} GB, {free_bytes / 1e9:.3g} GB are free")
    return gram_truth(z_a, z_b)


def own_truth(loss_function: LossFunction, z_a: Tensor, z_b: Tensor) -> Truth:
    """What another loss should be: its own formula in float64."""
    views = tuple(z.detach().double().requires_grad_() for z in (z_a, z_b))
    loss = loss_function(*views)
    return Truth("own", loss.item(), torch.autograd.grad(loss, views))


def reference_truth(z_a: Tensor, z_b: Tensor) -> Truth:
    """The package's own oracle in float64."""
    views = tuple(z.detach().double().requires_grad_() for z in (z_a, z_b))
    loss = reference_loss(*views, lambd=LAMBD).loss
    return Truth("reference", loss.item(), torch.autograd.grad(loss, views))


def gram_truth(z_a: Tensor, z_b: Tensor) -> Truth:
    """The loss through ||C||_F^2 = <K_a, K_b> / N^2 in float64, over slabs of columns.

    W_a and W_b, the gradients with respect to K_a and K_b, come from autograd over (N, N) matrices. With them fixed,
    <W_a, A_hat A_hat^T> has the same gradient with respect to A_hat as the whole Frobenius term.
    """
    n, d = z_a.shape
    views = z_a.detach(), z_b.detach()
    slabs = [slice(start, start + max(1, SLAB_ELEMENTS // n)) for start in range(0, d, max(1, SLAB_ELEMENTS // n))]
    k = torch.zeros(2, n, n, dtype=torch.float64, device=z_a.device)
    for s in slabs:
        for view, z in enumerate(views):
            x = _batch_norm(z[:, s].double())
            k[view].addmm_(x, x.T)
    k.requires_grad_()
    frobenius = LAMBD * (k[0] * k[1]).sum() / n**2
    (w,) = torch.autograd.grad(frobenius, k)
    loss = frobenius.item()
    grads = tuple(torch.empty(n, d, dtype=torch.float64, device=z_a.device) for _ in range(2))
    for s in slabs:
        slab = [z[:, s].double().requires_grad_() for z in views]
        a_hat, b_hat = map(_batch_norm, slab)
        c = (a_hat * b_hat).mean(0)
        diagonal = ((c - 1) ** 2 - LAMBD * c**2).sum()
        through_k = (a_hat * (w[0] @ a_hat)).sum() + (b_hat * (w[1] @ b_hat)).sum()
        for grad, part in zip(grads, torch.autograd.grad(diagonal + through_k, slab), strict=True):
            grad[:, s] = part
        loss += diagonal.item()
    return Truth("gram", loss, grads)


def _batch_norm(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    return centred * ((centred**2).mean(0) + EPS) ** -0.5


def check(loss_function: LossFunction, z_a: Tensor, z_b: Tensor, truth: Truth) -> Accuracy:
    """One forward and backward pass, against the truth."""
    loss = loss_function(z_a, z_b)
    grads = gradients(loss, z_a, z_b)
    return judge(loss, grads, truth, z_a.dtype)


def judge(loss: Tensor, grads: tuple[Tensor, ...], truth: Truth, dtype: torch.dtype) -> Accuracy:
    """Errors and verdict; a NaN is never right."""
    loss_limit, grad_limit = TOLERANCES[dtype]
    loss_error = abs(loss.item() - truth.loss) / abs(truth.loss)
    grad_errors = tuple(_error(g, t, GRAD_SCALES.get(dtype, 1.0)) for g, t in zip(grads, truth.grads, strict=True))
    wrong = None
    worst = math.nan if any(map(math.isnan, grad_errors)) else max(grad_errors)
    if not worst <= grad_limit:
        wrong = f"wrong: grad error {worst:.1e} (allowed {grad_limit:.0e})"
    elif not loss_error <= loss_limit:
        wrong = f"wrong: loss error {loss_error:.1e} (allowed {loss_limit:.0e})"
    return Accuracy(loss.item(), loss_error, grad_errors, wrong)


def _error(grad: Tensor, truth: Tensor, scale: float) -> float:
    difference = grad.double().div_(scale).sub_(truth) if grad.dtype != torch.float64 else grad / scale - truth
    return (difference.norm() / truth.norm()).item()
