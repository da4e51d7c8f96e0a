"""The loss with the last layer in it, against float64 autograd through z = h W^T, over routes and ways to compute."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import NORMALIZATIONS, error, inductor

import barlow_fused
from barlow_fused import LinearBarlowTwinsLoss, barlow_twins_loss, linear_barlow_twins_loss
from barlow_fused.backends import accelerator, torch_partial, torch_whole
from barlow_fused.linear import chunks, hidden
from barlow_fused.linear import passes as passes_module
from barlow_fused.linear.route import choose_linear_route
from barlow_fused.reference import reference_loss

ROUTES = ("gram", "direct", "hidden")
WAYS = ("for caches", "for accelerators")
BATCH_NORM = NORMALIZATIONS["batch_norm"]
SHAPES = [(2, 3, 5), (64, 16, 200), (100, 70, 333), (64, 128, 1000), (300, 20, 100), (32, 100, 20), (140, 33, 4097)]
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (2e-3, 2e-2),  # where z is rounded, as nn.Linear's
    torch.float16: (5e-4, 5e-3),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """As on CPUs, in slabs; or as on accelerators, in chunks, here of a few features."""
    if request.param == "for accelerators":
        real = passes_module.passes
        monkeypatch.setattr(
            passes_module,
            "passes",
            lambda spec, device: chunks.Passes(spec.backend) if spec.route != "hidden" else real(spec, device),
        )
        monkeypatch.setattr(torch_partial, "for_caches", lambda device: False)
        monkeypatch.setattr(torch_whole, "CHUNK_BYTES", 2**18)
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**18)
        monkeypatch.setattr(hidden, "SLAB_ELEMENTS", 2**15)
    return request.param


def tensors(n, h, d, dtype=torch.float32, difference=0.4, seed=0):
    """Two views' rectified activations, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    shared, *own = (torch.randn(n, h, generator=generator) for _ in range(3))
    weight = torch.randn(d, h, generator=generator) / h**0.5
    views = ((shared + difference * x).relu() for x in own)
    return [x.to(dtype) for x in (*views, weight)]


def truth(h_a, h_b, weight, convention=BATCH_NORM, lambd=0.0051):
    """The terms and the gradients, in float64."""
    inputs = [x.detach().double().requires_grad_() for x in (h_a, h_b, weight)]
    terms = reference_loss(inputs[0] @ inputs[2].T, inputs[1] @ inputs[2].T, lambd, 1.0, convention)
    return [t.detach() for t in terms], torch.autograd.grad(terms.loss, inputs)


def got(h_a, h_b, weight, **options):
    inputs = [x.detach().requires_grad_() for x in (h_a, h_b, weight)]
    terms = linear_barlow_twins_loss(*inputs, return_terms=True, **options)
    return [t.detach() for t in terms], torch.autograd.grad(terms.loss, inputs)


def sizes(h_a, h_b, weight, convention):
    """How large the gradients' parts are before the standardisation takes most of them out: few samples alone."""
    if convention is None or len(h_a) > 3:
        return (0.0, 0.0, 0.0)
    _, grads = truth(h_a, h_b, weight, None)
    return tuple(float(g.norm()) for g in grads)


def check(inputs, convention=BATCH_NORM, tolerance=None, **options):
    loss_tolerance, grad_tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    want, wanted = truth(*inputs, convention)
    is_, grads = got(*inputs, normalization=convention or "none", **options)
    few = len(inputs[2]) if len(inputs[0]) <= 3 else 0
    for name, x, ref in zip(("loss", "on_diag", "off_diag"), is_, want, strict=True):
        assert error(x, ref, at_least=few) < loss_tolerance, name
    of_parts = sizes(*inputs, convention)
    for name, x, ref, size, of in zip(("h_a", "h_b", "weight"), grads, wanted, of_parts, inputs, strict=True):
        assert x.shape == of.shape
        assert x.dtype == of.dtype
        assert error(x, ref, at_least=size) < grad_tolerance, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "h", "d"), SHAPES)
