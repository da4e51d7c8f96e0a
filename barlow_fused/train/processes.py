"""The processes of a run: one, or as many as torchrun started, on one node or on several.

torchrun says through the environment which process this is and where the others meet; nothing is fixed here. Small
things (a signal, an accuracy) travel between CPUs by Gloo, gradients between GPUs by NCCL.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class Processes(NamedTuple):
    """Which process this is."""

    rank: int
    local_rank: int  # on its node
    count: int

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self.most(0)  # between CPUs; dist.barrier would take the GPUs

    def most(self, *numbers: int) -> list[int]:
        """The largest of the processes' numbers, one by one, on every process."""
        if self.count == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, on the CPU; process r has rows r, r + count, ... of the result."""
        if self.count == 1:
            return rows.cpu()
        sizes = self.most(*[len(rows) if rank == self.rank else 0 for rank in range(self.count)])
        parts = [rows.new_empty(size, *rows.shape[1:], device="cpu") for size in sizes]
        for rank, part in enumerate(parts):
            if rank == self.rank:
                part.copy_(rows)
            dist.broadcast(part, rank)
        whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:], device="cpu")
        for rank, part in enumerate(parts):
            whole[rank :: self.count] = part
        return whole


def start(device: str) -> Processes:
    """Join the other processes, if torchrun started several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if count > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Processes(rank, local_rank, count)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def synchronise_batch_norm(model: nn.Module, device: str) -> nn.Module:
    """The model with batch norms whose statistics are those of all processes' samples."""
    if device == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            twin = SyncBatchNormOnCPU(child.num_features, child.eps, child.momentum, child.affine)
            twin._parameters, twin._buffers = child._parameters, child._buffers  # an optimiser may have them already
            setattr(model, name, twin.train(child.training))
        else:
            synchronise_batch_norm(child, device)
    return model


class SyncBatchNormOnCPU(nn.modules.batchnorm._BatchNorm):
    """What PyTorch's SyncBatchNorm does, which runs on GPUs only: the statistics of all processes, differentiable."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {x.dim()} dimensions")

    def forward(self, x: Tensor) -> Tensor:  # [N, C, ...]
        """Batch norm over the samples and positions of all processes."""
        if not self.training:
            return super().forward(x)
        over = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            count = dist.get_world_size() * x.numel() // x.shape[1]  # each process has as many samples
            mean = all_reduce(wide.sum(over)) / count
            centred = wide - mean.view(shape)
            variance = all_reduce(centred.square().sum(over)) / count
            if self.track_running_stats:
                self.num_batches_tracked.add_(1)
                for running, new in (
                    (self.running_mean, mean),
                    (self.running_var, variance * count / max(count - 1, 1)),
                ):
                    running.lerp_(new.detach().to(running.dtype), self.momentum)
            result = centred * (variance + self.eps).rsqrt().view(shape)
            if self.affine:
                result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(x.dtype)
