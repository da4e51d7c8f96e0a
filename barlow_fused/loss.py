"""What a user calls: the loss as a function and as a module."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import Options, check_group_options, check_inputs, finite
from .backends.operations import Spec
from .choice import choose_backend, choose_route
from .function import apply
from .normalization import Normalization, resolve_normalization
from .reference import BarlowTwinsTerms, reference_cross_correlation, reference_loss

if TYPE_CHECKING:
    from .arguments import Group
    from .distributed.agreement import Shards


def barlow_twins_loss(
    z_a: Tensor,  # [N, D]
    z_b: Tensor,  # [N, D]
    lambd: float = 0.0051,
    scale: float = 1.0,
    normalization: str | Normalization = "batch_norm",
    eps: float | None = None,
    route: str = "auto",
    backend: str = "auto",
    return_terms: bool = False,
    group: Group | None = None,
    gradient: str | None = None,
    statistics: str = "global",
    reduce_dtype: torch.dtype | None = None,
) -> Tensor | BarlowTwinsTerms:
    """The exact Barlow Twins loss, without the (D, D) matrix.

        C = standardize(z_a)^T standardize(z_b) / N
        loss = scale * ( sum_i (C_ii - 1)^2  +  lambd * sum_{i != j} C_ij^2 )

    Source: Zbontar et al. 2021, arXiv 2103.03230, Algorithm 1.

    Args:
        z_a: Projector outputs of the first view, (N, D) with N >= 2. float32, float64, bfloat16 or float16; any
            strides. A DTensor has the placement ``Shard(0)``, ``Shard(1)``, both on two dimensions of a mesh, or
            ``Replicate()``: N and D then count what all ranks have, the loss is a plain scalar on every rank, and the
            gradients are exactly dL/dz (docs/sharded.md). Then ``group`` and ``gradient`` must not be given.
        z_b: Projector outputs of the second view. Same shape, dtype, device and placements as ``z_a``.
        lambd: Weight of the off-diagonal (redundancy reduction) sum. ``suggest_lambda`` fits it to N and D.
        scale: Factor on the whole loss.
        normalization: How to standardise each feature over the N samples. ``"batch_norm"``: biased variance, eps = 1e-5
            inside the root. ``"std"``: unbiased deviation, eps = 1e-6 added to it. ``"none"``: use the inputs as they
            are. Or a ``Normalization``.
        eps: Replaces the convention's eps.
        route: ``"gram"``: 6 N^2 D FLOPs, two (N, N) matrices. ``"direct"``: 6 N D^2 FLOPs, one (D, D) matrix.
            ``"auto"``: Gram where N <= D/2. Both give the same number. Gram loses precision as N nears or passes D.
        backend: ``"torch"``, ``"triton"``, ``"cuda"``, ``"reference"`` (plain PyTorch and autograd) or ``"auto"``.
        return_terms: Also return the two sums.
        group: The processes whose samples form the batch: a ``torch.distributed`` process group, a one-dimensional
            ``DeviceMesh``, or ``"world"`` for all processes. ``z_a`` and ``z_b`` are then this rank's samples, (n_r, D)
            with n_r >= 1; ranks may differ in n_r. N counts the samples of all ranks, and every rank gets the loss L of
            the whole batch. Every rank must call, and call backward. None: this process's samples alone.
        gradient: Required with a group: which gradient a rank gets. ``"official"``: dL/dz of its own samples, as in the
            paper's code and solo-learn. DDP and FSDP average over the P ranks, which leaves **1/P of** L's gradient.
            ``"lightly"``: **P times** that, as in lightly with ``gather_distributed=True`` and stable-pretraining. The
            average is then L's gradient, as on one process.
        statistics: With a group: which samples a feature is standardised over. ``"global"``: those of all ranks, as in
            the paper's code through SyncBatchNorm. ``"local"``: each rank's own, with n_r >= 2, as in lightly,
            solo-learn and stable-pretraining; C is then the mean of the ranks' C. With ``normalization="none"`` both
            are the same.
        reduce_dtype: With a group: the dtype in which K or C travels to be summed: ``torch.float32``, ``torch.float64``
            or ``torch.bfloat16``. None: the one that it is computed in.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). With ``return_terms`` a named tuple ``(loss,
            on_diag, off_diag)`` of scalars, each differentiable; ``on_diag`` and ``off_diag`` carry neither ``lambd``
            nor ``scale``. NaN and Inf in the inputs reach the loss. A feature whose variance float32 cannot hold
            (values of about 1e18 and more) makes it NaN.

    Raises:
        TypeError: An argument has the wrong type. The message names it.
        ValueError: An argument has a value that is not accepted. The message names it.
        RuntimeError: The backend cannot run here; a second derivative was asked for; with a group, another rank's
            arguments were invalid, or a rank was lost (torch.distributed's own error).
    """
    options = Options(
        lambd, scale, normalization, eps, route, backend, return_terms, group, gradient, statistics, reduce_dtype
    )
    return _loss(z_a, z_b, options)


def _loss(z_a: Tensor, z_b: Tensor, options: Options) -> Tensor | BarlowTwinsTerms:
    if any_dtensor(z_a, z_b):
        from .distributed import sharded

        (z_a, z_b), options, shards = sharded.views(z_a, z_b, options)
    else:
        shards = shards_of(options)
    if shards is not None:
        from . import distributed  # not everyone needs it, and it imports much

        terms = distributed.apply((z_a, z_b), options, shards)  # checks, and tells the other ranks
        return terms if options.return_terms else terms.loss
    check_group_options(options)
    check_inputs(z_a, z_b)
    lambd, scale = finite("lambd", options.lambd), finite("scale", options.scale)
    convention = resolve_normalization(options.normalization, options.eps)
    backend = choose_backend(options.backend)  # which one "auto" is, the function over the backends decides
    route = choose_route(options.route, *z_a.shape, backend)
    if backend == "reference":
        terms = reference_loss(z_a, z_b, lambd, scale, convention)
    else:
        terms = apply((z_a, z_b), Spec(backend, route, convention, lambd, scale), options.return_terms)
    return BarlowTwinsTerms(*terms) if options.return_terms else terms[0]


@dataclasses.dataclass(eq=False, repr=False)
class BarlowTwinsLoss(nn.Module, Options):
    """``barlow_twins_loss`` as a module. It has no parameters and no buffers.

    >>> barlow = BarlowTwinsLoss(lambd=0.0051)
    >>> loss = barlow(z_a, z_b)

    The arguments are those of ``barlow_twins_loss`` after ``z_a`` and ``z_b``. Each is an attribute that you may
    change.
    """

    def __post_init__(self) -> None:
        super().__init__()
        resolve_normalization(self.normalization, self.eps)
        choose_backend(self.backend)
        choose_route(self.route)
        check_group_options(self)
        self.lambd, self.scale = finite("lambd", self.lambd), finite("scale", self.scale)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor | BarlowTwinsTerms:  # [N, D], [N, D] -> []
        """The loss of two views' projector outputs."""
        return _loss(z_a, z_b, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BarlowTwinsLoss:
        memo[id(self.group)] = self.group  # shared: processes cannot be copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def extra_repr(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps:g}"
        several = "" if self.group is None else f", gradient={self.gradient!r}, statistics={self.statistics!r}"
        return (
            f"lambd={self.lambd:g}, scale={self.scale:g}, normalization={self.normalization!r}{eps}, "
            f"route={self.route!r}, backend={self.backend!r}{several}"
        )


def cross_correlation(
    z_a: Tensor,  # [N, D]
    z_b: Tensor,  # [N, D]
    normalization: str | Normalization = "batch_norm",
    eps: float | None = None,
) -> Tensor:  # [D, D]
    """The cross-correlation matrix C = standardize(z_a)^T standardize(z_b) / N, for inspection.

    The loss never forms this matrix. It takes D^2 numbers of memory.

    Args:
        z_a: As in ``barlow_twins_loss``.
        z_b: As in ``barlow_twins_loss``.
        normalization: As in ``barlow_twins_loss``.
        eps: As in ``barlow_twins_loss``.

    Returns:
        C, (D, D), in float32 (float64 for float64 inputs), differentiable.

    Raises:
        TypeError: As ``barlow_twins_loss``.
        ValueError: As ``barlow_twins_loss``.
    """
    check_inputs(z_a, z_b)
    convention = resolve_normalization(normalization, eps)
    dtype = torch.promote_types(z_a.dtype, torch.float32)
    with torch.autocast(z_a.device.type, enabled=False):
        return reference_cross_correlation(z_a.to(dtype), z_b.to(dtype), convention)


def any_dtensor(*inputs: object) -> bool:
    """Whether one of them is a DTensor, whose module not everyone has to load."""
    return any(type(x) is not Tensor and isinstance(x, Tensor) and hasattr(x, "device_mesh") for x in inputs)


def shards_of(options: Options) -> Shards | None:
    """Who has the samples of a batch; None: this process alone."""
    if options.group is None:
        return None
    from .distributed.agreement import Shards, resolve_group

    group = resolve_group(options.group)
    return Shards(group) if group.size() > 1 else None
