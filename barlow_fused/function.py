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
from .backends.operations import Weights
from .choice import pin, resolve_backend
from .normalization import Normalization
from .reference import BarlowTwinsTerms


class Spec(NamedTuple):
    """Everything about a call that is not a tensor, resolved."""

    backend: str  # "torch", "triton", "cuda", or "auto" until it meets its tensors
    route: str  # "gram" or "direct"
    normalization: Normalization | None
    lambd: float
    scale: float


def apply(z_a: Tensor, z_b: Tensor, spec: Spec) -> BarlowTwinsTerms:  # [N, D], [N, D]
    """The loss and its two terms, differentiable."""
    if torch.compiler.is_compiling():  # the operators do it themselves, and the graph remembers by what
        spec = spec._replace(backend=pin(spec.backend, z_a.device))
    else:
        spec = _resolve(spec, z_a)
    if torch._C._are_functorch_transforms_active():
        return BarlowTwinsTerms(*_FunctionalTransformFunction.apply(z_a, z_b, spec)[:3])
    if torch.is_grad_enabled() and (z_a.requires_grad or z_b.requires_grad):
        return BarlowTwinsTerms(*BarlowTwinsFunction.apply(z_a, z_b, spec))
    return BarlowTwinsTerms(*_run_forward(z_a, z_b, spec, need_grad=False)[:3])


class BarlowTwinsFunction(torch.autograd.Function):
    """(z_a, z_b, spec) -> (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx, z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        *terms, saved = _run_forward(z_a, z_b, spec, need_grad=True)
        _save(ctx, z_a, z_b, saved, spec)
        return tuple(terms)

    @staticmethod
    def backward(ctx, g_loss, g_on, g_off, *_):
        if g_loss is None and g_on is None and g_off is None:
            return None, None, None
        z_a, z_b, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            grads = torch.ops.barlow_fused.backward(z_a, z_b, saved, g_loss, g_on, g_off, *needs, *_flatten(ctx.spec))
        elif torch.is_grad_enabled():  # create_graph=True, or torch.func
            grads = _FirstDerivative.apply(z_a, z_b, g_loss, g_on, g_off, needs, ctx.spec, *saved)
        else:
            grads = backward(z_a, z_b, saved, g_loss, g_on, g_off, *needs, ctx.spec)
        return grads[0] if needs[0] else None, grads[1] if needs[1] else None, None


class _FunctionalTransformFunction(torch.autograd.Function):
    """The same for ``torch.func``, which wants the context set up apart and everything that is saved among the outputs.

    Preparing such a call costs 20 us, so it is not used where no transform is active.
    """

    @staticmethod
    def forward(z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        *terms, saved = _run_forward(z_a, z_b, spec, need_grad=True)
        return *terms, *saved

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[3:])
        _save(ctx, inputs[0], inputs[1], output[3:], inputs[2])

    backward = BarlowTwinsFunction.backward


def _run_forward(z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool) -> tuple:
    if torch.compiler.is_compiling():
        return torch.ops.barlow_fused.forward(z_a, z_b, need_grad, *_flatten(spec))
    return forward(z_a, z_b, need_grad, spec)


def _save(ctx, z_a: Tensor, z_b: Tensor, saved: list[Tensor], spec: Spec) -> None:
    ctx.save_for_backward(z_a, z_b, *saved)
    ctx.set_materialize_grads(False)  # a term that is not used has the gradient None
    ctx.spec = spec


class _FirstDerivative(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it is an error, not a wrong number."""

    @staticmethod
    def forward(z_a, z_b, g_loss, g_on, g_off, needs, spec, *saved):
        return backward(z_a, z_b, list(saved), g_loss, g_on, g_off, *needs, spec)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "barlow_twins_loss has no second derivative: its backward pass cannot be differentiated. "
            "Use backend='reference' where you need one."
        )


