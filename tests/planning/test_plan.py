"""The costs that ``plan`` predicts, against what PyTorch allocates and moves."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tracing import Trace

from barlow_fused import backends, barlow_twins_loss, choice, configure, kappa, loss_floor
from barlow_fused.backends import slabs
from barlow_fused.backends.operations import Spec
from barlow_fused.normalization import CONVENTIONS
from barlow_fused.planning import cost, devices
from barlow_fused.planning.network import Network
from barlow_fused.planning.plan import Plan, plan
from benchmarks.peers import usual_loss

H200 = devices.KNOWN["h200"]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    monkeypatch.delenv("BARLOW_FUSED_ROUTE", raising=False)
    monkeypatch.delenv("BARLOW_FUSED_BACKEND", raising=False)
    choice.forget()
    with configure():
        yield


# The costs


@pytest.mark.parametrize(("n", "d"), [(256, 8192), (8192, 2048), (1000, 1000), (2, 1)])
def test_flops_are_6_n_d_min_of_n_and_d_where_the_cheaper_route_is_taken(n, d):
    made = plan(n, d, device="h200", route="gram" if n <= d else "direct")
    assert made.fused.flops == 6 * n * d * min(n, d)
    assert made.usual.flops == 6 * n * d * d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(256, 8192), (2048, 65536), (8192, 2048)])
def test_the_floor_is_the_slower_of_memory_and_arithmetic(n, d, dtype):
    made = plan(n, d, dtype, device="h200")
    rate = H200.products["half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")]
    for c in (made.fused, made.usual):
        assert 0 < c.floor == max(c.bytes_moved / H200.bandwidth, c.flops / rate)
    assert made.lower_bound == max(6 * n * d * dtype.itemsize / H200.bandwidth, made.fused.flops / rate)
    assert made.lower_bound <= made.fused.floor
    assert 6 * n * d * dtype.itemsize <= made.fused.bytes_moved


@pytest.mark.parametrize(
    ("n", "d", "microseconds"),
    [(256, 8192, 5.85), (2048, 8192, 261), (1024, 65536, 522), (2048, 262144, 8350), (8192, 2048, 261)],
)
def test_the_lower_bound_on_an_h200_in_bfloat16(n, d, microseconds):
    assert plan(n, d, torch.bfloat16, device="h200").lower_bound == pytest.approx(microseconds * 1e-6, rel=0.01)


def test_tf32_is_planned_for_where_pytorch_may_use_it():
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = plan(2048, 65536, device="h200").lower_bound
        torch.set_float32_matmul_precision("high")
        tf32 = plan(2048, 65536, device="h200").lower_bound
    finally:
        torch.set_float32_matmul_precision(precision)
    assert exact / tf32 == pytest.approx(494.7 / 66.9)


def trace(loss, n, d, dtype):
    """(peak bytes beyond inputs and gradients, bytes read and written) of a forward and backward pass."""
    z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [x.clone().requires_grad_() for x in z]
    with Trace() as traced:
        grads = torch.autograd.grad(loss(*views), views)
    return traced.peak - sum(g.nbytes for g in grads), traced.moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("n", "d"),
    [
        *[(16, 512), (128, 3000), (256, 4096), (512, 2048), (64, 16384), (1024, 4096), (2048, 2048)],
        *[(4096, 256), (4096, 512), (8192, 512)],
    ],
)
def test_the_torch_backend_allocates_what_is_predicted(n, d, dtype):
    made = plan(n, d, dtype, device="cpu", backend="torch")
    peak, _ = trace(lambda a, b: barlow_twins_loss(a, b, backend="torch"), n, d, dtype)
    room = 2**21 if d % slabs.MIN_SLAB else 0  # uneven slabs
    assert peak / 1.1 - room <= made.fused.peak_memory <= 1.25 * peak + room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("n", "d"), [(64, 512), (256, 8192), (2048, 8192), (1024, 65536), (2048, 65536), (8192, 2048), (4096, 4096)]
)
def test_the_torch_backend_allocates_what_is_predicted_on_a_gpu(n, d, dtype):
    """On tensors without data: its shape for accelerators is the same for all of them."""
    made = plan(n, d, dtype, device="h200", backend="torch")
    views = [torch.empty(n, d, dtype=dtype, device="meta", requires_grad=True) for _ in range(2)]
    with Trace() as traced:
        grads = torch.autograd.grad(barlow_twins_loss(*views, backend="torch"), views)
    peak = traced.peak - sum(g.nbytes for g in grads)
    assert made.fused.peak_memory == pytest.approx(peak, rel=0.1, abs=2**20)


SIZES = [(256, 8192), (2048, 8192), (1024, 65536), (2048, 65536), (2048, 262144), (8192, 2048)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["a100", "h200", "b200"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_triton_keeps_the_memory_bound(n, d, device, dtype):
    """2 N D numbers and 3 min(N, D)^2 in float32, beyond inputs and gradients."""
    made = plan(n, d, dtype, device=device, backend="triton")
    assert made.backend == "triton"
    assert 2 * n * d * dtype.itemsize < made.fused.peak_memory
    assert made.fused.peak_memory <= 2 * n * d * dtype.itemsize + 3 * min(n, d) ** 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize(("n", "d"), [*SIZES[:2], *SIZES[3:4], *SIZES[5:], (16, 512), (100, 3000), (333, 70001)])
def test_the_triton_backend_allocates_what_is_predicted(n, d, route, dtype):
    """On tensors without data, with nothing launched."""
    pytest.importorskip("triton", reason="needs the package triton")
    from barlow_fused.backends import triton_backend as ops
    from benchmarks.kernels import recorded

    z_a, z_b = (torch.empty(n, d, dtype=dtype, device="meta") for _ in range(2))
    with recorded(arch=90) as launches, Trace() as traced:
        spec = Spec("triton", route, CONVENTIONS["batch_norm"], 0.0051, 1.0)
        terms, saved = ops.forward(z_a, z_b, spec, True, False)
        launches.clear()  # they hold all of their arguments
        grads = ops.backward(z_a, z_b, saved, spec, (terms[0], None, None), (True, True))
    made = plan(n, d, dtype, device="h200", route=route, backend="triton")
    assert traced.peak - sum(g.nbytes for g in grads) == pytest.approx(made.fused.peak_memory, rel=0.001, abs=2048)


def test_what_the_triton_backend_moves():
    n, d = 2048, 65536
    made = plan(n, d, torch.bfloat16, device="h200", backend="triton")
    assert made.fused.flops == 6 * n * n * d
    passes = 4 + 2 + 2 + 4 + 6  # normalize in two phases, gram, the gradients' product, and what is elementwise
    assert passes * n * d * 2 < made.fused.bytes_moved < 1.2 * passes * n * d * 2
    direct = plan(8192, 4096, torch.bfloat16, device="h200", backend="triton")
    assert direct.fused.flops == 6 * 8192 * 4096**2
    assert direct.fused.bytes_moved == (6 + 2 + 8) * 8192 * 4096 * 2 + 3 * 4096**2 * 2


def test_a_gpu_that_is_not_here_is_asked_by_name(monkeypatch):
    """What can run there depends on its architecture and the dtype, not on this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in devices.KNOWN:
        assert plan(256, 8192, device=device, backend="triton").backend == "triton"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot take torch.float64"):
        plan(256, 8192, torch.float64, device="h200", backend="triton")
    old = dataclasses.replace(H200, torch_name="NVIDIA V100", architecture="sm_70")
    monkeypatch.setitem(devices.KNOWN, "v100", old)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or newer, this GPU has 7.0"):
        plan(256, 8192, device="v100", backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu: it needs a GPU of NVIDIA"):
        plan(256, 8192, device="cpu", backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(64, 1024), (1024, 256), (256, 512)])
