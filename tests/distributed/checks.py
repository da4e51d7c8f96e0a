"""What test_distributed.py checks on every rank of 1, 2, 3 and 4 processes:

    python tests/distributed/checks.py FOLDER torch 1 2 3 4

Each check runs on every rank and raises where something is wrong. Rank 0 writes FOLDER/<ranks>.json: for each check,
what went wrong on which rank (nothing, if all is well). The group's timeout turns a hang into a failure.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.utils.checkpoint
from cases import NORMALIZATIONS, error, views
from peers import losses_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from barlow_fused import (
    BarlowTwinsLoss,
    LinearBarlowTwinsLoss,
    Normalization,
    barlow_twins_loss,
    linear_barlow_twins_loss,
)
from barlow_fused.arguments import Options
from barlow_fused.backends import torch_partial
from barlow_fused.distributed import agreement
from barlow_fused.distributed.collectives import GATHER
from barlow_fused.integrations import patch
from barlow_fused.planning.plan import plan
from barlow_fused.reference import reference_loss, standardize

TIMEOUT = datetime.timedelta(seconds=60)
BATCH_NORM = Normalization()
CHECKS: dict[str, Callable[[], None]] = {}

# N over all ranks, D: fewer features than ranks, odd sizes, more samples than a panel, K's bulk, aligned shards
SHAPES = [(8, 1), (8, 3), (9, 31), (17, 100), (11, 301), (8, 1000), (300, 70), (40, 12)]


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def split(n: int, ranks: int | None = None) -> list[int]:
    """Samples of each rank: unequal where n is not a multiple."""
    ranks = ranks or dist.get_world_size()
    return [n // ranks + (rank < n % ranks) for rank in range(ranks)]


def own(z: Tensor, sizes: list[int] | None = None) -> Tensor:
    """This rank's samples, ready to be differentiated."""
    return z.split(sizes or split(len(z)))[dist.get_rank()].detach().clone().requires_grad_()


def global_oracle(
    z_a: Tensor, z_b: Tensor, sizes: list[int], convention: Normalization | None, lambd: float, scale: float
) -> tuple[tuple[Tensor, ...], float]:
    """(loss, on_diag, off_diag, grad_a, grad_b) of the whole batch in float64 by autograd, and the gradient's size.

    Samples are standardised in segments of the given sizes. The size is that of the gradient before the standardisation
    cancels most of it, which it does with very few samples in a segment; elsewhere it is 0.
    """
    inputs = [z.detach().double().requires_grad_() for z in (z_a, z_b)]
    hats = [torch.cat([standardize(part, convention) for part in z.split(sizes)]) for z in inputs]
    weight = torch.cat([torch.full((n, 1), 1 / (n * len(sizes)), dtype=torch.float64) for n in sizes])
    c = (hats[0] * weight).T @ hats[1]
    on_diag = (c.diagonal() - 1).square().sum()
    off_diag = (c - c.diagonal().diag_embed()).square().sum()
    loss = scale * (on_diag + lambd * off_diag)
    *grads, g_a, g_b = torch.autograd.grad(loss, (*inputs, *hats))
    size = 0.0
    if convention is not None and min(sizes) <= max(3, 1 + z_a.shape[1] / 256):
        for z, g in zip(inputs, (g_a, g_b), strict=True):
            rstd = [convention.rstd(x.var(0, correction=0), len(x)).expand_as(x) for x in z.split(sizes)]
            size = max(size, (g * torch.cat(rstd)).norm().item())
    return tuple(t.detach() for t in (loss, on_diag, off_diag, *grads)), size


WEIGHTS = {"lambd": 0.02, "scale": 3.0}


@functools.lru_cache(maxsize=8)
def problem(
    n: int, d: int, dtype: torch.dtype, segments: tuple[int, ...], convention: Normalization | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], float]:
    """Two views and the oracle's answer, which both routes and both conventions of the gradient are compared with."""
    z_a, z_b = views(n, d, dtype)
    return z_a, z_b, *global_oracle(z_a, z_b, list(segments), convention, **WEIGHTS)


def assert_equal_to_oracle(
    n: int, d: int, dtype: torch.dtype, tolerance: float, route: str, gradient: str, statistics: str,
    convention: Any = BATCH_NORM, sizes: list[int] | None = None, group: Any = "world", **kwargs: Any,
) -> None:  # fmt: skip
    sizes = sizes or split(n)
    segments = tuple(sizes) if statistics == "local" else (n,)
    z_a, z_b, want, size = problem(n, d, dtype, segments, convention)
    a, b = own(z_a, sizes), own(z_b, sizes)
    terms = barlow_twins_loss(
        a, b, **WEIGHTS, normalization=convention or "none", route=route, return_terms=True,
        group=group, gradient=gradient, statistics=statistics, **kwargs,
    )  # fmt: skip
    grads = torch.autograd.grad(terms.loss, (a, b))
    factor = dist.get_world_size() if gradient == "lightly" else 1
    where = f"N={n} D={d} {dtype} {route} {gradient} {statistics} {convention}"
    for name, got, ref in zip(terms._fields, terms, want, strict=False):
        value = error(got, ref, at_least=d)
        assert value < tolerance, f"{name}: {value:.1e} at {where}"
    for name, got, ref in zip(("grad_a", "grad_b"), grads, want[3:], strict=True):
        assert got.dtype == dtype
        whole = torch.zeros(n, d, dtype=torch.float64)
        whole.split(sizes)[dist.get_rank()].copy_(got)
        dist.all_reduce(whole)
        value = error(whole, ref * factor, at_least=size * factor)
        assert value < tolerance, f"{name}: {value:.1e} at {where}"


ALL = [(r, g, s) for r in ("gram", "direct") for g in ("official", "lightly") for s in ("global", "local")]


