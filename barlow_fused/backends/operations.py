"""The four operations of the loss, of which everything is composed.

Each backend is a module with the same four functions, and one class that carries data between them:

    normalize(z_a, z_b, normalization)             -> Normalized         each feature's statistics, and c = diag(C)
    gram(x, lambd, scale, need_grad)               -> (terms, product)   Gram route: product holds K_a and K_b
    correlate(x, lambd, scale, need_grad)          -> (terms, product)   direct route: product holds C
    input_grad(x, product, route, weights, needs)  -> (grad_a, grad_b)   None for one that is not needed

``x`` is what ``normalize`` returned, terms are (loss, on_diag, off_diag), and ``product`` is None or unused where
``need_grad`` is False. ``Normalized.saved()`` is the list of tensors from which ``Normalized.from_saved`` makes it
again in the backward pass; ``empty_saved(z_a, route, normalization)`` gives empty tensors of the shapes and dtypes of
[product, *saved] for torch.compile.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The gradients of whatever comes after with respect to (loss, on_diag, off_diag): scalars, None meaning zero."""

    g_loss: Tensor | None
    g_on: Tensor | None
    g_off: Tensor | None
    lambd: float
    scale: float
