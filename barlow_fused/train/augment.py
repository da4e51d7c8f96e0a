"""Two views of an image that mean the same: what pretraining is told to see past."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms


def official_views(size: int, mean: list[float], std: list[float]) -> tuple[nn.Module, nn.Module]:
    """The paper's two views, uint8 [C, H, W] -> float [C, size, size]. The second is blurred less, and solarised.

    For views below 96 pixels crops are of at least a fifth of the image instead of 8 %, and the blur's window, a tenth
    of the image as at 224, is never below 3 pixels.
    """

    def view(blur: float, solarise: float) -> nn.Module:
        window = max(3, size // 10 // 2 * 2 + 1)
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=(0.08 if size >= 96 else 0.2, 1.0), interpolation=InterpolationMode.BICUBIC
                ),
                v2.RandomHorizontalFlip(p=0.5),
                v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(window, sigma=(0.1, 2.0))], p=blur),
                v2.RandomSolarize(threshold=128, p=solarise),
                _normalise(mean, std),
            ]
        )

    return view(blur=1.0, solarise=0.0), view(blur=0.1, solarise=0.2)


def plain(size: int, mean: list[float], std: list[float], crop: bool) -> nn.Module:
    """An image as it is evaluated: the short side resized to 256/224 of ``size`` and the centre cut out, as in the
    official code, or all of it where photographs have one size anyway.
    """
    resize = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)] if crop else [v2.Resize([size, size])]
    return v2.Compose([*resize, _normalise(mean, std)])


def probe_view(size: int, mean: list[float], std: list[float]) -> nn.Module:
    """What the official linear probe trains on: a random crop, mirrored half of the time."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), _normalise(mean, std)])


def _normalise(mean: list[float], std: list[float]) -> nn.Module:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def digit_views(images: Tensor, size: int, generator: Generator) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in [0, 1]
    """Two independently augmented views of each handwritten digit."""
    return augment_digits(images, size, generator), augment_digits(images, size, generator)


def augment_digits(images: Tensor, size: int, generator: Generator) -> Tensor:  # [N, C, H, W] -> [N, C, size, size]
    """A random view of each image: what one would still read as the same digit.

    torchvision's transforms draw one set of parameters for a whole batch, and applied image by image they would take
    longer than the network. So each image's parameters are drawn here as tensors of N numbers, and the batch is
    computed at once. There is no flip: a mirrored digit is another sign.
    """
    n = len(images)

    def uniform(bound: float, *shape: int) -> Tensor:  # [N, *shape] in [-bound, bound]
        return (torch.rand(n, *shape, generator=generator, dtype=images.dtype) * 2 - 1) * bound

    def normal(*shape: int) -> Tensor:  # [N, *shape]
        return torch.randn(n, *shape, generator=generator, dtype=images.dtype)

    # Geometry, in one resampling to size x size: rotation by up to 15 degrees, shear, scale and aspect ratio,
    # translation by up to a tenth of the image, and a smooth distortion such as another hand would make.
    angle, shear, scale, aspect = uniform(math.radians(15)), uniform(0.15), uniform(0.15).exp(), uniform(0.08).exp()
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    stretch = torch.stack([scale, shear, torch.zeros_like(scale), scale * aspect], dim=1).view(n, 2, 2)
    translation = uniform(0.2, 2, 1)  # the image spans [-1, 1]
    matrices = torch.cat([rotation @ stretch, translation], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(matrices, [n, 1, size, size], align_corners=False)  # (N, size, size, 2): where a pixel looks
    bumps = normal(2, 4, 4) * 0.1
    grid = grid + F.interpolate(bumps, (size, size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    views = F.grid_sample(images, grid, align_corners=False)

    # Ink: blur of a random strength (half of the images stay sharp), contrast, and noise of a random strength.
    blurred = transforms.gaussian_blur(views, kernel_size=[3, 3], sigma=[1.0, 1.0])
    views = torch.lerp(views, blurred, uniform(1, 1, 1, 1).clamp_min(0))
    views = views * (1 + uniform(0.4, 1, 1, 1))
    return views + normal(*views.shape[1:]) * uniform(0.1, 1, 1, 1)
