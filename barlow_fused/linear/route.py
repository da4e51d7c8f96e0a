"""Which route the loss with the last layer takes: that with fewer FLOPs, where the hidden route's count for more."""

from __future__ import annotations

import torch

from ..choice import ROUTES, choose_route

HIDDEN_RATE = 0.75  # of the others' FLOPs a second: its products are smaller (docs/linear.md has measurements)
FLOAT32_RATE = 0.085  # of half precision's on accelerators, 67 of 790 TFLOP/s on an H200: it multiplies in float32


def hidden_rate(device: str, dtype: torch.dtype) -> float:
    """The hidden route's FLOPs a second, of the others', on a type of device."""
    return HIDDEN_RATE * (FLOAT32_RATE if device != "cpu" and dtype.itemsize == 2 else 1.0)


def choose_linear_route(
    route: str, n: int, h: int, d: int, backend: str, rate: float = HIDDEN_RATE, basis: int | None = None
) -> str:
    """The route for N samples of H hidden units and D features.

    ``rate`` is the hidden route's (``hidden_rate``), ``basis`` its R, the size of its matrices, if not min(N, H).
    """
    if route == "hidden":
        if backend not in ("auto", "torch"):
            raise ValueError(f"route='hidden' is PyTorch's operators: it cannot run with backend={backend!r}")
        return route
    if route not in ("auto", *ROUTES):
        raise ValueError(f"route must be 'gram', 'direct', 'hidden' or 'auto', got {route!r}")
    other = choose_route(route, n, d, backend)
    if choose_route(route) == "auto" and backend in ("auto", "torch"):
        hidden = flops("hidden", n, h, d, basis) / rate
        return "hidden" if hidden <= flops(other, n, h, d) else other
    return other


def flops(route: str, n: int, h: int, d: int, basis: int | None = None) -> int:
    """Of the matrix products, forward and backward, all three gradients; one in float64 counts twice."""
    if route == "hidden":
        r = min(n, h) if basis is None else basis
        decomposition = n * (16 * min(n, h) * h + 6 * min(n, h) ** 2)  # and what it takes back to the activations
        return (20 * r * h + 18 * r * r) * d + 2 * decomposition
    return 16 * n * h * d + 6 * n * d * (n if route == "gram" else d)
