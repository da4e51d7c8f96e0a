"""What is checked of one backend, dtype and route, against the plain implementation in float64.

An error is ||x - truth|| / ||truth||. ``LIMITS`` are a few times what the kernels reach; a kernel that is off by a
thousandth has a hundred times as much in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..backends import accelerator
from ..loss import barlow_twins_loss
from ..normalization import CONVENTIONS, Normalization
from ..reference import BarlowTwinsTerms, reference_loss, standardize
from . import ranks
from .guard import GuardBands
from .record import Unit

Check = tuple[str, Callable[[], None]]  # its name, and what raises WrongError

# Odd and even, cut tiles and whole ones, one phase and two, D far above N
SHAPES = ((2, 3), (17, 100), (33, 1001), (130, 520), (300, 77), (600, 1300), (1100, 2304), (32, 16384))
MOST_DIRECT = 4096  # features of the direct route, whose C has their square
SMALL, ODD, MEDIUM = (33, 100), (33, 1001), (130, 520)  # of the checks that take one shape
OF_RANKS = ((34, 100), (130, 520), (64, 2304))
REPEATS = 20
LAMBD = 0.02
LIMITS = {"float32": (5e-6, 1e-5), "bfloat16": (5e-4, 8e-3), "float16": (5e-4, 8e-3)}  # loss and terms, gradients
TF32_LIMITS = (2e-3, 1e-2)
BATCH_NORM = CONVENTIONS["batch_norm"]


class WrongError(Exception):
    """A check has failed; the message says by how much."""


def checks(unit: Unit, device: torch.device) -> Iterator[Check]:
    """A unit's checks, in the order in which they are made."""
    if unit.ranks:
        for n, d in OF_RANKS:
            for segments in (1, 2):
                name = f"N={n} D={d}, two ranks, statistics of {'all' if segments == 1 else 'each'}"
                yield name, functools.partial(_over_ranks, unit, device, n, d, segments)
        return
    for n, d in SHAPES if unit.route == "gram" else [shape for shape in SHAPES if shape[1] <= MOST_DIRECT]:
        yield f"N={n} D={d}", functools.partial(_right, unit, device, n, d)
    for name, convention in CONVENTIONS.items():
        if convention != BATCH_NORM:
            yield f"normalization {name}", functools.partial(_right, unit, device, *MEDIUM, convention)
    yield "large means", functools.partial(_right, unit, device, *MEDIUM, mean=100.0)
    if unit.dtype == "float32" and accelerator.of(device).is_gpu:
        yield "TF32", functools.partial(_tf32, unit, device)
    yield "strided inputs", functools.partial(_strided, unit, device)
    yield "the gradient of one view", functools.partial(_one_view, unit, device)
    for value in ("nan", "inf"):
        yield f"{value} in the inputs", functools.partial(_reaches_the_loss, unit, device, float(value))
    for n, d in (ODD, MEDIUM):
        yield f"memory around N={n} D={d}", functools.partial(_stays_inside, unit, device, n, d)
    yield "the same bits again", functools.partial(_same_bits, unit, device)
    if accelerator.can_capture(device):
        yield "a captured graph", functools.partial(_captured, unit, device)


