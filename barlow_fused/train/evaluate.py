"""What a representation is worth: the accuracy of k-nearest neighbours and of a linear probe on held-out images.

The labels of all training images make digits easy (raw pixels alone give 98 %), so the question that pretraining is
meant for comes first: how far do a *few* labels carry? FEW labelled images a class are drawn DRAWS times (the same
draws for every representation), and the mean over the draws is reported. The encoder is frozen: nothing here trains it.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from .data import CLASSES

FEW = 10  # labelled images a class
DRAWS = 20
NEIGHBOURS = 5
TEMPERATURE = 0.1


class Accuracy(NamedTuple):
    """Accuracies on the test images, in percent; those of a few labels are means over the draws."""

    knn_few: float
    probe_few: float
    knn_all: float
    probe_all: float


class Features(NamedTuple):
    """A representation of both parts of the data set, with the labels."""

    train: Tensor  # [1437, F]
    train_labels: Tensor  # [1437]
    test: Tensor  # [360, F]
    test_labels: Tensor  # [360]


def evaluate(features: Features) -> Accuracy:
    """The four accuracies of a representation."""
    draws = [few_of_each_class(features.train_labels, draw) for draw in range(DRAWS)]
    standard = _standardised(features)
    everything = torch.arange(len(features.train))
    return Accuracy(
        knn_few=sum(knn_accuracy(features, draw) for draw in draws) / DRAWS,
        probe_few=sum(probe_accuracy(standard, draw) for draw in draws) / DRAWS,
        knn_all=knn_accuracy(features, everything),
        probe_all=probe_accuracy(standard, everything),
    )


def few_of_each_class(labels: Tensor, draw: int, few: int = FEW) -> Tensor:  # [M] -> [CLASSES * few]
    """The indices of ``few`` images of each class; always the same ones for a draw."""
    generator = Generator().manual_seed(draw)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:few] for label in range(CLASSES)])


def knn_accuracy(features: Features, labelled: Tensor) -> float:
    """k-nearest neighbours by cosine similarity s, with votes weighted by exp(s / T) (Wu et al. 2018, 1805.01978)."""
    similarity = F.normalize(features.test) @ F.normalize(features.train[labelled]).T  # (360, labelled)
    nearest, index = similarity.topk(NEIGHBOURS)
    votes = torch.zeros(len(features.test), CLASSES)
    votes.scatter_add_(1, features.train_labels[labelled][index], (nearest / TEMPERATURE).exp())
    return _percent(votes.argmax(dim=1) == features.test_labels)


def probe_accuracy(features: Features, labelled: Tensor) -> float:
    """A linear probe: multinomial logistic regression on standardised features."""
    probe = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that has not quite converged is still a probe
        probe.fit(features.train[labelled].numpy(), features.train_labels[labelled].numpy())
    return _percent(torch.from_numpy(probe.predict(features.test.numpy())) == features.test_labels)


def _standardised(features: Features) -> Features:
    """Each feature with mean 0 and deviation 1 over the training images; no label is needed for that."""
    mean, std = features.train.mean(dim=0), features.train.std(dim=0) + 1e-6
    return features._replace(train=(features.train - mean) / std, test=(features.test - mean) / std)


def _percent(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()
