"""What the projector's last layer and the loss cost together: apart, or in one (``linear_barlow_twins_loss``).

Beyond what both need: the activations, (N, H), the weight, (D, H), and their gradients. FLOPs stand in linear/route.py;
memory and bytes are fits to what the operators allocate and move, as in cost.py, within a third
(tests/planning/test_last_layer.py).
"""

from __future__ import annotations

import dataclasses

from ..distributed.agreement import FIELDS
from ..linear import chunks, hidden, route
from .cost import COSTS, Cost, Problem, _cost, _slab_bytes, _traffic
from .network import Collective, Network, direct_collectives, gram_collectives, with_network

PARTIAL_PASSES = 150  # over (N, D) arrays of numbers in float32, by PyTorch's operators on a chunk


def with_layer(loss: Cost, p: Problem, h: int) -> Cost:
    """``nn.Linear`` and a loss after it: z and its gradient exist, of both views."""
    n, d, size = p.n // p.world_size, p.d, p.dtype.itemsize
    z = 2 * n * d * size  # of both views; its gradient is as large
    flops = loss.flops + 12 * n * h * d
    # z is written, its gradient read for h's and for the weight's; the weight is read for each view, twice, and its
    # gradient written for each and added.
    bytes_moved = loss.bytes_moved + _traffic(z, 3) + _traffic(d * h * size, 9, at_least=3)
    layer = p.seconds(12 * n * h * d, bytes_moved - loss.bytes_moved, p.dtype)
    added = loss.floor + layer
    return dataclasses.replace(
        loss,
        flops=flops,
        bytes_moved=bytes_moved,
        peak_memory=loss.peak_memory + 2 * z,
        floor=added,
        step=loss.step + layer if loss.step else 0.0,
    )


def linear_cost(p: Problem, h: int, route_: str, backend: str, network: Network | None) -> Cost:
    """``linear_barlow_twins_loss`` by a route."""
    cost = {"gram": _gram, "direct": _direct, "hidden": _hidden}[route_](p, h, backend)
    return with_network(cost, p, linear_collectives(p, h, route_, backend), network) if p.world_size > 1 else cost


def linear_collectives(p: Problem, h: int, route_: str, backend: str) -> list[Collective]:
    """Those of distributed/linear_gram.py, linear_direct.py and linear_hidden.py, in their order."""
    if route_ == "direct":
        return direct_collectives(p)
    n = p.n // p.world_size
    weights = Collective("weights", "all_reduce", 3 * p.world_size * 8, backward=True)
    if route_ == "gram":
        views, size = n * h * p.dtype.itemsize, p.compute_dtype.itemsize
        sums = [c for c in gram_collectives(p, backend) if c.kind == "all_reduce" and not c.backward]  # K and scalars
        return [
            Collective("header", "all_gather", FIELDS * 8),
            *(Collective(f"h_{view}", "all_gather", views) for view in "ab"),
            *sums,
            weights,
            *(Collective(f"gradient {view}", "all_to_all", p.n * h * size, backward=True) for view in "ab"),
        ]
    rows = min(n, h)
    r = min(rows * p.world_size, h)
    basis = 2 * p.world_size * rows * r + 2 * r * h + r * r
    return [
        Collective("header", "all_gather", FIELDS * 8),
        Collective("means", "all_reduce", 2 * h * 8),
        Collective("factors", "all_gather", (2 * rows * h + rows * rows) * 8),
        Collective("basis", "all_reduce", basis * 8),
        Collective("T", "all_reduce", 2 * r * r * 8),
        Collective("scalars", "all_reduce", 2 * 8),
        weights,
        Collective("gradients", "all_reduce", 4 * r * h * 8, backward=True),
    ]


