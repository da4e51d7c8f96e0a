"""The torch backend on CPUs, a pass at a time: views of small inputs are kept once they are standardised
(torch_small.py), larger inputs are walked over in slabs (torch_slabs.py).
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..normalization import Normalization
from . import torch_slabs, torch_small
from .operations import Composed, Spec

IN_SLABS = Composed(torch_slabs)


def forward(
    z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool, every_term: bool
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The terms, and what the backward pass needs."""
    return _passes(z_a).forward(z_a, z_b, spec, need_grad, every_term)


def backward(z_a: Tensor, *arguments) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to z_a and z_b; None in place of one that is not needed."""
    return _passes(z_a).backward(z_a, *arguments)


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of what ``forward`` saves."""
    return _passes(z_a).empty_saved(z_a, route, normalization)


def _passes(z: Tensor) -> ModuleType | Composed:
    return torch_small if torch_small.keeps(*z.shape, z.dtype) else IN_SLABS
