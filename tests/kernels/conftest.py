"""The kernels of own make, on this CPU: Triton's in its interpreter, or CUDA's in the emulation.

The latter plain, under sanitizers, or under a race detector.

``pytest --kernels`` says which (tests/conftest.py).
"""

from __future__ import annotations

import functools
import os
import pathlib
import re

import builds
import cases
import gaps
import pytest
import torch

from barlow_fused import barlow_twins_loss

HERE = pathlib.Path(__file__).parent
OF_ONE_KIND = {
    "test_triton_interpreter.py": "interpreter",
    "test_triton_races.py": "interpreter",
    "test_races.py": "races",
}
HALVES = (torch.bfloat16, torch.float16)
OF_HALVES = (  # tests that have no parameter for it
    "test_correlate_takes_the_centred_form_where_means_are_large",
    "test_same_bits_again_and_under_torch_compile",
    "test_the_passes_keep_their_contract",
)
# Of test_kernels.py, by a part of their names: what the sanitizers and the race detector run (BARLOW_RACE_GRID=all: it
# runs all), and what `make test` runs
SANITIZED = (r"over_shapes.*(33-100|65-130)", r"over_conventions.*17-100", r"non_contiguous")
TELLING = (
    r"over_shapes.*(17-31|65-130)",
    r"over_conventions.*70-141.*(batch_norm|std)",
    r"large_means.*150",
    r"each_term_and_each_view.*20",
    r"keep_their_contract",
    r"nan_and_inf",
)


def kind(config: pytest.Config) -> str:
    return config.getoption("--kernels")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """What all kinds share stands in test_kernels.py; the rest is of one kind."""
    if not collection_path.name.startswith("test_") or collection_path.name == "test_kernels.py":
        return None
    kinds = {
        "test_triton_interpreter.py": "interpreter",
        "test_triton_races.py": "interpreter",
        "test_races.py": "races",
    }
    return True if kind(config) != kinds.get(collection_path.name, "compiled") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of ``kernels`` runs as on an Ampere GPU, and those of half precision once more as on Hopper's."""
    if "kernels" in metafunc.fixturenames:
        of = ["triton"] if kind(metafunc.config) == "interpreter" else ["sm_80", "sm_90"]
        metafunc.parametrize("kernels", of, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = []
    for item in items[:]:
        if item.path.parent != HERE:
            continue
        item.add_marker("kernels")
        if any(re.search(part, item.name) for part in TELLING):
            item.add_marker("telling")
        if not _belongs(item, kind(config)):
            items.remove(item)
            left.append(item)
    config.hook.pytest_deselected(items=left)


def _belongs(item: pytest.Item, kind: str) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    halves = parameters.get("dtype") in HALVES or item.originalname in OF_HALVES
    if parameters.get("kernels") == "sm_90" and not halves:
        return False  # float32 takes the same kernels on every GPU
    widest = 16384 if parameters.get("dtype") == torch.bfloat16 else 8192
    if kind == "interpreter" and parameters.get("d", 0) > widest:
        return False  # minutes
    if item.path.name != "test_kernels.py" or kind not in ("sanitized", "races"):
        return True
    whole = kind == "races" and os.environ.get("BARLOW_RACE_GRID") == "all"
    return whole or any(re.search(part, item.name) for part in SANITIZED)


@pytest.fixture(scope="session")
def module(request: pytest.FixtureRequest):
    """The CUDA kernels, compiled for the CPU."""
    return builds.load(builds.emulated({"sanitized": "address", "races": "thread"}.get(kind(request.config), "OFF")))


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The backend's module, made to run here, with small blocks; small halves too are multiplied as they are."""
    from barlow_fused.backends.triton_kernels import configs

    monkeypatch.setattr(configs, "FLOAT32_ELEMENTS", 0)
    for half in HALVES:  # the rounding of so few elements does not average out
        monkeypatch.setitem(cases.TOLERANCE, half, (5e-4, 5e-3))
    if request.param == "triton":
        request.getfixturevalue("small_blocks")
        backend = request.getfixturevalue("triton_backend")
        backend.forget()  # plans of other blocks and limits
        yield backend
        backend.forget()
        return
    from barlow_fused.backends import cuda_backend

    module = request.getfixturevalue("module")
    module.emulate(int(request.param.removeprefix("sm_")), 8)
    if kind(request.config) == "sanitized":
        gaps.watch(monkeypatch)
    cuda_backend.use(module)
    yield cuda_backend
    cuda_backend.use(None)


@pytest.fixture
def fused(kernels):
    """barlow_twins_loss with that backend, and the three terms: fused(route=..., ...)(z_a, z_b)."""
    name = kernels.__name__.rpartition(".")[2].removesuffix("_backend")
    return lambda **kwargs: functools.partial(barlow_twins_loss, backend=name, return_terms=True, **kwargs)


# Triton's interpreter


@pytest.fixture(scope="session")
def triton_backend():
    """The backend. Until Triton 3.7 its interpreter leaves one-element arrays to numpy, which refuses since 2.4."""
    pytest.importorskip("triton", reason="needs the package triton")
    from triton.runtime import interpreter

    from barlow_fused.backends import triton_backend

    patch = interpreter._patch_lang_tensor

    def patched(tensor: torch.Tensor, *args: object) -> None:
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield triton_backend


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are cut into several tiles, slices, chunks and phases, whole ones and cut ones."""
    from barlow_fused.backends.triton_kernels import configs
    from barlow_fused.backends.triton_kernels.configs import Blocks, Slab

    few, many = Blocks(32, 32, 32, 4, 2), Blocks(64, 64, 16, 4, 2)
    of_kernels = ("gram", "correlate", "direct_grad", "gram_grad")
    table = {(kernel, p): (few, many) for kernel in of_kernels for p in ("half", "tf32", "tf32x3")}
    monkeypatch.setattr(configs, "TABLE", {80: table})
    monkeypatch.setattr(configs, "ONE_TILE", {32: (few, few), 64: (Blocks(64, 32, 16, 4, 2), Blocks(64, 64, 32, 4, 2))})
    monkeypatch.setattr(configs, "NORMALIZE", (Slab(32, 64, 4), Slab(64, 32, 4)))
    monkeypatch.setattr(configs, "TWO_PHASES", Slab(32, 64, 4))
    monkeypatch.setattr(configs, "MAX_CHUNKS", 3)
    monkeypatch.setattr(configs, "GRAM_MANY_ROWS", 128)
    monkeypatch.setattr(configs, "CHUNK", 64)
    monkeypatch.setattr(configs, "SUM_BLOCK", 16)
    monkeypatch.setattr(configs, "SLICE_COLUMNS", 128)
