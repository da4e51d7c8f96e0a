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

    def of_sums(self) -> tuple[Tensor | float, Tensor | float]:
        """The gradients with respect to the two sums, on_diag and off_diag; 0.0 where nothing depends on one."""

        def joined(g: Tensor | None, factor: float) -> Tensor | float:
            if self.g_loss is None:
                return 0.0 if g is None else g
            return self.g_loss * factor if g is None else g + self.g_loss * factor

        return joined(self.g_on, self.scale), joined(self.g_off, self.scale * self.lambd)
