"""The microbenchmark: it refuses wrong methods, times in rounds, measures memory, and reports what it says it does.

Nothing here asserts on speed.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch

from barlow_fused import backends
from benchmarks import accuracy, machine, memory, peers, report, run, timing
from benchmarks.__main__ import main
from benchmarks.peers import Peer

CPU = torch.device("cpu")
N, D = 32, 256
FAST = ["--n", str(N), "--d", str(D), "--rounds", "2", "--no-memory"]
PEERS = peers.available_peers(CPU)
EAGER_PEERS = [key for key in PEERS if key != "compile"]


def give(loss_function):
    return loss_function


def make_peer(name, loss_function, **fields):
    return Peer(name, functools.partial(give, loss_function), lambda n, d, itemsize: 0, **fields)


def wrong_loss(z_a, z_b):
    return 1.01 * peers.usual_loss(z_a, z_b)


def broken_loss(z_a, z_b):
    raise RuntimeError("a sentence that says what broke\nand more")


def hungry_loss(z_a, z_b):
    raise torch.OutOfMemoryError("tried to allocate 1 TB")


def allocating_loss(z_a, z_b):
    block = torch.ones(50_000_000)  # 200 MB
    return peers.usual_loss(z_a, z_b) + 0 * block[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One pass a turn, small matrix products, and one thread, so that a busy machine does not make these tests slow."""
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plant(monkeypatch):
    """Adds methods to those that --peers can name."""

    def plant(*planted):
        monkeypatch.setattr(peers, "available_peers", lambda device: PEERS | {peer.name: peer for peer in planted})

    return plant


# -- accuracy --


@pytest.mark.parametrize("dtype", accuracy.TOLERANCES, ids=str)
@pytest.mark.parametrize("name", EAGER_PEERS)
def test_every_method_is_right(name, dtype):
    if PEERS[name].unavailable:
        pytest.skip(PEERS[name].unavailable)
    z_a, z_b = accuracy.make_inputs(N, D, dtype, CPU)
    truth = accuracy.reference_truth(z_a, z_b)
    verdict = accuracy.check(PEERS[name].build(), z_a, z_b, truth)
    assert verdict.wrong is None
    assert verdict.loss == pytest.approx(truth.loss, rel=accuracy.TOLERANCES[dtype][0])


def test_the_compiled_method_is_right():
    if PEERS["compile"].unavailable:
        pytest.skip(PEERS["compile"].unavailable)
    z_a, z_b = accuracy.make_inputs(N, D, torch.float32, CPU)
    assert accuracy.check(PEERS["compile"].build(), z_a, z_b, accuracy.reference_truth(z_a, z_b)).wrong is None


