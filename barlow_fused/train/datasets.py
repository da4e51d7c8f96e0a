"""Where the images come from: torchvision's data sets, and scikit-learn's handwritten digits, which are bundled.

A data set that is not there says where it was looked for and how to get it.
"""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms

from .config import ConfigError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CIFAR_MEAN, CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
DIGITS_TEST = 360
FASHION_OF_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FAKE_IMAGES = 1_281_167  # as many as ImageNet's, so that a preset's epochs are as long
FAKE_SIZE = 32  # pixels


class UnreadableImageError(Exception):
    """An image of the data set cannot be decoded; the message names its file."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set. Its items are (image, label), an image being a PIL image or a uint8 tensor [C, H, W]."""

    name: str
    train: Dataset  # what pretraining sees, without its labels
    labelled: Dataset | None  # labelled images for k-NN and the linear probe; None: there is no evaluation
    test: Dataset | None
    classes: int
    channels: int
    size: int  # side of the views, unless the configuration says otherwise
    mean: list[float]
    std: list[float]
    crop: bool = False  # evaluated by its centre: photographs of any shape


def read(dataset: Dataset, index: int) -> tuple[Tensor, int]:
    """The image as uint8 [C, H, W], and its label."""
    try:
        image, label = dataset[index]
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises
        samples = getattr(dataset, "samples", None)
        where = samples[index][0] if samples else f"image {index} of {type(dataset).__name__}"
        raise UnreadableImageError(f"{where} cannot be read: {error}") from error
    return transforms.to_image(image).as_subclass(Tensor), int(label)


def load(name: str, folder: Path, download: bool = False, fake_size: int = FAKE_SIZE) -> Images:
    """The data set of that name, as ``--data`` has it; ``fake`` has images of ``fake_size`` pixels.

    Raises:
        ConfigError: there is none, or it is not where it was looked for.
    """
    kind, _, argument = name.partition(":")
    if kind not in LOADERS or (bool(argument) != (kind == "imagefolder")):
        known = ", ".join("imagefolder:DIR" if known == "imagefolder" else known for known in LOADERS)
        raise ConfigError(f"--data must be one of {known}; got {name}")
    if kind == "imagefolder":
        return _imagefolder(Path(argument))
    if kind == "fake":
        return _fake(fake_size)
    try:
        return LOADERS[kind](folder, download)
    except (RuntimeError, OSError) as error:
        if download:
            raise ConfigError(f"--data {name} could not be downloaded to {folder.absolute()}: {error}") from error
        raise ConfigError(
            f"--data {name} was not found in {folder.absolute()}: add --download to get it, or say --data-dir DIR "
            f"where it is ({error})"
        ) from error


class InMemory(Dataset):
    """Images that are all in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:  # uint8 [M, C, H, W], [M]
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Digits(InMemory):
    """1797 real handwritten digits of 8 x 8 grey pixels (UCI ML, E. Alpaydin and C. Kaynak 1998), or a part of them."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        # 0 ... 16 -> 0 ... 255; a fixed fifth is held out, with the classes in equal proportions
        images = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
        labels = torch.from_numpy(digits.target).long()
        parts = train_test_split(range(len(labels)), test_size=DIGITS_TEST, stratify=labels, random_state=0)
        chosen = parts[0 if train else 1]
        super().__init__(images[chosen], labels[chosen])


def _digits(folder: Path, download: bool) -> Images:
    train = Digits(train=True)
    return Images("digits", train, train, Digits(train=False), 10, channels=1, size=16, mean=[0.0], std=[1.0])


