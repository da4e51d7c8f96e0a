"""Records: the files, and the choice that follows from one."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from devices import H200, machine

from barlow_fused.verification import record
from barlow_fused.verification.key import differences, installed, key
from barlow_fused.verification.record import FAILED, PASSED, UNKNOWN, Cell, Outcome, Record, Times, Unit
from barlow_fused.verification.table import format_record

CPU = torch.device("cpu")


def made(**changes) -> Record:
    """The CUDA kernels are right for bfloat16 by either route, Triton's by Gram alone; float32 is wrong."""
    outcomes = (
        Outcome(Unit("cuda", "bfloat16", "gram"), PASSED, ""),
        Outcome(Unit("cuda", "bfloat16", "direct"), PASSED, ""),
        Outcome(Unit("triton", "bfloat16", "gram"), PASSED, ""),
        Outcome(Unit("triton", "bfloat16", "direct"), UNKNOWN, "the time had run out"),
        Outcome(Unit("cuda", "float32", "gram"), FAILED, "N=17 D=100: loss is off by 1e-3 (accepted: 5e-06)"),
        Outcome(Unit("triton", "bfloat16", "gram", True), PASSED, ""),
    )
    times = (
        Times("bfloat16", "gram", 64, 8192, {"torch": 4e-4, "cuda": 2e-4, "triton": 1e-4, "usual": 1e-3}, True),
        Times("bfloat16", "gram", 1024, 8192, {"torch": 4e-4, "cuda": 2e-4, "triton": 3e-4}, False),
        Times("bfloat16", "gram", 1024, 65536, {"torch": 4e-3, "cuda": 3.9e-3, "triton": 5e-3}, True),
        Times("bfloat16", "direct", 4096, 2048, {"torch": 4e-4, "cuda": 2e-4, "triton": 1e-4}, True),
        Times("float32", "gram", 64, 8192, {"torch": 4e-4, "cuda": 2e-4}, True),
    )
    return Record(**{"key": key(CPU), "made": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "outcomes": outcomes,
                     "times": times, **changes})  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BARLOW_FUSED_CACHE_DIR", str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.mark.parametrize(
    ("dtype", "route", "n", "d", "taken"),
    [
        ("bfloat16", "gram", 64, 8192, ("triton", "cuda")),
        ("bfloat16", "gram", 100, 6000, ("triton", "cuda")),
        ("bfloat16", "gram", 4096, 8192, ("cuda", "triton")),  # as at the nearest shape that was timed
        ("bfloat16", "gram", 1024, 65536, ()),  # within 5 % is no reason
        ("bfloat16", "direct", 64, 64, ("cuda",)),  # Triton's is faster, and was not checked
        ("float32", "gram", 64, 8192, ()),  # faster, and wrong
        ("float16", "gram", 64, 8192, ()),  # neither checked nor timed
    ],
)
def test_what_is_right_and_faster_is_taken(dtype, route, n, d, taken):
    assert made().fastest(dtype, route, Cell.of(n, d)) == taken


def test_over_ranks_what_was_checked_over_ranks():
    assert made().fastest("bfloat16", "gram", Cell.of(64, 8192), ranks=True) == ("triton",)
    assert made().fastest("bfloat16", "direct", Cell.of(64, 64), ranks=True) == ()


def test_without_a_time_of_pytorch_nothing_is_taken():
    times = (Times("bfloat16", "gram", 64, 8192, {"cuda": 1e-4}, True),)
    assert made(times=times).fastest("bfloat16", "gram", Cell.of(64, 8192)) == ()


def test_cells_meet_half_way():
    edges = [(record.SAMPLE_EDGES, record.SAMPLES), (record.FEATURE_EDGES, record.FEATURES)]
    for between, sizes in edges:
        assert [round((a * b) ** 0.5) for a, b in itertools.pairwise(sizes)] == list(between)
    assert {Cell.of(n, d) for n in record.SAMPLES for d in record.FEATURES} == {
        Cell(i, j) for i in range(len(record.SAMPLES)) for j in range(len(record.FEATURES))
    }


