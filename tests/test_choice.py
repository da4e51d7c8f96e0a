"""The choice of route and backend: the argument, configure, the environment, the rule."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable

import pytest
import torch

from barlow_fused import backends, barlow_twins_loss, choice, configure, plan
from barlow_fused.backends import why_unusable
from barlow_fused.choice import choose_backend, choose_route, configured
from barlow_fused.verification import record
from barlow_fused.verification.key import key
from barlow_fused.verification.record import PASSED, Outcome, Record, Times, Unit


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    monkeypatch.delenv("BARLOW_FUSED_ROUTE", raising=False)
    monkeypatch.delenv("BARLOW_FUSED_BACKEND", raising=False)
    choice.forget()
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
    choice.forget()
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
    choice.forget()
    assert choose_backend("auto", cpu) == "reference"
    with configure(backend="torch"):
        assert choose_backend("auto", cpu) == "torch"
        assert choose_backend("reference", cpu) == "reference"
    assert choose_backend("auto", cpu) == "reference"


# A record of this machine's GPU; here the CPU plays its part

CPU = torch.device("cpu")


def a_record(fastest: str = "triton") -> Record:
    units = [Unit(name, "float32", "gram", ranks) for name in ("cuda", "triton") for ranks in (False, True)]
    seconds = {"torch": 4e-4, "cuda": 2e-4, "triton": 3e-4, fastest: 1e-4}
    times = (Times("float32", "gram", 64, 2048, seconds, True),)
    return Record(key(CPU), "", 1.0, tuple(Outcome(unit, PASSED, "") for unit in units), times)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Kernels seem to be usable on the CPU, and records are kept in a folder of the test's own."""
    monkeypatch.setenv("BARLOW_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("BARLOW_FUSED_VERIFY", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(backends, "why_unusable", lambda *_: None)
    choice.forget()
    yield record.path_of(key(CPU))
    choice.forget()


def auto(route: str = "gram", dtype: torch.dtype = torch.float32) -> str:
    return choice.resolve_backend("auto", CPU, dtype, None, (64, 2048), route)


def test_the_record_decides_and_never_changes_within_a_process(gpu):
    record.write(a_record("triton"), gpu)
    assert auto() == "triton"
    assert auto("direct") == auto("gram", torch.bfloat16) == "torch"
    assert choice.fastest_over_ranks(CPU, torch.float32, (64, 2048), "gram") == ("triton", "cuda", "torch")
    record.write(a_record("cuda"), gpu)
    assert auto() == "triton"
    gpu.unlink()
    assert auto() == "triton"
    choice.forget()
    assert auto() == "torch"
    record.write(a_record("cuda"), gpu)
    assert auto() == "torch"
    choice.forget()
    assert auto() == "cuda"


def test_all_threads_see_one_choice(gpu, monkeypatch):
    """Of many first calls at once, one looks for the record."""
    looks = []
    find = choice.find
    monkeypatch.setattr(choice, "find", lambda this: (looks.append(1), time.sleep(0.05), find(this))[2])
    record.write(a_record(), gpu)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: auto(), range(32))) == {"triton"}
    assert len(looks) == 1


def test_an_argument_configure_and_the_environment_come_before_the_record(gpu, monkeypatch):
    record.write(a_record(), gpu)
    where = (CPU, torch.float32, None, (64, 2048), "gram")
    assert choose_backend("auto", *where) == "triton"
    assert choose_backend("torch", *where) == "torch"
    monkeypatch.setenv("BARLOW_FUSED_BACKEND", "cuda")
    choice.forget()
    assert choose_backend("auto", *where) == "cuda"
    with configure(backend="torch"):
        assert choose_backend("auto", *where) == "torch"
    with configure(backend="auto"):
        assert choose_backend("auto", *where) == "triton"


