"""What holds for kernels on small shapes, whoever wrote them, against the float64 oracle."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, error, oracle, similar_views, views, wide_oracle
from torch.utils._python_dispatch import TorchDispatchMode

from barlow_fused import barlow_twins_loss, linear_barlow_twins_loss
from barlow_fused.backends import accelerator
from barlow_fused.backends.operations import Spec
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.normalization import CONVENTIONS
from barlow_fused.reference import reference_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH_NORM = NORMALIZATIONS["batch_norm"]
SHAPES = [(2, 3), (2, 1), (16, 64), (17, 31), (33, 100), (40, 12), (300, 7), (64, 128), (65, 130), (140, 290)]
# Where 2 N > D Gram's difference loses digits by design: test_gram_beyond_its_range
GRAM_SHAPES = [(n, d) for n, d in SHAPES if 2 * n <= d]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "route"), [(*shape, "direct") for shape in SHAPES] + [(*shape, "gram") for shape in GRAM_SHAPES]
)
def test_accuracy_over_shapes(fused, n, d, dtype, route):
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(fused(route=route), z_a, z_b), z_a, z_b, BATCH_NORM)


@pytest.mark.parametrize(("n", "d"), [(40, 12), (300, 7), (5, 1)])
def test_gram_beyond_its_range(fused, n, d):
    z_a, z_b = views(n, d)
    got, ref = answer(fused(route="gram"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.loss, ref.loss, at_least=d) < 1e-5
    assert error(got.grad_a, ref.grad_a) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(16, 64), (17, 100), (70, 150)])
def test_small_halves_keep_the_tolerance(fused, n, d, dtype, route, monkeypatch):
    """They are multiplied in float32, as configs.FLOAT32_ELEMENTS says."""
    monkeypatch.undo()  # the blocks and limits of the table, and the tolerance
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(fused(route=route), z_a, z_b), z_a, z_b, BATCH_NORM)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("n", "d"), [(32, 8192), (32, 16384), (64, 32768)])
def test_halves_of_many_features(fused, n, d, dtype, monkeypatch):
    """K is close to D (I - 1 1^T / N), whose rounding would drown the gradient."""
    monkeypatch.undo()  # the blocks and limits of the table, and the tolerance
    z_a, z_b = similar_views(n, d, dtype)
    got, ref = answer(fused(route="gram"), z_a, z_b), wide_oracle(z_a, z_b)
    assert error(got.loss, ref.loss) < 1e-4
    assert error(got.grad_a, ref.grad_a) < 5e-3
    assert error(got.grad_b, ref.grad_b) < 5e-3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize(("n", "d"), [(17, 100), (70, 141)])
def test_accuracy_over_conventions(fused, n, d, normalization, dtype, route):
    z_a, z_b = views(n, d, dtype)
    name = normalization if normalization is not None else "none"
    loss = fused(route=route, normalization=name, lambd=0.02, scale=0.3)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, normalization, lambd=0.02, scale=0.3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_and_expanded_inputs(fused, dtype, normalization, route):
    n, d = 33, 100
    z_a, z_b = views(n, d, dtype)
    loss = fused(route=route, normalization=normalization)
    want = answer(loss, z_a, z_b)
    for strided in (
        lambda z: z.T.contiguous().T,
        lambda z: torch.stack((z, z), 2)[..., 0],
        lambda z: torch.cat((z, z), 1)[:, d:],
        lambda z: torch.cat((z.flatten()[:1], z.flatten()))[1:].view(n, d),  # not aligned to 16 bytes
    ):
        for got in (answer(loss, strided(z_a), strided(z_b)), answer(loss, z_a, strided(z_b))):
            assert all(error(x, y) < 1e-6 for x, y in zip(got, want, strict=True))
    got = answer(loss, z_a[:1].expand(n, d), z_b)
    ref = oracle(z_a[:1].expand(n, d), z_b, CONVENTIONS[normalization])
    assert error(got.grad_b, ref.grad_b) < (2e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [30, 64, 150])
@pytest.mark.parametrize(("ratio", "normalization"), [(10.0, "batch_norm"), (1e3, "std")])
def test_large_means_lose_nothing(fused, ratio, normalization, n, route):
    """In one phase, in one phase with cut rows, and in two phases."""
    z_a, z_b = views(n, 300)
    z_a, z_b = z_a - z_a.mean(0) + ratio, z_b - z_b.mean(0) - ratio * torch.linspace(0.5, 1, 300)
    loss = fused(route=route, normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("n", [20, 70])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_features_with_zero_variance(fused, value, n, normalization, route):
    z_a, z_b = views(n, 150)
    z_a[:, ::3], z_b[:, ::5] = value, value
    got = answer(fused(route=route, normalization=normalization), z_a, z_b)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("limit", [0.0, 256.0, 1e30])
def test_correlate_raw_and_centred(fused, limit, dtype, monkeypatch):
    """A tile multiplies z itself or A_hat, B_hat; each is right by itself, and the raw product is the better one."""
    monkeypatch.setattr(configs, "raw_limit", lambda n: limit)
    z_a, z_b = views(40, 70, dtype)
    got, ref = answer(fused(route="direct"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.off_diag, ref.off_diag) < (5e-4 if limit == 0 else 1e-6)
    assert error(got.grad_a, ref.grad_a) < 5e-3


def test_correlate_takes_the_centred_form_where_means_are_large(fused):
    """float16 with |mean| / deviation of 1000 in half of the features: z_a z_b alone would lose all digits of C."""
    z_a, z_b = (z - z.mean(0) for z in views(64, 64))
    z_a[:, :32] += 1000
    z_b[:, :40] -= 1000
    z_a, z_b = z_a.half(), z_b.half()
    got, ref = answer(fused(route="direct"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.off_diag, ref.off_diag) < 1e-4
    assert error(got.grad_a, ref.grad_a) < 5e-3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [20, 90])
def test_each_term_and_each_view(fused, n, route):
    """Any of the terms' gradients may be missing, and any of the inputs' unwanted."""
    z_a, z_b = views(n, 200)
    reference = functools.partial(barlow_twins_loss, backend="reference", return_terms=True)
    for weights in ((0, 1, 0), (0, 0, 1), (1, -2, 0.5)):
        grads = []
        for loss, dtype in ((fused(route=route), torch.float32), (reference, torch.float64)):
            a, b = (z.to(dtype, copy=True).requires_grad_() for z in (z_a, z_b))
            weighted = [w * t for w, t in zip(weights, loss(a, b), strict=True) if w]
            grads.append(torch.autograd.grad(sum(weighted), (a, b)))
        assert error(grads[0][0], grads[1][0]) < 2e-6
        assert error(grads[0][1], grads[1][1]) < 2e-6
    want = answer(fused(route=route), z_a, z_b)
    a, b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    assert error(torch.autograd.grad(fused(route=route)(a, z_b).loss, a)[0], want.grad_a) < 1e-6
    assert error(torch.autograd.grad(fused(route=route)(z_a, b).loss, b)[0], want.grad_b) < 1e-6


@pytest.mark.parametrize(("normalization", "route"), [("batch_norm", "gram"), ("none", "direct")])
def test_same_bits_again_and_under_torch_compile(fused, normalization, route):
    z_a, z_b = views(70, 200, torch.bfloat16)
    loss = fused(route=route, normalization=normalization)
    first, second = answer(loss, z_a, z_b), answer(loss, z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(error(x, y) < 1e-6 for x, y in zip(loss(z_a, z_b), first[:3], strict=True))  # without a gradient
    compiled = answer(torch.compile(loss, fullgraph=True, backend="aot_eager"), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(compiled, first, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_the_passes_keep_their_contract(kernels, convention, route):
    z_a, z_b = views(70, 203, torch.float16)
    spec = Spec("of the test", route, convention, 0.1, 2.0)
    terms, saved = kernels.forward(z_a, z_b, spec, True, True)
    (loss,), nothing = kernels.forward(z_a, z_b, spec, False, False)
    assert error(loss, terms[0]) < 1e-6
    assert nothing == []
    empty = kernels.empty_saved(z_a, route, convention)
    assert [(t.shape, t.dtype, t.stride()) for t in saved] == [(t.shape, t.dtype, t.stride()) for t in empty]
    storages = {t.untyped_storage().data_ptr() for t in (z_a, z_b, *terms, *saved)}
    assert len(storages) == 5 + len(saved)  # no two share their memory
    g_terms = (torch.ones(()), None, None)
    grads = kernels.backward(z_a, z_b, saved, spec, g_terms, (True, False))
    assert grads[0].dtype == z_a.dtype
    assert grads[1] is None
    assert kernels.backward(z_a, z_b, saved, spec, g_terms, (False, False)) == (None, None)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word on Inf - Inf
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_nan_and_inf_reach_the_loss(fused, route, value):
    z_a, z_b = views(33, 100)
    z_a[3, 5] = value
    assert fused(route=route)(z_a, z_b).loss.isnan()


class Operators(TorchDispatchMode):
    """Names what PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("route", ROUTES)
