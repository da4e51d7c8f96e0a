"""barlow_fused: the exact Barlow Twins loss for very wide projectors, without the (D, D) matrix."""

import importlib
from typing import TYPE_CHECKING, Any

from . import waiting
from .version import __version__

waiting.set_policy()  # before anything loads PyTorch

if TYPE_CHECKING:
    from .choice import configure
    from .linear import LinearBarlowTwinsLoss, linear_barlow_twins_loss
    from .loss import BarlowTwinsLoss, barlow_twins_loss, cross_correlation
    from .normalization import Normalization
    from .planning.plan import Plan, plan
    from .reference import BarlowTwinsTerms
    from .width import LossFloor, kappa, loss_floor, suggest_lambda

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

# Where each name is defined. A module is loaded when one of its names is first asked for, so that the command line
# starts without PyTorch, and a call of the loss without what predicts its cost.
_MODULES = {
    "choice": ("configure",),
    "linear": ("LinearBarlowTwinsLoss", "linear_barlow_twins_loss"),
    "loss": ("BarlowTwinsLoss", "barlow_twins_loss", "cross_correlation"),
    "normalization": ("Normalization",),
    "planning.plan": ("Plan", "plan"),
    "reference": ("BarlowTwinsTerms",),
    "width": ("LossFloor", "kappa", "loss_floor", "suggest_lambda"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = importlib.import_module(f".{module}", __name__)
            globals().update({name: getattr(found, name) for name in names})
            return globals()[name]
        if name == module:  # barlow_fused.loss, as after import barlow_fused.loss
            return importlib.import_module(f".{module}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
