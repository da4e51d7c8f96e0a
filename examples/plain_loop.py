"""Barlow Twins in a plain PyTorch loop: an encoder, a wide projector, and the loss.

python examples/plain_loop.py --steps 200
"""

from __future__ import annotations

import argparse
import itertools

import torch
from digits import loader
from torch import nn

from barlow_fused import BarlowTwinsLoss, loss_floor, suggest_lambda

N, D = 64, 4096


def main(steps: int) -> list[float]:
    """Train for some steps; returns the losses."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    projector = nn.Sequential(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, D))
    network = nn.Sequential(encoder, projector).to(device)

    criterion = BarlowTwinsLoss(lambd=suggest_lambda(N, D))  # the batch norm of the outputs is inside
    floor = loss_floor(N, D, criterion.lambd).loss
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    losses = []
    batches = itertools.chain.from_iterable(itertools.repeat(loader(N)))
    for step, (view_a, view_b) in enumerate(itertools.islice(batches, steps)):
        loss = criterion(network(view_a.to(device)), network(view_b.to(device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.1f}, {losses[-1] - floor:.1f} above the least possible")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
