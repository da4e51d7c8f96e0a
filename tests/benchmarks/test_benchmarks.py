"""The microbenchmark: it refuses wrong methods, times in rounds, measures memory, and reports what it says it does.

Nothing here asserts on speed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys

import pytest
import torch
from cases import inductor
from peers import losses_of
from planted import allocating_loss, another_loss, broken_loss, hungry_loss, make_peer, wrong_loss

from barlow_fused import backends
from barlow_fused.normalization import Normalization
from barlow_fused.reference import standardize
from benchmarks import (
    accuracy,
    compare,
    host,
    inputs,
    machine,
    memory,
    peers,
    pictures,
    presets,
    profile,
    readme,
    report,
    results,
    run,
    timing,
    verify,
)
from benchmarks.__main__ import main

CPU = torch.device("cpu")
N, D = 32, 256
FAST = ["--device", "cpu", "--n", str(N), "--d", str(D), "--rounds", "2", "--no-memory"]
PEERS = peers.available_peers(CPU)
EAGER_PEERS = [key for key in PEERS if key != "compile"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One pass a turn, small matrix products, and one thread, so that a busy machine does not make these tests slow."""
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(inputs, "MAX_SETS", 3)
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
    z_a, z_b = inputs.make_inputs(N, D, dtype, CPU)
    own = PEERS[name].own_loss
    truth = accuracy.own_truth(own, z_a, z_b) if own else accuracy.reference_truth(z_a, z_b)
    verdict = accuracy.check(PEERS[name].build(), z_a, z_b, truth)
    assert verdict.wrong is None
    assert verdict.loss == pytest.approx(truth.loss, rel=accuracy.TOLERANCES[dtype][0])


@inductor
def test_the_compiled_method_is_right():
    if PEERS["compile"].unavailable:
        pytest.skip(PEERS["compile"].unavailable)
    z_a, z_b = inputs.make_inputs(N, D, torch.float32, CPU)
    assert accuracy.check(PEERS["compile"].build(), z_a, z_b, accuracy.reference_truth(z_a, z_b)).wrong is None


@pytest.mark.parametrize(("n", "d"), [(2, 2), (7, 100), (32, 256), (100, 33)])
def test_the_gram_truth_is_the_reference(n, d, monkeypatch):
    monkeypatch.setattr(accuracy, "SLAB_ELEMENTS", 30 * n)  # several slabs, the last one ragged
    z_a, z_b = inputs.make_inputs(n, d, torch.float32, CPU)
    truth, reference = accuracy.gram_truth(z_a, z_b), accuracy.reference_truth(z_a, z_b)
    assert truth.loss == pytest.approx(reference.loss, rel=1e-12)
    for grad, expected in zip(truth.grads, reference.grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


def test_the_truth_is_chosen_by_what_fits():
    z_a, z_b = inputs.make_inputs(8, 2048, torch.float32, CPU)
    assert accuracy.find_truth(z_a, z_b, 1e12).method == "reference"
    assert accuracy.find_truth(z_a, z_b, 1e8).method == "gram"
    with pytest.raises(MemoryError, match="needs"):
        accuracy.find_truth(z_a, z_b, 1e6)


def test_nan_is_never_right():
    z_a, z_b = inputs.make_inputs(4, 8, torch.float32, CPU)
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
    assert planted["times"] == {}
    assert planted["peak_extra_bytes"] is planted["rates_of"] is None


# -- methods that cannot run --


def test_methods_that_cannot_run_are_shown_and_the_others_go_on(plant, capsys):
    plant(
        make_peer("hungry", hungry_loss),
        make_peer("absent", broken_loss, unavailable="not installed"),
        dataclasses.replace(make_peer("huge", broken_loss), bytes_needed=lambda *shape: 5e15),
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
    total = shape["methods"][0]["times"]["launches"]["total"]["median"]
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("eager") and "e-0" in line).split()
    assert float(line[2]) == pytest.approx(6 * N * N * D / total / 1e9, rel=0.01)
    assert float(line[3]) == pytest.approx(6 * N * D * 2 / total / 1e9, rel=0.01)
    assert line[4] == report._percent(shape["floor_s"] / total)


# -- timing --


def test_each_round_runs_every_method_once_in_a_rotating_order():
    calls = []
    turns = {name: lambda name=name: calls.append(name) or (1.0, 2.0) for name in "abc"}
    rounds = timing.interleave(turns, rounds=6, seconds=0.0)
    assert "".join(calls) == "abcbcacabcbaacbbac"
    assert rounds.total_s("b") == [3.0] * rounds.count == [3.0] * 6


def test_a_method_that_fails_leaves_the_rounds():
    def second_time_fails(done=[]):  # noqa: B006
        done.append(None)
        if len(done) > 1:
            raise ValueError("enough")
        return 1.0, 1.0

    rounds = timing.interleave({"a": lambda: (1.0, 1.0), "b": second_time_fails}, rounds=4, seconds=0.0)
    assert len(rounds.parts_s["a"]) == 4
    assert len(rounds.parts_s["b"]) == 1
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
    assert dataclasses.astuple(timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0])) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert dataclasses.astuple(timing.summarize([7.0])) == (7.0,) * 5


