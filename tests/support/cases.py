"""What the tests share: the shapes, dtypes and tolerances to test, the inputs, and the oracle's answer in float64."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from barlow_fused.normalization import CONVENTIONS, Normalization
from barlow_fused.reference import reference_loss, standardize

# With ATEN_CPU_CAPABILITY=default inductor writes code for vectors that PyTorch then does not have
inductor = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs a CPU whose vectors PyTorch uses"
)

SHAPES = [(n, d) for n in (2, 3, 17, 64, 255) for d in (1, 2, 31, 256, 1000, 4097)]
SMALL_SHAPES = [(2, 3), (5, 1), (17, 31), (33, 100), (40, 12), (300, 7)]
ROUTES = ("gram", "direct")
NORMALIZATIONS: dict[str, Normalization | None] = {
    **CONVENTIONS,
    "unbiased batch norm": Normalization(correction=1, eps=1e-3),
    "biased deviation": Normalization(correction=0, eps=1e-4, eps_added_to="deviation"),
}

# ||x - ref|| / ||ref|| against float64: (loss and terms, gradients)
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-4, 5e-3),
    torch.float16: (1e-4, 5e-3),
}


class Answer(NamedTuple):
    """The loss, its terms, and the gradients with respect to both inputs."""

    loss: Tensor
    on_diag: Tensor
    off_diag: Tensor
    grad_a: Tensor
    grad_b: Tensor


def views(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two correlated views, each feature with a mean and a deviation of its own."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z_a = randn(n, d)
    z_b = z_a + 0.5 * randn(n, d)
    deviation, mean = torch.exp(0.3 * randn(d)), randn(d)
    return (z_a * deviation + mean).to(dtype), (z_b * deviation - mean).to(dtype)


def oracle(
    z_a: Tensor, z_b: Tensor, normalization: Normalization | None = CONVENTIONS["batch_norm"], **kwargs
) -> Answer:
    """The plain implementation's answer in float64, by autograd; the last one is kept for the next route."""
    inputs = tuple(hashlib.sha256(z.detach().cpu().contiguous().view(torch.uint8).numpy()).digest() for z in (z_a, z_b))
    key = (*inputs, z_a.shape, z_a.dtype, normalization, tuple(kwargs.items()))
    if key not in _answers:
        _answers.clear()
        _answers[key] = _oracle(z_a, z_b, normalization, **kwargs)
    return _answers[key]


_answers: dict[tuple, Answer] = {}


def similar_views(n: int, d: int, dtype: torch.dtype, difference: float = 0.02) -> tuple[Tensor, Tensor]:
    """Two views of deviation 1 that differ by that much."""
    generator = torch.Generator().manual_seed(0)
    z_a = torch.randn(n, d, generator=generator)
    z_b = z_a + difference * torch.randn(n, d, generator=generator)
    return z_a.to(dtype), z_b.to(dtype)


def wide_oracle(
    z_a: Tensor, z_b: Tensor, normalization: Normalization = CONVENTIONS["batch_norm"], lambd: float = 0.0051
) -> Answer:
    """The answer in float64 where C would be too large: autograd through N x N matrices, the same number."""
    n, columns = z_a.shape[0], 4096
    a, b = (z.detach().double().requires_grad_() for z in (z_a, z_b))
    a_hat, b_hat = (standardize(z, normalization) for z in (a, b))
    c = (a_hat * b_hat).mean(0)
    k_a, k_b = (sum(part @ part.T for part in x.split(columns, 1)) for x in (a_hat, b_hat))
    on_diag, off_diag = (c - 1).square().sum(), (k_a * k_b).sum() / n**2 - c.square().sum()
    loss = on_diag + lambd * off_diag
    return Answer(*(t.detach() for t in (loss, on_diag, off_diag)), *torch.autograd.grad(loss, (a, b)))


def _oracle(z_a: Tensor, z_b: Tensor, normalization: Normalization | None, **kwargs) -> Answer:
    a, b = (z.detach().double().cpu().requires_grad_() for z in (z_a, z_b))
    terms = reference_loss(a, b, normalization=normalization, **kwargs)
    return Answer(*(t.detach() for t in terms), *torch.autograd.grad(terms.loss, (a, b)))


def answer(loss, z_a: Tensor, z_b: Tensor) -> Answer:
    """What ``loss(z_a, z_b)``, a function that returns the three terms, and autograd say."""
    a, b = (z.detach().requires_grad_() for z in (z_a, z_b))
    terms = loss(a, b)
    return Answer(*(t.detach() for t in terms), *torch.autograd.grad(terms.loss, (a, b)))


def error(x: Tensor, ref: Tensor, at_least: float = 0.0) -> float:
    """||x - ref|| / ||ref||; ``at_least`` is the size that a ref which is itself a small difference is measured by."""
    x, ref = x.detach().double().cpu(), ref.double().cpu()
    size = max(ref.norm().item(), at_least)
    return ((x - ref).norm() / size).item() if size else x.norm().item()


def gradient_size(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> float:
    """How large the gradient's parts are before they cancel: ||rstd * dL/dz_hat||.

    With D much larger than N, A_hat lies close to the directions that the normalisation projects out, and most of the
    gradient cancels. With N = 2 all of it does: every standardised feature is +-1 whatever the inputs are. No
    implementation has more correct digits than the parts allow.
    """
    if normalization is None:
        return 0.0
    centred = [z.double() - z.double().mean(0) for z in (z_a, z_b)]
    rstd = [normalization.rstd(x.square().mean(0), len(x)) for x in centred]
    hats = [x * r for x, r in zip(centred, rstd, strict=True)]
    g = oracle(*hats, normalization=None)
    return max((g.grad_a * rstd[0]).norm().item(), (g.grad_b * rstd[1]).norm().item())


def assert_close(got: Answer, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, **kwargs) -> None:
    """Within the tolerance of the inputs' dtype of the float64 oracle on the same inputs."""
    ref = oracle(z_a, z_b, normalization, **kwargs)
    n, d = z_a.shape
    loss_tolerance, grad_tolerance = TOLERANCE[z_a.dtype]
    size = gradient_size(z_a, z_b, normalization) if n <= max(3, 1 + d / 256) else 0.0
    count = d if n <= 3 or d <= 2 else 0  # (C_ii - 1)^2 of very few features can be as small as rounding makes it
    errors = {
        "loss": error(got.loss, ref.loss, at_least=count * kwargs.get("scale", 1.0)) / loss_tolerance,
        "on_diag": error(got.on_diag, ref.on_diag, at_least=count) / loss_tolerance,
        "off_diag": error(got.off_diag, ref.off_diag, at_least=count) / loss_tolerance,
        "grad_a": error(got.grad_a, ref.grad_a, at_least=size) / grad_tolerance,
        "grad_b": error(got.grad_b, ref.grad_b, at_least=size) / grad_tolerance,
    }
    wrong = {name: f"{value:.2g} of the tolerance" for name, value in errors.items() if not value <= 1}
    assert not wrong, f"{wrong} at N={n} D={d} {z_a.dtype} {normalization}"
