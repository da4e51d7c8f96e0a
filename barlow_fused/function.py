"""The autograd function over a backend's four operations.

``BarlowTwinsFunction`` is what eager PyTorch and ``torch.func`` see. The work itself, forward and backward, is also
registered as two opaque operators (``torch.ops.barlow_fused.forward`` and ``.backward``), which ``torch.compile`` puts
into its graph as they are: no graph break, and the same bits as eager.

The gradient of the gradient is not implemented; asking for it raises an error.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.torch_backend import Normalized
from .normalization import Normalization


class Spec(NamedTuple):
    """Everything about a call that is not a tensor, resolved."""

    backend: str  # "torch", "triton" or "cuda"
    route: str  # "gram" or "direct"
    normalization: Normalization | None
    lambd: float
    scale: float


class BarlowTwinsFunction(torch.autograd.Function):
    """(z_a, z_b, spec) -> (loss, on_diag, off_diag, *what the backward pass needs)."""

    @staticmethod
    def forward(z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        run = torch.ops.barlow_fused.forward if torch.compiler.is_compiling() else forward
        on_diag, off_diag, saved = run(z_a, z_b, *_flatten(spec))
        loss = spec.scale * (on_diag + spec.lambd * off_diag)
        dtype = torch.promote_types(z_a.dtype, torch.float32)
        return loss.to(dtype), on_diag.to(dtype), off_diag.to(dtype), *saved

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        z_a, z_b, ctx.spec = inputs
        saved = output[3:]
        ctx.save_for_backward(z_a, z_b, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g_loss, g_on, g_off, *_):  # noqa: ANN001, ANN205
        spec = ctx.spec
        zero = torch.zeros((), device=ctx.saved_tensors[0].device)
        w_on = w_off = zero
        if g_loss is not None:
            w_on, w_off = g_loss * spec.scale, g_loss * (spec.scale * spec.lambd)
        w_on = w_on if g_on is None else w_on + g_on
        w_off = w_off if g_off is None else w_off + g_off
        z_a, z_b, *saved = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            grad_a, grad_b = torch.ops.barlow_fused.backward(
                z_a, z_b, saved, w_on, w_off, need_a, need_b, *_flatten(spec)
            )
        elif torch.is_grad_enabled():  # create_graph=True, or torch.func
            grad_a, grad_b = _FirstDerivative.apply(z_a, z_b, w_on, w_off, (need_a, need_b), spec, *saved)
        else:
            grad_a, grad_b = backward(z_a, z_b, saved, w_on, w_off, need_a, need_b, *_flatten(spec))
        return grad_a if need_a else None, grad_b if need_b else None, None


class _FirstDerivative(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it is an error, not a wrong number."""

    @staticmethod
    def forward(z_a, z_b, w_on, w_off, needs, spec, *saved):  # noqa: ANN001, ANN205
        return backward(z_a, z_b, list(saved), w_on, w_off, *needs, *_flatten(spec))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN205
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
def _forward_op(*args):  # noqa: ANN002, ANN202
    return forward(*args)


@torch.library.custom_op(
    "barlow_fused::backward",
    mutates_args=(),
    schema="(Tensor z_a, Tensor z_b, Tensor[] saved, Tensor w_on, Tensor w_off, bool need_a, bool need_b, "
    f"{_SPEC_SCHEMA}) -> (Tensor, Tensor)",
)
def _backward_op(*args):  # noqa: ANN002, ANN202
    return backward(*args)


def forward(
    z_a: Tensor, z_b: Tensor, backend: str, route: str, correction: int, eps: float, eps_added_to: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """on_diag and off_diag (float64 scalars), and what the backward pass needs: c, the product, the statistics."""
    normalization = None if eps_added_to == "none" else Normalization(correction, eps, eps_added_to)
    ops = backends.load(backend)
    with _without_autocast(z_a.device.type):
        x = ops.normalize(z_a, z_b, normalization)
        product, off_diag = ops.gram(x) if route == "gram" else ops.correlate(x)
        on_diag = (x.c.double() - 1).square().sum()
    return on_diag, off_diag, [x.c, product] + ([] if x.stats is None else [x.stats])


@_forward_op.register_fake
def _(z_a: Tensor, z_b: Tensor, backend: str, route: str, correction: int, eps: float, eps_added_to: str):  # noqa: ANN202
    n, d = z_a.shape
    scalar = z_a.new_empty((), dtype=torch.float64)
    c = z_a.new_empty(d, dtype=torch.promote_types(z_a.dtype, torch.float32))
    product = c.new_empty(2, n, n) if route == "gram" else c.new_empty(d, d)
    return scalar, torch.empty_like(scalar), [c, product] + ([] if eps_added_to == "none" else [c.new_empty(2, 4, d)])


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
    *_normalization: object,
) -> tuple[Tensor, Tensor]:
    """The gradients of w_on * on_diag + w_off * off_diag; an empty tensor in place of one that is not needed."""
    c, product, *stats = saved
    x = Normalized(z_a, z_b, stats[0] if stats else None, c)
    with _without_autocast(z_a.device.type):
        grads = backends.load(backend).input_grad(x, product, route, w_on, w_off, (need_a, need_b))
    return tuple(z_a.new_empty(0) if grad is None else grad for grad in grads)


@_backward_op.register_fake
def _(z_a: Tensor, z_b: Tensor, saved: list[Tensor], w_on: Tensor, w_off: Tensor, need_a: bool, need_b: bool, *_spec):  # noqa: ANN002, ANN202
    return tuple(torch.empty_like(z) if need else z.new_empty(0) for z, need in ((z_a, need_a), (z_b, need_b)))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The operations choose their own precision: autocast must not change it inside them."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
