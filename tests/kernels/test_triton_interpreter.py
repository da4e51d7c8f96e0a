"""What holds for the Triton kernels beyond test_kernels.py, in the interpreter: pytest --kernels interpreter."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import triton
import triton.language as tl
import triton_races
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, views
from triton.runtime.interpreter import InterpreterBuilder

from barlow_fused.backends import accelerator, triton_backend, triton_launch, why_unusable
from barlow_fused.backends.operations import Spec
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.backends.triton_kernels.configs import Blocks, Chip
from barlow_fused.backends.triton_kernels.gram import lower_triangle_tile
from barlow_fused.backends.triton_kernels.shares import Cut, busiest, shares

BATCH_NORM = NORMALIZATIONS["batch_norm"]


def cut_alike(split, chip, n, d, itemsize, blocks):
    tiles, steps = configs.triangle(n, blocks.m), configs.cdiv(d, blocks.k)
    return Cut(tiles, split, configs.cdiv(steps, split)), Cut(0, 1, steps)


def cut_otherwise(first, splits, chip, n, d, itemsize, blocks):
    tiles, steps = configs.triangle(n, blocks.m), configs.cdiv(d, blocks.k)
    return Cut(first, splits[0], configs.cdiv(steps, splits[0])), Cut(tiles - first, splits[1], -(-steps // splits[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "splits"), [(0, (1, 3)), (1, (1, 6)), (2, (2, 3)), (5, (1, 4))])
def test_gram_with_tiles_that_are_cut_otherwise(fused, first, splits, dtype, monkeypatch):
    """The first tiles in fewer slices than the others: the same number, and the same bits again."""
    monkeypatch.setattr(triton_backend, "shares", functools.partial(cut_otherwise, first, splits))
    z_a, z_b = views(70, 375, dtype)
    got = answer(fused(route="gram"), z_a, z_b)
    assert_close(got, z_a, z_b, BATCH_NORM)
    with triton_races.interleaved(first):
        again = answer(fused(route="gram"), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalization", ["batch_norm", "none"])
@pytest.mark.parametrize("split", [1, 2, 6])
def test_gram_split(fused, split, normalization, dtype, monkeypatch):
    """However many slices D is cut into, the last of them cut short: the same number.

    In half precision the first two are longer than CHUNK.
    """
    monkeypatch.setattr(triton_backend, "shares", functools.partial(cut_alike, split))
    z_a, z_b = views(50, 375, dtype)
    loss = fused(route="gram", normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
def test_on_rdna_a_second_barrier_follows_each_ticket(fused, route, monkeypatch):
    """gram draws two kinds of tickets, correlate none; the numbers are the same."""
    barriers = []
    barrier = InterpreterBuilder.create_barrier

    def counted(self, *args):
        barriers.append(self)
        return barrier(self, *args)

    monkeypatch.setattr(triton_backend, "shares", functools.partial(cut_alike, 2))
    monkeypatch.setattr(InterpreterBuilder, "create_barrier", counted)
    z_a, z_b = views(33, 70)
    runs, counts = [], []
    for ticket in ("", "barrier"):
        described = dataclasses.replace(accelerator.of(z_a.device), ticket=ticket)
        monkeypatch.setattr(accelerator, "of", lambda device, described=described: described)
        triton_backend.forget()
        barriers.clear()
        runs.append(answer(fused(route=route), z_a, z_b))
        counts.append(len(barriers))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    tiles = 3  # of 32 rows
    tickets = 2 * 2 * tiles + tiles if route == "gram" else 0
    assert counts[1] - counts[0] == tickets


def test_split_covers_all_columns_and_keeps_the_memory_bound():
    blocks = Blocks(64, 64, 64, 4, 4)
    for n, d in ((2, 1), (256, 8192), (100, 250), (2048, 65536), (31, 262144)):
        slices, steps = Chip(80, 132).split(n, d, 2, blocks)
        assert (slices - 1) * steps * blocks.k < d <= slices * steps * blocks.k
        assert slices == 1 or slices * configs.triangle(n, blocks.m) * 2 * blocks.m**2 * 4 <= 2 * n * d * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(130, 140), (70, 203)])
def test_gradients_of_several_row_tiles(fused, n, d, dtype, monkeypatch):
    """A part of the columns after the other, the last one smaller: the same bits; views alone: the same bits."""
    z_a, z_b = views(n, d, dtype)
    want = answer(fused(route="gram"), z_a, z_b)
    assert_close(want, z_a, z_b, BATCH_NORM)
    monkeypatch.setattr(configs, "grad_columns", lambda n: 128)
    triton_backend.forget()
    got = answer(fused(route="gram"), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    for index, grad in enumerate((want.grad_a, want.grad_b)):
        z = [x.clone().requires_grad_(i == index) for i, x in enumerate((z_a, z_b))]
        fused(route="gram")(*z).loss.backward()
        assert torch.equal(z[index].grad, grad)


def test_one_sample_that_is_all_features_have_in_common_does_not_overflow(fused, monkeypatch):
    """P is N^1.5 then, 7e4 for these rows, which float16 cannot hold."""
    monkeypatch.setattr(Chip, "gram", lambda self, n, dtype: Blocks(512, 512, 32, 4, 2))  # few tiles, for speed
    monkeypatch.setattr(Chip, "gram_grad", lambda self, *_: Blocks(512, 32, 32, 4, 2))
    n, d = 1700, 3
    z_a, z_b = (1e-3 * z for z in views(n, d))
    z_a[7], z_b[7] = 100.0, 100.0
    z_a, z_b = z_a.half(), z_b.half()
    got = answer(fused(route="gram", scale=1e3), z_a, z_b)
    assert got.grad_a.isfinite().all()
    assert got.grad_b.isfinite().all()


@pytest.mark.parametrize("d", [8192, 65536, 262144])
@pytest.mark.parametrize("n", [2, 64, 100, 128, 256, 512, 700, 1024, 1100, 1280, 2048, 3000, 4096, 8192])
def test_shares_are_nearly_equal(n, d):
    """Slices cover D, the partial tiles keep their memory, and no multiprocessor has more than 1.15 of its share.

    Of up to 128 rows slices do not fill the chip, since one program of a tile adds them up: of S slices, steps / S and
    2 S (1.25 S of one tile) take least time where both are equal, and what is chosen does so up to whole steps.
    """
    chip = configs.chip_of(accelerator.named("sm_90"))
    blocks = chip.gram(n, torch.bfloat16)
    tiles, steps = configs.triangle(n, blocks.m), configs.cdiv(d, blocks.k)
    choice = shares(chip, n, d, 2, blocks)
    assert sum(part.tiles for part in choice) == tiles
    assert all((part.split - 1) * part.steps < steps <= part.split * part.steps for part in choice)
    items = sum(part.items for part in choice)
    assert items == 2 * tiles or items * blocks.m**2 * 4 <= 2 * n * d * 2
    if n >= 64:
        is_equal = busiest(choice, 132) <= 1.15 * 2 * tiles * steps / 132
        slice_cost = 1.25 if tiles == 1 else 2
        least = 2 * (slice_cost * steps) ** 0.5
        assert is_equal or (n <= 128 and choice[0].steps + slice_cost * choice[0].split <= 1.02 * least)


@pytest.fixture
def poisoned():
    """Memory that nobody has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # numpy's word on 1 / 0 beyond D
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d", "normalization"), [(33, 70, "std"), (70, 141, "batch_norm"), (33, 70, "none")])
def test_what_fills_rows_up_is_zero(fused, poisoned, n, d, normalization, dtype, route):
    """The products read A_hat, B_hat, K and C to the end of their padded rows."""
    assert torch.empty(1000, dtype=torch.uint8).view(torch.bfloat16).isnan().all()
    z_a, z_b = views(n, d, dtype)
    convention = NORMALIZATIONS[normalization]
    if normalization == "std":  # 1 / 0 is what would be multiplied by zeros
        convention = dataclasses.replace(convention, eps=0.0)
    got, want = answer(fused(route=route, normalization=convention or "none"), z_a, z_b), oracle(z_a, z_b, convention)
    assert all(error(x, y) < (1e-5 if dtype == torch.float32 else 1e-2) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(32, 64), (128, 272), (70, 141), (33, 100)])