def test_the_usual_and_the_reference_allocate_and_move_what_is_predicted(n, d, dtype, monkeypatch):
    monkeypatch.setattr(cost, "CACHED_BYTES", 0)
    made = plan(n, d, dtype, device="cpu", backend="reference")
    for predicted, loss in (
        (made.usual, usual_loss),
        (made.fused, lambda a, b: barlow_twins_loss(a, b, backend="reference")),
    ):
        peak, moved = trace(loss, n, d, dtype)
        assert peak == pytest.approx(predicted.peak_memory, rel=0.1)
        assert moved == pytest.approx(predicted.bytes_moved, rel=0.02)


def test_arrays_that_fit_the_caches_move_only_when_nothing_can_avoid_it():
    small = plan(64, 256, device="h200")
    assert small.usual.bytes_moved == small.fused.bytes_moved == 6 * 64 * 256 * 4
    large = plan(4096, 16384, device="h200")
    assert large.usual.bytes_moved == (32 * 16384**2 + 16 * 4096 * 16384) * 4
    assert large.fused.bytes_moved > 8 * 4096 * 16384 * 4


def test_every_backend_that_can_run_has_a_cost():
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for backend in backends.BACKENDS:
            if backends.why_unusable(backend, torch.device(device)) is None:
                assert plan(64, 256, device=device, backend=backend).fused.peak_memory > 0


