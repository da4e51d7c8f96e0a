"""Short runs of the emulated CUDA kernels, on the smallest shapes that reach all of their code, and what each gives."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import cases
import torch

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import cuda_backend, cuda_partial, torch_partial
from barlow_fused.backends.torch_partial import Segments
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.normalization import Normalization

SCHEDULES = {  # environment variables of csrc/gpu/emulation/schedule.h
    "in turn, late": {},
    "reverse, early": {"BARLOW_EMULATION_ORDER": "reverse", "BARLOW_EMULATION_COPIES": "early"},
}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """The emulation looks at these at each launch."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def kernels_of(module: ModuleType) -> Iterator[None]:
    """The CUDA backend runs that module, and multiplies small halves as they are."""
    before = configs.FLOAT32_ELEMENTS
    configs.FLOAT32_ELEMENTS = 0
    cuda_backend.use(module)
    try:
        yield
    finally:
        cuda_backend.use(None)
        configs.FLOAT32_ELEMENTS = before


@functools.cache
def _oracle(n: int, d: int, dtype: torch.dtype, normalization: str) -> cases.Answer:
    return cases.oracle(*cases.views(n, d, dtype), cases.NORMALIZATIONS[normalization])


def _loss(route: str, n: int, d: int, dtype: torch.dtype, normalization: str = "batch_norm") -> Callable[[], float]:
    def run() -> float:
        loss = functools.partial(
            barlow_twins_loss, backend="cuda", route=route, normalization=normalization, return_terms=True
        )
        got = cases.answer(loss, *cases.views(n, d, dtype))
        return max(map(cases.error, got, _oracle(n, d, dtype, normalization)))

    return run


def _partial(route: str, n: int, d: int, dtype: torch.dtype) -> Callable[[], float]:
    """One rank's part of a batch, against the torch backend's."""

    def product(partial: object) -> torch.Tensor:
        segments, views = Segments((n,), (n,), (1.0,)), []
        for z in cases.views(n, d, dtype):
            views.append(partial.View(z, partial.moments(z, (n,)), Normalization(), segments))
        if route == "gram":
            flat, (bulk,) = partial.partial_gram(views[0])
            flat = flat.double()
            for start, _, panel in torch_partial.panels(flat, n):
                panel.diagonal(start).add_(bulk)
            return flat
        return partial.partial_correlate(*views).double().fill_diagonal_(0)

    return lambda: cases.error(product(cuda_partial), product(torch_partial))


F32, BF16 = torch.float32, torch.bfloat16
# Hopper's kernels need rows of whole 16 bytes: D is a multiple of 8
ONE_CLUSTER = {"capability": 90, "multiprocessors": 2, "clusters": {2: 1, 4: 1, 8: 1}}  # takes all of a launch's work
TWO_WALKS = {"capability": 90, "multiprocessors": 2, "clusters": {2: 1, 4: 0, 8: 0}}  # of gram_grad's blocks
SEVERAL = {"capability": 90, "multiprocessors": 16}  # work side by side
AMPERE = {"capability": 80, "multiprocessors": 8}
# name: the device, what runs and returns its relative error, how large that may be
RUNS: dict[str, tuple[dict[str, object], Callable[[], float], float]] = {
    "gram (33, 100) bfloat16": (AMPERE, _loss("gram", 33, 100, BF16), 1e-2),
    "gram (70, 100) float32": (AMPERE, _loss("gram", 70, 100, F32), 1e-5),
    "gram (130, 70) float32": (AMPERE, _loss("gram", 130, 70, F32), 1e-3),
    "gram (33, 70) none": (AMPERE, _loss("gram", 33, 70, F32, "none"), 1e-5),
    "direct (33, 130) float32": (AMPERE, _loss("direct", 33, 130, F32), 1e-5),
    "direct (65, 130) bfloat16": (AMPERE, _loss("direct", 65, 130, BF16), 1e-2),
    "two phases (3700, 9)": (AMPERE, _loss("direct", 3700, 9, F32), 1e-5),
    "partial gram (70, 100)": (AMPERE, _partial("gram", 70, 100, F32), 1e-5),
    "partial correlate (33, 70)": (AMPERE, _partial("direct", 33, 70, BF16), 1e-2),
    "Hopper: gram (100, 200)": (ONE_CLUSTER, _loss("gram", 100, 200, BF16), 1e-2),
    "Hopper: direct (65, 304)": (ONE_CLUSTER, _loss("direct", 65, 304, BF16), 1e-2),
    "Hopper: normalize (1040, 40)": (ONE_CLUSTER, _loss("direct", 1040, 40, BF16), 1e-2),
    "Hopper: partial gram (140, 128)": (ONE_CLUSTER, _partial("gram", 140, 128, BF16), 1e-2),
    "Hopper: gram (140, 304)": (ONE_CLUSTER, _loss("gram", 140, 304, BF16), 1e-2),
    "Hopper: gram (140, 304) none": (ONE_CLUSTER, _loss("gram", 140, 304, BF16, "none"), 1e-2),
    "Hopper, several clusters: gram (140, 304)": (SEVERAL, _loss("gram", 140, 304, BF16), 1e-2),
    "Hopper, several clusters: direct (65, 520)": (SEVERAL, _loss("direct", 65, 520, BF16), 1e-2),
    "Hopper: gram (520, 80)": (TWO_WALKS, _loss("gram", 520, 80, BF16), 1e-1),
    "Hopper: gram (1040, 80)": (ONE_CLUSTER, _loss("gram", 1040, 80, BF16), 1e-1),
}


def outcome(module: ModuleType, name: str, watch: bool, **variables: str) -> str:
    """What a run says: nothing where it is right; "race: ..." and so on where a launch fails; "wrong by ..."."""
    device, run, tolerance = RUNS[name]
    module.emulate(**device)
    module.watch(watch)
    try:
        with environment(**variables), kernels_of(module):
            error = run()
    except RuntimeError as failure:
        return str(failure)
    finally:
        module.watch(True)
    return "" if error <= tolerance else f"wrong by {error:.2g}"
