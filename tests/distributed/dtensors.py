"""What test_dtensors.py checks on every rank: the loss of DTensors, against float64 on one process (as checks.py)."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import checks
import forked
import torch
import torch.distributed as dist
from cases import NORMALIZATIONS, error, views
from checks import WEIGHTS, activations, global_oracle, raises, recorded, run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from barlow_fused import BarlowTwinsLoss, LinearBarlowTwinsLoss, barlow_twins_loss, linear_barlow_twins_loss
from barlow_fused.backends import torch_partial
from barlow_fused.distributed import blocks

CHECKS: dict[str, Callable[..., None]] = {}
BATCH_NORM = NORMALIZATIONS["batch_norm"]
# N, D: fewer features than ranks, odd sizes, empty shards of samples (N = 5 on 4 ranks), more samples than a panel
SHAPES = [(8, 3), (9, 31), (5, 100), (17, 100), (300, 70), (40, 12), (64, 301)]


def check(function: Callable[..., None]) -> Callable[..., None]:
    CHECKS[function.__name__] = function
    return function


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def layouts() -> list[tuple[DeviceMesh, tuple]]:
    """Every way in which two views may be given."""
    ranks = dist.get_world_size()
    found = [(mesh(), (placement,)) for placement in (Shard(0), Shard(1), Shard(-1), Replicate())]
    if ranks == 4:
        both = mesh(2, 2)
        found += [(both, (Shard(0), Shard(1))), (both, (Shard(1), Shard(0))), (both, (Replicate(), Shard(1)))]
    return found


def assert_equal_to_oracle(n, d, dtype, tolerance, where, placements, route, convention=BATCH_NORM, **options) -> None:
    z_a, z_b = views(n, d, dtype)
    want, size = global_oracle(z_a, z_b, [n], convention, **WEIGHTS)
    a, b = (distribute_tensor(z, where, placements).requires_grad_() for z in (z_a, z_b))
    arguments = {**WEIGHTS, "normalization": convention or "none", "route": route, "return_terms": True}
    terms = barlow_twins_loss(a, b, **arguments, **options) if options else BarlowTwinsLoss(**arguments)(a, b)
    grads = torch.autograd.grad(terms.loss, (a, b))
    what = f"N={n} D={d} {dtype} {placements} {route} {convention}"
    for name, got, ref in zip(terms._fields, terms, want, strict=False):
        assert type(got) is Tensor
        assert error(got, ref, at_least=d) < tolerance, (name, error(got, ref, at_least=d), what)
    for name, got, ref in zip("ab", grads, want[3:], strict=True):
        assert got.placements == a.placements, what
        assert got.dtype == dtype, what
        value = error(got.full_tensor(), ref, at_least=size)
        assert value < tolerance, (name, value, what)


@check
def float64_equals_one_process() -> None:
    for where, placements in layouts():
        for n, d in SHAPES:
            for route in ("gram", "direct"):
                assert_equal_to_oracle(n, d, torch.float64, 1e-12, where, placements, route)


@check
def float32_equals_one_process() -> None:
    for where, placements in layouts():
        for n, d in SHAPES:
            for route in ("gram", "direct"):
                if route == "direct" or 2 * n <= d:
                    assert_equal_to_oracle(n, d, torch.float32, 1e-5, where, placements, route)


@check
def every_convention_and_half_precision() -> None:
    for where, placements in layouts():
        for route in ("gram", "direct"):
            for convention in NORMALIZATIONS.values():
                assert_equal_to_oracle(20, 61, torch.float64, 1e-12, where, placements, route, convention)
            for dtype in (torch.bfloat16, torch.float16):
                assert_equal_to_oracle(16, 101, dtype, 5e-3, where, placements, route)
            if any(isinstance(p, Shard) for p in placements):
                kept = {"reduce_dtype": torch.bfloat16}
                assert_equal_to_oracle(40, 100, torch.float32, 2e-2, where, placements, route, **kept)


@check
def one_view_and_no_gradient() -> None:
    z_a, z_b = views(20, 61, torch.float64)
    for where, placements in layouts():
        for route in ("gram", "direct"):
            a, b = (distribute_tensor(z, where, placements) for z in (z_a, z_b))
            want = torch.autograd.grad(barlow_twins_loss(z_a.requires_grad_(), z_b, route=route), z_a)[0]
            barlow_twins_loss(a.requires_grad_(), b, route=route).backward()
            assert error(a.grad.full_tensor(), want) < 1e-12
            assert b.grad is None
            with torch.no_grad():
                assert not barlow_twins_loss(a, b, route=route).requires_grad


@check
def every_rank_gets_the_same_bits() -> None:
    for where, placements in layouts():
        for route in ("gram", "direct"):
            a, b = (distribute_tensor(z, where, placements) for z in views(33, 70))
            loss = barlow_twins_loss(a, b, route=route)
            losses = [torch.empty(()) for _ in range(dist.get_world_size())]
            dist.all_gather(losses, loss)
            if Replicate() not in placements:
                assert all(torch.equal(other, loss) for other in losses)


@check
def no_rank_holds_c() -> None:
    """The direct route with features in shards: a rank's rows of C, and two shards."""
    from tracing import Trace

    ranks = dist.get_world_size()
    n, d = 256, 480 * ranks
    a, b = (distribute_tensor(z, mesh(), [Shard(1)]).requires_grad_() for z in views(n, d))
    with Trace() as trace:
        loss = barlow_twins_loss(a, b, route="direct")
        loss.backward()
    rows, shard = d * d // ranks * 4, n * d // ranks * 4
    assert trace.peak < rows + 480**2 * 4 * 3 + 14 * shard, (trace.peak, rows, shard)


