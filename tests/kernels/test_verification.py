"""``barlow-fused verify`` from end to end, on kernels that are wrong, crash and hang.

The processes are the command's own (tests/support/verified_kernels.py). Triton's interpreter and the CUDA kernels
compiled for the CPU play a GPU's kernels; only the times are invented, by which they are the faster ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import verified_kernels
from cases import error, oracle, views

COMMAND = (sys.executable, verified_kernels.__file__)
VERIFY = ("verify", "--device", "cpu", "--seconds", "400")
FAULTS = {  # each in the Gram route of one backend and dtype -> what is said of it
    "triton:float32:off": r"N=17 D=40: loss is off by \d.\de-0\d \(accepted: 5e-06\)",
    "triton:bfloat16:dies": "N=17 D=40: its process died of SIGSEGV",
    "triton:float16:hangs": "N=17 D=40: it did not end within 10 s",
    "cuda:float32:hides_nan": "nan in the inputs: the loss is .*, which hides it",
    "cuda:bfloat16:other_bits": "the same bits again: the same inputs gave different bits",
    "cuda:float16:writes_outside": r"memory around N=9 D=41: \d+ bytes beside the tensors were written over",
}
MORE = {
    "triton:float32:gradient_off": r"the gradient of z_a is off by \d.\de-0\d",
    "cuda:float32:raises": "N=17 D=40: RuntimeError: CUDA error: an illegal memory access was encountered",
    "cuda:bfloat16:no_memory": "N=17 D=40: there was not enough free memory on the device",
}


def run(folder, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**verified_kernels.environment(folder), **environment}
    return subprocess.run([*COMMAND, *arguments], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("faults", [FAULTS, MORE], ids=["six", "three"])
def test_every_fault_is_found_and_named_and_what_is_right_is_kept(tmp_path, faults):
    done = run(tmp_path, *faults, *VERIFY, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    outcomes = {f"{o['backend']}:{o['dtype']}:{o['route']}:{o['ranks']}": o for o in record["outcomes"]}
    assert len(outcomes) == 24
    for fault, sentence in faults.items():
        outcome = outcomes.pop(f"{fault.rpartition(':')[0]}:gram:False")
        assert outcome["outcome"] == ("could not check" if "memory on" in sentence else "failed"), (fault, outcome)
        assert re.search(sentence, outcome["why"]), (fault, outcome)
    assert {o["outcome"] for o in outcomes.values()} == {"passed"}, outcomes
    for t in record["times"]:  # what is wrong is not timed either
        wrong = {fault.split(":")[0] for fault in faults if fault.split(":")[1] == t["dtype"] and t["route"] == "gram"}
        assert t["seconds"].keys() == {"torch", "usual", "cuda", "triton"} - wrong
    again = run(tmp_path, *VERIFY)  # the record is there
    assert again.returncode == 0
    assert "verifying" not in again.stderr
    for fault in faults:
        assert ", ".join(fault.split(":")[:2]) in again.stdout


FIRST_CALL = """
import os, sys, torch, verified_kernels, builds
from barlow_fused import barlow_twins_loss, choice
from barlow_fused.backends import cuda_backend
from barlow_fused.verification import ensure
cuda_backend.use(builds.load(verified_kernels.Path(os.environ[verified_kernels.EMULATED])))
ensure.COMMAND = (sys.executable, verified_kernels.__file__, *sys.argv[1:], "verify")
ensure.SECONDS = 400
z_a, z_b = torch.load(sys.stdin.buffer)
z_a.requires_grad_()
loss = barlow_twins_loss(z_a, z_b)
loss.backward()
print(choice.resolve_backend("auto", z_a.device, z_a.dtype, None, z_a.shape, "gram"))
torch.save((loss.detach(), z_a.grad), os.environ["RESULT"])
"""


@pytest.mark.parametrize(
    ("fault", "taken", "environment"),
    [
        (None, "cuda", {}),  # the fastest of what is right
        ("cuda:float32:off", "triton", {}),
        ("cuda:float32:off", "torch", {"BARLOW_FUSED_VERIFY": "never"}),
    ],
)
def test_two_processes_that_verify_at_once_before_their_first_call(tmp_path, fault, taken, environment):
    z_a, z_b = views(16, 64)
    inputs = tmp_path / "inputs"
    torch.save((z_a, z_b), inputs)
    processes = []
    for name in ("first", "second"):
        variables = {**verified_kernels.environment(tmp_path / "records"), "BARLOW_FUSED_TESTED": "float32"}
        variables |= {"BARLOW_FUSED_VERIFY": "block", "RESULT": str(tmp_path / name), **environment}
        command = [sys.executable, "-c", FIRST_CALL, *filter(None, [fault])]
        with inputs.open("rb") as file:
            pipes = {"stdin": file, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, env=variables, text=True, **pipes))
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out.strip() for out, _ in said] == [taken, taken], said
    verified = sum("verifying cpu" in err for _, err in said)
    assert verified == (0 if environment else 1), said  # the other waited for it
    ref = oracle(z_a, z_b)
    for name in ("first", "second"):
        loss, grad = torch.load(tmp_path / name)
        assert error(loss, ref.loss) < 1e-5
        assert error(grad, ref.grad_a) < 1e-5


def test_a_gpu_in_exclusive_mode(tmp_path):
    """Our own processes take turns; where another's has it, nothing could be checked, and nothing has failed."""
    mode = {"BARLOW_FUSED_MODE": "exclusive", "BARLOW_FUSED_TESTED": "float32"}
    (record,) = json.loads(run(tmp_path, *VERIFY, "--json", **mode).stdout)
    assert {o["outcome"] for o in record["outcomes"]} == {"passed"}
    with (tmp_path / "device").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (record,) = json.loads(run(tmp_path, *VERIFY, "--again", "--json", **mode).stdout)
    assert {o["outcome"] for o in record["outcomes"]} == {"could not check"}
    assert all("the GPU is in exclusive mode and taken" in o["why"] for o in record["outcomes"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir(mode=0o500)
    _says_where_it_cannot_write(run(folder, *VERIFY))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    _says_where_it_cannot_write(run(tmp_path / "file" / "records", *VERIFY))


def _says_where_it_cannot_write(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot write a record into" in done.stderr
    assert "BARLOW_FUSED_CACHE_DIR names another folder" in done.stderr


def test_when_the_time_runs_out_nothing_has_failed(tmp_path):
    done = run(tmp_path, "verify", "--device", "cpu", "--seconds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert {o["outcome"] for o in record["outcomes"]} == {"could not check"}
    assert record["times"] == []
