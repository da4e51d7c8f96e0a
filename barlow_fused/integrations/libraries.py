"""The libraries that can be patched: where each keeps its Barlow Twins loss, and a fused twin of that loss.

    library             its loss                                   a centred feature times  means C over processes
    lightly             lightly.loss.BarlowTwinsLoss               1/sqrt(var + 1e-5)       with gather_distributed
    solo-learn          solo.losses.barlow_loss_func               1/sqrt(var + 1e-5)       always
    stable-pretraining  stable_pretraining.losses.BarlowTwinsLoss  1/(unbiased std + 1e-5)  from 0.1.8 on
    monai               monai.losses.BarlowTwinsLoss               1/(unbiased std + 1e-6)  never

All of them divide C by the number of samples; solo-learn multiplies the loss by ``scale_loss``.

Those that know several processes standardise each one's samples by themselves (``statistics="local"``), and take C's
mean over all processes by an all-reduce. Where autograd sees it, its backward pass sums over the processes
(``gradient="lightly"``): lightly from 1.5.26 on, and stable-pretraining. Where it does not, a process gets the gradient
of its own samples (``gradient="official"``): lightly before, and solo-learn. stable-pretraining before 0.1.8 throws
the sum away. Which version it is, the names in the function's code tell.

A twin has the original's parameters and gives the original's number, and never falls back to the original in silence:

* Inputs that the fused loss does not take go to the original once, to raise its own error. Where the original has none
  (it answers a batch of no samples with NaN), the fused loss's error is raised.
* Where the original takes C's mean over several processes, the twin is the loss over all of them. The original is then
  never called, because it might wait for processes that have no such problem: the fused loss's error is raised, and the
  other processes raise one too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_inputs
from ..loss import barlow_twins_loss
from ..normalization import Normalization

BATCH_NORM = Normalization(correction=0, eps=1e-5, eps_added_to="variance")
STABLE_PRETRAINING = Normalization(correction=1, eps=1e-5, eps_added_to="deviation")
MONAI = Normalization(correction=1, eps=1e-6, eps_added_to="deviation")


class Library(NamedTuple):
    """Where a library keeps its loss, and how to make the loss's twin."""

    module: str  # where users import the loss from
    attribute: str  # the loss there: a torch.nn.Module, of which forward is replaced, or a function
    make_twin: Callable[[Callable, Any], Callable]  # the original function, the class or module it is in -> its twin


def lightly_twin(original: Callable, _owner: Any) -> Callable:
    """Of ``lightly.loss.BarlowTwinsLoss.forward``."""

    several = "lightly" if "dist_nn" in _names(original) else "official"

    def forward(self: Any, z_a: Tensor, z_b: Tensor) -> Tensor:
        gradient = several if self.gather_distributed else None
        return fused(z_a, z_b, self.lambda_param, 1.0, BATCH_NORM, lambda a, b: original(self, a, b), gradient)

    return forward


def solo_learn_twin(original: Callable, _owner: Any) -> Callable:
    """Of ``solo.losses.barlow_loss_func``, with its defaults."""

    def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float, scale_loss: float) -> Tensor:
        return fused(z1, z2, lamb, scale_loss, BATCH_NORM, lambda a, b: original(a, b, lamb, scale_loss), "official")

    barlow_loss_func.__defaults__ = original.__defaults__
    return barlow_loss_func


def stable_pretraining_twin(original: Callable, cls: type) -> Callable:
    """Of ``stable_pretraining.losses.BarlowTwinsLoss.forward``."""
    normalize = getattr(cls, "_normalize", None)
    several = "lightly" if "get_world_size" in _names(original) else None

    def forward(self: Any, z_i: Tensor, z_j: Tensor) -> Tensor:
        if getattr(self, "_normalize", None) is not normalize:
            raise NotImplementedError(
                f"{type(self).__name__} has its own _normalize, which the fused loss does not call: "
                "barlow_fused.integrations.unpatch('stable-pretraining') lets it"
            )
        return fused(z_i, z_j, self.lambd, 1.0, STABLE_PRETRAINING, lambda a, b: original(self, a, b), several)

    return forward


