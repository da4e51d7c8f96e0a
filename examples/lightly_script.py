"""A script that uses lightly: the line with ``patch`` is all that is new.

python examples/lightly_script.py --steps 200
"""

from __future__ import annotations

import argparse
import itertools

import torch
from digits import loader
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from torch import nn

from barlow_fused.integrations import patch

patch("lightly")


def main(steps: int) -> list[float]:
    """Train for some steps; returns the losses."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
    network = nn.Sequential(encoder, BarlowTwinsProjectionHead(256, 256, 4096))
    criterion = BarlowTwinsLoss(lambda_param=5e-3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    losses = []
    batches = itertools.chain.from_iterable(itertools.repeat(loader(64)))
    for view_a, view_b in itertools.islice(batches, steps):
        loss = criterion(network(view_a), network(view_b))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.1f} at first, {losses[-1]:.1f} after {steps} steps")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
