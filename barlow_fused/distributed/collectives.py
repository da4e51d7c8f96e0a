"""What travels between the ranks: samples to features and back by all-to-all, sums, and a gather.

Each starts and returns; what it returns waits for the result, so that computation goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .part import Part

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # its older name


def to_features(z: Tensor, part: Part) -> Callable[[], Tensor]:
    """Send (n_r, D), this rank's samples; the result waits for (N, D / P), this rank's features of all samples."""
    if part.group is None:
        return z.detach
    n, widths = z.shape[0], part.widths
    send = z.new_empty(z.numel())
    blocks = [block.view(n, width) for block, width in zip(send.split([n * w for w in widths]), widths, strict=True)]
    torch.split_with_sizes_copy(z.detach(), widths, dim=1, out=blocks)
    own = widths[part.rank]
    received, wait = _exchange(send, [n * w for w in widths], [size * own for size in part.sizes], part)
    return lambda: (wait(), received.view(part.n, own))[1]


def to_samples(grad: Tensor, part: Part) -> Callable[[], Tensor]:
    """The way back: (N, D / P) to (n_r, D)."""
    if part.group is None:
        return lambda: grad
    own, n, widths = grad.shape[1], part.sizes[part.rank], part.widths
    received, wait = _exchange(grad.view(-1), [size * own for size in part.sizes], [n * w for w in widths], part)

    def arrive() -> Tensor:
        wait()
        blocks = received.split([n * w for w in widths])
        return torch.cat([block.view(n, width) for block, width in zip(blocks, widths, strict=True)], dim=1)

    return arrive


def _exchange(send: Tensor, send_sizes: list[int], receive_sizes: list[int], part: Part) -> tuple[Tensor, Callable]:
    received = send.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=part.group, async_op=True)
    return received, work.wait


def gather_samples(h: Tensor, part: Part) -> Tensor:
    """Every rank's (n_r, H), one below the other: (N, H)."""
    most = max(part.sizes)
    padded = torch.nn.functional.pad(h.detach(), (0, 0, 0, most - len(h)))
    every = gather(padded, part.group)  # (P, most, H)
    return torch.cat([block[:n] for block, n in zip(every, part.sizes, strict=True)])


def sum_to_samples(x: Tensor, part: Part) -> Callable[[], Tensor]:
    """(N, H) of every rank, summed, of which a rank gets its samples; the result waits for it."""
    own, h = part.sizes[part.rank], x.shape[1]
    received, wait = _exchange(x.view(-1), [n * h for n in part.sizes], [own * h] * len(part.sizes), part)
    return lambda: (wait(), received.view(-1, own, h).sum(0))[1]


def sum_over_ranks(x: Tensor, part: Part) -> Callable[[], Tensor]:
    """Sum ``x`` over the ranks, in the dtype that the user wants it to travel in; the result waits for it."""
    travelling = x if part.rules.reduce_dtype is None else x.to(part.rules.reduce_dtype)
    first, *others = [group for group in (part.group, part.features) if group is not None]
    work = dist.all_reduce(travelling, group=first, async_op=True)

    def arrive() -> Tensor:
        work.wait()
        for group in others:
            dist.all_reduce(travelling, group=group)
        return travelling.to(x.dtype)

    return arrive


def sum_now(x: Tensor, *groups: dist.ProcessGroup | None) -> Tensor:
    """x, summed in place over the ranks of the groups that there are."""
    for group in groups:
        if group is not None:
            dist.all_reduce(x, group=group)
    return x


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, stacked."""
    every = x.new_empty(group.size() * x.numel())
    getattr(dist, GATHER)(every, x.reshape(-1), group=group)
    return every.view(-1, *x.shape)
