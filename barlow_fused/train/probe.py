"""``python -m barlow_fused evaluate RUN``: the official linear probe of a run's frozen backbone.

As in the official evaluate.py: a linear classifier on the backbone's output (weights N(0, 0.01), bias 0), SGD with
momentum 0.9, a learning rate of 0.3 that falls as a cosine over 100 epochs, batches of 256 random crops, mirrored half
of the time; tested on centre crops after every epoch, the best epoch reported. It runs on one device, and the network's
batch norms use their running statistics. Written digits are neither cropped nor mirrored, which would make other signs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from . import augment, checkpoint, model, trainer
from .checkpoint import CheckpointError
from .config import Config, ConfigError, combine, read_toml
from .datasets import Images, UnreadableImageError
from .evaluate import forward
from .loader import Plain, Unreadable, derive, generator, own_randomness
from .probe_flags import Settings, parse_args
from .processes import Processes
from .report import Progress

ALONE = Processes(rank=0, local_rank=0, count=1)


class Crops(Plain):
    """Randomly cropped and mirrored images, the same ones for a seed and an epoch."""

    def __init__(self, images: Images, indices: list[int], size: int, seed: int, epoch: int) -> None:
        super().__init__(images.labelled, indices, augment.probe_view(size, images.mean, images.std))
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, item: int) -> tuple[Tensor, int] | Unreadable:
        with own_randomness():
            torch.default_generator.manual_seed(derive(self.seed, "crop", self.epoch, self.indices[item]))
            return super().__getitem__(item)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    run, changes, settings = parse_args(argv)
    try:
        config = combine(read_toml(run / "config.toml"), changes)
        probe(run, config, settings, Console())
    except (ConfigError, CheckpointError, UnreadableImageError) as error:
        print(f"python -m barlow_fused evaluate: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def probe(run: Path, config: Config, settings: Settings, console: Console) -> dict[str, float]:
    """Train and test the classifier; the result is printed and written to RUN/linear_probe.json."""
    config = dataclasses.replace(config, device=trainer.choose_device(config.device))
    images = trainer.load_images(config, ALONE)
    if images.test is None:
        raise ConfigError(f"{run}: --data {config.data} has no labelled test images")
    device = torch.device(config.device)
    network = model.build(config.backbone, images.channels, config.image_size, config.projector_widths, config.stem)
    state = checkpoint.last(run, lambda text: trainer.say(console, text))
    model.restore(network, state)
    backbone = network.backbone.to(device).eval()
    if config.precision == "fp64":
        backbone.double()

    everything = list(range(len(images.labelled)))
    plain = augment.plain(config.image_size, images.mean, images.std, images.crop)
    test, test_labels = forward(backbone, Plain(images.test, list(range(len(images.test))), plain), config, device)
    fixed = config.augmentation == "digits"
    if fixed:
        rows, labels = forward(backbone, Plain(images.labelled, everything, plain), config, device)
    classifier = nn.Linear(network.features, images.classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=generator(settings.seed, "classifier"))
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(
        classifier.parameters(), settings.lr_classifier, momentum=0.9, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    best = {"top1": 0.0, "top5": 0.0}
    trainer.say(console, f"Linear probe of {run} after step {state['step']}: {len(everything)} labelled images")
    with Progress(console, 0, settings.epochs, "epoch") as progress:
        for epoch in range(settings.epochs):
            order = torch.randperm(len(everything), generator=generator(settings.seed, "probe", epoch))
            if not fixed:
                crops = Crops(images, everything, config.image_size, settings.seed, epoch)
                rows, labels = forward(backbone, crops, config, device)
            for batch in order.split(settings.batch_size):
                loss = F.cross_entropy(classifier(rows[batch]), labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
            if not math.isfinite(loss.item()):
                raise CheckpointError(f"the probe's loss is {loss.item()} in epoch {epoch + 1}: lower --lr-classifier")
            with torch.no_grad():
                ranked = classifier(test).topk(min(5, images.classes)).indices
            right = ranked == test_labels[:, None]
            now = {"top1": 100 * right[:, 0].double().mean().item(), "top5": 100 * right.any(1).double().mean().item()}
            best = {name: max(best[name], now[name]) for name in best}
            progress.show(epoch + 1, f"loss {loss.item():.4g} top-1 {now['top1']:.2f} % top-5 {now['top5']:.2f} %")
    result = {"step": state["step"], **now, **{f"best_{name}": value for name, value in best.items()}}
    (run / "linear_probe.json").write_text(json.dumps({**result, **settings._asdict()}, indent=2) + "\n")
    checkpoint.save({**classifier.state_dict()}, run / "linear_probe.pt")
    trainer.say(
        console,
        f"Linear probe on {len(test)} held-out images: top-1 {now['top1']:.2f} %, top-5 {now['top5']:.2f} % "
        f"(best epoch: {best['top1']:.2f} %, {best['top5']:.2f} %)",
    )
    return result
