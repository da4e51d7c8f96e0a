"""The torch backend, in each of its shapes, against the float64 oracle: every route, dtype, convention and size."""

import functools
import importlib

import pytest
import torch
from cases import (
    NORMALIZATIONS,
    ROUTES,
    SHAPES,
    SMALL_SHAPES,
    TOLERANCE,
    Answer,
    answer,
    assert_close,
    error,
    oracle,
    similar_views,
    views,
    wide_oracle,
)

from barlow_fused import backends, barlow_twins_loss


@pytest.fixture(params=["small", "slabs", "whole"], autouse=True)
def shape(request, monkeypatch):
    """The two for CPUs, whatever the size, and the one for accelerators: it does not care about the device."""
    module = importlib.import_module(f"barlow_fused.backends.torch_{request.param}")
    monkeypatch.setattr(backends, "load", lambda name, device: module)
    return request.param


def torch_loss(**kwargs):
    return functools.partial(barlow_twins_loss, backend="torch", return_terms=True, **kwargs)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_over_shapes(n, d, dtype, route, shape, monkeypatch):
    if route == "gram" and 2 * n > d:
        pytest.skip("Gram's difference loses digits there by design; test_gram_beyond_its_range has it in float64")
    if shape == "whole" and n <= 3 and dtype == torch.float32:  # a CPU's library adds up 4097 products of a row or two
        monkeypatch.setitem(TOLERANCE, dtype, (1e-6, 1e-5))  # one after the other
    z_a, z_b = views(n, d, dtype)
    assert_close(answer(torch_loss(route=route), z_a, z_b), z_a, z_b, NORMALIZATIONS["batch_norm"])


@pytest.mark.parametrize(("n", "d"), [(n, d) for n, d in SHAPES if 2 * n > d])
def test_gram_beyond_its_range(n, d):
    """A forced Gram route is still the same number, up to the amplification 1/(1 - r) of its difference."""
    z_a, z_b = views(n, d, torch.float64)
    got, ref = answer(torch_loss(route="gram"), z_a, z_b), oracle(z_a, z_b)
    assert error(got.loss, ref.loss, at_least=d) < 1e-10
    if n > 3:
        assert error(got.grad_a, ref.grad_a) < 1e-10
        assert error(got.grad_b, ref.grad_b) < 1e-10


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize(("n", "d"), [(17, 256), (64, 1000), (130, 300)])
def test_accuracy_over_conventions(n, d, normalization, dtype, route):
    z_a, z_b = views(n, d, dtype)
    name = normalization if normalization is not None else "none"
    loss = torch_loss(route=route, normalization=name, lambd=0.02, scale=0.3)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, normalization, lambd=0.02, scale=0.3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("ratio", [10.0, 1e3])
def test_large_means_lose_nothing(ratio, normalization, route):
    z_a, z_b = views(64, 1000)
    z_a, z_b = z_a - z_a.mean(0) + ratio, z_b - z_b.mean(0) - ratio * torch.linspace(0.5, 1, 1000)
    loss = torch_loss(route=route, normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_input_scales(scale, normalization, route):
    z_a, z_b = (z * scale for z in views(64, 1000))
    loss = torch_loss(route=route, normalization=normalization)
    assert_close(answer(loss, z_a, z_b), z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_features_with_zero_variance(value, normalization, route):
    z_a, z_b = views(64, 1000)
    z_a[:, ::3], z_b[:, ::5] = value, value
    got = answer(torch_loss(route=route, normalization=normalization), z_a, z_b)
    assert all(t.isfinite().all() for t in got)
    assert_close(got, z_a, z_b, NORMALIZATIONS[normalization])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("normalization", ["batch_norm", "std", "none"])
@pytest.mark.parametrize(("n", "d"), SMALL_SHAPES)
def test_gradcheck(n, d, normalization, route):
    if n == 2:
        pytest.skip("with two samples the gradient is zero up to eps: nothing for finite differences to see")
    z_a, z_b = (z[:6, :20].requires_grad_() for z in views(n, d, torch.float64))
    loss = torch_loss(route=route, normalization=normalization, lambd=0.1)
    assert torch.autograd.gradcheck(lambda a, b: tuple(loss(a, b)), (z_a, z_b), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(300, 2500), (1500, 300), (2100, 1030)])
def test_several_slabs_and_panels(n, d, dtype, route):
    """Sizes that cut the inputs into several slabs, and K into several panels, none of them whole."""
    z_a, z_b = views(n, d, dtype)
    got, ref = answer(torch_loss(route=route), z_a, z_b), oracle(z_a, z_b)
    amplified = 1 + 1e3 * (route == "gram" and 2 * n > d)
    assert error(got.loss, ref.loss) < TOLERANCE[dtype][0] * amplified
    assert error(got.grad_a, ref.grad_a) < (2e-6 if dtype == torch.float32 else 5e-3) * amplified
    assert error(got.grad_b, ref.grad_b) < (2e-6 if dtype == torch.float32 else 5e-3) * amplified


@pytest.mark.parametrize("normalization", ["batch_norm", "std"])
@pytest.mark.parametrize(("n", "d"), [(2, 8192), (16, 16384), (32, 65536), (64, 65536), (256, 32768)])
def test_very_wide(n, d, normalization):
    """D far beyond N: K is close to a multiple of the identity, and most of K A_hat cancels in the gradient.

    (D, D) matrices do not fit.
    """
    z_a, z_b = views(n, d)
    got = answer(torch_loss(normalization=normalization), z_a, z_b)
    ref = wide_oracle(z_a, z_b, NORMALIZATIONS[normalization])
    assert error(got.loss, ref.loss, at_least=d if n == 2 else 0) < 1e-6
    if n > 2:
        assert error(got.grad_a, ref.grad_a) < 2e-6
        assert error(got.grad_b, ref.grad_b) < 2e-6


def test_the_oracle_of_wide_inputs_is_the_oracle():
    z_a, z_b = views(20, 5000, torch.float64)
    assert all(error(x, y) < 1e-12 for x, y in zip(wide_oracle(z_a, z_b), oracle(z_a, z_b), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("difference", [0.5, 0.02])
@pytest.mark.parametrize(("n", "d"), [(32, 8192), (32, 16384), (64, 32768), (16, 65536)])
def test_halves_of_many_features(n, d, difference, dtype):
    """K is close to D (I - 1 1^T / N), whose rounding would drown the gradient."""
    z_a, z_b = similar_views(n, d, dtype, difference)
    got, ref = answer(torch_loss(), z_a, z_b), wide_oracle(z_a, z_b)
    assert error(got.loss, ref.loss) < 1e-4
    assert error(got.grad_a, ref.grad_a) < 5e-3
    assert error(got.grad_b, ref.grad_b) < 5e-3


def test_a_wrong_gradient_is_seen():
    """The comparison itself can fail: an answer that is off by 1e-5 is refused."""
    z_a, z_b = views(64, 1000)
    got = answer(torch_loss(), z_a, z_b)
    for name in Answer._fields:
        with pytest.raises(AssertionError, match=name):
            assert_close(
                got._replace(**{name: getattr(got, name) * (1 + 1e-5)}), z_a, z_b, NORMALIZATIONS["batch_norm"]
            )
