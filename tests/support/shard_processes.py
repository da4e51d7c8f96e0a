"""What test_train_shards.py compares with one process: training with the projector's last layer in shards.

python tests/support/shard_processes.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import forked
import torch
import torch.distributed as dist
from torch import nn
from tracing import Trace

from barlow_fused.train import checkpoint, config, main, model, optim, processes, shards, step, trainer

COMMON = ["--precision", "fp64", "--batch-size", "48", "--warmup-epochs", "0.05", "--device", "cpu"]
COMMON += ["--checkpoint-every", "10", "--projector", "48-99"]
PRECISIONS = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16", "--accumulate", "2"],
}
MEMORY_SHAPES = {"fp32": (64, 512, 131072), "bf16": (16, 512, 32768)}  # images, H, D; halves are slow on CPUs
FEATURES = model.TinyResNet.features
MEMORY_RUNS = [(sharded, *run) for sharded in (False, True) for run in (("fp32", "lars"), ("bf16", "sgd"))]


def quiet() -> None:
    """No evaluation, no pictures, and processes that go on with the next run."""
    processes.stop = lambda: None
    for method in ("look", "accuracy", "pixels", "draw", "knn"):
        setattr(trainer.Monitor, method, lambda self: None)


def run(out: Path, *flags: str) -> None:
    assert main([*COMMON, *flags, "--out", str(out)]) == 0


def go_on(out: Path, steps: int = 20, *flags: str) -> None:
    assert main(["--resume", str(out), "--steps", str(steps), *flags]) == 0


def needs(by: processes.Processes, sharded: bool, precision: str, optimizer_name: str) -> int:
    """Bytes that operators allocate at their peak, in steps of a wide last layer."""
    n, hidden, width = MEMORY_SHAPES[precision]
    device = torch.device("cpu")
    settings = config.combine({
        "projector": f"{hidden}-{width}", "batch_size": n, "device": "cpu", "fused_projector": False,
        "precision": precision, "optimizer": optimizer_name,
    })  # fmt: skip
    torch.manual_seed(0)
    with Trace() as trace:
        network = model.build("tiny", 1, 16, [hidden, width])
        if sharded:
            shards.shard(network, device, by.count)
        optimizer, scaler = optim.build(network, settings), torch.amp.GradScaler("cpu", enabled=False)
        stepper = step.Stepper(
            trainer.wrap(network, settings, device, by), step.criterion(settings, by, network), optimizer, scaler,
            settings, device, by.rank,
        )  # fmt: skip
        views = tuple(torch.rand(n // by.count, 1, 16, 16) for _ in range(2))
        trace.peak = 0  # of building the whole layer, before it is cut
        for number in range(2):
            stepper.backward([views], number)
            stepper.update()
    return trace.peak


def start(by: processes.Processes, path: Path) -> float:
    """The same while a network is built, given the weights of a file, and cut: as multiples of the last layer's."""
    _, hidden, width = MEMORY_SHAPES["bf16"]
    with Trace() as trace:
        network = model.build("tiny", 1, 16, [hidden, width])
        model.load_weights(network, path)
        shards.shard(network, torch.device("cpu"), by.count)
    torch.testing.assert_close(shards.local(network.projector[-1].weight), torch.full((width // by.count, hidden), 0.5))
    return trace.peak / (4 * hidden * width)


def starts(by: processes.Processes, folder: Path) -> dict[str, float]:
    """From a file of the official layout, and from one in shards."""
    network = model.build("tiny", 1, 16, list(MEMORY_SHAPES["bf16"][1:]))
    nn.init.constant_(network.projector[-1].weight, 0.5)
    if by.first:
        state = {f"module.{name}": x for name, x in network.state_dict().items()}
        torch.save({"epoch": 1, "model": state, "optimizer": {}}, folder / "official.pth")
    shards.shard(network, torch.device("cpu"), by.count)
    checkpoint.write_state(folder / "shards.pt", {"model": dict(network.state_dict())}, by)
    by.wait()
    return {name: start(by, folder / name) for name in ("official.pth", "shards.pt")}


def overflow() -> None:
    """An infinite gradient in one process's rows alone: all leave the step out, and go on alike."""
    for of_rank in (0, 1):
        torch.manual_seed(0)
        network = model.build("tiny", 1, 16, [8, 11])
        shards.shard(network, torch.device("cpu"), dist.get_world_size())
        settings = config.combine({"projector": "8-11", "precision": "fp16", "device": "cpu", "optimizer": "sgd"})
        optimizer = optim.build(network, settings)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.tensor(1.0))
        stepper = step.Stepper(nn.Identity(), None, optimizer, scaler, settings, torch.device("cpu"), dist.get_rank())
        before = [shards.local(p).detach().clone() for p in network.parameters()]
        for infinite in (True, False):
            for p in network.parameters():
                p.grad = torch.ones_like(p)
            if infinite and dist.get_rank() == of_rank:
                shards.local(network.projector[-1].weight.grad)[0, 0] = float("inf")
            stepper.update()
            same = [torch.equal(shards.local(p), x) for p, x in zip(network.parameters(), before, strict=True)]
            assert all(same) if infinite else not any(same)
            assert scaler.get_scale() == 2.0
        moved = shards.local(network.projector[-1].weight).detach() - before[-1]
        torch.testing.assert_close(moved, torch.full_like(moved, -0.1 / 2))  # of a gradient 1, unscaled


def memory(folder: Path) -> None:
    by = processes.start("cpu")
    for sharded, precision, optimizer in MEMORY_RUNS:
        needed = needs(by, sharded and by.count > 1, precision, optimizer)
        if by.first:
            name = f"needed-{by.count}-{sharded}-{precision}-{optimizer}.json"
            (folder / name).write_text(json.dumps(needed))
    if by.count == 4:
        needed = starts(by, folder)
        if by.first:
            (folder / "starts.json").write_text(json.dumps(needed))


def on_two(folder: Path) -> None:
    quiet()
    overflow_at = processes.start("cpu")
    assert overflow_at.count == 2
    overflow()
    for name, flags in PRECISIONS.items():
        run(folder / name, "--shard-projector", "--steps", "5", *flags)
        run(folder / f"{name} fused", "--shard-projector", "--fused-projector", "--steps", "5", *flags)


def on_four(folder: Path) -> None:
    quiet()
    by = processes.start("cpu")
    run(folder / "four", "--shard-projector", "--steps", "20", "--keep", "9")
    run(folder / "ten", "--shard-projector", "--steps", "10")
    by.wait()
    if by.first:
        for name in ("three", "one", "again"):
            shutil.copytree(folder / "ten", folder / name)
    by.wait()
    go_on(folder / "again")


def on_three(folder: Path) -> None:
    quiet()
    go_on(folder / "three")
    run(
        folder / "from one",
        "--shard-projector",
        "--steps",
        "1",
        "--init",
        str(folder / "four" / "checkpoints" / "step-00000020.pt"),
    )


if __name__ == "__main__":
    for count, function in ((1, memory), (2, memory), (4, memory), (2, on_two), (4, on_four), (3, on_three)):
        forked.run(count, function, Path(sys.argv[1]))
