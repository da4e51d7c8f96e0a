"""What holds for the CUDA kernels beyond test_kernels.py, compiled for the CPU. Nothing here needs a GPU or nvcc."""

from __future__ import annotations

import functools

import cases
import pytest
import torch
from cases import ROUTES, answer, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import accelerator, cuda_backend, cuda_partial, torch_partial, why_unusable
from barlow_fused.backends.operations import Spec
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.planning import cuda
from barlow_fused.planning.devices import KNOWN
from barlow_fused.planning.plan import plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("route", ROUTES)
def test_float32_obeys_pytorchs_switch(fused, route, precision, monkeypatch):
    monkeypatch.setattr(accelerator, "tf32", lambda: precision == "high")
    z_a, z_b = views(64, 140)
    got, ref = answer(fused(route=route), z_a, z_b), cases.oracle(z_a, z_b)
    wrong = cases.error(got.grad_a, ref.grad_a)
    assert wrong < 2e-6 if precision == "highest" else 1e-5 < wrong < 2e-3


def test_the_plan_covers_all_columns_and_keeps_the_memory_bound(module):
    for capability in (80, 90, 100):
        module.emulate(capability, 132)
        for n, d in ((2, 1), (256, 8192), (100, 250), (2048, 65536), (31, 262144)):
            plan = module.plan_gram(n, d, 1, False, 0)
            step = -(-d // (plan.split * plan.steps))  # the columns of a step, or a little fewer
            assert (plan.split - 1) * plan.steps * step < d
            assert plan.split == 1 or plan.partials * 4 <= 2 * n * d * 2


@pytest.fixture
def emulated(module):
    """emulated(capability, multiprocessors, shared_bytes=, clusters=): the CUDA backend on such a device."""
    cuda_backend.use(module)

    def emulate(*args, **kwargs):
        cuda_backend.use(module)  # forgets the plans for another device
        module.emulate(*args, **kwargs)
        return functools.partial(barlow_twins_loss, backend="cuda", return_terms=True)

    yield emulate
    module.emulate(80, 8)
    cuda_backend.use(None)


def assert_halves_are_right(loss, n, d, route):
    z_a, z_b = views(n, d, torch.bfloat16)
    got, ref = answer(functools.partial(loss, route=route), z_a, z_b), cases.oracle(z_a, z_b)
    assert cases.error(got.loss, ref.loss) < 5e-4
    assert cases.error(got.grad_a, ref.grad_a) < 5e-3
    assert cases.error(got.grad_b, ref.grad_b) < 5e-3


def normalize(z_a, z_b, normalization):
    """The operation by itself, at once."""
    n, d = z_a.shape
    on, standardised = cuda_backend.Now(z_a), normalization is not None
    dtype = configs.compute_dtype(n, d, z_a.dtype, standardised)
    operations = cuda_backend.OPERATIONS
    stats = on.empty(torch.float32, operations.stats_rows(standardised, dtype.itemsize == 2), d)
    hats = on.empty(dtype, 2, n, d, row_bytes=operations.row_bytes) if standardised else None
    return cuda_backend.normalize(on, z_a, z_b, normalization, stats, hats)


@pytest.mark.parametrize("convention", ["batch_norm", "std", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("capability", "n"),
    [
        *((90, 130), (90, 900), (90, 1999), (90, 2100), (90, 3500)),  # one block; clusters of 2, 4, 4 and 8
        *((90, 13600), (80, 900), (80, 3500)),  # chunks; a block alone on its multiprocessor; chunks
    ],
)
def test_normalize_however_rows_are_cut(emulated, capability, n, dtype, convention):
    """Large means, and features that are constant in one part of the rows or in all."""
    emulated(capability, 132)
    z_a, z_b = (z.float() for z in views(n, 37))
    z_a, z_b = z_a + 50, z_b - 30 * torch.linspace(0, 1, 37)
    z_a[:, 3], z_b[:, 5], z_a[: n // 2, 7] = 7.25, -1e3, 2.0
    z_a, z_b = z_a.to(dtype), z_b.to(dtype)
    normalization = cases.NORMALIZATIONS[convention] if convention != "none" else None
    x = normalize(z_a, z_b, normalization)
    exact = [z.double() for z in (z_a, z_b)]
    hats = exact
    if normalization is not None:
        hats = []
        for view, z in enumerate(exact):
            var = z.var(0, correction=0)
            rstd = normalization.rstd(var, n)
            hats.append((z - z.mean(0)) * rstd)
            assert cases.error(x.stats[1 + view], z.mean(0)) < 1e-6
            assert cases.error(x.stats[3 + view], rstd) < 1e-6
            kappa = torch.as_tensor(normalization.kappa(var, n)).expand(37)
            assert cases.error(x.stats[5 + view], kappa) < 1e-6
            assert cases.error(x.stats[7 + view], var * rstd.square()) < 1e-6
            assert cases.error(x.views[view], hats[view]) < (1e-6 if dtype == torch.float32 else 4e-3)
        assert not x.views[0][:, 3].any()
        assert not x.views[1][:, 5].any()
    c = (hats[0] * hats[1]).mean(0)
    assert cases.error(x.stats[0], c) < 1e-6
    sums = torch.stack([(c - 1).square().sum(), c.square().sum()])
    assert cases.error(x.sums.sum(1), sums) < 1e-6
    assert not x.counters.any()


def test_normalize_adds_in_the_same_order_again(emulated):
    emulated(90, 8)
    z_a, z_b = views(2000, 40, torch.bfloat16)
    first, second = (normalize(z_a, z_b, cases.NORMALIZATIONS["batch_norm"]) for _ in range(2))
    assert torch.equal(first.stats[:9], second.stats[:9])
    assert torch.equal(first.sums, second.sums)


KIB = 1024
LARGE_TILES = [(300, 700, "gram"), (100, 800, "direct")]


@pytest.mark.parametrize(("n", "d", "route"), LARGE_TILES)
@pytest.mark.parametrize(("capability", "shared_bytes"), [(86, 99 * KIB), (80, 163 * KIB), (100, 227 * KIB)])
def test_the_portable_kernels_fit_every_gpu(emulated, capability, shared_bytes, n, d, route):
    """With the largest tiles: 8.6, 8.9 and 12.0 have 99 KiB of shared memory a block."""
    assert_halves_are_right(emulated(capability, 8, shared_bytes=shared_bytes), n, d, route)


@pytest.mark.parametrize(("n", "d", "route"), LARGE_TILES)
def test_a_hopper_device_on_which_no_cluster_fits(emulated, n, d, route):
    """A small part of a GPU takes the portable kernels, and not a plan for others."""
    loss = emulated(90, 8, clusters={1: 0, 2: 0, 4: 0, 8: 0})
    plan = cuda_backend.extension().plan_gram(n, d, 1, False, 0)
    portable = emulated(80, 8) and cuda_backend.extension().plan_gram(n, d, 1, False, 0)
    assert (plan.block, plan.split, plan.tiles) == (portable.block, portable.split, portable.tiles)
    loss = emulated(90, 8, clusters={1: 0, 2: 0, 4: 0, 8: 0})
    assert_halves_are_right(loss, n, d, route)


@pytest.mark.parametrize(("n", "d"), [(300, 1800), (600, 700)])
def test_a_device_that_holds_15_clusters_of_8(emulated, n, d):
    """As an H100 of 132 multiprocessors, some of whose groups have fewer than 16."""
    assert_halves_are_right(emulated(90, 132, clusters={8: 15}), n, d, "gram")


@pytest.mark.parametrize("convention", ["batch_norm", "none"])
@pytest.mark.parametrize(("n", "d", "clusters"), [(300, 520, {8: 0, 4: 0}), (600, 300, {8: 0}), (200, 600, {})])
def test_row_tiles_of_a_block(emulated, n, d, clusters, convention):
    """gram_grad in clusters whose blocks walk over two row tiles, or three, or have one; the last are cut."""
    loss = functools.partial(emulated(90, 8, clusters=clusters), route="gram", normalization=convention)
    z_a, z_b = views(n, d, torch.bfloat16)
    got, ref = answer(loss, z_a, z_b), cases.oracle(z_a, z_b, cases.NORMALIZATIONS[convention])
    assert cases.error(got.grad_a, ref.grad_a) < 5e-3
    assert cases.error(got.grad_b, ref.grad_b) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("n", "d"), [(300, 500), (257, 129), (100, 300)])
def test_panels_of_a_part_of_the_features(emulated, n, d, capability, dtype):
    """partial_gram: K's lower triangle in panels, a slice of the features after the other."""
    emulated(capability, 8)
    x = views(n, d, dtype)[0]
    exact = x.double() @ x.double().T
    got = cuda_partial._gram_panels(x).sum(0)
    for start, stop, panel in torch_partial.panels(got, n):
        assert cases.error(panel, exact[start:stop, :stop]) < 1e-6


def test_warm_up_touches_every_kernel(emulated):
    """More of them on Hopper, whose kernels no other device can load; test_nvcc.py compares the list with the code."""
    emulated(80, 8)
    portable = cuda_backend.warm_up(CPU)
    emulated(90, 8)
    assert cuda_backend.warm_up(CPU) > portable > 20


def test_the_first_call_warms_up(emulated, monkeypatch):
    emulated(90, 8)
    warmed = []
    monkeypatch.setattr(cuda_backend, "warm_up", warmed.append)
    z_a, z_b = views(8, 64)
    normalize(z_a, z_b, None)
    assert warmed == [CPU]


@pytest.mark.parametrize("n", [60, 200])
def test_gram_of_few_rows_in_three_clusters(emulated, n):
    """One tile of 64 columns; and three, which each cluster takes in turn, so that none has the same one again."""
    assert_halves_are_right(emulated(90, 24), n, 3000, "gram")


H100 = {"clusters": {2: 66, 4: 33, 8: 15}}  # of 132 multiprocessors
FEW = (64, 100, 128, 256)
GRID = [(n, d) for d in (8192, 65536, 262144) for n in (*FEW, 512, 1024, 1100, 1280, 2048, 4096, 8192)]


@pytest.mark.parametrize(("n", "d"), GRID)
def test_multiprocessors_take_equal_shares(emulated, n, d):
    """With handing over, gram takes at most 1.15 times as long as if all had equal shares of whole steps.

    The steps alone, too, where they are many: up to 256 rows 120 of 132 multiprocessors are in clusters of eight.
    """
    emulated(90, 132, **H100)
    kernels = cuda_backend.extension()
    longest, least = kernels.plan_gram(n, d, 1, False, 0).longest, cuda.least_gram_steps(n, d)
    assert longest <= (1.02 * least if n not in FEW else 1.2 * least + 1)
    for gpu in (KNOWN["h100"], KNOWN["h200"]):
        assert cuda.gram_seconds(n, d, gpu, *cuda.gram_steps(n, d)) <= 1.15 * cuda.gram_seconds(n, d, gpu, least, 1)


@pytest.mark.parametrize(("n", "d"), [(n, d) for n, d in GRID if n not in FEW and 2 * n <= d])
def test_gradients_are_shared_equally(emulated, n, d):
    """The busiest multiprocessor takes at most 1.15 times its share of the row tiles of all slabs.

    But for one: (1024, 8192) has 5 rounds of clusters of 8, which walk once, where 4 would do of those that walk twice.
    """
    emulated(90, 132, **H100)
    plan = cuda_backend.extension().plan_gram_grad(n, d, 0)
    share = 2 * -(-n // 128) * -(-d // 256) / 132  # each with the same steps
    assert plan.rounds * plan.parts <= (1.3 if (n, d) == (1024, 8192) else 1.15) * share


@pytest.mark.parametrize(("capability", "multiprocessors"), [(80, 108), (100, 148)])
@pytest.mark.parametrize(("n", "d"), GRID)
def test_portable_grams_steps(emulated, n, d, capability, multiprocessors):
    """The busiest has at most 1.25 times its share of the steps; or slices are as many as pay for being added up.

    Of S slices of few tiles, steps / S and 2 S is what depends on S, and least where both are equal.
    """
    emulated(capability, multiprocessors)
    plan = cuda_backend.extension().plan_gram(n, d, 1, False, 0)
    steps, rows = -(-d // 64), -(-n // plan.block)
    share = rows * (rows + 1) * steps / multiprocessors
    fewest = min(32, (steps / 2) ** 0.5)
    assert plan.longest <= 1.25 * share or plan.longest <= 1.15 * -(-steps // fewest)


def test_workspace_does_not_grow_with_the_features(emulated):
    emulated(90, 132, **H100)
    plans = [cuda_backend.extension().plan_gram(2048, d, 1, False, 0) for d in (65536, 262144)]
    assert plans[1].partials * 4 <= 60e6
    assert plans[0].partials == plans[1].partials


def test_predictions_count_the_steps_that_the_kernels_take(emulated):
    """barlow_fused.planning.cuda cuts products as the kernels do."""
    emulated(90, 132, **H100)
    kernels = cuda_backend.extension()
    for n, d in [*GRID, (30, 9000), (300, 4000), (200, 65536)]:
        assert cuda.gram_steps(n, d)[0] == kernels.plan_gram(n, d, 1, False, 0).longest
        plan = kernels.plan_gram_grad(n, d, 0)
        if plan.cluster > 0:  # else by the portable kernel
            assert cuda.gram_grad_tiles(n, d) == (plan.rounds, plan.parts)


@pytest.mark.parametrize(("capability", "units"), [(90, 132), (80, 108), (100, 148)])
def test_predictions_know_grams_workspace(emulated, capability, units):
    emulated(capability, units, **(H100 if capability == 90 else {}))
    about = accelerator.named(f"sm_{capability}", units)
    for n, d in [*GRID, (30, 9000), (300, 257), (200, 3000), (65, 70001)]:
        for dtype, itemsize, tf32 in ((0, 4, False), (0, 4, True), (1, 2, False)):
            partials = cuda_backend.extension().plan_gram(n, d, dtype, tf32, 0).partials
            assert cuda.gram_workspace(n, d, itemsize, tf32, about) == 4 * partials


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("n", "d"), [(256, 8192), (2048, 65536), (8192, 2048), (16, 512), (64, 65536), (100, 3000), (333, 70001)]
)
def test_predictions_know_what_is_allocated(emulated, n, d, route, dtype):
    """One allocation for what is saved and one for what is not, beside the gradients."""
    emulated(90, 132, **H100)
    views_of = (torch.Size((n, d)), dtype, (d, 1), (d, 1), True, True)
    arguments = (CPU, False, route, cases.NORMALIZATIONS["batch_norm"], True, False)
    made = cuda_backend._passes._plan_forward(*views_of, *arguments)
    peak = made.saved.bytes + max(0, made.scratch.bytes - 2 * n * d * dtype.itemsize)
    predicted = plan(n, d, dtype, device="h200", route=route, backend="cuda").fused.peak_memory
    assert predicted == pytest.approx(peak, rel=0.001, abs=4096)


def test_what_the_kernels_move():
    """normalize 4, gram 2, its gradient 8; or 6 more where blocks walk over their rows twice; K comes on top."""
    once = plan(1024, 65536, torch.bfloat16, device="h200", backend="cuda")
    assert 14 * 1024 * 65536 * 2 <= once.fused.bytes_moved < 1.1 * 14 * 1024 * 65536 * 2
    twice = plan(2048, 65536, torch.bfloat16, device="h200", backend="cuda")
    assert 20 * 2048 * 65536 * 2 < twice.fused.bytes_moved < 1.1 * 20 * 2048 * 65536 * 2
    direct = plan(8192, 4096, torch.bfloat16, device="h200", backend="cuda")
    assert direct.fused.bytes_moved == (4 + 2 + 8) * 8192 * 4096 * 2 + 3 * 4096**2 * 2


def test_who_may_run_it(module):
    cuda_backend.use(module)
    try:
        assert why_unusable("cuda", CPU) is None
        assert "compiled for the CPU" in why_unusable("cuda", torch.device("cuda", 0))
        assert "float64" in why_unusable("cuda", CPU, torch.float64)
        with pytest.raises(TypeError, match=r"backend='cuda' takes float32, .* got torch.float64"):
            cuda_backend.forward(*views(4, 3, torch.float64), Spec("cuda", "gram", None, 0.1, 1.0), True, False)
    finally:
        cuda_backend.use(None)
    assert "it needs an NVIDIA GPU" in why_unusable("cuda", CPU)


def test_arguments_are_checked(module):
    """Python is the only caller: what is missing, unknown or out of range is a mistake in cuda_backend.py."""
    with pytest.raises(TypeError, match="missing argument a_hat"):
        module.gram(n=3)
    with pytest.raises(ValueError, match="no such dtype"):
        module.gram(a_hat=(0, 1, 1, 7))


def test_what_python_cannot_see_is_checked(module):
    """Where memory begins, and how many tiles there are."""
    z = torch.randn(8, 64)
    cuda_backend.use(module)
    try:
        now = cuda_backend.Now(z)
        x = cuda_backend.normalize(now, z, z, None, now.empty(torch.float32, 1, 64), None)
        plan = module.plan_gram(8, 64, 0, False, 0)
        arguments = {
            "a_hat": cuda_backend.matrix(z),
            "b_hat": cuda_backend.matrix(z),
            "k": None,
            "inner": torch.empty(plan.tiles, dtype=torch.float64).data_ptr(),
            "block": plan.block,
            "split": plan.split,
            "steps": plan.steps,
            "shift": 0.0,
            "tf32": False,
            **cuda_backend._reduction(x, [now.empty(torch.float32) for _ in range(3)]),
            **{"lambd": 0.1, "scale": 1.0, "device": 0, "stream": 0},
        }
        partials = torch.empty(plan.partials + 1)
        with pytest.raises(
            RuntimeError, match=r"gram \(N = 8, D = 64\): partials must begin at a multiple of 16 bytes"
        ):
            module.gram(n=8, d=64, partials=partials[1:].data_ptr(), **arguments)
        with pytest.raises(RuntimeError, match=r"N = 8, D = 2097153\): tiles are counted in 32 bits"):
            module.gram(n=8, d=2**21 + 1, partials=partials.data_ptr(), **arguments)
    finally:
        cuda_backend.use(None)
