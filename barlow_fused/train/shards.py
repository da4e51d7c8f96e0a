"""``--shard-projector``: the rows of the projector's last layer over all processes, as a DTensor.

A process has D / P of the weight's rows, their gradient and their optimiser state. What comes before that layer is
data parallel: its outputs, the hidden activations of all processes' images, are gathered, and their gradients go back
to where they came from (barlow_fused/distributed/sharded.py). So DistributedDataParallel is given a network without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import barlow_twins_loss, linear_barlow_twins_loss
from ..reference import BarlowTwinsTerms
from .config import Config

if TYPE_CHECKING:
    from .model import BarlowTwins


class Trunk(nn.Module):
    """A network without its projector's last layer."""

    def __init__(self, network: BarlowTwins) -> None:
        super().__init__()
        self.backbone, self.hidden = network.backbone, network.projector[:-1]

    def forward(self, y_a: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:  # 2 x [n, C, H, W] -> 2 x [n, H]
        """What the last layer is given."""
        return self.hidden(self.backbone(y_a)), self.hidden(self.backbone(y_b))


class ShardedLoss:
    """The last layer and the loss of all processes' samples; the layer's embeddings are made if they are not fused."""

    def __init__(self, network: BarlowTwins, config: Config, autocast: torch.dtype | None) -> None:
        self.last, self.config, self.autocast = network.projector[-1], config, autocast

    def __call__(self, h_a: Tensor, h_b: Tensor) -> BarlowTwinsTerms:  # 2 x [n, H]
        """The terms. DistributedDataParallel averages what the layers before get, as it does without shards."""
        weight = self.last.weight
        mesh, ranks = weight.device_mesh, weight.device_mesh.size()
        if self.config.gradient == "lightly":
            h_a, h_b = (_ScaledGradient.apply(h, float(ranks)) for h in (h_a, h_b))
        else:
            weight = _ScaledGradient.apply(weight, 1 / ranks)
        views = [DTensor.from_local(h, mesh, [Shard(0)], run_check=False) for h in (h_a, h_b)]
        if self.autocast:
            views, weight = [view.to(self.autocast) for view in views], weight.to(self.autocast)
        arguments = {"lambd": self.config.lambd, "return_terms": True}
        if self.config.fused_projector:
            return linear_barlow_twins_loss(*views, weight, **arguments)
        whole = torch.cat([view.redistribute(placements=[Replicate()]) for view in views])
        return barlow_twins_loss(*nn.functional.linear(whole, weight).chunk(2), **arguments)


class _ScaledGradient(torch.autograd.Function):
    """x, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def shard(network: BarlowTwins, device: torch.device, count: int) -> None:
    """Keep this process's rows of the last layer's weight, which all processes have alike."""
    last = network.projector[-1]
    last.weight = nn.Parameter(_cut(last.weight.detach(), init_device_mesh(device.type, (count,))))


def is_sharded(network: nn.Module) -> bool:
    """Whether ``shard`` was called."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def local(x: Tensor) -> Tensor:
    """The rows that are here."""
    return x.to_local() if isinstance(x, DTensor) else x


def rows(weight: Tensor, chosen: Tensor) -> Tensor:
    """Some rows, on every process: every one of them must ask."""
    if not isinstance(weight, DTensor):
        return weight[chosen]
    start, stop = own_rows(weight)
    here = (chosen >= start) & (chosen < stop)
    found = weight.to_local().new_zeros(len(chosen), weight.shape[1])
    found[here] = weight.to_local()[chosen[here] - start]
    torch.distributed.all_reduce(found, group=weight.device_mesh.get_group())
    return found


def own_rows(x: DTensor) -> tuple[int, int]:
    """Where this process's rows begin and end, as torch.chunk cuts them."""
    mesh, n = x.device_mesh, len(x)
    step = -(-n // mesh.size())
    start = min(n, mesh.get_local_rank() * step)
    return start, min(n, start + step)


def like(target: Tensor, whole: Any) -> Tensor:
    """What a target has of a whole tensor, or of rows in files (checkpoint.Rows): its own rows if it is a shard."""
    is_file = not isinstance(whole, Tensor)
    if not isinstance(target, DTensor):
        return whole.read(0, whole.shape[0]) if is_file else whole
    start, stop = own_rows(target)
    own = whole.read(start, stop) if is_file else whole[start:stop].clone()
    return _wrap(own.to(target.device), target.device_mesh, target.shape)


def placed(state: Any, targets: Mapping[str, Tensor], prefix: str = "") -> Any:
    """A nested state with each tensor as ``like`` its target has it."""
    if isinstance(state, Mapping):
        return {key: placed(value, targets, f"{prefix}{key}/") for key, value in state.items()}
    if isinstance(state, list):
        return [placed(value, targets, prefix) for value in state]
    if not hasattr(state, "shape"):
        return state
    target = targets.get(prefix.rstrip("/"))
    if target is None or target.shape != state.shape:
        return state if isinstance(state, Tensor) else state.read(0, state.shape[0])
    return like(target, state)


def _cut(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    step = -(-len(whole) // mesh.size())
    start = min(len(whole), mesh.get_local_rank() * step)
    return _wrap(whole[start : start + step].clone(), mesh, whole.shape)


def _wrap(own: Tensor, mesh: DeviceMesh, shape: torch.Size) -> DTensor:
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
