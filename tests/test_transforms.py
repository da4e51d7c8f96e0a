"""What of PyTorch's transforms works, and what is refused by a sentence: the table of docs/pytorch.md."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from cases import views
from torch.fx.experimental.proxy_tensor import make_fx

from barlow_fused import BarlowTwinsLoss, barlow_twins_loss

# PyTorch's own forward mode scripts its decompositions on the first use, in any process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
N, D = 16, 40
Z_B = views(N, D)[1]
BATCHED = "cannot be batched by torch.vmap"
FORWARD = "no forward-mode derivative"


def loss_of(z_a):
    return barlow_twins_loss(z_a, Z_B)


def value_of(z_a, z_b):
    return barlow_twins_loss(z_a, z_b)


def grad_of(z_a, z_b):
    z_a = z_a.detach().requires_grad_()
    return torch.autograd.grad(barlow_twins_loss(z_a, z_b), z_a)[0]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx(mode):
    z_a, z_b = views(N, D)
    other = views(N, D, seed=1)
    for f in (value_of, grad_of):
        torch.testing.assert_close(make_fx(f, tracing_mode=mode)(z_a, z_b)(*other), f(*other))


def test_make_fx_of_real_tensors_says_what_to_do():
    with pytest.raises(RuntimeError, match="tracing_mode='symbolic'"):
        make_fx(value_of)(*views(N, D))


def test_export():
    exported = torch.export.export(BarlowTwinsLoss(), views(N, D)).module()
    other = views(N, D, seed=1)
    torch.testing.assert_close(exported(*other), barlow_twins_loss(*other))


FUNCTIONS = {
    "torch.func.grad": lambda z: torch.func.grad(loss_of)(z),
    "torch.func.vjp": lambda z: torch.func.vjp(loss_of, z)[1](torch.ones(()))[0],
    "torch.autograd.functional.jacobian": lambda z: torch.autograd.functional.jacobian(loss_of, z),
}


@pytest.mark.parametrize("gradient", FUNCTIONS.values(), ids=FUNCTIONS)
def test_reverse_mode(gradient):
    z_a, z_b = views(N, D)
    torch.testing.assert_close(gradient(z_a), grad_of(z_a, z_b))


def forward_ad(z):
    with torch.autograd.forward_ad.dual_level():
        loss_of(torch.autograd.forward_ad.make_dual(z, z))


def forward_ad_of_both(z):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, z)
        barlow_twins_loss(dual, dual)


def forward_ad_with_gradient(z):
    with torch.autograd.forward_ad.dual_level():
        loss_of(torch.autograd.forward_ad.make_dual(z.requires_grad_(), z.detach()))


def batched_gradients(z):
    torch.autograd.grad(loss_of(z.requires_grad_()), z, torch.ones(3), is_grads_batched=True)


def stacked(f):
    return lambda z: torch.vmap(f)(z.expand(3, N, D))


def jit_trace(z):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(loss_of, z)


REFUSED = {
    "torch.vmap": (stacked(loss_of), NotImplementedError, BATCHED),
    "torch.vmap of torch.func.grad": (stacked(torch.func.grad(loss_of)), NotImplementedError, BATCHED),
    "torch.func.jacrev": (torch.func.jacrev(loss_of), NotImplementedError, BATCHED),
    "is_grads_batched": (batched_gradients, NotImplementedError, BATCHED),
    "torch.func.jacfwd": (torch.func.jacfwd(loss_of), NotImplementedError, FORWARD),
    "torch.func.hessian": (torch.func.hessian(loss_of), NotImplementedError, FORWARD),
    "torch.func.jvp": (lambda z: torch.func.jvp(loss_of, (z,), (z,)), NotImplementedError, FORWARD),
    "torch.autograd.forward_ad": (forward_ad, NotImplementedError, FORWARD),
    "torch.autograd.forward_ad of both views": (forward_ad_of_both, NotImplementedError, FORWARD),
    "torch.autograd.forward_ad, requires_grad": (forward_ad_with_gradient, NotImplementedError, FORWARD),
    "torch.jit.trace": (jit_trace, RuntimeError, "would record the loss of this batch as a constant"),
    "torch.fx.symbolic_trace": (torch.fx.symbolic_trace, TypeError, "z_a must be a torch.Tensor, got Proxy"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error, message):
    argument = BarlowTwinsLoss() if call is torch.fx.symbolic_trace else views(N, D)[0]
    with pytest.raises(error, match=re.escape(message)):
        call(argument)


def test_the_reference_can_be_batched_and_differentiated_forwards():
    z_a, z_b = views(N, D)

    def loss(z):
        return barlow_twins_loss(z, z_b, backend="reference")

    want = loss(z_a)
    torch.testing.assert_close(torch.vmap(loss)(z_a.expand(3, N, D)), want.expand(3))
    torch.testing.assert_close(torch.func.jacrev(loss)(z_a), grad_of(z_a, z_b))
    forward = torch.func.jvp(loss, (z_a,), (z_b,))[1]
    torch.testing.assert_close(forward, (grad_of(z_a, z_b) * z_b).sum(), check_dtype=False)


def test_a_call_beside_forward_mode():
    """What has no tangent is computed, also while others have."""
    z_a = views(N, D)[0]
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(z_a.clone(), z_a)
        torch.testing.assert_close(loss_of(z_a), barlow_twins_loss(z_a, Z_B, backend="reference"))


class Subclass(torch.Tensor):
    pass


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_subclasses_modes_functional_call_and_checkpointing():
    z_a, z_b = views(N, D)
    want = loss_of(z_a)
    torch.testing.assert_close(loss_of(z_a.as_subclass(Subclass)).as_subclass(torch.Tensor), want)
    with Mode():
        torch.testing.assert_close(loss_of(z_a), want)
    torch.testing.assert_close(torch.func.functional_call(BarlowTwinsLoss(), {}, (z_a, z_b)), want)
    torch.utils.checkpoint.checkpoint(loss_of, leaf := z_a.clone().requires_grad_(), use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, grad_of(z_a, z_b))


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_tensors_are_refused(kind):
    z_a, z_b = (z.to_sparse() if kind == "sparse" else z.to(torch.complex64) for z in views(N, D))
    with pytest.raises(TypeError, match="z_a must be"):
        barlow_twins_loss(z_a, z_b)


def test_float64_holds_far_larger_values():
    z_a, z_b = views(N, D, torch.float64)
    torch.testing.assert_close(barlow_twins_loss(1e150 * z_a, 1e150 * z_b), barlow_twins_loss(z_a, z_b, eps=1e-30))


NESTED = {"strided": torch.strided, "jagged": torch.jagged}


@pytest.mark.parametrize("layout", NESTED.values(), ids=NESTED)
def test_nested_tensors_are_refused(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z_a, z_b = (torch.nested.nested_tensor(list(views(N, D)), layout=layout) for _ in range(2))
    with pytest.raises(TypeError, match=r"z_a must be a dense \(strided\) tensor, got a nested tensor"):
        barlow_twins_loss(z_a, z_b)


@pytest.mark.parametrize("scale", [1e16, 1e18, 1e20, 1e30])
@pytest.mark.parametrize(("n", "d", "route"), [(16, 200, "gram"), (16, 200, "direct"), (300, 64, "direct")])
def test_a_variance_that_float32_cannot_hold_is_nan_and_never_a_wrong_number(n, d, route, scale):
    z_a, z_b = views(n, d)
    got = barlow_twins_loss(scale * z_a, scale * z_b, route=route)
    want = barlow_twins_loss(z_a.double(), z_b.double(), eps=1e-30, backend="reference")
    assert got.isnan() or got.item() == pytest.approx(want.item(), rel=1e-4)
    assert not got.isnan() or scale > 1e17


def test_every_row_of_the_table_is_tested_here():
    page = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    for name in [*FUNCTIONS, *(name for name in REFUSED if name.startswith("torch.") and "," not in name)]:
        assert all(f"`{word}`" in page for word in re.findall(r"torch\.[\w.]+", name)), name
