"""The loss over the batch of all ranks of a process group, exact, by either route.

P ranks hold n_r samples each, N together. ``C = A_hat^T B_hat / N`` is a sum over samples, its Gram matrices
``K = X_hat X_hat^T`` are sums over features, and each route shares its work accordingly:

* **Gram, feature-sharded.** An all-to-all a view turns (n_r, D) into (N, D / P): a rank then has all samples of its
  features, so their statistics, its part of c = diag(C) and its part of K are exact without asking anyone. K's lower
  triangles and four scalars are summed over the ranks, every rank computes the gradient of its features, and an
  all-to-all a view brings it back. D need not be divisible by P: shards differ in width, and nothing is padded.
* **Direct.** Statistics are gathered and combined (Chan et al. 1979), C is summed over the ranks. The gradient needs no
  communication.

The route follows from the global N, so it is the same everywhere. What travels (a rank's share, size = the inputs'):

                  Gram                                       direct
    header        all_gather, 21 int64                       the same
    inputs        2 all_to_all, n D size each                -
    statistics    -                                          all_gather, 4 D float64 (statistics="global")
    product       2 all_reduce, about N^2/2 float32 each     1 all_reduce, D^2 + D float32
    scalars       all_reduce, 2 + 2 S float64 (S segments)   -
    weights       in the backward pass: the gradients of the loss and its terms, all_reduce of 3 float64 ("lightly"),
                  or of 3 a rank ("official", Gram only)
    gradients     2 all_to_all, n D size each                -

View b travels while view a's K is computed, K_a's sum while K_b is; in the backward pass view a's gradient while
b's is computed. Half-precision inputs and gradients travel as they are. K and C are summed in float32, unless
``reduce_dtype`` says otherwise (by itself K is summed in float64 for float64 inputs, and by the torch backend below 128
samples, where it is small).

**The last layer** may be part of the loss (linear/): linear_gram.py, linear_direct.py and linear_hidden.py say how.

Local work is done by a backend's operations on a part of a batch (backends/torch_partial.py says which these are).

**The header** is agreement.py: ranks that disagree, or of which one was given something invalid, all raise before
anyone waits for data that never comes.

**Which gradient** a rank gets is a matter of convention (``gradient``): see :func:`barlow_twins_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..arguments import Options
from ..backends.accelerator import without_autocast
from ..reference import BarlowTwinsTerms
from . import blocks, direct, gram, linear_blocks, linear_direct, linear_gram, linear_hidden
from .agreement import Shards, agree
from .part import Part

ROUTES = {  # by how many tensors a call takes
    (2, "gram"): gram,
    (2, "direct"): direct,
    (2, "blocks"): blocks,
    (3, "gram"): linear_gram,
    (3, "direct"): linear_direct,
    (3, "blocks"): linear_blocks,
    (3, "hidden"): linear_hidden,
}


@torch.compiler.disable
def apply(
    inputs: Sequence[Tensor],
    options: Options,
    shards: Shards,
    chunk_features: int | None = None,
) -> BarlowTwinsTerms:
    """The loss of all ranks' samples and its terms, the same on every rank, differentiable.

    The inputs are this rank's views, two of [n_r, D]; or what the last layer takes, two of [n_r, H], and its weight,
    [D, H], then in chunks of so many features.

    torch.compile does not look inside: its graph breaks here.
    """
    part = agree(inputs, options, shards, chunk_features)
    kind = len(inputs), part.route
    if part.features is not None and kind == (2, "direct"):
        kind = 2, "blocks"
    if part.own_d is not None and kind == (3, "direct"):
        kind = 3, "blocks"
    with without_autocast(inputs[0].device.type):
        if any(part.needs):
            return BarlowTwinsTerms(*_DistributedFunction.apply(part, ROUTES[kind], *inputs))
        return ROUTES[kind].forward(*(x.detach() for x in inputs), part)[0]


class _DistributedFunction(torch.autograd.Function):
    """(part, route, *inputs) -> (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx: Any, part: Part, route: ModuleType, *inputs: Tensor) -> tuple[Tensor, ...]:
        terms, saved = route.forward(*inputs, part)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.part, ctx.route = part, route
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "barlow_twins_loss has no second derivative, and over several processes no create_graph=True"
            )
        part, saved = ctx.part, ctx.saved_tensors
        with without_autocast(saved[0].device.type):
            return None, None, *ctx.route.backward(saved, grads, part)
