"""What a backend does for a call: a forward and a backward pass, and the four operations that these are made of.

    forward(z_a, z_b, spec, need_grad, every_term)   -> (terms, saved)     terms: (loss,) or (loss, on_diag, off_diag)
    backward(z_a, z_b, saved, spec, g_terms, needs)  -> (grad_a, grad_b)   None for one that is not needed
    empty_saved(z_a, route, normalization)           -> saved, without data, for torch.compile

The backends of kernels have these passes (passes.py). A backend of PyTorch's operators has the operations, each a
function of its module, and one class that carries data between them; ``Composed`` makes the passes of them:

    normalize(z_a, z_b, normalization)             -> Normalized         each feature's statistics, and c = diag(C)
    gram(x, lambd, scale, need_grad)               -> (terms, product)   Gram route: product holds K_a and K_b
    correlate(x, lambd, scale, need_grad)          -> (terms, product)   direct route: product holds C
    input_grad(x, product, route, weights, needs)  -> (grad_a, grad_b)

``x`` is what ``normalize`` returned, terms are (loss, on_diag, off_diag), tensors or numbers, and ``product`` is None
or unused where ``need_grad`` is False. ``Normalized.saved()`` is the list of tensors from which
``Normalized.from_saved`` makes it again in the backward pass; what is saved for it is [product, *saved].
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..normalization import Normalization
from .accelerator import without_autocast


class Spec(NamedTuple):
    """Everything about a call that is not a tensor, resolved."""

    backend: str  # "torch", "triton", "cuda", or "auto" until it meets its tensors
    route: str  # "gram" or "direct"
    normalization: Normalization | None
    lambd: float
    scale: float
    chunk: int = 0  # features at a time, of the loss with the last layer (linear/); 0: what caches or memory hold


class Weights(NamedTuple):
    """The gradients of whatever comes after with respect to (loss, on_diag, off_diag): scalars, None meaning zero."""

    g_loss: Tensor | None
    g_on: Tensor | None
    g_off: Tensor | None
    lambd: float
    scale: float

    def of_sums(self) -> tuple[Tensor | float, Tensor | float]:
        """The gradients with respect to the two sums, on_diag and off_diag; 0.0 where nothing depends on one."""
        g_loss, g_on, g_off, lambd, scale = self
        if g_loss is None:
            return 0.0 if g_on is None else g_on, 0.0 if g_off is None else g_off
        w_on, w_off = g_loss * scale, g_loss * (scale * lambd)
        return w_on if g_on is None else g_on + w_on, w_off if g_off is None else g_off + w_off


def tensor(term: Tensor | float, like: Tensor) -> Tensor:
    """A term of the loss of such inputs: 0-d, in at least float32, infinite where that has no such number."""
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    if isinstance(term, Tensor):
        return term.to(dtype)
    if abs(term) > 1e38 and abs(term) > torch.finfo(dtype).max:
        term = math.copysign(math.inf, term)
    return torch.scalar_tensor(term, dtype=dtype, device=like.device)


class Composed:
    """The passes of a backend that has the operations."""

    def __init__(self, operations: ModuleType) -> None:
        self._operations = operations
        self.empty_saved = operations.empty_saved

    def forward(
        self, z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        ops = self._operations
        with without_autocast(z_a.device.type):
            x = ops.normalize(z_a, z_b, spec.normalization)
            reduce = ops.gram if spec.route == "gram" else ops.correlate
            terms, product = reduce(x, spec.lambd, spec.scale, need_grad)
        terms = tuple(tensor(term, z_a) for term in (terms if every_term else terms[:1]))
        return terms, [product, *x.saved()] if need_grad else []

    def backward(
        self,
        z_a: Tensor,
        z_b: Tensor,
        saved: list[Tensor],
        spec: Spec,
        g_terms: tuple[Tensor | None, Tensor | None, Tensor | None],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to z_a and z_b; None in place of one that is not needed."""
        product, *rest = saved
        with without_autocast(z_a.device.type):
            x = self._operations.Normalized.from_saved(z_a, z_b, spec.normalization, rest)
            weights = Weights(*g_terms, spec.lambd, spec.scale)
            return self._operations.input_grad(x, product, spec.route, weights, needs)


@functools.cache
def passes(backend: ModuleType) -> ModuleType | Composed:
    """What has a backend's passes."""
    return backend if hasattr(backend, "backward") else Composed(backend)
