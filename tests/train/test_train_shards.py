"""The projector's last layer in shards, over 2, 3 and 4 processes, against one process that has all of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("tensorboard")

import shard_processes
from subprocesses import environment

from barlow_fused.planning.step import step_plan
from barlow_fused.train import checkpoint, main, trainer
from barlow_fused.train.checkpoint import CheckpointError


@pytest.fixture(autouse=True)
def training_only(monkeypatch):
    for name in ("look", "accuracy", "pixels", "draw", "knn"):
        monkeypatch.setattr(trainer.Monitor, name, lambda self: None)


@pytest.fixture(scope="module")
def several(tmp_path_factory, testrun_uid):
    """The runs of 2, 4 and 3 processes; made once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp().parent / f"shards-{testrun_uid}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            command = [sys.executable, shard_processes.__file__, str(folder)]
            variables = environment(OMP_NUM_THREADS="1")
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
            (folder / "failed.txt").write_text(done.stderr[-5000:] if done.returncode else "")
    failed = (folder / "failed.txt").read_text()
    assert not failed, failed
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run of one process, 20 steps."""
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("look", "accuracy", "pixels", "draw", "knn"):
            patch.setattr(trainer.Monitor, name, lambda self: None)
        shard_processes.run(out, "--steps", "20")
    return out


def losses(run):
    return torch.tensor([entry["loss"] for entry in trainer.read_jsonl(run / "metrics.jsonl")], dtype=torch.float64)


def weights(run):
    state = checkpoint.last(run, pytest.fail)["model"]
    return {name: x.read(0, x.shape[0]) if isinstance(x, checkpoint.Rows) else x for name, x in state.items()}


def assert_alike(run, reference):
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-9, atol=0)
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)


def test_four_processes_train_as_one(several, one):
    assert_alike(several / "four", one)
    files = sorted(path.name for path in (several / "four" / "checkpoints").glob("step-00000020*"))
    assert len(files) == 5  # the state, and four shards
    main_file = torch.load(several / "four" / "checkpoints" / "step-00000020.pt", weights_only=True)
    assert main_file["model"]["projector.3.weight"] == {checkpoint.MARK: "/model/projector.3.weight", "shape": [99, 48]}


def test_resumed_by_three_processes(several, one):
    assert_alike(several / "three", one)
    assert len(list((several / "three" / "checkpoints").glob("step-00000020.*.shard"))) == 3


def test_resumed_by_one_process_without_shards(several, one):
    shard_processes.go_on(several / "one", 20, "--no-shard-projector")
    assert_alike(several / "one", one)
    assert not list((several / "one" / "checkpoints").glob("step-00000020.*.shard"))


def test_resumed_by_as_many_processes_with_the_same_bits(several):
    found, expected = weights(several / "again"), weights(several / "four")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_shards_are_weights_to_start_from(several, tmp_path):
    """``--init``: of shards by three processes (in the script), and by one."""
    state = several / "four" / "checkpoints" / "step-00000020.pt"
    shard_processes.run(tmp_path / "from shards", "--steps", "1", "--init", str(state))
    torch.testing.assert_close(losses(tmp_path / "from shards"), losses(several / "from one"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("precision", shard_processes.PRECISIONS)
def test_precisions(precision, several, tmp_path):
    """What another order of sums, or the rounding of halves, makes of five steps."""
    flags = ["--steps", "5", *shard_processes.PRECISIONS[precision]]
    tolerance = 1e-3 if precision == "fp32" else 0.05
    shard_processes.run(tmp_path / "one", *flags)
    for name in (precision, f"{precision} fused"):
        assert losses(several / name).isfinite().all()
        torch.testing.assert_close(losses(several / name), losses(tmp_path / "one"), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("sharded", "precision", "optimizer"), shard_processes.MEMORY_RUNS)
def test_memory_is_as_planned(sharded, precision, optimizer, several):
    """Of weights, gradients, the optimiser's state and embeddings: what operators allocate, at its peak."""
    n, hidden, width = shard_processes.MEMORY_SHAPES[precision]
    dtype, needed = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], {}
    for count in (1, 2, 4):
        path = several / f"needed-{count}-{sharded}-{precision}-{optimizer}.json"
        needed[count] = json.loads(path.read_text())
        plan = step_plan(n, f"{hidden}-{width}", dtype, "cpu", count, optimizer, shard_processes.FEATURES)
        predicted = (plan.sharded if sharded else plan.data_parallel).memory
        assert predicted == pytest.approx(needed[count], rel=0.1)
    assert not sharded or needed[4] <= needed[1] / 3


@pytest.mark.parametrize("file", ["official.pth", "shards.pt"])
def test_no_process_holds_the_whole_layer_twice(file, several):
    """While it starts from a file: the whole layer once, and its own quarter."""
    assert 1.2 < json.loads((several / "starts.json").read_text())[file] < 1.4


def test_a_shard_that_is_damaged_or_missing_is_noticed(several, tmp_path):
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-300])):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(several / "four", run)
        damage(next((run / "checkpoints").glob("step-00000020.*.2-of-4.shard")))
        said = []
        assert checkpoint.last(run, said.append)["step"] == 10
        assert "2-of-4.shard is damaged" in said[0]
        for path in (run / "checkpoints").glob("step-000000[01]0.*.shard"):
            path.unlink()
        with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
            checkpoint.last(run, said.append)


@pytest.mark.parametrize("victims", ["one", "all"])
def test_killed_processes_lose_nothing(victims, tmp_path):
    """kill -9 in the middle of a run that writes its state after every step."""
    out = tmp_path / "run"
    flags = [
        *shard_processes.COMMON,
        "--shard-projector",
        "--steps",
        "4000",
        "--epochs",
        "200",
        "--checkpoint-every",
        "1",
    ]
    script = (
        "import sys, shard_processes\\n"
        "shard_processes.quiet()\\n"
        "from barlow_fused.train import main\\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    path = tmp_path / "script.py"
    path.write_text(script.replace("\\n", "\n"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "0",
    ]
    support = str(Path(shard_processes.__file__).parent)
    variables = environment(OMP_NUM_THREADS="1")
    variables["PYTHONPATH"] = os.pathsep.join([support, *filter(None, [variables.get("PYTHONPATH")])])
    with subprocess.Popen(
        [*command, str(path), *flags, "--out", str(out)], env=variables, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(trainer.read_jsonl(out / "metrics.jsonl")) < 3:
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        workers = [int(pid) for pid in children.stdout.split()]
        for pid in (process.pid, *workers) if victims == "all" else workers[-1:]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    said = []
    state = checkpoint.last(out, said.append)
    assert state["step"] >= 2
    assert not said  # what was being written was no checkpoint yet
    shard_processes.go_on(out, state["step"] + 2)
    assert checkpoint.last(out, pytest.fail)["step"] == state["step"] + 2


def test_bad_flags_are_named(capsys):
    assert main(["--shard-projector", "--loss", "reference", "--device", "cpu"]) == 2
    assert "--shard-projector is of --loss fused" in capsys.readouterr().err
