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
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, views
from triton.runtime import interpreter

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import Weights, triton_backend, why_unusable
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.backends.triton_kernels.configs import Blocks, Chip, Slab
from barlow_fused.backends.triton_kernels.gram import lower_triangle_tile
from barlow_fused.normalization import CONVENTIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH_NORM = NORMALIZATIONS["batch_norm"]


@pytest.fixture(autouse=True)
def one_element_arrays_are_numbers(monkeypatch):
    """Until Triton 3.7 the interpreter leaves that to numpy, which refuses since 2.4."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


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


SHAPES = [(2, 3), (2, 1), (16, 64), (17, 31), (33, 100), (40, 12), (300, 7), (64, 128), (65, 130), (140, 290)]
# Where 2 N > D Gram's difference loses digits by design: test_gram_beyond_its_range
GRAM_SHAPES = [(n, d) for n, d in SHAPES if 2 * n <= d]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "route"), [(*shape, "direct") for shape in SHAPES] + [(*shape, "gram") for shape in GRAM_SHAPES]
)
def test_accuracy_over_shapes(n, d, dtype, route):
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(triton_loss(route=route), z_a, z_b), z_a, z_b, BATCH_NORM)


@pytest.mark.parametrize(("n", "d"), [(40, 12), (300, 7), (5, 1)])
def test_gram_beyond_its_range(n, d):
    z_a, z_b = views(n, d)
    got, ref = answer(triton_loss(route="gram"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.loss, ref.loss, at_least=d) < 1e-5
    assert error(got.grad_a, ref.grad_a) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize(("n", "d"), [(17, 100), (70, 141)])
def test_accuracy_over_conventions(n, d, normalization, dtype, route):
    z_a, z_b = views(n, d, dtype)
    name = normalization if normalization is not None else "none"
    loss = triton_loss(route=route, normalization=name, lambd=0.02, scale=0.3)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, normalization, lambd=0.02, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(16, 64), (17, 100), (70, 150)])
def test_small_halves_keep_the_tolerance(n, d, route, dtype, monkeypatch):
    monkeypatch.undo()  # the blocks and limits of the table
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(triton_loss(route=route), z_a, z_b), z_a, z_b, BATCH_NORM)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_and_expanded_inputs(dtype, normalization, route):
    n, d = 33, 100
    z_a, z_b = views(n, d, dtype)
    loss = triton_loss(route=route, normalization=normalization)
    want = answer(loss, z_a, z_b)
    for strided in (
        lambda z: z.T.contiguous().T,
        lambda z: torch.stack((z, z), 2)[..., 0],
        lambda z: torch.cat((z, z), 1)[:, d:],
    ):
        for got in (answer(loss, strided(z_a), strided(z_b)), answer(loss, z_a, strided(z_b))):
            assert all(error(x, y) < 1e-6 for x, y in zip(got, want, strict=True))
    got = answer(loss, z_a[:1].expand(n, d), z_b)
    ref = oracle(z_a[:1].expand(n, d), z_b, CONVENTIONS[normalization])
    assert error(got.grad_b, ref.grad_b) < (2e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [30, 64, 150])
@pytest.mark.parametrize(("ratio", "normalization"), [(10.0, "batch_norm"), (1e3, "std")])
def test_large_means_lose_nothing(ratio, normalization, n, route):
    """In one phase, in one phase with cut rows, and in two phases."""
    z_a, z_b = views(n, 300)
    z_a, z_b = z_a - z_a.mean(0) + ratio, z_b - z_b.mean(0) - ratio * torch.linspace(0.5, 1, 300)
    loss = triton_loss(route=route, normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("n", [20, 70])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_features_with_zero_variance(value, n, normalization, route):
    z_a, z_b = views(n, 150)
    z_a[:, ::3], z_b[:, ::5] = value, value
    got = answer(triton_loss(route=route, normalization=normalization), z_a, z_b)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("limit", [0.0, 256.0, 1e30])
def test_correlate_raw_and_centred(limit, dtype, monkeypatch):
    """A tile multiplies z itself or A_hat, B_hat; each is right by itself, and the raw product is the better one."""
    monkeypatch.setattr(configs, "raw_limit", lambda n: limit)
    z_a, z_b = views(40, 70, dtype)
    got, ref = answer(triton_loss(route="direct"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.off_diag, ref.off_diag) < (5e-4 if limit == 0 else 1e-6)
    assert error(got.grad_a, ref.grad_a) < 5e-3


def test_correlate_takes_the_centred_form_where_means_are_large():
    """float16 with |mean| / deviation of 1000 in half of the features: z_a z_b alone would lose all digits of C."""
    z_a, z_b = (z - z.mean(0) for z in views(64, 64))
    z_a[:, :32] += 1000
    z_b[:, :40] -= 1000
    z_a, z_b = z_a.half(), z_b.half()
    got, ref = answer(triton_loss(route="direct"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.off_diag, ref.off_diag) < 1e-4
    assert error(got.grad_a, ref.grad_a) < 5e-3


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
@pytest.mark.parametrize("n", [20, 90])
def test_each_term_and_each_view(n, route):
    """Any of the terms' gradients may be missing, and any of the inputs' unwanted."""
    z_a, z_b = views(n, 200)
    reference = functools.partial(barlow_twins_loss, backend="reference", return_terms=True)
    for weights in ((0, 1, 0), (0, 0, 1), (1, -2, 0.5)):
        grads = []
        for loss, dtype in ((triton_loss(route=route), torch.float32), (reference, torch.float64)):
            a, b = (z.to(dtype).requires_grad_() for z in (z_a, z_b))
            weighted = [w * t for w, t in zip(weights, loss(a, b), strict=True) if w]
            grads.append(torch.autograd.grad(sum(weighted), (a, b)))
        assert error(grads[0][0], grads[1][0]) < 2e-6
        assert error(grads[0][1], grads[1][1]) < 2e-6
    want = answer(triton_loss(route=route), z_a, z_b)
    a, b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(triton_loss(route=route)(a, z_b).loss, a)[0], want.grad_a)
    assert torch.equal(torch.autograd.grad(triton_loss(route=route)(z_a, b).loss, b)[0], want.grad_b)


@pytest.mark.parametrize(("normalization", "route"), [("batch_norm", "gram"), ("none", "direct")])
def test_same_bits_with_and_without_gradient_and_torch_compile(normalization, route):
    z_a, z_b = views(70, 200, torch.bfloat16)
    loss = triton_loss(route=route, normalization=normalization)
    first, second = answer(loss, z_a, z_b), answer(loss, z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(loss(z_a, z_b), first[:3], strict=True))
    compiled = answer(torch.compile(loss, fullgraph=True, backend="aot_eager"), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(compiled, first, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_the_four_operations_keep_their_contract(convention, route):
    z_a, z_b = views(70, 200, torch.float16)
    x = triton_backend.normalize(z_a, z_b, convention)
    reduce = triton_backend.gram if route == "gram" else triton_backend.correlate
    assert reduce(x, 0.1, 2.0, False)[1] is None
    terms, product = reduce(x, 0.1, 2.0, True)
    again, _ = reduce(x, 0.1, 2.0, True)  # the counters are zero again
    assert terms == again
    assert not x.counters.any()
    saved = [product, *x.saved()]
    empty = triton_backend.empty_saved(z_a, route, convention)
    assert [(t.shape, t.dtype, t.stride()) for t in saved] == [(t.shape, t.dtype, t.stride()) for t in empty]
    storages = {t.untyped_storage().data_ptr() for t in (z_a, z_b, *terms, *saved)}
    assert len(storages) == 5 + len(saved)  # no two share their memory
    weights = Weights(torch.ones(()), None, None, 0.1, 2.0)
    again = triton_backend.Normalized.from_saved(z_a, z_b, convention, saved[1:])
    grads = triton_backend.input_grad(again, product, route, weights, (True, False))
    assert grads[0].dtype == z_a.dtype
    assert grads[1] is None
    assert triton_backend.input_grad(again, product, route, weights, (False, False)) == (None, None)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word on Inf - Inf
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_nan_and_inf_reach_the_loss(route, value):
    z_a, z_b = views(33, 100)
    z_a[3, 5] = value
    assert barlow_twins_loss(z_a, z_b, route=route, backend="triton").isnan()


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
