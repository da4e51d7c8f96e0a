"""The oracle itself, against the two published codes and against arithmetic done by hand."""

import torch
import torch.nn.functional as F  # noqa: N812
from cases import NORMALIZATIONS, error, views

from barlow_fused.normalization import CONVENTIONS
from barlow_fused.reference import reference_cross_correlation, reference_loss


def official(z_a, z_b, lambd):
    """The loss of facebookresearch/barlowtwins, main.py, on one GPU."""
    bn = torch.nn.BatchNorm1d(z_a.shape[1], affine=False, dtype=z_a.dtype)
    c = bn(z_a).T @ bn(z_b)
    c.div_(z_a.shape[0])
    on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
    n = len(c)
    off_diag = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
    return on_diag + lambd * off_diag


def test_equals_the_official_code():
    z_a, z_b = views(40, 13, torch.float64)
    assert error(reference_loss(z_a, z_b, lambd=0.02).loss, official(z_a, z_b, 0.02)) < 1e-14


def test_batch_norm_is_pytorchs():
    z_a, z_b = views(40, 13, torch.float64)
    hats = [F.batch_norm(z, None, None, training=True) for z in (z_a, z_b)]
    c = reference_cross_correlation(z_a, z_b, CONVENTIONS["batch_norm"])
    assert error(c, hats[0].T @ hats[1] / 40) < 1e-14


def test_two_samples_by_hand():
    # two samples: every feature standardises to +-1, so C is +-1 everywhere, up to eps
    z_a = torch.tensor([[0.0, 5.0], [2.0, 1.0]], dtype=torch.float64)
    z_b = torch.tensor([[1.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    loss, on_diag, off_diag = reference_loss(z_a, z_b, lambd=0.5, scale=2.0, normalization=NORMALIZATIONS["std"])
    # unbiased deviation sqrt(2) times the half-range: x_hat = +-1/sqrt(2); C = [[-1, 1], [1, -1]] / 2
    torch.testing.assert_close(on_diag, torch.tensor(2 * 1.5**2, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(off_diag, torch.tensor(2 * 0.5**2, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 2 * (on_diag + 0.5 * off_diag))
