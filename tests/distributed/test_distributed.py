"""The loss over several processes, on Gloo: what checks.py checks on every rank.

What the arguments are checked for, and what happens when a rank leaves the other alone, stands here.
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ENVIRONMENT, RANKS, names_of_checks, results

from barlow_fused import BarlowTwinsLoss, barlow_twins_loss

SCRIPT = Path(__file__).with_name("checks.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", names_of_checks(SCRIPT))
def test_on_every_rank(name: str, ranks: int) -> None:
    problems = results(SCRIPT, "torch", *RANKS)[ranks][name]
    assert not problems, "\n".join(f"rank {rank}: {text}" for rank, text in problems.items())


LEFT_ALONE = """
import datetime, json, os, sys, time, traceback, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from barlow_fused import barlow_twins_loss
import barlow_fused.backends.torch_partial, barlow_fused.distributed.sharded

def on_rank(folder, what, rank):
    store = dist.FileStore(os.path.join(folder, what), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=4))
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,)) if "shards" in what else None
    for step in range(3):
        odd = rank == 1 and step == 1
        z_a, z_b = (torch.randn(8, 100, requires_grad=True) for _ in range(2))
        if odd and what.startswith("is killed before"):
            os._exit(0)
        if mesh is None:
            loss = barlow_twins_loss(z_a, z_b, group="world", gradient="official")
        else:
            views = (DTensor.from_local(z, mesh, [Shard(1)], run_check=False) for z in (z_a, z_b))
            loss = barlow_twins_loss(*views, route="direct" if "direct" in what else "gram")
        if odd and what == "is killed after":
            os._exit(0)
        if odd and what == "skips backward and waits":
            time.sleep(9)
            os._exit(0)
        if not (odd and what == "skips backward and goes on"):
            loss.backward()

folder, *endings = sys.argv[1:]
processes = {}
for what in endings:
    for rank in range(2):
        processes[what, rank] = os.fork()
        if processes[what, rank] == 0:
            os.dup2(os.open(os.path.join(folder, f"{what} {rank}.log"), os.O_CREAT | os.O_WRONLY), 2)
            try:
                on_rank(folder, what, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
codes = {f"{what} {rank}": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for (what, rank), pid in processes.items()}
print(json.dumps(codes))
"""
ENDINGS = ("is killed before", "is killed after", "skips backward and waits", "skips backward and goes on")
ENDINGS += ("is killed before, features in shards", "is killed before, features in shards, direct")


@functools.cache
def left_alone() -> dict[str, list[tuple[int, str]]]:
    """The exit codes and the errors of two ranks, of which rank 1 leaves the other alone, in each way."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LEFT_ALONE, folder, *ENDINGS]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-5000:]
        codes = json.loads(done.stdout)
        return {
            what: [(codes[f"{what} {r}"], Path(folder, f"{what} {r}.log").read_text()) for r in range(2)]
            for what in ENDINGS
        }


@pytest.mark.parametrize("what", ENDINGS)
def test_the_other_fails_where_a_rank(what: str) -> None:
    """With torch.distributed's own error: of the connection, or at the group's timeout."""
    for rank, (code, errors) in enumerate(left_alone()[what]):
        if rank == 1 and what != "skips backward and goes on":
            assert code == 0
        else:
            assert code == 1, errors
            assert "RuntimeError" in errors, errors


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_backends_of_kernels(backend: str) -> None:
    """In Triton's interpreter, and compiled for the CPU."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs the package triton")
    problems = results(SCRIPT, backend, 2)[2]
    assert len(problems) == 4
    assert not any(problems.values()), problems


# The arguments


@pytest.fixture
def process_group():
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_gradient_has_no_default(process_group):
    z = torch.randn(4, 8)
    message = r"with a group, gradient must be given: 'official' \(.*1/P of the gradient.*'lightly' \(P times that"
    with pytest.raises(ValueError, match=message):
        barlow_twins_loss(z, z, group=process_group)
    with pytest.raises(ValueError, match=message):
        BarlowTwinsLoss(group="world")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient": "mean"}, ValueError, "gradient must be 'official' or 'lightly', got 'mean'"),
        ({"statistics": "batch"}, ValueError, "statistics must be 'global' or 'local', got 'batch'"),
        ({"reduce_dtype": torch.float16}, ValueError, "reduce_dtype must be None, torch.float32, .* got torch.float16"),
        ({"group": "all", "gradient": "official"}, ValueError, "group must be a process group, .* got 'all'"),
        ({"group": 3, "gradient": "official"}, TypeError, "group must be a torch.distributed process group, got int"),
    ],
)
def test_wrong_arguments(process_group, arguments, error, message):
    z = torch.randn(4, 8)
    with pytest.raises(error, match=message):
        barlow_twins_loss(z, z, **arguments)
    with pytest.raises(error, match=message):
        BarlowTwinsLoss(**arguments)(z, z)


def test_without_a_process_group():
    z = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="init_process_group"):
        barlow_twins_loss(z, z, group="world", gradient="official")
    loss = BarlowTwinsLoss(group="world", gradient="official")  # may be made before
    with pytest.raises(RuntimeError, match="init_process_group"):
        loss(z, z)
    for about in ({"gradient": "lightly"}, {"statistics": "local"}, {"reduce_dtype": torch.float32}):
        (name,) = about
        with pytest.raises(ValueError, match=f"{name} is about several processes"):
            barlow_twins_loss(z, z, **about)