# -- memory --


def test_a_known_allocation_is_measured():
    peer = make_peer("allocating", allocating_loss)
    assert memory.cpu_peak(peer, N, D, torch.float32) == pytest.approx(200e6, rel=0.15)


def test_measured_memory_agrees_with_the_profiler(tmp_path):
    n, d = 64, 2048
    z = inputs.make_inputs(n, d, torch.float32, CPU)
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
    with pytest.raises(RuntimeError, match="and more"):
        memory.cpu_peak(make_peer("broken", broken_loss), N, D, torch.float32)


# -- the command line and its reports --


def test_a_table_per_shape_in_80_columns(capsys):
    arguments = ["--device", "cpu", "--n", "8,32", "--d", "64,128", "--rounds", "2", "--no-memory"]
    assert main([*arguments, "--peers", "eager,fft-relaxed,fused"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for n in (8, 32):
        for d in (64, 128):
            assert f"N={n} D={d} float32 on cpu, 2 rounds, 3 input sets" in text
    assert text.count("fused direct torch") == 8  # a line of times, and one of everything else
    assert text.count("fft-relaxed *") == 8
    assert "*: not the same loss" in " ".join(text.split())
    assert "4 unsure (fewer than 5 rounds)" in " ".join(text.split())


def made_method(name, seconds=1.0, status="timed", **fields):
    """A method of a run, with all the fields that the JSON has."""
    times = run.ModeResult(
        total=timing.summarize([seconds, 1.1 * seconds, 0.9 * seconds]), ratio=timing.summarize([2.0])
    )
    method = run.MethodResult(
        name, status=status, loss=1.0, grad_errors=(1e-6, 2e-6), peak_extra_bytes=10**8, rates_of="launches", **fields
    )
    for mode in timing.MODES:
        parts = {part: [seconds] for part in timing.PARTS[mode]}
        method.times[mode] = dataclasses.replace(times, parts_s=parts)
    method.flops_per_s = method.bytes_per_s = 1e9
    method.share_of_floor = 0.5
    return method


def made_run(*methods, n=256, d=8192):
    shape = run.ShapeResult(n, d, "gram", "torch", list(methods), "reference", 1.0, 3, 5)
    shape.bandwidths, shape.matrix_product_rate, shape.floor_s = [1e10], 1e11, 0.1
    return {
        "machine": machine.describe_machine(CPU),
        "versions": machine.versions(),
        "git": {"commit": None, "dirty": None},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "settings": {"device": "cuda", "dtype": "bfloat16", "modes": list(timing.MODES)},
        "shapes": [dataclasses.asdict(shape)],
    }


def test_the_widest_table_has_80_columns():
    method = made_method("fused direct triton", 98765.4, launches=98765)
    method.loss, method.grad_errors, method.peak_extra_bytes = -1.23456789e-100, (1.2345e-100, 0.0), 987_654_000_000
    method.flops_per_s, method.bytes_per_s, method.share_of_floor = 9.87654321e18, 9.87654321e14, 9.99
    broken = run.MethodResult("fused direct triton", status="failed", message="RuntimeError: " + "a long message " * 20)
    relaxed = made_method("fft-relaxed", same_loss=False)
    report_of_run = made_run(method, broken, relaxed, n=8192, d=262144)
    text = report.text_of(lambda console: report.print_run(console, report_of_run))
    text += report.text_of(lambda console: report.print_summary(console, report_of_run))
    assert max(map(len, text.splitlines())) <= 80
    assert "a long message a long message" in text
    assert "…" not in text
    for heading in ("graph", "only ms", "launches", "TFLOP/s", "GB/s", "floor", "gradient"):
        assert heading in text


def test_the_json_has_the_documented_fields(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*FAST, "--peers", "eager,fused-auto", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result) == {"machine", "versions", "git", "started", "seconds", "settings", "shapes"}
    assert {"cpu", "cores", "threads", "memory_bytes", "cache_bytes", "gpu"} <= set(result["machine"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "torch", "triton", "barlow_fused", "lightly"} == set(result["versions"])
    assert set(result["git"]) == {"commit", "dirty"}
    assert result["settings"]["peers"] == ["eager", "fused"]
    assert result["settings"]["modes"] == ["launches", "forward"]
    (shape,) = result["shapes"]
    assert set(shape) == {field.name for field in dataclasses.fields(run.ShapeResult)}
    assert (shape["n"], shape["d"], shape["truth"], shape["fused_route"]) == (N, D, "reference", "gram")
    assert (shape["rounds"], shape["input_sets"]) == (2, 3)
    assert all(len(rates) == 6 for rates in shape["matrix_product_rates"].values())
    eager, fused = shape["methods"]
    assert set(fused) == {field.name for field in dataclasses.fields(run.MethodResult)}
    both = [method["times"]["launches"]["parts_s"] for method in (eager, fused)]
    totals = [[f + b for f, b in zip(parts["forward"], parts["backward"], strict=True)] for parts in both]
    ratio = sum(e / f for e, f in zip(*totals, strict=True)) / 2
    assert fused["times"]["launches"]["ratio"]["median"] == pytest.approx(ratio, rel=1e-5)
    total = fused["times"]["launches"]["total"]["median"]
    assert total == pytest.approx(sum(totals[1]) / 2, rel=1e-5)
    assert len(fused["times"]["forward"]["parts_s"]["forward"]) == 2
    assert fused["rates_of"] == "launches"
    assert fused["flops_per_s"] == pytest.approx(6 * N * D * N / total, rel=1e-5)
    assert len(shape["bandwidths"]) == 6
    floor = max(
        6 * N * D * 4 / max(shape["bandwidths"]),
        6 * N * D * min(N, D) / max(map(max, shape["matrix_product_rates"].values())),
    )
    assert shape["floor_s"] == pytest.approx(floor, rel=1e-5)
    assert fused["bytes_per_s"] == pytest.approx(6 * N * D * 4 / total, rel=1e-5)
    assert fused["share_of_floor"] == pytest.approx(floor / total, rel=1e-5)
    assert fused["share_of_matrix_product"] == pytest.approx(fused["flops_per_s"] / shape["matrix_product_rate"])


def test_the_csv_has_a_line_for_each_method_and_mode(plant, tmp_path, capsys):
    plant(make_peer("hungry", hungry_loss))
    path = tmp_path / "out.csv"
    assert main([*FAST, "--peers", "eager,hungry,fused-auto", "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["method"], row["mode"]) for row in rows] == [
        *(("eager", "launches"), ("eager", "forward"), ("hungry", "")),
        *(("fused", "launches"), ("fused", "forward")),
    ]
    assert float(rows[0]["median_ms"]) > 0
    assert float(rows[0]["gb_per_s"]) > 0
    assert rows[2]["status"] == rows[2]["message"] == "out of memory"


def test_a_summary_says_whether_fused_is_faster():
    fused = made_method("fused")
    for ratios, verdict in (([2.0, 3.0, 2.5], "faster"), ([0.9, 1.2, 1.0], "even"), ([0.5, 0.6], "slower")):
        fused.times["launches"] = dataclasses.replace(fused.times["launches"], ratio=timing.summarize(ratios))
        (shape,) = made_run(made_method("eager"), fused)["shapes"]
        assert report.summary_line(shape)["verdict"] == verdict
    assert report.summary_line(shape | {"rounds": 4})["verdict"] == "unsure"
    fused.times["launches"] = dataclasses.replace(fused.times["launches"], ratio=None)
    skipped = run.MethodResult("eager", status="skipped", message="needs 275 GB")
    recorded = made_run(skipped, fused)
    assert "needs 275 GB" in report.text_of(lambda console: report.print_summary(console, recorded))
    assert "needs 275 GB" in report.text_of(lambda console: report.print_run(console, recorded))


def test_brief_prints_a_line_per_shape(capsys):
    assert main([*FAST, "--brief", "--peers", "eager,fused-auto"]) == 0
    text = capsys.readouterr().out
    assert "gradient" not in text
    assert "1 unsure" in text


# -- shapes, inputs, time --


def test_presets_are_what_their_names_say():
    shapes = presets.PRESETS
    assert shapes["paper"] == tuple((n, 8192) for n in (32, 64, 256, 2048))
    assert [d for _, d in shapes["wide"]] == [2**k for k in range(14, 19)]
    assert all(n >= d for n, d in shapes["tall"])
    assert set(shapes["all"]) == {shape for name in ("small", "paper", "wide", "tall") for shape in shapes[name]}
    assert presets.shapes_of(["paper", "paper", "tall"]) == [*shapes["paper"], *shapes["tall"]]


def test_a_preset_runs_its_shapes(monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "small", ((4, 8), (8, 4)))
    assert main(["--device", "cpu", "--preset", "small", "--rounds", "1", "--no-memory", "--peers", "eager"]) == 0
    text = capsys.readouterr().out
    assert "N=4 D=8 " in text
    assert "N=8 D=4 " in text


def test_input_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(inputs, "MAX_SETS", 128)
    monkeypatch.setattr(inputs, "cache_bytes", lambda device: 100_000)
    z_a, z_b = inputs.make_inputs(N, D, torch.float32, CPU)
    sets = inputs.rotating_sets(z_a, z_b)
    assert sets[0] == (z_a, z_b)
    assert sum(z.nbytes for views in sets[1:] for z in views) >= 200_000  # read before the first comes again
    assert len({z.data_ptr() for views in sets for z in views}) == 2 * len(sets)
    losses = {round(peers.usual_loss(*views).item(), 2) for views in sets}  # the order of samples changes nothing
    assert len(losses) == 1


def test_the_cache_of_this_machine_is_found():
    assert 2**18 <= inputs.cache_bytes(CPU) <= 2**34


def test_nothing_starts_when_the_budget_is_spent(capsys):
    arguments = ["--device", "cpu", "--n", "4,8", "--d", "8", "--rounds", "1", "--no-memory"]
    assert main([*arguments, "--peers", "eager", "--budget", "1e-9"]) == 0
    assert capsys.readouterr().out.count("no time left") >= 2


def test_a_compilation_that_would_not_fit_is_skipped(plant, capsys, monkeypatch):
    monkeypatch.setitem(run._last_compilation_s, "compiled", 50.0)
    plant(make_peer("compiled", peers.usual_loss, compiled=True))
    assert main([*FAST, "--peers", "eager,compiled", "--budget", "20"]) == 0
    assert "no time left (compiling took 50 s)" in capsys.readouterr().out


# -- the other methods --


def test_the_relaxed_loss_sums_wrapped_diagonals():
    """The formula of arXiv 2301.01569, written with C, which it avoids."""
    z_a, z_b = (z.detach().double() for z in inputs.make_inputs(5, 12, torch.float64, CPU))
    a_hat, b_hat = (standardize(z, Normalization()) for z in (z_a, z_b))
    c = a_hat.T @ b_hat / 5
    i = torch.arange(12)
    sums = torch.stack([c[i, (i + k) % 12].sum() for k in range(1, 12)])
    expected = (c.diagonal() - 1).square().sum() + peers.LAMBD * sums.square().sum()
    assert peers.relaxed_loss(z_a, z_b).item() == pytest.approx(expected.item(), rel=1e-12)


def test_another_loss_is_checked_against_its_own_truth(plant, capsys):
    plant(make_peer("right", another_loss, own_loss=another_loss), make_peer("wrong", another_loss))
    assert main([*FAST, "--peers", "right,wrong"]) == 1
    text = capsys.readouterr().out
    assert "right *" in text
    assert re.search(r"^right \*.* - +- +- ", text, re.MULTILINE)  # no rates: it needs other FLOPs
    assert text.count("wrong: grad error") == 1


def test_solo_learns_formula_is_solo_learns():
    solo = losses_of("solo-learn").barlow_loss_func
    z_a, z_b = inputs.make_inputs(N, D, torch.float32, CPU)
    expected = solo(z_a, z_b, lamb=peers.LAMBD, scale_loss=1.0)
    assert peers.masked_loss(z_a, z_b).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", [key for key in EAGER_PEERS if key != "fused-auto"])
def test_predicted_memory_is_what_is_measured(name):
    if PEERS[name].unavailable:
        pytest.skip(PEERS[name].unavailable)
    n, d = 128, 2048
    predicted = PEERS[name].bytes_needed(n, d, torch.float32, CPU)
    assert memory.cpu_peak(PEERS[name], n, d, torch.float32) == pytest.approx(predicted, rel=0.2, abs=4e6)


def test_compile_autotunes_on_gpus():
    (compiled,) = peers.choose_peers(["compile"], torch.device("cuda"))
    assert compiled.build.args == ("max-autotune",)
    (compiled,) = peers.choose_peers(["compile"], CPU)
    assert compiled.build.args == (None,)


# -- comparing, drawing, the README --


def test_a_regression_beyond_the_spread_is_named():
    old = made_run(made_method("eager"), made_method("fused", 1.0))
    same = made_run(made_method("eager"), made_method("fused", 1.05))
    assert compare.regressions(old, same) == ([], 2)
    slow = made_run(made_method("eager"), made_method("fused", 1.3))
    found, _ = compare.regressions(old, slow)
    assert [regression.where for regression in found] == [f"N=256 D=8192 fused, {mode}" for mode in timing.MODES]
    assert found[0].what == "1000 ms -> 1300 ms, +30.0% (eager +0.0%)"
    assert compare.regressions(slow, old)[0] == []


def test_memory_error_and_status_regress():
    old = made_run(made_method("a"), made_method("b"), made_method("c"))
    a, b = made_method("a"), made_method("b")
    a.peak_extra_bytes, b.grad_errors = 2 * 10**8, (1e-4, 1e-6)
    c = run.MethodResult("c", status="out of memory", message="out of memory")
    found, _ = compare.regressions(old, made_run(a, b, c))
    assert [regression.what.split()[0] for regression in found] == ["extra", "gradient", "was"]


def test_a_run_compares_itself_and_fails(tmp_path, capsys):
    path, fast = tmp_path / "old.json", tmp_path / "fast.json"
    assert main([*FAST, "--peers", "eager", "--json", str(path)]) == 0
    quicker = json.loads(path.read_text())
    for times in quicker["shapes"][0]["methods"][0]["times"].values():
        times["total"] = dict.fromkeys(times["total"], 1e-9)
    fast.write_text(json.dumps(quicker))
    assert main([*FAST, "--peers", "eager", "--compare", str(fast)]) == 1
    assert f"worse: N={N} D={D} eager, launches" in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0
    assert "Nothing regressed" in capsys.readouterr().out


def test_a_picture_knows_what_it_was_drawn_from(tmp_path, capsys):
    path, data = tmp_path / "run.png", tmp_path / "run.json"
    assert main([*FAST, "--peers", "eager,fft-relaxed,fused-auto", "--picture", str(path), "--json", str(data)]) == 0
    recorded = results.load(data)
    assert pictures.digest_of(path) == pictures.digest(recorded)
    recorded["shapes"][0]["methods"][0]["peak_extra_bytes"] = 1
    assert pictures.digest_of(path) != pictures.digest(recorded)


def test_the_readme_shows_the_recorded_runs(capsys):
    assert readme.main(["--check"]) == 0, "python -m benchmarks readme brings it up to date"


def test_every_view_of_the_readme_is_made_of_a_run(tmp_path, monkeypatch):
    results.write_json(tmp_path / "gpu.json", made_run(made_method("eager"), made_method("fused")))
    others = ("width_", "linear", "trainer")  # other tests have those
    for view in (v for v in readme.VIEWS if not v.startswith(others)):
        fresh = readme.render(
            f"before\n<!-- benchmarks: {view} gpu -->\nOUTDATED\n<!-- /benchmarks -->\nafter", tmp_path
        )
        assert "OUTDATED" not in fresh
        assert fresh.startswith("before\n<!--")
        assert fresh.endswith("-->\nafter")
        assert readme.render(fresh, tmp_path) == fresh
    with pytest.raises(ValueError, match="not a view"):
        readme.render("<!-- benchmarks: song gpu -->\n<!-- /benchmarks -->", tmp_path)


def test_a_picture_is_linked_from_where_the_document_lies(tmp_path):
    results.write_json(tmp_path / "gpu.json", made_run(made_method("eager"), made_method("fused")))
    text = "<!-- benchmarks: picture gpu -->\n<!-- /benchmarks -->"
    assert "](benchmark-gpu.png)" in readme.render(text, tmp_path)
    assert "](docs/benchmark-gpu.png)" in readme.render(text, tmp_path, beside=readme.ROOT)


def test_every_document_with_a_block_is_brought_up_to_date():
    documents = [*readme.ROOT.glob("*.md"), *(readme.ROOT / "docs").rglob("*.md"), *readme.ROOT.glob("examples/*.md")]
    assert {path for path in documents if "<!-- benchmarks:" in path.read_text()} <= set(readme.DOCUMENTS)


def test_a_training_step_over_the_width(tmp_path):
    """The table and the picture are those of the record."""
    pytest.importorskip("torchvision")
    from benchmarks import trainer

    recorded = results.load(readme.RESULTS / "trainer-cpu.json")
    results.write_json(tmp_path / "trainer-cpu.json", recorded)
    shown = readme.render(
        "<!-- benchmarks: trainer trainer-cpu -->\n<!-- /benchmarks -->\n"
        "<!-- benchmarks: trainer_picture trainer-cpu -->\n<!-- /benchmarks -->",
        tmp_path,
    )
    assert "needs 70 GB" in shown
    assert "](trainer-cpu.png)" in shown
    trainer.draw(recorded, tmp_path / "picture.png")
    assert pictures.digest_of(tmp_path / "picture.png") == trainer.digest(recorded)
    recorded["rows"][0]["seconds"] += 1
    assert pictures.digest_of(tmp_path / "picture.png") != trainer.digest(recorded)


# -- the profile of a call, and what runs on a GPU --


def test_a_profile_adds_up(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    arguments = ["--device", "cpu", "--n", str(N), "--d", str(D), "--calls", "2", "--trace", str(trace)]
    assert main(["profile", *arguments]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for part in ("dispatch", "Python, autograd", "aten::"):
        assert part in text
    assert json.loads(trace.read_text())["traceEvents"]
    z = inputs.make_inputs(N, D, torch.float32, CPU)
    found = profile.profile_call(lambda: accuracy.gradients(peers.usual_loss(*z), *z), CPU, calls=2)
    assert sum(part.seconds for part in found.processor) == pytest.approx(found.profiled_seconds, rel=0.05)
    product = next(part for part in found.processor if part.name == "aten::mm")
    assert product.count == 3  # C, and its two gradients
    assert found.kernels == []


def test_host_time_is_that_of_calls_that_launch_nothing(monkeypatch, capsys):
    monkeypatch.setattr(host, "CALLS", 2)
    assert main(["host", "--n", "8", "--d", "64", "--turns", "2"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for method in ("usual", "torch", "cuda"):
        assert re.search(rf"{method} +│ +\d+ │ +\d+ to \d+ │ +\d+\.\d\d", text)
    for part in ("autograd", "checks", "choice", "allocations", "plan", "launches", "between them"):
        assert re.search(rf"│ {part} +│ +-?\d+\.\d │", text)
    assert backends.load("torch", CPU).__name__.endswith("torch_cpu")  # as before


def test_verification_ends_what_runs_over_and_goes_on(tmp_path, capsys):
    python = sys.executable
    todo = [
        verify.Step("quick", (python, "-c", "print('hello', {seconds})"), 20),
        verify.Step("broken", (python, "-c", "raise SystemExit(3)"), 20),
        verify.Step("missing", ("/no/such/program",), 1),
        verify.Step("endless", (python, "-c", "while True: pass"), -38),
    ]
    with (tmp_path / "log").open("w") as log:
        assert verify.run_steps(todo, log) is False
    log = (tmp_path / "log").read_text()
    assert log == capsys.readouterr().out
    assert "hello 4" in log  # 20 seconds, less the margin
    lines = [line for line in log.splitlines() if " s  " in line]
    assert [line.partition(" s  ")[2] for line in lines] == [
        *("ok", "failed (exit code 3)", "failed (exit code 127)", "ran over its time"),
    ]


def test_verification_fits_nine_minutes(tmp_path):
    todo = verify.steps(tmp_path / "gpu.json")
    assert [step.name for step in todo] == ["build", "compile", "verify", "tests", "compute-sanitizer", "presets"]
    assert sum(step.seconds for step in todo) == verify.TOTAL_SECONDS == 9 * 60
    assert todo[-1].seconds > verify.MARGIN_SECONDS


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--n", "1"),
        ("--n", "32,x"),
        ("--d", "0"),
        ("--dtype", "int8"),
        ("--device", "abacus"),
        ("--preset", "enormous"),
        ("--modes", "backward"),
        ("--budget", "0"),
        ("--compare", "/no/such/file.json"),
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


def test_modes_and_presets_that_do_not_go_together(capsys):
    for arguments in (["--device", "cpu", "--modes", "graph"], ["--preset", "small", "--n", "8"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


# -- on a GPU --


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda(dtype, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(machine.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setitem(machine.COPY_BYTES, "cuda", 2**16)
    arguments = ["--device", "cuda", "--n", "32", "--d", "256", "--rounds", "2", "--dtype", dtype]
    path = tmp_path / "out.json"
    assert main([*arguments, "--peers", "eager,solo-learn,fft-relaxed,fused", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    (shape,) = results.load(path)["shapes"]
    eager = shape["methods"][0]
    assert eager["launches"] > 5
    assert eager["peak_extra_bytes"] >= D * D * 2
    assert set(eager["times"]) == set(timing.MODES)
    assert eager["times"]["graph"]["total"] is not None
    assert eager["rates_of"] == "graph"
    assert main(["profile", "--device", "cuda", "--n", "32", "--d", "256", "--calls", "2"]) == 0
    profiled = capsys.readouterr().out
    for part in ("dispatch", "launches (CUDA driver)", "(GPU waits)"):
        assert part in profiled
    for backend in ("torch", "triton"):
        if backends.why_unusable(backend, torch.device("cuda")) is None:
            assert text.count(f"fused gram {backend}") == text.count(f"fused direct {backend}") == 2
