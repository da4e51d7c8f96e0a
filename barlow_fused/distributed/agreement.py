"""What the ranks of a group agree on before any of them waits for data: the header, and what follows from it.

**The header** lets ranks see that they disagree (on D, dtype, options, who needs gradients) or that one was given
something invalid: all of them raise. It costs one small collective a call, on the CPU if the group can (as after
``init_process_group()`` without a backend, or with "cpu:gloo,cuda:nccl"), else on the GPU, where reading it waits for
the stream.

It also carries what each rank's GPU has been verified for: ``backend="auto"`` is the first backend, in rank 0's order,
that every rank may take.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..arguments import (
    DTYPES,
    GRADIENTS,
    REDUCE_DTYPES,
    STATISTICS,
    Options,
    check_group_options,
    check_inputs,
    check_weight,
    finite,
    integer,
)
from ..backends import accelerator
from ..choice import ROUTES, choose_backend, choose_route, fastest_over_ranks
from ..linear.route import choose_linear_route, hidden_rate
from ..normalization import resolve_normalization
from .collectives import gather
from .part import Part, Rules

if TYPE_CHECKING:
    from ..arguments import Group

DEVICES = ("cpu", *accelerator.GPUS)
FIELDS = 21  # of the header
PARTIAL = ("torch", "triton", "cuda")  # backends that can work on a part of a batch
BASE = len(PARTIAL) + 1
LINEAR_ROUTES = ("auto", *ROUTES, "hidden")
NAMES = {2: ("z_a", "z_b"), 3: ("h_a", "h_b", "weight")}  # of what a call is given, without and with the last layer


def resolve_group(group: Group) -> dist.ProcessGroup:
    """The process group that is meant, of which this process is a member.

    Raises:
        TypeError, ValueError: it is not one.
        RuntimeError: torch.distributed is not there, or not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group needs torch.distributed: call torch.distributed.init_process_group() first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a one-dimensional DeviceMesh, got {group}: take one of its dimensions")
        return group.get_group()
    if isinstance(group, str):
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    return group


class Shards(NamedTuple):
    """Over which ranks a call's inputs are shared."""

    samples: dist.ProcessGroup | None  # None: every rank has all of them
    features: dist.ProcessGroup | None = None  # None: every rank has all of them
    d: int | None = None  # features of all ranks, where these have some each: those of z, or the weight's rows

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those that there are."""
        return [group for group in self[:2] if group is not None]


def agree(inputs: Sequence[Tensor], options: Options, shards: Shards, chunk_features: int | None = None) -> Part:
    """Compare what the ranks were given; where they cannot compute together, every one of them raises.

    The inputs are both views, or both views of the last layer's inputs and its weight.
    """
    first = shards.groups[0]
    own, rules, problem = [0] * FIELDS, None, None
    try:
        rules = _resolve(inputs, options, shards, chunk_features)
        ranks = [1 if group is None else group.size() for group in shards[:2]]
        fields = {**_fields(inputs, rules, shards), **_verified(inputs, rules, *ranks)}
        own = [1, *fields.values()]
    except Exception as error:  # the others must hear of it, whatever it is
        problem = error
    on_cpu = "cpu:" in dist.get_backend_config(first)
    device = torch.device("cpu") if on_cpu else accelerator.current_gpu()
    headers = torch.tensor(own, dtype=torch.int64, device="cpu").to(device)
    for group in shards.groups:
        headers = gather(headers, group)
    rank = 0  # of this one, in all of them
    for group in shards.groups:
        rank += group.rank() * (first.size() if group is not first else 1)
    if problem is not None:
        raise problem
    rows = headers.view(-1, FIELDS).tolist()
    invalid = [str(other) for other, row in enumerate(rows) if not row[0]]
    if invalid:
        raise RuntimeError(f"the loss was given invalid arguments on rank {', '.join(invalid)} of the group: see there")
    columns = dict(zip(fields, list(zip(*rows, strict=True))[1:], strict=True))
    sizes = columns.pop("N")[: 1 if shards.samples is None else shards.samples.size()]
    verified = {route: columns.pop(f"verified for {route}") for route in ROUTES}
    for name, values in columns.items():
        other = next((other for other, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            shown = [_describe(name, values[rank]) for rank in (0, other)]
            raise ValueError(
                f"the ranks of the group disagree on {name}: {shown[0]} on rank 0, {shown[1]} on rank {other}"
            )
    if rules.statistics == "local" and rules.normalization is not None and min(sizes) < 2:
        raise ValueError(
            f"with statistics='local' every rank must have at least 2 samples, got {min(sizes)} on rank "
            f"{sizes.index(min(sizes))}"
        )
    if sum(sizes) < 2:
        raise ValueError(f"the ranks of the group must have at least 2 samples together, got {sum(sizes)}")
    part = Part(
        group=shards.samples,
        rank=0 if shards.samples is None else shards.samples.rank(),
        sizes=sizes,
        d=columns["D"][0],
        needs=_needs(inputs),
        route="",
        rules=rules,
        features=shards.features,
        own_d=None if shards.d is None else _features(inputs),
    )
    route = _route(part, inputs)
    backend = rules.backend
    if backend == "auto":
        backend = "torch" if route == "hidden" else _common(verified[route])
    return part._replace(route=route, rules=rules._replace(backend=backend))


def _features(inputs: Sequence[Tensor]) -> int:
    """Those that are here."""
    return len(inputs[2]) if len(inputs) == 3 else inputs[0].shape[1]


def _needs(inputs: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which inputs need a gradient."""
    grad = torch.is_grad_enabled()
    return tuple(grad and x.requires_grad for x in inputs)


