"""Methods for the benchmark to refuse, to measure or to survive. Its processes import them from here."""

from __future__ import annotations

import functools

import torch

from benchmarks import peers
from benchmarks.peers import Peer


def give(loss_function):
    return loss_function


def make_peer(name, loss_function, **fields):
    return Peer(name, functools.partial(give, loss_function), no_bytes, **fields)


def no_bytes(n, d, dtype, device):
    return 0


def another_loss(z_a, z_b):
    return (z_a * z_b).square().mean()


def wrong_loss(z_a, z_b):
    return 1.01 * peers.usual_loss(z_a, z_b)


def broken_loss(z_a, z_b):
    raise RuntimeError("a sentence that says what broke\nand more")


def hungry_loss(z_a, z_b):
    raise torch.OutOfMemoryError("tried to allocate 1 TB")


def allocating_loss(z_a, z_b):
    block = torch.ones(50_000_000)  # 200 MB
    return peers.usual_loss(z_a, z_b) + 0 * block[0]
