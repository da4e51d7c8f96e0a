"""Barlow Twins as a LightningModule, on one device or on several.

python examples/lightning_module.py --steps 200 --devices 2
"""

from __future__ import annotations

import argparse

import lightning
import torch
from digits import loader
from torch import Tensor, nn

from barlow_fused import BarlowTwinsLoss, suggest_lambda

N, D = 64, 4096  # N: of all devices together


class BarlowTwins(lightning.LightningModule):
    """An encoder, a wide projector, and the loss over the samples of all devices."""

    def __init__(self, devices: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, D))
        # DDP averages the gradients. With gradient="lightly" the average is the gradient of the whole batch's loss.
        several = {"group": "world", "gradient": "lightly"} if devices > 1 else {}
        self.criterion = BarlowTwinsLoss(lambd=suggest_lambda(N, D), **several)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of two views."""
        view_a, view_b = batch
        loss = self.criterion(self.projector(self.encoder(view_a)), self.projector(self.encoder(view_b)))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW does not see the loss's scale."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int, devices: int = 1, **options: object) -> BarlowTwins:
    """Train for some steps; ``options`` are Lightning's."""
    module = BarlowTwins(devices)
    trainer = lightning.Trainer(max_steps=steps, devices=devices, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, loader(N // devices))
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--devices", type=int, default=1)
    main(**vars(parser.parse_args()))