@check
def float64_equals_one_process() -> None:
    for n, d in SHAPES:
        for options in ALL:
            assert_equal_to_oracle(n, d, torch.float64, 1e-12, *options)


@check
def float32_equals_one_process() -> None:
    for n, d in SHAPES:
        for options in ALL:
            assert_equal_to_oracle(n, d, torch.float32, 1e-5, *options)


@check
def every_convention_and_uneven_batches() -> None:
    ranks = dist.get_world_size()
    sizes = [2 + 3 * rank for rank in range(ranks)]
    for convention in NORMALIZATIONS.values():
        for route, gradient, statistics in ALL:
            if convention is None and statistics == "local":
                continue  # nothing is standardised
            arguments = (route, gradient, statistics, convention)
            assert_equal_to_oracle(sum(sizes), 31, torch.float64, 1e-12, *arguments, sizes)
            assert_equal_to_oracle(sum(sizes), 31, torch.float32, 1e-5, *arguments, sizes)


@check
def half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for options in ALL:
            assert_equal_to_oracle(16, 301, dtype, 5e-3, *options)
            assert_equal_to_oracle(16, 20, dtype, 5e-3, *options)


@check
def one_process_is_the_local_loss_bit_for_bit() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for n, d in SHAPES:
        for route, gradient, statistics in ALL:
            z_a, z_b = (z.requires_grad_() for z in views(n, d))
            local = barlow_twins_loss(z_a, z_b, route=route)
            other = barlow_twins_loss(z_a, z_b, route=route, group=alone, gradient=gradient, statistics=statistics)
            assert torch.equal(local, other)
            want, got = (torch.autograd.grad(loss, (z_a, z_b)) for loss in (local, other))
            assert all(map(torch.equal, want, got))


@check
def products_are_summed_in_the_dtype_that_is_asked_for() -> None:
    if dist.get_world_size() == 1:
        return
    for route in ("gram", "direct"):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 2e-2)):
            with recorded() as calls:
                arguments = (200, 410, torch.float32, tolerance, route, "official", "global")
                assert_equal_to_oracle(*arguments, reduce_dtype=dtype)
            assert any(name == "all_reduce" and used == dtype and size > 200**2 / 2 for name, used, size in calls)


@check
def every_rank_gets_the_same_bits() -> None:
    for route in ("gram", "direct"):
        loss = barlow_twins_loss(*map(own, views(33, 70)), route=route, group="world", gradient="official")
        losses = [torch.empty(()) for _ in range(dist.get_world_size())]
        dist.all_gather(losses, loss.detach())
        assert all(torch.equal(other, loss) for other in losses)


@check
def ranks_choose_the_route_by_the_samples_of_all() -> None:
    ranks = dist.get_world_size()
    n, d = 4 * ranks, 8 * ranks  # N = D/2, just the Gram route; for one rank's samples it would be in any case
    for extra, expected in ((0, "gram"), (ranks, "direct")):
        z_a, z_b = map(own, views(n + extra, d))
        with recorded() as calls:
            barlow_twins_loss(z_a, z_b, group="world", gradient="official")
        exchanged = any(name == "all_to_all_single" for name, *_ in calls)
        assert exchanged == (expected == "gram" and ranks > 1)


@contextmanager
def recorded() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """The collectives of a block: (name, dtype, elements of this rank's input)."""
    calls: list[tuple[str, torch.dtype, int]] = []
    saved = {}

    def wrap(name: str, position: int) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[position].dtype, args[position].numel()))
            return saved[name](*args, **kwargs)

        return call

    for name, position in (("all_reduce", 0), (GATHER, 1), ("all_to_all_single", 1)):
        saved[name] = getattr(dist, name)
        setattr(dist, name, wrap(name, position))
    try:
        yield calls
    finally:
        for name, function in saved.items():
            setattr(dist, name, function)


@check
def number_and_size_of_collectives() -> None:
    ranks = dist.get_world_size()
    if ranks == 1:
        z_a, z_b = map(own, views(6, 40))
        with recorded() as calls:
            barlow_twins_loss(z_a, z_b, group="world", gradient="official").backward()
        assert calls == []
        return
    n, d = 320 * ranks, 64 * ranks
    local = n // ranks
    triangle = sum(torch_partial.panel_sizes(n))  # of K
    assert n * (n + 1) / 2 <= triangle <= n * (n + torch_partial.PANEL) / 2
    header = (GATHER, torch.int64, agreement.FIELDS)
    for gradient in ("official", "lightly"):
        weights = [("all_reduce", torch.float64, 3 * ranks if gradient == "official" else 3)]
        for dtype in (torch.float32, torch.bfloat16):
            for statistics, segments in (("global", 1), ("local", ranks)):
                z_a, z_b = (own(z) for z in views(n, d, dtype))
                arguments = {"group": "world", "gradient": gradient, "statistics": statistics}
                with recorded() as forward:
                    loss = barlow_twins_loss(z_a, z_b, route="gram", **arguments)
                with recorded() as backward:
                    loss.backward()
                inputs = [("all_to_all_single", dtype, local * d)] * 2
                sums = [("all_reduce", torch.float32, triangle)] * 2
                assert forward == [header, *inputs, *sums, ("all_reduce", torch.float64, 2 + 2 * segments)], forward
                assert backward == [*weights, *inputs], backward

                with recorded() as forward:
                    loss = barlow_twins_loss(z_a, z_b, route="direct", **arguments)
                with recorded() as backward:
                    loss.backward()
                moments = [(GATHER, torch.float64, 4 * d)] if statistics == "global" else []
                assert forward == [header, *moments, ("all_reduce", torch.float32, d * d + d)], forward
                assert backward == (weights if gradient == "lightly" else []), backward


