"""Peak memory of one forward and backward pass beyond inputs and gradients, measured.

    extra = peak - (what is held before the pass, inputs included) - (bytes of the two gradients)

The gradients are taken off whether or not they exist at the moment of the peak: the result is how far the pass goes
above what any method must hold. It is never below 0.

On CUDA it is ``torch.cuda.max_memory_allocated``. PyTorch's CPU allocator keeps no such count, and would not see the
work space of MKL, oneDNN or an OpenMP thread, so on CPUs the operating system is asked, in a fresh process per method
(forked from a server that has only imported things):

* The method runs once at a small shape (at most 256 x 1024), so that imports, thread stacks and library set-up count as
  held before. A method that is compiled for one shape runs at that shape instead: compiling takes more than running.
* ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` are fixed at 128 KiB (glibc otherwise raises them as it
  goes), so a freed tensor leaves the resident set at once; ``malloc_trim`` returns the rest before the measurement.
* The peak of the resident set (VmHWM in /proc/self/status) is reset through /proc/self/clear_refs right before the
  pass. Where the kernel forbids that, the peak counts from the start of the process, which can only be larger.

Only touched pages count, as on the machine itself. The resolution is a few MB. It agrees with the allocations that
torch.profiler records to within 5 % where MKL and oneDNN take no work space (tests/benchmarks/test_benchmarks.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from .accuracy import gradients
from .inputs import make_inputs
from .peers import LossFunction, Peer

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_MMAP_MAX_": "65536",  # the default, whatever the caller has set
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
}
WARM_UP = (256, 1024)  # at most


def cuda_peak(loss_function: LossFunction, z_a: Tensor, z_b: Tensor) -> int:
    """Extra bytes of a pass on these inputs, after a first pass that pays for work spaces."""
    device = z_a.device
    for _ in range(2):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        grads = gradients(loss_function(z_a, z_b), z_a, z_b)
        torch.cuda.synchronize(device)
        extra = torch.cuda.max_memory_allocated(device) - before - sum(g.nbytes for g in grads)
        del grads
    return max(0, extra)


def cpu_peak(peer: Peer, n: int, d: int, dtype: torch.dtype) -> int:
    """Extra bytes of a pass in a process of its own.

    Raises:
        RuntimeError: its process was killed. What the method raises there is raised here.
    """
    return in_fresh_process(_cpu_peak_here, peer, n, d, dtype, torch.get_num_threads())


def in_fresh_process(function: Callable[..., int], *args: object) -> int:
    """The function's result in a process that has only imported things.

    Raises:
        RuntimeError: its process was killed. What the function raises there is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightly.loss"])  # it takes seconds, if it is there
    with mock.patch.dict(os.environ, MALLOC), ProcessPoolExecutor(1, context) as fresh:
        try:
            return fresh.submit(function, *args).result()
        except BrokenProcessPool:
            raise RuntimeError("the process was killed: out of memory?") from None


def _cpu_peak_here(peer: Peer, n: int, d: int, dtype: torch.dtype, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    loss_function = peer.build()
    small = make_inputs(*((n, d) if peer.compiled else map(min, (n, d), WARM_UP)), dtype, device)
    gradients(loss_function(*small), *small)
    del small
    z_a, z_b = make_inputs(n, d, dtype, device)
    return peak_of(lambda: gradients(loss_function(z_a, z_b), z_a, z_b))


def peak_of(call: Callable[[], Sequence[Tensor]]) -> int:
    """Bytes that a call takes at its peak beyond what it returns, and what is held before."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    grads = call()
    return max(0, _status("VmHWM") - before - sum(g.nbytes for g in grads))


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