@pytest.mark.usefixtures("way")
def test_accuracy(n, h, d, route, dtype, normalization):
    if route == "gram" and 2 * n > d:
        pytest.skip("where Gram's difference loses digits by design")
    tolerance = TOLERANCE[dtype]
    if dtype == torch.float32 and n > d > h:  # C of rank H: the layer and the loss by themselves are at 2.6e-6
        tolerance = tolerance[0], 4e-6
    check(tensors(n, h, d, dtype), normalization, tolerance, route=route, backend="torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_half_precision(route, dtype):
    check(tensors(64, 48, 600, dtype), route=route, backend="torch")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.usefixtures("way")
def test_chunks_of_any_size(route, chunk):
    check(tensors(40, 12, 130), route=route, backend="torch", chunk_features=chunk)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
@pytest.mark.usefixtures("way")
def test_gradients_that_are_not_needed(route, needs):
    inputs = tensors(40, 12, 130, torch.float64)
    _, wanted = truth(*inputs)
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    loss = linear_barlow_twins_loss(*inputs, route=route, backend="torch")
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for x, want, need in zip(inputs, wanted, needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert error(x.grad, want) < 1e-11


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_one_view_given_twice(route):
    h, _, weight = tensors(40, 12, 130, torch.float64)
    _, (of_a, of_b, of_weight) = truth(h, h, weight)
    h.requires_grad_(), weight.requires_grad_()
    grads = torch.autograd.grad(linear_barlow_twins_loss(h, h, weight, route=route, backend="torch"), (h, weight))
    assert error(grads[0], of_a + of_b) < 1e-11
    assert error(grads[1], of_weight) < 1e-11


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_strides(route):
    h_a, h_b, weight = tensors(40, 12, 130)
    wide = torch.zeros(130, 24)
    wide[:, ::2] = weight
    inputs = h_a.T.contiguous().T, h_b[:, torch.arange(12)].T.contiguous().T, wide[:, ::2]
    check(inputs, route=route, backend="torch")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_gradcheck(route):
    inputs = [x.requires_grad_() for x in tensors(7, 3, 9, torch.float64)]
    loss = functools.partial(linear_barlow_twins_loss, route=route, backend="torch", lambd=0.3, chunk_features=4)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("difference", [0.0, 1e-3])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_views_that_are_nearly_equal(route, difference):
    inputs = tensors(64, 24, 1000, difference=difference)
    want, wanted = truth(*inputs)
    is_, grads = got(*inputs, route=route, backend="torch")
    assert error(is_[2], want[2]) < 1e-6
    for x, ref in zip(grads, wanted, strict=True):
        assert error(x, ref) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_what_has_no_variance(route, normalization, dtype):
    """Dead and constant hidden units, equal rows of the weight, rows that are zero or in the null space of h."""
    h_a, h_b, weight = tensors(64, 24, 1000, dtype)
    h_a[:, 3], h_b[:, 3], h_a[:, 7] = 0, 0, 5.0  # dead; constant
    h_a[:, 5], h_b[:, 5] = h_a[:, 4], h_b[:, 4]  # the same twice
    weight[10] = weight[11]
    weight[12] = weight[13] * (1 + 1e-6)
    weight[14] = 0
    weight[15], weight[15, 3] = 0, 1.0  # of the dead unit alone
    weight[16], weight[16, 4], weight[16, 5] = 0, 1.0, -1.0  # of the difference of two that are equal
    tolerance = (1e-12, 1e-10) if dtype == torch.float64 else (1e-6, 4e-6)
    check((h_a, h_b, weight), NORMALIZATIONS[normalization], tolerance, route=route, backend="torch")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_activations_with_large_means(route, mean):
    h_a, h_b, weight = tensors(64, 24, 1000)
    check((h_a + mean, h_b - mean, weight), tolerance=(1e-6, 4e-6), route=route)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_what_is_not_finite_reaches_the_loss(route, where, bad):
    inputs = tensors(40, 12, 130)
    inputs[where][5, 5] = bad
    assert not linear_barlow_twins_loss(*inputs, route=route, backend="torch").isfinite()


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_input_gives_the_same_bits(route):
    inputs = tensors(64, 24, 3000)
    first, second = (got(*inputs, route=route) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("route", ROUTES)
def test_transforms(route):
    inputs = tensors(40, 12, 130, torch.float64)
    _, wanted = truth(*inputs)
    loss = functools.partial(linear_barlow_twins_loss, route=route)
    for x, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), wanted, strict=True):
        assert error(x, want) < 1e-11
    with torch.inference_mode():
        assert not loss(*inputs).requires_grad
    again = [x.clone().requires_grad_() for x in inputs]
    (grad,) = torch.autograd.grad(loss(*again), again[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(loss)(*(x[None] for x in inputs))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("way")
def test_the_operators_keep_what_their_fakes_promise(route):
    from barlow_fused.backends.operations import Spec
    from barlow_fused.function import _flatten

    for dtype, convention in ((torch.float32, BATCH_NORM), (torch.bfloat16, None)):
        inputs = tensors(20, 6, 50, dtype)
        options = _flatten(Spec("torch", route, convention, 0.1, 2.0, 16))
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.barlow_fused.linear_forward, (*inputs, True, *options), test_utils=tests)
        loss, _, _, saved = torch.ops.barlow_fused.linear_forward(*inputs, True, *options)
        arguments = (*inputs, saved, torch.ones_like(loss), None, None, True, False, True, *options)
        torch.library.opcheck(torch.ops.barlow_fused.linear_backward, arguments, test_utils=tests)


@inductor
@pytest.mark.parametrize("route", ROUTES)
def test_compiled_without_a_graph_break(route):
    layer = torch.nn.Linear(5, 12)
    barlow = LinearBarlowTwinsLoss(12, 130, route=route)

    def step(x_a, x_b):
        return barlow(layer(x_a).relu(), layer(x_b).relu())

    inputs = torch.randn(40, 5), torch.randn(40, 5)
    parameters = [*layer.parameters(), *barlow.parameters()]
    plain = torch.autograd.grad(step(*inputs), parameters)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), parameters)
    for x, want in zip(compiled, plain, strict=True):
        assert error(x, want) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_as_a_linear_layer_has_it(route):
    inputs = [x.requires_grad_() for x in tensors(64, 48, 600)]
    want, wanted = truth(*(x.bfloat16() for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_barlow_twins_loss(*inputs, route=route)
    grads = torch.autograd.grad(loss, inputs)
    assert loss.dtype == grads[0].dtype == torch.float32
    assert error(loss, want[0]) < 2e-3
    for x, ref in zip(grads, wanted, strict=True):
        assert error(x, ref) < 2e-2


def test_the_terms_are_differentiable():
    inputs = [x.requires_grad_() for x in tensors(40, 12, 130, torch.float64)]
    weight = inputs[2]
    z = [x @ weight.T for x in inputs[:2]]
    for term in ("on_diag", "off_diag"):
        want = torch.autograd.grad(
            getattr(barlow_twins_loss(*z, backend="reference", return_terms=True), term), inputs, retain_graph=True
        )
        for route in ROUTES:
            terms = linear_barlow_twins_loss(*inputs, route=route, return_terms=True)
            for x, ref in zip(torch.autograd.grad(getattr(terms, term), inputs), want, strict=True):
                assert error(x, ref) < 1e-11


# The choice


@pytest.mark.parametrize(
    ("n", "h", "d", "backend", "want"),
    [
        *[(64, 16, 1000, "auto", "hidden"), (64, 32, 1000, "torch", "hidden"), (64, 33, 1000, "auto", "gram")],
        *[(64, 64, 100, "auto", "direct"), (64, 16, 1000, "triton", "gram"), (64, 16, 1000, "reference", "direct")],
    ],
)
def test_the_route(n, h, d, backend, want):
    assert choose_linear_route("auto", n, h, d, backend) == want


def test_what_is_configured_is_taken():
    with barlow_fused.configure(route="direct"):
        assert choose_linear_route("auto", 64, 8, 1000, "auto") == "direct"


# The module


def test_the_module_takes_a_layers_place():
    layer = torch.nn.Linear(12, 130)
    barlow = LinearBarlowTwinsLoss.from_linear(layer, lambd=0.02, chunk_features=64)
    assert barlow.weight is layer.weight
    assert [name for name, _ in barlow.named_parameters()] == ["weight"]
    h_a, h_b, _ = tensors(40, 12, 130)
    want = barlow_twins_loss(layer(h_a), layer(h_b), lambd=0.02)
    torch.testing.assert_close(barlow(h_a, h_b), want, rtol=1e-5, atol=0)
    barlow.loss.lambd = 0.5
    want = barlow_twins_loss(layer(h_a), layer(h_b), lambd=0.5)
    torch.testing.assert_close(barlow(h_a, h_b), want, rtol=1e-5, atol=0)
    assert "out_features=130" in repr(barlow)
    again = LinearBarlowTwinsLoss(12, 130)
    again.load_state_dict(barlow.state_dict())
    assert torch.equal(again.weight, layer.weight)


def test_bad_input_is_named():
    h_a, h_b, weight = tensors(40, 12, 130)
    layer = torch.nn.Linear(12, 130)
    for call, message in {
        (lambda: linear_barlow_twins_loss(h_a, h_b[:, :5], weight)): "h_a and h_b must have the same shape",
        (lambda: linear_barlow_twins_loss(h_a[0], h_b, weight)): r"h_a must be 2-D, \(samples N, hidden units H\)",
        (lambda: linear_barlow_twins_loss(h_a[:1], h_b[:1], weight)): "at least 2 samples",
        (lambda: linear_barlow_twins_loss(h_a[:, :0], h_b[:, :0], weight)): "at least 1 hidden unit",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight.T)): r"weight must be 2-D, .* got shape \(12, 130\)",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight[:0])): "features D >= 1",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight.double())): "weight and h_a must have the same dtype",
        (lambda: linear_barlow_twins_loss(h_a, h_b, None)): "weight must be a torch.Tensor, got NoneType",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight.to("meta"))): "on the same device",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight, route="fast")): "route must be 'gram', 'direct', 'hidden'",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight, route="hidden", backend="triton")): "route='hidden'",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight, chunk_features=0)): "chunk_features must be at least 1",
        (lambda: LinearBarlowTwinsLoss(12, 130, gradient="official")): "gradient is about several processes",
        (lambda: linear_barlow_twins_loss(h_a, h_b, weight, gradient="lightly")): "about several processes",
        (lambda: LinearBarlowTwinsLoss(12, 130, route="fast")): "route must be",
        (lambda: LinearBarlowTwinsLoss.from_linear(torch.nn.ReLU())): "layer must be a torch.nn.Linear, got ReLU",
        (lambda: LinearBarlowTwinsLoss.from_linear(layer, normalization="none")(h_a, h_b)): "layer has a bias",
        (lambda: LinearBarlowTwinsLoss(-1, 130)): "in_features must be at least 1",
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


