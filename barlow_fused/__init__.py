"""barlow_fused: the exact Barlow Twins loss for very wide projectors, without the (D, D) matrix."""

from typing import TYPE_CHECKING, Any

from . import waiting

waiting.set_policy()  # before anything loads PyTorch

from .choice import configure  # noqa: E402
from .linear import LinearBarlowTwinsLoss, linear_barlow_twins_loss  # noqa: E402
from .loss import BarlowTwinsLoss, barlow_twins_loss, cross_correlation  # noqa: E402
from .normalization import Normalization  # noqa: E402
from .reference import BarlowTwinsTerms  # noqa: E402
from .version import __version__  # noqa: E402
from .width import LossFloor, kappa, loss_floor, suggest_lambda  # noqa: E402

if TYPE_CHECKING:
    from .planning.plan import Plan, plan

__all__ = [
    "BarlowTwinsLoss",
    "BarlowTwinsTerms",
    "LinearBarlowTwinsLoss",
    "LossFloor",
    "Normalization",
    "Plan",
    "__version__",
    "barlow_twins_loss",
    "configure",
    "cross_correlation",
    "kappa",
    "linear_barlow_twins_loss",
    "loss_floor",
    "plan",
    "suggest_lambda",
]


def __getattr__(name: str) -> Any:
    """Predictions are loaded when they are first asked for: no call needs them."""
    if name not in ("Plan", "plan"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .planning import plan as module

    globals().update(Plan=module.Plan, plan=module.plan)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
