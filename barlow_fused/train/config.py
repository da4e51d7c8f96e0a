"""The configuration of a run: one typed dataclass, whose fields are the flags of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A flag's value cannot be used; the message names the flag."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes and where it writes it. The notes are the flags' help texts."""

    out: Annotated[Path | None, "folder of the run, new or empty (default: runs/digits-<date>-<time>)"] = None
    seed: Annotated[int, "of weights, batches and views; on a CPU the same seed gives the same numbers"] = 0
    epochs: Annotated[int, "passes over the training images"] = 60
    steps: Annotated[int | None, "stop after this many optimiser steps, with a schedule of that length"] = None
    batch_size: Annotated[int, "images a step; each gives two views"] = 128
    projector: Annotated[str, "widths of the projector's layers; the last is D"] = "512-8192"
    lambd: Annotated[float, "weight of the off-diagonal (redundancy reduction) sum"] = 0.0005
    lr: Annotated[float, "AdamW's learning rate at the end of the warm-up"] = 1e-3
    weight_decay: Annotated[float, "AdamW's weight decay; not of biases and batch norm"] = 1e-4
    loss: Annotated[Literal["fused", "reference"], "barlow_fused's kernels or plain PyTorch"] = "fused"
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto takes a CUDA GPU if there is one"] = "auto"

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, "seed", "from 0 to 2^31 - 1", self.seed)
        _check(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _check(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        _check(self.batch_size >= 2, "batch_size", "at least 2: batch norm needs two samples", self.batch_size)
        well_formed = re.fullmatch(r"[1-9][0-9]*(-[1-9][0-9]*)*", self.projector) is not None
        _check(well_formed, "projector", "positive widths joined by '-', such as 512-8192", self.projector)
        for name in ("lambd", "weight_decay"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, name, "finite and at least 0", value)
        _check(math.isfinite(self.lr) and self.lr > 0, "lr", "finite and more than 0", self.lr)
        for name in ("loss", "device"):
            choices = typing.get_args(typing.get_type_hints(Config)[name])
            _check(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))

    @property
    def projector_widths(self) -> list[int]:
        """The widths of the projector's layers; the last is the loss's D."""
        return [int(width) for width in self.projector.split("-")]


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; a bad one ends the process with code 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m barlow_fused train",
        description="Pretrain an encoder with the Barlow Twins loss on scikit-learn's handwritten digits.",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(Config, include_extras=True)
    for field in dataclasses.fields(Config):
        hint, description = typing.get_args(hints[field.name])
        kind, choices = _value_type(hint)
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            flag_name(field.name),
            type=kind,
            choices=choices,
            default=field.default,
            help=description + default,
            metavar=None if choices else kind.__name__.upper(),
        )
    try:
        return Config(**vars(parser.parse_args(argv)))
    except ConfigError as error:
        parser.error(str(error))


def flag_name(field_name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + field_name.replace("_", "-")


def _value_type(hint: Any) -> tuple[type, tuple[str, ...] | None]:
    """What a flag's text is converted to, and the values that it may have (None: any)."""
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return hint, None


def _check(accepted: bool, name: str, requirement: str, value: object) -> None:
    if not accepted:
        raise ConfigError(f"{flag_name(name)} must be {requirement}; got {value}")