@check
def nothing_warns() -> None:
    """Neither of what PyTorch deprecates nor of anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for route in ("gram", "direct"):
            z_a, z_b = map(own, views(8 * dist.get_world_size(), 40))
            barlow_twins_loss(z_a, z_b, route=route, group="world", gradient="official").backward()


@check
def collectives_are_those_that_plan_predicts() -> None:
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    for n, d, dtype in ((320 * ranks, 64 * ranks, torch.float32), (20 * ranks, 60 * ranks, torch.bfloat16)):
        for route in ("gram", "direct"):
            made = plan(n, d, dtype, device="h200", world_size=ranks, route=route, backend="torch")
            with recorded() as calls:
                loss = barlow_twins_loss(*map(own, views(n, d, dtype)), route=route, group="world", gradient="official")
                loss.backward()
            names = {GATHER: "all_gather", "all_to_all_single": "all_to_all"}
            used = [(names.get(name, name), size * dtype_.itemsize) for name, dtype_, size in calls]
            assert used == [(c.kind, c.size) for c in made.fused.collectives], (route, used)


# The conventions, by the code that they are named after


def official_code(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """facebookresearch/barlowtwins, main.py: SyncBatchNorm without an affine part, C summed past autograd.

    PyTorch's SyncBatchNorm runs on GPUs only; these are its sums, which its backward pass sums over the ranks likewise.
    """
    count = torch.tensor(float(len(z_a)))
    dist.all_reduce(count)

    def bn(z: Tensor) -> Tensor:
        mean = dist_nn.all_reduce(z.sum(0)) / count
        var = dist_nn.all_reduce((z - mean).square().sum(0)) / count
        return (z - mean) * (var + 1e-5).rsqrt()

    c = bn(z_a).T @ bn(z_b)
    c.div_(count.item())
    dist.all_reduce(c)
    on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
    off_diag = off_diagonal(c).pow_(2).sum()
    return on_diag + lambd * off_diag


def off_diagonal(x: Tensor) -> Tensor:
    n, m = x.shape
    assert n == m
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


library = functools.cache(losses_of)


def lightly_code(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    return library("lightly").BarlowTwinsLoss(lambd, gather_distributed=True)(z_a, z_b)


def solo_learn_code(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    return library("solo-learn").barlow_loss_func(z_a, z_b, lambd, scale_loss=1.0)


def stable_pretraining_code(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    return library("stable-pretraining").BarlowTwinsLoss(lambd)(z_a, z_b)


STABLE_PRETRAINING = Normalization(correction=1, eps=1e-5, eps_added_to="deviation")
PEERS = {  # gradient, statistics, convention
    official_code: ("official", "global", BATCH_NORM),
    lightly_code: ("lightly", "local", BATCH_NORM),
    solo_learn_code: ("official", "local", BATCH_NORM),
    stable_pretraining_code: ("lightly", "local", STABLE_PRETRAINING),
}
PATCHED = {"lightly": lightly_code, "solo-learn": solo_learn_code, "stable-pretraining": stable_pretraining_code}


@check
def agrees_with_the_official_code_and_the_libraries() -> None:
    torch.set_default_dtype(torch.float64)  # solo-learn's
    ranks = dist.get_world_size()
    for code, (gradient, statistics, convention) in PEERS.items():
        for d in (31, 100, 4):
            for sizes in ([5] * ranks, [3 + 2 * rank for rank in range(ranks)]):
                inputs = [own(z, sizes) for z in views(sum(sizes), d, torch.float64)]
                loss = code(*inputs, 0.02)
                want = (loss.detach(), *torch.autograd.grad(loss, inputs))
                for route in ("gram", "direct"):
                    loss = barlow_twins_loss(
                        *inputs, 0.02, normalization=convention, route=route,
                        group="world", gradient=gradient, statistics=statistics,
                    )  # fmt: skip
                    got = (loss.detach(), *torch.autograd.grad(loss, inputs))
                    errors = [error(x, y) for x, y in zip(got, want, strict=True)]
                    assert max(errors) < 1e-11, f"{code.__name__} {route} D={d} {sizes}: {errors}"
    torch.set_default_dtype(torch.float32)


@check
def patched_libraries_compute_what_they_computed_before() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    for name, code in PATCHED.items():
        inputs = [own(z, [4 + r for r in range(ranks)]) for z in views(sum(range(4, 4 + ranks)), 100, torch.float64)]
        answers = []
        for on in (False, True):
            with patch(name) if on else contextlib.nullcontext(), recorded() as calls:
                loss = code(*inputs, 0.02)
                answers.append((loss.detach(), *torch.autograd.grad((1.0 + rank) * loss, inputs)))
        assert any(kind == "all_to_all_single" for kind, *_ in calls) == (ranks > 1)
        assert max(error(x, y) for x, y in zip(*answers, strict=True)) < 1e-11, name
        with patch(name), raises((TypeError, ValueError, RuntimeError), ""):  # on every rank
            z = torch.ones(4, 3, 1 + (rank == ranks - 1))
            code(z.squeeze(2), z.squeeze(2), 0.02)
    torch.set_default_dtype(torch.float32)
    loss = library("lightly").BarlowTwinsLoss()  # of each process, without a collective
    with patch("lightly"), recorded() as calls:
        loss(*views(4, 31))
    assert calls == []


@check
def patching_waits_for_nobody() -> None:
    if dist.get_rank() == 0:
        for name in PATCHED:
            with patch(name):
                pass
    dist.barrier()


@check
def ranks_may_weigh_the_loss_and_its_terms_differently() -> None:
    """As with the code that each convention is named after: a rank's own weights, or the sum of all ranks'."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weights = torch.tensor([1.0 + rank, -2.0 * rank, 0.5 * (rank % 2)], dtype=torch.float64)
    summed = weights.clone()
    dist.all_reduce(summed)
    n, d = 6 * ranks, 31
    z_a, z_b = views(n, d, torch.float64)
    a, b = (z.requires_grad_() for z in (z_a.clone(), z_b.clone()))
    terms = torch.stack(reference_loss(a, b))
    for gradient, used in (("official", weights), ("lightly", summed)):
        want = torch.autograd.grad(terms @ used, (a, b), retain_graph=True)
        for route in ("gram", "direct"):
            inputs = own(z_a), own(z_b)
            got = barlow_twins_loss(*inputs, route=route, return_terms=True, group="world", gradient=gradient)
            grads = torch.autograd.grad(torch.stack(got) @ weights, inputs)
            for x, y in zip(grads, want, strict=True):
                assert error(x, y.split(split(n))[rank]) < 1e-11, (gradient, route)


