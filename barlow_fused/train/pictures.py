"""The pictures of a run: its loss and k-NN curves, its views, and what the projections look like before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from torch import Tensor

from .. import cross_correlation
from .config import Config

SHOWN = 64  # features of the matrix that are drawn
SAMPLED = 2048  # features whose correlations are counted: 4 million pairs
BEFORE, AFTER = "tab:gray", "tab:blue"


class Correlations(NamedTuple):
    """What the picture needs of a cross-correlation matrix C: never more than SAMPLED x SAMPLED of it is formed."""

    block: Tensor  # [SHOWN, SHOWN] of C, evenly spaced features
    diagonal: Tensor  # [D] C_ii, every feature
    histogram: Tensor  # [bins] how often each value occurs off the diagonal of the sampled features
    off_diag_rms: float  # sqrt(mean of C_ij^2, i != j) of the sampled features
    effective_rank: float  # (tr C)^2 / |C|_F^2 of the sampled features: a lower bound of rank(C)
    features: int  # D
    samples: int  # N


BINS = 201  # of the histogram, over [-1, 1]


class Spectrum(NamedTuple):
    """The eigenvalues of a covariance matrix, as shares of their sum, largest first."""

    shares: Tensor  # [min(N, D)]

    @property
    def effective_rank(self) -> float:
        """exp of the shares' entropy (Roy and Vetterli 2007; RankMe): how many dimensions are in use."""
        return torch.special.entr(self.shares).sum().exp().item()


@torch.no_grad()
def spectrum(x: Tensor) -> Spectrum:  # [N, D]
    """How the variance of samples is spread over the dimensions they span; from the smaller of the two products."""
    centred = (x - x.mean(0)).double().cpu()
    product = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(product).flip(0).clamp_min(0)
    return Spectrum(eigenvalues / eigenvalues.sum().clamp_min(1e-300))


class Snapshot(NamedTuple):
    """What the pictures of a moment of training are drawn from."""

    correlations: Correlations
    representation: Spectrum  # of the backbone's output
    embedding: Spectrum  # of the projector's output


def snapshot(h: Tensor, z_a: Tensor, z_b: Tensor, features: int) -> Snapshot:  # [N, F], 2 x [N, D]
    """Reduce view a's representation and both views' embeddings to what the pictures show; D of so many features."""
    return Snapshot(correlate(z_a, z_b)._replace(features=features), spectrum(h), spectrum(z_a))


