"""What ``make verify-gpu`` does before and around tests that need a GPU, on tests and compilers that do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fake_compiler
import pytest
from subprocesses import ROOT, environment

from benchmarks import verify, workers

TESTS = """
import os, signal, time
from pathlib import Path
import pytest

def test_passes(): pass

def test_fails(): assert 1 + 1 == 3

@pytest.mark.skip(reason="needs two of them")
def test_skipped(): pass

def test_hangs(): time.sleep(1000)

def test_after_the_hang(): pass

def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)

@pytest.mark.parametrize("n", [1, 2])
def test_after_the_crash(n): pass

def test_loses_the_device():
    Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_in_a_new_process(): assert os.getpid() != int(Path(__file__).with_suffix(".pid").read_text())

@pytest.fixture
def broken():
    yield
    raise ValueError("at the end")

def test_fails_at_the_end(broken): pass
"""


def run_tests(tmp_path, text, *arguments):
    (tmp_path / "test_it.py").write_text(text)
    options = ("-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path / "test_it.py"))
    command = (sys.executable, "-m", "benchmarks.gpu_tests", *arguments, "--", *options)
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_each_test_is_reported_and_what_hangs_or_crashes_does_not_end_the_rest(tmp_path):
    done = run_tests(tmp_path, TESTS, "--patience", "4")
    assert done.returncode == 1, done.stderr
    lines = re.findall(r"^(\w+) +[\d.]+ s  \S*::(\S+)(.*)$", done.stdout, re.MULTILINE)
    assert [(how, name) for how, name, _ in lines] == [
        ("passed", "test_passes"),
        ("failed", "test_fails"),
        ("skipped", "test_skipped"),
        ("hung", "test_hangs"),
        ("passed", "test_after_the_hang"),
        ("crashed", "test_crashes"),
        ("passed", "test_after_the_crash[1]"),
        ("passed", "test_after_the_crash[2]"),
        ("failed", "test_loses_the_device"),
        ("passed", "test_in_a_new_process"),
        ("failed", "test_fails_at_the_end"),
    ]
    for why in ("needs two of them", "did not end within 4 s", "its process died of SIGSEGV", "assert (1 + 1) == 3",
                "ValueError: at the end"):  # fmt: skip
        assert why in done.stdout
    assert "5 passed, 3 failed, 1 skipped, 1 hung, 1 crashed" in done.stdout
    assert done.stdout.rstrip().endswith("failed: test_it.py::test_fails_at_the_end")


def test_when_the_time_is_up_no_test_begins_and_none_is_ended(tmp_path):
    text = "import time\ndef test_long(): time.sleep(8)\ndef test_next(): pass\ndef test_last(): pass\n"
    done = run_tests(tmp_path, text, "--seconds", "7")
    assert done.returncode == 1
    assert re.search(r"^passed +\d+\.\d s  test_it.py::test_long$", done.stdout, re.MULTILINE), (
        done.stdout + done.stderr
    )
    assert "not run: test_it.py::test_next\nnot run: test_it.py::test_last\n1 passed, 2 not run" in done.stdout


def test_all_that_passes_is_a_success(tmp_path):
    done = run_tests(tmp_path, "def test_one(): pass\n")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("1 passed\n")


def test_what_cannot_be_collected_is_said(tmp_path):
    done = run_tests(tmp_path, "import there_is_no_such_module\n")
    assert done.returncode == 1
    assert "there_is_no_such_module" in done.stdout


@pytest.mark.parametrize("processes", [1, 3])
def test_the_pool_outlives_its_processes(processes):
    jobs = ["one", "fails", "hangs", "two", "crashes", "three"]
    done = list(workers.run_jobs(jobs, fake_compiler.compile_job, processes, patience=8))
    problems = {found.job: found.problem for found in done}
    assert len(done) == len(jobs)
    assert problems == {
        **dict.fromkeys(("one", "two", "three")),
        "fails": "ValueError: out of registers",
        "hangs": "it did not end within 8 s",
        "crashes": "its process ended with exit code -11",
    }
    assert list(workers.run_jobs([], fake_compiler.compile_job)) == []


def test_the_steps_leave_the_tests_their_patience(tmp_path):
    """Their own deadline, and then the longest test, come before the step's."""
    (step,) = (step for step in verify.steps(tmp_path / "gpu.json") if step.name == "tests")
    patience = float(step.command[step.command.index("--patience") + 1])
    assert step.margin > patience
    assert step.seconds > 2 * step.margin
