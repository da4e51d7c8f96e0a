"""The reference trainer: Barlow Twins pretraining of an encoder with a very wide projector, on real images.

``python -m barlow_fused train`` runs it. One idea a file, in the order of reading: ``trainer.py`` (the run from start
to end), ``config.py`` (its flags), ``data.py`` (the images and their views), ``model.py`` (encoder and projector),
``evaluate.py`` (k-nearest-neighbour and linear-probe accuracy), ``report.py`` (what is printed), ``pictures.py``.
It needs the extra: ``pip install 'barlow-fused[train]'``.
"""

from .config import Config
from .trainer import main, train

__all__ = ["Config", "main", "train"]
