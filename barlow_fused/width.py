"""λ for every width: what the projector's width D and the batch size N make of the loss's λ.

Features that are centred over N samples span at most N - 1 dimensions, so C = Â^T B̂ / N has rank N - 1 or less, and
its trace is bounded by its norm: (sum_i C_ii)^2 <= (N - 1) ||C||_F^2. The off-diagonal sum ||C||_F^2 - sum_i C_ii^2
therefore is at least (sum_i C_ii)^2 / (N - 1) - sum_i C_ii^2. For C_ii of mean c and 0 <= λ <= 1,

    loss >= D ((1 - c)^2 + κ c^2)        κ = λ (D / (N - 1) - 1)

whatever the single C_ii are: the bound is convex in them and the same for all, so equal C_ii are best. Its minimum
over c is the floor, D κ / (1 + κ), where C_ii = 1 / (1 + κ). No network, data or training gets below it, and two views
that are free to choose get there. So κ, not λ, says how hard the off-diagonal sum pulls the diagonal down, and carries
a setting from one N and D to another.

N counts the samples whose mean is taken. With several processes those are all samples (statistics="global"). With
statistics="local", C is the mean of P matrices of rank n_r - 1, so N - P takes the place of N - 1: give n = N - P + 1.
A loss without a group is each process's own, and N its own samples. The projector's last linear layer adds no rank:
where its input is narrower than N - 1, that width takes the place of N - 1. ``normalization="none"`` has a floor only
where the inputs are centred.

The rank argument is that of Garrido et al. 2022 (arXiv 2206.02574); docs/width.md says what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from .scalars import finite, integer

KAPPA_WARNING = 0.5  # C_ii is pulled to 2/3


class LossFloor(NamedTuple):
    """The loss that nothing gets below, and where it lies.

    Attributes:
        loss: The whole loss with ``scale=1``; multiply it by your scale.
        c_ii: The mean of C_ii there.
    """

    loss: float  # of the whole loss with scale 1; multiply by scale
    c_ii: float  # the mean of C_ii there


def suggest_lambda(n: int, d: int, kappa: float = 0.02) -> float:
    """The λ for N samples and D features: κ / (D / (N - 1) - 1).

    >>> BarlowTwinsLoss(lambd=suggest_lambda(n=256, d=65536))  # λ = 7.8e-05

    The formula grows without bound as D falls to N - 1, where the rank no longer limits λ. So below D = 2 (N - 1) λ
    stays at ``kappa``.

    Args:
        n: Samples N >= 2 of a batch, of all processes together.
        d: Features D >= 1, the projector's output width.
        kappa: κ >= 0, without unit. The official setting has 0.0153, published ones mostly 0.003 to 0.16. Above 0.5,
            C_ii is pulled below 2/3.

    Returns:
        λ, without unit. ``kappa(n, d, λ)`` is ``kappa`` again where D >= 2 (N - 1), and less below.

    Raises:
        TypeError: An argument has the wrong type. The message names it.
        ValueError: An argument has a value that is not accepted. The message names it.
    """
    return _at_least_0("kappa", kappa) / max(_excess(n, d), 1.0)


def kappa(n: int, d: int, lambd: float) -> float:
    """κ = λ (D / (N - 1) - 1): how hard the off-diagonal sum pulls the diagonal down. 0 where D <= N - 1.

    Args:
        n: As in ``suggest_lambda``.
        d: As in ``suggest_lambda``.
        lambd: The loss's λ >= 0, without unit.

    Returns:
        κ, without unit.

    Raises:
        TypeError: As ``suggest_lambda``.
        ValueError: As ``suggest_lambda``.
    """
    return _at_least_0("lambd", lambd) * _excess(n, d)


def loss_floor(n: int, d: int, lambd: float) -> LossFloor:
    """The loss that no network gets below, D κ / (1 + κ), and the C_ii where it lies, 1 / (1 + κ).

    >>> floor = loss_floor(256, 65536, 0.0051)  # LossFloor(loss=37111.5, c_ii=0.434)

    The loss is a sum over D features, so ``loss / d`` is what remains for each. Where D <= N - 1 the floor is 0, at
    C_ii = 1. With λ > 1, the least is reached by N - 1 features with C_ii = 1 and all others constant. The floor then
    stays at D - N + 1, that of λ = 1, and ``c_ii`` is the mean.

    Args:
        n: As in ``suggest_lambda``.
        d: As in ``suggest_lambda``.
        lambd: The loss's λ >= 0, without unit.

    Raises:
        TypeError: As ``suggest_lambda``.
        ValueError: As ``suggest_lambda``.
    """
    pull = min(_at_least_0("lambd", lambd), 1.0) * _excess(n, d)
    return LossFloor(loss=d * pull / (1 + pull), c_ii=1 / (1 + pull))


def describe(n: int, d: int, lambd: float) -> str:
    """κ, the floor and its C_ii, for people; arguments and errors as above."""
    floor = loss_floor(n, d, lambd)
    limit = "" if d > n - 1 else " (D <= N - 1: the rank limits nothing)"
    least = f"{floor.loss:.3g}" if floor.loss < 100 else f"{floor.loss:.0f}"
    return f"λ = {lambd:.3g}, κ = {kappa(n, d, lambd):.3g}{limit}: at least {least}, where C_ii = {floor.c_ii:.3f}"


def warning(n: int, d: int, lambd: float) -> str | None:
    """One sentence if κ is above 0.5, else None; arguments and errors as above."""
    if kappa(n, d, lambd) <= KAPPA_WARNING:
        return None
    return (
        f"κ = {kappa(n, d, lambd):.3g} is above {KAPPA_WARNING}, so the loss pulls C_ii down to "
        f"{loss_floor(n, d, lambd).c_ii:.2f} and the views apart: for N = {n}, D = {d} try "
        f"λ = {suggest_lambda(n, d):.2g}"
    )


def _excess(n: int, d: int) -> float:
    """D / (N - 1) - 1, or 0 where that is negative."""
    n, d = integer("n", n, 2), integer("d", d, 1)
    return max(d - (n - 1), 0) / (n - 1)


def _at_least_0(name: str, value: float) -> float:
    value = finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value
