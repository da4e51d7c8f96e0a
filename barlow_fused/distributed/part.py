"""One rank's part of a batch: what the rank knows once all have agreed, and how the work is cut."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import backends
from ..backends.torch_partial import Segments
from ..normalization import Normalization

ALIGNMENT = 8  # features: shards of wide inputs begin and end at multiples of it (16 bytes in half precision)


class Rules(NamedTuple):
    """The options of a call, checked and resolved."""

    lambd: float
    scale: float
    normalization: Normalization | None
    route: str  # may still be "auto"
    backend: str  # may be "auto" until the ranks have agreed
    gradient: str
    statistics: str
    reduce_dtype: torch.dtype | None
    chunk: int = 0  # features at a time, of the loss with the last layer (linear/); 0: what caches or memory hold

    @property
    def ops(self) -> ModuleType:
        """The backend's operations on a part of a batch."""
        return backends.load_partial(self.backend)


class Part(NamedTuple):
    """What this rank knows after the ranks agreed."""

    group: dist.ProcessGroup | None  # over which samples are shared; None: all are here
    rank: int  # in it
    sizes: tuple[int, ...]  # samples of every rank of it
    d: int  # features of all ranks
    needs: tuple[bool, ...]  # which inputs need a gradient
    route: str
    rules: Rules
    features: dist.ProcessGroup | None = None  # over which features are shared; None: all are here
    own_d: int | None = None  # features that are here, where these are not all

    @property
    def n(self) -> int:
        """Samples of all ranks."""
        return sum(self.sizes)

    @property
    def local(self) -> bool:
        """Whether each rank's samples are standardised by themselves."""
        return self.rules.statistics == "local" and self.rules.normalization is not None

    @property
    def widths(self) -> list[int]:
        """Features of each rank's shard, of those that are here."""
        count, d = len(self.sizes), self.d if self.own_d is None else self.own_d
        unit = ALIGNMENT if d >= ALIGNMENT * ALIGNMENT * count else 1
        units = d // unit
        edges = [units * rank // count * unit for rank in range(count)] + [d]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    @property
    def columns(self) -> slice:
        """The features that this rank works on, of those of the weight that it has (the last layer's)."""
        if self.own_d is not None:
            return slice(0, self.own_d)
        start = sum(self.widths[: self.rank])
        return slice(start, start + self.widths[self.rank])

    def segments(self) -> Segments:
        """How the samples that this rank works on are standardised.

        With local statistics C is the mean of the ranks' own C, as in the libraries that know them: sample sizes that
        differ are then evened out by weights.
        """
        sizes, n = self.sizes, self.n
        if self.local:
            weights = tuple(n / (len(sizes) * size) for size in sizes)
            chosen = slice(None) if self.route == "gram" else slice(self.rank, self.rank + 1)
            return Segments(sizes[chosen], sizes[chosen], weights[chosen])
        return Segments((n,) if self.route == "gram" else (sizes[self.rank],), (n,), (1.0,))
