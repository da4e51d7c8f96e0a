"""What PyTorch's operators do during a call: which ones, and what they allocate, read and write."""

from __future__ import annotations

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_TENSORS = ("promote_types",)  # PyTorch's own arithmetic of dtypes passes a dispatch mode, too


class Trace(TorchDispatchMode):
    """Counts what every operator allocates, reads and writes, and names those that compute: a GPU's launches."""

    def __init__(self):
        super().__init__()
        self.alive = {}  # bytes of every storage that an operator made
        self.peak = 0
        self.moved = 0
        self.operators = []  # their names
        self.devices = set()  # of all tensors that operators got or made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor calls operators of its shards, which come here
        result = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        inputs = {x.untyped_storage()._cdata for x in read}
        for storage in (x.untyped_storage() for x in written):
            if storage._cdata not in inputs and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        name = func.__name__.split(".")[0]
        self.devices |= {x.device for x in read + written}
        if not func.is_view and name not in (*ALLOCATIONS, *NO_TENSORS):
            self.operators.append(name)
            read = {"new_zeros": [], "copy_": read[1:]}.get(name, read)
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in read + written)
        return result
