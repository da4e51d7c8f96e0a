"""The autograd function over a backend's two passes.

``apply`` is what the loss calls. The work itself, forward and backward, is also registered as two opaque operators
(``torch.ops.barlow_fused.forward`` and ``.backward``), which ``torch.compile`` puts into its graph as they are: no
graph break, and the same bits as eager.

The gradient of the gradient is not implemented; asking for it raises an error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .arguments import finite
from .backends.operations import Composed, Spec, passes
from .choice import pin, resolve_backend
from .normalization import Normalization


def apply(z_a: Tensor, z_b: Tensor, spec: Spec, every_term: bool) -> tuple[Tensor, ...]:  # [N, D], [N, D]
    """The loss, differentiable; with ``every_term`` also on_diag and off_diag."""
    if torch.compiler.is_compiling():  # the operators do it themselves, and the graph remembers by what
        spec = spec._replace(backend=pin(spec.backend, z_a.device))
        if z_a is z_b:  # an autograd function cannot be traced with one tensor for two arguments
            z_b = z_b.view_as(z_b)
    else:
        _refuse_what_would_be_wrong(z_a, z_b)
        spec = _resolve(spec, z_a)
    if torch._C._are_functorch_transforms_active():
        return _FunctionalTransformFunction.apply(z_a, z_b, spec)[: 3 if every_term else 1]
    if torch.is_grad_enabled() and (z_a.requires_grad or z_b.requires_grad):
        return BarlowTwinsFunction.apply(z_a, z_b, spec, every_term)
    run = _run_operator if torch.compiler.is_compiling() else _passes(spec, z_a).forward
    return run(z_a, z_b, spec, False, every_term)[0]


ONE_CALL_AT_A_TIME = (
    "barlow_twins_loss cannot be batched by torch.vmap, nor its gradient (jacrev, jacfwd, hessian, "
    "is_grads_batched=True): call it for one pair of views after the other, and take torch.func.grad or vjp for the "
    "gradient. backend='reference' can be batched"
)
NO_FORWARD_MODE = (
    "barlow_twins_loss has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): use reverse mode or "
    "backend='reference'"
)


def _refuse_what_would_be_wrong(z_a: Tensor, z_b: Tensor) -> None:
    if torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace would record the loss of this batch as a constant: use torch.compile or torch.export, or "
            "trace the model without the loss"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(z).tangent is not None for z in (z_a, z_b)):
        raise NotImplementedError(NO_FORWARD_MODE)


class _OneCallAtATime(torch.autograd.Function):
    """A function that torch.func can differentiate in reverse mode, and that says what it cannot do else."""

    @staticmethod
    def vmap(info, in_dims, *args):
        raise NotImplementedError(ONE_CALL_AT_A_TIME)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE)


class BarlowTwinsFunction(torch.autograd.Function):
    """(z_a, z_b, spec, every_term) -> (loss,) or (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx, z_a: Tensor, z_b: Tensor, spec: Spec, every_term: bool) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            terms, saved = _run_operator(z_a, z_b, spec, True, every_term)
        else:
            ctx.passes = _passes(spec, z_a)
            terms, saved = ctx.passes.forward(z_a, z_b, spec, True, every_term)
        _save(ctx, z_a, z_b, saved, spec)
        return terms

    @staticmethod
    def backward(ctx, g_loss, g_on=None, g_off=None, *_):
        if g_loss is None and g_on is None and g_off is None:
            return None, None, None, None
        z_a, z_b, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        spec, g_terms = ctx.spec, (g_loss, g_on, g_off)
        if torch.compiler.is_compiling():
            grads = torch.ops.barlow_fused.backward(z_a, z_b, saved, *g_terms, *needs, *_flatten(spec))
            grads = grads[0] if needs[0] else None, grads[1] if needs[1] else None
        elif torch.is_grad_enabled():  # create_graph=True, or torch.func
            grads = _FirstDerivative.apply(z_a, z_b, *g_terms, needs, spec, *saved)
        else:
            if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in g_terms):
                raise NotImplementedError(ONE_CALL_AT_A_TIME)
            grads = ctx.passes.backward(z_a, z_b, saved, spec, g_terms, needs)
        return *grads, None, None