def test_ranks_share_the_work_and_communicate():
    n, d, ranks = 2048, 8192, 32
    one, each = plan(n, d, device="h100"), plan(n, d, device="h100", world_size=ranks)
    assert each.fused.flops * ranks == one.fused.flops
    assert each.usual.flops * ranks == one.usual.flops
    assert (one.fused.all_to_all_bytes, one.fused.all_reduce_bytes, one.usual.all_reduce_bytes) == (0, 0, 0)
    assert (one.fused.step, one.network) == (0, None)
    assert each.fused.all_to_all_bytes == 4 * (n // ranks) * d * 4
    triangles = n * (n + 128) * 4  # of K_a and K_b, in panels of 128 rows
    assert each.fused.all_reduce_bytes == triangles + 4 * 8 + 3 * ranks * 8
    assert each.usual.all_reduce_bytes == d**2 * 4 + 2 * 2 * d * 4
    assert each.fused.peak_memory < each.usual.peak_memory
    direct = plan(n, d, device="h100", world_size=ranks, route="direct")
    assert (direct.fused.all_to_all_bytes, direct.fused.all_reduce_bytes) == (0, (d**2 + d) * 4)
    assert "predicted" in str(each)
    assert "predicted" not in str(one)
    assert plan(64, 1000, torch.bfloat16, device="h100", world_size=32).fused.all_to_all_bytes == 4 * 2 * 1000 * 2


# The network


def test_the_alpha_beta_model():
    net = Network(latency=1e-6, intra=100e9, inter=10e9, ranks_per_node=4)
    # in one node
    assert net.seconds("all_to_all", 4_000_000, 4) == pytest.approx(3e-6 + 30e-6)
    assert net.seconds("all_reduce", 4_000_000, 4) == pytest.approx(6e-6 + 60e-6)
    assert net.seconds("all_gather", 1_000_000, 4) == pytest.approx(2e-6 + 30e-6)
    # in two: half of an all-to-all leaves the node over the rank's own link; rings use all four
    assert net.seconds("all_to_all", 8_000_000, 8) == pytest.approx(7e-6 + 400e-6)
    assert net.seconds("all_reduce", 8_000_000, 8) == pytest.approx(14e-6 + 14e6 / 40e9)
    assert net.seconds("all_reduce", 8, 8) == pytest.approx(6e-6, rel=1e-3)  # trees
    assert net.sent("all_reduce", 8, 8) == 14
    assert net.sent("all_to_all", 8, 8) == 7
    assert net.sent("all_gather", 8, 8) == 56


def test_a_step_hides_what_it_can():
    no_network = Network(latency=0, intra=1e30, inter=1e30)
    made = plan(2048, 8192, device="h200", world_size=32, network=no_network)
    assert made.fused.step == pytest.approx(made.fused.floor)
    made = plan(2048, 8192, device="h200", world_size=32)
    exposed = made.fused.floor + made.fused.network - made.fused.step
    assert 0 < exposed < made.fused.floor * 0.67
    assert made.usual.step == pytest.approx(made.usual.floor + made.usual.network)


def test_the_largest_problems_are_planned_for():
    made = plan(16384, 2**20, torch.bfloat16, device="h200", world_size=4096)
    assert made.fused.step < made.usual.step / 100
    k = sum(c.size for c in made.fused.collectives if c.what.startswith("K_"))
    assert k > 0.9 * (made.fused.all_to_all_bytes + made.fused.all_reduce_bytes)  # K's sum is nearly all there is
    assert max(map(len, str(made).splitlines())) <= 80


@pytest.mark.parametrize("field", ["latency", "intra", "inter", "ranks_per_node"])
def test_a_network_has_positive_rates(field):
    with pytest.raises(ValueError, match=f"{field} must be above 0, got -1"):
        Network(**{field: -1})


# The devices


def test_this_cpu_is_measured_once(monkeypatch):
    device = devices.resolve_device("cpu")
    bandwidth, rate = device.bandwidth, device.product_rate(torch.float32)
    assert 1e8 < bandwidth < 1e13
    assert 1e8 < rate < 1e14

    def again(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(devices, "_seconds", again)
    made = plan(256, 8192, device=torch.device("cpu"))
    assert made.fused.floor == max(made.fused.bytes_moved / bandwidth, made.fused.flops / rate)
    assert "measured" in made.rates


def test_planning_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    plan(2048, 65536, torch.bfloat16, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "H200", "h100", "a100", "b200"])
def test_devices_that_can_be_planned_for(device):
    made = plan(64, 256, device=device)
    assert made.device
    assert made.fused.floor > 0


def test_the_table_says_where_its_rates_come_from():
    assert "(measured)" in plan(64, 256, torch.bfloat16, device="h200").rates
    assert "bandwidth measured, product: datasheet" in plan(64, 256, device="h100").rates
    assert "(datasheet" in plan(64, 256, torch.bfloat16, device="a100").rates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_planned_for(monkeypatch):
    assert plan(256, 8192, torch.bfloat16).fused.floor > 0
    monkeypatch.setattr(devices, "KNOWN", {})  # measured, then
    made = plan(256, 8192, torch.bfloat16, device="cuda")
    assert 1e10 < made.fused.bytes_moved / made.fused.floor < 1e14


# What is printed, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"world_size": 2}, {"route": "direct"}, {"backend": "reference"}, {"backend": "triton"}, {"backend": "cuda"}],
)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 4), (256, 8192), (2**20, 2**20)])
def test_the_table_fits_80_columns(n, d, dtype, kwargs):
    for device in devices.KNOWN:
        if kwargs.get("backend") == "cuda" and device.startswith("mi"):
            continue
        made = plan(n, d, dtype, device=device, **kwargs)
        text = str(made)
        assert max(map(len, text.splitlines())) <= 80
        assert f"route         {made.route}: " in text
        assert "FLOPs" in text


