"""The autograd function over a backend's four operations.

``apply`` is what the loss calls. The work itself, forward and backward, is also registered as two opaque operators
(``torch.ops.barlow_fused.forward`` and ``.backward``), which ``torch.compile`` puts into its graph as they are: no
graph break, and the same bits as eager.

The gradient of the gradient is not implemented; asking for it raises an error.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .normalization import Normalization
from .reference import BarlowTwinsTerms


class Spec(NamedTuple):
    """Everything about a call that is not a tensor, resolved."""

    backend: str  # "torch", "triton" or "cuda"
    route: str  # "gram" or "direct"
    normalization: Normalization | None
    lambd: float
    scale: float


def apply(z_a: Tensor, z_b: Tensor, spec: Spec) -> BarlowTwinsTerms:  # [N, D], [N, D]
    """The loss and its two terms, differentiable."""
    function = _FunctionalTransformFunction if torch._C._are_functorch_transforms_active() else BarlowTwinsFunction
    return BarlowTwinsTerms(*function.apply(z_a, z_b, spec)[:3])


class BarlowTwinsFunction(torch.autograd.Function):
    """(z_a, z_b, spec) -> (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx, z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        terms, saved = _terms_and_saved(z_a, z_b, spec)
        _save(ctx, z_a, z_b, saved, spec)
        return terms

    @staticmethod
    def backward(ctx, g_loss, g_on, g_off, *_):
        z_a, z_b, *saved = ctx.saved_tensors
        spec = ctx.spec
        w_on, w_off = g_on, g_off  # the gradients with respect to the two sums; None means zero
        if g_loss is not None:
            w_on = g_loss * spec.scale if g_on is None else g_on + g_loss * spec.scale
            w_off = g_loss * (spec.scale * spec.lambd) if g_off is None else g_off + g_loss * (spec.scale * spec.lambd)
        elif w_on is None and w_off is None:
            return None, None, None
        elif w_on is None or w_off is None:
            zero = torch.zeros_like(g_on if w_off is None else g_off)
            w_on, w_off = (w_on, zero) if w_off is None else (zero, w_off)
        needs = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            grads = torch.ops.barlow_fused.backward(z_a, z_b, saved, w_on, w_off, *needs, *_flatten(spec))
        elif torch.is_grad_enabled():  # create_graph=True, or torch.func
            grads = _FirstDerivative.apply(z_a, z_b, w_on, w_off, needs, spec, *saved)
        else:
            grads = backward(z_a, z_b, saved, w_on, w_off, *needs, *_flatten(spec))
        return grads[0] if needs[0] else None, grads[1] if needs[1] else None, None


class _FunctionalTransformFunction(torch.autograd.Function):
    """The same for ``torch.func``, which wants the context set up apart and everything that is saved among the outputs.

    Preparing such a call costs 20 us, so it is not used where no transform is active.
    """

    @staticmethod
    def forward(z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        terms, saved = _terms_and_saved(z_a, z_b, spec)
        return *terms, *saved

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[3:])
        _save(ctx, inputs[0], inputs[1], output[3:], inputs[2])

    backward = BarlowTwinsFunction.backward


def _terms_and_saved(z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    run = torch.ops.barlow_fused.forward if torch.compiler.is_compiling() else forward
    on_diag, off_diag, saved = run(z_a, z_b, *_flatten(spec))
    loss = (on_diag + spec.lambd * off_diag) * spec.scale
    dtype = torch.promote_types(z_a.dtype, torch.float32)
    return (loss.to(dtype), on_diag.to(dtype), off_diag.to(dtype)), saved


def _save(ctx, z_a: Tensor, z_b: Tensor, saved: list[Tensor], spec: Spec) -> None:
    ctx.save_for_backward(z_a, z_b, *saved)
    ctx.set_materialize_grads(False)
    ctx.spec = spec


class _FirstDerivative(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it is an error, not a wrong number."""

    @staticmethod
    def forward(z_a, z_b, w_on, w_off, needs, spec, *saved):
        return backward(z_a, z_b, list(saved), w_on, w_off, *needs, *_flatten(spec))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "barlow_twins_loss has no second derivative: its backward pass cannot be differentiated. "
            "Use backend='reference' where you need one."
        )


def _flatten(spec: Spec) -> tuple[str, str, int, float, str]:
    """The part of a spec that the operators take, in types that an operator's schema has."""
    convention = spec.normalization
    if convention is None:
        return spec.backend, spec.route, 0, 0.0, "none"
    return spec.backend, spec.route, convention.correction, float(convention.eps), convention.eps_added_to


_SPEC_SCHEMA = "str backend, str route, int correction, float eps, str eps_added_to"


@torch.library.custom_op(
    "barlow_fused::forward",
    mutates_args=(),
    schema=f"(Tensor z_a, Tensor z_b, {_SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor[])",
)
def _forward_op(*args):
    return forward(*args)


@torch.library.custom_op(
    "barlow_fused::backward",
    mutates_args=(),
    schema="(Tensor z_a, Tensor z_b, Tensor[] saved, Tensor w_on, Tensor w_off, bool need_a, bool need_b, "
    f"{_SPEC_SCHEMA}) -> (Tensor, Tensor)",
)
def _backward_op(*args):
    return backward(*args)


def forward(
    z_a: Tensor, z_b: Tensor, backend: str, route: str, correction: int, eps: float, eps_added_to: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """on_diag and off_diag (float64 scalars), and what the backward pass needs: the product, the statistics."""
    ops = backends.load(backend)
    with _without_autocast(z_a.device.type):
        x = ops.normalize(z_a, z_b, _unflatten(correction, eps, eps_added_to))
        product, off_diag = ops.gram(x) if route == "gram" else ops.correlate(x)
        error = x.c.double() - 1
        on_diag = torch.dot(error, error)
    return on_diag, off_diag, [product, *x.saved()]


@_forward_op.register_fake
def _(z_a: Tensor, z_b: Tensor, backend: str, route: str, *convention: object):
    n, d = z_a.shape
    saved = backends.load(backend).Normalized.empty_saved(z_a, _unflatten(*convention))
    product = saved[0].new_empty((2, n, n) if route == "gram" else (d, d))
    return z_a.new_empty((), dtype=torch.float64), z_a.new_empty((), dtype=torch.float64), [product, *saved]


def backward(
    z_a: Tensor,
    z_b: Tensor,
    saved: list[Tensor],
    w_on: Tensor,
    w_off: Tensor,
    need_a: bool,
    need_b: bool,
    backend: str,
    route: str,
    *convention: object,
) -> tuple[Tensor, Tensor]:
    """The gradients of w_on * on_diag + w_off * off_diag; an empty tensor in place of one that is not needed."""
    ops = backends.load(backend)
    product, *stats = saved
    with _without_autocast(z_a.device.type):
        x = ops.Normalized.from_saved(z_a, z_b, _unflatten(*convention), stats)
        grads = ops.input_grad(x, product, route, w_on, w_off, (need_a, need_b))
    return tuple(z_a.new_empty(0) if grad is None else grad for grad in grads)


@_backward_op.register_fake
def _(
    z_a: Tensor, z_b: Tensor, saved: list[Tensor], w_on: Tensor, w_off: Tensor, need_a: bool, need_b: bool, *_: object
):
    return tuple(torch.empty_like(z) if need else z.new_empty(0) for z, need in ((z_a, need_a), (z_b, need_b)))


def _unflatten(correction: int, eps: float, eps_added_to: str) -> Normalization | None:
    return None if eps_added_to == "none" else Normalization(correction, eps, eps_added_to)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The operations choose their own precision: autocast must not change it inside them."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
