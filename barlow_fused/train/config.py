"""The configuration of a run: typed dataclasses, one a subject, whose fields are flags, TOML keys and attributes alike.

A value comes from the first of these that gives it: a flag, the file of ``--config``, the preset, the default here.
The whole of it is written into the run as ``config.toml``, which ``--config`` reads again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w

from ..width import LossFloor, loss_floor, suggest_lambda
from .presets import PRESETS, preset_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A flag's value cannot be used; the message names the flag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """the run"""  # the classes' first lines are the titles of --help's groups

    preset: Annotated[str | None, f"{', '.join(PRESETS)} (default: the one made for --data)"] = None
    out: Annotated[Path | None, "folder of the run, new or empty (default: runs/<data>-<date>-<time>)"] = None
    resume: Annotated[Path | None, "continue the run in this folder, in the middle of an epoch if need be"] = None
    init: Annotated[Path | None, "start from these weights: the official resnet50.pth or checkpoint.pth, a run's"] = (
        None
    )
    seed: Annotated[int, "of weights, batches and views; on a CPU the same seed gives the same numbers"] = 0
    epochs: Annotated[int, "passes over the training images, the length of the learning rate's schedule"] = 60
    steps: Annotated[int | None, "stop after this many optimiser steps, wherever the schedule then is"] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto takes a CUDA GPU if there is one"] = "auto"
    verify: Annotated[bool, "on a GPU whose kernels have not been verified, do that first; takes a minute, once"] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """images"""

    data: Annotated[
        str, "digits, fashion-mnist, cifar10, cifar100, stl10, imagefolder:DIR (DIR/train, DIR/val) or fake"
    ] = "digits"
    data_dir: Annotated[Path, "where torchvision's data sets are"] = Path("data")
    download: Annotated[bool, "get a data set that is not in --data-dir"] = False
    augmentation: Annotated[Literal["official", "digits"], "the paper's views, or a written digit's"] = "digits"
    image_size: Annotated[int | None, "side of the views in pixels (default: the data set's)"] = None
    workers: Annotated[int, "processes that prepare views, for each training process; 0: the training process"] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """model"""

    backbone: Annotated[str, "tiny, a torchvision model's name, or timm:NAME"] = "tiny"
    stem: Annotated[Literal["auto", "small", "full"], "small: 3x3 and no pooling; auto: for up to 64 pixels"] = "auto"
    projector: Annotated[str, "widths of the projector's layers; the last is D"] = "512-8192"
    sync_batch_norm: Annotated[bool, "several processes share the network's batch statistics"] = True
    channels_last: Annotated[bool, "lay images out as NHWC"] = False
    compile: Annotated[bool, "torch.compile the network"] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """loss"""

    loss: Annotated[Literal["fused", "reference"], "barlow_fused's kernels or plain PyTorch"] = "fused"
    kappa: Annotated[
        float, "sets the off-diagonal sum's weight: lambda = kappa / (D / (N - 1) - 1), see docs/width.md"
    ] = 0.02
    fused_projector: Annotated[
        bool | None, "the projector's last layer and the loss in one: no embeddings (default: where they would not fit)"
    ] = None
    shard_projector: Annotated[
        bool, "each process has its rows of the projector's last layer, their gradient and optimiser state"
    ] = False
    gradient: Annotated[
        Literal["lightly", "official"], "on P processes: the loss's gradient, or 1/P of it as the paper's code"
    ] = "lightly"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """optimisation"""

    batch_size: Annotated[int, "images a step, of all processes together; each gives two views"] = 128
    accumulate: Annotated[int, "pass a batch through the network in so many parts; the loss is the whole batch's"] = 1
    optimizer: Annotated[Literal["lars", "sgd", "adamw"], "lars is timm's"] = "adamw"
    lr_weights: Annotated[float, "learning rate of weights, for each 256 images of a batch"] = 0.002
    lr_biases: Annotated[float, "the same of biases and batch norm"] = 0.002
    warmup_epochs: Annotated[float, "of linear warm-up; a cosine down to a thousandth follows"] = 6
    weight_decay: Annotated[float, "of weights; never of biases and batch norm"] = 1e-4
    momentum: Annotated[float, "of lars and sgd"] = 0.9
    trust_coefficient: Annotated[float, "eta of lars"] = 0.001
    precision: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], "bf16 and fp16 by autocast; fp64 to compare"] = "fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """what is recorded"""

    log_every: Annotated[int | None, "steps between log entries (default: 1 for up to 200 steps, else 10)"] = None
    knn_every: Annotated[int, "epochs between k-NN accuracies and pictures; 0: only before and after"] = 10
    knn_images: Annotated[int, "labelled training images that k-NN may look at"] = 50_000
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 100
    keep: Annotated[int, "checkpoints that are kept"] = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MonitorConfig, OptimizerConfig, LossConfig, ModelConfig, DataConfig, RunConfig):
    """Everything that decides what a run computes and where it writes it."""

    def __post_init__(self) -> None:
        _check(self.preset is None or self.preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}", self.preset)
        _check(0 <= self.seed < 2**31, "seed", "from 0 to 2^31 - 1", self.seed)
        for name in ("epochs", "steps", "accumulate", "log_every", "knn_images", "checkpoint_every", "keep"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "at least 1", value)
        for name in ("workers", "knn_every"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _check(self.batch_size >= 2, "batch_size", "at least 2: batch norm needs two samples", self.batch_size)
        _check(self.batch_size % self.accumulate == 0, "accumulate", f"a divisor of {self.batch_size}", self.accumulate)
        _check(self.batch_size >= 2 * self.accumulate, "accumulate", "such that parts have two images", self.accumulate)
        _check(self.image_size is None or self.image_size >= 8, "image_size", "at least 8", self.image_size)
        well_formed = re.fullmatch(r"[1-9][0-9]*(-[1-9][0-9]*)*", self.projector) is not None
        _check(well_formed, "projector", "positive widths joined by '-', such as 512-8192", self.projector)
        for name in ("kappa", "weight_decay", "warmup_epochs", "momentum"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, name, "finite and at least 0", value)
        for name in ("lr_weights", "lr_biases", "trust_coefficient"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value > 0, name, "finite and more than 0", value)
        for name, (_, choices, _) in FIELDS.items():
            if choices:
                _check(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))

    @property
    def projector_widths(self) -> list[int]:
        """The widths of the projector's layers; the last is the loss's D."""
        return [int(width) for width in self.projector.split("-")]

    @property
    def lambd(self) -> float:
        """The loss's λ, for N images of all processes, whose statistics the loss takes together."""
        return suggest_lambda(self.batch_size, self.projector_widths[-1], self.kappa)

    @property
    def loss_floor(self) -> LossFloor:
        """What the loss cannot get below."""
        return loss_floor(self.batch_size, self.projector_widths[-1], self.lambd)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what TOML and a checkpoint can hold. What was left open is left out."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}

    def write(self, path: Path, **tables: dict[str, Any]) -> None:
        """Write it as TOML, with more ``tables`` after it."""
        path.write_text(tomli_w.dumps({**self.to_dict(), **tables}))


