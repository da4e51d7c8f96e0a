"""Which route and which backend a call takes.

A choice is made in this order: the argument of the call, then :func:`configure`, then the environment variables
``BARLOW_FUSED_ROUTE`` and ``BARLOW_FUSED_BACKEND`` as they were when this module was loaded, then the rule for
``"auto"``. The route follows from the shape. The backend follows from the record of this GPU, which says what is right
on it and what is the fastest; without a record it is PyTorch's operators. A call never waits for a verification, unless
``BARLOW_FUSED_VERIFY=block`` says so.
"""

from __future__ import annotations

import functools
import logging
import os
import threading

import torch

from . import backends
from .verification.ensure import ensure
from .verification.key import installed, key
from .verification.record import Cell, Record, find

ROUTES = ("gram", "direct")
VERIFY = ("ask", "block", "never")  # BARLOW_FUSED_VERIFY: what a first call on a GPU without a record does

_layers: list[dict[str, str]] = []  # what each configure() has set, as long as it holds
_entered: set[int] = set()  # those whose block has not ended


class configure:  # noqa: N801 - used like torch.set_grad_enabled: a call that sets, or a context manager
    """Set what ``route="auto"`` and ``backend="auto"`` mean, in this process or in a block.

    >>> configure(backend="torch")              # from now on
    >>> with configure(route="direct"): ...     # in this block

    Args:
        route: ``"gram"``, ``"direct"`` or ``"auto"`` (the default rule). None leaves it as it is.
        backend: ``"torch"``, ``"triton"``, ``"cuda"``, ``"reference"`` or ``"auto"``. None leaves it as it is.

    Raises:
        ValueError: Not one of these names.
    """

    def __init__(self, route: str | None = None, backend: str | None = None) -> None:
        wanted = {}
        if route is not None:
            wanted["route"] = _check("route", route, ROUTES)
        if backend is not None:
            wanted["backend"] = _check("backend", backend, backends.BACKENDS)
        self._wanted = wanted
        if _layers and _layers[-1].keys() <= wanted.keys() and id(_layers[-1]) not in _entered:
            _layers.pop()  # hidden for good: a call at every step must not pile up
        _layers.append(wanted)

    def __enter__(self) -> configure:
        _entered.add(id(self._wanted))
        return self

    def __exit__(self, *_: object) -> None:
        """Undoes what this one has set, and what was set in its block from then on; other blocks stay as they are."""
        start = next((i for i, layer in enumerate(_layers) if layer is self._wanted), len(_layers))
        _entered.discard(id(self._wanted))
        _layers[start:] = [layer for layer in _layers[start:] if id(layer) in _entered]


def configured() -> dict[str, str]:
    """What :func:`configure` has set, of ``"route"`` and ``"backend"``: the last that is still in force."""
    return {name: value for layer in _layers for name, value in layer.items()}


# The route


def choose_route(route: str, n: int | None = None, d: int | None = None, backend: str | None = None) -> str:
    """The route for N samples of D features (None: only check the argument).

    Gram where N <= D/2: there it needs half the FLOPs of the direct route or fewer, and its difference of sums
    amplifies rounding by at most about 2 (docs/how.md, Precision).
    """
    argument, route = route, _resolve("route", route, ROUTES)
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
        return "set by configure()" if "route" in configured() else "set by BARLOW_FUSED_ROUTE"
    if 2 * n <= d:
        return f"N <= D/2, {d / n:.3g}x fewer FLOPs than the direct route"
    return "N > D/2, where the Gram route saves little and loses precision"


# The backend


def choose_backend(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    shape: tuple[int, int] | None = None,
    route: str | None = None,
) -> str:
    """The backend that runs a call with the argument ``backend`` on tensors of ``device``, ``dtype`` and ``shape``.

    Without a device it may be ``"auto"``. ``architecture`` is that of a GPU that need not be here.

    Raises:
        ValueError: not a backend's name.
        RuntimeError: a backend was forced that cannot run there.
    """
    backend = _resolve("backend", backend, backends.BACKENDS)
    return backend if device is None else resolve_backend(backend, device, dtype, architecture, shape, route)


def resolve_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    shape: tuple[int, int] | None = None,  # (N, D)
    route: str | None = None,
) -> str:
    """The same of a name that has been through :func:`configure` and the environment already, or through :func:`pin`.

    Raises:
        RuntimeError: it cannot run there.
    """
    if name.startswith("auto"):
        if dtype is None or shape is None or route is None or architecture is not None:
            return "torch"  # not known well enough for a record
        if record_of(device) is None:
            return "torch"
        return _fastest(device, dtype, route, Cell.of(*shape))
    reason = backends.why_unusable(name, device, dtype, architecture)
    if reason is not None:
        raise RuntimeError(reason)
    return name


