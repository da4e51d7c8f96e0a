"""What test_train_shards.py compares with one process: training with the projector's last layer in shards.

python tests/support/shard_processes.py FOLDER
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import forked
import torch
import torch.distributed as dist
from torch import nn

from barlow_fused.train import config, main, model, optim, processes, shards, step, trainer

COMMON = ["--precision", "fp64", "--batch-size", "48", "--warmup-epochs", "0.05", "--device", "cpu"]
COMMON += ["--checkpoint-every", "10", "--projector", "48-99"]
PRECISIONS = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16", "--accumulate", "2"],
}


def quiet() -> None:
    """No evaluation, no pictures, and processes that go on with the next run."""
    processes.stop = lambda: None
    for method in ("look", "accuracy", "pixels", "draw", "knn"):
        setattr(trainer.Monitor, method, lambda self: None)


def run(out: Path, *flags: str) -> None:
    assert main([*COMMON, *flags, "--out", str(out)]) == 0


def go_on(out: Path, steps: int = 20, *flags: str) -> None:
    assert main(["--resume", str(out), "--steps", str(steps), *flags]) == 0


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since ``forget_peak``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    with contextlib.suppress(OSError):  # where it is not allowed: the beginning took less than a step does
        Path("/proc/self/clear_refs").write_text("5")


def needs(count: int, width: int = 131072, hidden: int = 512, n: int = 64) -> int:
    """Bytes of a process at its peak in steps of a wide last layer: weight, gradient, momentum and embeddings."""
    if width > 64:
        needs(count, 64)  # what is loaded once is not counted
    flags = {"projector": f"{hidden}-{width}", "batch_size": n, "device": "cpu", "fused_projector": False}
    settings = config.combine({**flags, "optimizer": "lars"})
    by = processes.Processes(dist.get_rank() if count > 1 else 0, 0, count)
    torch.manual_seed(0)
    before = resident("VmRSS")
    network = model.build("tiny", 1, 16, [hidden, width])
    if count > 1:
        shards.shard(network, torch.device("cpu"), count)
    optimizer, scaler = optim.build(network, settings), torch.amp.GradScaler("cpu", enabled=False)
    wrapped, device = trainer.wrap(network, settings, torch.device("cpu"), by), torch.device("cpu")
    loss = step.criterion(settings, by, network)
    stepper = step.Stepper(wrapped, loss, optimizer, scaler, settings, device, by.rank)
    views = tuple(torch.rand(n // count, 1, 16, 16) for _ in range(2))
    forget_peak()
    for number in range(3):
        stepper.backward([views], number)
        stepper.update()
    return resident("VmHWM") - before


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
    """In processes of its own, since what a process has freed before would not count."""
    by = processes.start("cpu")
    needed = needs(by.count)
    if by.first:
        (folder / f"needed-{by.count}.json").write_text(json.dumps(needed))


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
    for count, function in ((1, memory), (4, memory), (2, on_two), (4, on_four), (3, on_three)):
        forked.run(count, function, Path(sys.argv[1]))