@check
def nothing_is_exchanged_where_features_are_in_shards() -> None:
    ranks = dist.get_world_size()
    n, d = 100, 400 * ranks
    a, b = (distribute_tensor(z, mesh(), [Shard(1)]).requires_grad_() for z in views(n, d))
    with recorded() as calls:
        barlow_twins_loss(a, b, route="gram").backward()
    names = [name for name, *_ in calls]
    assert "all_to_all_single" not in names
    triangle = sum(torch_partial.panel_sizes(n))
    assert [size for name, _, size in calls if name == "all_reduce"] == [triangle, triangle, 4], calls


@check
def column_parallel_layers_in_front() -> None:
    """parallelize_module with ColwiseParallel(use_local_output=False): the weights' gradients as well."""
    x = torch.randn(24, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x + 0.1 * x.flip(1)
    for d, route in ((102, "gram"), (30, "direct")):
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, d)).double()
        several = copy.deepcopy(alone)
        parallelize_module(several, mesh(), {"2": ColwiseParallel(use_local_output=False)})
        barlow_twins_loss(alone(x), alone(y), route=route).backward()
        barlow_twins_loss(several(x), several(y), route=route).backward()
        for p, ref in zip(several.parameters(), alone.parameters(), strict=True):
            got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert error(got, ref.grad, at_least=0.01) < 1e-11  # the last bias has none


@check
def behind_layers_under_fsdp_and_compile() -> None:
    """FSDP2 of the layers before, whose gradient it averages; torch.compile of them."""
    ranks = dist.get_world_size()
    x = torch.randn(8 * ranks, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x + 0.1 * x.flip(1)
    own = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(9, 16), nn.ReLU()).double()
    last = torch.randn(102, 16, dtype=torch.float64)
    barlow_twins_loss(alone(x) @ last.T, alone(y) @ last.T).backward()
    for change in ("fsdp", "compile"):
        trunk = copy.deepcopy(alone)
        trunk.zero_grad()
        if change == "fsdp":
            fully_shard(trunk)
        else:
            trunk.compile(backend="aot_eager")
        weight = distribute_tensor(last, mesh(), [Shard(0)]).requires_grad_()
        h = [
            DTensor.from_local(trunk(v[own]), mesh(), [Shard(0)]).redistribute(placements=[Replicate()]) for v in (x, y)
        ]
        z = [nn.functional.linear(v, weight) for v in h]
        assert z[0].placements == (Shard(1),)
        (barlow_twins_loss(*z) * ranks).backward()
        for p, ref in zip(trunk.parameters(), alone.parameters(), strict=True):
            if change == "fsdp":
                got = p.grad.full_tensor()
            else:
                got = p.grad.clone()
                dist.all_reduce(got)
                got /= ranks
            assert error(got, ref.grad) < 1e-11, (change, error(got, ref.grad))


