"""A pretraining run from start to end: Barlow Twins with the fused loss, and what it gained.

Read ``train`` for the run and ``fit`` for its loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from .. import width
from ..choice import verify_first
from ..version import __version__
from . import augment, checkpoint, datasets, evaluate, model, optim, pictures, processes, shards
from .checkpoint import CheckpointError
from .config import Config, ConfigError, flag_name, parse_args
from .datasets import Images, UnreadableImageError
from .loader import Parts, batches
from .model import BarlowTwins
from .pictures import Snapshot
from .processes import Processes
from .report import Output, Progress, print_gain
from .step import Stepper, autocast, criterion, to_device

LOG_EVERY_STEP = 200  # runs of so many steps or fewer log each; longer ones every tenth
SEEN = 1024  # images that the pictures are drawn from, and batch norm's first statistics
SEEN_AT_ONCE = 128
SEEN_FEATURES = 2**15  # of wider projectors so many, evenly spaced
EMBEDDINGS = 6  # arrays of N x D numbers that a step has at once: two views, their gradients, and copies
WIDEST_PIXELS = 4096  # numbers an image, up to which raw pixels are a representation to compare with


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """A signal asked the run to stop; the message says where its state is."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class DivergedError(Exception):
    """The loss or a weight is NaN or infinite; the message says where the state is."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: train, print what was gained, and return the exit code.

    0: trained; 1: the loss became NaN, an image cannot be read, the disk is full; 2: a bad flag, or data that is not
    there; 128 + a signal's number: stopped by it, after the step under way and with its state written (Ctrl-C: 130).
    """
    config = parse_args(argv)
    try:
        train(config, Console(file=Output(sys.stdout)))
    except ConfigError as error:
        print(f"python -m barlow_fused train: error: {error}", file=sys.stderr)
        return 2
    except (DivergedError, CheckpointError, UnreadableImageError) as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Stopped: {error.filename or config.out}: {error.strerror or error}", file=sys.stderr)
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
    config = dataclasses.replace(config, device=choose_device(config.device))
    by = processes.start(config.device)
    console.quiet |= not by.first
    if config.device == "cuda" and config.loss == "fused":
        verify_first(torch.device("cuda", by.local_rank), config.verify)
    images = load_images(config, by)
    config = resolve(config, images, by)
    device = torch.device(config.device, by.local_rank) if config.device == "cuda" else torch.device("cpu")
    network, origin = build(config, images, device)
    if config.shard_projector and by.count > 1:
        shards.shard(network, device, by.count)
    state = checkpoint.last(config.resume, lambda text: say(console, text), by) if config.resume else None
    if state and config.steps < state["step"]:
        raise ConfigError(
            f"--steps {config.steps}: {config.resume} has made {state['step']} steps already; nothing was changed"
        )
    config = start_run(config, state, by)

    weights = sum(parameter.numel() for parameter in network.parameters())
    say(
        console,
        f"Run {config.out}: {config.data}, seed {config.seed}, {config.device} x {by.count}, {config.loss} loss",
    )
    say(console, f"{config.backbone} from {origin}, {weights / 1e6:.1f} M weights")
    n, d = config.batch_size, config.projector_widths[-1]
    say(console, f"{config.steps} steps of N = {n} images, D = {d} features")
    say(console, f"The loss: {width.describe(n, d, config.lambd)}")
    if warning := width.warning(n, d, config.lambd):
        say(console, f"Warning: {warning}")

    if images.test is None:
        say(console, f"No accuracies: --data {config.data} has no labelled images of several classes that are held out")
    monitor = Monitor(network, images, config, device, by)
    monitor.before, before = monitor.look(), monitor.accuracy()
    first = state["step"] if state else 0
    with held(config.out, by), Log(config, first, by) as log:
        if before is not None and first == 0:
            log.write_knn(0, 0.0, before.knn_all)
        fit(network, images, state, monitor, log, config, console, device, by)
        after = monitor.accuracy()
        if after is not None and first < config.steps:
            log.write_knn(config.steps, config.steps / (len(images.train) // config.batch_size), after.knn_all)
    pixels = monitor.pixels()
    monitor.draw()
    if by.first:
        encoder = {name: tensor.cpu().float() for name, tensor in network.backbone.state_dict().items()}
        checkpoint.save(encoder, config.out / "encoder.pt")
        if after is not None:
            results = {"raw_pixels": pixels, "untrained_encoder": before, "pretrained_encoder": after}
            results = {name: result for name, result in results.items() if result is not None}
            text = json.dumps({name: result._asdict() for name, result in results.items()}, indent=2)
            (config.out / "results.json").write_text(text + "\n")
            print_gain(console, results, min(config.knn_images, len(images.labelled)), len(images.test))
        names = ", ".join(sorted(path.name for path in config.out.iterdir()))
        say(console, f"The run is in {config.out}: {names}")
    by.wait()
    processes.stop()


def fit(
    network: BarlowTwins,
    images: Images,
    state: dict[str, Any] | None,
    monitor: Monitor,
    log: Log,
    config: Config,
    console: Console,
    device: torch.device,
    by: Processes,
) -> None:
    """The training loop: from ``state`` (None: the beginning) to ``config.steps`` optimiser steps.

    Raises:
        DivergedError: a loss or a weight is NaN or infinite.
        Interrupted: a signal came; the step under way was finished.
        UnreadableImageError, CheckpointError: an image cannot be read; the disk cannot be written.
    """
    optimizer = optim.build(network, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    first = 0
    if state is not None:
        model.restore(network, state)
        optimizer.load_state_dict(optim.placed(optimizer, state["optimizer"]))
        scaler.load_state_dict(state["scaler"])
        first = state["step"]
        say(console, f"Resumed after step {first}")
    stepper = Stepper(
        wrap(network, config, device, by), criterion(config, by, network), optimizer, scaler, config, device, by.rank
    )
    parts = Parts(images, config, by)
    steps_per_epoch, schedule = parts.steps_per_epoch, config.epochs * parts.steps_per_epoch

    def keep(step: int) -> str:
        """Write the state after ``step`` steps and say where it is; never weights that are not finite."""
        contents = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "config": config.to_dict(),
        }
        finite = all(shards.local(parameter).isfinite().all() for parameter in network.parameters())
        if by.most(int(not finite))[0]:
            checkpoint.write_state(config.out / "diverged.pt", {"step": step, **contents}, by)
            raise DivergedError(
                f"a weight is NaN or infinite after step {step}: a lower --lr-weights may help. The last finite "
                f"weights are in {config.out / checkpoint.FOLDER}, those at the end in {config.out / 'diverged.pt'}"
            )
        checkpoint.write(config.out, step, contents, config.keep, by)
        return f"The state after step {step} is in {checkpoint.path_of(config.out, step)}"

    if config.out != config.resume:  # where that state is already
        keep(first)
    network.train()
    own_batch = config.batch_size // by.count // config.accumulate
    stepper.rehearse((torch.zeros(own_batch, images.channels, config.image_size, config.image_size),) * 2)
    views = batches(
        parts,
        config.workers,
        range(first * config.accumulate, config.steps * config.accumulate),
        pin_memory=device.type == "cuda",
    )
    with Progress(console, first, config.steps) as progress, StopSignals() as signals:
        log.since = time.perf_counter()
        for step in range(first, config.steps):
            unreadable = None
            try:
                own = [next(views) for _ in range(config.accumulate)]
            except UnreadableImageError as error:
                unreadable = error
            signum, trouble = by.most(signals.received, int(unreadable is not None))  # all stop together
            if signum:
                raise Interrupted(signum, f"{signal.Signals(signum).name}. {keep(step)}")
            if trouble:
                kept = keep(step)
                raise UnreadableImageError(f"{unreadable or 'another process could not read an image'}. {kept}")

            lr = optim.set_learning_rates(optimizer, step, schedule, steps_per_epoch, config)
            terms = stepper.backward(own, step)
            if not terms.loss.isfinite():
                raise DivergedError(
                    f"the loss is {terms.loss.item()} at step {step + 1}: a lower --lr-weights may help. {keep(step)}"
                )
            stepper.update()

            done = step + 1
            entry = None
            if done % config.log_every == 0 or done in (1, config.steps):
                entry = log.write(done, step // steps_per_epoch + 1, terms, lr)
            progress.update(done, entry, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
            if done % config.checkpoint_every == 0 or done == config.steps:
                keep(done)
            if config.knn_every and done % (config.knn_every * steps_per_epoch) == 0 and done < config.steps:
                log.write_knn(done, done / steps_per_epoch, monitor.knn())
                monitor.draw()


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda``, or ConfigError says why not."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("--device cuda: PyTorch sees no CUDA GPU here")
    return ("cuda" if cuda else "cpu") if device == "auto" else device


def load_images(config: Config, by: Processes) -> Images:
    """The data set; one process a node downloads it, and the others wait."""
    arguments = (config.data, config.data_dir)
    size = config.image_size or datasets.FAKE_SIZE
    if config.download and by.local_rank == 0:
        datasets.load(*arguments, download=True, fake_size=size)
    by.wait()
    return datasets.load(*arguments, fake_size=size)


def resolve(config: Config, images: Images, by: Processes) -> Config:
    """The configuration with nothing left open; it can run here, or ConfigError says why not."""
    count = len(images.train)
    if config.batch_size > count:
        raise ConfigError(f"--batch-size must be at most the {count} training images; got {config.batch_size}")
    parts = by.count * config.accumulate
    if config.batch_size % parts or config.batch_size < 2 * parts:
        raise ConfigError(
            f"--batch-size must be a multiple of the {by.count} processes times --accumulate {config.accumulate}, at "
            f"least two images for each; got {config.batch_size}"
        )
    for name in ("fused_projector", "shard_projector"):
        if getattr(config, name) and config.loss == "reference":
            raise ConfigError(f"{flag_name(name)} is of --loss fused; got --loss reference")
    may_fuse = config.loss == "fused"
    steps_per_epoch = count // config.batch_size
    steps = config.steps or config.epochs * steps_per_epoch
    return dataclasses.replace(
        config,
        steps=steps,
        epochs=max(config.epochs, math.ceil(steps / steps_per_epoch)),
        image_size=config.image_size or images.size,
        fused_projector=may_fuse and crowded(config, by.count)
        if config.fused_projector is None
        else config.fused_projector,
        log_every=config.log_every or (1 if steps <= LOG_EVERY_STEP else 10),
    )


def crowded(config: Config, processes: int = 1) -> bool:
    """Whether a process's embeddings, their gradients and copies would take more than half of the memory."""
    number = 8 if config.precision == "fp64" else 4
    if config.device == "cuda":
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return EMBEDDINGS * config.batch_size // processes * config.projector_widths[-1] * number > memory / 2


def start_run(config: Config, state: dict[str, Any] | None, by: Processes) -> Config:
    """Make the run's folder, write the resolved configuration into it and return it."""
    run = config.out or Path("runs") / time.strftime(f"{config.data.partition(':')[0]}-%Y%m%d-%H%M%S")
    goes_on = config.resume is not None and run.absolute() == config.resume.absolute()
    if by.first:
        try:
            number = 1
            while config.out is None and run.exists():  # two runs in one second
                number += 1
                run = run.with_name(f"{run.name.partition('.')[0]}.{number}")
            run.mkdir(parents=True, exist_ok=config.out is not None)
            if any(run.iterdir()) and not goes_on:
                raise ConfigError(
                    f"--out {run} is not empty: a run is never overwritten. Give it another folder, or continue it "
                    f"with --resume {run}"
                )
        except OSError as error:
            raise ConfigError(f"--out {run}: {error.strerror}") from error
    config = dataclasses.replace(config, out=run)
    if by.first:
        environment = {
            "barlow_fused": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processes": by.count,
        }
        config.write(run / "config.toml", environment=environment)
        for name in ("metrics.jsonl", "knn.jsonl") if state else ():  # what came after the state comes again
            entries = [entry for entry in read_jsonl(config.resume / name) if entry["step"] <= state["step"]]
            temporary = run / (name + ".tmp")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            temporary.replace(run / name)
    by.wait()
    return config


def build(config: Config, images: Images, device: torch.device) -> tuple[BarlowTwins, str]:
    """The model at its beginning, on the device, and where its weights come from."""
    torch.manual_seed(config.seed)
    network = model.build(
        config.backbone, images.channels, config.image_size, config.projector_widths, stem=config.stem
    )
    origin = model.load_weights(network, config.init) if config.init and not config.resume else "random weights"
    if config.precision == "fp64":
        network.double()
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if origin == "random weights":
        plain = augment.plain(config.image_size, images.mean, images.std, images.crop)
        seen = torch.stack([plain(datasets.read(images.train, index)[0]) for index in some(images, config)])
        parts = nn.Sequential(network.backbone, network.projector[:-1])
        model.set_batch_norm_statistics(parts, to_device(seen, config, device))
    return network, origin


def wrap(network: BarlowTwins, config: Config, device: torch.device, by: Processes) -> nn.Module:
    """The network as it is trained: its batch norms synchronised, compiled, its gradients averaged over processes."""
    if by.count > 1 and config.sync_batch_norm:
        processes.synchronise_batch_norm(network, config.device)
    model = shards.Trunk(network) if shards.is_sharded(network) else network
    if config.compile:
        model.compile()
    if by.count == 1:
        return model
    devices = [by.local_rank] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def some(images: Images, config: Config) -> list[int]:
    """Evenly spaced training images to look at."""
    return torch.linspace(0, len(images.train) - 1, min(SEEN, 8 * config.batch_size, len(images.train))).long().tolist()


class Monitor:
    """What the network has come to, measured while it trains: k-NN accuracy and pictures."""

    def __init__(
        self, network: BarlowTwins, images: Images, config: Config, device: torch.device, by: Processes
    ) -> None:
        self.network, self.images, self.config, self.device, self.by = network, images, config, device, by
        self.before: Snapshot | None = None

    def accuracy(self) -> evaluate.Accuracy | None:
        """All accuracies of the backbone; None: the data set has no labels."""
        if self.images.test is None:
            return None
        features = evaluate.extract(self.network.backbone, self.images, self.config, self.device, self.by)
        return evaluate.evaluate(features, self.images.classes)

    def pixels(self) -> evaluate.Accuracy | None:
        """The accuracies of the images themselves, at their own size; None if they are too large."""
        if self.images.test is None:
            return None
        channels, size, _ = datasets.read(self.images.test, 0)[0].shape
        if channels * size**2 > WIDEST_PIXELS:
            return None
        config = dataclasses.replace(self.config, image_size=size)
        features = evaluate.extract(nn.Flatten(), self.images, config, self.device, self.by)
        return evaluate.evaluate(features, self.images.classes)

    def knn(self) -> float | None:
        """The accuracy of k-NN with all labels."""
        if self.images.test is None:
            return None
        features = evaluate.extract(self.network.backbone, self.images, self.config, self.device, self.by)
        everything = torch.arange(len(features.train))
        return evaluate.knn_accuracy(features, everything, self.images.classes, evaluate.NEIGHBOURS)

    @torch.no_grad()
    def look(self) -> Snapshot | None:
        """What the network makes of two views of some training images, in evaluation mode; on the first process."""
        *_, last = self.network.projector
        d = last.out_features
        chosen = torch.linspace(0, d - 1, min(d, SEEN_FEATURES)).long().to(self.device)
        weight = last.weight if d <= SEEN_FEATURES and not shards.is_sharded(self.network) else None
        weight = shards.rows(last.weight, chosen) if weight is None else weight
        if not self.by.first:
            return None
        alone = Parts(self.images, self.config, Processes(0, 0, 1))
        indices = some(self.images, self.config)
        training, seen = self.network.training, []
        hidden = self.network.projector[:-1]
        self.network.eval()
        for part, start in enumerate(range(0, len(indices), SEEN_AT_ONCE)):
            views = alone.augment(indices[start : start + SEEN_AT_ONCE], 0, part)
            with autocast(self.config, self.device):
                h_a, h_b = (self.network.backbone(to_device(view, self.config, self.device)) for view in views)
                seen.append([h_a, *(nn.functional.linear(hidden(h), weight) for h in (h_a, h_b))])
        self.network.train(training)
        return pictures.snapshot(*(torch.cat(parts).float().cpu() for parts in zip(*seen, strict=True)), d)

    def draw(self) -> None:
        """All pictures, of this moment; the first process draws, every one must call."""
        out, now = self.config.out, self.look()
        if now is None:
            return
        pictures.draw_loss(read_jsonl(out / "metrics.jsonl"), self.config, out / "loss.png")
        history = [entry for entry in read_jsonl(out / "knn.jsonl") if entry["knn"] is not None]
        if history:
            pictures.draw_knn(history, out / "knn.png")
        pictures.draw_correlation(self.before.correlations, now.correlations, out / "cross_correlation.png")
        pictures.draw_spectra(self.before, now, out / "spectrum.png")
        parts = Parts(self.images, self.config, Processes(0, 0, 1))
        indices = some(self.images, self.config)[:12]
        views = parts.augment(indices, 0, 0)
        originals = [datasets.read(self.images.train, index)[0].float() / 255 for index in indices]
        pictures.draw_views(originals, *(self._as_colours(view) for view in views), out / "views.png")

    def _as_colours(self, views: Tensor) -> Tensor:
        """Views in [0, 1] again."""
        if self.config.augmentation == "digits":
            return views
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.images.mean, self.images.std))
        return views * std + mean


@contextlib.contextmanager
def held(run: Path, by: Processes) -> Iterator[None]:
    """The run's folder belongs to these processes until the block ends, or they do.

    Raises:
        ConfigError: others train in it.
    """
    taken = False
    with (run / ".lock").open("a") as file:
        if by.first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
            except OSError:  # a file system without locks
                pass
        if by.most(int(taken))[0]:
            raise ConfigError(f"{run}: another process is training in this folder")
        yield


class Log:
    """metrics.jsonl, knn.jsonl and TensorBoard; on the first process only."""

    def __init__(self, config: Config, first: int, by: Processes) -> None:
        self.config, self.first, self.by = config, first, by
        self.last, self.since = first, time.perf_counter()

    def __enter__(self) -> Log:
        if self.by.first:
            self.metrics, self.knn = (
                (self.config.out / n).open("a", buffering=1) for n in ("metrics.jsonl", "knn.jsonl")
            )
            self.board = SummaryWriter(
                self.config.out / "tensorboard", purge_step=self.first + 1 if self.first else None
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.by.first:
            for file in (self.metrics, self.knn, self.board):
                file.close()

    def write(self, step: int, epoch: int, terms: Any, lr: float) -> dict[str, Any]:
        """One logged step."""
        now = time.perf_counter()
        entry = {
            "step": step,
            "epoch": epoch,
            **{name: getattr(terms, name).item() for name in ("loss", "on_diag", "off_diag")},
            "loss_above_floor": terms.loss.item() - self.config.loss_floor.loss,
            "lr": lr,
            "images_per_second": (step - self.last) * self.config.batch_size / (now - self.since),
        }
        self.last, self.since = step, now
        if self.by.first:
            self.metrics.write(json.dumps(entry) + "\n")
            for name in entry.keys() - {"step"}:
                self.board.add_scalar(f"train/{name}", entry[name], step)
        return entry

    def write_knn(self, step: int, epoch: float, accuracy: float | None) -> None:
        """The k-NN accuracy, if there is one; the time that it took does not count as training."""
        self.since = time.perf_counter()
        if self.by.first and accuracy is not None:
            self.knn.write(json.dumps({"step": step, "epoch": epoch, "knn": accuracy}) + "\n")
            self.board.add_scalar("knn/accuracy", accuracy, step)


class StopSignals:
    """In its block, Ctrl-C (SIGINT), SIGTERM and SIGUSR1 are noted, so that a step can end first; a second one stops
    at once.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # only there Python allows it
            caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self.previous = {signum: signal.signal(signum, self._note) for signum in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signum


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON objects, a line each; lines that are damaged or were cut off are left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):  # of text that is not UTF-8, too
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def say(console: Console, text: str) -> None:
    """Print a line as it is: no colours, no mark-up in paths, no folding."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