def test_without_a_record_one_line_is_logged(gpu, caplog, monkeypatch):
    assert [auto(), auto("direct"), auto()] == ["torch"] * 3
    (line,) = [r for r in caplog.records if r.name == "barlow_fused"]
    assert "`barlow-fused verify`" in line.getMessage()
    assert "(cuda, triton) have not been verified there." in line.getMessage()
    for name, value in (("BARLOW_FUSED_VERIFY", "never"), ("LOCAL_RANK", "1")):
        caplog.clear()
        choice.forget()
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert auto() == "torch"
        assert not caplog.records
    record.write(a_record(), gpu)
    choice.forget()
    assert auto() == "triton"
    assert not caplog.records


def test_the_line_says_what_is_wrong_with_a_record_that_is_there(gpu, caplog):
    record.write(a_record(), gpu)
    gpu.write_text(gpu.read_text()[:100])
    assert auto() == "torch"
    assert f"{gpu} is damaged" in caplog.text


def test_to_block_is_to_verify_before_the_first_call(gpu, caplog, monkeypatch):
    monkeypatch.setenv("BARLOW_FUSED_VERIFY", "block")
    monkeypatch.setattr(choice, "ensure", lambda device: record.write(a_record(), gpu))
    assert auto() == "triton"
    assert not caplog.records
    gpu.unlink()
    choice.forget()
    monkeypatch.setattr(choice, "ensure", lambda device: "it fell over")
    assert auto() == "torch"
    assert "it fell over" in caplog.text


def test_programs_verify_first_unless_they_are_told_not_to(gpu, monkeypatch):
    for wanted, environment, asked in ((True, None, 1), (False, None, 0), (True, "never", 0), (True, "ask", 0)):
        asks = []
        monkeypatch.setattr(choice, "ensure", asks.append)
        choice.forget()
        with monkeypatch.context() as context:
            context.setenv("BARLOW_FUSED_VERIFY", environment or "")
            if environment is None:
                context.delenv("BARLOW_FUSED_VERIFY")
            choice.verify_first(CPU, wanted)
            os.environ.pop("BARLOW_FUSED_VERIFY")
        assert len(asks) == asked


def test_a_wrong_variable_is_named(gpu, monkeypatch):
    monkeypatch.setenv("BARLOW_FUSED_VERIFY", "yes")
    with pytest.raises(ValueError, match="BARLOW_FUSED_VERIFY must be one of 'ask', 'block', 'never', got 'yes'"):
        auto()


def test_a_compiled_graph_remembers_the_record(gpu):
    """A graph that a cache on disk has kept must not be used where another record says something else."""
    graphs = []

    def keep(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module.code)
        return module.forward

    z = torch.randn(8, 64)
    for fastest in ("cuda", "triton"):
        record.write(a_record(fastest), gpu)
        choice.forget()
        torch._dynamo.reset()
        torch.compile(lambda x: barlow_twins_loss(x, x + 1, route="direct"), backend=keep, fullgraph=True)(z)
    assert f"'auto {a_record('cuda').digest}'" in graphs[0]
    assert f"'auto {a_record('triton').digest}'" in graphs[1]
    assert choice.resolve_backend(f"auto {a_record().digest}", CPU, torch.float32, None, (64, 2048), "gram") == "triton"


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


def test_blocks_that_end_out_of_order():
    first, second = configure(route="direct"), configure(route="gram", backend="torch")
    first.__enter__(), second.__enter__()
    first.__exit__()
    assert configured() == {"route": "gram", "backend": "torch"}
    second.__exit__()
    assert configured() == {}
    for _ in range(100):
        configure(route="gram")
    assert len(choice._layers) <= 2
    assert configured() == {"route": "gram"}


def test_a_wrong_setting_changes_nothing(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*'torch'.* got 'fast'"):
        configure(route="gram", backend="fast")
    assert configured() == {}
    with pytest.raises(ValueError, match="route must be one of 'auto', 'gram', 'direct', got 'dual'"):
        configure(route="dual")
    monkeypatch.setenv("BARLOW_FUSED_ROUTE", "dual")
    choice.forget()
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
