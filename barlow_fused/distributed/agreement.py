"""The loss over the batch of all ranks of a process group, exact, by either route.

P ranks hold n_r samples each, N together. ``C = A_hat^T B_hat / N`` is a sum over samples, its Gram matrices
``K = X_hat X_hat^T`` are sums over features, and each route shares its work accordingly:

* **Gram, feature-sharded.** An all-to-all a view turns (n_r, D) into (N, D / P): a rank then has all samples of its
  features, so their statistics, its part of c = diag(C) and its part of K are exact without asking anyone. K's lower
  triangles and four scalars are summed over the ranks, every rank computes the gradient of its features, and an
  all-to-all a view brings it back. D need not be divisible by P: shards differ in width, and nothing is padded.
* **Direct.** Statistics are gathered and combined (Chan et al. 1979), C is summed over the ranks. The gradient needs no
  communication.

The route follows from the global N, so it is the same everywhere. What travels (a rank's share, size = the inputs'):

                  Gram                                       direct
    header        all_gather, 17 int64                       the same
    inputs        2 all_to_all, n D size each                -
    statistics    -                                          all_gather, 4 D float64 (statistics="global")
    product       2 all_reduce, about N^2/2 float32 each     1 all_reduce, D^2 + D float32
    scalars       all_reduce, 2 + 2 S float64 (S segments)   -
    weights       in the backward pass: the gradients of the loss and its terms, all_reduce of 3 float64 ("lightly"),
                  or of 3 a rank ("official", Gram only)
    gradients     2 all_to_all, n D size each                -

View b travels while view a's K is computed, K_a's sum while K_b is; in the backward pass view a's gradient while
b's is computed. Half-precision inputs and gradients travel as they are. K and C are summed in float32, unless
``reduce_dtype`` says otherwise (by itself K is summed in float64 for float64 inputs, and by the torch backend below 128
samples, where it is small).

Local work is done by a backend's operations on a part of a batch (backends/torch_partial.py says which these are): the
torch backend's on every device, or the Triton backend's where it is asked for.

**The header** lets ranks see that they disagree (on D, dtype, options, who needs gradients) or that one was given
something invalid, before anyone waits for data that never comes: all of them raise. It costs one small collective a
call, on the CPU if the group can (as after ``init_process_group()`` without a backend, or with "cpu:gloo,cuda:nccl"),
else on the GPU, where reading it waits for the stream.

**Which gradient** a rank gets is a matter of convention (``gradient``): see :func:`barlow_twins_loss`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import backends
from .backends.torch_partial import Result, Segments
from .function import _without_autocast
from .loss import DTYPES, _check_inputs, _number
from .normalization import Normalization, resolve_normalization
from .plan import ROUTES, choose_backend, choose_route
from .reference import BarlowTwinsTerms

GRADIENTS = ("official", "lightly")
STATISTICS = ("global", "local")
DEVICES = ("cpu", "cuda")
FIELDS = 17  # of the header
PARTIAL = ("torch", "triton", "cuda")  # backends that can work on a part of a batch
REDUCE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)
ALIGNMENT = 8  # features: shards of wide inputs begin and end at multiples of it (16 bytes in half precision)

Group = dist.ProcessGroup | DeviceMesh | str


class Options(NamedTuple):
    """Everything about a call that is not a tensor, as the user gave it."""

    lambd: float
    scale: float
    normalization: str | Normalization
    eps: float | None
    route: str
    backend: str
    gradient: str
    statistics: str
    reduce_dtype: torch.dtype | None


class Rules(NamedTuple):
    """The same, checked and resolved."""

    lambd: float
    scale: float
    normalization: Normalization | None
    route: str  # may still be "auto"
    backend: str
    gradient: str
    statistics: str
    reduce_dtype: torch.dtype | None

    @property
    def ops(self) -> ModuleType:
        """The backend's operations on a part of a batch."""
        return backends.load_partial(self.backend)


