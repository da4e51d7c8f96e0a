"""The autograd function over two passes: of a backend, or of the loss with the last layer (linear/).

``apply`` is what the losses call, with two views' embeddings, or with two hidden activations and a weight. The work
itself, forward and backward, is also registered as opaque operators (``torch.ops.barlow_fused.forward`` and
``.backward``, ``.linear_forward`` and ``.linear_backward``), which ``torch.compile`` puts into its graph as they are:
no graph break, and the same bits as eager.

The gradient of the gradient is not implemented; asking for it raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .arguments import finite
from .backends.operations import Composed, Spec, passes
from .choice import pin, resolve_backend
from .normalization import Normalization


def apply(inputs: tuple[Tensor, ...], spec: Spec, every_term: bool) -> tuple[Tensor, ...]:
    """The loss of (z_a, z_b) or (h_a, h_b, weight), differentiable; with ``every_term`` also on_diag and off_diag."""
    if torch.compiler.is_compiling():  # the operators do it themselves, and the graph remembers by what
        spec = spec._replace(backend=pin(spec.backend, inputs[0].device))
        if inputs[0] is inputs[1]:  # an autograd function cannot be traced with one tensor for two arguments
            inputs = inputs[0], inputs[1].view_as(inputs[1]), *inputs[2:]
    else:
        _refuse_what_would_be_wrong(inputs)
        spec = _resolve(spec, inputs)
    if torch._C._are_functorch_transforms_active():
        return _FunctionalTransformFunction.apply(spec, *inputs)[: 3 if every_term else 1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return BarlowTwinsFunction.apply(spec, every_term, *inputs)
    run = _run_operator if torch.compiler.is_compiling() else _passes(spec, inputs).forward
    return run(*inputs, spec, False, every_term)[0]


ONE_CALL_AT_A_TIME = (
    "barlow_twins_loss cannot be batched by torch.vmap, nor its gradient (jacrev, jacfwd, hessian, "
    "is_grads_batched=True): call it for one pair of views after the other, and take torch.func.grad or vjp for the "
    "gradient. backend='reference' can be batched"
)
NO_FORWARD_MODE = (
    "barlow_twins_loss has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): use reverse mode or "
    "backend='reference'"
)


def _refuse_what_would_be_wrong(inputs: tuple[Tensor, ...]) -> None:
    if torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace would record the loss of this batch as a constant: use torch.compile or torch.export, or "
            "trace the model without the loss"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
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
    """(spec, every_term, *inputs) -> (loss,) or (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx, spec: Spec, every_term: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            terms, saved = _run_operator(*inputs, spec, True, every_term)
        else:
            ctx.passes = _passes(spec, inputs)
            terms, saved = ctx.passes.forward(*inputs, spec, True, every_term)
        _save(ctx, inputs, saved, spec)
        return terms

    @staticmethod
    def backward(ctx, g_loss, g_on=None, g_off=None, *_):
        count = ctx.count
        if g_loss is None and g_on is None and g_off is None:
            return (None,) * (2 + count)
        tensors = ctx.saved_tensors
        inputs, saved = tensors[:count], list(tensors[count:])
        needs = ctx.needs_input_grad[-count:]
        spec, g_terms = ctx.spec, (g_loss, g_on, g_off)
        if torch.compiler.is_compiling():
            operator = _OPERATORS[count][1]
            grads = operator(*inputs, saved, *g_terms, *needs, *_flatten(spec))
            grads = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
        elif torch.is_grad_enabled():  # create_graph=True, or torch.func
            grads = _FirstDerivative.apply(*inputs, *g_terms, needs, spec, *saved)
        else:
            if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in g_terms if g is not None):
                raise NotImplementedError(ONE_CALL_AT_A_TIME)
            grads = ctx.passes.backward(*inputs, saved, spec, g_terms, needs)
        return None, None, *grads


class _FunctionalTransformFunction(_OneCallAtATime):
    """The same for ``torch.func``, which wants the context set up apart and everything that is saved among the outputs.

    Preparing such a call costs 20 us, so it is not used where no transform is active.
    """

    @staticmethod
    def forward(spec: Spec, *inputs: Tensor) -> tuple[Tensor, ...]:
        run = _run_operator if torch.compiler.is_compiling() else _passes(spec, inputs).forward
        terms, saved = run(*inputs, spec, True, True)
        return *terms, *saved

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        spec, *tensors = inputs
        ctx.mark_non_differentiable(*output[3:])
        _save(ctx, tensors, output[3:], spec)
        if not torch.compiler.is_compiling():
            ctx.passes = _passes(spec, tensors)

    @staticmethod
    def backward(ctx, *grads):
        return BarlowTwinsFunction.backward(ctx, *grads)[1:]


def _run_operator(*arguments) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """A forward pass in a graph that is being traced; arguments are those of a backend's."""
    *inputs, spec, need_grad, every_term = arguments
    *terms, saved = _OPERATORS[len(inputs)][0](*inputs, need_grad, *_flatten(spec))
    return tuple(terms if every_term else terms[:1]), saved


def _passes(spec: Spec, inputs: Sequence[Tensor]) -> ModuleType | Composed:
    """What has the forward and the backward pass (operations.py) of such inputs."""
    if len(inputs) == 2:
        return passes(backends.load(spec.backend, inputs[0].device))
    from .linear.passes import passes as linear_passes  # not everyone needs it

    return linear_passes(spec, inputs[0].device)


