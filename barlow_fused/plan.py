"""Which route and which backend a call takes, and what that costs.

A choice is made in this order: the argument of the call, then :func:`configure`, then the environment variables
``BARLOW_FUSED_ROUTE`` and ``BARLOW_FUSED_BACKEND``, then the rule for ``"auto"``.
"""

from __future__ import annotations

import os

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
        self._previous = dict(_configured)
        if route is not None:
            _configured["route"] = _check("route", route, ROUTES)
        if backend is not None:
            _configured["backend"] = _check("backend", backend, backends.BACKENDS)

    def __enter__(self) -> configure:
        return self

    def __exit__(self, *_: object) -> None:
        _configured.clear()
        _configured.update(self._previous)


def choose_backend(backend: str, device: torch.device | None = None) -> str:
    """The backend that runs a call with the argument ``backend`` on tensors of ``device`` (None: only check it).

    Raises:
        ValueError: not a backend's name.
        RuntimeError: a backend was forced that cannot run there.
    """
    backend = _resolve("backend", backend, backends.BACKENDS)
    if device is None:
        return backend
    if backend == "auto":
        return backends.fastest(device)
    reason = backends.why_unusable(backend, device)
    if reason is not None:
        raise RuntimeError(reason)
    return backend


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


def _resolve(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """An argument, or what stands in for its "auto"."""
    if _check(name, value, accepted) != "auto":
        return value
    if name in _configured:
        return _configured[name]
    variable = f"BARLOW_FUSED_{name.upper()}"
    return _check(variable, os.environ.get(variable) or "auto", accepted)


def _check(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in ("auto", *accepted):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, ('auto', *accepted)))}, got {value!r}")
    return value
