"""One optimiser step: two views through the network, the loss of the whole batch, its gradient, the update.

**Accumulation.** A batch that does not fit passes in parts, and the loss still is the whole batch's (its
cross-correlation is no mean over parts): the projections of all parts are computed without their graphs and kept, the
loss of all of them is differentiated down to them, then each part passes again, now with its graph, and takes its share
of that gradient back to the weights (Gao et al. 2021, arXiv 2101.06983). This is the loss's gradient exactly, for a
second forward pass. What it means for the layers that depend on more than one image:

* The network's batch norms see one part at a time (with several processes: that part of all of them), as with any
  accumulation; their running statistics move once a part. The loss standardises over the whole batch.
* Dropout and stochastic depth draw the same numbers in both passes: they are seeded by step, part and process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import BarlowTwinsLoss, linear_barlow_twins_loss
from ..reference import BarlowTwinsTerms, reference_loss
from . import shards
from .config import Config
from .loader import derive
from .model import BarlowTwins, running_statistics_kept
from .processes import Processes

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ReferenceLoss(nn.Module):
    """``--loss reference`` over several processes: every one gathers the whole batch and computes all of it."""

    def __init__(self, lambd: float, gradient: str) -> None:
        super().__init__()
        self.lambd, self.gradient = lambd, gradient

    def forward(self, z_a: Tensor, z_b: Tensor) -> BarlowTwinsTerms:  # 2 x [n, D]
        """The loss of all processes' samples."""
        terms = reference_loss(*(torch.cat(all_gather(z)) for z in (z_a, z_b)), self.lambd)
        if self.gradient == "lightly":  # gathering sums the gradients of the P processes' losses
            return terms
        share = terms.loss / dist.get_world_size()
        return terms._replace(loss=share + (terms.loss - share).detach())


class LastLayerLoss:
    """``--fused-projector``: the loss of what the network gives its last layer, and of that layer's weight."""

    def __init__(self, config: Config, **several: str) -> None:
        self.config, self.several = config, several

    def __call__(self, h_a: Tensor, h_b: Tensor, weight: Tensor) -> BarlowTwinsTerms:  # 2 x [n, H], [D, H]
        """The loss of all processes' samples."""
        with autocast(self.config, h_a.device):
            return linear_barlow_twins_loss(
                h_a, h_b, weight, lambd=self.config.lambd, return_terms=True, **self.several
            )


def criterion(config: Config, processes: Processes, network: BarlowTwins) -> Callable[..., Any]:
    """The loss over the samples of all processes, of what the network gives; returns (loss, on_diag, off_diag)."""
    if shards.is_sharded(network):
        return shards.ShardedLoss(network, config, AUTOCAST.get(config.precision))
    several = {"group": "world", "gradient": config.gradient} if processes.count > 1 else {}
    if config.fused_projector:
        network.embeds = False
        return LastLayerLoss(config, **several)
    if config.loss == "reference" and processes.count > 1:
        return ReferenceLoss(config.lambd, config.gradient)
    backend = "auto" if config.loss == "fused" else "reference"
    return BarlowTwinsLoss(lambd=config.lambd, backend=backend, return_terms=True, **several)


class Stepper(NamedTuple):
    """What a step needs beside its views."""

    model: nn.Module  # a BarlowTwins, or DistributedDataParallel's of one
    criterion: Callable[..., Any]  # of (z_a, z_b), or (h_a, h_b, weight)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: Config
    device: torch.device
    rank: int

    def backward(self, parts: Sequence[tuple[Tensor, Tensor]], step: int) -> BarlowTwinsTerms:
        """Add the (scaled) gradient of the loss of a step's parts to the weights' ``grad``."""
        if len(parts) == 1:
            terms = self.criterion(*self._forward(parts[0], step, 0))
            self.scaler.scale(terms.loss).backward()
            return terms
        with torch.no_grad(), running_statistics_kept(self.model):
            passed = [self._forward(views, step, part) for part, views in enumerate(parts)]
        of_parts = list(zip(*passed, strict=True))
        inputs = [torch.cat(z).requires_grad_() for z in of_parts[:2]]  # (n, D), all parts
        inputs += [
            weight.detach().requires_grad_() for weight, *_ in of_parts[2:]
        ]  # the last layer's, if the loss has it
        terms = self.criterion(*inputs)
        self.scaler.scale(terms.loss).backward()
        of_views, of_weight = [x.grad for x in inputs[:2]], [x.grad for x in inputs[2:]]
        shares = zip(*(grad.split(len(grad) // len(parts)) for grad in of_views), strict=True)
        for part, (views, share) in enumerate(zip(parts, shares, strict=True)):
            last = part + 1 == len(parts)
            with self._averaged(last):
                grads = (*share, *of_weight) if last else share
                torch.autograd.backward(self._forward(views, step, part)[: len(grads)], grads)
        return terms

    def rehearse(self, views: tuple[Tensor, Tensor]) -> None:
        """A step that counts for nothing: by its first one DistributedDataParallel arranges what it sends in others.

        Another arrangement is another order of sums. So a run that is resumed has the bits of one that was not.
        """
        if isinstance(self.model, DistributedDataParallel):
            with running_statistics_kept(self.model):
                sum(x.float().sum() for x in self._forward(views, 0, 0)).backward()
            self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Change the weights and forget the gradient. GradScaler leaves a step out whose gradient overflowed."""
        if self.scaler.is_enabled():
            self._unscale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _unscale(self) -> None:
        """GradScaler takes shards or whole tensors, not both; and every process must leave out the same steps."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sharded = [(p, p.grad) for p in parameters if isinstance(p, DTensor)]
        if not sharded:
            return
        whole = next(p.grad for p in parameters if not isinstance(p, DTensor))
        overflow = torch.stack([(~grad.to_local().isfinite()).any() for _, grad in sharded]).any().to(torch.int32)
        dist.all_reduce(overflow, dist.ReduceOp.MAX)
        whole.masked_fill_(overflow.bool(), float("inf"))  # which GradScaler finds, on every process
        scale = self.scaler.get_scale()
        for p, _ in sharded:
            p.grad = None
        self.scaler.unscale_(self.optimizer)
        for p, grad in sharded:
            p.grad = grad / scale

    def _forward(self, views: tuple[Tensor, Tensor], step: int, part: int) -> tuple[Tensor, ...]:
        torch.manual_seed(derive(self.config.seed, "network", step, part, self.rank))
        placed = (to_device(view, self.config, self.device) for view in views)
        with autocast(self.config, self.device):
            return self.model(*placed)

    def _averaged(self, last: bool) -> Any:
        """DDP communicates once a step, with the last part."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The context in which the network runs."""
    return torch.autocast(
        device.type, AUTOCAST.get(config.precision, torch.bfloat16), enabled=config.precision in AUTOCAST
    )


def to_device(images: Tensor, config: Config, device: torch.device) -> Tensor:
    """Images as the network takes them."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return images.to(device, dtype, non_blocking=True).contiguous(memory_format=layout)