def test_tensor_descriptors(fused, n, d, dtype, route, monkeypatch):
    """Blocks that come through Hopper's tensor memory accelerator, and not through pointers."""
    z_a, z_b = views(n, d, dtype)
    made = []
    descriptor = triton_launch._descriptor
    monkeypatch.setattr(triton_launch, "_descriptor", lambda *args: made.append(args) or descriptor(*args))
    monkeypatch.setattr(configs, "TMA_IN_INTERPRETER", True)
    monkeypatch.setattr(configs, "TMA_MIN_ELEMENTS", 0)
    got = answer(fused(route=route), z_a, z_b)
    assert made
    ref = oracle(z_a, z_b)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # so few halves are rounded that it does not average out
    assert all(error(x, y) < tolerance for x, y in zip(got, ref, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_autotune_measures_once_a_shape_and_leaves_nothing_behind(fused, route, monkeypatch):
    """Triton measures by running a kernel: each run does all of the work, and leaves the counters as it found them."""
    runs = []

    def measure(run, quantiles):
        runs.append(run())
        return [1.0] * len(quantiles)

    def again(n, d, dtype=torch.float32, **kwargs):
        """How often a kernel was measured for an answer, which is right."""
        before, (z_a, z_b) = len(runs), views(n, d, dtype)
        assert_close(answer(fused(route=route, **kwargs), z_a, z_b), z_a, z_b, BATCH_NORM)
        return len(runs) - before

    kernels = 2 if route == "gram" else 3  # the latter once for each view's gradient
    monkeypatch.setenv("BARLOW_FUSED_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=measure))
    triton_backend._autotuner.cache_clear()
    try:
        count = again(33, 70)
        assert count == 3 * kernels
        assert again(33, 70) == 0
        assert again(33, 71) == count
        assert again(33, 70, torch.bfloat16) == count
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
        triton_backend.forward(*views(4, 3, torch.float64), Spec("triton", "gram", None, 0.1, 1.0), True, False)