def _flatten(spec: Spec) -> tuple[str, str, float, float, int, float, str]:
    """A spec as the operators take it, in types that an operator's schema has."""
    convention = spec.normalization
    if convention is None:
        return spec.backend, spec.route, spec.lambd, spec.scale, 0, 0.0, "none"
    return (
        *(spec.backend, spec.route, spec.lambd, spec.scale),
        *(convention.correction, float(convention.eps), convention.eps_added_to),
    )


def _unflatten(
    backend: str, route: str, lambd: float, scale: float, correction: int, eps: float, eps_added_to: str
) -> Spec:
    convention = None if eps_added_to == "none" else Normalization(correction, eps, eps_added_to)
    return Spec(backend, route, convention, lambd, scale)


def _resolve(spec: Spec, z: Tensor) -> Spec:
    return spec._replace(backend=resolve_backend(spec.backend, z.device, z.dtype, None, z.shape, spec.route))


_SPEC_SCHEMA = "str backend, str route, float lambd, float scale, int correction, float eps, str eps_added_to"


@torch.library.custom_op(
    "barlow_fused::forward",
    mutates_args=(),
    schema=f"(Tensor z_a, Tensor z_b, bool need_grad, {_SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def _forward_op(z_a, z_b, need_grad, *spec):
    return forward(z_a, z_b, need_grad, _resolve(_unflatten(*spec), z_a))


@torch.library.custom_op(
    "barlow_fused::backward",
    mutates_args=(),
    schema="(Tensor z_a, Tensor z_b, Tensor[] saved, Tensor? g_loss, Tensor? g_on, Tensor? g_off, bool need_a, "
    f"bool need_b, {_SPEC_SCHEMA}) -> (Tensor, Tensor)",
)
def _backward_op(z_a, z_b, saved, g_loss, g_on, g_off, need_a, need_b, *spec):
    grads = backward(z_a, z_b, saved, g_loss, g_on, g_off, need_a, need_b, _resolve(_unflatten(*spec), z_a))
    return tuple(z_a.new_empty(0) if grad is None else grad for grad in grads)  # an operator cannot return None


def forward(z_a: Tensor, z_b: Tensor, need_grad: bool, spec: Spec) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """loss, on_diag, off_diag, and what the backward pass needs (nothing where no gradient is wanted)."""
    ops = backends.load(spec.backend, z_a.device)
    with without_autocast(z_a.device.type):
        x = ops.normalize(z_a, z_b, spec.normalization)
        reduce = ops.gram if spec.route == "gram" else ops.correlate
        terms, product = reduce(x, spec.lambd, spec.scale, need_grad)
    return *terms, [product, *x.saved()] if need_grad else []


@_forward_op.register_fake
def _(z_a: Tensor, z_b: Tensor, need_grad: bool, *spec: str | float):
    backend, route, normalization, _, _ = _resolve(_unflatten(*spec), z_a)
    terms = (z_a.new_empty((), dtype=torch.promote_types(z_a.dtype, torch.float32)) for _ in range(3))
    return *terms, backends.load(backend, z_a.device).empty_saved(z_a, route, normalization) if need_grad else []


def backward(
    z_a: Tensor,
    z_b: Tensor,
    saved: list[Tensor],
    g_loss: Tensor | None,
    g_on: Tensor | None,
    g_off: Tensor | None,
    need_a: bool,
    need_b: bool,
    spec: Spec,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to z_a and z_b; None in place of one that is not needed."""
    ops = backends.load(spec.backend, z_a.device)
    product, *rest = saved
    with without_autocast(z_a.device.type):
        x = ops.Normalized.from_saved(z_a, z_b, spec.normalization, rest)
        weights = Weights(g_loss, g_on, g_off, spec.lambd, spec.scale)
        return ops.input_grad(x, product, spec.route, weights, (need_a, need_b))


@_backward_op.register_fake
def _(z_a: Tensor, z_b: Tensor, saved: list[Tensor], g_loss, g_on, g_off, need_a: bool, need_b: bool, *_):
    return tuple(torch.empty_like(z) if need else z.new_empty(0) for z, need in ((z_a, need_a), (z_b, need_b)))


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The operations choose their own precision: autocast must not change it inside them."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
