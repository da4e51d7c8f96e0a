"""A pretraining run from start to end: Barlow Twins with the fused loss, and what it gained.

Read ``train`` for the run and ``fit`` for its loop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import torch
from rich.console import Console
from torch import Tensor, nn

from .. import BarlowTwinsLoss
from ..version import __version__
from . import data, pictures
from .config import Config, ConfigError, parse_args
from .evaluate import Accuracy, Features, evaluate
from .model import BarlowTwins, set_batch_norm_statistics
from .report import Progress, print_gain

WARMUP = 0.1  # of the steps; the official code: 10 of 1000 epochs
LOG_EVERY_STEP = 200  # runs of so many steps or fewer log each; longer ones every tenth
CHECKPOINT_EVERY = 100  # steps


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """A signal asked the run to stop; the message says where its state is."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class DivergedError(Exception):
    """The loss or a weight is NaN or infinite; the message says where the state is."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: train, print what was gained, and return the exit code.

    0: trained; 1: the loss became NaN or infinite; 2: a bad flag; 130: Ctrl-C (128 + the signal's number).
    """
    config = parse_args(argv)
    console = Console()
    try:
        train(config, console)
    except ConfigError as error:
        print(f"python -m barlow_fused train: error: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:  # before or after the training loop, or a second Ctrl-C
        print("Stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def train(config: Config, console: Console) -> None:
    """Pretrain, evaluate before and after, and write everything to the run's folder."""
    config = start_run(resolve(config))
    run, device = config.out, torch.device(config.device)
    digits = data.load()

    torch.manual_seed(config.seed)
    model = BarlowTwins(config.projector_widths).to(device)
    set_batch_norm_statistics(model, data.enlarge(digits.train_images).to(device))
    criterion = BarlowTwinsLoss(
        lambd=config.lambd, backend="auto" if config.loss == "fused" else "reference", return_terms=True
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    say(console, f"Run {run}: seed {config.seed}, {config.device}, {weights / 1e6:.1f} M weights, {config.loss} loss")
    say(console, f"{config.steps} steps of N = {config.batch_size} images, D = {config.projector_widths[-1]} features")

    before, c_before = accuracy(model, digits, device), correlations(model, digits, config)
    metrics = fit(model, criterion, digits.train_images, config, console)
    after, c_after = accuracy(model, digits, device), correlations(model, digits, config)

    pixels = evaluate(
        Features(digits.train_images.flatten(1), digits.train_labels, digits.test_images.flatten(1), digits.test_labels)
    )
    save(model.encoder.state_dict(), run / "encoder.pt")
    results = {"raw_pixels": pixels, "untrained_encoder": before, "pretrained_encoder": after}
    text = json.dumps({name: result._asdict() for name, result in results.items()}, indent=2)
    (run / "results.json").write_text(text + "\n")
    pictures.draw_loss(metrics, config.lambd, run / "loss.png")
    pictures.draw_correlation(c_before, c_after, run / "cross_correlation.png")
    shown = digits.train_images[:12]
    pictures.draw_views(shown, *data.two_views(shown, config.seed, 0), run / "views.png")

    print_gain(console, pixels, before, after, len(digits.train_labels), len(digits.test_labels))
    names = ", ".join(sorted(path.name for path in run.iterdir()))
    say(console, f"The run is in {run}: {names}")


def fit(
    model: BarlowTwins, criterion: BarlowTwinsLoss, images: Tensor, config: Config, console: Console
) -> list[dict[str, Any]]:
    """The training loop: ``config.steps`` optimiser steps. Returns the metrics that it logged.

    Raises:
        DivergedError: a loss or a weight is NaN or infinite.
        Interrupted: a signal came; the step under way was finished.
    """
    device = torch.device(config.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, fused=True)
    log_every = 1 if config.steps <= LOG_EVERY_STEP else 10
    metrics: list[dict[str, Any]] = []
    checkpoint(model, optimizer, 0, config)
    model.train()
    with (
        (config.out / "metrics.jsonl").open("a", buffering=1) as log,
        Progress(console, config.steps) as progress,
        StopSignals() as signals,
    ):
        logged_step, logged_at = 0, time.perf_counter()
        for step in range(1, config.steps + 1):
            lr = set_learning_rate(optimizer, step, config)
            batch = data.random_batch(images, config.batch_size, config.seed, step - 1)
            y_a, y_b = (view.to(device) for view in data.two_views(batch, config.seed, step - 1))
            loss, on_diag, off_diag = criterion(model(y_a), model(y_b))
            if not loss.isfinite():
                raise diverged(f"the loss is {loss.item()} at step {step}", model, optimizer, step - 1, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            entry = None
            if step % log_every == 0 or step in (1, config.steps):
                now = time.perf_counter()
                entry = {
                    "step": step,
                    "epoch": (step - 1) // (len(images) // config.batch_size) + 1,
                    "loss": loss.item(),
                    "on_diag": on_diag.item(),
                    "off_diag": off_diag.item(),
                    "lr": lr,
                    "images_per_second": (step - logged_step) * config.batch_size / (now - logged_at),
                }
                logged_step, logged_at = step, now
                metrics.append(entry)
                log.write(json.dumps(entry) + "\n")
            progress.update(step, entry)
            if step % CHECKPOINT_EVERY == 0 or step == config.steps or signals.received:
                checkpoint(model, optimizer, step, config)
            if signals.received:
                name = signal.Signals(signals.received).name
                where = config.out / "checkpoint.pt"
                raise Interrupted(signals.received, f"{name} after step {step}; its state is in {where}")
    return metrics


def resolve(config: Config) -> Config:
    """The configuration with nothing left open: steps, epochs, device; it can run here, or ConfigError says why not."""
    images = data.TRAIN_IMAGES
    if config.batch_size > images:
        raise ConfigError(f"--batch-size must be at most the {images} training images; got {config.batch_size}")
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("--device cuda: PyTorch sees no CUDA GPU here")
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    steps_per_epoch = images // config.batch_size
    steps = config.steps or config.epochs * steps_per_epoch
    return dataclasses.replace(config, steps=steps, epochs=math.ceil(steps / steps_per_epoch), device=device)


def start_run(config: Config) -> Config:
    """Make the run's folder, write the resolved configuration into it and return it."""
    run = config.out or Path("runs") / time.strftime("digits-%Y%m%d-%H%M%S")
    try:
        if config.out is None:
            number = 1
            while run.exists():  # two runs in one second
                number += 1
                run = run.with_name(f"{run.name.partition('.')[0]}.{number}")
        run.mkdir(parents=True, exist_ok=config.out is not None)
        if any(run.iterdir()):
            raise ConfigError(f"--out {run} is not empty: a run is never overwritten, give it another folder")
    except OSError as error:
        raise ConfigError(f"--out {run}: {error.strerror}") from error
    config = dataclasses.replace(config, out=run)
    settings = {**dataclasses.asdict(config), "out": str(run)}
    settings["environment"] = {
        "barlow_fused": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    (run / "config.toml").write_text(tomli_w.dumps(settings))
    return config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As in the official code, biases and batch norm parameters are not decayed."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """The official schedule: linear warm-up, then a cosine down to a thousandth. ``step`` counts from 1."""
    warmup = math.ceil(WARMUP * config.steps)
    if step <= warmup:
        lr = config.lr * step / warmup
    else:
        q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))
        lr = config.lr * (q + 0.001 * (1 - q))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def accuracy(model: BarlowTwins, digits: data.Digits, device: torch.device) -> Accuracy:
    """The evaluation of the encoder (not the projector) as it is now."""
    train, test = (
        inference(model.encoder, data.enlarge(images).to(device)).cpu()
        for images in (digits.train_images, digits.test_images)
    )
    return evaluate(Features(train, digits.train_labels, test, digits.test_labels))


def correlations(model: BarlowTwins, digits: data.Digits, config: Config) -> pictures.Correlations:
    """The cross-correlation of two views of all training images as it is now."""
    views = data.two_views(digits.train_images, config.seed, 0)
    return pictures.correlate(*(inference(model, view.to(config.device)) for view in views))


@torch.no_grad()
def inference(module: nn.Module, images: Tensor) -> Tensor:
    """The module's output in evaluation mode: batch norm uses its running statistics."""
    was_training = module.training
    module.eval()
    output = module(images)
    module.train(was_training)
    return output


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
    """Write checkpoint.pt, the state after ``step`` steps; never one with NaN or infinite weights."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise diverged(f"a weight is NaN or infinite after step {step}", model, optimizer, step, config)
    save(state(model, optimizer, step, config), config.out / "checkpoint.pt")


def diverged(what: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: Config) -> DivergedError:
    """The error for a run that cannot go on, after its state was saved beside the last good checkpoint."""
    save(state(model, optimizer, step, config), config.out / "diverged.pt")
    return DivergedError(
        f"{what}. A smaller --lr (now {config.lr:g}) or --lambd (now {config.lambd:g}) may help. "
        f"{config.out} keeps the state as it is now (diverged.pt) and the last good one (checkpoint.pt)."
    )


def state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: Config) -> dict[str, Any]:
    """All that a run is after ``step`` steps, as plain types: batches and views follow from the seed and the step."""
    settings = {**dataclasses.asdict(config), "out": str(config.out)}
    return {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": settings}


def save(contents: dict[str, Any], path: Path) -> None:
    """torch.save that leaves the old file or the new one, whole, whenever it is cut off."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class StopSignals:
    """In its block, Ctrl-C (SIGINT) and SIGTERM are noted, so that a step can end first; a second one stops at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # only there Python allows it
            self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signum


def say(console: Console, text: str) -> None:
    """Print a line as it is: no colours, no mark-up in paths, no folding."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