# With the last layer


def assert_last_layer(n, h, d, dtype, tolerance, route, placement, convention=BATCH_NORM, **options) -> None:
    h_a, h_b, weight = activations(n, h, d, dtype)
    inputs = [x.double().requires_grad_() for x in (h_a, h_b, weight)]
    z = [x @ inputs[2].T for x in inputs[:2]]
    want, _ = global_oracle(*z, [n], convention, **WEIGHTS)
    wanted = torch.autograd.grad(z, inputs, [g.double() for g in want[3:]])
    of_h = [distribute_tensor(x, mesh(), [placement]).requires_grad_() for x in (h_a, h_b)]
    rows = distribute_tensor(weight, mesh(), [Shard(0)]).requires_grad_()
    terms = linear_barlow_twins_loss(
        *of_h, rows, **WEIGHTS, normalization=convention or "none", route=route, return_terms=True, **options
    )
    grads = torch.autograd.grad(terms.loss, (*of_h, rows))
    what = f"N={n} H={h} D={d} {dtype} {placement} {route} {convention}"
    for name, got, ref in zip(terms._fields, terms, want, strict=False):
        assert error(got, ref, at_least=d) < tolerance, (name, error(got, ref, at_least=d), what)
    for got, ref, x in zip(grads, wanted, (*of_h, rows), strict=True):
        assert got.placements == x.placements, what
        assert error(got.full_tensor(), ref) < tolerance, (error(got.full_tensor(), ref), what)


@check
def last_layer_equals_one_process() -> None:
    for placement in (Shard(0), Replicate()):
        for n, h, d in ((17, 5, 100), (40, 12, 301), (33, 50, 70), (24, 3, 3), (140, 20, 64)):
            for route in ("gram", "direct", "hidden"):
                assert_last_layer(n, h, d, torch.float64, 2e-12, route, placement)
                if route != "gram" or 2 * n <= d:
                    assert_last_layer(n, h, d, torch.float32, 1e-5, route, placement)
        for route in ("gram", "direct", "hidden"):
            for convention in NORMALIZATIONS.values():
                assert_last_layer(24, 6, 131, torch.float64, 2e-12, route, placement, convention, chunk_features=7)
            assert_last_layer(32, 12, 301, torch.bfloat16, 2e-2, route, placement)