def test_what_lambda_means_at_this_width():
    made = plan(256, 65536, device="h200", lambd=0.001)
    assert (made.lambd, made.kappa) == (0.001, kappa(256, 65536, 0.001))
    assert (made.loss_floor, made.c_ii) == loss_floor(256, 65536, 0.001)
    assert made.warning is None
    text = " ".join(str(made).split())
    assert "loss λ = 0.001, κ = 0.256: at least 13358, where C_ii = 0.796" in text
    assert "warning" not in text
    several = plan(256, 65536, device="h200", world_size=8, lambd=0.001)
    assert several.kappa == made.kappa  # N counts the samples of all ranks


def test_a_lambda_that_is_too_large_is_warned_of():
    made = plan(256, 65536, device="h200")
    assert made.lambd == 0.0051
    assert "κ = 1.31 is above 0.5" in made.warning
    assert "warning κ = 1.31 is above 0.5" in " ".join(str(made).split())


def test_the_table_survives_a_long_device_name():
    made = dataclasses.replace(plan(2, 4, device="h200"), device="Intel(R) Xeon(R) " * 6, why="because " * 20)
    assert max(map(len, str(made).splitlines())) <= 80


def test_the_table_of_a_wide_projector():
    text = " ".join(str(plan(2048, 65536, torch.bfloat16, device="h200")).split())
    assert "FLOPs 1.65 TFLOP 52.8 TFLOP 32.0x" in text
    assert "floor 4.81 ms 66.8 ms 13.9x" in text


def test_a_plan_is_frozen_and_turns_into_json():
    made = plan(64, 256, torch.float16, device="h200")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.route = "direct"
    as_json = json.loads(json.dumps(made.to_dict()))
    assert as_json["dtype"] == "float16"
    assert as_json["usual"]["flops"] == made.usual.flops
    assert set(as_json) == {field.name for field in dataclasses.fields(Plan)}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "n must be at least 2, got 1", {"n": 1}),
        (TypeError, "n must be an int, got float", {"n": 64.0}),
        (TypeError, "n must be an int, got bool", {"n": True}),
        (ValueError, "d must be at least 1, got 0", {"d": 0}),
        (TypeError, "d must be an int, got str", {"d": "256"}),
        (ValueError, "world_size must be at least 1, got 0", {"world_size": 0}),
        (ValueError, "n must be divisible by world_size .* got 64 and 3", {"world_size": 3}),
        (ValueError, "dtype must be torch.float32, .* got torch.int32", {"dtype": torch.int32}),
        (TypeError, "dtype must be torch.float32, .* got 'float32'", {"dtype": "float32"}),
        (ValueError, "device must be 'cpu', .*'h200'.* got 'h300'", {"device": "h300"}),
        (ValueError, "device must be 'cpu', .* got 'meta'", {"device": "meta"}),
        (TypeError, "device must be .* got int", {"device": 0}),
        (ValueError, "device='cuda:99' is not on this machine", {"device": "cuda:99"}),
        (ValueError, "route must be one of .* got 'dual'", {"route": "dual"}),
        (ValueError, "lambd must be at least 0, got -1.0", {"lambd": -1}),
        (ValueError, "backend must be one of .* got 'fast'", {"backend": "fast"}),
    ],
)
def test_what_is_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        plan(**{"n": 64, "d": 256, "device": "h200", **arguments})


def test_a_forced_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run on cpu"):
        plan(64, 256, device="cpu", backend="cuda")


@pytest.mark.parametrize(
    ("n", "d", "most"),
    [(256, 8192, 35e-6), (2048, 8192, 430e-6), (1024, 65536, 850e-6), (2048, 262144, 12e-3), (8192, 2048, 430e-6)],
)
def test_predicted_times_of_the_cuda_kernels(n, d, most):
    """On an H200."""
    made = plan(n, d, torch.bfloat16, device="h200", backend="cuda")
    assert made.lower_bound < sum(seconds for _, seconds in made.fused.kernels) < most
    assert "predicted, not measured" in str(made)
    assert not plan(n, d, torch.float32, device="h200", backend="cuda").fused.kernels
