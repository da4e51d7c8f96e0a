"""The optimiser, its two learning rates and their schedule, as in the official code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import shards
from .config import Config, ConfigError

FINAL = 0.001  # of the peak: what the cosine falls to
RATE_OF = 256  # images: learning rates are given for a batch of so many, and scaled to the batch


def build(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser over weights (first) and over biases and batch norm parameters, which are neither decayed nor
    adapted by LARS.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim != 1]
    biases = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    mixed = any(isinstance(p, DTensor) for p in weights)  # and plain tensors: no operator takes both at once
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, **({"foreach": False} if mixed else {"fused": True}))
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, foreach=False if mixed else None)
    try:
        from timm.optim import Lars
    except ModuleNotFoundError as error:
        raise ConfigError("--optimizer lars needs timm: pip install 'barlow-fused[train]'") from error
    # timm adapts a group that is decayed; the weights are adapted also if their decay is 0
    groups[0]["always_adapt"] = True
    return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=config.trust_coefficient)


def placed(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state of the optimiser, with what belongs to a sharded weight in its shards."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            index: shards.placed(values, dict.fromkeys(values, weights[index]))
            for index, values in state["state"].items()
        },
    }


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, steps_per_epoch: int, config: Config
) -> float:
    """Set the learning rates of a step (from 0): linear warm-up from 0, then a cosine. Returns the weights'."""
    warmup = min(config.warmup_epochs * steps_per_epoch, total_steps)
    if step < warmup:
        share = step / warmup
    else:
        q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))
        share = q + FINAL * (1 - q)
    for group, rate in zip(optimizer.param_groups, (config.lr_weights, config.lr_biases), strict=True):
        group["lr"] = share * rate * config.batch_size / RATE_OF
    return optimizer.param_groups[0]["lr"]
