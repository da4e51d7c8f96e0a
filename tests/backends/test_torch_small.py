"""The torch backend for small inputs on CPUs: how few operators it takes, and what it must not lose by that."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, views
from tracing import Trace

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import torch_small


def loss(route, normalization="batch_norm"):
    return functools.partial(barlow_twins_loss, route=route, normalization=normalization, return_terms=True)


@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("route", ROUTES)
def test_operators_are_few(route, normalization):
    """Calls cost more than bytes there. The usual implementation computes with 11 and 25, whose means and batch norms
    are several."""
    z = [z.requires_grad_() for z in views(32, 128)]
    with Trace() as forward:
        value = barlow_twins_loss(*z, route=route, normalization=normalization)
    with Trace() as backward:
        torch.autograd.grad(value, z)
    more = 10 if normalization == "std" else 0
    assert len(forward.operators) <= 37 + more, forward.operators
    assert len(backward.operators) <= 18 + more, backward.operators


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("value", [0.1, 1234.567, 1e6])
def test_what_rounding_leaves_of_constant_features(value, normalization, route):
    """Of a large one two means leave a little, which standardising would make large; a third takes it off."""
    z_a, z_b = views(63, 200)
    z_a[:, ::3], z_b[:, ::5] = value, value
    assert_close(answer(loss(route, normalization), z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [3, 5, 37])
@pytest.mark.parametrize("value", [1.0, 1.1, 1234.567])
def test_constants_stay_constant_wherever_they_lie(value, n, route):
    """Vectors and what is left of a row are computed by other instructions."""
    z_a, z_b = torch.full((n, 1), value), torch.full((n, 1), 0.9 * value)
    got = loss(route, "std")(z_a, z_b, lambd=0.0)
    assert abs(got.loss - 1) < 1e-6


@pytest.mark.parametrize(("n", "d"), [(8, 4096), (32, 1024), (32, 3000), (500, 40), (2000, 300)])
def test_a_sample_far_from_all_others(n, d):
    z_a, z_b = views(n, d)
    z_a[0] += 300 * torch.randn(d, generator=torch.Generator().manual_seed(n))
    assert_close(answer(loss("auto"), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("deviations", [3.9, 4.1, 30.0])
def test_means_near_and_far(deviations, route):
    """What rounding leaves of a mean is taken off where it would show."""
    z_a, z_b = ((z - z.mean(0)) / z.std(0) + deviations for z in views(200, 300))
    assert_close(answer(loss(route), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


def test_where_it_ends():
    """Inputs in half precision would take twice their room to keep."""
    assert torch_small.keeps(1024, 1024, torch.float32)
    assert not torch_small.keeps(1024, 1025, torch.float64)
    assert torch_small.keeps(128, 1024, torch.bfloat16)
    assert not torch_small.keeps(129, 1024, torch.float16)


FAULTS = """
import resource
import torch
from barlow_fused import barlow_twins_loss

z = [torch.randn(8192, 128, requires_grad=True) for _ in range(2)]
for call in range(60):
    if call == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.autograd.grad(barlow_twins_loss(*z), z)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 40)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_a_call_takes_no_fresh_pages():
    """Nothing larger is freed in that process, so by itself malloc would give back all memory after each call."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500  # 16 MB of views and gradients are 4000 pages
