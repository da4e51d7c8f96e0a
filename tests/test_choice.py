"""The choice of route and backend: the argument, configure, the environment, the rule."""

from __future__ import annotations

import pytest
import torch

from barlow_fused import backends, choice, configure, plan
from barlow_fused.backends import why_unusable
from barlow_fused.choice import choose_backend, choose_route, configured


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    monkeypatch.delenv("BARLOW_FUSED_ROUTE", raising=False)
    monkeypatch.delenv("BARLOW_FUSED_BACKEND", raising=False)
    with configure():
        yield


@pytest.mark.parametrize(
    ("n", "d", "route"),
    [(1024, 2048, "gram"), (1025, 2048, "direct"), (1024, 2047, "direct"), (2, 4, "gram"), (2, 3, "direct")],
)
def test_the_gram_route_is_taken_up_to_n_equal_to_half_of_d(n, d, route):
    assert choose_route("auto", n, d) == route
    assert plan(n, d, device="h200").route == route


def test_an_argument_beats_configure_which_beats_the_environment(monkeypatch):
    assert choose_route("auto", 2, 100) == "gram"
    monkeypatch.setenv("BARLOW_FUSED_ROUTE", "direct")
    assert choose_route("auto", 2, 100) == "direct"
    assert "BARLOW_FUSED_ROUTE" in plan(2, 100, device="h200").why
    with configure(route="gram"):
        assert choose_route("auto", 100, 2) == "gram"
        assert "configure" in plan(100, 2, device="h200").why
        assert choose_route("direct", 2, 100) == "direct"
        assert "argument" in plan(2, 100, device="h200", route="direct").why
    with configure(route="auto"):  # back to the rule, whatever the environment says
        assert choose_route("auto", 2, 100) == "gram"
        assert "N <= D/2" in plan(2, 100, device="h200").why
    assert choose_route("auto", 2, 100) == "direct"


def test_the_same_holds_for_backends(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu) == "torch"
    monkeypatch.setenv("BARLOW_FUSED_BACKEND", "reference")
    assert choose_backend("auto", cpu) == "reference"
    with configure(backend="torch"):
        assert choose_backend("auto", cpu) == "torch"
        assert choose_backend("reference", cpu) == "reference"
    assert choose_backend("auto", cpu) == "reference"


def test_a_measured_table_decides_what_auto_takes(monkeypatch):
    """The last row that the input reaches, of its backends the first that can run; PyTorch where there is none."""
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    rows = (choice.Measured(64, 1024, ("triton", "torch")), choice.Measured(512, 8192, ("cuda", "triton")))
    monkeypatch.setattr(choice, "FASTEST", {((9, 0), half): rows})
    monkeypatch.setattr(backends, "why_unusable", lambda name, *_: "not built" if name == missing else None)
    missing = None
    assert choice.fastest(gpu, half, (9, 0), (32, 8192)) == "torch"
    assert choice.fastest(gpu, half, (9, 0), (256, 8192)) == "triton"
    assert choice.fastest(gpu, half, (9, 0), (512, 8192)) == "cuda"
    assert choice.fastest(gpu, torch.float32, (9, 0), (512, 8192)) == "torch"
    assert choice.fastest(gpu, half, (8, 0), (512, 8192)) == "torch"
    assert choice.fastest(torch.device("cpu"), half, None, (512, 8192)) == "torch"
    missing = "cuda"
    assert choice.fastest(gpu, half, (9, 0), (512, 8192)) == "triton"


def test_configure_sets_from_now_on_and_nests():
    configure(backend="reference")
    assert configured() == {"backend": "reference"}
    with configure(route="direct"):
        with configure(route="gram", backend="torch"):
            assert configured() == {"route": "gram", "backend": "torch"}
        assert configured() == {"route": "direct", "backend": "reference"}
        with pytest.raises(ZeroDivisionError), configure(route="gram"):
            _ = 1 / 0
        assert configured() == {"route": "direct", "backend": "reference"}
    assert configured() == {"backend": "reference"}


def test_a_wrong_setting_changes_nothing(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*'torch'.* got 'fast'"):
        configure(route="gram", backend="fast")
    assert configured() == {}
    with pytest.raises(ValueError, match="route must be one of 'auto', 'gram', 'direct', got 'dual'"):
        configure(route="dual")
    monkeypatch.setenv("BARLOW_FUSED_ROUTE", "dual")
    with pytest.raises(ValueError, match="BARLOW_FUSED_ROUTE must be one of"):
        choose_route("auto", 2, 100)


def test_the_reference_knows_only_the_direct_route():
    assert choose_route("auto", 2, 100, "reference") == "direct"
    assert plan(2, 100, device="h200", backend="reference").route == "direct"
    with pytest.raises(ValueError, match="route='gram' cannot run with backend='reference'"):
        plan(2, 100, device="h200", route="gram", backend="reference")


def test_float64_is_left_to_pytorch():
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert "float64" in why_unusable("triton", device, torch.float64)
