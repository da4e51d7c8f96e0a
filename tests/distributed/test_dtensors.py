"""The loss of DTensors, on Gloo: what dtensors.py checks on every rank."""

from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import RANKS, names_of_checks, results

SCRIPT = Path(__file__).with_name("dtensors.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", names_of_checks(SCRIPT))
def test_on_every_rank(name: str, ranks: int) -> None:
    problems = results(SCRIPT, "torch", *RANKS)[ranks][name]
    assert not problems, "\n".join(f"rank {rank}: {text}" for rank, text in problems.items())


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_backends_of_kernels(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs the package triton")
    problems = results(SCRIPT, backend, 2)[2]
    assert len(problems) == 1
    assert not any(problems.values()), problems