@pytest.mark.parametrize(("n", "d"), [(2, 2), (7, 100), (32, 256), (100, 33)])
def test_the_gram_truth_is_the_reference(n, d, monkeypatch):
    monkeypatch.setattr(accuracy, "SLAB_ELEMENTS", 30 * n)  # several slabs, the last one ragged
    z_a, z_b = accuracy.make_inputs(n, d, torch.float32, CPU)
    truth, reference = accuracy.gram_truth(z_a, z_b), accuracy.reference_truth(z_a, z_b)
    assert truth.loss == pytest.approx(reference.loss, rel=1e-12)
    for grad, expected in zip(truth.grads, reference.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


def test_the_truth_is_chosen_by_what_fits():
    z_a, z_b = accuracy.make_inputs(8, 2048, torch.float32, CPU)
    assert accuracy.find_truth(z_a, z_b, 1e12).method == "reference"
    assert accuracy.find_truth(z_a, z_b, 1e8).method == "gram"
    with pytest.raises(MemoryError, match="needs"):
        accuracy.find_truth(z_a, z_b, 1e6)


def test_nan_is_never_right():
    z_a, z_b = accuracy.make_inputs(4, 8, torch.float32, CPU)
    truth = accuracy.reference_truth(z_a, z_b)
    exact = tuple(grad.float() for grad in truth.grads)
    loss = torch.tensor(truth.loss)
    assert accuracy.judge(loss, exact, truth, torch.float32).wrong is None
    assert "loss error" in accuracy.judge(loss * float("nan"), exact, truth, torch.float32).wrong
    assert "grad error nan" in accuracy.judge(loss, (exact[0], exact[1] * float("nan")), truth, torch.float32).wrong


def test_a_wrong_method_is_refused_and_not_timed(plant, capsys, tmp_path):
    plant(make_peer("planted", wrong_loss))
    assert main([*FAST, "--peers", "eager,planted", "--json", str(tmp_path / "out.json")]) == 1
    assert "wrong: grad error 1.0e-02" in capsys.readouterr().out
    eager, planted = json.loads((tmp_path / "out.json").read_text())["shapes"][0]["methods"]
    assert eager["status"] == "timed"
    assert planted["status"] == "wrong"
    assert planted["forward_s"] == planted["backward_s"] == []
    assert planted["peak_extra_bytes"] is planted["total"] is None


# -- methods that cannot run --


def test_methods_that_cannot_run_are_shown_and_the_others_go_on(plant, capsys):
    plant(
        make_peer("hungry", hungry_loss),
        make_peer("absent", broken_loss, unavailable="not installed"),
        dataclasses.replace(make_peer("huge", broken_loss), bytes_needed=lambda n, d, itemsize: 5e15),
    )
    assert main([*FAST, "--peers", "hungry,absent,huge,eager"]) == 0
    text = capsys.readouterr().out
    for words in ("out of memory", "not installed", "needs 5e+06 GB", "eager"):
        assert words in text


def test_an_exception_is_shown_and_is_a_failure(plant, capsys):
    plant(make_peer("broken", broken_loss))
    assert main([*FAST, "--peers", "broken,eager"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: a sentence that says what broke" in " ".join(text.split())
    assert "1.00x" in text


def test_fused_stands_for_all_of_its_routes():
    names = [peer.name for peer in peers.choose_peers(["eager", "fused", "eager"], CPU)]
    assert names[:4] == ["eager", "fused", "fused gram torch", "fused direct torch"]
    assert len(names) == len(set(names))
    assert [peer.name for peer in peers.choose_peers(["fused-auto"], CPU)] == ["fused"]


def test_triton_is_among_the_methods_of_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "why_unusable", lambda name, device, dtype=None: None if name == "triton" else "no")
    names = [peer.name for peer in peers.choose_peers(["fused"], torch.device("cuda"))]
    assert names == ["fused", "fused gram triton", "fused direct triton"]
    (peer,) = peers.choose_peers(["fused-gram-triton"], torch.device("cuda"))
    assert peer.build().keywords == {"lambd": peers.LAMBD, "route": "gram", "backend": "triton"}


@pytest.mark.parametrize(("bandwidth", "product"), [(1e9, 1e15), (1e15, 1e9)])
def test_rates_stand_beside_the_floor(bandwidth, product, plant, capsys, monkeypatch, tmp_path):
    """The floor is the slower of memory and arithmetic, at rates that were measured in the same run."""
    monkeypatch.setattr(machine, "bandwidths", lambda device: [bandwidth / 2, bandwidth])
    monkeypatch.setattr(machine, "matrix_product_rates", lambda device, dtype: {"torch.mm": [product, product / 3]})
    assert main([*FAST, "--dtype", "bfloat16", "--peers", "eager", "--json", str(tmp_path / "out.json")]) == 0
    (shape,) = json.loads((tmp_path / "out.json").read_text())["shapes"]
    assert shape["floor_s"] == max(6 * N * D * 2 / bandwidth, 6 * N * N * D / product)
    total = shape["methods"][0]["total"]["median"]
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("eager") and line.count("%") == 2).split()
    assert float(line[1]) == pytest.approx(6 * N * N * D / total / 1e12, rel=0.01)
    assert float(line[2]) == pytest.approx(6 * N * D * 2 / total / 1e9, rel=0.01)
    assert line[3] == report._percent(shape["floor_s"] / total)


# -- timing --


def test_each_round_runs_every_method_once_in_a_rotating_order():
    calls = []
    turns = {name: lambda name=name: calls.append(name) or (1.0, 2.0) for name in "abc"}
    rounds = timing.interleave(turns, rounds=6, seconds=0.0)
    assert ["".join(order) for order in rounds.orders] == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert calls == [name for order in rounds.orders for name in order]
    assert rounds.total_s("b") == [3.0] * 6


def test_a_method_that_fails_leaves_the_rounds():
    def second_time_fails(done=[]):  # noqa: B006
        done.append(None)
        if len(done) > 1:
            raise ValueError("enough")
        return 1.0, 1.0

    rounds = timing.interleave({"a": lambda: (1.0, 1.0), "b": second_time_fails}, rounds=4, seconds=0.0)
    assert len(rounds.forward_s["a"]) == 4
    assert len(rounds.forward_s["b"]) == 1
    assert rounds.failures == {"b": "ValueError: enough"}


@pytest.mark.parametrize(
    ("done", "elapsed", "enough"),
    [
        (0, 0.0, False),
        (1, 9.0, False),  # five rounds are made, budget or not,
        (4, 36.0, False),
        (5, 45.0, True),
        (1, 11.0, True),  # unless one alone takes longer
        (20, 9.0, False),
        (20, 9.7, True),  # another would not fit
        (timing.MAX_ROUNDS, 1.0, True),
    ],
)
def test_the_budget_of_ten_seconds(done, elapsed, enough):
    assert timing._enough(done, elapsed, None, 10.0) is enough
    assert timing._enough(3, elapsed, 3, 10.0) is True
    assert timing._enough(2, elapsed, 3, 10.0) is False


def test_ratios_are_taken_within_a_round():
    eager, fused = [1.0, 2.0, 4.0], [0.5, 0.5, 2.0]  # the machine slows down; one turn of fused is lucky
    assert timing.ratios(eager, fused) == [2.0, 4.0, 2.0]
    assert timing.summarize(timing.ratios(eager, fused)).median == 2.0  # the ratio of the medians would be 4


def test_a_summary_is_median_quartiles_and_range():
    summary = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert dataclasses.astuple(summary) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert summary.spread == pytest.approx(2 / 3)
    assert dataclasses.astuple(timing.summarize([7.0])) == (7.0,) * 5


# -- memory --


def test_a_known_allocation_is_measured():
    peer = make_peer("allocating", allocating_loss)
    peer = dataclasses.replace(peer, bytes_needed=float)  # a lambda cannot be pickled
    assert memory.cpu_peak(peer, N, D, torch.float32) == pytest.approx(200e6, rel=0.15)


def test_measured_memory_agrees_with_the_profiler(tmp_path):
    n, d = 64, 2048
    z = accuracy.make_inputs(n, d, torch.float32, CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        grads = accuracy.gradients(peers.usual_loss(*z), *z)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    expected = peak - sum(grad.nbytes for grad in grads)
    assert memory.cpu_peak(PEERS["eager"], n, d, torch.float32) == pytest.approx(expected, rel=0.05)


def test_a_method_that_fails_in_the_memory_process_says_why():
    peer = dataclasses.replace(make_peer("broken", broken_loss), bytes_needed=float)
    with pytest.raises(RuntimeError, match="and more"):
        memory.cpu_peak(peer, N, D, torch.float32)


# -- the command line and its reports --


def test_a_table_per_shape_in_80_columns(capsys):
    assert main(["--n", "8,32", "--d", "64,128", "--rounds", "2", "--no-memory", "--peers", "eager,fused"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for n in (8, 32):
        for d in (64, 128):
            assert f"N={n} D={d} float32 on cpu, 2 rounds" in text
    assert text.count("fused direct torch") == 8  # a line of times, and one of rates
    assert text.count("TFLOP/s") == text.count("of floor") == 4
    assert text.count("GFLOP/s on 6 N D min(N, D)") == 4


def test_the_widest_table_has_80_columns(capsys):
    slow = timing.summarize([98765.4, 98765.4, 1e9])
    method = run.MethodResult(
        "fused direct triton",
        loss=-1.23456789e-100,
        grad_errors=(1.2345e-100, 0.0),
        peak_extra_bytes=987_654_000_000,
        forward=slow,
        backward=slow,
        total=dataclasses.replace(slow, q3=1e9),
        ratio=timing.summarize([12345.6]),
    )
    broken = run.MethodResult("fused direct triton", "failed", "RuntimeError: " + "a long message " * 20)
    shape = run.ShapeResult(8192, 262144, "gram", 1.0, "direct", "triton", [method, broken], [], {}, None)
    shape.bandwidths, shape.floor_s, shape.matrix_product_rate = [9.87654321e15], 98765.4, 9.87654321e18
    method.flops_per_s, method.bytes_per_s = 9.87654321e18, 9.87654321e15
    method.share_of_floor = method.share_of_matrix_product = 9.99
    settings = run.Settings(CPU, torch.bfloat16, None, 60.0, True)
    report.print_shape(report.make_console(), shape, settings)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "a long message a long message" in text


def test_the_json_has_the_documented_fields(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*FAST, "--peers", "eager,fused-auto", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result) == {"machine", "versions", "git", "started", "settings", "shapes"}
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu"} <= set(result["machine"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "torch", "triton", "barlow_fused", "lightly"} == set(result["versions"])
    assert set(result["git"]) == {"commit", "dirty"}
    assert result["settings"]["peers"] == ["eager", "fused"]
    assert result["settings"]["rounds"] == 2
    (shape,) = result["shapes"]
    assert set(shape) == {field.name for field in dataclasses.fields(run.ShapeResult)}
    assert (shape["n"], shape["d"], shape["truth"], shape["fused_route"]) == (N, D, "reference", "gram")
    assert shape["orders"] == [["eager", "fused"], ["fused", "eager"]]
    assert all(len(rates) == 6 for rates in shape["matrix_product_rates"].values())
    eager, fused = shape["methods"]
    assert set(fused) == {field.name for field in dataclasses.fields(run.MethodResult)}
    assert len(fused["forward_s"]) == len(fused["backward_s"]) == 2
    totals = [[f + b for f, b in zip(m["forward_s"], m["backward_s"], strict=True)] for m in (eager, fused)]
    assert fused["ratio"]["median"] == pytest.approx(sum(e / f for e, f in zip(*totals, strict=True)) / 2)
    assert fused["flops_per_s"] == pytest.approx(6 * N * D * N / fused["total"]["median"])
    assert len(shape["bandwidths"]) == 6
    floor = max(
        6 * N * D * 4 / max(shape["bandwidths"]),
        6 * N * D * min(N, D) / max(map(max, shape["matrix_product_rates"].values())),
    )
    assert shape["floor_s"] == pytest.approx(floor)
    assert fused["bytes_per_s"] == pytest.approx(6 * N * D * 4 / fused["total"]["median"])
    assert fused["share_of_floor"] == pytest.approx(floor / fused["total"]["median"])
    assert fused["share_of_matrix_product"] == pytest.approx(fused["flops_per_s"] / shape["matrix_product_rate"])


def test_the_grid_has_a_line_per_shape(tmp_path, capsys):
    path = tmp_path / "grid.json"
    assert main(["--grid", "--n", "8,64", "--d", "32,256", "--rounds", "5", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = json.loads(path.read_text())["grid"]
    assert [(line["n"], line["d"], line["route"]) for line in lines] == [
        (8, 32, "gram"),
        (8, 256, "gram"),
        (64, 32, "direct"),
        (64, 256, "gram"),
    ]
    for line in lines:
        ratio = line["ratio"]
        assert ratio["q1"] <= ratio["median"] <= ratio["q3"]
        expected = "faster" if ratio["q1"] > 1 else "slower" if ratio["q3"] < 1 else "even"
        assert line["verdict"] == expected


def test_a_grid_of_few_rounds_gives_no_verdict(capsys):
    assert main(["--grid", "--n", "8", "--d", "32", "--rounds", "1"]) == 0
    assert "1 unsure (fewer than 5 rounds)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--n", "1"),
        ("--n", "32,x"),
        ("--d", "0"),
        ("--dtype", "int8"),
        ("--device", "abacus"),
        ("--peers", "eager,imaginary"),
        ("--rounds", "0"),
        ("--rounds", "2.5"),
        ("--seconds", "nan"),
        ("--seconds", "-1"),
        ("--json", "/no/such/directory/out.json"),
    ],
)
def test_bad_arguments_are_named(flag, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([flag, value])
    assert exit_.value.code == 2
    assert f"argument {flag}:" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        main(["--device", "cuda"])
    assert exit_.value.code == 2
    assert "argument --device: cuda" in capsys.readouterr().err


def test_a_grid_needs_both_methods(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--grid", "--peers", "eager"])
    assert exit_.value.code == 2
    assert "argument --peers:" in capsys.readouterr().err


# -- on a GPU --


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda(dtype, capsys, monkeypatch):
    monkeypatch.setitem(machine.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setitem(machine.COPY_BYTES, "cuda", 2**16)
    arguments = ["--device", "cuda", "--n", "32", "--d", "256", "--rounds", "2", "--dtype", dtype]
    assert main([*arguments, "--peers", "eager,fused"]) == 0
    text = capsys.readouterr().out
    for backend in ("torch", "triton"):
        if backends.why_unusable(backend, torch.device("cuda")) is None:
            assert text.count(f"fused gram {backend}") == text.count(f"fused direct {backend}") == 2