@check
def each_term_alone_is_differentiable() -> None:
    n, d = 4 * dist.get_world_size(), 31
    z_a, z_b = views(n, d, torch.float64)
    a, b = (z.clone().requires_grad_() for z in (z_a, z_b))
    want = [torch.autograd.grad(term, (a, b), retain_graph=True) for term in reference_loss(a, b)]
    for route in ("gram", "direct"):
        for index in range(3):
            inputs = own(z_a), own(z_b)
            terms = barlow_twins_loss(*inputs, route=route, return_terms=True, group="world", gradient="official")
            for x, y in zip(torch.autograd.grad(terms[index], inputs), want[index], strict=True):
                assert error(x, y.split(split(n))[dist.get_rank()]) < 1e-11


@check
def gradients_only_where_they_are_needed() -> None:
    for route in ("gram", "direct"):
        arguments = {"route": route, "group": "world", "gradient": "official"}
        a, b = map(own, views(9, 31, torch.float64))
        loss = barlow_twins_loss(a, b, **arguments)
        grad_a, grad_b = torch.autograd.grad(loss, (a, b))
        assert error(barlow_twins_loss(a.detach(), b.detach(), **arguments), loss) < 1e-14
        with torch.no_grad():
            assert not barlow_twins_loss(a, b, **arguments).requires_grad
        with mock.patch.object(torch_partial, "input_grad", wraps=torch_partial.input_grad) as computed:
            assert error(torch.autograd.grad(barlow_twins_loss(a, b.detach(), **arguments), a)[0], grad_a) < 1e-14
            assert error(torch.autograd.grad(barlow_twins_loss(a.detach(), b, **arguments), b)[0], grad_b) < 1e-14
        assert computed.call_count == 2 * (dist.get_world_size() > 1)


@check
def off_diag_is_never_negative() -> None:
    """It is a difference of sums that are nearly equal with so few features."""
    for seed in range(10):
        for d in (1, 2):
            arguments = {"route": "gram", "group": "world", "gradient": "official", "return_terms": True}
            assert barlow_twins_loss(*map(own, views(20, d, seed=seed)), **arguments).off_diag >= 0


@check
def any_strides() -> None:
    z_a, z_b = map(own, views(9, 31, torch.float64))
    for route in ("gram", "direct"):
        loss = functools.partial(barlow_twins_loss, route=route, group="world", gradient="official")
        want = torch.autograd.grad(loss(z_a, z_b), (z_a, z_b))
        a, b = (z.detach().T.contiguous().T.requires_grad_() for z in (z_a, z_b))
        got = torch.autograd.grad(loss(a, b), (a, b))
        assert all(error(x, y) < 1e-14 for x, y in zip(got, want, strict=True))


# Groups


@check
def any_process_group() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    members = list(range(ranks))[::-1][: max(1, ranks - 1)]  # all but rank 0
    group = dist.new_group(members)
    mesh = init_device_mesh("cpu", (ranks,))
    z_a, z_b = views(12, 31, torch.float64)
    want = reference_loss(z_a, z_b).loss
    for route in ("gram", "direct"):
        arguments = {"route": route, "gradient": "official"}
        for whole in (mesh, "world", dist.group.WORLD):
            assert error(barlow_twins_loss(own(z_a), own(z_b), group=whole, **arguments), want) < 1e-13
        if rank in members:
            sizes = split(12, len(members))
            mine = [z.split(sizes)[dist.get_rank(group)] for z in (z_a, z_b)]
            assert error(barlow_twins_loss(*mine, group=group, **arguments), want) < 1e-13
        else:
            with raises(ValueError, "not a member of group"):
                barlow_twins_loss(z_a, z_b, group=group, **arguments)
    assert error(barlow_twins_loss(z_a, z_b), want) < 1e-13  # without a group, this process's samples alone


# What goes wrong on one rank


@contextmanager
def raises(kind: type[Exception] | tuple[type[Exception], ...], message: str) -> Iterator[None]:
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    assert isinstance(problem, kind), f"expected {kind}, got {problem!r}"
    assert message in str(problem), f"expected {message!r} in {problem}"