def test_written_and_found_again(folder):
    this, path = made(), record.path_of(key(CPU))
    assert record.find(this.key) == (None, path, ())
    record.write(this, path)
    assert record.find(this.key) == (this, path, ())
    assert [file.name for file in folder.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[1, 2]", "is damaged"),
        (lambda text: "\0" * 100, "is damaged"),
        (lambda text: text.replace("0.0004", '"fast"'), "is damaged"),
        (lambda text: text.replace("0.0004", "-1.0"), "is damaged"),
        (lambda text: text.replace('"route"', '"way"'), "is damaged"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "is of schema 99, accepted is 1"),
    ],
)
def test_a_damaged_record_is_left_out_and_named(folder, damage, sentence):
    path = record.path_of(key(CPU))
    record.write(made(), path)
    path.write_text(damage(path.read_text()))
    found = record.find(key(CPU))
    assert found.record is None
    assert len(found.problems) == 1
    assert str(path) in found.problems[0]
    assert sentence in found.problems[0]


def test_a_file_that_is_not_text_or_not_readable(folder):
    path = record.path_of(key(CPU))
    folder.mkdir()
    path.write_bytes(b"\xff\xfe\x00garbage")
    assert "cannot be read" in record.find(key(CPU)).problems[0]
    path.unlink()
    path.mkdir()
    assert "cannot be read" in record.find(key(CPU)).problems[0]


@pytest.mark.parametrize("field", ["barlow_fused", "kernels", "torch", "triton", "driver", "gpu", "architecture"])
def test_a_record_of_something_else_does_not_hold(folder, field):
    other = {**key(CPU), field: "of old"}
    record.write(made(key=other), record.path_of(other))
    found = record.find(key(CPU))
    assert found.record is None
    if field != "gpu":  # a record of another GPU is nothing to speak of
        assert f"no longer holds: {field} was of old, is {key(CPU)[field]}" in found.problems[0]
    record.write(made(key=other), record.path_of(key(CPU)))  # a file that was moved
    assert "is of another machine" in record.find(key(CPU)).problems[0]


def test_a_record_that_comes_with_the_package(folder, tmp_path, monkeypatch):
    """It holds whatever the driver and the memory are, as long as GPU, kernels and compiler are the same."""
    monkeypatch.setattr(record, "SHIPPED", tmp_path)
    shipped = made(key={**key(CPU), "driver": "of old", "memory": 1, "torch": "2.9"})
    record.write(shipped, tmp_path / "cpu-shipped.json")
    assert record.find(key(CPU)).record == shipped
    record.write(made(key={**key(CPU), "triton": "of old"}), tmp_path / "cpu-shipped.json")
    assert record.find(key(CPU)).record is None


def test_the_key_names_everything_that_matters(monkeypatch):
    this = key(CPU)
    assert installed(CPU) == ()
    assert differences(this, key(CPU)) == {}
    assert {"schema", "kernels", "extension", "torch", "triton", "runtime", "driver", "gpu", "mig"} < set(this)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert set(differences(this, key(CPU))) == {"architecture"}


def test_the_file_of_a_gpu():
    with machine({**H200, "name": "NVIDIA H200 MIG 1g.18gb"}):
        found = key(torch.device("cuda", 0))
    assert record.path_of(found).name.startswith("nvidia-h200-mig-1g-18gb-")


def test_the_lock_makes_others_wait(folder):
    path = record.path_of(key(CPU))
    with (
        record.lock(path, 1),
        pytest.raises(TimeoutError, match="another process has been verifying"),
        record.lock(path, 0.2),
    ):
        pass
    with record.lock(path, 0.2):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder):
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError), record.lock(record.path_of(key(CPU)), 1):
        pass


def test_the_table_of_a_record():
    text = format_record(made())
    assert max(map(len, text.splitlines())) <= 80
    for part in ("triton 100 µs 4x 10x", "cuda 200 µs 2x -~", "torch 4 ms 1x -", "FAILED", "unchecked"):
        assert part in text
    assert "failed: cuda, float32, gram: N=17 D=100: loss is off by" in " ".join(text.split())
    assert "Nothing was timed" in format_record(made(times=()))
    assert json.loads(json.dumps(record.to_json(made())))["times"][0]["seconds"]["triton"] == 1e-4
