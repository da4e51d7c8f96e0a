"""The public function and module: results, modes of PyTorch that they must work under, and what bad input gets."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import pickle

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, answer, error, inductor, oracle, views
from torch._subclasses.fake_tensor import FakeTensorMode

import barlow_fused
from barlow_fused import (
    BarlowTwinsLoss,
    BarlowTwinsTerms,
    Normalization,
    barlow_twins_loss,
    configure,
    cross_correlation,
)
from barlow_fused.arguments import Options
from barlow_fused.backends import torch_cpu

N, D = 33, 100


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


# The mathematics


def test_defaults_are_the_papers():
    z_a, z_b = views(N, D)
    ref = oracle(z_a, z_b, NORMALIZATIONS["batch_norm"], lambd=0.0051, scale=1.0)
    assert error(barlow_twins_loss(z_a, z_b), ref.loss) < 1e-6


def test_terms_make_up_the_loss():
    terms = barlow_twins_loss(*views(N, D), lambd=0.3, scale=7.0, return_terms=True)
    assert isinstance(terms, BarlowTwinsTerms)
    torch.testing.assert_close(terms.loss, 7.0 * (terms.on_diag + 0.3 * terms.off_diag))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (1, -2, 0.5)])
def test_each_term_is_differentiable(weights, route):
    z_a, z_b = (z.requires_grad_() for z in views(N, D, torch.float64))
    got, want = (
        gradients(sum(w * t for w, t in zip(weights, terms, strict=True)), z_a, z_b)
        for terms in (
            barlow_twins_loss(z_a, z_b, route=route, return_terms=True),
            barlow_twins_loss(z_a, z_b, backend="reference", return_terms=True),
        )
    )
    assert error(got[0], want[0]) < 1e-11
    assert error(got[1], want[1]) < 1e-11


@pytest.mark.parametrize("route", ROUTES)
def test_unchanged_by_a_scale_and_shift_of_each_feature(route):
    z_a, z_b = views(N, D, torch.float64)
    loss = functools.partial(barlow_twins_loss, route=route, eps=0.0)
    factor, shift = torch.rand(D).double() + 0.5, torch.randn(D).double()
    assert error(loss(z_a * factor + shift, z_b), loss(z_a, z_b)) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_unchanged_by_a_permutation_of_samples_or_features(route):
    z_a, z_b = views(N, D, torch.float64)
    loss = functools.partial(barlow_twins_loss, route=route)
    rows, columns = torch.randperm(N), torch.randperm(D)
    assert error(loss(z_a[rows], z_b[rows]), loss(z_a, z_b)) < 1e-12
    assert error(loss(z_a[:, columns], z_b[:, columns]), loss(z_a, z_b)) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_symmetric_in_the_views(route):
    z_a, z_b = views(N, D, torch.float64)
    loss = functools.partial(barlow_twins_loss, route=route, return_terms=True)
    ab, ba = answer(loss, z_a, z_b), answer(loss, z_b, z_a)
    assert error(ab.loss, ba.loss) < 1e-13
    assert error(ab.grad_a, ba.grad_b) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_is_orthogonal_to_what_the_normalisation_removes(route):
    """Adding a constant to a feature, or (eps = 0) scaling it, leaves the loss alone: the gradient has no such part."""
    z_a, z_b = (z.requires_grad_() for z in views(N, D, torch.float64))
    grad, _ = gradients(barlow_twins_loss(z_a, z_b, route=route, eps=0.0), z_a, z_b)
    centred = (z_a - z_a.mean(0)).detach()
    assert grad.sum(0).abs().max() < 1e-12 * grad.abs().max()
    assert (grad * centred).sum(0).abs().max() < 1e-12 * grad.abs().max()


def test_routes_agree():
    z_a, z_b = views(N, D, torch.float64)
    gram, direct = (answer(functools.partial(barlow_twins_loss, route=r, return_terms=True), z_a, z_b) for r in ROUTES)
    for x, y in zip(gram, direct, strict=True):
        assert error(x, y) < 1e-12


def test_cross_correlation():
    z_a, z_b = views(N, D)
    c = cross_correlation(z_a, z_b)
    assert c.shape == (D, D)
    terms = barlow_twins_loss(z_a, z_b, return_terms=True)
    assert error(terms.on_diag, (c.diagonal() - 1).square().sum()) < 1e-6
    assert error(terms.off_diag, c.square().sum() - c.diagonal().square().sum()) < 1e-5
    assert cross_correlation(z_a.bfloat16(), z_b.bfloat16()).dtype == torch.float32
    assert error(cross_correlation(z_a, z_b, normalization="none"), z_a.T @ z_b / N) < 1e-6


# PyTorch's modes


@pytest.mark.parametrize("route", ROUTES)
def test_same_input_same_bits(route):
    z_a, z_b = views(300, 700)
    first, second = (
        answer(functools.partial(barlow_twins_loss, route=route, return_terms=True), z_a, z_b) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_non_contiguous_and_expanded_inputs():
    z_a, z_b = views(N, D)
    want = answer(functools.partial(barlow_twins_loss, return_terms=True), z_a, z_b)
    for strided in (
        lambda z: z.T.contiguous().T,
        lambda z: torch.stack((z, z), 2)[..., 0],
        lambda z: torch.cat((z, z))[:N],
        lambda z: torch.cat((z, z), 1)[:, D:],
    ):
        got = answer(functools.partial(barlow_twins_loss, return_terms=True), strided(z_a), strided(z_b))
        for x, y in zip(got, want, strict=True):
            assert error(x, y) < 1e-6
    row, column = torch.randn(1, D), torch.randn(N, 1)
    for expanded in (row.expand(N, D), column.expand(N, D)):
        got = answer(functools.partial(barlow_twins_loss, return_terms=True), expanded, z_b)
        ref = oracle(expanded, z_b)
        assert error(got.loss, ref.loss) < 1e-5
        assert error(got.grad_b, ref.grad_b) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_only_one_view_needs_a_gradient(route):
    z_a, z_b = views(N, D, torch.float64)
    want = oracle(z_a, z_b)
    a, b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    assert error(gradients(barlow_twins_loss(a, z_b, route=route), a)[0], want.grad_a) < 1e-11
    assert error(gradients(barlow_twins_loss(z_a, b, route=route), b)[0], want.grad_b) < 1e-11


@pytest.mark.parametrize("route", ROUTES)
def test_the_two_views_may_be_one_tensor(route):
    z = views(N, D, torch.float64)[0].requires_grad_()
    (got,) = gradients(barlow_twins_loss(z, z, route=route), z)
    (want,) = gradients(barlow_twins_loss(z, z, backend="reference"), z)
    assert error(got, want) < 1e-11


def test_inference_mode_and_no_grad():
    z_a, z_b = (z.requires_grad_() for z in views(N, D))
    want = barlow_twins_loss(z_a, z_b).detach()
    with torch.no_grad():
        assert error(barlow_twins_loss(z_a, z_b), want) < 1e-6
    with torch.inference_mode():
        assert error(barlow_twins_loss(z_a, z_b), want) < 1e-6
        inside = z_a * 1
    with torch.no_grad():
        assert error(barlow_twins_loss(inside, z_b), want) < 1e-6


def test_nothing_is_saved_where_no_gradient_is_wanted(monkeypatch):
    wanted, forward = [], torch_cpu.forward

    def recorded(z_a, z_b, spec, need_grad, every_term):
        wanted.append(need_grad)
        return forward(z_a, z_b, spec, need_grad, every_term)

    monkeypatch.setattr(torch_cpu, "forward", recorded)
    z_a, z_b = views(N, D)
    barlow_twins_loss(z_a, z_b)
    z_a.requires_grad_()
    with torch.no_grad():
        barlow_twins_loss(z_a, z_b)
    barlow_twins_loss(z_a, z_b)
    assert wanted == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_autocast(route, dtype):
    """Under autocast a projector returns half precision; the loss accumulates in float32 and returns float32."""
    torch.manual_seed(0)
    projector = torch.nn.Linear(20, D)
    x_a, x_b = torch.randn(N, 20), torch.randn(N, 20)
    with torch.autocast("cpu", dtype=dtype):
        z_a, z_b = projector(x_a), projector(x_b)
        loss = barlow_twins_loss(z_a, z_b, route=route)
        full = barlow_twins_loss(z_a.float(), z_b.float(), route=route)  # float32 inputs stay float32
    assert z_a.dtype == dtype
    assert loss.dtype == torch.float32
    assert error(loss, oracle(z_a, z_b).loss) < 1e-6
    assert error(full, oracle(z_a, z_b).loss) < 1e-6
    loss.backward()
    assert projector.weight.grad.isfinite().all()


def test_grad_scaler():
    """A loss scale of 2^16 reaches float16 gradients without overflow, and unscaling gives the gradient back."""
    z_a, z_b = (z.requires_grad_() for z in views(N, D, torch.float16))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    grad, _ = gradients(scaler.scale(barlow_twins_loss(z_a, z_b)), z_a, z_b)
    assert error(grad.double() / 2**16, oracle(z_a, z_b).grad_a) < 5e-3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std", "none"])
def test_compile_without_graph_breaks(route, normalization):
    kwargs = {"route": route, "normalization": normalization, "return_terms": True}
    compiled = torch.compile(functools.partial(barlow_twins_loss, **kwargs), fullgraph=True, backend="aot_eager")
    z_a, z_b = views(N, D)
    got, want = answer(compiled, z_a, z_b), answer(functools.partial(barlow_twins_loss, **kwargs), z_a, z_b)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compile_with_dynamic_shapes():
    """Sizes, and the weights of a module, which dynamic=True makes symbols of."""
    barlow = BarlowTwinsLoss(lambd=0.02, scale=0.3)
    compiled = torch.compile(barlow, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, d in ((20, 60), (21, 77)):
        got, want = compiled(*views(n, d)), barlow(*views(n, d))
        torch.testing.assert_close(got, want)


@inductor
def test_compile_by_inductor_with_a_model_around():
    torch.manual_seed(0)
    model = torch.nn.Linear(20, D)
    barlow = BarlowTwinsLoss()

    def step(x_a, x_b):
        return barlow(model(x_a), model(x_b))

    x_a, x_b = torch.randn(N, 20), torch.randn(N, 20)
    want, (want_grad,) = step(x_a, x_b), gradients(step(x_a, x_b), model.weight)
    compiled = torch.compile(step, fullgraph=True)
    loss = compiled(x_a, x_b)
    (got_grad,) = gradients(loss, model.weight)
    assert error(loss, want) < 1e-6
    assert error(got_grad, want_grad) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_tensors_without_data(device, dtype, route):
    """Shapes, dtypes and devices are known."""
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext():
        where = "cpu" if device == "fake" else "meta"
        z_a, z_b = (torch.empty(300, 700, dtype=dtype, device=where, requires_grad=True) for _ in range(2))
        terms = barlow_twins_loss(z_a, z_b, route=route, return_terms=True)
        terms.loss.backward()
    assert all((t.shape, t.dtype, t.device.type) == ((), torch.float32, where) for t in terms)
    assert (z_a.grad.shape, z_a.grad.dtype, z_b.grad.device.type) == ((300, 700), dtype, where)


@pytest.mark.parametrize("route", ROUTES)
def test_func_grad(route):
    z_a, z_b = views(N, D, torch.float64)
    loss = functools.partial(barlow_twins_loss, route=route)
    got = torch.func.grad(loss, argnums=(0, 1))(z_a, z_b)
    want = oracle(z_a, z_b)
    assert error(got[0], want.grad_a) < 1e-11
    assert error(got[1], want.grad_b) < 1e-11


@pytest.mark.parametrize("route", ROUTES)
def test_double_backward_is_an_error(route):
    z_a, z_b = (z.requires_grad_() for z in views(N, D))
    grad = torch.autograd.grad(barlow_twins_loss(z_a, z_b, route=route), z_a, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"barlow_twins_loss has no second derivative.*backend='reference'"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="barlow_twins_loss has no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(barlow_twins_loss)(z, z_b).sum())(z_a.detach())


def test_inputs_are_not_modified():
    z_a, z_b = views(N, D)
    before = z_a.clone(), z_b.clone()
    for route in ROUTES:
        for normalization in ("batch_norm", "none"):
            loss = functools.partial(barlow_twins_loss, route=route, normalization=normalization, return_terms=True)
            answer(loss, z_a, z_b)
    assert torch.equal(z_a, before[0])
    assert torch.equal(z_b, before[1])


def test_the_loss_may_be_changed_in_place():
    z_a, z_b = (z.requires_grad_() for z in views(N, D))
    loss = barlow_twins_loss(z_a, z_b)
    loss /= 4
    (grad,) = torch.autograd.grad(loss, z_a)
    assert error(grad * 4, oracle(z_a, z_b).grad_a) < 1e-5


def test_an_input_changed_after_the_forward_pass_is_an_error():
    z_a, z_b = (z.requires_grad_() for z in views(N, D))
    a = z_a * 1
    loss = barlow_twins_loss(a, z_b)
    a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_nan_and_inf_reach_the_loss(route, value):
    z_a, z_b = views(N, D)
    z_a[3, 5] = value
    assert barlow_twins_loss(z_a, z_b, route=route).isnan()


# The module


def test_module_equals_function():
    z_a, z_b = views(N, D)
    kwargs = {"lambd": 0.02, "scale": 0.1, "normalization": "std", "eps": 1e-4, "route": "direct"}
    assert torch.equal(BarlowTwinsLoss(**kwargs)(z_a, z_b), barlow_twins_loss(z_a, z_b, **kwargs))
    assert isinstance(BarlowTwinsLoss(return_terms=True)(z_a, z_b), BarlowTwinsTerms)


def test_the_function_and_the_module_take_the_same_options():
    """Those of Options, in its order and with its defaults."""
    options = [(f.name, f.default) for f in dataclasses.fields(Options)]
    function = list(inspect.signature(barlow_twins_loss).parameters.values())
    module = list(inspect.signature(BarlowTwinsLoss).parameters.values())
    assert [(p.name, p.default) for p in function[2:]] == options
    assert [(p.name, p.default) for p in module] == options


def test_module_moves_copies_and_pickles():
    z_a, z_b = views(N, D)
    module = BarlowTwinsLoss(lambd=0.02, normalization=Normalization(1, 1e-3))
    want = module(z_a, z_b)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half().to("cpu").train()):
        assert torch.equal(other(z_a, z_b), want)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_module_repr():
    assert repr(BarlowTwinsLoss(lambd=0.02)) == (
        "BarlowTwinsLoss(lambd=0.02, scale=1, normalization='batch_norm', route='auto', backend='auto')"
    )


# Bad input

F = torch.float32
BAD_INPUTS = {
    "not a tensor": (lambda: ([[1.0]], torch.zeros(4, 3)), TypeError, "z_a must be a torch.Tensor, got list"),
    "integers": (
        lambda: (torch.zeros(4, 3, dtype=torch.int64),) * 2,
        TypeError,
        "z_a must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "complex": (
        lambda: (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.cfloat)),
        TypeError,
        "z_b must be float32.*complex64",
    ),
    "sparse": (lambda: (torch.zeros(4, 3).to_sparse(),) * 2, TypeError, r"z_a must be a dense \(strided\) tensor"),
    "1-D": (lambda: (torch.zeros(4), torch.zeros(4)), ValueError, r"z_a must be 2-D, .* got shape \(4,\)"),
    "3-D": (
        lambda: (torch.zeros(4, 3), torch.zeros(4, 3, 2)),
        ValueError,
        r"z_b must be 2-D, .* got shape \(4, 3, 2\)",
    ),
    "shapes": (lambda: (torch.zeros(4, 3), torch.zeros(4, 5)), ValueError, r"same shape, got \(4, 3\) and \(4, 5\)"),
    "dtypes": (
        lambda: (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float16)),
        TypeError,
        "same dtype, got torch.float32 and torch.float16",
    ),
    "devices": (
        lambda: (torch.zeros(4, 3), torch.zeros(4, 3, device="meta")),
        ValueError,
        "same device, got cpu and meta",
    ),
    "one sample": (lambda: (torch.zeros(1, 3),) * 2, ValueError, r"at least 2 samples \(N >= 2\), got N = 1"),
    "no samples": (lambda: (torch.zeros(0, 3),) * 2, ValueError, r"at least 2 samples \(N >= 2\), got N = 0"),
    "no features": (lambda: (torch.zeros(4, 0),) * 2, ValueError, r"at least 1 feature \(D >= 1\), got D = 0"),
}


@pytest.mark.parametrize(("inputs", "kind", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs(inputs, kind, message):
    for function in (barlow_twins_loss, BarlowTwinsLoss(), cross_correlation):
        with pytest.raises(kind, match=message):
            function(*inputs())


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"lambd": "0.1"}, TypeError, "lambd must be a float, got str"),
        ({"lambd": float("nan")}, ValueError, "lambd must be finite, got nan"),
        ({"scale": None}, TypeError, "scale must be a float, got NoneType"),
        ({"scale": True}, TypeError, "scale must be a float, got bool"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"normalization": "zca"}, ValueError, "normalization must be .* got 'zca'"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and >= 0"),
        ({"route": "scenic"}, ValueError, "route must be one of 'auto', 'gram', 'direct', got 'scenic'"),
        ({"backend": "jax"}, ValueError, "backend must be one of 'auto', 'torch', .* got 'jax'"),
    ],
)
def test_bad_arguments(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        barlow_twins_loss(*views(N, D), **kwargs)
    with pytest.raises(kind, match=message):
        BarlowTwinsLoss(**kwargs)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_backend_says_why_it_cannot_run(backend):
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run on cpu: "):
        barlow_twins_loss(*views(N, D), backend=backend)


def test_the_reference_has_no_gram_route():
    with pytest.raises(ValueError, match="route='gram' cannot run with backend='reference'"):
        barlow_twins_loss(*views(N, D), backend="reference", route="gram")
    with configure(route="gram"):  # a default is no demand
        barlow_twins_loss(*views(N, D), backend="reference")


def test_public_names():
    for name in barlow_fused.__all__:
        assert hasattr(barlow_fused, name)
    assert {"barlow_twins_loss", "BarlowTwinsLoss", "cross_correlation", "plan"} <= set(barlow_fused.__all__)


@pytest.mark.parametrize("route", ROUTES)
def test_what_float32_cannot_hold_is_infinite(route):
    """Not an error; gradients too come back."""
    z_a, z_b = views(16, 100)
    for normalization, factor, scale in (("none", 1e12, 1.0), ("batch_norm", 1.0, 1e38)):
        a = (z_a * factor).requires_grad_()
        loss = barlow_twins_loss(a, z_b * factor, normalization=normalization, scale=scale, route=route)
        assert not loss.isfinite()
        loss.backward()
        assert a.grad.shape == a.shape


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(16, 100), (70, 2048)])
def test_results_are_where_the_inputs_are_whatever_the_default_device(route, shape):
    z_a, z_b = views(*shape)
    want = answer(functools.partial(barlow_twins_loss, route=route, return_terms=True), z_a, z_b)
    with torch.device("meta"):
        got = answer(functools.partial(barlow_twins_loss, route=route, return_terms=True), z_a, z_b)
    assert all(error(x, y) < 1e-6 for x, y in zip(got, want, strict=True))
