"""What a representation is worth while it is made: k-nearest neighbours, and a linear probe of few labels.

The labels of all training images make an easy data set easy (raw pixels alone give 98 % on digits), so the question
that pretraining is meant for comes first: how far do a *few* labels carry? FEW labelled images a class are drawn DRAWS
times (the same draws for every representation), and the mean over the draws is reported. The backbone is frozen:
nothing here trains it. The official linear probe on all labels is in probe.py.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from . import augment
from .config import Config
from .datasets import Images
from .loader import Plain, batches
from .processes import Processes
from .step import autocast, to_device

FEW = 10  # labelled images a class
DRAWS = 20
FEW_NEIGHBOURS, NEIGHBOURS = 5, 20
TEMPERATURE = 0.1
MOST_CLASSES = 100  # with more, a probe of few labels takes too long
BATCH = 256


class Accuracy(NamedTuple):
    """Accuracies on the test images, in percent; those of a few labels are means over the draws, or None."""

    knn_few: float | None
    probe_few: float | None
    knn_all: float


class Features(NamedTuple):
    """A representation of labelled and of test images."""

    train: Tensor  # [M, F]
    train_labels: Tensor  # [M]
    test: Tensor  # [T, F]
    test_labels: Tensor  # [T]


def extract(backbone: nn.Module, images: Images, config: Config, device: torch.device, by: Processes) -> Features:
    """What the backbone makes of the images that k-NN looks at; processes share the work."""
    transform = augment.plain(config.image_size, images.mean, images.std, images.crop)
    count = len(images.labelled)
    bank = torch.linspace(0, count - 1, min(count, config.knn_images)).long().tolist()
    parts: list[Tensor] = []
    for dataset, indices in ((images.labelled, bank), (images.test, list(range(len(images.test))))):
        own = Plain(dataset, indices[by.rank :: by.count], transform)
        parts += map(by.gather, forward(backbone, own, config, device))
    return Features(*parts)


@torch.no_grad()
def forward(
    network: nn.Module, dataset: Plain, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:  # [M, F], [M]
    """What a network in evaluation mode makes of all images of a data set, and their labels; on the CPU."""
    training, rows, labels = network.training, [], []
    network.eval()
    for images, part in batches(dataset, config.workers, batch_size=BATCH):
        with autocast(config, device):
            rows.append(network(to_device(images, config, device)).float().cpu())
        labels.append(part)
    network.train(training)
    return torch.cat(rows), torch.cat(labels)


def evaluate(features: Features, classes: int) -> Accuracy:
    """The accuracies of a representation."""
    everything = torch.arange(len(features.train))
    knn_all = knn_accuracy(features, everything, classes, NEIGHBOURS)
    if classes > MOST_CLASSES:
        return Accuracy(None, None, knn_all)
    draws = [few_of_each_class(features.train_labels, draw, classes) for draw in range(DRAWS)]
    standard = standardised(features)
    return Accuracy(
        knn_few=sum(knn_accuracy(features, draw, classes, FEW_NEIGHBOURS) for draw in draws) / DRAWS,
        probe_few=sum(probe_accuracy(standard, draw) for draw in draws) / DRAWS,
        knn_all=knn_all,
    )


def few_of_each_class(labels: Tensor, draw: int, classes: int, few: int = FEW) -> Tensor:  # [M] -> [classes * few]
    """The indices of ``few`` images of each class; always the same ones for a draw."""
    generator = Generator().manual_seed(draw)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:few] for label in range(classes)])


def knn_accuracy(features: Features, labelled: Tensor, classes: int, neighbours: int) -> float:
    """k-nearest neighbours by cosine similarity s, with votes weighted by exp(s / T) (Wu et al. 2018, 1805.01978)."""
    bank, labels = F.normalize(features.train[labelled]), features.train_labels[labelled]
    right = 0
    for test, truth in zip(F.normalize(features.test).split(1000), features.test_labels.split(1000), strict=True):
        nearest, index = (test @ bank.T).topk(min(neighbours, len(bank)))
        votes = torch.zeros(len(test), classes)
        votes.scatter_add_(1, labels[index], (nearest / TEMPERATURE).exp())
        right += (votes.argmax(dim=1) == truth).sum().item()
    return 100 * right / len(features.test)


def probe_accuracy(features: Features, labelled: Tensor) -> float:
    """A linear probe: multinomial logistic regression on standardised features."""
    probe = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that has not quite converged is still a probe
        probe.fit(features.train[labelled].numpy(), features.train_labels[labelled].numpy())
    predicted = torch.from_numpy(probe.predict(features.test.numpy()))
    return 100 * (predicted == features.test_labels).double().mean().item()


def standardised(features: Features) -> Features:
    """Each feature with mean 0 and deviation 1 over the training images; no label is needed for that."""
    mean, std = features.train.mean(dim=0), features.train.std(dim=0) + 1e-6
    return features._replace(train=(features.train - mean) / std, test=(features.test - mean) / std)
