"""What one training step of a projector, the loss and the optimiser costs: data parallel, or its last layer in shards.

What stands before the projector (the backbone) is not counted. Samples are shared over P ranks, N together. A layer of
I x O weights takes 12 n I O FLOPs for n samples of two views, forward and backward. Data parallel, every rank holds the
last layer's D H weights, their gradient and their optimiser state, and sums the gradient over the ranks; in
shards it has a P-th of them, gathers the hidden activations, (N, H) of each view, and sums their gradients back.

    memory, bytes       data parallel            in shards
    weights             4 (all)                  4 (others + D H / P)          optimiser the same k times
    gradients           4 (all)                  4 (others + D H / P)          buckets the same, data parallel
    cast                s D H                    s D H / P                     the last layer's weight, in halves
    update              4 D H                    4 D H / P                     the optimiser's scratch
    embeddings          4 n D s                  4 N (D / P) s                 two views and their gradients
    gathered            -                        4 N H s                       h and its gradient
    layers before       10 n (widths) s          the same                      what their backward pass needs
    loss                its peak beyond z (cost.py); with features in shards of (N, D / P)

s is the size of a number in the activations' dtype, k the optimiser's: 1 for sgd and lars, 2 for adamw. Not all of it
is there at once (``StepCost.memory``): first the embeddings and what the loss needs, then the last layer's gradient
and that of the embeddings, then the gradients and the update.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap

import torch

from ..arguments import DTYPES, integer
from ..choice import choose_backend, choose_route
from ..distributed.agreement import FIELDS
from .cost import COSTS, Problem
from .devices import resolve_device
from .network import Collective, Network, direct_collectives, gram_collectives
from .plan import _quantity, _wrap

OPTIMIZERS = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers of state for each weight
MEMORY = {"h100": 80e9, "h200": 141e9, "a100": 80e9, "b200": 180e9}  # bytes, datasheets
TITLE = 16
LAYERS_BEFORE = 10  # arrays of n numbers for each unit of the layers before the last: two views of five


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One way to train the last layer, each rank."""

    flops: int
    weights: int  # bytes, as all that follow
    gradients: int
    buckets: int
    cast: int
    optimizer: int
    update: int
    embeddings: int
    gathered: int
    before: int
    loss: int
    collectives: tuple[Collective, ...]
    network: float  # seconds, one collective after the other
    compute: float  # seconds, products and the optimiser's traffic

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        held = self.weights + self.optimizer + self.buckets + self.before + self.gathered
        return held + max(
            self.embeddings + self.loss + self.cast,
            self.embeddings // 2 + self.gradients + self.cast,
            self.gradients - self.buckets + self.update,
        )

    @property
    def step(self) -> float:
        """Seconds, where nothing overlaps."""
        return self.network + self.compute


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A training step of a projector; ``str()`` is a table.

    Attributes:
        n, widths, features, dtype, world_size, optimizer: what was asked.
        route: of the loss.
        data_parallel, sharded: their costs, for each rank.
        memory_of_device: bytes; None if it is not known.
    """

    n: int
    features: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    world_size: int
    optimizer: str
    device: str
    route: str
    data_parallel: StepCost
    sharded: StepCost
    memory_of_device: float | None

    def __str__(self) -> str:
        both = self.data_parallel, self.sharded
        shape = "-".join(map(str, self.widths))
        lines = [
            "A training step of projector, loss and optimiser, predicted for each rank",
            _wrap("inputs", f"N = {self.n} (all ranks), {self.world_size} ranks, {self.features} features before it"),
            _wrap(
                "projector", f"{shape}, {str(self.dtype).removeprefix('torch.')}, {self.optimizer}; loss: {self.route}"
            ),
            _wrap("device", self.device),
            "",
            f"{'':{TITLE}}{'data parallel':>20}{'last layer in shards':>24}",
        ]
        for title, field, unit in (
            ("FLOPs", "flops", "FLOP"),
            *((name, name, "B") for name in ("weights", "gradients", "buckets", "cast", "optimizer", "update")),
            *((name, name, "B") for name in ("embeddings", "gathered")),
            ("layers before", "before", "B"),
            ("loss", "loss", "B"),
            ("memory, peak", "memory", "B"),
            ("network", "network", "s"),
            ("compute", "compute", "s"),
            ("step", "step", "s"),
        ):
            ours = [_quantity(getattr(cost, field), unit) for cost in both]
            lines.append(f"{title:{TITLE}}{ours[0]:>20}{ours[1]:>24}")
        if self.memory_of_device:
            fits = ["fits" if cost.memory <= self.memory_of_device else "does not fit" for cost in both]
            lines.append(f"{'in ' + _quantity(self.memory_of_device, 'B'):{TITLE}}{fits[0]:>20}{fits[1]:>24}")
        lines += ["", f"{'collective':{TITLE + 4}}{'data parallel':>16}    {'in shards':{TITLE + 2}}"]
        for one, other in itertools.zip_longest(*(cost.collectives for cost in both)):
            lines.append(f"{_shown(one)}    {_shown(other)}".rstrip())
        note = "bytes that a rank hands to each; floors at the device's rates, nothing overlaps; no backbone"
        return "\n".join([*lines, "", textwrap.fill(note, 80)])

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def to_dict(self) -> dict:
        """The same as plain numbers and strings."""
        made = {**dataclasses.asdict(self), "dtype": self._dtype}
        for name in ("data_parallel", "sharded"):
            cost = getattr(self, name)
            made[name] |= {"memory": cost.memory, "step": cost.step}
        return made


def step_plan(
    n: int,
    projector: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    world_size: int = 1,
    optimizer: str = "lars",
    features: int = 2048,
    route: str = "auto",
    backend: str = "auto",
    network: Network | None = None,
) -> StepPlan:
    """What a training step of a projector, the loss and the optimiser costs each rank.

    >>> print(step_plan(4096, "8192-8192-1048576", torch.bfloat16, "h200", world_size=64))

    Args:
        n: samples of all ranks, divisible by ``world_size``.
        projector: widths of its layers; the last is D, the one before H (``features`` if there is only one).
        dtype: of the activations; weights, gradients and the optimiser's state are float32 at least.
        optimizer: ``"sgd"``, ``"lars"`` or ``"adamw"``.
        features: what the first layer is given.
        device, world_size, route, backend, network: as for :func:`plan`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    n, world_size, features = integer("n", n, 2), integer("world_size", world_size, 1), integer("features", features, 1)
    try:
        widths = tuple(integer("projector", int(width), 1) for width in projector.split("-"))
    except ValueError:
        raise ValueError(f"projector must be widths such as 8192-8192-65536, got {projector!r}") from None
    if n % world_size:
        raise ValueError(f"n must be divisible by world_size (ranks share it equally), got {n} and {world_size}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    target, d = resolve_device(device), widths[-1]
    chosen = choose_route(route, n, d, choose_backend(backend))
    architecture = None if target.here else target.about.architecture
    named = choose_backend(backend, target.torch_device, dtype, architecture, (n, d), chosen)
    problem = Problem(n, d, dtype, target, world_size, chosen)
    network = network or Network()
    arguments = (problem, (features, *widths), optimizer, named, network)
    return StepPlan(
        n, features, widths, dtype, world_size, optimizer, target.label, chosen,
        _cost(*arguments, sharded=False), _cost(*arguments, sharded=True),
        MEMORY.get(device) if isinstance(device, str) else None,
    )  # fmt: skip


def features_collectives(p: Problem, backend: str) -> list[Collective]:
    """The loss's own, with features in shards (distributed/sharded.py)."""
    if p.route == "gram":
        sums = [c for c in gram_collectives(p, backend) if c.kind == "all_reduce" and not c.backward]
        return [Collective("header", "all_gather", FIELDS * 8), *sums]
    block = p.n * p.d // p.world_size * p.compute_dtype.itemsize
    return [
        Collective("header", "all_gather", FIELDS * 8),
        Collective("view b", "all_gather", block),
        Collective("scalars", "all_reduce", 2 * 8),
        Collective("view b again", "all_gather", block, backward=True),
        Collective("view a", "all_gather", block, backward=True),
    ]


def _cost(
    p: Problem, widths: tuple[int, ...], optimizer: str, backend: str, network: Network, sharded: bool
) -> StepCost:
    ranks, n, s = p.world_size, p.n // p.world_size, p.dtype.itemsize
    *layers, (h, d) = itertools.pairwise(widths)
    before = sum(i * o for i, o in layers) + 2 * sum(o for _, o in layers)
    last = h * d
    own_last = -(-last // ranks) if sharded else last
    held = before + own_last
    loss = COSTS[backend](p)
    flops = loss.flops + 12 * n * sum(i * o for i, o in layers) + 12 * p.n * last // ranks
    width = max(4, s)
    collectives: list[Collective] = []
    if ranks > 1:
        summed = before if sharded else before + last
        if sharded:
            collectives += [Collective(f"h_{view}", "all_gather", n * h * s) for view in "ab"]
            collectives += features_collectives(p, backend)
            collectives += [Collective(f"dL/dh_{view}", "reduce_scatter", p.n * h * s, backward=True) for view in "ab"]
        else:
            collectives += gram_collectives(p, backend) if p.route == "gram" else direct_collectives(p)
        collectives.append(Collective("gradients", "all_reduce", width * summed, backward=True))
    shards = 4 * n * d * s if p.route == "gram" and ranks > 1 else 0  # of the all-to-all, which features in shards lack
    peak = loss.peak_memory - (shards if sharded else 0)
    state = OPTIMIZERS[optimizer]
    products = max(flops / p.device.product_rate(p.product_dtype), loss.bytes_moved / p.device.bandwidth)
    update = width * held * (3 + 2 * state) / p.device.bandwidth
    return StepCost(
        flops=flops,
        weights=width * held,
        gradients=width * held,
        buckets=width * (before if sharded else held) if ranks > 1 else 0,
        cast=s * own_last if s < width else 0,
        optimizer=width * held * state,
        update=width * own_last,
        embeddings=4 * n * d * s,
        gathered=4 * p.n * h * s if sharded and ranks > 1 else 0,
        before=LAYERS_BEFORE * n * sum(o for _, o in layers) * s,
        loss=max(0, peak),
        collectives=tuple(collectives),
        network=sum(network.seconds(c.kind, c.size, ranks) for c in collectives),
        compute=products + update,
    )


def _shown(collective: Collective | None) -> str:
    if collective is None:
        return " " * 36
    title = f"{collective.what} ({collective.kind.replace('_', '-')})"
    return f"{title:26}{_quantity(collective.size, 'B'):>10}"
