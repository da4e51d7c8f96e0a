"""One process of the study: ``python -m benchmarks.width.one`` with a request as JSON.

The request's ``what`` is "pretrain" (a point, with the trainer's parts; a run that was killed goes on from its last
checkpoint), "baselines" (the accuracies of raw pixels and of a seed's untrained encoder) or "step" (what a point's
step costs). The result is left in the request's folder, in ``result.json``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from barlow_fused.train import checkpoint, evaluate, pictures, trainer
from barlow_fused.train.config import Config, combine
from barlow_fused.train.datasets import Images
from barlow_fused.train.processes import Processes

from ..trainer import measure
from .points import Point, Study

ALONE = Processes(0, 0, 1)
LAST_STEPS = 10  # whose losses are averaged
STEPS = 5  # that are timed


def configuration(study: Study, point: Point, folder: Path) -> Config:
    """The trainer's settings of a point."""
    return combine(
        {
            "preset": "digits",
            "data": study.data,
            "image_size": study.image_size,
            "epochs": study.epochs,
            "warmup_epochs": study.warmup_epochs,
            "lr_weights": study.lr,
            "lr_biases": study.lr,
            "batch_size": point.n,
            "projector": f"{point.hidden}-{point.d}",
            "kappa": point.kappa,
            "seed": point.seed,
            "device": trainer.choose_device("auto"),
            "log_every": 1,
            "knn_every": 0,
            "keep": 1,
            "out": folder,
        }
    )


def load(study: Study, config: Config) -> Images:
    """As many of the images as the study takes, evenly spaced."""
    images = trainer.load_images(config, ALONE)
    train, test = _some(images.train, study.images), _some(images.test, study.test)
    return dataclasses.replace(images, train=train, labelled=train, test=test)


def _some(images: Dataset, count: int) -> Subset:
    return Subset(images, torch.linspace(0, len(images) - 1, count).long().tolist())


def pretrain(study: Study, point: Point, folder: Path) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, and evaluate."""
    start = time.perf_counter()
    config = configuration(study, point, folder)
    state = None
    if (folder / checkpoint.FOLDER).is_dir():
        state = checkpoint.last(folder, print)
        config = dataclasses.replace(config, resume=folder)
    images = load(study, config)
    config = trainer.resolve(config, images, ALONE)
    device = torch.device(config.device)
    network, _ = trainer.build(config, images, device)
    config = trainer.start_run(config, state, ALONE)
    monitor = trainer.Monitor(network, images, config, device, ALONE)
    with trainer.Log(config, state["step"] if state else 0, ALONE) as log:
        trainer.fit(network, images, state, monitor, log, config, Console(quiet=True), device, ALONE)
    last = trainer.read_jsonl(folder / "metrics.jsonl")[-LAST_STEPS:]
    features = evaluate.extract(network.backbone, images, config, device, ALONE)
    return {
        **accuracies(features, images.classes),
        "rank": pictures.spectrum(features.train).effective_rank,
        **{name: sum(entry[name] for entry in last) / len(last) for name in ("loss", "on_diag", "off_diag")},
        "lambd": config.lambd,
        "floor": config.loss_floor.loss,
        "c_ii_of_floor": config.loss_floor.c_ii,
        "steps": config.steps,
        "seconds": time.perf_counter() - start,
    }


def baselines(study: Study, point: Point, folder: Path) -> dict[str, Any]:
    """The accuracies of raw pixels and of the untrained encoder, which depends on the point's seed alone."""
    config = configuration(study, point, folder)
    images = load(study, config)
    config = trainer.resolve(config, images, ALONE)
    device = torch.device(config.device)
    network, _ = trainer.build(config, images, device)

    def of(module: nn.Module, image_size: int) -> dict[str, float]:
        seen = dataclasses.replace(config, image_size=image_size)
        return accuracies(evaluate.extract(module, images, seen, device, ALONE), images.classes)

    pixels: Tensor = images.train[0][0]
    return {"pixels": of(nn.Flatten(), pixels.shape[-1]), "untrained": of(network.backbone, study.image_size)}


def accuracies(features: evaluate.Features, classes: int) -> dict[str, float]:
    """k-NN and the linear probe, with few labels and with all, in percent."""
    everything = torch.arange(len(features.train))
    probe_all = evaluate.probe_accuracy(evaluate.standardised(features), everything)
    return {**evaluate.evaluate(features, classes)._asdict(), "probe_all": probe_all}


def step(study: Study, point: Point, folder: Path, loss: str) -> dict[str, Any]:
    """Seconds of a step (the fastest of a few) and the process's peak bytes."""
    return measure(dataclasses.replace(configuration(study, point, folder), loss=loss), STEPS)


def main(request: str) -> int:
    """Answer a request: {what, study, point, folder, threads}, with loss for a step; the exit code."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    study, point, folder = Study(**asked["study"]), Point(*asked["point"]), Path(asked["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if asked["what"] == "pretrain":
            result = pretrain(study, point, folder)
        elif asked["what"] == "baselines":
            result = baselines(study, point, folder)
        else:
            result = step(study, point, folder, asked["loss"])
    except trainer.Interrupted as error:
        print(f"stopped by {error}", file=sys.stderr)
        return 128 + error.signum
    (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
