"""Several processes of a group, forked from one that has imported everything: Python and PyTorch start once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing


def run(ranks: int, function: Callable[..., None], *arguments: object) -> None:
    """``function(*arguments)`` on so many ranks, each with the environment that torchrun would give it.

    Raises what went wrong on one of them, after the others have been ended.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _on_rank, (ranks, port, function, arguments), nprocs=ranks, start_method="fork"
    )


def _on_rank(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    function(*arguments)
