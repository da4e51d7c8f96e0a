"""What a user calls: the loss with the last linear layer in it, as a function and as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import Options, check_group_options, check_inputs, check_weight, finite, integer
from ..backends.operations import Spec
from ..choice import choose_backend
from ..function import apply
from ..loss import BarlowTwinsLoss, any_dtensor, shards_of
from ..normalization import Normalization, resolve_normalization
from ..reference import BarlowTwinsTerms, reference_loss
from .route import choose_linear_route, hidden_rate

if TYPE_CHECKING:
    from ..arguments import Group


def linear_barlow_twins_loss(
    h_a: Tensor,  # [N, H]
    h_b: Tensor,  # [N, H]
    weight: Tensor,  # [D, H]
    lambd: float = 0.0051,
    scale: float = 1.0,
    normalization: str | Normalization = "batch_norm",
    eps: float | None = None,
    route: str = "auto",
    backend: str = "auto",
    return_terms: bool = False,
    chunk_features: int | None = None,
    group: Group | None = None,
    gradient: str | None = None,
    statistics: str = "global",
    reduce_dtype: torch.dtype | None = None,
) -> Tensor | BarlowTwinsTerms:
    """The exact Barlow Twins loss of z = h weight^T, without the (N, D) embeddings: last layer and loss in one.

        loss = barlow_twins_loss(h_a @ weight.T, h_b @ weight.T)

    Embeddings are made a slab of features at a time, in the forward and again in the backward pass. Beside h, the
    weight and their gradients this takes two slabs and two (N, N) matrices, whatever D is. Fused linear cross-entropy
    losses do the same for language models (Liger, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009).

    Args:
        h_a: Activations of the first view before the projector's last linear layer, (N, H) with N >= 2. float32,
            float64, bfloat16 or float16; any strides. Autocast casts them and the weight, as it does for ``nn.Linear``.
        h_b: Those of the second view. Same shape, dtype and device as ``h_a``.
        weight: That layer's weight, (D, H), as ``nn.Linear`` has it, of the same dtype. There is no bias: standardising
            removes it. A DTensor with its rows in shards, ``Shard(0)``, goes with activations that are DTensors of the
            same mesh, ``Shard(0)`` or ``Replicate()`` (docs/sharded.md).
        lambd: As in ``barlow_twins_loss``.
        scale: As in ``barlow_twins_loss``.
        normalization: As in ``barlow_twins_loss``.
        eps: As in ``barlow_twins_loss``.
        route: ``"gram"`` or ``"direct"``, as in ``barlow_twins_loss``. ``"hidden"``: no embeddings at all, 38 H^2 D
            FLOPs, two (H, H) matrices, PyTorch's operators alone. ``"auto"``: hidden where it is ahead, at H up to
            about N/2 (N/10 in half precision on accelerators), if the backend may be PyTorch's operators.
        backend: As in ``barlow_twins_loss``. ``"reference"`` makes z.
        return_terms: As in ``barlow_twins_loss``.
        chunk_features: Features of a slab of the Gram and the hidden route. None: what a CPU's caches hold, or on
            accelerators 128 MiB of embeddings.
        group: As in ``barlow_twins_loss``. ``h_a`` and ``h_b`` are this rank's samples, (n_r, H). The weight is whole,
            and the same on every rank. A rank computes for a share of the features (the direct route: for its samples),
            and gets a part of the weight's gradient. The parts' sum over the ranks, which DDP and FSDP turn into an
            average, is what the layer by itself would get.
        gradient: As in ``barlow_twins_loss``.
        statistics: As in ``barlow_twins_loss``.
        reduce_dtype: As in ``barlow_twins_loss``.

    Returns:
        As ``barlow_twins_loss``, differentiable with respect to ``h_a``, ``h_b`` and ``weight``.

    Raises:
        TypeError: An argument has the wrong type. The message names it.
        ValueError: An argument has a value that is not accepted. The message names it.
        RuntimeError: As ``barlow_twins_loss``. With a group also in the backward pass, if the loss's gradient differs
            between ranks (``gradient="official"``, other routes than direct).
    """
    options = Options(
        lambd, scale, normalization, eps, route, backend, return_terms, group, gradient, statistics, reduce_dtype
    )
    return _loss(h_a, h_b, weight, options, chunk_features)


def _loss(
    h_a: Tensor, h_b: Tensor, weight: Tensor, options: Options, chunk_features: int | None
) -> Tensor | BarlowTwinsTerms:
    if any_dtensor(h_a, h_b, weight):
        from ..distributed import sharded

        (h_a, h_b, weight), options, shards = sharded.last_layer(h_a, h_b, weight, options)
    else:
        shards = shards_of(options)
    h_a, h_b, weight = _autocast(h_a, h_b, weight)
    if shards is not None:
        from .. import distributed  # not everyone needs it, and it imports much

        terms = distributed.apply((h_a, h_b, weight), options, shards, chunk_features)  # checks as well
        return terms if options.return_terms else terms.loss
    check_group_options(options)
    check_inputs(h_a, h_b, names=("h_a", "h_b"), of="hidden units H")
    check_weight(weight, h_a)
    lambd, scale = finite("lambd", options.lambd), finite("scale", options.scale)
    chunk = 0 if chunk_features is None else integer("chunk_features", chunk_features, 1)
    convention = resolve_normalization(options.normalization, options.eps)
    backend = choose_backend(options.backend)
    rate = hidden_rate(h_a.device.type, h_a.dtype)
    route = choose_linear_route(options.route, len(h_a), h_a.shape[1], len(weight), backend, rate)
    if backend == "reference":
        terms = reference_loss(h_a @ weight.T, h_b @ weight.T, lambd, scale, convention)
    else:
        spec = Spec("torch" if route == "hidden" else backend, route, convention, lambd, scale, chunk)
        terms = apply((h_a, h_b, weight), spec, options.return_terms)
    return BarlowTwinsTerms(*terms) if options.return_terms else terms[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as nn.Linear takes them under autocast."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.amp.is_autocast_available(first.device.type):
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


class LinearBarlowTwinsLoss(nn.Module):
    """``linear_barlow_twins_loss`` as a module that owns the weight.

    >>> projector, last = projector[:-1], projector[-1]
    >>> barlow = LinearBarlowTwinsLoss.from_linear(last, lambd=0.0051)
    >>> loss = barlow(projector(y_a), projector(y_b))

    Args:
        in_features: H.
        out_features: D.
        device: Of the weight, which is initialised as that of ``nn.Linear``.
        dtype: Of the weight.
        chunk_features: As in ``linear_barlow_twins_loss``.
        **options: Those of ``linear_barlow_twins_loss`` after the tensors. Each is an attribute of ``loss``, and may be
            changed there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk_features: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        sizes = integer("in_features", in_features, 1), integer("out_features", out_features, 1)
        layer = nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
        self.weight = layer.weight
        self._take(chunk_features, options)

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, chunk_features: int | None = None, **options: object
    ) -> LinearBarlowTwinsLoss:
        """The loss that takes the place of ``layer`` and a loss behind it. It owns the same weight.

        A call raises ValueError if the layer has a bias and nothing standardises it away (``normalization="none"``).

        Args:
            layer: The projector's last layer.
            chunk_features: As in ``linear_barlow_twins_loss``.
            **options: As of the class.

        Raises:
            TypeError: ``layer`` is not a ``torch.nn.Linear``.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer must be a torch.nn.Linear, got {type(layer).__name__}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.weight = layer.weight
        module._take(chunk_features, options)
        module.biased = layer.bias is not None
        return module

    def _take(self, chunk_features: int | None, options: dict[str, object]) -> None:
        route = options.pop("route", "auto")
        choose_linear_route(route, 2, 2, 2, choose_backend(options.get("backend", "auto")))
        self.biased = False
        self.loss = BarlowTwinsLoss(**options)
        self.loss.route = route
        self.chunk_features = None if chunk_features is None else integer("chunk_features", chunk_features, 1)

    def forward(self, h_a: Tensor, h_b: Tensor) -> Tensor | BarlowTwinsTerms:  # [N, H], [N, H] -> []
        """The loss of two views' activations."""
        if self.biased and self.loss.normalization == "none":
            raise ValueError("layer has a bias, which normalization='none' would need: accepted is bias=False")
        return _loss(h_a, h_b, self.weight, self.loss, self.chunk_features)

    def extra_repr(self) -> str:
        """The layer's shape."""
        d, h = self.weight.shape
        return f"in_features={h}, out_features={d}, chunk_features={self.chunk_features}"
