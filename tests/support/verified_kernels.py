"""``barlow-fused verify`` on a CPU, for tests: ``python verified_kernels.py [FAULT...] verify --device cpu ...``.

The backends are Triton's interpreter and the CUDA kernels compiled for the CPU, on a few small shapes. FAULT plants one
in a Gram route: ``triton:float32:off`` a number that is wrong by a thousandth, ``cuda:bfloat16:hangs`` a call that
never ends. The command starts this file again for the processes that run kernels.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import builds
import subprocesses
import torch

from barlow_fused import __main__ as command
from barlow_fused import backends
from barlow_fused.backends import cuda_backend
from barlow_fused.verification import checks, child, speed, verify

EMULATED = "BARLOW_FUSED_EMULATED"  # names the module of kernels for the CPU


def main(argv: list[str]) -> int:
    count = next(index for index, word in enumerate(argv) if ":" not in word)
    faults, rest = argv[:count], argv[count:]
    cuda_backend.use(builds.load(Path(os.environ[EMULATED])))
    small()
    if rest[0] == "verify":
        verify.COMMAND, verify.PATIENCE = (sys.executable, __file__, *faults), 10.0
        if "BARLOW_FUSED_TESTED" in os.environ:  # few units
            verify.DTYPES, verify.ROUTES = (os.environ["BARLOW_FUSED_TESTED"],), ("gram",)
        return command.main(rest)
    for fault in faults:
        plant(fault)
    with _the_device_to_itself() if "exclusive" in os.environ.get("BARLOW_FUSED_MODE", "") else nullcontext():
        return child.main(rest)


@contextmanager
def _the_device_to_itself() -> Iterator[None]:
    """As a GPU in exclusive mode: a second process cannot use it."""
    with Path(os.environ["BARLOW_FUSED_CACHE_DIR"], "device").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable") from None
        yield


def environment(cache: Path) -> dict[str, str]:
    """Of this program, with records in ``cache``."""
    emulated = str(builds.emulated())
    extra = {EMULATED: emulated, "TRITON_INTERPRET": "1", "BARLOW_FUSED_CACHE_DIR": str(cache)}
    return subprocesses.environment(**extra, OMP_NUM_THREADS="1")


def small() -> None:
    """Few and small shapes; times that say that the kernels are faster, since here they are not."""
    checks.SHAPES, checks.OF_RANKS, checks.REPEATS = ((17, 40),), ((16, 64),), 2
    checks.SMALL, checks.ODD, checks.MEDIUM = (9, 40), (9, 41), (18, 40)
    halves = (5e-3, 2e-2)  # of few numbers
    checks.LIMITS = {**checks.LIMITS, "bfloat16": halves, "float16": halves}
    speed.SAMPLES, speed.FEATURES, speed.ROUNDS = (64,), (32, 256), 1
    seconds = {"torch": 4e-4, "usual": 8e-4, "cuda": 1e-4, "triton": 2e-4}

    def measure(units: Any, dtype: str, n: int, d: int, route: str, device: Any, begin: Any) -> speed.Times:
        names = ["torch", "usual", *sorted({u.backend for u in units if u[1:] == (dtype, route, False)})]
        for name in names[2:]:
            begin(name)
            checks.run(checks.Unit(name, dtype, route), *checks.inputs(checks.Unit(name, dtype, route), device, 8, 16))
        return speed.Times(dtype, route, n, d, {name: seconds[name] for name in names}, True)

    speed.measure = measure


def plant(fault: str) -> None:
    """Makes a backend's Gram route wrong for one dtype, in a way of its own."""
    name, dtype, kind = fault.split(":")
    module = backends.load(name, torch.device("cpu"))
    forward, backward = module.forward, module.backward
    calls = itertools.count()

    def concerns(z: torch.Tensor, spec: Any) -> bool:
        return z.dtype == getattr(torch, dtype) and spec.route == "gram"

    def wrong_forward(z_a: Any, z_b: Any, spec: Any, *args: Any) -> Any:
        terms, saved = forward(z_a, z_b, spec, *args)
        if concerns(z_a, spec) and kind != "gradient_off":
            KINDS[kind](terms, saved, next(calls))
        return terms, saved

    def wrong_backward(z_a: Any, z_b: Any, saved: Any, spec: Any, *args: Any) -> Any:
        grads = backward(z_a, z_b, saved, spec, *args)
        if concerns(z_a, spec) and kind == "gradient_off":
            for grad in filter(lambda g: g is not None, grads):
                grad.mul_(1.001)
        return grads

    module.forward, module.backward = wrong_forward, wrong_backward


def off(terms: Any, saved: Any, call: int) -> None:
    terms[0].mul_(1.001)


def hides_nan(terms: Any, saved: Any, call: int) -> None:
    for term in terms:
        term.nan_to_num_()


def other_bits(terms: Any, saved: Any, call: int) -> None:
    terms[0].mul_(1 + 1e-6 * (call % 2))


def writes_outside(terms: Any, saved: Any, call: int) -> None:
    for tensor in saved:
        end = tensor.storage_offset() + tensor.numel()
        if end < tensor.untyped_storage().nbytes() // tensor.itemsize:
            tensor.as_strided((1,), (1,), end).fill_(7)


def no_memory(terms: Any, saved: Any, call: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def raises(terms: Any, saved: Any, call: int) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def dies(terms: Any, saved: Any, call: int) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(terms: Any, saved: Any, call: int) -> None:
    time.sleep(3600)


KINDS = {f.__name__: f for f in (off, hides_nan, other_bits, writes_outside, no_memory, raises, dies, hangs)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