def draw_spectra(before: Snapshot, after: Snapshot, path: Path) -> None:
    """The eigenvalue spectra of representation and embedding, before and after."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"Eigenvalues of the covariance over {after.correlations.samples} views of training images")
    names = ("representation (backbone's output)", "embedding (projector's output)")
    for axes, name, field in zip(figure.subplots(1, 2), names, ("representation", "embedding"), strict=True):
        for label, color, seen in (("before", BEFORE, before), ("after", AFTER, after)):
            spectrum: Spectrum = getattr(seen, field)
            shown = spectrum.shares[spectrum.shares > 1e-12]
            text = f"{label}: effective rank {spectrum.effective_rank:.1f}"
            axes.plot(range(1, len(shown) + 1), shown.numpy(), color=color, label=text)
        axes.set(title=name, xlabel="eigenvalue number", ylabel="share of the variance", xscale="log", yscale="log")
        axes.grid(which="both", alpha=0.3)
        axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def draw_knn(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The accuracy of k-nearest neighbours over the epochs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["epoch"] for entry in history], [entry["knn"] for entry in history], "o-", color=AFTER)
    axes.set(title="k-NN accuracy of the frozen backbone", xlabel="epochs of pretraining", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def correlate(z_a: Tensor, z_b: Tensor) -> Correlations:  # [N, D], [N, D]
    """The cross-correlation of two views' projections, reduced to what a picture can show.

    Features are standardised one by one, so that a block of C is exactly the C of its features.
    """
    n, d = z_a.shape
    z_a, z_b = (z.float() for z in (z_a, z_b))
    c = cross_correlation(*(z[:, _evenly(d, SAMPLED)] for z in (z_a, z_b)))
    off_diagonal = c[~torch.eye(len(c), dtype=torch.bool, device=c.device)]
    a_hat, b_hat = ((z - z.mean(0)) * (z.var(0, correction=0) + 1e-5).rsqrt() for z in (z_a, z_b))
    shown = _evenly(len(c), SHOWN)
    return Correlations(
        block=c[shown][:, shown].cpu(),
        diagonal=(a_hat * b_hat).mean(0).cpu(),
        histogram=torch.histc(off_diagonal, BINS, min=-1, max=1).cpu(),
        off_diag_rms=off_diagonal.square().mean().sqrt().item() if len(off_diagonal) else 0.0,
        effective_rank=(c.trace().square() / c.square().sum().clamp_min(1e-30)).item(),
        features=d,
        samples=n,
    )


def draw_correlation(before: Correlations, after: Correlations, path: Path) -> None:
    """C before and after pretraining: a block of it, its off-diagonal values and its diagonal."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    n, d = after.samples, after.features
    figure.suptitle(f"Cross-correlation matrix C of two views: N = {n} training images, D = {d} projector outputs")
    lowest = min(before.diagonal.min().item(), after.diagonal.min().item(), 0.0)
    (left, right), (off, on) = figure.subplots(2, 2, height_ratios=(3, 2))
    for axes, title, c in ((left, "before pretraining", before), (right, "after pretraining", after)):
        image = axes.imshow(c.block.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        rank = f"effective rank (tr C)² / ‖C‖² = {c.effective_rank:.1f}"
        axes.set_title(f"{title}: {len(c.block)} of {d} features\n{rank}")
        axes.set(xlabel="feature j of view b", ylabel="feature i of view a")
    figure.colorbar(image, ax=[left, right], label="correlation $C_{ij}$")
    edges = torch.linspace(-1, 1, BINS + 1).numpy()
    for name, color, c in (("before", BEFORE, before), ("after", AFTER, after)):
        share = (100 * c.histogram / c.histogram.sum().clamp_min(1)).numpy()
        off.stairs(share, edges, color=color, fill=True, alpha=0.5, label=f"{name}: rms {c.off_diag_rms:.3f}")
        diagonal, mean = c.diagonal.numpy(), c.diagonal.mean().item()
        on.hist(diagonal, 100, (lowest, 1.0), color=color, alpha=0.5, label=f"{name}: mean {mean:.3f}")
    sampled = min(SAMPLED, d)
    off.set(title=f"Off-diagonal values (target 0), {sampled} x {sampled} features", xlabel="$C_{ij}$, i ≠ j")
    off.set(ylabel="share of the pairs (%)", xlim=(-1, 1))
    on.set(title=f"Diagonal values (target 1), all {d} features", xlabel="$C_{ii}$", ylabel="features")
    off.legend()
    on.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def draw_loss(metrics: Sequence[dict[str, Any]], config: Config, path: Path) -> None:
    """The loss, its two terms as they enter it, its floor, and the learning rate, over the steps."""
    lambd, floor = config.lambd, config.loss_floor.loss
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [entry["step"] for entry in metrics]
    marker = "o" if len(steps) == 1 else None  # one point makes no line
    upper.plot(steps, [m["loss"] for m in metrics], "k", marker=marker, label="loss = on-diagonal + λ · off-diagonal")
    upper.plot(steps, [m["on_diag"] for m in metrics], "tab:blue", marker=marker, label="on-diagonal (invariance)")
    off_diag = [lambd * m["off_diag"] for m in metrics]
    upper.plot(steps, off_diag, "tab:orange", marker=marker, label=f"λ · off-diagonal (redundancy), λ = {lambd:g}")
    if floor:  # a logarithm has no place for 0
        upper.axhline(floor, color="tab:red", linestyle="--", label=f"floor D κ/(1 + κ) = {floor:.4g}")
    upper.set(title="Barlow Twins loss during pretraining", ylabel="loss", yscale="log")
    upper.grid(which="both", alpha=0.3)
    upper.legend()
    lower.plot(steps, [m["lr"] for m in metrics], "tab:gray", marker=marker)
    lower.set(xlabel="optimiser step", ylabel="learning rate", ylim=(0, None))
    lower.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_views(images: Sequence[Tensor], view_a: Tensor, view_b: Tensor, path: Path) -> None:  # [C, H, W] each
    """Some images and the two views of each that the loss pulls together, all in [0, 1]."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rows: list[list[Axes]] = figure.subplots(3, len(images), squeeze=False)
    figure.suptitle("Training images and their two views")
    for row, name, batch in zip(rows, ("image", "view a", "view b"), (images, view_a, view_b), strict=True):
        for axes, image in zip(row, batch, strict=True):
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.savefig(path, dpi=120)


def _evenly(length: int, count: int) -> Tensor:
    """``count`` evenly spaced indices below ``length``, or all of them."""
    return torch.linspace(0, length - 1, min(length, count)).long()
