"""What a call would do with inputs of a shape, and what it would cost; nothing is run.

The choice of route and backend is choice.py's, the formulas stand in cost.py, the devices' rates in devices.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap

import torch

from .. import width
from ..arguments import DTYPES, integer
from ..choice import choose_backend, choose_route, why_route
from ..linear.route import choose_linear_route, hidden_rate
from . import last_layer
from .cost import COSTS, Cost, Problem, usual_cost
from .devices import resolve_device
from .network import Collective, Network, direct_collectives, gram_collectives, usual_collectives, with_network

TITLE = 14  # width of a plan's first column


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call of the loss runs, forward and backward, and what it costs each rank. ``str()`` is a table.

    Attributes:
        n: Samples of all ranks.
        d: Features.
        dtype: Of the inputs.
        world_size: Ranks.
        device: The device's name.
        route: The route that the call takes.
        backend: The backend that it takes.
        why: One sentence on why it takes this route.
        fused: What this package costs: ``flops``, ``bytes_moved``, ``peak_memory`` (bytes, beyond inputs and
            gradients), ``floor`` (seconds). For the CUDA backend on an H100 or H200 also the predicted seconds of its
            ``kernels``. With several ranks also ``all_to_all_bytes``, ``all_reduce_bytes``, ``all_gather_bytes``,
            ``sent_bytes``, ``network`` and ``step`` (seconds), and the ``collectives`` by name.
        usual: The same for the usual implementation, the official code's recipe.
        lower_bound: Seconds that any implementation of the route needs on this device: its FLOPs at the device's
            matrix-product rate, or 6 N D numbers moved (inputs read twice, gradients written).
        lambd: The λ that was asked about.
        kappa: κ of this N, D and λ.
        loss_floor: The loss (of scale 1) that no network gets below.
        c_ii: The C_ii that the floor pulls to.
        warning: One sentence if κ is above 0.5, else None.
        rates: The bandwidth and matrix-product rate behind the times, and where they come from.
        network: What connects the ranks; None without several.
        hidden: H where the projector's last layer was asked about, else None. ``fused`` is then
            ``linear_barlow_twins_loss``, and ``usual`` includes ``nn.Linear``.
        separate: With ``hidden``: ``nn.Linear`` and this package's loss after it.
    """

    n: int
    d: int
    dtype: torch.dtype
    world_size: int
    device: str
    route: str
    backend: str
    why: str
    fused: Cost
    usual: Cost
    lower_bound: float
    lambd: float
    kappa: float
    loss_floor: float
    c_ii: float
    warning: str | None
    rates: str
    network: Network | None = None
    hidden: int | None = None
    separate: Cost | None = None

    def __str__(self) -> str:
        ranks = f" (all ranks), {self.world_size} ranks" if self.world_size > 1 else ""
        lines = [
            "Barlow Twins loss, forward and backward" + (", predicted for each rank" if ranks else ""),
            _wrap("inputs", f"N = {self.n}{ranks}, {self._last_layer()}D = {self.d}, {_name(self.dtype)}"),
            _wrap("device", self.device),
            _wrap("rates", self.rates),
            _wrap("backend", self.backend),
            _wrap("route", f"{self.route}: {self.why}"),
            _wrap("loss", width.describe(self.n, self.d, self.lambd)),
            *([_wrap("warning", self.warning)] if self.warning else []),
            "",
            f"{'':{TITLE}}{'barlow_fused':>16}{self._separate('layer and loss')}{'usual':>16}{'usual/fused':>14}",
        ]
        for title, field, unit in (
            ("FLOPs", "flops", "FLOP"),
            ("bytes moved", "bytes_moved", "B"),
            ("peak memory", "peak_memory", "B"),
            ("all-to-all", "all_to_all_bytes", "B"),
            ("all-reduce", "all_reduce_bytes", "B"),
            ("all-gather", "all_gather_bytes", "B"),
            ("sent", "sent_bytes", "B"),
            ("floor", "floor", "s"),
            ("network", "network", "s"),
            ("step", "step", "s"),
        ):
            fused, usual = getattr(self.fused, field), getattr(self.usual, field)
            if fused or usual:
                ratio = f"{_three_digits(usual / fused)}x" if fused and usual else "-"
                separate = self._separate(_quantity(getattr(self.separate, field), unit) if self.separate else "")
                ours, theirs = _quantity(fused, unit), _quantity(usual, unit)
                lines.append(f"{title:{TITLE}}{ours:>16}{separate}{theirs:>16}{ratio:>14}")
        floor = "bytes or FLOPs at the device's rates, the slower" + (", without network" if ranks else "")
        return "\n".join(
            [
                *lines,
                "",
                *self._about_the_last_layer(),
                _wrap("peak memory", f"beyond {'activations, weight' if self.hidden else 'inputs'} and gradients"),
                _wrap("floor", f"{floor}; {_quantity(self.lower_bound, 's')} for any implementation of this route"),
                *(self._about_the_kernels() if self.fused.kernels else ()),
                *(self._about_the_network() if self.network else ()),
            ]
        )

    def _last_layer(self) -> str:
        return f"H = {self.hidden}, " if self.hidden else ""

    def _separate(self, text: str) -> str:
        return f"{text:>16}" if self.separate else ""

    def _about_the_last_layer(self) -> list[str]:
        if not self.separate:
            return []
        less = max(0, self.separate.peak_memory - self.fused.peak_memory)
        saved = f"linear_barlow_twins_loss saves {_quantity(less, 'B')} of {_quantity(self.separate.peak_memory, 'B')}"
        return [
            _wrap("last layer", f"{saved}; layer and loss: nn.Linear, then barlow_twins_loss; usual: nn.Linear too")
        ]

    def _about_the_kernels(self) -> list[str]:
        times = ", ".join(f"{name} {_quantity(seconds, 's')}" for name, seconds in self.fused.kernels)
        total = _quantity(sum(seconds for _, seconds in self.fused.kernels), "s")
        return [_wrap("kernels", f"{times}; {total} together: predicted, not measured")]

    def _about_the_network(self) -> list[str]:
        net = self.network
        return [
            _wrap("all-...", "bytes that a rank hands to these collectives; sent: to other ranks, in all of them"),
            _wrap(
                "network",
                f"alpha {_quantity(net.latency, 's')}, {_quantity(net.intra, 'B')}/s in a node of "
                f"{net.ranks_per_node} ranks, {_quantity(net.inter, 'B')}/s out of it; one collective after the other",
            ),
            _wrap("step", "floor and network, less what overlaps"),
            "",
            f"{'collective':25}{'barlow_fused':>13}    {'collective':25}{'usual':>13}",
            *(
                f"{_shown(ours):38}    {_shown(theirs)}".rstrip()
                for ours, theirs in itertools.zip_longest(self.fused.collectives, self.usual.collectives)
            ),
        ]

    def to_dict(self) -> dict:
        """The same as plain numbers and strings, ready for JSON."""
        return {**dataclasses.asdict(self), "dtype": _name(self.dtype)}


