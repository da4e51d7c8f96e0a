"""The emulation of Hopper's instructions catches what it is there for: faults are planted into copies of csrc/.

Each copy is compiled with hopper_faults.cpp, which multiplies matrices through TMA, mbarriers and wgmma, in clusters or
not, and compares with a plain loop. Boxes are copied either as late as allowed or at once.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: pathlib.Path, source: pathlib.Path, flags: tuple[str, ...] = ()) -> pathlib.Path:
    """The check with the kernels in ``source``."""
    program = folder / "check"
    command = ["g++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-DBARLOW_EMULATION", *flags]
    check = ROOT / "tests" / "hopper_faults.cpp"
    subprocess.run([*command, "-I", source, check, "-o", program], check=True, capture_output=True)
    return program


def run(program: pathlib.Path, order: str = "forward", copies: str = "late") -> tuple[int, str]:
    """Its exit code, and what it printed. ``order`` is that in which a block's threads take turns."""
    environment = {"BARLOW_EMULATION_ORDER": order, "BARLOW_EMULATION_COPIES": copies}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_without_a_fault_nothing_is_reported(flags, tmp_path):
    program = build(tmp_path, ROOT / "csrc", flags)
    for order, copies in (("forward", "late"), ("reverse", "early")):
        assert run(program, order, copies) == (0, "")


# what is wrong, the file, the right text, the wrong text, when boxes are copied, what is reported
FAULTS = {
    "a wrong leading offset": (
        *("hopper.h", "leading = K_MAJOR ? 16 : BOX_BYTES", "leading = K_MAJOR ? 16 : 1024"),
        *("late", "P is wrong"),
    ),
    "a wrong stride offset": ("hopper.h", "stride = 1024", "stride = 512", "late", "P is wrong"),
    "a wrong step along k": ("hopper.h", "(K_MAJOR ? 32 : 2048)", "(K_MAJOR ? 32 : 1024)", "late", "P is wrong"),
    "a stage that is not waited for": (
        *("hopper_multiply.h", "mbarrier_wait(full(place.stage), place.phase);\n    pin", "pin"),
        *("late", "more arrivals at an mbarrier"),
    ),
    "a stage that is filled while it is read": (
        *("hopper_multiply.h", "mbarrier_wait(empty(place.stage), place.phase ^ 1);\n      mbarrier", "mbarrier"),
        *("early", "no thread can go on"),
    ),
    "a stage that is given back before it has been read": (
        *("hopper_multiply.h", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        *("early", "P is wrong"),
    ),
    "a product that is not waited for": (
        *("hopper_multiply.h", "wgmma_wait<0>();", "wgmma_wait<1>();"),
        *("late", "P is wrong"),
    ),
    "a product without a fence": ("hopper_multiply.h", "wgmma_fence();", "", "late", "wgmma without wgmma_fence"),
    "a wrong phase": (
        *("hopper_multiply.h", "place.phase ^ 1);\n      mbarrier", "place.phase);\n      mbarrier"),
        *("late", "no thread can go on"),
    ),
    "a wrong number of bytes": (
        *("hopper_multiply.h", "mbarrier_arrive_expect(arrived, stage_bytes)", "mbarrier_arrive_expect(arrived, 1024)"),
        *("late", "no thread can go on"),
    ),
    "a block of the cluster that is not asked": (
        *("hopper_multiply.h", "CLUSTER * Team::threads / 32", "Team::threads / 32"),
        *("late", "no thread can go on"),
    ),
    "a part of the cluster's boxes in the wrong place": (
        *("hopper_multiply.h", "const int part = K / CLUSTER * rank;", "const int part = 0;"),
        *("late", "P is wrong"),
    ),
}


@pytest.mark.parametrize(("file", "right", "wrong", "copies", "report"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(file, right, wrong, copies, report, tmp_path):
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    text = (source / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: plant the fault anew"
    (source / file).write_text(text.replace(right, wrong))
    code, printed = run(build(tmp_path, source), copies=copies)
    assert code != 0
    assert report in printed
