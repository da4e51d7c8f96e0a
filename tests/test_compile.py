"""torch.compile: strides, one tensor twice, a λ that changes, sizes that change, and the operators' own promises."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import answer, error, inductor, views

from barlow_fused import BarlowTwinsLoss, barlow_twins_loss
from barlow_fused.backends.operations import Spec
from barlow_fused.function import _flatten
from barlow_fused.normalization import CONVENTIONS

SHAPES = [(16, 100), (40, 30), (70, 2048)]  # one slab, N above D, and several slabs
STRIDES = {
    "rows": lambda z: z,
    "columns": lambda z: z.T.contiguous().T,
    "every other": lambda z: torch.stack((z, z), 2)[..., 0],
    "part of wider rows": lambda z: torch.cat((z, z), 1)[:, z.shape[1] :],
    "one sample": lambda z: z[:1].expand(z.shape),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()  # or the limit of recompilations is reached


def as_strided(z: torch.Tensor, name: str) -> torch.Tensor:
    return STRIDES[name](z).detach().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("strides", STRIDES)
def test_the_operators_keep_what_their_fakes_promise(strides, n, d, dtype):
    """opcheck: shapes, strides and dtypes of forward and backward, real and fake; nothing is aliased or written."""
    z_a, z_b = views(n, d, dtype)
    a, b = STRIDES[strides](z_a).detach(), z_b
    for route, convention in itertools.product(("gram", "direct") if d < 2000 else ("gram",), CONVENTIONS.values()):
        options = _flatten(Spec("torch", route, convention, 0.1, 2.0))
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.barlow_fused.forward, (a, b, True, *options), test_utils=tests)
        loss, _, _, saved = torch.ops.barlow_fused.forward(a, b, True, *options)
        grads = (torch.ones_like(loss), None, None)
        for needs in ((True, True), (True, False)):
            arguments = (a, b, saved, *grads, *needs, *options)
            torch.library.opcheck(torch.ops.barlow_fused.backward, arguments, test_utils=tests)


@inductor
@pytest.mark.parametrize("strides", ["columns", "part of wider rows"])
@pytest.mark.parametrize(("n", "d"), [(16, 100), (100, 16)])
def test_any_strides_by_inductor(strides, n, d):
    z_a, z_b = views(n, d)
    compiled = torch.compile(BarlowTwinsLoss(), fullgraph=True)
    got, want = as_strided(z_a, strides), z_a.clone().requires_grad_()
    compiled(got, z_b).backward()
    barlow_twins_loss(want, z_b).backward()
    assert error(got.grad, want.grad) < 1e-5


@pytest.mark.parametrize("mode", [{}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize(("strides", "twice"), [("rows", True), ("columns", False)])
def test_a_schedule_of_lambda_and_of_sizes(mode, strides, twice):
    """As an attribute and as an argument; both views may be one tensor."""
    module = BarlowTwinsLoss()
    by_attribute = torch.compile(lambda a, b: module(a, b), fullgraph=True, backend="aot_eager", **mode)
    by_argument = torch.compile(barlow_twins_loss, fullgraph=True, backend="aot_eager", **mode)
    for i, n in enumerate((8, 8, 8, 12, 16)):
        lambd = 0.01 * (i + 1)
        z_a, z_b = views(n, 64)
        module.lambd = lambd
        for compiled in (by_attribute, functools.partial(by_argument, lambd=lambd)):
            got, want = as_strided(z_a, strides), z_a.clone().requires_grad_()
            compiled(got, got if twice else z_b).backward()
            barlow_twins_loss(want, want if twice else z_b, lambd).backward()
            assert error(got.grad, want.grad) < 1e-5


@inductor
def test_reduce_overhead_and_a_schedule_of_lambda():
    z_a, z_b = views(16, 64)
    module = BarlowTwinsLoss(return_terms=True)
    compiled = torch.compile(lambda a, b: module(a, b), fullgraph=True, mode="reduce-overhead")
    for module.lambd in (0.1, 0.2, 0.3):
        got = answer(compiled, z_a, z_b)
        want = answer(functools.partial(barlow_twins_loss, lambd=module.lambd, return_terms=True), z_a, z_b)
        assert all(error(x, y) < 1e-5 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["lambd", "scale"])
def test_a_symbol_that_is_not_finite_is_named(name):
    compiled = torch.compile(barlow_twins_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    z_a, z_b = views(8, 64)
    for value in (0.1, 0.2, 0.3):
        compiled(z_a, z_b, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be finite, got inf"):
        compiled(z_a, z_b, **{name: float("inf")})
