"""What a call takes, stated and checked once: the local loss, the distributed one and the module share it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import scalars
from .normalization import Normalization
from .scalars import integer as integer

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | str

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENTS = ("official", "lightly")
STATISTICS = ("global", "local")
REDUCE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


@dataclasses.dataclass(eq=False)
class Options:
    """Everything about a call that is not a tensor, as the user gave it; barlow_twins_loss documents each."""

    lambd: float = 0.0051
    scale: float = 1.0
    normalization: str | Normalization = "batch_norm"
    eps: float | None = None
    route: str = "auto"
    backend: str = "auto"
    return_terms: bool = False
    group: Group | None = None
    gradient: str | None = None
    statistics: str = "global"
    reduce_dtype: torch.dtype | None = None


def check_group_options(options: Options) -> None:
    """Whether what is said about several processes is acceptable, whatever the tensors are."""
    gradient, statistics, reduce_dtype = options.gradient, options.statistics, options.reduce_dtype
    if options.group is None and gradient is None and statistics == "global" and reduce_dtype is None:
        return
    if gradient is not None and gradient not in GRADIENTS:
        raise ValueError(f"gradient must be {' or '.join(map(repr, GRADIENTS))}, got {gradient!r}")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be {' or '.join(map(repr, STATISTICS))}, got {statistics!r}")
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype must be {', '.join(map(str, REDUCE_DTYPES))}, got {reduce_dtype!r}")
    if options.group is None:
        given = {"gradient": gradient, "statistics": None if statistics == "global" else statistics}
        for name, value in {**given, "reduce_dtype": reduce_dtype}.items():
            if value is not None:
                raise ValueError(f"{name} is about several processes: got {name}={value!r} without group")
    elif gradient is None:
        raise ValueError(
            "with a group, gradient must be given: 'official' (dL/dz of this rank's samples; DDP's average is then 1/P "
            "of the gradient of L) or 'lightly' (P times that; DDP's average is then the gradient of L)"
        )
    if isinstance(options.group, str) and options.group != "world":
        raise ValueError(
            f"group must be a process group, a one-dimensional DeviceMesh or 'world', got {options.group!r}"
        )


def check_inputs(
    z_a: Tensor,
    z_b: Tensor,
    min_samples: int = 2,
    names: tuple[str, str] = ("z_a", "z_b"),
    of: str = "features D",
    min_features: int = 1,
) -> None:
    """Two views' projector outputs, (N, D), or activations, (N, H), of one shape, dtype and device."""
    if type(z_a) is type(z_b) is Tensor and not (z_a.is_nested or z_b.is_nested):  # what is right, soon
        shape, dtype = z_a.shape, z_a.dtype
        if (
            shape == z_b.shape
            and len(shape) == 2
            and shape[0] >= min_samples
            and shape[1] >= min_features
            and dtype is z_b.dtype
            and dtype in DTYPES
            and z_a.layout is z_b.layout is torch.strided
            and z_a.device == z_b.device
        ):
            return
    for name, z in zip(names, (z_a, z_b), strict=True):
        if not isinstance(z, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
        if z.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}")
        if z.layout != torch.strided or z.is_nested:
            got = "a nested tensor" if z.is_nested else f"layout {z.layout}"
            raise TypeError(f"{name} must be a dense (strided) tensor, got {got}")
        if z.dim() != 2:
            raise ValueError(f"{name} must be 2-D, (samples N, {of}), got shape {tuple(z.shape)}")
    both = " and ".join(names)
    if z_a.shape != z_b.shape:
        raise ValueError(f"{both} must have the same shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    if z_a.dtype != z_b.dtype:
        raise TypeError(f"{both} must have the same dtype, got {z_a.dtype} and {z_b.dtype}")
    if z_a.device != z_b.device:
        raise ValueError(f"{both} must be on the same device, got {z_a.device} and {z_b.device}")
    n, d = z_a.shape
    if n < min_samples:
        raise ValueError(
            f"{both} must have at least {min_samples} samples (N >= {min_samples}), got N = {n}"
            if min_samples > 1
            else f"{both} must have at least 1 sample on every rank, got 0"
        )
    if d < min_features:
        what, _, letter = of.rpartition(" ")
        raise ValueError(f"{both} must have at least 1 {what[:-1]} ({letter} >= 1), got {letter} = {d}")


def check_weight(weight: Tensor, h: Tensor, min_features: int = 1) -> None:
    """The last layer's weight, (D, H), beside the activations that it takes."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_nested:
        got = "a nested tensor" if weight.is_nested else f"layout {weight.layout}"
        raise TypeError(f"weight must be a dense (strided) tensor, got {got}")
    if weight.dim() != 2 or weight.shape[1] != h.shape[1] or len(weight) < min_features:
        raise ValueError(
            f"weight must be 2-D, (features D >= 1, hidden units H = {h.shape[1]}), got shape {tuple(weight.shape)}"
        )
    if weight.dtype != h.dtype:
        raise TypeError(f"weight and h_a must have the same dtype, got {weight.dtype} and {h.dtype}")
    if weight.device != h.device:
        raise ValueError(f"weight and h_a must be on the same device, got {weight.device} and {h.device}")


def finite(name: str, value: float) -> float:
    """A finite number, as a float. Where a call is compiled it may be a symbol, whose value the operators check."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    return value if torch.compiler.is_compiling() else scalars.finite(name, value)
