"""The loss and the last linear layer in one: embeddings z = h W^T are made a slab of features at a time, and dropped.

loss.py     what a user calls
passes.py   which of the following runs a call
slabs.py    CPUs: the torch backend's walk over slabs, each made of h when it is asked for
chunks.py   accelerators, and backends of kernels: chunks of features, each as if it were another rank's
hidden.py   no embeddings at all: what N samples of H hidden units span has at most H dimensions
"""

from .loss import LinearBarlowTwinsLoss, linear_barlow_twins_loss

__all__ = ["LinearBarlowTwinsLoss", "linear_barlow_twins_loss"]