def _save(ctx, inputs: Sequence[Tensor], saved: Sequence[Tensor], spec: Spec) -> None:
    ctx.save_for_backward(*inputs, *saved)
    ctx.set_materialize_grads(False)  # a term that is not used has the gradient None
    ctx.spec, ctx.count = spec, len(inputs)


class _FirstDerivative(_OneCallAtATime):
    """The backward pass as a function of its own, so that differentiating it is an error, not a wrong number."""

    @staticmethod
    def forward(*arguments):
        position = next(i for i, argument in enumerate(arguments) if isinstance(argument, Spec))
        *inputs, g_loss, g_on, g_off, needs = arguments[:position]
        spec, *saved = arguments[position:]
        return _passes(spec, inputs).backward(*inputs, saved, spec, (g_loss, g_on, g_off), needs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "barlow_twins_loss has no second derivative: its backward pass cannot be differentiated. "
            "Use backend='reference' where you need one."
        )


def _flatten(spec: Spec) -> tuple[str, str, float, float, int, float, str, int]:
    """A spec as the operators take it, in types that an operator's schema has."""
    convention = spec.normalization
    values = (
        (0, 0.0, "none")
        if convention is None
        else (
            convention.correction,
            float(convention.eps),
            convention.eps_added_to,
        )
    )
    return spec.backend, spec.route, spec.lambd, spec.scale, *values, spec.chunk


def _unflatten(
    backend: str, route: str, lambd: float, scale: float, correction: int, eps: float, eps_added_to: str, chunk: int
) -> Spec:
    convention = None if eps_added_to == "none" else Normalization(correction, eps, eps_added_to)
    return Spec(backend, route, convention, lambd, scale, chunk)


def _resolve(spec: Spec, inputs: Sequence[Tensor]) -> Spec:
    x = inputs[0]
    shape = x.shape if len(inputs) == 2 else (len(x), len(inputs[2]))  # (N, D)
    backend = resolve_backend(spec.backend, x.device, x.dtype, None, shape, spec.route)
    return spec if backend == spec.backend else Spec(backend, *spec[1:])  # _replace takes several times as long


_SPEC_SCHEMA = (
    "str backend, str route, float lambd, float scale, int correction, float eps, str eps_added_to, int chunk"
)


def _register(prefix: str, names: Sequence[str]) -> tuple[Callable, Callable]:
    """The two operators of a loss that takes so many tensors."""
    count = len(names)
    tensors = ", ".join(f"Tensor {name}" for name in names)
    needs = ", ".join(f"bool need_{name}" for name in names)

    @torch.library.custom_op(
        f"barlow_fused::{prefix}forward",
        mutates_args=(),
        schema=f"({tensors}, bool need_grad, {_SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
    )
    def forward(*arguments):
        inputs, need_grad, spec = arguments[:count], arguments[count], _unflatten(*arguments[count + 1 :])
        spec = _resolve(spec, inputs)
        finite("lambd", spec.lambd), finite("scale", spec.scale)  # symbols until now
        terms, saved = _passes(spec, inputs).forward(*inputs, spec, need_grad, True)
        return *terms, saved

    @forward.register_fake
    def _(*arguments):
        inputs, need_grad, spec = arguments[:count], arguments[count], _unflatten(*arguments[count + 1 :])
        spec, x = _resolve(spec, inputs), inputs[0]
        terms = (x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3))
        saved = _passes(spec, inputs).empty_saved(*_shapes(inputs), spec.route, spec.normalization) if need_grad else []
        return *terms, saved

    @torch.library.custom_op(
        f"barlow_fused::{prefix}backward",
        mutates_args=(),
        schema=f"({tensors}, Tensor[] saved, Tensor? g_loss, Tensor? g_on, Tensor? g_off, {needs}, {_SPEC_SCHEMA}) -> "
        f"({', '.join(['Tensor'] * count)})",
    )
    def backward(*arguments):
        inputs, (saved, *g_terms) = arguments[:count], arguments[count : count + 4]
        needs, spec = arguments[count + 4 : 2 * count + 4], _unflatten(*arguments[2 * count + 4 :])
        spec = _resolve(spec, inputs)
        grads = _passes(spec, inputs).backward(*inputs, saved, spec, tuple(g_terms), needs)
        return tuple(map(_as_promised, inputs, grads))

    @backward.register_fake
    def _(*arguments):
        needs = arguments[count + 4 : 2 * count + 4]
        return tuple(torch.empty_like(x) if need else x.new_empty(0) for x, need in zip(arguments, needs, strict=False))

    operators = torch.ops.barlow_fused
    return getattr(operators, f"{prefix}forward"), getattr(operators, f"{prefix}backward")


def _shapes(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What ``empty_saved`` is told of the inputs."""
    return inputs[:1] if len(inputs) == 2 else inputs


def _as_promised(x: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient with the strides that the fake one has; an operator cannot return None."""
    if grad is None:
        return x.new_empty(0)
    if grad.stride() == x.stride():
        return grad
    promised = torch.empty_like(x)
    return grad if promised.stride() == grad.stride() else promised.copy_(grad)


_OPERATORS = {2: _register("", ("z_a", "z_b")), 3: _register("linear_", ("h_a", "h_b", "weight"))}
