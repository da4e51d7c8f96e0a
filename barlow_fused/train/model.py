"""The model: a small residual encoder, whose output is kept, and a very wide projector, which only the loss sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name


class Encoder(nn.Module):
    """A three-stage ResNet with a small stem for 16 x 16 images of one channel; 0.3 M parameters.

    Its output, the representation, is what k-nearest neighbours and linear probes are given.
    """

    features = 128

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(1, 32)
        self.stages = nn.Sequential(Residual(32, 64), Residual(64, self.features))

    def forward(self, images: Tensor) -> Tensor:  # [N, 1, 16, 16] -> [N, 128]
        """The representation: the last stage's channels, averaged over its positions."""
        x = F.relu(self.stem(images))  # (N, 32, 16, 16)
        return self.stages(x).mean(dim=(2, 3))  # (N, 128, 4, 4) -> (N, 128)


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; halves the resolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(channels, out_channels, stride=2)
        self.conv2 = _conv_bn(out_channels, out_channels)
        self.shortcut = _conv_bn(channels, out_channels, kernel_size=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C', H/2, W/2]
        """The block's output."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class BarlowTwins(nn.Module):
    """Encoder and projector. As in the official code, each view passes on its own, with its own batch norm statistics.

    Args:
        projector_widths: of the projector's linear layers; batch norm and ReLU stand between them.
    """

    def __init__(self, projector_widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = Encoder()
        layers: list[nn.Module] = []
        widths = [Encoder.features, *projector_widths]
        for width, next_width in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))

    def forward(self, images: Tensor) -> Tensor:  # [N, 1, 16, 16] -> [N, D]
        """The projection of one view."""
        return self.projector(self.encoder(images))


@torch.no_grad()
def set_batch_norm_statistics(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every batch norm to those of ``images``, in one pass.

    An untrained network's are mean 0 and variance 1, which are nobody's: with them it would be evaluated below its
    worth, and the gain of pretraining would look larger than it is.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: of one batch here, all images
    was_training = model.training
    model.train()
    model(images)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _conv_bn(channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
