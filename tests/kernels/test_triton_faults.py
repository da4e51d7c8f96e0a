"""The interpreter's tests catch what they are there for: faults are planted into copies of the Triton kernels."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the package triton")

ROOT = pathlib.Path(__file__).parents[2]
BACKENDS = "barlow_fused/backends"

# what is wrong: the file, the right text, the wrong text, the tests of which one fails
FAULTS = {
    "features beyond D that are not zero": (
        *("triton_kernels/normalize.py", "rstd_a = tl.where(columns < d, rstd_a, 0.0)", "rstd_a = rstd_a * 1.0"),
        "fills_rows_up and 33-70-std-torch.float32-gram",
    ),
    "rows of K that nobody fills up": (
        *("triton_kernels/gram.py", "(rows < k_pitch) & (columns < N)", "(rows < N) & (columns < N)"),
        "fills_rows_up and 33-70-std-torch.float32-gram",
    ),
    "rows of C that nobody fills up": (
        *("triton_kernels/correlate.py", "(j < c_pitch)[None, :]", "(j < D)[None, :]"),
        "fills_rows_up and 33-70-std-torch.float32-direct",
    ),
    "slices that the last phase leaves out": (
        *("triton_kernels/gram.py", "for first in range(0, split, SLICES):", "for first in range(0, SLICES, SLICES):"),
        "gram_split and 6-batch_norm-torch.float32",
    ),
    "columns that the last phase leaves out": (
        *("triton_kernels/gram.py", "(column + i < row + start + ROWS)", "(column + i < row + start)"),
        "gram_split and 6-batch_norm-torch.float32",
    ),
    "a tile beside the diagonal that loads its rows alone": (
        *("triton_backend.py", "ONE_TILE=n <= blocks.m", "ONE_TILE=n <= 2 * blocks.m"),
        "gram_split and 1-batch_norm-torch.float32",
    ),
    "partial tiles of other tiles": (
        *("triton_kernels/gram.py", "first_item = (begin_items + of_tile)", "first_item = (begin_items + tile)"),
        "cut_otherwise and 1-splits1-torch.float32",
    ),
    "sums of one row tile alone": (
        *("triton_kernels/grad_product.py", "ptr += stride", "ptr += 0 * stride"),
        "several_row_tiles and 70-203-torch.float32",
    ),
    "P of float16 that is not scaled": (
        *("triton_kernels/grad_product.py", "cast(p / tl.sqrt(N * 1.0), grad)", "cast(p, grad)"),
        "does_not_overflow",
    ),
    "a long slice whose first part is lost": (
        *("triton_kernels/gram.py", "_add(out, left, chunk > begin,", "_add(out, left, chunk > end,"),
        "gram_split and 1-batch_norm-torch.bfloat16",
    ),
}


@pytest.mark.parametrize(("file", "right", "wrong", "tests"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_caught(file, right, wrong, tests, tmp_path):
    for folder in ("barlow_fused", "benchmarks", "tests/support", "tests/kernels"):
        left_out = shutil.ignore_patterns("results", "*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    source = tmp_path / BACKENDS / file
    text = source.read_text()
    assert text.count(right) == 1, f"{file} has changed: plant the fault anew"
    source.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "--kernels", "interpreter", "-x", "-k", tests, "tests/kernels"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = f"{tmp_path}:{tmp_path}/tests/support"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]  # tests ran, and one failed
    assert "1 failed" in done.stdout
