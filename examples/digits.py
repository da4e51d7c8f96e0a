"""Pairs of views of scikit-learn's bundled digits, for the examples."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

VIEW = v2.Compose([v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.8, 1.2)), v2.GaussianBlur(3, (0.1, 1.0))])


def two_views(batch: list[tuple[Tensor]]) -> tuple[Tensor, Tensor]:
    """Two random views of each image, (N, 1, 8, 8) each."""
    images = [image for (image,) in batch]
    return torch.stack([VIEW(image) for image in images]), torch.stack([VIEW(image) for image in images])


def loader(batch_size: int = 64) -> DataLoader:
    """1797 images of 8 x 8 pixels, without their labels."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    return DataLoader(TensorDataset(images), batch_size, shuffle=True, drop_last=True, collate_fn=two_views)
