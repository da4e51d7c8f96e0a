"""What plan says of a whole training step of a projector, data parallel and with its last layer in shards."""

from __future__ import annotations

import json

import pytest
import torch

from barlow_fused.__main__ import main
from barlow_fused.planning.step import step_plan

FLAGS = ["--n", "4096", "--projector", "8192-8192-1048576", "--world-size", "64", "--shard-projector"]
FLAGS += ["--optimizer", "lars", "--dtype", "bfloat16", "--device", "h200"]


def test_bytes_of_the_documents_example():
    made = step_plan(4096, "8192-8192-1048576", torch.bfloat16, "h200", 64, "lars")
    last, before = 8192 * 2**20, 2048 * 8192 + 8192**2 + 4 * 8192
    assert made.route == "gram"
    assert made.data_parallel.weights == made.data_parallel.optimizer == 4 * (last + before)
    assert made.sharded.weights == 4 * (last // 64 + before)
    sums = {c.what: c.size for c in made.data_parallel.collectives}
    assert sums["gradients"] == 4 * (last + before)  # 34 GB a step
    own = {c.what: (c.kind, c.size) for c in made.sharded.collectives}
    assert own["h_a"] == ("all_gather", 64 * 8192 * 2)
    assert own["dL/dh_a"] == ("reduce_scatter", 4096 * 8192 * 2)
    assert own["gradients"] == ("all_reduce", 4 * before)
    assert not any(kind == "all_to_all" for kind, _ in own.values())
    assert made.sharded.step < made.data_parallel.step / 10
    assert made.sharded.flops == made.data_parallel.flops


def test_one_process_has_no_network():
    made = step_plan(256, "512-8192", device="cpu", optimizer="adamw")
    assert made.data_parallel.collectives == made.sharded.collectives == ()
    assert made.data_parallel.memory == made.sharded.memory
    assert made.data_parallel.optimizer == 2 * made.data_parallel.weights


def test_the_table(capsys):
    assert main(["plan", *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out  # 34 GB of weights, three gradients, and momentum
    assert out.count("fits") == 1
    assert all(len(line) <= 80 for line in out.splitlines())
    assert main(["plan", *FLAGS, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["sharded"]["memory"] == step_plan(4096, "8192-8192-1048576", torch.bfloat16, "h200", 64).sharded.memory


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "64"], "one of --d"),
        (["--n", "64", "--d", "8", "--projector", "8-8"], "one of --d"),
        (["--n", "64", "--projector", "8-x"], "projector must be widths such as 8192-8192-65536, got '8-x'"),
        (["--n", "64", "--projector", "8-0"], "projector must be widths"),
        (["--n", "65", "--projector", "8-8", "--world-size", "2"], "n must be divisible by world_size"),
        (["--n", "64", "--projector", "8-8", "--optimizer", "adam"], "optimizer must be sgd, lars, adamw, got 'adam'"),
    ],
)
def test_bad_input_is_named(flags, message, capsys):
    assert main(["plan", *flags, "--device", "h200"]) == 2
    assert message in capsys.readouterr().err