def check_options(group: Group | None, gradient: str | None, statistics: str, reduce_dtype: torch.dtype | None) -> None:
    """Whether the arguments of a call over several processes are acceptable, whatever its tensors."""
    if gradient is not None and gradient not in GRADIENTS:
        raise ValueError(f"gradient must be {' or '.join(map(repr, GRADIENTS))}, got {gradient!r}")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be {' or '.join(map(repr, STATISTICS))}, got {statistics!r}")
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype must be {', '.join(map(str, REDUCE_DTYPES))}, got {reduce_dtype!r}")
    if group is not None and gradient is None:
        raise ValueError(
            "with a group, gradient must be given: 'official' (dL/dz of this rank's samples; DDP's average is then 1/P "
            "of the gradient of L) or 'lightly' (P times that; DDP's average is then the gradient of L)"
        )
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group must be a process group, a one-dimensional DeviceMesh or 'world', got {group!r}")


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


@torch.compiler.disable
def apply(
    z_a: Tensor,  # [n_r, D]
    z_b: Tensor,  # [n_r, D]
    options: Options,
    group: dist.ProcessGroup,
) -> BarlowTwinsTerms:
    """The loss of all ranks' samples and its terms, the same on every rank, differentiable.

    torch.compile does not look inside: its graph breaks here.
    """
    part = _agree(z_a, z_b, options, group)
    with _without_autocast(z_a.device.type):
        if part.needs != (False, False):
            return BarlowTwinsTerms(*_DistributedFunction.apply(z_a, z_b, part))
        forward = _gram_forward if part.route == "gram" else _direct_forward
        return forward(z_a.detach(), z_b.detach(), part)[0]


