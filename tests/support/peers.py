"""The real files of other libraries' losses, without the packages that these losses do not use.

solo-learn and stable-pretraining cannot be imported whole without dozens of packages, and lightly takes seconds: here
the losses' own files are imported under empty parent packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace


def losses_of(name: str) -> ModuleType:
    """The module that users import a library's loss from."""
    return {"lightly": _lightly, "solo-learn": _solo_learn, "stable-pretraining": _stable_pretraining}[name]()


def _lightly() -> ModuleType:
    _package("lightly")
    loss = _package("lightly.loss")
    loss.BarlowTwinsLoss = importlib.import_module("lightly.loss.barlow_twins_loss").BarlowTwinsLoss
    return loss


def _solo_learn() -> ModuleType:
    _package("solo")
    losses = _package("solo.losses")
    losses.barlow_loss_func = importlib.import_module("solo.losses.barlow").barlow_loss_func
    return losses


def _stable_pretraining() -> ModuleType:
    sys.modules["loguru"] = ModuleType("loguru")
    sys.modules["loguru"].logger = SimpleNamespace(error=str)
    _package("stable_pretraining")
    utils = _package("stable_pretraining.utils")
    distributed = importlib.import_module("stable_pretraining.utils.distributed")
    for name in ("all_gather", "all_reduce", "get_rank", "get_world_size"):
        setattr(utils, name, getattr(distributed, name))
    losses = _package("stable_pretraining.losses")
    losses.BarlowTwinsLoss = importlib.import_module("stable_pretraining.losses.joint_embedding").BarlowTwinsLoss
    return losses


def _package(name: str) -> ModuleType:
    """An empty package of this name, whose submodules are the installed ones."""
    spec = importlib.util.find_spec(name)
    module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = module
    return module