@check
def disagreement_is_an_error_on_every_rank() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    odd = rank == ranks - 1 > 0  # the last rank differs from the others
    if ranks == 1:
        return

    def z(d: int = 31, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
        return torch.randn(4, d, dtype=dtype).requires_grad_(grad)

    def call(z_a: Tensor, z_b: Tensor, **kwargs: Any) -> None:
        barlow_twins_loss(z_a, z_b, **{"group": "world", "gradient": "official", **kwargs})

    last = f"on rank {ranks - 1}"
    with raises(ValueError, f"disagree on D: 31 on rank 0, 32 {last}"):
        call(z(31 + odd), z(31 + odd))
    with raises(ValueError, f"disagree on dtype: torch.float32 on rank 0, torch.bfloat16 {last}"):
        dtype = torch.bfloat16 if odd else torch.float32
        call(z(dtype=dtype), z(dtype=dtype))
    with raises(ValueError, f"disagree on the gradient of z_b: needed on rank 0, not needed {last}"):
        call(z(), z(grad=not odd))
    with raises(ValueError, "disagree on the gradient of z_a: needed"), torch.set_grad_enabled(not odd):
        call(z(), z())
    with raises(ValueError, f"disagree on lambd: 0.0051 on rank 0, 0.1 {last}"):
        call(z(), z(), lambd=0.1 if odd else 0.0051)
    with raises(ValueError, f"disagree on scale: 1 on rank 0, 2 {last}"):
        call(z(), z(), scale=2.0 if odd else 1.0)
    with raises(ValueError, f"disagree on route: gram on rank 0, direct {last}"):
        call(z(), z(), route="direct" if odd else "gram")
    with raises(ValueError, f"disagree on gradient: official on rank 0, lightly {last}"):
        call(z(), z(), gradient="lightly" if odd else "official")
    with raises(ValueError, f"disagree on reduce_dtype: None on rank 0, torch.bfloat16 {last}"):
        call(z(), z(), reduce_dtype=torch.bfloat16 if odd else None)
    with raises(ValueError, f"disagree on statistics: global on rank 0, local {last}"):
        call(z(), z(), statistics="local" if odd else "global")
    with raises(ValueError, f"disagree on the normalization's eps: 1e-05 on rank 0, 0.001 {last}"):
        call(z(), z(), eps=1e-3 if odd else 1e-5)
    with raises(ValueError, "disagree on the normalization's"):
        call(z(), z(), normalization="std" if odd else "batch_norm")
    for correction in (0, 1):
        with raises(ValueError, "disagree on the normalization's"):
            call(z(), z(), normalization=Normalization(correction, 0.0) if odd else "none")
    with raises(ValueError, f"with statistics='local' every rank must have at least 2 samples, got 1 {last}"):
        x = z()[: 1 if odd else 4]
        call(x, x, statistics="local")


@check
def invalid_arguments_on_one_rank_are_an_error_on_every_rank() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return
    odd = rank == ranks - 1
    good = torch.randn(4, 31)
    cases = [
        ({"z_a": torch.randn(4, 31, 1)}, ValueError, "z_a must be 2-D"),
        ({"z_b": torch.randn(5, 31)}, ValueError, "z_a and z_b must have the same shape"),
        ({"z_a": good[:0], "z_b": good[:0]}, ValueError, "at least 1 sample on every rank, got 0"),
        ({"z_a": good.long()}, TypeError, "z_a must be float32"),
        ({"z_a": None}, TypeError, "z_a must be a torch.Tensor"),
        ({"lambd": math.inf}, ValueError, "lambd must be finite"),
        ({"normalization": "layer_norm"}, ValueError, "normalization must be"),
        ({"route": "shortest"}, ValueError, "route must be"),
        ({"backend": "reference"}, RuntimeError, "does not run over several processes"),
    ]
    for wrong, kind, message in cases:
        arguments = {"z_a": good, "z_b": good, **(wrong if odd else {})}
        with raises(kind if odd else RuntimeError, message if odd else f"invalid arguments on rank {ranks - 1}"):
            barlow_twins_loss(**arguments, group="world", gradient="official")


@check
def auto_is_what_every_rank_has_verified() -> None:
    """By the header, in rank 0's order; PyTorch's operators where there is nothing else."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    everywhere, some, none = ("cuda", "triton", "torch"), ("triton", "torch"), ("torch",)
    shapes = []

    def order(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], route: str) -> tuple[str, ...]:
        shapes.append((route, shape))
        return of_last[route] if rank == last else everywhere

    for gram, direct in ((everywhere, everywhere), (some, ("triton", "cuda", "torch")), (none, some)):
        of_last = {"gram": gram, "direct": direct}
        for route, on_last in of_last.items():
            with mock.patch.object(agreement, "fastest_over_ranks", order):
                z_a, z_b = map(own, views(16, 400))
                options = Options(route=route, group="world", gradient="official")
                part = agreement.agree((z_a, z_b), options, agreement.Shards(dist.group.WORLD))
            of_first = everywhere if last else on_last
            assert part.rules.backend == next(name for name in of_first if name in on_last)
    ranks = last + 1
    n = len(own(torch.empty(16, 1)))
    assert set(shapes) == {("gram", (n * ranks, 400 // ranks)), ("direct", (n, 400))}
    if last:
        with raises(ValueError, "disagree on backend: auto on rank 0, torch on rank"):
            barlow_twins_loss(
                *map(own, views(16, 40)),
                group="world",
                gradient="official",
                backend="torch" if rank == last else "auto",
            )


@check
def nan_on_one_rank_reaches_every_loss() -> None:
    for route in ("gram", "direct"):
        for statistics in ("global", "local"):
            z_a, z_b = map(own, views(16, 31))
            if dist.get_rank() == 0:
                z_a.data[0, 0] = math.nan
            loss = barlow_twins_loss(z_a, z_b, route=route, group="world", gradient="official", statistics=statistics)
            assert loss.isnan()
            loss.backward()
            assert z_a.grad.isnan().any()


@check
def second_derivatives_are_an_error() -> None:
    if dist.get_world_size() == 1:
        return
    for route in ("gram", "direct"):
        a, b = map(own, views(8, 31))
        loss = barlow_twins_loss(a, b, route=route, group="world", gradient="official")
        with raises(RuntimeError, "no second derivative"):
            torch.autograd.grad(loss, a, create_graph=True)


# Training


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 20), nn.Tanh(), nn.Linear(20, 41)).double()

    def forward(self, x_a: Tensor, x_b: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x_a), self.layers(x_b)


def true_gradients(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The parameters' gradients of the mean loss over batches, in one process."""
    model = Projector()
    loss = sum(reference_loss(*model(*batch)).loss for batch in batches) / len(batches)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    n = 6 * dist.get_world_size()
    return [views(n, 7, torch.float64, seed=seed) for seed in range(count)]


def assert_gradients(got: Iterable[Tensor], want: list[Tensor], factor: float) -> None:
    """The last bias has the gradient 0: standardised features do not depend on it."""
    size = max(g.norm().item() for g in want) * factor
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert error(x, y * factor, at_least=size) < 1e-12, f"of parameter {index}"


@check
def ddp_averages_to_the_gradient_that_the_convention_promises() -> None:
    for gradient, factor in (("official", 1 / dist.get_world_size()), ("lightly", 1.0)):
        for route in ("gram", "direct"):
            for accumulated in (1, 3):
                model = DistributedDataParallel(Projector(), bucket_cap_mb=0.001)
                loss = BarlowTwinsLoss(route=route, group="world", gradient=gradient)
                given = batches(accumulated)
                for step, batch in enumerate(given):
                    with model.no_sync() if step + 1 < len(given) else contextlib.nullcontext():
                        z_a, z_b = model(*(x.split(split(len(x)))[dist.get_rank()] for x in batch))
                        (loss(z_a, z_b) / len(given)).backward()
                assert_gradients((p.grad for p in model.parameters()), true_gradients(given), factor)


@check
def fsdp_averages_likewise() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for gradient, factor in (("official", 1 / dist.get_world_size()), ("lightly", 1.0)):
        model = Projector()
        for layer in (model.layers[0], model.layers[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        given = batches(1)
        z_a, z_b = model(*(x.split(split(len(x)))[dist.get_rank()] for x in given[0]))
        barlow_twins_loss(z_a, z_b, group=mesh, gradient=gradient).backward()
        assert_gradients((p.grad.full_tensor() for p in model.parameters()), true_gradients(given), factor)


@check
def compiled() -> None:
    """torch.compile leaves its graph for the loss, and comes back."""
    if dist.get_world_size() != 2:  # it takes seconds, whatever the number of ranks
        return
    loss = BarlowTwinsLoss(group="world", gradient="official")
    a, b = map(own, views(9, 31, torch.float64))
    function = torch.compile(lambda x, y: loss(x * 2, y.sin()) + 1, backend="aot_eager")
    want, got = (f(a, b) for f in (lambda x, y: loss(x * 2, y.sin()) + 1, function))
    assert error(got, want) < 1e-13
    for x, y in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True):
        assert error(x, y) < 1e-13


@check
def checkpointed_and_under_autocast() -> None:
    loss = BarlowTwinsLoss(group="world", gradient="lightly")
    a, b = map(own, views(16, 40))
    want = torch.autograd.grad(loss(a, b), (a, b))
    again = torch.utils.checkpoint.checkpoint(lambda x, y: loss(x * 1, y), a, b, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(a, b)
    for got in (again, mixed):
        assert all(map(torch.equal, torch.autograd.grad(got, (a, b)), want))


@check
def modules_can_be_copied() -> None:
    for group in ("world", dist.group.WORLD):
        loss = BarlowTwinsLoss(group=group, gradient="lightly", statistics="local")
        twin = copy.deepcopy(nn.Sequential(loss))[0]
        assert vars(twin).keys() == vars(loss).keys()
        assert twin.group is group
        assert twin is not loss
        assert "gradient='lightly', statistics='local'" in repr(twin)


# The loss with the last layer in it


def activations(n: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two views' rectified activations of all ranks, and a weight that all of them have."""
    h_a, h_b = (x.relu() for x in views(n, h, torch.float64))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(d, h, generator=generator, dtype=torch.float64) / h**0.5
    return h_a.to(dtype), h_b.to(dtype), weight.to(dtype)


def assert_last_layer_equals_oracle(
    n: int, h: int, d: int, dtype: torch.dtype, tolerance: float, route: str, gradient: str, statistics: str,
    convention: Any = BATCH_NORM, sizes: list[int] | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    sizes = sizes or split(n)
    segments = sizes if statistics == "local" else [n]
    h_a, h_b, weight = activations(n, h, d, dtype)
    inputs = [x.double().requires_grad_() for x in (h_a, h_b, weight)]
    z = [x @ inputs[2].T for x in inputs[:2]]
    want, _ = global_oracle(*z, segments, convention, **WEIGHTS)
    wanted = torch.autograd.grad(z, inputs, [g.double() for g in want[3:]])
    a, b, w = own(h_a, sizes), own(h_b, sizes), weight.clone().requires_grad_()
    terms = linear_barlow_twins_loss(
        a, b, w, **WEIGHTS, normalization=convention or "none", route=route, return_terms=True,
        group="world", gradient=gradient, statistics=statistics, **kwargs,
    )  # fmt: skip
    grads = torch.autograd.grad(terms.loss, (a, b, w))
    factor = dist.get_world_size() if gradient == "lightly" else 1
    where = f"N={n} H={h} D={d} {dtype} {route} {gradient} {statistics} {convention}"
    for name, got, ref in zip(terms._fields, terms, want, strict=False):
        value = error(got, ref, at_least=d)
        assert value < tolerance, f"{name}: {value:.1e} at {where}"
    wholes = [torch.zeros(n, h, dtype=torch.float64) for _ in range(2)]
    for whole, got in zip(wholes, grads, strict=False):
        whole.split(sizes)[dist.get_rank()].copy_(got)
    for name, whole, got, ref in zip("ab", (*wholes, grads[2].double()), grads, wanted, strict=False):
        assert got.dtype == dtype
        dist.all_reduce(whole)
        value = error(whole, ref * factor, at_least=0)
        assert value < tolerance, f"gradient {name}: {value:.1e} at {where}"


LAST_LAYERS = [(17, 5, 100), (40, 12, 300), (33, 50, 70), (24, 3, 3), (140, 20, 64), (18, 7, 1001)]  # N, H, D
LINEAR = [(r, g, s) for r in ("gram", "direct", "hidden") for g in ("official", "lightly") for s in ("global", "local")]


@check
def last_layer_in_float64_equals_one_process() -> None:
    for shape in LAST_LAYERS:
        for options in LINEAR:
            assert_last_layer_equals_oracle(*shape, torch.float64, 2e-12, *options)


@check
def last_layer_in_float32_equals_one_process() -> None:
    for n, h, d in LAST_LAYERS:
        for options in LINEAR:
            if options[0] != "gram" or 2 * n <= d:  # where Gram's difference loses no digits
                assert_last_layer_equals_oracle(n, h, d, torch.float32, 1e-5, *options)


@check
def last_layer_with_every_convention_and_uneven_batches() -> None:
    sizes = [4 + 3 * rank for rank in range(dist.get_world_size())]
    for convention in NORMALIZATIONS.values():
        for route, gradient, statistics in LINEAR:
            if convention is None and statistics == "local":
                continue  # nothing is standardised
            arguments = (route, gradient, statistics, convention)
            assert_last_layer_equals_oracle(sum(sizes), 6, 131, torch.float64, 2e-12, *arguments, sizes)
            assert_last_layer_equals_oracle(sum(sizes), 6, 131, torch.float32, 1e-5, *arguments, sizes)


@check
def last_layer_in_half_precision_and_in_chunks() -> None:
    for options in LINEAR:
        for dtype in (torch.bfloat16, torch.float16):
            assert_last_layer_equals_oracle(32, 12, 301, dtype, 2e-2, *options)
        for chunk in (1, 7, 1000):
            assert_last_layer_equals_oracle(20, 5, 61, torch.float64, 2e-12, *options, chunk_features=chunk)


@check
def last_layer_with_some_gradients_only() -> None:
    for route in ("gram", "direct", "hidden"):
        tensors = activations(20, 5, 61, torch.float64)
        tensors = [own(x) for x in tensors[:2]] + [tensors[2]]
        arguments = {"route": route, "group": "world", "gradient": "official"}
        every = [x.detach().requires_grad_() for x in tensors]
        wanted = torch.autograd.grad(linear_barlow_twins_loss(*every, **arguments), every)
        for chosen in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
            inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors, chosen, strict=True)]
            linear_barlow_twins_loss(*inputs, **arguments).backward()
            for x, want, need in zip(inputs, wanted, chosen, strict=True):
                assert (x.grad is not None) == need
                assert not need or error(x.grad, want) < 1e-12


@check
def last_layer_under_ddp_and_fsdp() -> None:
    """The module owns the weight; the average of the ranks' gradients is that of one process."""
    ranks = dist.get_world_size()
    x = torch.randn(8 * ranks, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x + 0.1 * x.flip(1)
    for route in ("gram", "direct", "hidden"):
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6).eval(), nn.ReLU(), nn.Linear(6, 50)).double()
        several = {"group": "world", "gradient": "lightly"} if ranks > 1 else {}

        class Model(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network[:-1]
                self.loss = LinearBarlowTwinsLoss.from_linear(network[-1], route=route, **several)  # noqa: B023

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.loss(self.network(a), self.network(b))

        want = [p.grad for p in grads_of(alone, x, y)]
        for wrap in (DistributedDataParallel, fully_shard):
            model = Model(copy.deepcopy(alone))
            if wrap is fully_shard:
                fully_shard(model.loss)
            model = wrap(model)
            model(own(x), own(y)).backward()
            for p, ref in zip(model.parameters(), [*want[:4], want[4]], strict=True):
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                assert error(got, ref) < 1e-11, (route, wrap)


def grads_of(network: nn.Module, x: Tensor, y: Tensor) -> list[nn.Parameter]:
    barlow_twins_loss(network(x), network(y), backend="reference").backward()
    return list(network.parameters())


@check
def last_layer_names_what_the_ranks_disagree_on() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return
    odd = rank == ranks - 1
    h_a, h_b, weight = activations(8, 5, 31, torch.float32)
    arguments = {"h_a": h_a, "h_b": h_b, "weight": weight}
    several = {"group": "world", "gradient": "official"}
    for wrong, kind, message in (
        ({"weight": weight[:, :4]}, ValueError, "weight must be 2-D"),
        ({"weight": weight.double()}, TypeError, "weight and h_a must have the same dtype"),
        ({"h_a": None}, TypeError, "h_a must be a torch.Tensor"),
        ({"chunk_features": 0}, ValueError, "chunk_features must be at least 1"),
        ({"route": "shortest"}, ValueError, "route must be"),
        ({"route": "hidden", "backend": "cuda"}, (ValueError, RuntimeError), ""),
    ):
        with raises(kind if odd else RuntimeError, message if odd else f"invalid arguments on rank {ranks - 1}"):
            linear_barlow_twins_loss(**{**arguments, **(wrong if odd else {})}, **several)
    for wrong, name in (({"weight": weight[:30]}, "D"), ({"route": "hidden"}, "route")):
        with raises(ValueError, f"disagree on {name}"):
            linear_barlow_twins_loss(**{**arguments, **(wrong if odd else {})}, **several)
    with raises(ValueError, "disagree on the gradient of weight: not needed on rank 0"):
        linear_barlow_twins_loss(h_a, h_b, weight.requires_grad_(odd), **several)
    with raises(ValueError, "disagree on"):  # one with the last layer, one without
        if odd:
            barlow_twins_loss(h_a, h_b, **several)
        else:
            linear_barlow_twins_loss(h_a, h_b, weight.detach()[:5], **several)
    for route in ("gram", "hidden"):
        inputs = [x.detach().requires_grad_() for x in (h_a, h_b, weight)]
        loss = linear_barlow_twins_loss(*inputs, route=route, **several)
        with raises(RuntimeError, "the ranks use the loss in different ways"):
            (loss * (2 if odd else 1)).backward()
    inputs = [x.detach().requires_grad_() for x in (h_a, h_b, weight)]
    (linear_barlow_twins_loss(*inputs, route="direct", **several) * (2 if odd else 1)).backward()  # its own samples


@check
def last_layer_takes_the_route_by_the_samples_of_all() -> None:
    ranks = dist.get_world_size()
    for n, h, d, statistics, route in (
        (16 * ranks, 8 * ranks, 2000, "global", "hidden"),
        (16 * ranks, 15 * ranks, 2000, "global", "gram"),
        (16 * ranks, 15 * ranks, 20 * ranks, "global", "direct"),
        (16 * ranks, 8, 2000, "local", "hidden"),  # a decomposition a rank
        (16 * ranks, 15, 2000, "local", "gram"),
    ):
        h_a, h_b, weight = activations(n, h, d, torch.float32)
        options = Options(group="world", gradient="official", statistics=statistics)
        part = agreement.agree((own(h_a), own(h_b), weight), options, agreement.Shards(dist.group.WORLD))
        assert part.route == route, (n, h, d, part.route)


@check
def last_layer_sends_what_the_documentation_says() -> None:
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    n, h, d = 24 * ranks, 6, 50 * ranks
    for route in ("gram", "hidden"):
        h_a, h_b, weight = activations(n, h, d, torch.float32)
        inputs = own(h_a), own(h_b), weight.requires_grad_()
        with recorded() as forward:
            loss = linear_barlow_twins_loss(*inputs, route=route, group="world", gradient="official")
        with recorded() as backward:
            loss.backward()
        weights = ("all_reduce", torch.float64, 3 * ranks)
        if route == "gram":
            triangle = sum(torch_partial.panel_sizes(n))
            k = ("all_reduce", torch.float64 if n < torch_partial.FLOAT64_SAMPLES else torch.float32, triangle)
            assert [call for call in forward if call[0] != GATHER] == [k, k, ("all_reduce", torch.float64, 4)], forward
            assert backward == [weights, *[("all_to_all_single", torch.float32, n * h)] * 2], backward
        else:
            factors = (GATHER, torch.float64, 2 * h * h + h * h)
            basis = ("all_reduce", torch.float64, 2 * ranks * h * h + 2 * h * h + h * h)
            sums = [("all_reduce", torch.float64, size) for size in (2 * h * h, 2)]
            means = ("all_reduce", torch.float64, 2 * h)
            assert forward[1:] == [means, factors, basis, *sums], forward
            assert backward == [weights, ("all_reduce", torch.float64, 4 * h * h)], backward


# The backends of kernels, in Triton's interpreter or compiled for the CPU: asked for by name, as they take long


def kernels_equal_one_process(backend: str) -> None:
    """K in two panels, all conventions, unequal batches, and fewer features than a tile has."""
    for options in (ALL[0], ALL[3], ALL[6]):
        assert_equal_to_oracle(130, 270, torch.float32, 1e-5, *options, backend=backend)
        assert_equal_to_oracle(16, 7, torch.float32, 1e-5, "direct", *options[1:], backend=backend)
    for convention in NORMALIZATIONS.values():
        for route in ("gram", "direct"):
            for statistics in ("global", "local") if convention is not None else ("global",):
                arguments = (route, "lightly", statistics, convention, [5, 12])
                assert_equal_to_oracle(17, 100, torch.float32, 1e-5, *arguments, backend=backend)


def kernels_in_half_precision(backend: str) -> None:
    """Multiplied in float32 where they are small; as they are, and in several row tiles, in the second run."""
    from barlow_fused.backends.triton_kernels import configs

    for limit, one_tile in ((configs.FLOAT32_ELEMENTS, configs.ONE_TILE), (0, {32: configs.ONE_TILE[64]})):
        configs.FLOAT32_ELEMENTS, configs.ONE_TILE = limit, one_tile
        for options in (ALL[0], ALL[3], ALL[4], ALL[7]):
            assert_equal_to_oracle(40, 100, torch.bfloat16, 5e-3, *options, backend=backend)


def kernels_with_the_last_layer(backend: str) -> None:
    for route in ("gram", "direct"):
        for statistics in ("global", "local"):
            assert_last_layer_equals_oracle(
                17,
                8,
                100 if route == "gram" else 20,
                torch.float32,
                1e-5,
                route,
                "lightly",
                statistics,
                backend=backend,
            )


def kernels_do_not_take_float64(backend: str) -> None:
    z = torch.randn(4, 31, dtype=torch.float64)
    with raises(RuntimeError, "cannot take torch.float64"):
        barlow_twins_loss(z, z, backend=backend, group="world", gradient="official")


KERNEL_CHECKS = (
    kernels_equal_one_process,
    kernels_in_half_precision,
    kernels_with_the_last_layer,
    kernels_do_not_take_float64,
)
EMULATED = "BARLOW_FUSED_EMULATED"  # the path of the CUDA kernels compiled for the CPU


def kernel_checks(backend: str) -> dict[str, Callable[[], None]]:
    """The checks of a backend of kernels."""
    if backend == "cuda":
        from builds import load

        from barlow_fused.backends import cuda_backend

        cuda_backend.use(load(Path(os.environ[EMULATED])))
    return {f.__name__: functools.partial(f, backend) for f in KERNEL_CHECKS}


def run_checks(checks: dict[str, Callable[[], None]], path: Path) -> None:
    """On every rank: rank 0 writes what went wrong."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    results = {}
    for name, function in checks.items():
        try:
            function()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        results[name] = {rank: text for rank, text in enumerate(problems) if text is not None}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    folder, backend, *counts = sys.argv[1:]
    warnings.simplefilter("ignore")  # torch.distributed.nn is deprecated; the libraries use it
    for name in PATCHED:
        library(name)  # imported before the ranks part
    checks = CHECKS if backend == "torch" else kernel_checks(backend)
    for ranks in counts:
        forked.run(int(ranks), run_checks, checks, Path(folder, f"{ranks}.json"))


if __name__ == "__main__":
    main()