def monai_twin(original: Callable, _owner: Any) -> Callable:
    """Of ``monai.losses.BarlowTwinsLoss.forward``."""

    def forward(self: Any, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - the library's name
        return fused(input, target, self.lambd, 1.0, MONAI, lambda a, b: original(self, a, b))

    return forward


LIBRARIES = {
    "lightly": Library("lightly.loss", "BarlowTwinsLoss", lightly_twin),
    "solo-learn": Library("solo.losses", "barlow_loss_func", solo_learn_twin),
    "stable-pretraining": Library("stable_pretraining.losses", "BarlowTwinsLoss", stable_pretraining_twin),
    "monai": Library("monai.losses", "BarlowTwinsLoss", monai_twin),
}


def fused(
    z_a: Tensor,  # [N, D]
    z_b: Tensor,  # [N, D]
    lambd: float | Tensor,
    scale: float | Tensor,
    normalization: Normalization,
    own: Callable[[Tensor, Tensor], Tensor],
    gradient: str | None = None,
) -> Tensor:  # []
    """The fused loss for the arguments of a library's loss; ``own`` is that loss, asked only for its errors.

    The weights may be what the libraries take: any real number, infinity and NaN too, or a 0-d tensor, which gets its
    gradient. ``gradient`` is the convention of a loss over all processes, None where the loss is each process's own.
    Returns float32 (float64 for float64 inputs), under autocast too.
    """
    x_a, x_b = plain(z_a, z_b)
    several = {}
    if gradient is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        several = {"group": "world", "gradient": gradient, "statistics": "local"}
    problem = find_problem(x_a, x_b, lambd, scale)
    if problem is not None:
        if several:
            barlow_twins_loss(x_a, x_b, lambd, scale, normalization, **several)  # raises, in the other processes too
        else:
            own(z_a, z_b)
        raise problem
    if torch.float64 in (x_a.dtype, torch.get_default_dtype()) and not several:
        own(z_a[:2, :1], z_b[:2, :1])  # solo-learn mixes its inputs with tensors of the default dtype: an error then
    if all(isinstance(weight, Real) and math.isfinite(weight) for weight in (lambd, scale)):
        return barlow_twins_loss(x_a, x_b, float(lambd), float(scale), normalization, **several)
    terms = barlow_twins_loss(x_a, x_b, normalization=normalization, return_terms=True, **several)
    lambd, scale = (torch.as_tensor(w, dtype=terms.loss.dtype, device=terms.loss.device) for w in (lambd, scale))
    return scale * (terms.on_diag + lambd * terms.off_diag)


def plain(z_a: Any, z_b: Any) -> tuple[Any, Any]:
    """Two views as the libraries' matrix product sees them, if they are tensors.

    Subclasses that only annotate a tensor, such as MONAI's MetaTensor, are taken off; under autocast, two dtypes become
    one.
    """
    if not (isinstance(z_a, Tensor) and isinstance(z_b, Tensor)):
        return z_a, z_b
    z_a, z_b = (
        z.as_subclass(Tensor)
        if type(z) is not Tensor and type(z).__torch_dispatch__ is Tensor.__torch_dispatch__
        else z
        for z in (z_a, z_b)
    )
    mixed = z_a.dtype != z_b.dtype and {z_a.dtype, z_b.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
    if mixed and torch.is_autocast_enabled(z_a.device.type):
        dtype = torch.promote_types(z_a.dtype, z_b.dtype)
        return z_a.to(dtype), z_b.to(dtype)
    return z_a, z_b


def find_problem(z_a: Any, z_b: Any, lambd: Any, scale: Any) -> Exception | None:
    """Why the fused loss does not take these arguments; None if it does."""
    for weight in (lambd, scale):
        if not (isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.dim() == 0)):
            return TypeError(f"a weight of the loss must be a real number or a 0-d tensor, got {type(weight).__name__}")
    try:
        check_inputs(z_a, z_b)
    except (TypeError, ValueError) as error:
        return error
    return None


def _names(function: Callable) -> tuple[str, ...]:
    """The names that a function's code looks up."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names
