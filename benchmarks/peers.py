"""The methods that are compared: each is a name and a callable(z_a, z_b) -> loss, the same number by another road.

eager              the usual implementation: the official recipe (facebookresearch/barlowtwins, main.py) in eager
                   PyTorch, on one device; half-precision inputs run under autocast, as they do in its training
compile            torch.compile of the same
lightly            lightly.loss.BarlowTwinsLoss
fused              barlow_fused.barlow_twins_loss as a user calls it: route and backend on "auto"
fused gram torch   ... with a route and a backend forced; one method for every pair that can run here
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from barlow_fused import backends, barlow_twins_loss
from barlow_fused.plan import ROUTES, choose_backend, choose_route

LAMBD = 0.0051
EPS = 1e-5
BASELINE = "eager"  # what ratios are taken to
FUSED = "fused"

LossFunction = Callable[[Tensor, Tensor], Tensor]  # ([N, D], [N, D]) -> []


@dataclasses.dataclass(frozen=True)
class Peer:
    """One method. Everything in it can be pickled: memory.py runs it in a process of its own."""

    name: str
    build: Callable[[], LossFunction]
    bytes_needed: Callable[[int, int, int], float]  # (n, d, itemsize) -> predicted, beyond inputs and gradients
    unavailable: str | None = None  # why it cannot run here
    compiled: bool = False  # made for one shape at its first call


def usual_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The official recipe, with BatchNorm1d(affine=False) as a function."""
    with _autocast(z_a):
        a_hat, b_hat = (F.batch_norm(z, None, None, training=True, eps=EPS) for z in (z_a, z_b))
        c = a_hat.T @ b_hat
        c.div_(z_a.shape[0])
        on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
        off_diag = _off_diagonal(c).pow_(2).sum()
        return on_diag + LAMBD * off_diag


def _off_diagonal(c: Tensor) -> Tensor:  # [D, D] -> [D (D - 1)]
    d = c.shape[0]
    return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()


def _autocast(z: Tensor) -> contextlib.AbstractContextManager:
    if z.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(z.device.type, dtype=z.dtype)
    return contextlib.nullcontext()


def _build_eager() -> LossFunction:
    return usual_loss


def _build_compile() -> LossFunction:
    torch._dynamo.reset()  # else the ninth shape would be refused
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # PyTorch's own
    return torch.compile(usual_loss, fullgraph=True, dynamic=False)


def _build_lightly() -> LossFunction:
    from lightly.loss import BarlowTwinsLoss

    return functools.partial(_lightly_loss, BarlowTwinsLoss(lambda_param=LAMBD))


def _lightly_loss(module: torch.nn.Module, z_a: Tensor, z_b: Tensor) -> Tensor:
    with _autocast(z_a):
        return module(z_a, z_b)


def _build_fused(route: str, backend: str) -> LossFunction:
    return functools.partial(barlow_twins_loss, lambd=LAMBD, route=route, backend=backend)


def fused_choice(n: int, d: int, device: torch.device) -> tuple[str, str]:
    """The route and the backend that "auto" takes for a shape."""
    backend = choose_backend("auto", device)
    return choose_route("auto", n, d, backend), backend


def available_peers(device: torch.device) -> dict[str, Peer]:
    """Every method that --peers can name, by the name it has there ("fused-gram-torch")."""
    peers = [
        Peer("eager", _build_eager, _usual_bytes),
        Peer("compile", _build_compile, _usual_bytes, _no_compiler(), compiled=True),
        Peer("lightly", _build_lightly, _usual_bytes, _not_installed("lightly")),
        Peer(FUSED, functools.partial(_build_fused, "auto", "auto"), functools.partial(_fused_bytes, "auto")),
    ]
    for backend in backends.BACKENDS:
        if backend == "reference" or backends.why_unusable(backend, device) is not None:
            continue
        for route in ROUTES:
            build = functools.partial(_build_fused, route, backend)
            peers.append(Peer(f"fused {route} {backend}", build, functools.partial(_fused_bytes, route)))
    return {"fused-auto" if peer.name == FUSED else peer.name.replace(" ", "-"): peer for peer in peers}


def choose_peers(names: list[str], device: torch.device) -> list[Peer]:
    """The methods that a list of names means; "fused" stands for all of its routes and backends.

    Raises:
        ValueError: a name is not a method's.
    """
    peers = available_peers(device)
    chosen: dict[str, Peer] = {}
    for name in names:
        matches = [key for key in peers if key == name or (name == FUSED and key.startswith("fused-"))]
        if not matches:
            raise ValueError(f"{name!r} is not a method; accepted: {', '.join([*peers, FUSED])}")
        chosen.update({key: peers[key] for key in matches})
    return list(chosen.values())


def _not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else "not installed"


def _no_compiler() -> str | None:
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    return None if any(map(shutil.which, compilers)) else "needs a C++ compiler (g++)"


def _usual_bytes(n: int, d: int, itemsize: int) -> float:
    return 5 * d * d * itemsize + 4 * n * d * itemsize  # C, its copies for the two powers, and their gradients


def _fused_bytes(route: str, n: int, d: int, itemsize: int) -> float:
    if route == "auto":
        route, _ = fused_choice(n, d, torch.device("cpu"))
    small, other = (n, d) if route == "gram" else (d, n)
    slab = max(2**18, min(1024, other) * small)
    return (3 * small**2 + 8 * slab) * max(itemsize, 4)
