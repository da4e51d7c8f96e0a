"""What the ranks really send, beside what ``plan`` predicts.

python -m benchmarks.network --ranks 4 --n 512 --d 4096

Processes of this machine talk over the loopback interface of a network of their own (``unshare --net``; where that is
not allowed, over the machine's, where other programs' bytes are counted too), by Gloo. Its counter in /proc/net/dev
counts every byte: headers of TCP and acknowledgements, too. For each method the forward and backward pass run a few
times; the bytes that the barriers around them take, measured likewise, are taken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from barlow_fused import barlow_twins_loss
from barlow_fused.planning.cost import Cost, Problem
from barlow_fused.planning.devices import resolve_device
from barlow_fused.planning.network import Network
from barlow_fused.planning.plan import plan
from barlow_fused.planning.step import features_collectives, step_plan

from . import machine

STEPS = 3
HIDDEN = 512  # units before the last layer in shards, and before those
PORT = 29517
INSIDE = "BARLOW_FUSED_OWN_NETWORK"  # set in the process that has a network of its own


def usual_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The official code: SyncBatchNorm, which is for GPUs, by its own collectives, and C summed past autograd."""
    n, count = len(z_a) * dist.get_world_size(), torch.tensor([float(len(z_a))])

    def bn(z: Tensor) -> Tensor:
        local = torch.cat([z.mean(0), z.var(0, correction=0), count])
        every = local.new_empty(dist.get_world_size() * len(local))
        dist.all_gather_into_tensor(every, local.detach())
        mean, square = dist_nn.all_reduce(torch.stack([z.sum(0), z.square().sum(0)])).div(n).unbind()
        return (z - mean) * (square - mean.square() + 1e-5).rsqrt()

    c = bn(z_a).T @ bn(z_b)
    c.div_(n)
    dist.all_reduce(c)
    on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
    return on_diag + 0.0051 * (c.square().sum() - c.diagonal().square().sum())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.network", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--n", type=int, default=512, help="samples of all ranks (default: 512)")
    parser.add_argument("--d", type=int, default=4096, help="features (default: 4096)")
    arguments = parser.parse_args(argv)
    if INSIDE not in os.environ:
        alone = subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
        command = [*(["unshare", "--net"] if alone else []), sys.executable, "-m", "benchmarks.network", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, INSIDE: str(int(alone))}).returncode
    if os.environ[INSIDE] == "1":
        _loopback_up()
    torch.multiprocessing.spawn(_rank, (arguments,), nprocs=arguments.ranks)
    return 0


def _rank(rank: int, arguments: argparse.Namespace) -> None:
    ranks, n, d = arguments.ranks, arguments.n, arguments.d
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch.distributed.nn is deprecated
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=ranks)

    def fused(route: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: barlow_twins_loss(a, b, route=route, backend="torch", group="world", gradient="official")

    def of_features(a: Tensor, b: Tensor) -> Tensor:  # the same numbers, as shards of features
        views = [DTensor.from_local(z.reshape(n, d // ranks), mesh, [Shard(1)], run_check=False) for z in (a, b)]
        return barlow_twins_loss(*views, route="gram", backend="torch")

    def of_step(a: Tensor, b: Tensor) -> Tensor:  # a layer data parallel and the last in shards, as the trainer's
        weight = layer.to(a.dtype)
        own = [h.to(a.dtype) for h in before(torch.cat([z[:, :HIDDEN] for z in (a, b)]).float()).chunk(2)]
        views = [DTensor.from_local(h, mesh, [Shard(0)], run_check=False) for h in own]
        whole = torch.cat([view.redistribute(placements=[Replicate()]) for view in views])
        return barlow_twins_loss(*nn.functional.linear(whole, weight).chunk(2), route="gram", backend="torch")

    mesh = init_device_mesh("cpu", (ranks,))
    layer = nn.Parameter(distribute_tensor(torch.randn(d, HIDDEN), mesh, [Shard(0)]))
    modules = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU()
    before = DistributedDataParallel(nn.Sequential(*modules), broadcast_buffers=False, gradient_as_bucket_view=True)
    rows: list[tuple[str, Callable[[Tensor, Tensor], Tensor], torch.dtype, Cost]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for route in ("gram", "direct"):
            made = plan(n, d, dtype, device="h200", world_size=ranks, route=route, backend="torch")
            rows.append((route, fused(route), dtype, made.fused))
        made = plan(n, d, dtype, device="h200", world_size=ranks, route="gram", backend="torch")
        problem = Problem(n, d, dtype, resolve_device("h200"), ranks, "gram")
        sent = sum(Network().sent(c.kind, c.size, ranks) for c in features_collectives(problem, "torch"))
        rows.append(("features", of_features, dtype, dataclasses.replace(made.fused, sent_bytes=sent)))
        shape = f"{HIDDEN}-{d}"
        step = step_plan(n, shape, dtype, "h200", ranks, features=HIDDEN, route="gram", backend="torch").sharded
        kinds = {"reduce_scatter": "all_reduce"}  # which Gloo makes of it; NCCL sends half of that
        sent = sum(Network().sent(kinds.get(c.kind, c.kind), c.size, ranks) for c in step.collectives)
        rows.append(("step", of_step, dtype, dataclasses.replace(made.fused, sent_bytes=sent)))
    rows.append(("usual", usual_loss, torch.float32, plan(n, d, device="h200", world_size=ranks).usual))
    if rank == 0:
        own = "of its own" if os.environ[INSIDE] == "1" else "shared with other programs"
        cpu = machine.describe_machine(torch.device("cpu"))["cpu"]
        print(f"{cpu}, {ranks} processes, Gloo on a loopback interface {own}")
        print(f"N={n} D={d}: bytes that each rank sends, forward and backward")
        print(f"{'method':10}{'dtype':10}{'predicted':>14}{'on the wire':>14}{'wire / predicted':>18}")
    for title, loss, dtype, cost in rows:
        views = [torch.randn(n // ranks, d, dtype=dtype, requires_grad=True) for _ in range(2)]
        loss(*views).backward()  # connections are made now
        idle = _sent(lambda: None)
        sent = (_sent(lambda loss=loss, views=views: loss(*views).backward()) - idle) / STEPS / ranks
        if rank == 0:
            name = str(dtype).removeprefix("torch.")
            print(f"{title:10}{name:10}{cost.sent_bytes:>14,}{sent:>14,.0f}{sent / cost.sent_bytes:>18.3f}", flush=True)
    dist.destroy_process_group()


def _sent(run: Callable[[], object]) -> int:
    """Bytes on the interface during STEPS runs, by all ranks."""
    dist.barrier()
    before = _counter()
    dist.barrier()
    for _ in range(STEPS):
        run()
    dist.barrier()
    after = _counter()
    dist.barrier()
    return after - before


def _counter() -> int:
    """Bytes that the loopback interface has received."""
    return int(re.search(r"^\s*lo:\s*(\d+)", Path("/proc/net/dev").read_text(), re.MULTILINE)[1])


def _loopback_up() -> None:
    """Switch the interface on; a new network's is off."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(s, get_flags, request))[1]
        fcntl.ioctl(s, set_flags, struct.pack("16sH14x", b"lo", flags | up))


if __name__ == "__main__":
    sys.exit(main())
