"""What holds for the CUDA kernels beyond test_kernels.py, compiled for the CPU. Nothing here needs a GPU or nvcc."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import ROUTES, answer, views

from barlow_fused.backends import accelerator, cuda_backend, why_unusable

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