class Part(NamedTuple):
    """What this rank knows after the ranks agreed."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # samples of every rank
    d: int
    needs: tuple[bool, bool]  # which inputs need a gradient
    route: str
    rules: Rules

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
        """Features of each rank's shard."""
        count = len(self.sizes)
        unit = ALIGNMENT if self.d >= ALIGNMENT * ALIGNMENT * count else 1
        units = self.d // unit
        edges = [units * rank // count * unit for rank in range(count)] + [self.d]
        return [stop - start for start, stop in itertools.pairwise(edges)]

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


# The header


def _agree(z_a: Tensor, z_b: Tensor, options: Options, group: dist.ProcessGroup) -> Part:
    """Compare what the ranks were given; where they cannot compute together, every one of them raises."""
    rank = group.rank()
    own, rules, problem = [0] * FIELDS, None, None
    try:
        rules = _resolve(z_a, z_b, options, group)
        own = [1, *_fields(z_a, z_b, rules).values()]
    except Exception as error:  # the others must hear of it, whatever it is
        problem = error
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    header = torch.tensor(own, dtype=torch.int64).to(device)
    headers = _gather(header, group)
    if problem is not None:
        raise problem
    rows = headers.tolist()
    invalid = [str(other) for other, row in enumerate(rows) if not row[0]]
    if invalid:
        raise RuntimeError(f"the loss was given invalid arguments on rank {', '.join(invalid)} of the group: see there")
    columns = dict(zip(_fields(z_a, z_b, rules), list(zip(*rows, strict=True))[1:], strict=True))
    sizes = columns.pop("N")
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
    needs = (bool(columns["the gradient of z_a"][0]), bool(columns["the gradient of z_b"][0]))
    d = z_a.shape[1]
    return Part(group, rank, sizes, d, needs, choose_route(rules.route, sum(sizes), d), rules)


def _resolve(z_a: Tensor, z_b: Tensor, options: Options, group: dist.ProcessGroup) -> Rules:
    """This rank's arguments, checked."""
    _check_inputs(z_a, z_b, min_samples=1)
    if f"{z_a.device.type}:" not in dist.get_backend_config(group):
        raise ValueError(
            f"z_a and z_b are on {z_a.device}, where group cannot communicate: its backends are "
            f"{dist.get_backend_config(group)}"
        )
    backend = choose_backend(options.backend, z_a.device, z_a.dtype)
    if backend not in PARTIAL:
        if choose_backend(options.backend) != "auto":
            accepted = ", ".join(map(repr, ("auto", *PARTIAL)))
            raise RuntimeError(f"backend={backend!r} does not run over several processes: accepted are {accepted}")
        backend = "torch"
    return Rules(
        _number("lambd", options.lambd),
        _number("scale", options.scale),
        resolve_normalization(options.normalization, options.eps),
        choose_route(options.route),
        backend,
        options.gradient,
        options.statistics,
        options.reduce_dtype,
    )


def _fields(z_a: Tensor, z_b: Tensor, rules: Rules) -> dict[str, int]:
    """What the ranks must agree on (all but N), as integers."""
    convention, grad = rules.normalization, torch.is_grad_enabled()
    return {
        "N": z_a.shape[0],
        "D": z_a.shape[1],
        "dtype": DTYPES.index(z_a.dtype),
        "device": DEVICES.index(z_a.device.type) if z_a.device.type in DEVICES else -1,
        "the gradient of z_a": int(grad and z_a.requires_grad),
        "the gradient of z_b": int(grad and z_b.requires_grad),
        "route": ("auto", *ROUTES).index(rules.route),
        "backend": PARTIAL.index(rules.backend),
        "gradient": GRADIENTS.index(rules.gradient),
        "statistics": STATISTICS.index(rules.statistics),
        "reduce_dtype": REDUCE_DTYPES.index(rules.reduce_dtype),
        "lambd": _bits(rules.lambd),
        "scale": _bits(rules.scale),
        "the normalization's correction": -1 if convention is None else convention.correction,
        "the normalization's eps": 0 if convention is None else _bits(convention.eps),
        "the normalization's eps_added_to": int(convention is not None and convention.eps_added_to == "deviation"),
    }


def _describe(name: str, value: int) -> str:
    """A field of the header, as the user knows it."""
    names = {
        "dtype": DTYPES,
        "device": (*DEVICES, "another"),
        "the gradient of z_a": ("not needed", "needed"),
        "the gradient of z_b": ("not needed", "needed"),
        "route": ("auto", *ROUTES),
        "backend": PARTIAL,
        "gradient": GRADIENTS,
        "statistics": STATISTICS,
        "reduce_dtype": REDUCE_DTYPES,
        "the normalization's eps_added_to": ("variance", "deviation"),
    }
    if name in names:
        return str(names[name][value])
    is_float = name in ("lambd", "scale", "the normalization's eps")
    return f"{struct.unpack('<d', struct.pack('<q', value))[0]:g}" if is_float else str(value)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, stacked."""
    every = x.new_empty(group.size() * x.numel())
    dist.all_gather_into_tensor(every, x.reshape(-1), group=group)
    return every.view(-1, *x.shape)


# Autograd


class _DistributedFunction(torch.autograd.Function):
    """(z_a, z_b, part) -> (loss, on_diag, off_diag)."""

    @staticmethod
    def forward(ctx: Any, z_a: Tensor, z_b: Tensor, part: Part) -> tuple[Tensor, ...]:
        terms, saved = (_gram_forward if part.route == "gram" else _direct_forward)(z_a, z_b, part)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.part = part
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "barlow_twins_loss has no second derivative, and over several processes no create_graph=True"
            )
        part, saved = ctx.part, ctx.saved_tensors
        with _without_autocast(saved[0].device.type):
            return *(_gram_backward if part.route == "gram" else _direct_backward)(saved, grads, part), None


def _weights(grads: tuple[Tensor | None, ...], like: Tensor) -> Tensor:  # [3]
    """The gradients with respect to (loss, on_diag, off_diag)."""
    return torch.stack([like.new_zeros((), dtype=torch.float64) if g is None else g.double() for g in grads])


def _weights_of_sums(weights: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the two sums, on_diag and off_diag."""
    g_loss, g_on, g_off = weights.unbind()
    return g_on + g_loss * rules.scale, g_off + g_loss * (rules.scale * rules.lambd)


def _terms(on_diag: Tensor, off_diag: Tensor, rules: Rules, dtype: torch.dtype) -> BarlowTwinsTerms:
    """The terms, from float64 sums."""
    off_diag = off_diag.clamp_min(0)
    return BarlowTwinsTerms(
        *(t.to(dtype) for t in (rules.scale * (on_diag + rules.lambd * off_diag), on_diag, off_diag))
    )


# The Gram route


def _gram_forward(z_a: Tensor, z_b: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    arrivals = [_to_features(z, part) for z in (z_a, z_b)]  # both are on their way
    views, taus, sums = [], [], []
    for arrive in arrivals:
        shard = arrive()  # (N, D / P)
        moments = None if rules.normalization is None else ops.moments(shard, segments.sizes)
        views.append(ops.View(shard, moments, rules.normalization, segments))
        k, tau = ops.partial_gram(views[-1], part.d)
        taus.append(tau)
        sums.append(_sum(k, part))
    c = ops.diagonal(*views).div_(part.n)  # (D / P,)
    wide = c.double()
    scalars = torch.cat([torch.stack([(wide - 1).square().sum(), wide.square().sum()]), *taus])
    dist.all_reduce(scalars, group=part.group)
    tau = scalars[2:].view(2, -1)
    inner, product = ops.join_gram(tuple(wait() for wait in sums), tau, segments.sizes, part.d, views[0].product_dtype)
    terms = _terms(scalars[0], inner / part.n**2 - scalars[1], rules, c.dtype)
    moments = [] if rules.normalization is None else [view.moments for view in views]
    return terms, [views[0].z, views[1].z, c, product, tau, *moments]


def _gram_backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    *shards, c, product, tau = saved[:5]
    moments = saved[5:] or (None, None)
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip(shards, moments, strict=True)]
    weights = _weights(grads, c)
    if rules.gradient == "lightly":  # the gradient of the sum of all ranks' losses
        dist.all_reduce(weights, group=part.group)
        per_rank = weights[None]
    else:  # of each rank's loss for its own samples
        per_rank = weights.new_zeros(len(part.sizes), 3)
        per_rank[part.rank] = weights
        dist.all_reduce(per_rank, group=part.group)  # not a gather: it must never meet the header of a rank ahead
        if bool((per_rank == per_rank[0]).all()):
            per_rank = per_rank[:1]

    def gradient(view: int, w_on: Tensor, w_off: Tensor) -> Tensor:  # [N, D / P]
        return ops.input_grad(views, view, Result("gram", part.n, part.d, product, c, tau, w_on, w_off))

    arrivals: list[Callable[[], Tensor] | None] = [None, None]
    for view in (view for view in range(2) if part.needs[view]):
        if len(per_rank) == 1:
            grad = gradient(view, *_weights_of_sums(per_rank[0], rules))
        else:  # a gradient is linear in the two weights, which differ from rank to rank
            on, off = (torch.stack(w) for w in zip(*(_weights_of_sums(w, rules) for w in per_rank), strict=True))
            largest = [w.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for w in (on, off)]
            zero = torch.zeros_like(largest[0])
            parts = [gradient(view, largest[0], zero), gradient(view, zero, largest[1])]
            grad = torch.cat(
                [
                    sum(g * (w[rank] / most) for g, w, most in zip(rows, (on, off), largest, strict=True))
                    for rank, rows in enumerate(zip(*(g.split(part.sizes) for g in parts), strict=True))
                ]
            )
        arrivals[view] = _to_samples(grad, part)
    return [None if arrive is None else arrive() for arrive in arrivals]


def _to_features(z: Tensor, part: Part) -> Callable[[], Tensor]:
    """Send (n_r, D), this rank's samples; the result waits for (N, D / P), this rank's features of all samples."""
    n, widths = z.shape[0], part.widths
    send = z.new_empty(n * part.d)
    blocks = [block.view(n, width) for block, width in zip(send.split([n * w for w in widths]), widths, strict=True)]
    torch.split_with_sizes_copy(z.detach(), widths, dim=1, out=blocks)
    own = widths[part.rank]
    received, wait = _exchange(send, [n * w for w in widths], [size * own for size in part.sizes], part)
    return lambda: (wait(), received.view(part.n, own))[1]


def _to_samples(grad: Tensor, part: Part) -> Callable[[], Tensor]:
    """The way back: (N, D / P) to (n_r, D)."""
    own, n, widths = grad.shape[1], part.sizes[part.rank], part.widths
    received, wait = _exchange(grad.view(-1), [size * own for size in part.sizes], [n * w for w in widths], part)

    def arrive() -> Tensor:
        wait()
        blocks = received.split([n * w for w in widths])
        return torch.cat([block.view(n, width) for block, width in zip(blocks, widths, strict=True)], dim=1)

    return arrive


def _exchange(send: Tensor, send_sizes: list[int], receive_sizes: list[int], part: Part) -> tuple[Tensor, Callable]:
    received = send.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=part.group, async_op=True)
    return received, work.wait