def test_a_planned_call_asks_pytorch_for_memory_and_nothing_else(fused, kernels, route, monkeypatch):
    """Forward what is saved, the rest, and the term; backward the gradients. Kernels: at most 3, and 2."""
    z_a, z_b = (z.requires_grad_() for z in views(20, 60))
    recorder, launches = kernels.OPERATIONS.recorder, []
    monkeypatch.setattr(recorder, "launch", lambda self, *arguments, **_: launches.append(arguments))
    monkeypatch.setattr(recorder, "launches", lambda self: lambda *call: None)
    loss = functools.partial(barlow_twins_loss, backend=kernels.OPERATIONS.name, route=route)
    g = torch.ones(())
    with Operators() as forward:
        term = loss(z_a, z_b)
    assert forward.names == ["new_empty"] * 3
    assert len(launches) <= 3
    launches.clear()
    with Operators() as backward:
        torch.autograd.grad(term, (z_a, z_b), g)
    assert [name for name in backward.names if name not in ("detach", "view_as")] == ["empty_like"] * 2
    assert len(launches) == (1 if route == "gram" or kernels.OPERATIONS.name == "cuda" else 2)
    with torch.no_grad(), Operators() as without:
        loss(z_a, z_b)
    assert without.names == ["new_empty"] * 2


