"""The Triton kernels in Triton's interpreter, against the float64 oracle. test_triton_backend.py runs this file in a
process of its own: TRITON_INTERPRET=1 must stand before Triton is imported.

Blocks are shrunk so that small inputs are cut into several tiles, slices, chunks and phases, whole ones and cut ones.
"""

from __future__ import annotations

import functools

import cases
import pytest
import torch
import triton
import triton.language as tl
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, views
from kernel_checks import *  # noqa: F403 - the tests that hold for any kernels
from triton.runtime import interpreter

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import triton_backend, why_unusable
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.backends.triton_kernels.configs import Blocks, Chip, Slab
from barlow_fused.backends.triton_kernels.gram import lower_triangle_tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH_NORM = NORMALIZATIONS["batch_norm"]


@pytest.fixture(autouse=True, scope="session")
def one_element_arrays_are_numbers():
    """Until Triton 3.7 the interpreter leaves that to numpy, which refuses since 2.4."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    few, many = Blocks(32, 32, 32, 4, 2), Blocks(64, 64, 16, 4, 2)
    kernels = ("gram", "correlate", "direct_grad", "gram_grad")
    table = {(kernel, p): (few, many) for kernel in kernels for p in ("half", "tf32", "tf32x3")}
    monkeypatch.setattr(configs, "TABLE", {80: table})
    monkeypatch.setattr(configs, "ONE_TILE", {32: (few, few), 64: (Blocks(64, 32, 16, 4, 2), Blocks(64, 64, 32, 4, 2))})
    monkeypatch.setattr(configs, "NORMALIZE", (Slab(32, 64, 4), Slab(64, 32, 4)))
    monkeypatch.setattr(configs, "TWO_PHASES", Slab(32, 64, 4))
    monkeypatch.setattr(configs, "MAX_CHUNKS", 3)
    monkeypatch.setattr(configs, "GRAM_MANY_ROWS", 128)
    monkeypatch.setattr(configs, "CHUNK", 64)
    monkeypatch.setattr(configs, "SUM_BLOCK", 16)
    monkeypatch.setattr(configs, "FLOAT32_ELEMENTS", 0)
    for dtype in (torch.bfloat16, torch.float16):  # the rounding of so few elements does not average out
        monkeypatch.setitem(cases.TOLERANCE, dtype, (5e-4, 5e-3))


def triton_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="triton", return_terms=True, **kwargs)


@pytest.fixture
def kernels():
    return triton_backend


@pytest.fixture
def fused():
    return triton_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(16, 64), (17, 100), (70, 150)])
def test_small_halves_keep_the_tolerance(n, d, route, dtype, monkeypatch):
    monkeypatch.undo()  # the blocks and limits of the table
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(triton_loss(route=route), z_a, z_b), z_a, z_b, BATCH_NORM)


@pytest.mark.parametrize("normalization", ["batch_norm", "none"])
@pytest.mark.parametrize("split", [1, 2, 6])
def test_gram_split(split, normalization, monkeypatch):
    """However many slices D is cut into, the last of them cut short: the same number."""
    monkeypatch.setattr(Chip, "split", lambda _, n, d, itemsize, blocks: (split, -(-d // (blocks.k * split))))
    z_a, z_b = views(50, 215)
    loss = triton_loss(route="gram", normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


def test_split_covers_all_columns_and_keeps_the_memory_bound():
    blocks = Blocks(64, 64, 64, 4, 4)
    for n, d in ((2, 1), (256, 8192), (100, 250), (2048, 65536), (31, 262144)):
        slices, steps = Chip(80, 132).split(n, d, 2, blocks)
        assert (slices - 1) * steps * blocks.k < d <= slices * steps * blocks.k
        assert slices == 1 or slices * configs.triangle(n, blocks.m) * 2 * blocks.m**2 * 4 <= 2 * n * d * 2


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(32, 64), (128, 272)])
def test_tensor_descriptors(n, d, dtype, route, monkeypatch):
    """What Hopper loads through its tensor memory accelerator is what pointers load."""
    z_a, z_b = views(n, d, dtype)
    want = answer(triton_loss(route=route), z_a, z_b)
    made = []
    descriptor = triton_backend._descriptor
    monkeypatch.setattr(triton_backend, "_descriptor", lambda *args: made.append(args) or descriptor(*args))
    monkeypatch.setattr(configs, "TMA_IN_INTERPRETER", True)
    monkeypatch.setattr(configs, "TMA_MIN_ELEMENTS", 0)
    got = answer(triton_loss(route=route), z_a, z_b)
    assert made
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_autotune_measures_once_a_shape_and_leaves_nothing_behind(route, monkeypatch):
    """Triton measures by running a kernel: each run does all of the work, and leaves the counters as it found them."""
    runs = []

    def measure(run, quantiles):
        runs.append(run())
        return [1.0] * len(quantiles)

    def again(n, d, dtype=torch.float32, **kwargs):
        """The answer, and how often a kernel was measured for it."""
        before = len(runs)
        got = answer(triton_loss(route=route, **kwargs), *views(n, d, dtype))
        return got, len(runs) - before

    want, _ = again(33, 70)
    kernels = 2 if route == "gram" else 3  # the latter once for each view's gradient
    monkeypatch.setenv("BARLOW_FUSED_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=measure))
    triton_backend._autotuner.cache_clear()
    try:
        got, count = again(33, 70)
        assert count == 6 * kernels
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert again(33, 70)[1] == 0
        assert again(33, 71)[1] == count
        assert again(33, 70, torch.bfloat16)[1] == count
    finally:
        triton_backend._autotuner.cache_clear()


@triton.jit
def count_tiles(first, out):
    m, n = lower_triangle_tile(first + tl.program_id(0))
    tl.store(out + 2 * tl.program_id(0), m)
    tl.store(out + 2 * tl.program_id(0) + 1, n)


def test_tiles_of_a_lower_triangle_are_counted_once():
    for row in (0, 1, 500):
        first, count = row * (row + 1) // 2, 2 * row + 3
        out = torch.empty(count, 2, dtype=torch.int32)
        count_tiles[(count,)](first, out)
        want = [[m, n] for m in (row, row + 1) for n in range(m + 1)]
        assert out.tolist() == want


def test_who_may_run_it():
    cpu = torch.device("cpu")
    assert why_unusable("triton", cpu) is None
    assert "float64" in why_unusable("triton", cpu, torch.float64)
    with pytest.raises(TypeError, match=r"backend='triton' takes float32, .* got torch.float64"):
        triton_backend.normalize(*views(4, 3, torch.float64), None)
