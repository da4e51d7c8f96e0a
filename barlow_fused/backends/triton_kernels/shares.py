"""How gram cuts its work, so that all multiprocessors end together: whole tiles first, and what is left in thin slices.

A work item is a tile of one view's K, summed over a slice of D. If all tiles are cut alike, the last wave of items may
leave most of the chip idle: 272 tiles on 132 multiprocessors are two waves and 8 tiles. So the first tiles fill whole
waves, and the others are cut more often: 264 tiles as they are, and 8 of which each is cut into 8. That is what
stream-K is for, with fixed shares; but items that run together still read the same columns of A_hat and B_hat, which
come from memory once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .configs import MAX_SPLIT, Blocks, Chip, cdiv, triangle

MAX_FIRST_SPLIT = 8  # slices of the tiles that fill whole waves; more are tried where all tiles are cut alike


class Cut(NamedTuple):
    """Some of the tiles, each in as many slices of so many steps of BLOCK_K."""

    tiles: int
    split: int
    steps: int

    @property
    def items(self) -> int:
        """Of both views: as many programs, and partial tiles."""
        return 2 * self.tiles * self.split


@functools.lru_cache(1024)
def shares(chip: Chip, n: int, d: int, itemsize: int, blocks: Blocks) -> tuple[Cut, Cut]:
    """The first tiles, whose items run first, and the others; either may be none.

    A multiprocessor takes as many steps as its items have; about 8 more to start, store and hand over, which those that
    share it do at once; and a tile's last phase, bound by what one multiprocessor gets from L2, about 2 a slice. A tile
    on the diagonal takes 1.25, since it reads no more than the triangle. The partial tiles may take the memory of the
    two input gradients, which do not exist yet, and always that of one slice.
    """
    tiles, steps = triangle(n, blocks.m), cdiv(d, blocks.k)
    budget = max(2 * tiles, 2 * n * d * itemsize // (blocks.m**2 * 4))
    resident = chip.resident(blocks)

    def cut(count: int, slices: int) -> Cut:
        length = cdiv(steps, slices)
        return Cut(count, cdiv(steps, length), length)

    slice_time = 1.25 if tiles == 1 else 2

    def time(choice: tuple[Cut, Cut]) -> float:
        programs = cdiv(sum(part.items for part in choice), chip.multiprocessors)
        slices = max(part.split for part in choice if part.tiles)
        return busiest(choice, chip.multiprocessors) + cdiv(programs, resident) * 8 + slice_time * slices

    most = min(MAX_SPLIT, steps)
    choices = [(cut(tiles, slices), cut(0, 1)) for slices in range(1, most + 1)]
    for slices in range(1, min(MAX_FIRST_SPLIT, most) + 1):
        waves = 2 * tiles * slices // chip.multiprocessors
        for count in {w * chip.multiprocessors // (2 * slices) for w in (waves - 1, waves) if w > 0}:
            choices += [
                (cut(count, slices), cut(tiles - count, s)) for s in range(slices + 1, most + 1) if count < tiles
            ]
    return min((c for c in choices if sum(part.items for part in c) <= budget), key=time)


def busiest(choice: tuple[Cut, Cut], multiprocessors: int) -> int:
    """Steps of the multiprocessor that has most of them, where each takes the next item as soon as it can."""
    first, rest = choice
    waves, more = divmod(first.items, multiprocessors)
    ends = ((more, (waves + 1) * first.steps), (multiprocessors - more, waves * first.steps))
    low = max(end for count, end in ends if count)
    high = low + cdiv(rest.items, multiprocessors) * rest.steps
    while low < high:  # the first time until which there is room for the rest
        middle = (low + high) // 2
        if sum(count * ((middle - end) // rest.steps) for count, end in ends if count) >= rest.items:
            high = middle
        else:
            low = middle + 1
    return low
