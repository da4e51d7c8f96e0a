"""The emulation of the CUDA kernels catches what it is there for: faults are planted into copies of csrc/.

Each copy is compiled with cuda_faults.cpp, which runs the gram kernel and compares it with a plain loop.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: pathlib.Path, source: pathlib.Path, flags: tuple[str, ...]) -> pathlib.Path:
    """The check with the kernels in ``source``."""
    program = folder / "check"
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-DBARLOW_EMULATION", *flags]
    check = ROOT / "tests" / "cuda_faults.cpp"
    subprocess.run([*command, "-I", source, check, "-o", program], check=True, capture_output=True)
    return program


def run(program: pathlib.Path, order: str = "forward") -> tuple[int, str]:
    """Its exit code, and what it printed. ``order`` is that in which a block's threads take turns."""
    environment = {"BARLOW_EMULATION_ORDER": order}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_without_a_fault_nothing_is_reported(flags, tmp_path):
    program = build(tmp_path, ROOT / "csrc", flags)
    for order in ("forward", "reverse"):
        assert run(program, order) == (0, "")


# what is wrong, the file, the right text, the wrong text, compiler flags, what is reported
FAULTS = {
    "a read past the end": (
        *("multiply.h", "const int count = row < row_end ?", "const int count = row <= row_end ?"),
        *(SANITIZE, "heap-buffer-overflow"),
    ),
    "a write past the end": (
        *("gram.h", "if (m >= n && m < p.n) {", "if (m >= n) {"),
        *(SANITIZE, "heap-buffer-overflow"),
    ),
    "a missing barrier": (
        *("multiply.h", "barrier();  // everybody's copies of this stage", ";  //"),
        *((), "K is wrong"),
    ),
    "a stage that is not waited for": (
        *("multiply.h", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
        *((), "K is wrong"),
    ),
    "a wrong fragment index": (
        *("multiply.h", "mn + (l / 8 % 2) * 8 + l % 8", "mn + (l / 16) * 8 + l % 8"),
        *((), "K is wrong"),
    ),
    "a barrier that not all threads reach": (
        *("multiply.h", "barrier();  // shared memory is free", "if (thread() < 32) barrier();  //"),
        *((), "no thread can go on"),
    ),
}


@pytest.mark.parametrize(("file", "right", "wrong", "flags", "report"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(file, right, wrong, flags, report, tmp_path):
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    text = (source / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: plant the fault anew"
    (source / file).write_text(text.replace(right, wrong))
    code, printed = run(build(tmp_path, source, flags))
    assert code != 0
    assert report in printed