def _gram(p: Problem, h: int, backend: str) -> Cost:
    n, d, size = p.n, -(-p.d // p.world_size), p.compute_dtype.itemsize
    activations, product = 2 * n * h * size, 2 * n * n * size
    flops = route.flops("gram", n, h, p.d) // p.world_size
    weight = _traffic(d * h * p.dtype.itemsize, 5, at_least=3)
    if p.device.type == "cpu" and backend == "torch" and p.world_size == 1:
        slab = _slab_bytes(d, n, size)
        converted = slab * h // (2 * n) if p.dtype.itemsize < size else 0  # a slab's rows of the weight
        peak = 4 * slab + product + 2 * activations + converted + 20 * d * size
        slabs = -(-2 * n * d * size // slab)
        bytes_moved = weight + _traffic(product, 8 + 2 * slabs) + _traffic(activations, 8)
        return _cost(p, flops, bytes_moved, peak, p.product_dtype)
    budget = chunks.CPU_CHUNK_BYTES if p.device.type == "cpu" else chunks.CHUNK_BYTES
    step = min(d, max(chunks.ALIGNMENT, budget // (2 * max(n, h) * size)))
    z, several = 2 * n * step * size, step < d
    copies = (5 if several else 4) if p.dtype.itemsize == size else (3.5 if several else 3)
    of_weight = 2 * step * h * size
    least = 2 if p.dtype.itemsize == size else 1
    peak = int(max(copies * z, least * z + of_weight) + product + 2 * activations + 20 * d * size)
    if backend == "torch":
        passes = PARTIAL_PASSES * n * d * size
    else:  # the loss's own, on a chunk that is made twice
        passes = COSTS[backend](p).bytes_moved + 6 * n * d * p.dtype.itemsize
    return _cost(p, flops, weight + passes, peak, p.product_dtype)


def _direct(p: Problem, h: int, backend: str) -> Cost:
    n, d, size = p.n // p.world_size, p.d, p.compute_dtype.itemsize
    if p.device.type != "cpu" or backend != "torch" or p.world_size > 1:  # z is made, and made again
        cost = with_layer(COSTS[backend](p), p, h)
        again = 4 * n * h * d
        moved = cost.bytes_moved + _traffic(2 * n * d * p.dtype.itemsize, 1)
        return _cost(p, cost.flops + again, moved, cost.peak_memory, p.product_dtype)
    activations, product, slab = 2 * n * h * size, d * d * size, _slab_bytes(n, d, size)
    peak = 2 * product + 2 * slab + 2 * activations + d * h * size
    if p.dtype.itemsize < size:
        peak += activations * 3 // 4 + d * h * size
    slabs = -(-2 * n * d * size // slab)
    bytes_moved = _traffic(product, 14 + 6 * slabs) + _traffic(activations, 12) + _traffic(d * h * size, 5 * slabs, 3)
    return _cost(p, route.flops("direct", n, h, d), bytes_moved, peak, p.product_dtype)


def _hidden(p: Problem, h: int, backend: str) -> Cost:
    n, d, size = p.n // p.world_size, -(-p.d // p.world_size), p.compute_dtype.itemsize
    rows = min(n, h)
    r = min(rows * p.world_size, h)
    elements = hidden.SLAB_ELEMENTS if p.device.type == "cpu" else hidden.SLAB_BYTES // size
    step = min(d, max(256, elements // (2 * r)))
    y, w = 2 * r * step * size, step * h * size
    if p.dtype.itemsize < size:
        w *= 3 if p.device.type == "cpu" else 2
    kept = (2 * n * r + 2 * r * h + r * r) * 8 + (6 * r * r + 4 * r * h) * 8 + (2 * r * h + r * r) * size
    decomposing = (3 * 8 + size) * 2 * n * h
    peak = max(decomposing, kept + 7 * y // 2 + w + 24 * d)
    flops = route.flops("hidden", p.n, h, p.d, r) // p.world_size
    bytes_moved = _traffic(d * h * p.dtype.itemsize, 5, at_least=3) + _traffic(n * h * 8, 30, at_least=6)
    if y > 2**24:
        bytes_moved += 30 * r * d * size
    cost = _cost(p, flops, bytes_moved, peak, p.compute_dtype)
    return dataclasses.replace(cost, floor=p.seconds(int(flops / route.HIDDEN_RATE), bytes_moved, p.compute_dtype))
