"""The model: a backbone, whose output is kept, and a very wide projector, which only the loss sees.

The modules are named as in the official code (``backbone``, ``projector``), so its checkpoints fit.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from . import shards
from .checkpoint import CheckpointError, Rows, first_line, with_rows
from .config import ConfigError

SMALL_IMAGES = 64  # pixels, up to which --stem auto takes the small one


class TinyResNet(nn.Module):
    """A three-stage ResNet with a small stem for images of about 16 x 16; 0.3 M parameters."""

    features = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = _conv_bn(channels, 32)
        self.stages = nn.Sequential(Residual(32, 64), Residual(64, self.features))

    def forward(self, images: Tensor) -> Tensor:  # [N, C, 16, 16] -> [N, 128]
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
    """Backbone and projector. As in the official code, each view passes on its own, with its own batch statistics.

    The projector's last layer has none, and takes both views in one product: its gradient, the largest tensor of a wide
    projector, is then made once, and not once a view and added.

    Args:
        backbone: images to representations, [N, C, H, W] -> [N, ``features``].
        projector_widths: of the projector's linear layers; batch norm and ReLU stand between them.

    Raises:
        ConfigError: the projector does not fit into this machine's memory.
    """

    def __init__(self, backbone: nn.Module, features: int, projector_widths: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.features = backbone, features
        layers: list[nn.Module] = []
        widths = [features, *projector_widths]
        needed = 4 * sum(width * next_width for width, next_width in itertools.pairwise(widths))
        if needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            raise ConfigError(
                f"--projector {'-'.join(map(str, projector_widths))}: its weights alone need {needed / 1e9:.0f} GB, "
                f"and this machine has {memory / 1e9:.0f} GB of memory"
            )
        for width, next_width in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))
        self.embeds = True  # False: the last layer is left to the loss (step.py)

    def forward(self, y_a: Tensor, y_b: Tensor) -> tuple[Tensor, ...]:  # 2 x [N, C, H, W] -> 2 x [N, D]
        """The projections of two views; or what the last layer makes them of, 2 x [N, H], and its weight, [D, H]."""
        project, last = self.projector[:-1], self.projector[-1]
        h_a, h_b = project(self.backbone(y_a)), project(self.backbone(y_b))
        return last(torch.cat((h_a, h_b))).chunk(2) if self.embeds else (h_a, h_b, last.weight)


def build(
    backbone: str, channels: int, image_size: int, projector_widths: Sequence[int], stem: str = "auto"
) -> BarlowTwins:
    """The model of that configuration, with random weights.

    Raises:
        ConfigError: there is no such backbone, or it cannot take such images.
    """
    if backbone == "tiny":
        return BarlowTwins(TinyResNet(channels), TinyResNet.features, projector_widths)
    network, features = (
        _from_timm(backbone[5:], channels) if backbone.startswith("timm:") else _from_torchvision(backbone)
    )
    if stem == "small" or (stem == "auto" and image_size <= SMALL_IMAGES and hasattr(network, "maxpool")):
        if not (isinstance(getattr(network, "conv1", None), nn.Conv2d) and hasattr(network, "maxpool")):
            raise ConfigError(f"--stem small: {backbone} has no conv1 and maxpool that it could replace")
        network.conv1 = nn.Conv2d(network.conv1.in_channels, network.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if channels == 1 and not backbone.startswith("timm:"):
        network.register_forward_pre_hook(_grey_as_rgb)
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"--backbone {backbone} cannot take images of {image_size} pixels: {error}") from error
    network.train()
    if not isinstance(output, Tensor) or output.shape != (1, features):
        raise ConfigError(f"--backbone {backbone} does not give one vector an image")
    return BarlowTwins(network, features, projector_widths)


def _from_torchvision(name: str) -> tuple[nn.Module, int]:
    """A classifier whose last linear layer is taken away, and that layer's input features."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(
            f"--backbone must be tiny, timm:NAME or one of torchvision's classifiers, such as resnet50; got {name}"
        )
    options: dict[str, Any] = {"weights": None}
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        options["zero_init_residual"] = True  # as in the official code
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(name, **options)
    heads = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise ConfigError(f"--backbone {name} has no linear layer at its end")
    parent, _, last = heads[-1].rpartition(".")
    parent_module = network.get_submodule(parent)
    features = getattr(parent_module, last).in_features
    setattr(parent_module, last, nn.Identity())
    return network, features


