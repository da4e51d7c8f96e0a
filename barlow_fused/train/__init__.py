"""The reference trainer: Barlow Twins pretraining with a very wide projector, from handwritten digits to ImageNet.

``python -m barlow_fused train`` runs it. One idea a file, in the order of reading: ``trainer.py`` (the run from start
to end), ``step.py`` (one optimiser step), ``config.py`` and ``presets.py`` (the flags), ``datasets.py``, ``augment.py``
and ``loader.py`` (the images, their views, who sees which when), ``model.py``, ``optim.py``, ``processes.py`` (several
of them), ``checkpoint.py``, ``evaluate.py`` (k-nearest neighbours), ``probe.py`` (the linear probe), ``report.py``
(what is printed), ``pictures.py``. It needs the extra: ``pip install 'barlow-fused[train]'``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .trainer import main, train

__all__ = ["Config", "main", "train"]


def __getattr__(name: str) -> Any:
    """Each when it is asked for: the flags need no PyTorch."""
    if name == "Config":
        from .config import Config

        return Config
    if name in ("main", "train"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