def fastest_over_ranks(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], route: str) -> tuple[str, ...]:
    """What ``"auto"`` may take for one rank's part of a batch, of that shape: the fastest first, PyTorch last."""
    return _verified(device, dtype, route, Cell.of(*shape), True)


def pin(name: str, device: torch.device) -> str:
    """``"auto"`` with what the choice follows from: a graph that was compiled for another record is another graph."""
    record = record_of(device) if name == "auto" else None
    return name if record is None else f"{name} {record.digest}"


pin._dynamo_marked_constant = True  # torch.compiler.assume_constant_result(pin), which would import the compiler


@functools.lru_cache(maxsize=1024)
def _fastest(device: torch.device, dtype: torch.dtype, route: str, cell: Cell) -> str:
    return _verified(device, dtype, route, cell, False)[0]


@functools.lru_cache(maxsize=1024)
def _verified(device: torch.device, dtype: torch.dtype, route: str, cell: Cell, ranks: bool) -> tuple[str, ...]:
    record = record_of(device)
    if record is None:
        return ("torch",)
    found = record.fastest(str(dtype).removeprefix("torch."), route, cell, ranks)
    return *(name for name in found if not backends.why_unusable(name, device, dtype)), "torch"


# This machine's record (barlow_fused/verification)

_records: dict[torch.device, Record | None] = {}
_reading = threading.Lock()
_logger = logging.getLogger("barlow_fused")


def record_of(device: torch.device) -> Record | None:
    """The record of the GPU, looked for once a process: what a process chooses never changes while it runs."""
    if device not in _records:
        with _reading:  # autograd has threads of its own
            if device not in _records:
                _records[device] = _look_for_record(device)
    return _records[device]


def verify_first(device: torch.device, wanted: bool = True) -> None:
    """For programs, before they compute: have ``device`` verified unless it is, or they or the environment say no."""
    os.environ.setdefault("BARLOW_FUSED_VERIFY", "block" if wanted else "never")
    record_of(device)


def forget() -> None:
    """Read the environment and look for records again. What was computed until now may have been chosen by others."""
    _environment.update(_read_environment())
    _records.clear()
    _fastest.cache_clear()
    _verified.cache_clear()


def _look_for_record(device: torch.device) -> Record | None:
    if not installed(device):
        return None
    when = os.environ.get("BARLOW_FUSED_VERIFY") or "ask"
    if when not in VERIFY:
        raise ValueError(f"BARLOW_FUSED_VERIFY must be one of {', '.join(map(repr, VERIFY))}, got {when!r}")
    this = key(device)
    found = find(this)
    if found.record is None and when == "block":
        why_not = ensure(device)
        found = find(this)
        if found.record is None:
            why_not = why_not or "; ".join(found.problems) or f"{found.path} is not there"
            _logger.warning("barlow_fused runs on PyTorch's operators on %s: %s", this["gpu"], why_not)
    elif found.record is None and when == "ask" and os.environ.get("LOCAL_RANK", "0") == "0":
        _logger.warning(
            "barlow_fused runs on PyTorch's operators on %s: its fused kernels (%s) have not been verified there%s. "
            "`barlow-fused verify` does that, once and within a minute, and where they are faster they are taken from "
            "the next start on. BARLOW_FUSED_VERIFY=never silences this line.",
            this["gpu"],
            ", ".join(installed(device)),
            "".join(f" ({problem})" for problem in found.problems),
        )
    return found.record


# What is set


def _resolve(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """An argument, or what stands in for its "auto"."""
    if _check(name, value, accepted) != "auto":
        return value
    for layer in reversed(_layers):
        if name in layer:
            return layer[name]
    variable, value = _environment[name]
    return _check(variable, value, accepted)


def _read_environment() -> dict[str, tuple[str, str]]:
    """Of each setting, the variable and its value."""
    variables = {"route": "BARLOW_FUSED_ROUTE", "backend": "BARLOW_FUSED_BACKEND"}
    return {name: (variable, os.environ.get(variable) or "auto") for name, variable in variables.items()}


_environment = _read_environment()  # once: a call would spend 5 us on each


def _check(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value != "auto" and value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, ('auto', *accepted)))}, got {value!r}")
    return value