def test_each_kind_of_call_is_planned_once(fused, kernels, monkeypatch):
    """Other numbers and weights are no other kind; other shapes, strides, alignment, dtypes and needs are."""
    n, d = 16, 40
    loss = functools.partial(barlow_twins_loss, backend=kernels.OPERATIONS.name)
    made = 0

    def planned(z_a, z_b, needs=(True, True), **options) -> int:
        """How many plans a call makes, forward and backward."""
        nonlocal made
        before, made = made, 0
        z = [x.detach().requires_grad_(need) for x, need in zip((z_a, z_b), needs, strict=True)]
        term = loss(*z, **options)
        if any(needs):
            (term if isinstance(term, torch.Tensor) else term.on_diag).backward()
        made = kernels.planned()
        return made - before

    z_a, z_b = views(n, d)
    odd = torch.empty(n * d + 1)[1:].view(n, d).copy_(z_a)  # begins at no multiple of 16 bytes
    kernels.forget()
    assert planned(z_a, z_b) == 2
    assert planned(z_a + 1, z_b.clone(), lambd=0.1, scale=3.0) == 0
    assert planned(z_b, z_a, normalization="batch_norm", eps=1e-5) == 0
    for kind in (
        {"z_a": z_a.T.contiguous().T, "z_b": z_b},
        {"z_a": z_a, "z_b": z_b.T.contiguous().T},
        {"z_a": odd, "z_b": z_b},
        {"z_a": z_a[:-1], "z_b": z_b[:-1]},
        {"z_a": z_a.half(), "z_b": z_b.half()},
        {"z_a": z_a, "z_b": z_b, "route": "direct"},
        {"z_a": z_a, "z_b": z_b, "normalization": "std"},
        {"z_a": z_a, "z_b": z_b, "eps": 1e-3},
        {"z_a": z_a, "z_b": z_b, "return_terms": True},
    ):
        assert planned(**kind) == 2, kind.keys()
        assert planned(**kind) == 0, kind.keys()
    assert planned(z_a, z_b, needs=(True, False)) == 1  # backward
    assert planned(z_a, z_b, needs=(False, False)) == 1  # forward
    monkeypatch.setattr(accelerator, "tf32", lambda: True)  # PyTorch's switch of precision
    assert planned(z_a, z_b) == 2
    assert planned(z_a, z_b) == 0
    assert planned(z_a.half(), z_b.half()) == 0


def test_plans_keep_no_tensor_alive(kernels):
    """Nor is what a forward pass saves kept beyond its backward pass."""
    z = [torch.randn(16, 40, requires_grad=True) for _ in range(2)]
    term = barlow_twins_loss(*z, backend=kernels.OPERATIONS.name)
    term.backward()
    alive = [weakref.ref(x) for x in (*z, *(x.grad for x in z), term)]
    del z, term
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "h", "d", "route"), [(33, 12, 100, "gram"), (70, 40, 150, "gram"), (40, 20, 24, "direct")]
)
def test_the_last_layer_in_the_loss(fused, n, h, d, route, dtype):
    """By the kernels of one rank's part, a chunk of features after the other."""
    generator = torch.Generator().manual_seed(n)
    shared, *own = (torch.randn(n, h, generator=generator) for _ in range(3))
    inputs = [(shared + 0.5 * x).relu() for x in own] + [torch.randn(d, h, generator=generator) / h**0.5]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    backend = fused().keywords["backend"]
    chunk = 64
    loss = linear_barlow_twins_loss(*inputs, route=route, backend=backend, chunk_features=chunk)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference_loss(exact[0] @ exact[2].T, exact[1] @ exact[2].T).loss
    loss_tolerance, tolerance = (1e-6, 4e-6) if dtype == torch.float32 else (2e-3, 2e-2)  # z is rounded to bfloat16
    assert error(loss, want.detach()) < loss_tolerance
    for got, ref in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, exact), strict=True):
        assert error(got, ref) < tolerance
