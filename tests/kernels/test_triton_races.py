"""Triton's programs in random order, by turns, and searched for races: pytest --kernels interpreter.

BARLOW_RACE_SEEDS=100 tries that many seeds.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
import triton_races
from cases import ROUTES, answer, views

from barlow_fused.backends import triton_backend
from barlow_fused.backends.triton_kernels.shares import Cut

SEEDS = int(os.environ.get("BARLOW_RACE_SEEDS", "2"))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("route", ROUTES)
def test_any_order_gives_the_same_bits(fused, route, seed, monkeypatch):
    """Tickets decide who does the rest of the work, never the order of additions."""
    n, d, dtype = 33, 70, (torch.float32, torch.bfloat16)[seed % 2]
    cuts = Cut(1, 1, 8), Cut(2, 3, 1)
    monkeypatch.setattr(triton_backend, "shares", lambda *_: cuts)
    z_a, z_b = views(n, d, dtype)
    want = answer(fused(route=route), z_a, z_b)
    with triton_races.interleaved(seed):
        got = answer(fused(route=route), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_two_phases(fused):
    """Chunks of rows, whose moments another launch combines."""
    with triton_races.interleaved(0):
        fused(route="direct")(*views(150, 33))


def test_grams_tickets_are_needed(fused, monkeypatch):
    """Relaxed ones order nothing: the last program reads the others' tiles too early."""
    update = triton_races.Memory.update
    relaxed = triton_races.Sem.RELAXED
    monkeypatch.setattr(
        triton_races.Memory, "update", lambda self, program, address, sem: update(self, program, address, relaxed)
    )
    with pytest.raises(Exception, match="and nothing orders them"), triton_races.interleaved(0):
        fused(route="gram")(*views(33, 70))


@triton.jit
def add_all(x, out, counter, fault: tl.constexpr):
    """Every program leaves a number, the last one to draw a ticket adds them."""
    program = tl.program_id(0)
    if fault == "early ticket":
        ticket = tl.atomic_add(counter, 1, sem="acq_rel")
        tl.store(x + program, 1.0)
    elif fault == "relaxed":
        tl.store(x + program, 1.0)
        ticket = tl.atomic_add(counter, 1, sem="relaxed")
    elif fault == "one place":
        tl.store(x, 1.0)
        ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    else:
        tl.store(x + program, 1.0)
        ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    if ticket == 3:
        tl.store(out, tl.sum(tl.load(x + tl.arange(0, 4)), 0))


@pytest.mark.parametrize("fault", ["nothing", "early ticket", "relaxed", "one place"])
@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_reported(fault, seed):
    x, out, counter = torch.full((4,), torch.nan), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with triton_races.interleaved(seed):
        if fault == "nothing":
            add_all[(4,)](x, out, counter, fault)
            assert out.item() == 4
        else:
            with pytest.raises(Exception, match="and nothing orders them"):
                add_all[(4,)](x, out, counter, fault)