# Memory


def test_embeddings_never_exist():
    """At most a twentieth of what the layer and the loss need by themselves, beyond what goes in and comes out."""
    from tracing import Trace

    n, h, d = 512, 256, 131072 // 4
    peaks = {}
    for name, call in {
        "separate": lambda h_a, h_b, w: barlow_twins_loss(h_a @ w.T, h_b @ w.T),
        "gram": functools.partial(linear_barlow_twins_loss, route="gram"),
        "hidden": functools.partial(linear_barlow_twins_loss, route="hidden"),
    }.items():
        inputs = [x.requires_grad_() for x in tensors(n, h, d)]
        with Trace() as trace:
            grads = torch.autograd.grad(call(*inputs), inputs)
        peaks[name] = trace.peak - sum(g.nbytes for g in grads)
    assert peaks["gram"] < 4 * peaks["separate"] / 20
    assert peaks["hidden"] < 4 * peaks["separate"] / 20


@pytest.mark.parametrize("route", ROUTES)
def test_a_device_without_float64(route, monkeypatch):
    """Nothing makes a number in float64 there, and the result is as exact as float32 lets it be."""
    from tracing import Trace

    about = accelerator.Accelerator("none", float64=False)
    monkeypatch.setattr(accelerator, "of", lambda device: about)
    monkeypatch.setattr(torch_partial, "for_caches", lambda device: False)
    real = passes_module.passes
    monkeypatch.setattr(
        passes_module,
        "passes",
        lambda spec, device: chunks.Passes(spec.backend) if spec.route != "hidden" else real(spec, device),
    )
    inputs = tensors(300, 20, 100) if route == "direct" else tensors(64, 16, 200)
    check(inputs, tolerance=(5e-6, 1e-5), route=route, backend="torch")
    if route == "direct":
        return  # torch_whole's, tested there
    seen = set()

    class Dtypes(Trace):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            seen.update(x.dtype for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    with Dtypes():
        got(*inputs, route=route, backend="torch")
    assert torch.float64 not in seen


@pytest.mark.parametrize("route", ["gram", "hidden"])
def test_no_number_is_copied_from_the_host(route, monkeypatch):
    """A copy would wait for an accelerator, and cannot be captured in a graph."""
    made = []
    for name in ("tensor", "as_tensor"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: (made.append(a), real(*a, **k))[1])
    inputs = [torch.empty(s, device="meta", requires_grad=True) for s in ((256, 96), (256, 96), (8192, 96))]
    torch.autograd.grad(linear_barlow_twins_loss(*inputs, route=route), inputs)
    assert not made


@pytest.mark.parametrize(("route", "most"), [("gram", 260), ("hidden", 200)])
def test_launches_on_an_accelerator(route, most):
    """On tensors without data; nothing waits for the device."""
    from tracing import Trace

    shapes = (256, 512), (256, 512), (8192, 512)
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    with Trace() as trace:
        torch.autograd.grad(linear_barlow_twins_loss(*inputs, route=route), inputs)
    assert not {"item", "_local_scalar_dense", "nonzero"} & set(trace.operators)
    assert len(trace.operators) <= most