class _FunctionalTransformFunction(_OneCallAtATime):
    """The same for ``torch.func``, which wants the context set up apart and everything that is saved among the outputs.

    Preparing such a call costs 20 us, so it is not used where no transform is active.
    """

    @staticmethod
    def forward(z_a: Tensor, z_b: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        run = _run_operator if torch.compiler.is_compiling() else _passes(spec, z_a).forward
        terms, saved = run(z_a, z_b, spec, True, True)
        return *terms, *saved

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        z_a, z_b, spec = inputs
        ctx.mark_non_differentiable(*output[3:])
        _save(ctx, z_a, z_b, output[3:], spec)
        if not torch.compiler.is_compiling():
            ctx.passes = _passes(spec, z_a)

    @staticmethod
    def backward(ctx, *grads):
        return BarlowTwinsFunction.backward(ctx, *grads)[:3]


def _run_operator(
    z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool, every_term: bool
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """A forward pass in a graph that is being traced."""
    *terms, saved = torch.ops.barlow_fused.forward(z_a, z_b, need_grad, *_flatten(spec))
    return tuple(terms if every_term else terms[:1]), saved


def _passes(spec: Spec, z: Tensor) -> Composed:
    """What has the forward and the backward pass of the spec's backend (operations.py)."""
    return passes(backends.load(spec.backend, z.device))


def _save(ctx, z_a: Tensor, z_b: Tensor, saved: list[Tensor], spec: Spec) -> None:
    ctx.save_for_backward(z_a, z_b, *saved)
    ctx.set_materialize_grads(False)  # a term that is not used has the gradient None
    ctx.spec = spec


class _FirstDerivative(_OneCallAtATime):
    """The backward pass as a function of its own, so that differentiating it is an error, not a wrong number."""

    @staticmethod
    def forward(z_a, z_b, g_loss, g_on, g_off, needs, spec, *saved):
        return _passes(spec, z_a).backward(z_a, z_b, list(saved), spec, (g_loss, g_on, g_off), needs)

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
    backend = resolve_backend(spec.backend, z.device, z.dtype, None, z.shape, spec.route)
    return spec if backend == spec.backend else spec._replace(backend=backend)


_SPEC_SCHEMA = "str backend, str route, float lambd, float scale, int correction, float eps, str eps_added_to"


@torch.library.custom_op(
    "barlow_fused::forward",
    mutates_args=(),
    schema=f"(Tensor z_a, Tensor z_b, bool need_grad, {_SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def _forward_op(z_a, z_b, need_grad, *spec):
    spec = _resolve(_unflatten(*spec), z_a)
    finite("lambd", spec.lambd), finite("scale", spec.scale)  # symbols until now
    terms, saved = _passes(spec, z_a).forward(z_a, z_b, spec, need_grad, True)
    return *terms, saved


@_forward_op.register_fake
def _(z_a, z_b, need_grad, *spec):
    spec = _resolve(_unflatten(*spec), z_a)
    terms = (z_a.new_empty((), dtype=torch.promote_types(z_a.dtype, torch.float32)) for _ in range(3))
    return *terms, _passes(spec, z_a).empty_saved(z_a, spec.route, spec.normalization) if need_grad else []


@torch.library.custom_op(
    "barlow_fused::backward",
    mutates_args=(),
    schema="(Tensor z_a, Tensor z_b, Tensor[] saved, Tensor? g_loss, Tensor? g_on, Tensor? g_off, bool need_a, "
    f"bool need_b, {_SPEC_SCHEMA}) -> (Tensor, Tensor)",
)
def _backward_op(z_a, z_b, saved, g_loss, g_on, g_off, need_a, need_b, *spec):
    spec = _resolve(_unflatten(*spec), z_a)
    grads = _passes(spec, z_a).backward(z_a, z_b, saved, spec, (g_loss, g_on, g_off), (need_a, need_b))
    return _as_promised(z_a, grads[0]), _as_promised(z_b, grads[1])


def _as_promised(z: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient with the strides that the fake one has; an operator cannot return None."""
    if grad is None:
        return z.new_empty(0)
    if grad.stride() == z.stride():
        return grad
    promised = torch.empty_like(z)
    return grad if promised.stride() == grad.stride() else promised.copy_(grad)


@_backward_op.register_fake
def _(z_a, z_b, saved, g_loss, g_on, g_off, need_a, need_b, *_):
    return tuple(torch.empty_like(z) if need else z.new_empty(0) for z, need in ((z_a, need_a), (z_b, need_b)))
