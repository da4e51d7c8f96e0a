"""Which images a step sees, on which process, and as which views.

Everything random here follows from the seed and the step alone: step 500 of a run draws the same images and the same
views whatever happened before it, however many processes share the batch and however many workers prepare it. So a run
resumes anywhere, and nothing about its data needs to be saved.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from . import augment, datasets
from .config import Config
from .datasets import Images, UnreadableImageError
from .processes import Processes


class Unreadable(NamedTuple):
    """What a worker sends instead of views: an exception would arrive with the worker's traceback in its message."""

    message: str


class Parts(Dataset):
    """Item i is one process's share of part ``i % accumulate`` of the batch of step ``i // accumulate``: two views.

    An epoch is one shuffle of the images, its incomplete last batch left out. A part's images are shared out evenly, so
    that it holds the same images for any number of processes.
    """

    def __init__(self, images: Images, config: Config, processes: Processes) -> None:
        self.images, self.config, self.processes = images, config, processes
        self.steps_per_epoch = len(images.train) // config.batch_size
        self.views = augment.official_views(config.image_size, images.mean, images.std)
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))  # of the epoch under way

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor] | Unreadable:  # 2 x [n, C, size, size]
        step, part = divmod(item, self.config.accumulate)
        epoch, position = divmod(step, self.steps_per_epoch)
        try:
            return self.augment(self.part_of(epoch, position, part), step, part)
        except UnreadableImageError as error:
            return Unreadable(str(error))

    def part_of(self, epoch: int, position: int, part: int) -> list[int]:
        """The images of a part, those of all processes."""
        if self.order[0] != epoch:
            shuffled = torch.randperm(len(self.images.train), generator=generator(self.config.seed, "order", epoch))
            self.order = (epoch, shuffled)
        size = self.config.batch_size // self.config.accumulate
        start = position * self.config.batch_size + part * size
        return self.order[1][start : start + size].tolist()

    def augment(self, indices: list[int], step: int, part: int) -> tuple[Tensor, Tensor]:
        """This process's views of its share of the images."""
        share = len(indices) // self.processes.count
        own = slice(self.processes.rank * share, (self.processes.rank + 1) * share)
        seed, train = self.config.seed, self.images.train
        if self.config.augmentation == "digits":  # the whole part at once: its random numbers are drawn together
            batch = torch.stack([datasets.read(train, index)[0] for index in indices]).float() / 255
            views = augment.digit_views(batch, self.config.image_size, generator(seed, "views", step, part))
            return views[0][own], views[1][own]
        with own_randomness():
            pairs = []
            for index in indices[own]:
                image, _ = datasets.read(train, index)
                torch.default_generator.manual_seed(derive(seed, "views", step, index))
                pairs.append([view(image) for view in self.views])
        view_a, view_b = (torch.stack(views) for views in zip(*pairs, strict=True))
        return view_a, view_b


class own_randomness:  # noqa: N801 - used like torch.no_grad
    """In its block the CPU's random numbers can be seeded, without a trace left on those outside."""

    def __enter__(self) -> None:
        self.state = torch.default_generator.get_state()

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self.state)


class Plain(Dataset):
    """Item i is image i as a transform gives it, and its label."""

    def __init__(self, dataset: Dataset, indices: list[int], transform: Callable[[Tensor], Tensor]) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int] | Unreadable:
        try:
            image, label = datasets.read(self.dataset, self.indices[item])
        except UnreadableImageError as error:
            return Unreadable(str(error))
        return self.transform(image), label


def batches(
    dataset: Dataset, workers: int, items: range | None = None, batch_size: int | None = None, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Items of the dataset, in order, prepared by workers; with a ``batch_size``, so many stacked.

    Raises:
        UnreadableImageError: an image cannot be decoded.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(len(dataset)) if items is None else items,
        num_workers=workers,
        collate_fn=_stack if batch_size else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=Generator(),  # of the workers' seeds, which nothing uses: the global one is left alone
    )
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise UnreadableImageError(batch.message)
        yield batch


def ignore_signals(_worker: int) -> None:
    """A worker leaves Ctrl-C and a cluster's signals to the training process, which stops it when the step is done."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of its own for each purpose and numbers."""
    text = " ".join(map(str, (seed, purpose, *numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()[:7], "big")


def generator(seed: int, purpose: str, *numbers: int) -> Generator:
    """A stream of random numbers of its own for each purpose and numbers."""
    return Generator().manual_seed(derive(seed, purpose, *numbers))


def _stack(items: list[tuple[Tensor, int] | Unreadable]) -> tuple[Tensor, Tensor] | Unreadable:
    bad = next((item for item in items if isinstance(item, Unreadable)), None)
    if bad is not None:
        return bad
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