@check
def last_layer_as_a_module() -> None:
    """LinearBarlowTwinsLoss owns the shards; its optimiser state has their placements."""
    h_a, h_b, weight = activations(24, 6, 50, torch.float64)
    module = LinearBarlowTwinsLoss(6, 50, dtype=torch.float64)
    module.weight = nn.Parameter(distribute_tensor(weight, mesh(), [Shard(0)]))
    alone = LinearBarlowTwinsLoss(6, 50, dtype=torch.float64)
    alone.weight = nn.Parameter(weight.clone())
    for one, inputs in ((module, [distribute_tensor(x, mesh(), [Shard(0)]) for x in (h_a, h_b)]), (alone, (h_a, h_b))):
        optimizer = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            one(*inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert error(module.weight.full_tensor(), alone.weight) < 1e-11


# Bad input


@check
def other_placements_are_named() -> None:
    ranks = dist.get_world_size()
    z_a, z_b = views(8, 40)
    a, b = (distribute_tensor(z, mesh(), [Shard(0)]) for z in (z_a, z_b))
    partial = DTensor.from_local(z_a, mesh(), [Partial()])
    for arguments, options, kind, message in (
        (
            (partial, partial),
            {},
            ValueError,
            "z_a must have the placements Shard(0) and Shard(1), each once, or Replicate(), got (Partial(sum),)",
        ),
        ((a, z_b), {}, TypeError, "z_b must be a DTensor as the others are, got Tensor"),
        ((z_a, b), {}, TypeError, "z_a must be a DTensor"),
        ((a, distribute_tensor(z_b, mesh(), [Shard(1)])), {}, ValueError, "must have the same placements"),
        ((a, distribute_tensor(z_b[:, :39], mesh(), [Shard(0)])), {}, ValueError, "must have the same shape"),
        ((a, b), {"group": "world", "gradient": "official"}, ValueError, "group must not be given with DTensors"),
        ((a, b), {"gradient": "lightly"}, ValueError, "gradient must not be given with DTensors"),
        ((a, b), {"statistics": "local"}, ValueError, "statistics must be 'global' with DTensors"),
        ((a[:1], b[:1]), {}, ValueError, "at least 2 samples"),
    ):
        with raises(kind, message):
            barlow_twins_loss(*arguments, **options)
    if ranks == 4:
        twice = [distribute_tensor(z, mesh(2, 2), [Shard(1), Shard(1)]) for z in (z_a, z_b)]
        with raises(ValueError, "z_a must have the placement Shard(1) once"):
            barlow_twins_loss(*twice)
        with raises(ValueError, "must be on the same mesh"):
            barlow_twins_loss(a, distribute_tensor(z_b, mesh(2, 2), [Shard(0), Replicate()]))
    h_a, h_b, weight = activations(8, 5, 31, torch.float32)
    h_a, h_b = (distribute_tensor(x, mesh(), [Shard(0)]) for x in (h_a, h_b))
    rows = distribute_tensor(weight, mesh(), [Shard(0)])
    for arguments, message in (
        ((h_a, h_b, distribute_tensor(weight, mesh(), [Shard(1)])), "weight must have the placements Shard(0)"),
        ((h_a, h_b, distribute_tensor(weight, mesh(), [Replicate()])), "weight must be Shard(0)"),
        ((h_a, h_b, weight), "weight must be a DTensor as the others are"),
        ((h_a.full_tensor(), h_b, rows), "h_a must be a DTensor as the others are"),
        (
            (distribute_tensor(h_a.full_tensor(), mesh(), [Shard(1)]), h_b, rows),
            "h_a must have the placements Shard(0)",
        ),
    ):
        with raises((TypeError, ValueError), message):
            linear_barlow_twins_loss(*arguments)


@check
def a_rank_with_bad_options_is_an_error_on_every_rank() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return
    odd = rank == ranks - 1
    for where, placements in layouts():
        if not any(isinstance(p, Shard) for p in placements) or Replicate() in placements:
            continue
        a, b = (distribute_tensor(z, where, placements) for z in views(16, 40))
        with raises(
            ValueError if odd else RuntimeError, "lambd must be finite" if odd else "invalid arguments on rank"
        ):
            barlow_twins_loss(a, b, lambd=float("inf") if odd else 0.1)
        with raises(ValueError, "disagree on scale"):
            barlow_twins_loss(a, b, scale=2.0 if odd else 1.0)


@check
def a_lost_block_is_a_wrong_number() -> None:
    """That these checks can fail: without one rank's block the direct route's loss is another."""
    if dist.get_world_size() == 1:
        return
    real = blocks._block
    a, b = (distribute_tensor(z, mesh(), [Shard(1)]) for z in views(40, 30))
    right = barlow_twins_loss(a, b, route="direct")
    with mock.patch.object(blocks, "_block", lambda *x: real(*x).mul_(0.5)):
        assert abs(barlow_twins_loss(a, b, route="direct") - right) > 1e-3


# The backends of kernels, which are asked for by name


def kernels_equal_one_process(backend: str) -> None:
    for where, placements in layouts():
        for route in ("gram", "direct"):
            for convention in NORMALIZATIONS.values():
                arguments = (where, placements, route, convention)
                assert_equal_to_oracle(24, 100, torch.float32, 1e-5, *arguments, backend=backend)
            assert_equal_to_oracle(40, 100, torch.bfloat16, 5e-3, where, placements, route, backend=backend)
    for route in ("gram", "direct"):
        assert_last_layer(24, 8, 100, torch.float32, 1e-5, route, Shard(0), backend=backend)


def main() -> None:
    folder, backend, *counts = sys.argv[1:]
    found = CHECKS
    if backend != "torch":
        checks.kernel_checks(backend)  # loads them
        found = {"kernels_equal_one_process": functools.partial(kernels_equal_one_process, backend)}
    for ranks in counts:
        forked.run(int(ranks), run_checks, found, Path(folder, f"{ranks}.json"))


if __name__ == "__main__":
    main()
