"""λ, κ and the floor: the bound holds for any views, is reached, and carries over."""

from __future__ import annotations

import math

import pytest
import torch

from barlow_fused import LossFloor, barlow_twins_loss, cross_correlation, kappa, loss_floor, suggest_lambda, width
from barlow_fused.reference import reference_loss

SHAPES = [(2, 2), (2, 7), (5, 5), (8, 32), (9, 70), (17, 20), (33, 200)]
LAMBDAS = [0.0, 0.0051, 0.1, 0.7, 1.0]


def loss_of(z_a, z_b, lambd):
    return reference_loss(z_a, z_b, lambd).loss.item()


def random_views(n, d, alike, seed):
    """Views that share nothing (alike = 0) to everything (1), of rank 1 to full, some features constant."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rank = 1 + seed % min(n, d)
    shared = draw(n, rank) @ draw(rank, d)
    z_a, z_b = (alike * shared + (1 - alike) * draw(n, d) for _ in "ab")
    if seed % 3 == 0:
        z_a[:, ::2] = 1.0
        z_b[:, ::2] = 1.0
    return z_a, z_b


def best_views(n, d, c):
    """Views whose C has N - 1 equal eigenvalues and the diagonal c, up to the convention's eps.

    The rows of V are the real Fourier modes of D points, so its columns v_i all have the squared length (N - 1)/D, and
    both modes of a frequency share one factor. View a is S V and view b V / S, where S is s on the modes of some
    frequencies and 1/s on the others. Needs N odd, N - 1 a multiple of 4 and D >= N.
    """
    frequencies = torch.arange(1, (n - 1) // 2 + 1, dtype=torch.float64)
    angles = 2 * math.pi * frequencies[:, None] * torch.arange(d, dtype=torch.float64) / d
    modes = torch.cat([angles.cos(), angles.sin()])  # (N - 1, D)
    q = 1 / c  # of S with s^2 and s^-2 on one half each: their mean
    s = (q + math.sqrt(q * q - 1)) ** 0.5
    scale = torch.where(torch.arange((n - 1) // 2) % 2 == 0, s, 1 / s).repeat(2)[:, None]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(
        torch.cat([torch.ones(n, 1), torch.randn(n, n - 1, generator=generator)], dim=1).double()
    ).Q[:, 1:]  # (N, N - 1), orthogonal to the mean
    return 1e3 * basis @ (scale * modes), 1e3 * basis @ (modes / scale)  # large, so that eps is small


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_no_views_get_below_the_floor(n, d, alike):
    for seed in range(6):
        views = random_views(n, d, alike, seed)
        mean = cross_correlation(*views).diagonal().mean().item()
        for lambd in LAMBDAS:
            loss, k = loss_of(*views, lambd), kappa(n, d, lambd)
            of_the_mean = d * ((1 - mean) ** 2 + k * mean**2)
            if d > n - 1:
                assert loss >= of_the_mean - 1e-9 * d
            assert of_the_mean >= loss_floor(n, d, lambd).loss - 1e-9 * d
            assert loss >= loss_floor(n, d, lambd).loss - 1e-9 * d


@pytest.mark.parametrize("lambd", [0.02, 0.2, 1.0])
@pytest.mark.parametrize(("n", "d"), [(5, 16), (9, 40), (17, 120), (33, 65)])
def test_the_floor_is_reached_at_its_c_ii(n, d, lambd):
    floor = loss_floor(n, d, lambd)
    views = best_views(n, d, floor.c_ii)
    c = cross_correlation(*views)
    torch.testing.assert_close(c.diagonal(), torch.full((d,), floor.c_ii, dtype=c.dtype), rtol=1e-6, atol=0)
    assert torch.linalg.matrix_rank(c) == n - 1
    assert loss_of(*views, lambd) == pytest.approx(floor.loss, rel=1e-6)


@pytest.mark.parametrize(("n", "d", "lambd"), [(8, 40, 0.05), (6, 60, 0.1), (16, 48, 0.3)])
def test_an_optimiser_that_is_free_to_choose_reaches_the_floor(n, d, lambd):
    z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=400, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = barlow_twins_loss(z[0], z[1], lambd=lambd)
        loss.backward()
        return loss

    optimizer.step(closure)
    floor = loss_floor(n, d, lambd)
    assert floor.loss <= closure().item() <= 1.001 * floor.loss
    assert cross_correlation(*z.detach()).diagonal().mean().item() == pytest.approx(floor.c_ii, abs=1e-3)


@pytest.mark.parametrize("lambd", [1.0, 1.5, 20.0])
@pytest.mark.parametrize(("n", "d"), [(5, 16), (9, 40)])
def test_above_one_features_are_switched_off(n, d, lambd):
    """N - 1 features that are the identity, the others constant: D - N + 1, whatever λ is."""
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.eye(n)[:, : n - 1]], dim=1).double()).Q[:, 1:]
    z = torch.cat([1e3 * basis, torch.zeros(n, d - n + 1)], dim=1)
    floor = loss_floor(n, d, lambd)
    assert loss_of(z, z, lambd) == pytest.approx(floor.loss, rel=1e-6)
    assert floor.loss == pytest.approx(d - n + 1)
    assert floor.c_ii == pytest.approx((n - 1) / d)
    for seed in range(6):
        for alike in (0.0, 0.5, 1.0):
            assert loss_of(*random_views(n, d, alike, seed), lambd) >= floor.loss - 1e-9 * d


def test_without_a_rank_limit_the_floor_is_0():
    for n, d in [(2, 1), (17, 16), (2048, 64)]:
        assert kappa(n, d, 0.0051) == 0
        assert loss_floor(n, d, 0.0051) == LossFloor(0.0, 1.0)
    basis = torch.linalg.qr(torch.cat([torch.ones(17, 1), torch.eye(17)[:, :16]], dim=1).double()).Q[:, 1:]
    assert loss_of(1e3 * basis, 1e3 * basis, 0.5) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "d"), [(2, 2), (64, 126), (64, 128), (256, 65536), (2048, 8192), (8192, 2**20)])
@pytest.mark.parametrize("k", [0.0, 0.002, 0.02, 1.0])
def test_kappa_and_suggest_lambda_are_inverse(n, d, k):
    assert kappa(n, d, suggest_lambda(n, d, k)) == pytest.approx(k, rel=1e-14)
    assert loss_floor(n, d, suggest_lambda(n, d, k)) == pytest.approx((d * k / (1 + k), 1 / (1 + k)), rel=1e-14)


@pytest.mark.parametrize(("n", "d"), [(256, 509), (256, 256), (256, 255), (256, 1), (2048, 64)])
def test_near_and_below_n_features_lambda_stays_at_kappa(n, d):
    assert suggest_lambda(n, d, 0.03) == 0.03
    assert kappa(n, d, 0.03) < 0.03


def test_lambda_never_grows_with_the_width():
    lambdas = [suggest_lambda(256, d) for d in range(1, 2000)]
    assert lambdas == sorted(lambdas, reverse=True)


def test_the_published_settings():
    assert kappa(2048, 8192, 0.0051) == pytest.approx(0.0153, rel=1e-3)
    assert kappa(256, 8192, 0.0051) == pytest.approx(0.159, rel=1e-2)
    assert loss_floor(256, 65536, 0.0051).c_ii == pytest.approx(0.434, rel=1e-3)


def test_with_local_statistics_n_minus_p_takes_the_place_of_n_minus_1():
    """C is the mean of the processes' C: rank N - P, and the floor that of N - P + 1 samples is reached."""
    ranks, n_r, d = 3, 5, 60
    z = torch.randn(2, ranks, n_r, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z.requires_grad_()
    lambd = 0.1

    def loss():
        c = torch.stack([cross_correlation(z[0, r], z[1, r]) for r in range(ranks)]).mean(0)
        on_diag = (c.diagonal() - 1).square().sum()
        return on_diag + lambd * (c.square().sum() - c.diagonal().square().sum()), c

    assert torch.linalg.matrix_rank(loss()[1].detach()) == ranks * n_r - ranks
    optimizer = torch.optim.LBFGS([z], max_iter=400, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()[0]
        value.backward()
        return value

    optimizer.step(closure)
    floor = loss_floor(ranks * n_r - ranks + 1, d, lambd).loss
    assert floor <= loss()[0].item() <= 1.001 * floor


def test_kappa_above_a_half_is_warned_of_in_one_sentence():
    assert width.warning(2048, 8192, 0.0051) is None
    text = width.warning(256, 65536, 0.0051)
    assert "κ = 1.31 is above 0.5" in text
    assert "λ = 7.8e-05" in text
    assert "\n" not in text
    assert width.describe(256, 65536, 0.0051) == "λ = 0.0051, κ = 1.31: at least 37112, where C_ii = 0.434"
    assert "the rank limits nothing" in width.describe(256, 255, 0.0051)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "n must be at least 2, got 1", lambda: suggest_lambda(1, 8)),
        (TypeError, "n must be an int, got float", lambda: suggest_lambda(8.0, 8)),
        (TypeError, "d must be an int, got bool", lambda: kappa(8, True, 0.1)),
        (ValueError, "d must be at least 1, got 0", lambda: loss_floor(8, 0, 0.1)),
        (ValueError, "kappa must be at least 0, got -1.0", lambda: suggest_lambda(8, 8, -1)),
        (TypeError, "kappa must be a float, got str", lambda: suggest_lambda(8, 8, "auto")),
        (ValueError, "kappa must be finite, got inf", lambda: suggest_lambda(8, 8, math.inf)),
        (ValueError, "lambd must be at least 0, got -0.1", lambda: kappa(8, 8, -0.1)),
        (ValueError, "lambd must be finite, got nan", lambda: loss_floor(8, 8, math.nan)),
    ],
)
def test_what_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()