def _route(part: Part, inputs: Sequence[Tensor]) -> str:
    """The route, from what all ranks have."""
    rules = part.rules
    if len(inputs) == 2:
        return choose_route(rules.route, part.n, part.d)
    x = inputs[0]
    h, rate = x.shape[1], hidden_rate(x.device.type, x.dtype)
    basis = sum(min(size, h) for size in part.sizes) if part.local else None
    return choose_linear_route(rules.route, part.n, h, part.d, rules.backend, rate, basis)


def _resolve(inputs: Sequence[Tensor], options: Options, shards: Shards, chunk_features: int | None) -> Rules:
    """This rank's arguments, checked."""
    check_group_options(options)
    z_a, z_b, *weight = inputs
    names = NAMES[len(inputs)]
    least = 1 if shards.d is None else 0  # what is cut into shards by itself may leave a rank without any
    check_inputs(z_a, z_b, least, names[:2], "hidden units H" if weight else "features D", 1 if weight else least)
    if weight:
        check_weight(*weight, z_a, least)
    for group in shards.groups:
        if f"{z_a.device.type}:" not in dist.get_backend_config(group):
            raise ValueError(
                f"{names[0]} and {names[1]} are on {z_a.device}, where group cannot communicate: its backends are "
                f"{dist.get_backend_config(group)}"
            )
    backend = choose_backend(options.backend)
    if backend != "auto":
        choose_backend(backend, z_a.device, z_a.dtype)  # raises where it cannot run
        if backend not in PARTIAL:
            accepted = ", ".join(map(repr, ("auto", *PARTIAL)))
            raise RuntimeError(f"backend={backend!r} does not run over several processes: accepted are {accepted}")
    return Rules(
        finite("lambd", options.lambd),
        finite("scale", options.scale),
        resolve_normalization(options.normalization, options.eps),
        choose_linear_route(options.route, 2, 2, 2, backend)
        if options.route == "hidden"
        else choose_route(options.route),
        backend,
        options.gradient,
        options.statistics,
        options.reduce_dtype,
        0 if chunk_features is None else integer("chunk_features", chunk_features, 1),
    )


def _fields(inputs: Sequence[Tensor], rules: Rules, shards: Shards) -> dict[str, int]:
    """What the ranks must agree on (all but N), as integers."""
    z_a, convention = inputs[0], rules.normalization
    linear = len(inputs) == 3
    needs = dict(zip(NAMES[len(inputs)], map(int, _needs(inputs)), strict=True))
    return {
        "N": z_a.shape[0],
        "D": _features(inputs) if shards.d is None else shards.d,
        "H": z_a.shape[1] if linear else 0,
        "dtype": DTYPES.index(z_a.dtype),
        "device": DEVICES.index(z_a.device.type) if z_a.device.type in DEVICES else -1,
        **{f"the gradient of {name}": need for name, need in needs.items()},
        **({} if linear else {"the gradient of weight": 0}),
        "route": LINEAR_ROUTES.index(rules.route),
        "backend": ("auto", *PARTIAL).index(rules.backend),
        "gradient": GRADIENTS.index(rules.gradient),
        "statistics": STATISTICS.index(rules.statistics),
        "reduce_dtype": REDUCE_DTYPES.index(rules.reduce_dtype),
        "lambd": _bits(rules.lambd),
        "scale": _bits(rules.scale),
        "the normalization's correction": -1 if convention is None else convention.correction,
        "the normalization's eps": 0 if convention is None else _bits(convention.eps),
        "the normalization's eps_added_to": int(convention is not None and convention.eps_added_to == "deviation"),
    }


def _verified(inputs: Sequence[Tensor], rules: Rules, ranks: int, others: int) -> dict[str, int]:
    """The backends that this rank may take, by route, the fastest first, as the digits of a number."""
    z = inputs[0]
    n, d = len(z), _features(inputs)
    numbers = {}
    for route, shape in (("gram", (n * ranks, max(1, d // ranks))), ("direct", (n, d))):  # what a rank multiplies
        names = fastest_over_ranks(z.device, z.dtype, shape, route) if rules.backend == "auto" else ()
        digits = [PARTIAL.index(name) + 1 for name in names]
        numbers[f"verified for {route}"] = sum(digit * BASE**place for place, digit in enumerate(digits))
    return numbers


def _common(numbers: tuple[int, ...]) -> str:
    """The first backend of rank 0's that all ranks may take; PyTorch's operators are always among them."""
    of_ranks = [[PARTIAL[digit - 1] for digit in _digits(number)] for number in numbers]
    return next(name for name in of_ranks[0] if all(name in names for names in of_ranks))


def _digits(number: int) -> list[int]:
    return [number % BASE, *_digits(number // BASE)] if number else []


def _describe(name: str, value: int) -> str:
    """A field of the header, as the user knows it."""
    names = {
        "dtype": DTYPES,
        "device": (*DEVICES, "another"),
        "route": LINEAR_ROUTES,
        "backend": ("auto", *PARTIAL),
        "gradient": GRADIENTS,
        "statistics": STATISTICS,
        "reduce_dtype": REDUCE_DTYPES,
        "the normalization's eps_added_to": ("variance", "deviation"),
    }
    if name.startswith("the gradient of "):
        return ("not needed", "needed")[value]
    if name == "H" and not value:
        return "none (no last layer)"
    if name in names:
        return str(names[name][value])
    if name == "the normalization's correction" and value < 0:
        return "no normalization"
    is_float = name in ("lambd", "scale", "the normalization's eps")
    return f"{struct.unpack('<d', struct.pack('<q', value))[0]:g}" if is_float else str(value)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]
