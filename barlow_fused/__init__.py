"""barlow_fused: the exact Barlow Twins loss for very wide projectors, without the (D, D) matrix."""

from .loss import BarlowTwinsLoss, barlow_twins_loss, cross_correlation
from .normalization import Normalization
from .plan import Plan, configure, plan
from .reference import BarlowTwinsTerms
from .version import __version__

__all__ = [
    "BarlowTwinsLoss",
    "BarlowTwinsTerms",
    "Normalization",
    "Plan",
    "__version__",
    "barlow_twins_loss",
    "configure",
    "cross_correlation",
    "plan",
]
