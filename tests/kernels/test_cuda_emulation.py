"""The CUDA kernels, compiled for the CPU, against the float64 oracle: every test runs as on an Ampere GPU, and those of
half precision once more with Hopper's kernels. Nothing here needs a GPU or nvcc.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import sys

import builds
import cases
import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, assert_close, views
from kernel_checks import *  # noqa: F403 - the tests that hold for any kernels

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import cuda_backend, why_unusable
from barlow_fused.backends.triton_kernels import configs

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
OF_HALVES = (  # tests that have no parameter for it
    "test_correlate_takes_the_centred_form_where_means_are_large",
    "test_same_bits_with_and_without_gradient_and_torch_compile",
    "test_the_four_operations_keep_their_contract",
)
MODULE = "BARLOW_FUSED_EMULATED"  # a path: the module to test in a process of its own


@pytest.fixture(scope="session")
def module():
    """The kernels."""
    return builds.load(pathlib.Path(os.environ.get(MODULE) or builds.emulated()))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def kernels(request, module, monkeypatch):
    """The backend on an emulated GPU of 8 multiprocessors, which multiplies also small halves as they are."""
    dtype = request.node.callspec.params.get("dtype")
    if request.param == 90 and dtype not in HALVES and request.function.__name__ not in OF_HALVES:
        pytest.skip("float32 takes the same kernels on every GPU")
    monkeypatch.setattr(configs, "FLOAT32_ELEMENTS", 0)
    for half in HALVES:  # the rounding of so few elements does not average out
        monkeypatch.setitem(cases.TOLERANCE, half, (5e-4, 5e-3))
    module.emulate(request.param, 8)
    cuda_backend.use(module)
    yield cuda_backend
    cuda_backend.use(None)


@pytest.fixture
def fused(kernels):
    """The loss with these kernels."""
    return lambda **kwargs: functools.partial(barlow_twins_loss, backend="cuda", return_terms=True, **kwargs)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(16, 64), (17, 100), (70, 150)])
def test_small_halves_keep_the_tolerance(fused, n, d, dtype, route, monkeypatch):
    """They are multiplied in float32, as configs.FLOAT32_ELEMENTS says."""
    monkeypatch.undo()
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(fused(route=route), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("route", ROUTES)
def test_float32_obeys_pytorchs_switch(fused, route, precision, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
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


def test_who_may_run_it(module):
    cuda_backend.use(module)
    try:
        assert why_unusable("cuda", CPU) is None
        assert "compiled for the CPU" in why_unusable("cuda", torch.device("cuda", 0))
        assert "float64" in why_unusable("cuda", CPU, torch.float64)
        with pytest.raises(TypeError, match=r"backend='cuda' takes float32, .* got torch.float64"):
            cuda_backend.normalize(*views(4, 3, torch.float64), None)
    finally:
        cuda_backend.use(None)
    assert "it needs a CUDA GPU" in why_unusable("cuda", CPU)


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
        x = cuda_backend.normalize(z, z, None)
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
            **cuda_backend._forward(x, cuda_backend.empty_terms(z), 0.1, 1.0),
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


@pytest.mark.skipif(MODULE in os.environ, reason="runs in the outer process")
def test_under_the_sanitizers():
    """A part of the tests above with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""
    compiler = builds.tool("c++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        MODULE: str(builds.emulated(sanitize=True)),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    part = "(over_shapes and (33-100 or 65-130)) or (over_conventions and 17-100) or non_contiguous"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x", "-k", part]
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
