"""The methods that are compared: each is a name and a callable(z_a, z_b) -> loss, the same number by another road.

eager              the usual implementation: the official recipe (facebookresearch/barlowtwins, main.py) in eager
                   PyTorch, on one device; half-precision inputs run under autocast, as they do in its training
compile            torch.compile of the same; on GPUs in mode "max-autotune", which replays CUDA graphs of its own
lightly            lightly.loss.BarlowTwinsLoss
solo-learn         solo-learn's formula: an identity matrix is subtracted, its complement is the mask that lambda weighs
fft-relaxed        not the same loss: the relaxed regulariser of Shigeto et al. (CVPR 2023, arXiv 2301.01569) instead
                   of the off-diagonal sum, in O(N D log D); it has a float64 truth of its own
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
from barlow_fused.choice import ROUTES, choose_backend, choose_route, resolve_backend
from barlow_fused.planning.cost import COSTS, Problem, usual_cost
from barlow_fused.planning.devices import resolve_device

LAMBD = 0.0051
EPS = 1e-5
BASELINE = "eager"  # what ratios are taken to
FUSED = "fused"

LossFunction = Callable[[Tensor, Tensor], Tensor]  # ([N, D], [N, D]) -> []
BytesNeeded = Callable[[int, int, torch.dtype, torch.device], float]  # (n, d, ...) -> beyond inputs and gradients


@dataclasses.dataclass(frozen=True)
class Peer:
    """One method. Everything in it can be pickled: memory.py runs it in a process of its own."""

    name: str
    build: Callable[[], LossFunction]
    bytes_needed: BytesNeeded  # predicted
    unavailable: str | None = None  # why it cannot run here
    compiled: bool = False  # made for one shape at its first call
    capturable: bool = True  # by a CUDA graph; a capture that fails would leave PyTorch's generator and stream in it
    own_loss: LossFunction | None = None  # not the same loss: its truth is this function, in float64


# -- the usual implementation, three times --


def usual_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The official recipe, with BatchNorm1d(affine=False) as a function."""
    with _autocast(z_a):
        a_hat, b_hat = _batch_norm(z_a), _batch_norm(z_b)
        c = a_hat.T @ b_hat
        c.div_(z_a.shape[0])
        on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
        off_diag = _off_diagonal(c).pow_(2).sum()
        return on_diag + LAMBD * off_diag


def _off_diagonal(c: Tensor) -> Tensor:  # [D, D] -> [D (D - 1)]
    d = c.shape[0]
    return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()


def _batch_norm(z: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, training=True, eps=EPS)


def _autocast(z: Tensor) -> contextlib.AbstractContextManager:
    if z.dtype in (torch.bfloat16, torch.float16) and torch.amp.is_autocast_available(z.device.type):
        return torch.autocast(z.device.type, dtype=z.dtype)
    return contextlib.nullcontext()


def masked_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """solo-learn's formula (solo/losses/barlow.py), with scale_loss = 1."""
    with _autocast(z_a):
        a_hat, b_hat = _batch_norm(z_a), _batch_norm(z_b)
        c = torch.einsum("ni,nj->ij", a_hat, b_hat) / z_a.shape[0]
        eye = torch.eye(c.shape[0], device=c.device)
        squares = (c - eye).pow(2)
        squares[~eye.bool()] *= LAMBD
        return squares.sum()


def _lightly_loss(module: torch.nn.Module, z_a: Tensor, z_b: Tensor) -> Tensor:
    with _autocast(z_a):
        return module(z_a, z_b)


# -- another loss --


def relaxed_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Squares of the sums of C's wrapped diagonals, sum_i C_(i, i + k mod D), instead of the squares of its entries.

    Each is a circular cross-correlation of two samples, summed over the samples, so C is never formed. Their training
    also permutes the features at each step, which is left out here.
    """
    dtype = torch.promote_types(z_a.dtype, torch.float32)  # an FFT takes no bfloat16
    a_hat, b_hat = _batch_norm(z_a.to(dtype)), _batch_norm(z_b.to(dtype))
    n, d = z_a.shape
    on_diag = ((a_hat * b_hat).sum(0) / n - 1).square().sum()
    spectrum = (torch.fft.rfft(a_hat).conj() * torch.fft.rfft(b_hat)).sum(0)  # (D / 2 + 1,)
    diagonals = torch.fft.irfft(spectrum, d) / n  # (D,): the k-th is the sum over the k-th wrapped diagonal
    return on_diag + LAMBD * diagonals[1:].square().sum()


# -- how each is made --


def _build_eager() -> LossFunction:
    return usual_loss


def _build_compile(mode: str | None) -> LossFunction:
    torch._dynamo.reset()  # else the ninth shape would be refused
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # PyTorch's own
    return torch.compile(usual_loss, fullgraph=True, dynamic=False, mode=mode)


def _build_lightly() -> LossFunction:
    from lightly.loss import BarlowTwinsLoss

    return functools.partial(_lightly_loss, BarlowTwinsLoss(lambda_param=LAMBD))


def _build_masked() -> LossFunction:
    return masked_loss


def _build_relaxed() -> LossFunction:
    return relaxed_loss


def _build_fused(route: str, backend: str) -> LossFunction:
    return functools.partial(barlow_twins_loss, lambd=LAMBD, route=route, backend=backend)


def fused_choice(n: int, d: int, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The route and the backend that "auto" takes for a shape."""
    backend = choose_backend("auto")
    if backend == "auto":
        backend = resolve_backend("auto", device, dtype, shape=(n, d))
    return choose_route("auto", n, d, backend), backend


# -- what each needs --


def _usual_bytes(n: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    return usual_cost(Problem(n, d, dtype, resolve_device(device), 1, "direct")).peak_memory


def _masked_bytes(n: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    return 36 * d * d  # the mask as two int64 indices, 16; float32 and bool matrices; measured: 35 to 37


def _relaxed_bytes(n: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    size = torch.promote_types(dtype, torch.float32).itemsize
    return n * d * (7 * size + (12 if dtype.itemsize < size else 0))  # spectra, their product and gradients; copies


def _fused_bytes(route: str, backend: str, n: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    if "auto" in (route, backend):
        route, backend = fused_choice(n, d, device, dtype)
    return COSTS[backend](Problem(n, d, dtype, resolve_device(device), 1, route)).peak_memory


def available_peers(device: torch.device) -> dict[str, Peer]:
    """Every method that --peers can name, by the name it has there ("fused-gram-torch")."""
    mode = "max-autotune" if device.type == "cuda" else None
    peers = [
        Peer("eager", _build_eager, _usual_bytes),
        Peer("compile", functools.partial(_build_compile, mode), _usual_bytes, _no_compiler(), compiled=True),
        Peer("lightly", _build_lightly, _usual_bytes, _not_installed("lightly")),
        Peer("solo-learn", _build_masked, _masked_bytes, capturable=False),  # a mask as index waits for the GPU
        Peer("fft-relaxed", _build_relaxed, _relaxed_bytes, own_loss=relaxed_loss),
        _fused_peer(FUSED, "auto", "auto"),
    ]
    for backend in backends.BACKENDS:
        if backend == "reference" or backends.why_unusable(backend, device) is not None:
            continue
        peers += [_fused_peer(f"fused {route} {backend}", route, backend) for route in ROUTES]
    return {"fused-auto" if peer.name == FUSED else peer.name.replace(" ", "-"): peer for peer in peers}


def _fused_peer(name: str, route: str, backend: str) -> Peer:
    build = functools.partial(_build_fused, route, backend)
    return Peer(name, build, functools.partial(_fused_bytes, route, backend))


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