def _from_timm(name: str, channels: int) -> tuple[nn.Module, int]:
    try:
        timm = importlib.import_module("timm")
        network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--backbone timm:{name} needs timm: pip install timm") from error
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"--backbone timm:{name}: {error}") from error
    return network, network.num_features


def _grey_as_rgb(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].expand(-1, 3, -1, -1),)


def load_weights(model: BarlowTwins, path: Path) -> str:
    """Start from the weights of a file, and say in words what was found there.

    It may be the official ``resnet50.pth`` (the backbone alone), the official ``checkpoint.pth`` (``module.`` before
    every name, the projector and the loss's batch norm included), or a checkpoint or ``encoder.pt`` of a run here.

    Raises:
        ConfigError: it is none of these, or of another model.
    """
    try:
        contents = _mapped(path)
    except OSError as error:
        raise ConfigError(f"--init {path}: {error.strerror or error}") from error
    except Exception as error:
        raise ConfigError(f"--init {path} is not a file of weights: {first_line(error)}") from error
    contents = with_rows(contents, path)
    state = contents.get("model", contents) if isinstance(contents, dict) else {}
    if not isinstance(state, dict) or not state or not all(isinstance(x, (Tensor, Rows)) for x in state.values()):
        raise ConfigError(f"--init {path} is not a file of weights: it must hold named tensors")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    whole = any(name.startswith("backbone.") for name in state)
    if whole:  # the official bn is the loss's, and nothing reads its running statistics
        state = {name: tensor for name, tensor in state.items() if not name.startswith("bn.")}
    state = {name: tensor for name, tensor in state.items() if whole or not name.startswith("fc.")}
    target = model if whole else model.backbone
    missing, unexpected = compare(target.state_dict(), state)
    if missing or unexpected:
        raise ConfigError(
            f"--init {path} is of another model: {missing + unexpected} tensors differ, the first is "
            f"{first_difference(target.state_dict(), state)}"
        )
    expected = target.state_dict()
    for name in [name for name, tensor in state.items() if isinstance(tensor, Rows)]:
        state.pop(name).read_into(expected[name])
    target.load_state_dict({**expected, **state})
    return f"{'backbone and projector' if whole else 'backbone'} from {path}"


def _mapped(path: Path) -> Any:
    """A file of weights, whose tensors take no memory until they are used, where its format allows that."""
    arguments = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **arguments)
    except RuntimeError:  # PyTorch's format before 1.6
        return torch.load(path, **arguments)


def restore(model: BarlowTwins, state: dict[str, Any]) -> None:
    """Give the network the weights of a run's state.

    Raises:
        CheckpointError: they are of another model.
    """
    expected, found = model.state_dict(), state["model"]
    if any(compare(expected, found)):
        raise CheckpointError(
            f"the state after step {state['step']} is of another model: {first_difference(expected, found)}"
        )
    model.load_state_dict(shards.placed(found, expected))


def compare(expected: dict[str, Tensor], found: dict[str, Any]) -> tuple[int, int]:
    """How many tensors are missing or of another shape, and how many were not expected."""
    fits = sum(name in found and found[name].shape == tensor.shape for name, tensor in expected.items())
    return len(expected) - fits, len(found.keys() - expected.keys())


def first_difference(expected: dict[str, Tensor], found: dict[str, Any]) -> str:
    """The first tensor in which two states differ, in words."""
    for name in dict.fromkeys([*expected, *found]):
        shapes = [str(tuple(state[name].shape)) if name in state else "not there" for state in (expected, found)]
        if shapes[0] != shapes[1]:
            return f"{name}: {shapes[0]} in this model, {shapes[1]} in the file"
    return "none"


@torch.no_grad()
def set_batch_norm_statistics(module: nn.Module, images: Tensor, chunk: int = 256) -> None:
    """Set the running statistics of every batch norm to those of ``images``.

    An untrained network's are mean 0 and variance 1, which are nobody's: with them it would be evaluated below its
    worth, and the gain of pretraining would look larger than it is.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average over the chunks
    was_training = module.training
    module.train()
    for part in images.split(chunk):
        module(part)
    module.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """In its block, batch norms use a batch's statistics as in training, but do not remember them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _conv_bn(channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
