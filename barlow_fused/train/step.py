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
from torch.nn.parallel import DistributedDataParallel

from .. import BarlowTwinsLoss, linear_barlow_twins_loss
from ..reference import BarlowTwinsTerms, reference_loss
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
    """``--fused-projector``: the loss of what the network gives, and of its projector's last weight."""

    def __init__(self, network: BarlowTwins, config: Config) -> None:
        self.network, self.config = network, config

    def __call__(self, h_a: Tensor, h_b: Tensor) -> BarlowTwinsTerms:  # 2 x [N, H]
        """The loss of one process's samples."""
        weight = self.network.projector[-1].weight
        with autocast(self.config, h_a.device):
            return linear_barlow_twins_loss(h_a, h_b, weight, lambd=self.config.lambd, return_terms=True)


def criterion(config: Config, processes: Processes, network: BarlowTwins) -> Callable[[Tensor, Tensor], Any]:
    """The loss over the samples of all processes; returns (loss, on_diag, off_diag)."""
    if config.fused_projector:
        network.embeds = False
        return LastLayerLoss(network, config)
    if config.loss == "reference" and processes.count > 1:
        return ReferenceLoss(config.lambd, config.gradient)
    several = {"group": "world", "gradient": config.gradient} if processes.count > 1 else {}
    backend = "auto" if config.loss == "fused" else "reference"
    return BarlowTwinsLoss(lambd=config.lambd, backend=backend, return_terms=True, **several)


class Stepper(NamedTuple):
    """What a step needs beside its views."""

    model: nn.Module  # a BarlowTwins, or DistributedDataParallel's of one
    criterion: Callable[[Tensor, Tensor], Any]  # of (z_a, z_b), or (h_a, h_b)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: Config
    device: torch.device
    rank: int

    def backward(self, parts: Sequence[tuple[Tensor, Tensor]], step: int) -> BarlowTwinsTerms:
        """Add the (scaled) gradient of the loss of a step's parts to the weights' ``grad``."""
        if len(parts) == 1:
            z_a, z_b = self._forward(parts[0], step, 0)
            terms = self.criterion(z_a, z_b)
            self.scaler.scale(terms.loss).backward()
            return terms
        with torch.no_grad(), running_statistics_kept(self.model):
            passed = [self._forward(views, step, part) for part, views in enumerate(parts)]
        z_a, z_b = (torch.cat(z).requires_grad_() for z in zip(*passed, strict=True))  # (n, D), all parts
        terms = self.criterion(z_a, z_b)
        self.scaler.scale(terms.loss).backward()
        shares = zip(z_a.grad.split(len(z_a) // len(parts)), z_b.grad.split(len(z_b) // len(parts)), strict=True)
        for part, (views, share) in enumerate(zip(parts, shares, strict=True)):
            with self._averaged(last=part + 1 == len(parts)):
                torch.autograd.backward(self._forward(views, step, part), share)
        return terms

    def update(self) -> None:
        """Change the weights and forget the gradient. GradScaler leaves a step out whose gradient overflowed."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, views: tuple[Tensor, Tensor], step: int, part: int) -> tuple[Tensor, Tensor]:
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