def _fashion(folder: Path, download: bool) -> Images:
    """60 000 clothes of 28 x 28 grey pixels, and 10 000 held out (Xiao et al. 2017, arXiv 1708.07747)."""
    try:
        parts = [datasets.FashionMNIST(folder, train=train, download=download) for train in (True, False)]
        train, test = (InMemory(part.data.unsqueeze(1), part.targets) for part in parts)
    except RuntimeError as error:
        if download:
            raise
        if not FASHION_OF_DEBIAN.is_dir():
            raise ConfigError(
                f"--data fashion-mnist was found neither in {folder.absolute()} (add --download to get it, or say "
                f"--data-dir DIR where it is) nor in {FASHION_OF_DEBIAN} (Debian and Ubuntu: apt-get install "
                "dataset-fashion-mnist)"
            ) from error
        train, test = (_of_debian(part) for part in ("train", "t10k"))
    return Images("fashion-mnist", train, train, test, 10, channels=1, size=28, mean=[0.0], std=[1.0])


def _of_debian(part: str) -> InMemory:
    """A part of Fashion-MNIST from MNIST's compressed files: a header, then bytes."""

    def read_bytes(name: str, header: int) -> Tensor:
        with gzip.open(FASHION_OF_DEBIAN / f"{part}-{name}-ubyte.gz") as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=header)

    return InMemory(read_bytes("images-idx3", 16).view(-1, 1, 28, 28), read_bytes("labels-idx1", 8).long())


def _cifar(kind: type[datasets.CIFAR10], classes: int) -> Callable[[Path, bool], Images]:
    def load_cifar(folder: Path, download: bool) -> Images:
        train, test = (kind(folder, train=train, download=download) for train in (True, False))
        return Images(kind.__name__.lower(), train, train, test, classes, 3, 32, CIFAR_MEAN, CIFAR_STD)

    return load_cifar


def _stl10(folder: Path, download: bool) -> Images:
    parts = [datasets.STL10(folder, split=split, download=download) for split in ("unlabeled", "train", "test")]
    return Images("stl10", *parts, classes=10, channels=3, size=96, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _fake(size: int) -> Images:
    """Noise, to measure throughput: labels mean nothing, so there is no evaluation."""
    train = datasets.FakeData(FAKE_IMAGES, image_size=(3, size, size))
    return Images("fake", train, None, None, 10, 3, size, IMAGENET_MEAN, IMAGENET_STD)


class Labelled(datasets.ImageFolder):
    """A folder with a folder of images for each class."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = _folders(Path(directory))
        return classes, {name: label for label, name in enumerate(classes)}


class Unlabelled(datasets.ImageFolder):
    """All images in a folder and in those within it."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return [""], {"": 0}


def _folders(folder: Path) -> list[str]:
    """The names of the folders in it, but for hidden ones, such as .ipynb_checkpoints."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _imagefolder(root: Path) -> Images:
    """ImageNet's layout: root/train/<class>/<image>, and root/val/<class>/<image> for the evaluation. Or images without
    labels, anywhere in root/train or, if there is no such folder, in root.
    """
    folder, test = (root / "train" if (root / "train").is_dir() else root), None
    try:
        if folder != root and _folders(folder) and (root / "val").is_dir():
            train, test = Labelled(folder), Labelled(root / "val")
        else:
            train = Unlabelled(folder)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--data imagefolder:{root} has no images, or a class without any. They are looked for in "
            f"{root.absolute()}/train/<class>/*.jpg and, to be evaluated, in val/<class>/*.jpg, or without labels in "
            f"{root.absolute()}; ImageNet itself is had from image-net.org ({error})"
        ) from error
    if test is not None and test.classes != train.classes:
        differ = sorted(set(test.classes) ^ set(train.classes))
        raise ConfigError(
            f"--data imagefolder:{root}: train and val must hold the same classes; {differ[0]!r} is in one of them"
        )
    if len(train.classes) < 2:  # nothing to tell apart
        test = None
    labelled, size = (train if test else None), 224
    return Images(
        "imagefolder", train, labelled, test, len(train.classes), 3, size, IMAGENET_MEAN, IMAGENET_STD, crop=True
    )


LOADERS: dict[str, Any] = {
    "digits": _digits,
    "fashion-mnist": _fashion,
    "cifar10": _cifar(datasets.CIFAR10, 10),
    "cifar100": _cifar(datasets.CIFAR100, 100),
    "stl10": _stl10,
    "imagefolder": _imagefolder,
    "fake": _fake,
}
