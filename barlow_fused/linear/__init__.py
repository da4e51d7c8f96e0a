"""The loss and the last linear layer in one: embeddings z = h W^T are made a slab of features at a time, and dropped.

loss.py     what a user calls
slabs.py    CPUs: the torch backend's walk over slabs, each made of h when it is asked for
chunks.py   accelerators, and backends of kernels: chunks of features, each as if it were another rank's
hidden.py   no embeddings at all: what N samples of H hidden units span has at most H dimensions
"""

from __future__ import annotations

import torch

from ..backends.operations import Spec
from . import chunks, hidden, slabs
from .loss import LinearBarlowTwinsLoss, linear_barlow_twins_loss

__all__ = ["LinearBarlowTwinsLoss", "linear_barlow_twins_loss", "passes"]


def passes(spec: Spec, device: torch.device) -> hidden.Passes | slabs.Passes | chunks.Passes:
    """What has the forward and the backward pass."""
    if spec.route == "hidden":
        return hidden.Passes()
    if spec.backend == "torch" and device.type == "cpu":
        return slabs.Passes()
    return chunks.Passes(spec.backend)