def _sum(x: Tensor, part: Part) -> Callable[[], Tensor]:
    """Sum ``x`` over the ranks, in the dtype that the user wants it to travel in; the result waits for it."""
    travelling = x if part.rules.reduce_dtype is None else x.to(part.rules.reduce_dtype)
    work = dist.all_reduce(travelling, group=part.group, async_op=True)
    return lambda: (work.wait(), travelling.to(x.dtype))[1]


# The direct route


def _direct_forward(z_a: Tensor, z_b: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    moments: list[Tensor | None] = [None, None]
    if rules.normalization is not None:
        moments = [ops.moments(z, (z.shape[0],)) for z in (z_a, z_b)]
        if not part.local:
            moments = list(_combine(torch.stack(moments), part))
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip((z_a, z_b), moments, strict=True)]
    d = part.d
    summed = _sum(torch.cat([ops.partial_correlate(*views).view(-1), ops.diagonal(*views)]), part)()
    summed /= part.n
    product, c = summed[: d * d].view(d, d), summed[d * d :]
    product.fill_diagonal_(0)
    off_diag = torch.linalg.vecdot(product, product).sum(dtype=torch.float64)
    terms = _terms((c.double() - 1).square().sum(), off_diag, rules, c.dtype)
    return terms, [z_a, z_b, summed, *(m for m in moments if m is not None)]


