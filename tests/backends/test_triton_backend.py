"""The Triton backend against the float64 oracle in Triton's interpreter; on a GPU: test_gpu.py."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from barlow_fused.backends import why_unusable


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_in_the_interpreter():
    """All kernels, on shapes, dtypes and conventions: triton_interpreter_checks.py, with none of its tests left out."""
    checks = pathlib.Path(__file__).with_name("triton_interpreter_checks.py")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x", checks]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=checks.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert re.match(r"\d+ passed", summary), summary
    assert "skipped" not in summary


def test_float64_is_left_to_pytorch():
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert "float64" in why_unusable("triton", device, torch.float64)