SECTIONS = (RunConfig, DataConfig, ModelConfig, LossConfig, OptimizerConfig, MonitorConfig)


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(
        prog="python -m barlow_fused train",
        description="Pretrain an encoder with the Barlow Twins loss. Several GPUs: torchrun --nproc-per-node 8 -m "
        "barlow_fused train ...",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--config", type=Path, metavar="FILE", help="TOML file of any of these, as a run's config.toml")
    for section in SECTIONS:
        group = made.add_argument_group(section.__doc__)
        for field in dataclasses.fields(section):
            kind, choices, description = FIELDS[field.name]
            shown = "" if field.default is None or kind is bool else f" (default: {field.default})"
            options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": choices}
            if not choices and kind is not bool:
                options["metavar"] = kind.__name__.upper()
            group.add_argument(flag_name(field.name), help=(description + shown).replace("%", "%%"), **options)
    return made


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; a bad one ends the process with code 2, as argparse does."""
    made = parser()
    flags = vars(made.parse_args(argv))
    file = flags.pop("config", None)
    try:
        if "resume" in flags:
            return resumed(flags, file)
        return combine(read_toml(file) if file else {}, flags)
    except ConfigError as error:
        made.error(str(error))


def combine(*layers: Mapping[str, Any]) -> Config:
    """A configuration of the layers, later ones first, over the preset that they name or that belongs to their data."""
    values = {name: value for layer in layers for name, value in layer.items()}
    preset = values.get("preset") or preset_of(values.get("data"))
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}; got {preset}")
    return Config(**{**PRESETS[preset], **values, "preset": preset})


MAY_CHANGE = {"out", "resume", "steps", "device", "verify", "workers", "data_dir", "download", "log_every", "knn_every"}
MAY_CHANGE |= {
    "knn_images",
    "checkpoint_every",
    "keep",
    "fused_projector",
    "shard_projector",
}  # nor does this change what a step computes


def resumed(flags: Mapping[str, Any], file: Path | None = None) -> Config:
    """The configuration of the run to be resumed. Flags may repeat it, and change what no step depends on."""
    run = flags["resume"]
    if file:
        raise ConfigError(f"--config cannot be given with --resume, which reads {run / 'config.toml'}")
    if not read_toml(run / "config.toml"):
        raise ConfigError(f"{run / 'config.toml'} is empty: a run cannot be resumed without it")
    stored = {name: value for name, value in read_toml(run / "config.toml").items() if name not in ("resume", "init")}
    config = combine(stored, flags)
    for name in flags.keys() - MAY_CHANGE:
        if flags[name] != stored.get(name) and name != "init":
            raise ConfigError(
                f"{flag_name(name)} cannot change when a run is resumed; it was {stored.get(name)}, got {flags[name]}"
            )
    return dataclasses.replace(config, out=flags.get("out", run))


def read_toml(path: Path) -> dict[str, Any]:
    """The fields that a TOML file gives."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    values.pop("environment", None)  # of the run that wrote it
    for name, value in values.items():
        if name not in FIELDS:
            raise ConfigError(f"{path}: there is no setting {name!r}")
        kind = FIELDS[name][0]
        accepted = {Path: str, float: (float, int)}.get(kind, kind)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{path}: {name} must be a {kind.__name__}, got {value!r}")
        values[name] = kind(value)
    return values


def flag_name(field_name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + field_name.replace("_", "-")


def _describe(hint: Any) -> tuple[type, tuple[str, ...] | None, str]:
    """What a field's text is converted to, the values that it may have (None: any), and its help text."""
    hint, description = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), description
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return hint, None, description


def _check(accepted: bool, name: str, requirement: str, value: object) -> None:
    if not accepted:
        raise ConfigError(f"{flag_name(name)} must be {requirement}; got {value}")


_HINTS = typing.get_type_hints(Config, include_extras=True)
FIELDS = {
    field.name: _describe(_HINTS[field.name]) for field in dataclasses.fields(Config)
}  # name: type, choices, help
