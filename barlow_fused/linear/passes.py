"""Which passes run a call of the loss with the last layer."""

from __future__ import annotations

import torch

from ..backends.operations import Spec
from . import chunks, hidden, slabs


def passes(spec: Spec, device: torch.device) -> hidden.Passes | slabs.Passes | chunks.Passes:
    """What has the forward and the backward pass."""
    if spec.route == "hidden":
        return hidden.Passes()
    if spec.backend == "torch" and device.type == "cpu":
        return slabs.Passes()
    return chunks.Passes(spec.backend)
