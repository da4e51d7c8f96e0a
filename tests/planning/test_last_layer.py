"""What plan says of the last layer and the loss in one, against what the operators do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tracing import Trace

from barlow_fused import barlow_twins_loss, linear_barlow_twins_loss, plan
from barlow_fused.__main__ import main
from barlow_fused.linear import route as routes
from barlow_fused.planning import last_layer
from barlow_fused.planning.cost import Problem
from barlow_fused.planning.devices import resolve_device

SHAPES = [(256, 128, 8192), (256, 512, 8192), (512, 64, 16384), (1024, 256, 8192), (128, 2048, 16384)]
MANY = [(2048, 512, 2048), (4096, 1024, 1024), (1024, 256, 1024)]
CASES = [(s, r) for s in SHAPES for r in ("gram", "hidden")] + [(s, r) for s in MANY for r in ("direct", "hidden")]


def peak(call, n, h, d, dtype, device):
    """Bytes beyond what goes in and comes out."""
    shapes = (n, h), (n, h), (d, h)
    if device == "cpu":
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    else:
        inputs = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    with Trace() as trace:
        grads = torch.autograd.grad(call(*inputs), inputs)
    return trace.peak - sum(g.nbytes for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize(("shape", "route"), CASES)
def test_memory(shape, route, device, dtype):
    n, h, d = shape
    made = plan(n, d, dtype, device=device, route=route, backend="torch", hidden=h)
    of_call = peak(lambda *x: linear_barlow_twins_loss(*x, route=route, backend="torch"), *shape, dtype, device)
    assert made.route == route
    assert of_call / 1.35 - 2**20 <= made.fused.peak_memory <= 1.35 * of_call + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_layer_and_the_loss_by_themselves(dtype):
    n, h, d = 512, 64, 16384
    made = plan(n, d, dtype, device="cpu", backend="torch", hidden=h)
    of_call = peak(lambda a, b, w: barlow_twins_loss(a @ w.T, b @ w.T, backend="torch"), n, h, d, dtype, "cpu")
    assert of_call / 1.35 <= made.separate.peak_memory <= 1.35 * of_call


def test_auto_is_what_is_predicted_ahead():
    """Where arithmetic is what takes the time."""
    device = resolve_device("h200")
    device = dataclasses.replace(device, known=dataclasses.replace(device.known, bandwidth=1e30))
    for n in (64, 512, 4096):
        for h in (8, 100, 300, 600, 3000):
            for d in (256, 4096, 65536):
                if h > 4 * d:
                    continue
                other = "gram" if 2 * n <= d else "direct"
                for dtype in (torch.float32, torch.float64):
                    p = Problem(n, d, dtype, device, 1, other)
                    times = {r: last_layer.linear_cost(p, h, r, "torch", None).floor for r in (other, "hidden")}
                    taken = routes.choose_linear_route("auto", n, h, d, "auto", routes.hidden_rate("cuda", dtype))
                    assert times[taken] <= 1.05 * min(times.values()), (n, h, d, times)


def test_half_precision_on_accelerators_leaves_hidden_alone_for_longer():
    rate = routes.hidden_rate("cuda", torch.bfloat16)
    for h, taken in ((64, "hidden"), (300, "hidden"), (1000, "gram"), (2000, "gram")):
        assert routes.choose_linear_route("auto", 4096, h, 65536, "auto", rate) == taken
        assert routes.choose_linear_route("auto", 4096, h, 65536, "auto") == "hidden"


@pytest.mark.parametrize("world_size", [1, 8])
def test_the_table_says_what_it_saves(world_size, capsys):
    flags = ["--n", "4096", "--d", "1048576", "--hidden", "512", "--device", "h200", "--dtype", "bfloat16"]
    assert main(["plan", *flags, "--world-size", str(world_size)]) == 0
    out = capsys.readouterr().out
    assert "linear_barlow_twins_loss saves" in out
    assert "H = 512, D = 1048576" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_bad_input_is_named(capsys):
    assert main(["plan", "--n", "64", "--d", "512", "--hidden", "0"]) == 2
    assert "hidden must be at least 1, got 0" in capsys.readouterr().err
    assert main(["plan", "--n", "64", "--d", "512", "--hidden", "8", "--backend", "reference"]) == 2
    assert "cannot be planned with backend='reference'" in capsys.readouterr().err
    assert main(["plan", "--n", "64", "--d", "512", "--route", "hidden"]) == 2
    assert "route must be" in capsys.readouterr().err
