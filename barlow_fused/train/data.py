"""The images, their split, their batches and their views.

scikit-learn carries 1797 real handwritten digits of 8 x 8 grey pixels (UCI ML, E. Alpaydin and C. Kaynak 1998), so that
nothing needs to be downloaded. A fixed fifth is held out for testing; pretraining sees the other images without their
labels.

Everything random here follows from the seed and the step alone: step 500 of a run draws the same batch and the same
views whatever happened before it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.transforms.v2 import functional as transforms

CLASSES = 10
SIZE = 16  # the encoder sees the images enlarged to SIZE x SIZE: small rotations and shifts need finer pixels
TRAIN_IMAGES, TEST_IMAGES = 1437, 360


@dataclasses.dataclass(frozen=True)
class Digits:
    """The two parts of the data set. Images are 8 x 8, in [0, 1]."""

    train_images: Tensor  # [1437, 1, 8, 8]
    train_labels: Tensor  # [1437] used by the evaluation only
    test_images: Tensor  # [360, 1, 8, 8]
    test_labels: Tensor  # [360]


def load() -> Digits:
    """The data set, always split in the same way, with the classes in equal proportions."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def enlarge(images: Tensor) -> Tensor:  # [N, 1, 8, 8] -> [N, 1, 16, 16]
    """What the encoder is given of images that are not augmented."""
    return transforms.resize(images, [SIZE, SIZE])


def random_batch(images: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """The batch of a step (from 0): an epoch is one shuffle of the images, its incomplete last batch left out."""
    steps_per_epoch = len(images) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(len(images), generator=_generator(seed, "order", epoch))
    return images[order[position * batch_size : (position + 1) * batch_size]]


def two_views(images: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:  # [N, 1, 8, 8] -> 2 x [N, 1, 16, 16]
    """Two independently augmented views of each image."""
    generator = _generator(seed, "views", step)
    return augment(images, generator), augment(images, generator)


def augment(images: Tensor, generator: Generator) -> Tensor:  # [N, 1, 8, 8] -> [N, 1, 16, 16]
    """A random view of each image: what one would still read as the same digit.

    torchvision's transforms draw one set of parameters for a whole batch, and applied image by image they would take
    longer than the network. So each image's parameters are drawn here as tensors of N numbers, and the batch is
    computed at once. There is no flip: a mirrored digit is another sign.
    """
    n = len(images)

    def uniform(bound: float, *shape: int) -> Tensor:  # [N, *shape] in [-bound, bound]
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * bound

    # Geometry, in one resampling from 8 x 8 to 16 x 16: rotation by up to 15 degrees, shear, scale and aspect ratio,
    # translation by up to a tenth of the image, and a smooth distortion such as another hand would make.
    angle, shear, scale, aspect = uniform(math.radians(15)), uniform(0.15), uniform(0.15).exp(), uniform(0.08).exp()
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    stretch = torch.stack([scale, shear, torch.zeros(n), scale * aspect], dim=1).view(n, 2, 2)
    translation = uniform(0.2, 2, 1)  # the image spans [-1, 1]
    matrices = torch.cat([rotation @ stretch, translation], dim=2)  # (N, 2, 3)
    grid = F.affine_grid(matrices, [n, 1, SIZE, SIZE], align_corners=False)  # (N, 16, 16, 2): where each pixel looks
    bumps = torch.randn(n, 2, 4, 4, generator=generator) * 0.1
    grid = grid + F.interpolate(bumps, (SIZE, SIZE), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    views = F.grid_sample(images, grid, align_corners=False)

    # Ink: blur of a random strength (half of the images stay sharp), contrast, and noise of a random strength.
    blurred = transforms.gaussian_blur(views, kernel_size=[3, 3], sigma=[1.0, 1.0])
    views = torch.lerp(views, blurred, uniform(1, 1, 1, 1).clamp_min(0))
    views = views * (1 + uniform(0.4, 1, 1, 1))
    return views + torch.randn(views.shape, generator=generator) * uniform(0.1, 1, 1, 1)


def _generator(seed: int, purpose: str, index: int) -> Generator:
    """A stream of random numbers of its own for each seed, purpose and index."""
    return Generator().manual_seed((seed * 2 + ("order", "views").index(purpose)) * 2**31 + index)
