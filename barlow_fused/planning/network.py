"""What the ranks of a group send one another, and how long that takes: an alpha-beta model.

A message of b bytes takes alpha + b / beta seconds. From that, for P ranks and b bytes a rank hands to a collective:

                 sent by each rank       seconds
    all_to_all   (P - 1) / P b           (P - 1) alpha + the longer of (R - 1) / P b / intra, (P - R) / P b / inter
    all_reduce   2 (P - 1) / P b         the faster of: ring   2 (P - 1) alpha + 2 (P - 1) / P b / beta
                                                        trees  2 log2(P) alpha + 2 b / beta
    all_gather   (P - 1) b               log2(P) alpha + (P - 1) b / beta
    reduce_      (P - 1) / P b           (P - 1) alpha + (P - 1) / P b / beta
     scatter

R ranks share a node. Within it a rank sends ``intra`` bytes a second. Out of it every rank has ``inter`` to itself;
rings and trees are laid over all R of them, so that beta is min(intra, R inter), and intra in one node.

The step's time assumes that collectives and computation overlap where the code lets them, and that neither slows the
other down; the forward pass takes a third of the computation, each view half of a pass:

    Gram     header, a's all-to-all, then b's beside a's K, a's sum beside b's K, b's sum, scalars;
             weights, a's gradient, then its all-to-all beside b's gradient, b's all-to-all
    direct, usual    nothing overlaps: C is needed before anything else can be done
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..backends.torch_partial import FLOAT64_SAMPLES, panel_sizes
from ..distributed.agreement import FIELDS
from .cost import Cost, Problem


@dataclasses.dataclass(frozen=True)
class Network:
    """What connects the ranks.

    The defaults are the datasheets' peaks for nodes of 8 H100 or H200 (NVLink 4) with a 400 Gbit/s adapter for each
    GPU, and a guess at the latency.

    Args:
        latency: Seconds of a message.
        intra: Bytes per second that a rank sends within its node.
        inter: Bytes per second that a rank sends to other nodes.
        ranks_per_node: Ranks that share a node.

    Raises:
        ValueError: One is not positive (the latency: is negative).
    """

    latency: float = 5e-6
    intra: float = 450e9
    inter: float = 50e9
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (field.name == "latency" and value == 0)) or not math.isfinite(value):
                raise ValueError(f"{field.name} must be above 0, got {value!r}")

    def sent(self, kind: str, size: int, ranks: int) -> int:
        """Bytes that each rank sends."""
        return round(
            {
                "all_to_all": (ranks - 1) / ranks,
                "reduce_scatter": (ranks - 1) / ranks,
                "all_reduce": 2 * (ranks - 1) / ranks,
            }.get(kind, ranks - 1)
            * size
        )

    def seconds(self, kind: str, size: int, ranks: int) -> float:
        """The time of a collective."""
        node = min(self.ranks_per_node, ranks)
        beta = self.intra if node == ranks else min(self.intra, node * self.inter)
        sent, depth = self.sent(kind, size, ranks), math.ceil(math.log2(ranks))
        if kind == "all_to_all":
            within, out = (node - 1) / ranks * size / self.intra, (ranks - node) / ranks * size / self.inter
            return (ranks - 1) * self.latency + max(within, out)
        if kind == "all_reduce":
            return min(2 * (ranks - 1) * self.latency + sent / beta, 2 * depth * self.latency + 2 * size / beta)
        if kind == "reduce_scatter":
            return (ranks - 1) * self.latency + sent / beta
        return depth * self.latency + sent / beta


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step."""

    what: str
    kind: str  # "all_to_all", "all_reduce", "all_gather" or "reduce_scatter"
    size: int  # bytes that a rank hands to it
    backward: bool = False


def gram_collectives(p: Problem, backend: str) -> list[Collective]:
    """Those of the Gram route (distributed/gram.py), in their order."""
    in_size, size = p.dtype.itemsize, p.compute_dtype.itemsize
    if backend == "torch" and p.n < FLOAT64_SAMPLES:
        size = 8
    view = p.n // p.world_size * p.d * in_size
    k = sum(panel_sizes(p.n)) * size
    return [
        Collective("header", "all_gather", FIELDS * 8),
        *(Collective(f"view {view_}", "all_to_all", view) for view_ in "ab"),
        *(Collective(f"K_{view_}", "all_reduce", k) for view_ in "ab"),
        Collective("scalars", "all_reduce", 4 * 8),
        Collective("weights", "all_reduce", 3 * p.world_size * 8, backward=True),
        *(Collective(f"gradient {view_}", "all_to_all", view, backward=True) for view_ in "ab"),
    ]


def direct_collectives(p: Problem) -> list[Collective]:
    """Those of the direct route."""
    return [
        Collective("header", "all_gather", FIELDS * 8),
        Collective("statistics", "all_gather", 4 * p.d * 8),
        Collective("C", "all_reduce", (p.d**2 + p.d) * p.compute_dtype.itemsize),
    ]


def usual_collectives(p: Problem, size: int) -> list[Collective]:
    """The official code's: C's sum, and SyncBatchNorm's statistics, forward and backward, of both views."""
    return [
        *(Collective(f"statistics {view}", "all_gather", (2 * p.d + 1) * 4) for view in "ab"),
        Collective("C", "all_reduce", p.d**2 * size),
        *(Collective(f"statistics {view}", "all_reduce", 2 * p.d * 4, backward=True) for view in "ab"),
    ]


def with_network(cost: Cost, p: Problem, collectives: list[Collective], network: Network) -> Cost:
    """``cost`` with what its collectives cost."""
    times = [network.seconds(c.kind, c.size, p.world_size) for c in collectives]
    step = cost.floor + sum(times)
    named = {c.what: t for c, t in zip(collectives, times, strict=True)}
    if "view b" in named:  # what can hide behind half of a pass, does
        forward, backward = cost.floor / 6, cost.floor / 3
        step -= min(named["view b"], forward) + min(named["K_a"], forward) + min(named["gradient a"], backward)
    sizes: dict[str, Any] = {
        f"{kind}_bytes": sum(c.size for c in collectives if c.kind == kind)
        for kind in ("all_to_all", "all_reduce", "all_gather")
    }
    sent = sum(network.sent(c.kind, c.size, p.world_size) for c in collectives)
    return dataclasses.replace(
        cost, **sizes, sent_bytes=sent, network=sum(times), step=step, collectives=tuple(collectives)
    )