def plan(
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    world_size: int = 1,
    route: str = "auto",
    backend: str = "auto",
    network: Network | None = None,
    lambd: float = 0.0051,
    hidden: int | None = None,
) -> Plan:
    """Predict what ``barlow_twins_loss`` would do with inputs of shape (n, d), and what it would cost. Nothing is run.

    >>> print(plan(2048, 65536, torch.bfloat16, device="h200"))

    Args:
        n: Samples N >= 2 of the global batch (all ranks together).
        d: Features D >= 1.
        dtype: Of the inputs: float32, float64, bfloat16 or float16.
        device: A ``torch.device`` or its name; or ``"h200"``, ``"h100"``, ``"a100"``, ``"b200"`` to plan for hardware
            that is not here. None: the GPU if there is one, else the CPU. Devices that are not in the table of rates
            are measured, once per process.
        world_size: Ranks that share the batch. The costs are those of one rank.
        route: As for ``barlow_twins_loss``.
        backend: As for ``barlow_twins_loss``.
        network: With several ranks, what connects them. None: ``Network()``.
        lambd: The loss's λ >= 0. It costs nothing; the plan says what this N and D make of it.
        hidden: H, the units before the projector's last layer: plan ``linear_barlow_twins_loss``, whose route this may
            be, beside that layer and the loss.

    Returns:
        A ``Plan``.

    Raises:
        TypeError: An argument has the wrong type. The message names it.
        ValueError: An argument has a value that is not accepted. The message names it.
        RuntimeError: The backend cannot run there.
    """
    n, d, world_size = integer("n", n, 2), integer("d", d, 1), integer("world_size", world_size, 1)
    if n % world_size:
        raise ValueError(f"n must be divisible by world_size (ranks share it equally), got {n} and {world_size}")
    if dtype not in DTYPES:
        accepted = ", ".join(f"torch.{_name(accepted)}" for accepted in DTYPES)
        raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(f"dtype must be {accepted}, got {dtype!r}")
    target = resolve_device(device)
    named = choose_backend(backend)  # "reference" knows one route only; which one "auto" is follows from the route
    of_layer = None
    if hidden is not None:
        hidden = integer("hidden", hidden, 1)
        if named == "reference":
            raise ValueError("hidden is of linear_barlow_twins_loss: it cannot be planned with backend='reference'")
        of_layer = choose_linear_route(route, n, hidden, d, named, hidden_rate(target.type, dtype))
    chosen = choose_route("auto" if of_layer == "hidden" else route, n, d, named)
    architecture = None if target.here else target.about.architecture
    backend = choose_backend(backend, target.torch_device, dtype, architecture, (n, d), chosen)
    problem = Problem(n, d, dtype, target, world_size, chosen)
    network = (network or Network()) if world_size > 1 else None
    fused, usual, separate = *_costs(problem, backend, network), None
    why = why_route(route, n, d, backend)
    if of_layer:
        separate, usual = (last_layer.with_layer(cost, problem, hidden) for cost in (fused, usual))
        backend = "torch" if of_layer == "hidden" else backend
        fused = last_layer.linear_cost(problem, hidden, of_layer, backend, network)
        if of_layer == "hidden":
            asked = "asked for by the argument" if route == "hidden" else "fewest FLOPs"
            why = f"{asked}; z does not exist, R = {min(n, hidden)} in place of N"
    floor = width.loss_floor(n, d, lambd)
    return Plan(
        n=n,
        d=d,
        dtype=dtype,
        world_size=world_size,
        device=target.label,
        route=of_layer or chosen,
        backend=backend,
        why=why,
        fused=fused,
        usual=usual,
        lower_bound=problem.lower_bound,
        lambd=float(lambd),
        kappa=width.kappa(n, d, lambd),
        loss_floor=floor.loss,
        c_ii=floor.c_ii,
        warning=width.warning(n, d, lambd),
        rates=_rates(problem),
        network=network,
        hidden=hidden,
        separate=separate,
    )