def _direct_backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    z_a, z_b, summed = saved[:3]
    moments = saved[3:] or (None, None)
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip((z_a, z_b), moments, strict=True)]
    product, c = summed[: part.d**2].view(part.d, part.d), summed[part.d**2 :]
    weights = _weights(grads, c)
    if rules.gradient == "lightly":  # the gradient of the sum of all ranks' losses
        dist.all_reduce(weights, group=part.group)
    w_on, w_off = _weights_of_sums(weights, rules)
    total = Result("direct", part.n, part.d, product, c, None, w_on, w_off)
    return [ops.input_grad(views, view, total) if part.needs[view] else None for view in range(2)]


def _combine(moments: Tensor, part: Part) -> Tensor:  # [2, 3, 1, D] -> [2, 3, 1, D]
    """The moments of all ranks' samples from those of each rank's, in float64 (Chan et al. 1979)."""
    mean, residual, var = moments.double().unbind(1)
    own = torch.stack((mean + residual, var))  # (2, 2, 1, D): mean and variance of both views
    share = torch.tensor(part.sizes, dtype=own.dtype, device=own.device).div_(part.n).view(-1, 1, 1, 1)
    means, variances = _gather(own, part.group).unbind(1)  # (P, 2, 1, D)
    mean = (means * share).sum(0)
    var = ((variances + (means - mean).square()) * share).sum(0)
    rounded = mean.to(moments.dtype)
    return torch.stack((rounded, (mean - rounded).to(moments.dtype), var.to(moments.dtype)), 1)