def inputs(unit: Unit, device: torch.device, n: int, d: int, mean: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two correlated views, each feature with a mean and a deviation of its own."""
    generator = torch.Generator(device).manual_seed(n * d)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    z_a = randn(n, d)
    z_b = z_a + 0.5 * randn(n, d)
    deviation, means = torch.exp(0.3 * randn(d)), mean * randn(d)
    dtype = getattr(torch, unit.dtype)
    return (z_a * deviation + means).to(dtype), (z_b * deviation - means).to(dtype)


def run(
    unit: Unit, z_a: Tensor, z_b: Tensor, convention: Normalization | None = BATCH_NORM
) -> tuple[BarlowTwinsTerms, tuple[Tensor, ...]]:
    """The terms and both gradients, by the unit."""
    a, b = (z.detach().requires_grad_() for z in (z_a, z_b))
    terms = barlow_twins_loss(
        a, b, LAMBD, normalization=convention or "none", backend=unit.backend, route=unit.route, return_terms=True
    )
    return terms, torch.autograd.grad(terms.loss, (a, b))


# Numbers


def _right(
    unit: Unit, device: torch.device, n: int, d: int, convention: Normalization | None = BATCH_NORM, mean: float = 1.0
) -> None:
    z_a, z_b = inputs(unit, device, n, d, mean)
    compare(unit, *run(unit, z_a, z_b, convention), z_a, z_b, convention, LIMITS[unit.dtype])


def _tf32(unit: Unit, device: torch.device) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for n, d in (MEDIUM, SHAPES[5]):
            z_a, z_b = inputs(unit, device, n, d)
            compare(unit, *run(unit, z_a, z_b), z_a, z_b, BATCH_NORM, TF32_LIMITS)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _over_ranks(unit: Unit, device: torch.device, n: int, d: int, segments: int) -> None:
    z_a, z_b = inputs(unit, device, n, d)
    compare(unit, *ranks.run(unit, z_a, z_b, segments, LAMBD), z_a, z_b, BATCH_NORM, LIMITS[unit.dtype], segments)


def compare(
    unit: Unit,
    terms: BarlowTwinsTerms,
    grads: tuple[Tensor, ...],
    z_a: Tensor,
    z_b: Tensor,
    convention: Normalization | None,
    limits: tuple[float, float],  # of the terms, and of the gradients
    segments: int = 1,  # of the samples, each standardised by itself
) -> None:
    """Raises where the terms or the gradients are further from float64's than the limits."""
    n, d = z_a.shape
    where = z_a.device if accelerator.widest(z_a) == torch.float64 else torch.device("cpu")
    a, b = (z.detach().to(where, torch.float64).requires_grad_() for z in (z_a, z_b))
    hats = [torch.cat([standardize(part, convention) for part in z.split(n // segments)]) for z in (a, b)]
    truth = true_loss(*hats)
    true_grads = torch.autograd.grad(truth.loss, (a, b))
    # Off the diagonal Gram takes the difference of two sums; few features can be as alike as rounding makes them
    taken = float((hats[0] * hats[1]).detach().mean(0).square().sum()) if unit.route == "gram" else 0.0
    few = float(d) if n <= 3 or d <= 2 else 0.0
    parts = zip(terms._fields, terms, truth, (few + LAMBD * taken, few, few + taken), strict=True)
    for name, got, true, extra in parts:
        _within(f"{name} is", abs(got.item() - true.item()) / (abs(true.item()) + extra), limits[0])
    least = _size_of_parts(hats, a, b, convention) if n <= max(3, 1 + d / 256) and convention else 0.0
    for name, got, true in zip(("z_a", "z_b"), grads, true_grads, strict=True):
        error = (got.to(true) - true).norm() / max(float(true.norm()), least)
        _within(f"the gradient of {name} is", float(error), limits[1])


def true_loss(a_hat: Tensor, b_hat: Tensor) -> BarlowTwinsTerms:
    """The terms of standardised features in float64: by C, or where it would be large by two (N, N) matrices."""
    n, d = a_hat.shape
    if 2 * n > d:
        return reference_loss(a_hat, b_hat, LAMBD, normalization=None)
    c = (a_hat * b_hat).mean(0)
    on_diag = (c - 1).square().sum()
    off_diag = ((a_hat @ a_hat.T) * (b_hat @ b_hat.T)).sum() / n**2 - c.square().sum()
    return BarlowTwinsTerms(on_diag + LAMBD * off_diag, on_diag, off_diag)


def _size_of_parts(hats: list[Tensor], a: Tensor, b: Tensor, convention: Normalization) -> float:
    """How large the gradient's parts are before they cancel: with D far above N most of it does."""
    inner = [hat.detach().requires_grad_() for hat in hats]
    g = torch.autograd.grad(true_loss(*inner).loss, inner)
    rstd = [convention.rstd(z.detach().var(0, correction=0), len(z)) for z in (a, b)]
    return max(float((x * r).norm()) for x, r in zip(g, rstd, strict=True))


def _within(what: str, error: float, limit: float) -> None:
    if not error <= limit:  # nor NaN
        raise WrongError(f"{what} off by {error:.1e} (accepted: {limit:.0e})")


# What else a caller relies on


def _strided(unit: Unit, device: torch.device) -> None:
    z_a, z_b = inputs(unit, device, *SMALL)
    columns, wide = z_a.T.contiguous().T, torch.cat((z_b, z_b), 1)[:, z_b.shape[1] :]
    shifted = torch.cat((z_b.flatten()[:1], z_b.flatten()))[1:].view_as(z_b)  # not aligned to 16 bytes
    for a, b in ((columns, wide), (z_a, shifted), (shifted, columns)):
        compare(unit, *run(unit, a, b), a, b, BATCH_NORM, LIMITS[unit.dtype])


def _one_view(unit: Unit, device: torch.device) -> None:
    z_a, z_b = inputs(unit, device, *SMALL)
    _, both = run(unit, z_a, z_b)
    for index in range(2):
        pair = [z.detach() for z in (z_a, z_b)]
        pair[index].requires_grad_()
        loss = barlow_twins_loss(*pair, LAMBD, backend=unit.backend, route=unit.route)
        (grad,) = torch.autograd.grad(loss, pair[index])
        error = (grad - both[index]).double().norm() / both[index].double().norm()
        _within(f"the gradient of {('z_a', 'z_b')[index]} alone is", float(error), LIMITS[unit.dtype][1])


def _reaches_the_loss(unit: Unit, device: torch.device, value: float) -> None:
    z_a, z_b = inputs(unit, device, *SMALL)
    z_a[3, 5] = value
    terms, _ = run(unit, z_a, z_b)
    if bool(terms.loss.isfinite()):
        raise WrongError(f"the loss is {float(terms.loss):g}, which hides it")


def _stays_inside(unit: Unit, device: torch.device, n: int, d: int) -> None:
    z_a, z_b = inputs(unit, device, n, d)
    with GuardBands() as bands:
        terms, grads = run(unit, bands.around(z_a), bands.around(z_b))
        del terms, grads
    if broken := bands.broken():
        raise WrongError(f"{broken} bytes beside the tensors were written over")


def _same_bits(unit: Unit, device: torch.device) -> None:
    """Again and again, on a GPU while another stream keeps it busy."""
    z_a, z_b = inputs(unit, device, *MEDIUM)
    first = _flat(*run(unit, z_a, z_b))
    with _Busy(device) as busy:
        for _ in range(REPEATS):
            busy.more()
            if not torch.equal(_flat(*run(unit, z_a, z_b)), first):
                raise WrongError("the same inputs gave different bits")


def _captured(unit: Unit, device: torch.device) -> None:
    """Replayed with other inputs, a captured call gives what it gives when called."""
    z_a, z_b = inputs(unit, device, *MEDIUM)
    want = _flat(*run(unit, z_b, z_a))
    with accelerator.capture(device) as graph:
        terms, grads = run(unit, z_a, z_b)
    swapped = z_a.clone()
    z_a.copy_(z_b)
    z_b.copy_(swapped)
    for _ in range(2):
        graph.replay()
        accelerator.synchronize(device)
        if not torch.equal(_flat(terms, grads), want):
            raise WrongError("a replayed graph gives another result than a call")


def _flat(terms: BarlowTwinsTerms, grads: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in (*terms, *grads)]).view(torch.int64)


class _Busy:
    """A second stream of a GPU with work on it; nothing elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None

    def __enter__(self) -> _Busy:
        if accelerator.of(self._device).is_gpu:
            self._stream = accelerator.module(self._device).Stream(self._device)
            self._x = torch.zeros(2048, 2048, device=self._device)
        return self

    def more(self) -> None:
        if self._stream is not None:
            with accelerator.module(self._device).stream(self._stream):
                torch.mm(self._x, self._x)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()
