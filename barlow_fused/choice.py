"""Which route and which backend a call takes.

A choice is made in this order: the argument of the call, then :func:`configure`, then the environment variables
``BARLOW_FUSED_ROUTE`` and ``BARLOW_FUSED_BACKEND``, then the rule for ``"auto"``.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from . import backends

ROUTES = ("gram", "direct")

_configured: dict[str, str] = {}


class configure:  # noqa: N801 - used like torch.set_grad_enabled: a call that sets, or a context manager
    """Set what ``route="auto"`` and ``backend="auto"`` mean in this process; as a context manager, for its block.

    >>> configure(backend="torch")              # from now on
    >>> with configure(route="direct"): ...     # in this block

    Args:
        route: ``"gram"``, ``"direct"`` or ``"auto"`` (the default rule); None leaves it as it is.
        backend: ``"torch"``, ``"triton"``, ``"cuda"``, ``"reference"`` or ``"auto"``; None leaves it as it is.
    """

    def __init__(self, route: str | None = None, backend: str | None = None) -> None:
        wanted = {}
        if route is not None:
            wanted["route"] = _check("route", route, ROUTES)
        if backend is not None:
            wanted["backend"] = _check("backend", backend, backends.BACKENDS)
        self._previous = dict(_configured)
        _configured.update(wanted)

    def __enter__(self) -> configure:
        return self

    def __exit__(self, *_: object) -> None:
        _configured.clear()
        _configured.update(self._previous)


def configured() -> dict[str, str]:
    """What :func:`configure` has set, of ``"route"`` and ``"backend"``."""
    return dict(_configured)


# The route


def choose_route(route: str, n: int | None = None, d: int | None = None, backend: str | None = None) -> str:
    """The route for N samples of D features (None: only check the argument).

    Gram where N <= D/2: there it needs half the FLOPs of the direct route or fewer, and its difference of sums
    amplifies rounding by at most about 2 (docs: the README's section on precision).
    """
    argument = _check("route", route, ROUTES)
    route = _resolve("route", route, ROUTES)
    if n is None or d is None:
        return route
    if backend == "reference":
        if argument == "gram":
            raise ValueError("route='gram' cannot run with backend='reference', which forms C: accepted is 'direct'")
        return "direct"
    if route == "auto":
        return "gram" if 2 * n <= d else "direct"
    return route


def why_route(route: str, n: int, d: int, backend: str) -> str:
    """One sentence on what ``choose_route`` answers to these arguments."""
    if backend == "reference":
        return "the reference backend forms C, and knows no other"
    if route != "auto":
        return "asked for by the argument"
    if _resolve("route", route, ROUTES) != "auto":
        return "set by configure()" if "route" in _configured else "set by BARLOW_FUSED_ROUTE"
    if 2 * n <= d:
        return f"N <= D/2, {d / n:.3g}x fewer FLOPs than the direct route"
    return "N > D/2, where the Gram route saves little and loses precision"


# The backend


class Measured(NamedTuple):
    """A row of ``FASTEST``: with at least ``n`` samples and ``d`` features, these backends, the fastest first."""

    n: int
    d: int
    backends: tuple[str, ...]


# What "auto" takes on a GPU, by compute capability and dtype: the last of the rows that the input reaches, and of its
# backends the first that can run there; PyTorch's where there is none. A row comes from a file of benchmarks/results,
# which it names. Nothing has been measured on a GPU yet.
FASTEST: dict[tuple[tuple[int, int], torch.dtype], tuple[Measured, ...]] = {}


def choose_backend(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
) -> str:
    """The backend that runs a call with the argument ``backend`` on tensors of ``device``, ``dtype`` and ``shape``.

    Without a device it may be ``"auto"``. ``capability`` is that of a GPU that need not be on this machine.

    Raises:
        ValueError: not a backend's name.
        RuntimeError: a backend was forced that cannot run there.
    """
    backend = _resolve("backend", backend, backends.BACKENDS)
    return backend if device is None else resolve_backend(backend, device, dtype, capability, shape)


def resolve_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
) -> str:
    """The same of a name that has been through :func:`configure` and the environment already.

    Raises:
        RuntimeError: it cannot run there.
    """
    if name == "auto":
        return fastest(device, dtype, capability, shape)
    reason = backends.why_unusable(name, device, dtype, capability)
    if reason is not None:
        raise RuntimeError(reason)
    return name


def fastest(
    device: torch.device,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,  # (N, D)
) -> str:
    """The backend that ``"auto"`` takes on ``device``, with inputs of ``dtype`` and ``shape``."""
    if device.type != "cuda" or not FASTEST or shape is None:
        return "torch"
    rows = FASTEST.get((capability or torch.cuda.get_device_capability(device), dtype), ())
    reached = [row.backends for row in rows if shape[0] >= row.n and shape[1] >= row.d]
    candidates = reached[-1] if reached else ()
    usable = (name for name in candidates if not backends.why_unusable(name, device, dtype, capability))
    return next(usable, "torch")


# What is set


def _resolve(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """An argument, or what stands in for its "auto"."""
    if _check(name, value, accepted) != "auto":
        return value
    if name in _configured:
        return _configured[name]
    variable = f"BARLOW_FUSED_{name.upper()}"
    return _check(variable, os.environ.get(variable) or "auto", accepted)


def _check(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value != "auto" and value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, ('auto', *accepted)))}, got {value!r}")
    return value