def _costs(problem: Problem, backend: str, network: Network | None) -> tuple[Cost, Cost]:
    """Of this package's loss, and of the usual implementation's."""
    fused, usual = COSTS[backend](problem), usual_cost(problem)
    if network:
        gram = problem.route == "gram"
        collectives = gram_collectives(problem, backend) if gram else direct_collectives(problem)
        fused = with_network(fused, problem, collectives, network)
        usual = with_network(usual, problem, usual_collectives(problem, problem.dtype.itemsize), network)
    return fused, usual


def _rates(problem: Problem) -> str:
    device = problem.device
    products = [  # on CPUs this package and the usual implementation can multiply different dtypes
        f"{_quantity(device.product_rate(dtype), 'FLOP')}/s {_name(dtype)}"
        for dtype in dict.fromkeys((problem.product_dtype, problem.dtype))
    ]
    return f"{_quantity(device.bandwidth, 'B')}/s, {', '.join(products)} ({device.source(problem.dtype)})"


def _shown(collective: Collective | None) -> str:
    """A collective's line of the table."""
    if collective is None:
        return ""
    title = f"{collective.what} ({collective.kind.replace('_', '-')})"
    return f"{title:25}{_quantity(collective.size, 'B'):>13}"


def _wrap(title: str, text: str) -> str:
    return textwrap.fill(text, 80, initial_indent=f"{title:{TITLE}}", subsequent_indent=" " * TITLE)


def _quantity(value: float, unit: str) -> str:
    """A number with three digits and the prefix that suits it: 1.65 TFLOP, 268 MB, 5.86 µs."""
    units = (
        {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1} if unit == "s" else {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    )
    prefix = next((prefix for prefix in reversed(units) if value >= units[prefix]), next(iter(units)))
    return f"{_three_digits(value / units[prefix])} {prefix}{unit}" if value else "-"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
