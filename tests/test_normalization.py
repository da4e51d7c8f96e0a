"""The conventions: their factors against PyTorch's own operations, their gradients against autograd, their errors."""

import pytest
import torch
from cases import NORMALIZATIONS, error

from barlow_fused.normalization import CONVENTIONS, Normalization, resolve_normalization
from barlow_fused.reference import standardize

STANDARDISING = {name: n for name, n in NORMALIZATIONS.items() if n is not None}


@pytest.mark.parametrize("normalization", STANDARDISING.values(), ids=STANDARDISING.keys())
def test_closed_form_of_the_gradient(normalization):
    """dL/dz = rstd (g - mean(g) - z_hat kappa mean(g z_hat)) for any g, as the module's docstring says."""
    z = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(9, 5, dtype=torch.float64)
    z_hat = standardize(z, normalization)
    (expected,) = torch.autograd.grad(z_hat, z, g)
    var = z.detach().var(0, correction=0)
    rstd, kappa, z_hat = normalization.rstd(var, 9), normalization.kappa(var, 9), z_hat.detach()
    assert error(z_hat, (z - z.mean(0)).detach() * rstd) < 1e-14
    assert error(normalization.remainder(rstd), 1 - kappa * z_hat.square().mean(0)) < 1e-9
    assert error(rstd * (g - g.mean(0) - z_hat * kappa * (g * z_hat).mean(0)), expected) < 1e-13


@pytest.mark.parametrize("normalization", STANDARDISING.values(), ids=STANDARDISING.keys())
def test_constant_feature_is_finite(normalization):
    var = torch.zeros(3)
    assert torch.as_tensor(normalization.rstd(var, 4)).isfinite().all()
    assert torch.as_tensor(normalization.kappa(var, 4)).isfinite().all()


def test_names_and_eps():
    assert resolve_normalization("batch_norm") == Normalization(0, 1e-5, "variance")
    assert resolve_normalization("std") == Normalization(1, 1e-6, "deviation")
    assert resolve_normalization("none") is None
    assert resolve_normalization("std", eps=0.5) == Normalization(1, 0.5, "deviation")
    assert resolve_normalization(CONVENTIONS["std"]) is CONVENTIONS["std"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: resolve_normalization("layer_norm"), ValueError, "'batch_norm', 'std', 'none'.*got 'layer_norm'"),
        (lambda: resolve_normalization(3), TypeError, "normalization must be a str or a Normalization, got int"),
        (lambda: resolve_normalization("none", eps=1e-5), ValueError, "eps has no meaning with normalization='none'"),
        (lambda: resolve_normalization("std", eps=-1.0), ValueError, "eps must be finite and >= 0, got -1.0"),
        (lambda: resolve_normalization("std", eps=float("nan")), ValueError, "eps must be finite and >= 0, got nan"),
        (lambda: resolve_normalization("std", eps="small"), TypeError, "eps must be a float, got str"),
        (lambda: Normalization(correction=2), ValueError, "correction must be 0 .* or 1 .*, got 2"),
        (lambda: Normalization(correction=1.0), TypeError, "correction must be an int, got float"),
        (lambda: Normalization(correction=True), TypeError, "correction must be an int, got bool"),
        (lambda: Normalization(eps=True), TypeError, "eps must be a float, got bool"),
        (lambda: Normalization(eps_added_to="mean"), ValueError, "eps_added_to must be .* got 'mean'"),
    ],
)
def test_bad_input(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
