"""What a call is given as DTensors: which ranks share its samples, and which its features.

    placements            samples      features
    Shard(0)              in shards    all            as with ``group``
    Shard(1)              all          in shards      no all-to-all: a rank has what the Gram route wants
    both, on two dimensions of a mesh                 an all-to-all over the samples' dimension, sums over both
    Replicate             all          all            every rank computes by itself

More dimensions of the mesh may replicate. The gradients are DTensors of the inputs' placements, and exactly dL/dz.

With the last layer the weight is Shard(0), features in shards, and the activations Shard(0) or Replicate over the same
ranks; replicated ones are cut into shards of samples first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..arguments import Options, check_group_options
from .agreement import Shards


def views(z_a: DTensor, z_b: DTensor, options: Options) -> tuple[tuple[Tensor, Tensor], Options, Shards | None]:
    """A rank's parts of two views, differentiable, and who has the others' (None: it has everything).

    Raises:
        TypeError, ValueError: the placements are not as above; an option has no meaning with them.
    """
    options = _options(options)
    _same_kind(("z_a", "z_b"), (z_a, z_b))
    if z_a.placements != z_b.placements:
        raise ValueError(f"z_a and z_b must have the same placements, got {z_a.placements} and {z_b.placements}")
    if z_a.shape != z_b.shape:
        raise ValueError(f"z_a and z_b must have the same shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    by_dim = [_group(z_a, "z_a", dim, accepted=(0, 1)) for dim in (0, 1)]
    parts = z_a.to_local(grad_placements=z_a.placements), z_b.to_local(grad_placements=z_b.placements)
    if not any(by_dim):
        return parts, dataclasses.replace(options, group=None, gradient=None, reduce_dtype=None), None
    return parts, options, Shards(by_dim[0], by_dim[1], z_a.shape[1])


def last_layer(
    h_a: DTensor, h_b: DTensor, weight: DTensor, options: Options
) -> tuple[tuple[Tensor, Tensor, Tensor], Options, Shards]:
    """A rank's activations and rows of the weight, differentiable, and who has the others'.

    Raises:
        TypeError, ValueError: as ``views``.
    """
    options = _options(options)
    _same_kind(("h_a", "h_b", "weight"), (h_a, h_b, weight))
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(f"weight must be on a one-dimensional mesh, got {mesh}: take one of its dimensions")
    group = _group(weight, "weight", 0, accepted=(0,))
    if group is None:
        raise ValueError(f"weight must be Shard(0), its features in shards, got {weight.placements}")
    locals_ = []
    for name, h in (("h_a", h_a), ("h_b", h_b)):
        _group(h, name, 0, accepted=(0,))
        cut = h if h.placements == (Shard(0),) else h.redistribute(placements=[Shard(0)])
        locals_.append(cut.to_local(grad_placements=cut.placements))
    rows = weight.to_local(grad_placements=weight.placements)
    return (*locals_, rows), options, Shards(group, None, len(weight))


def _options(options: Options) -> Options:
    """With the group that is in the tensors."""
    for name, value in (("group", options.group), ("gradient", options.gradient)):
        if value is not None:
            raise ValueError(f"{name} must not be given with DTensors, which say who has what, got {name}={value!r}")
    if options.statistics != "global":
        raise ValueError(f"statistics must be 'global' with DTensors, got {options.statistics!r}")
    known = dataclasses.replace(options, group="world", gradient="official")
    check_group_options(known)
    return known


def _same_kind(names: Sequence[str], tensors: Sequence[object]) -> None:
    for name, x in zip(names, tensors, strict=True):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor as the others are, got {type(x).__name__}")
        if x.dim() != 2:
            raise ValueError(f"{name} must be 2-D, got shape {tuple(x.shape)}")
        if x.device_mesh != tensors[0].device_mesh:
            raise ValueError(
                f"{names[0]} and {name} must be on the same mesh, got {tensors[0].device_mesh} and {x.device_mesh}"
            )
    if tensors[0].device_mesh.get_coordinate() is None:
        raise ValueError(f"this process is not in the mesh of {names[0]}: {tensors[0].device_mesh}")


def _group(x: DTensor, name: str, dim: int, accepted: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The ranks over which a dimension is cut; None: it is not."""
    found = []
    for of_mesh, placement in enumerate(x.placements):
        if not _is(placement, accepted):
            shards = " and ".join(f"Shard({dim})" for dim in accepted)
            raise ValueError(f"{name} must have the placements {shards}, each once, or Replicate(), got {x.placements}")
        if isinstance(placement, Shard) and placement.dim % x.dim() == dim:
            found.append(of_mesh)
    if len(found) > 1:
        raise ValueError(f"{name} must have the placement Shard({dim}) once, got {x.placements}")
    return x.device_mesh.get_group(found[0]) if found else None


def _is(placement: Placement, accepted: tuple[int, ...]) -> bool:
    return isinstance(placement, Replicate) or (type(placement) is Shard and placement.dim % 2 in accepted)
