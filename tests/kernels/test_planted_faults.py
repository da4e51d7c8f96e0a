"""The emulation of the CUDA kernels catches what it is there for: faults are planted into copies of csrc/.

Each copy is compiled with a program that compares its product with a plain loop: cuda_faults.cpp runs the gram kernel,
hopper_faults.cpp multiplies matrices through TMA, mbarriers and wgmma, in clusters or not, and finishes tiles beside
the next product, gram_faults.cpp runs Hopper's gram over squares that several clusters share.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
from sites import sites

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PROGRAMS = ("cuda_faults", "hopper_faults", "gram_faults")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: pathlib.Path, name: str, source: pathlib.Path, flags: tuple[str, ...]) -> pathlib.Path:
    """The program with the kernels in ``source``."""
    program = folder / name
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-DBARLOW_EMULATION", *flags]
    check = HERE / f"{name}.cpp"
    subprocess.run([*command, "-I", source, check, "-o", program], check=True, capture_output=True)
    return program


def run(program: pathlib.Path, order: str = "forward", copies: str = "late", drop: str = "") -> tuple[int, str]:
    """Its exit code, and what it printed.

    ``order`` is that in which a block's threads take turns; TMA copies a box at once ("early") or as late as allowed;
    ``drop`` is a barrier, wait or fence that is left out.
    """
    environment = {
        "BARLOW_EMULATION_ORDER": order,
        "BARLOW_EMULATION_COPIES": copies,
        "BARLOW_EMULATION_DROP": drop,
    }
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_without_a_fault_nothing_is_reported(name, flags, tmp_path):
    program = build(tmp_path, name, SOURCES, flags)
    for order, copies in (("forward", "late"), ("reverse", "early")):
        assert run(program, order, copies) == (0, "")


# what is wrong: the file, the right text, the wrong text, compiler flags, what is reported
CUDA_FAULTS = {
    "a read past the end": (
        *("blocks/multiply.h", "const int count = row < row_end ?", "const int count = row <= row_end ?"),
        *(SANITIZE, "heap-buffer-overflow"),
    ),
    "a write past the end": (
        *("kernels/gram.h", "if (me < ne || me >= p.n) continue;", "if (me < ne) continue;"),
        *(SANITIZE, "heap-buffer-overflow"),
    ),
    "a missing barrier": (
        *("blocks/multiply.h", "barrier();  // everybody's copies of this stage", ";  //"),
        *((), "K is wrong"),
    ),
    "a stage that is not waited for": (
        *("blocks/multiply.h", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
        *((), "K is wrong"),
    ),
    "a wrong fragment index": (
        *("blocks/multiply.h", "mn + (l / 8 % 2) * 8 + l % 8", "mn + (l / 16) * 8 + l % 8"),
        *((), "K is wrong"),
    ),
    "a barrier that not all threads reach": (
        *("blocks/multiply.h", "barrier();  // shared memory is free", "if (thread() < 32) barrier();  //"),
        *((), "no thread can go on"),
    ),
}

# what is wrong: the file, the right text, the wrong text, when boxes are copied, what is reported
HOPPER_FAULTS = {
    "a wrong leading offset": (
        *("gpu/hopper.h", "leading = K_MAJOR ? 16 : BOX_BYTES", "leading = K_MAJOR ? 16 : 1024"),
        *("late", "P is wrong"),
    ),
    "a wrong stride offset": ("gpu/hopper.h", "stride = 1024", "stride = 512", "late", "P is wrong"),
    "a wrong step along k": ("gpu/hopper.h", "(K_MAJOR ? 32 : 2048)", "(K_MAJOR ? 32 : 1024)", "late", "P is wrong"),
    "a full stage that is not waited for": (
        *("blocks/hopper_multiply.h", "mbarrier_wait(full(place.stage), place.phase);\n    pin", "pin"),
        *("late", "more arrivals at an mbarrier"),
    ),
    "a stage that is filled while it is read": (
        *(
            "blocks/hopper_multiply.h",
            "mbarrier_wait(empty(place.stage), place.phase ^ 1);\n      mbarrier",
            "mbarrier",
        ),
        *("early", "no thread can go on"),
    ),
    "a stage that is given back before it has been read": (
        *("blocks/hopper_multiply.h", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        *("early", "P is wrong"),
    ),
    "a product that is not waited for": (
        *("blocks/hopper_multiply.h", "wgmma_wait<0>();", "wgmma_wait<1>();"),
        *("late", "P is wrong"),
    ),
    "a product without a fence": (
        "blocks/hopper_multiply.h",
        "wgmma_fence();",
        "",
        "late",
        "wgmma without wgmma_fence",
    ),
    "a wrong phase": (
        *("blocks/hopper_multiply.h", "place.phase ^ 1);\n      mbarrier", "place.phase);\n      mbarrier"),
        *("late", "no thread can go on"),
    ),
    "a wrong number of bytes": (
        *(
            "blocks/hopper_multiply.h",
            "mbarrier_arrive_expect(arrived, diagonal ? a_bytes : stage_bytes)",
            "mbarrier_arrive_expect(arrived, 1024)",
        ),
        *("late", "no thread can go on"),
    ),
    "a block of the cluster that is not asked": (
        *("blocks/hopper_multiply.h", "CLUSTER * Team::threads / 32", "Team::threads / 32"),
        *("late", "no thread can go on"),
    ),
    "bytes of a factor that never comes": (
        *("blocks/hopper_multiply.h", "arrived, diagonal ? a_bytes : stage_bytes", "arrived, stage_bytes"),
        *("late", "no thread can go on"),
    ),
    "a diagonal tile that multiplies what has not come": (
        *("blocks/hopper_multiply.h", "diagonal ? 0 : a_bytes;", "a_bytes;"),
        *("late", "P is wrong"),
    ),
    "a part of the cluster's boxes in the wrong place": (
        *("blocks/hopper_multiply.h", "const int part = K / CLUSTER * rank;", "const int part = 0;"),
        *("late", "P is wrong"),
    ),
    "a tile that is finished before it has been put": (
        *("blocks/hopper_epilogue.h", "mbarrier_wait(&memory.given, tiles % 2);", ""),
        *("late", "no thread can go on"),
    ),
    "a warp too many that is waited for": (
        *("blocks/hopper_epilogue.h", "mbarrier_init(&memory.given, Consumers::threads / 32)"),
        *("mbarrier_init(&memory.given, Consumers::threads / 32 + 1)", "late", "no thread can go on"),
    ),
    "a turn that never comes": (
        *("blocks/hopper_epilogue.h", "mbarrier_wait(&memory.taken, tiles % 2 ^ 1)"),
        *("mbarrier_wait(&memory.taken, tiles % 2)", "late", "no thread can go on"),
    ),
    "a last tile that helpers read too early": (
        *("blocks/hopper_epilogue.h", "mbarrier_wait(&memory.given, (tiles - 1) % 2);", ""),
        *("late", "the finished tile is wrong"),
    ),
    "rows that nobody finishes": (
        *("blocks/hopper_epilogue.h", "{Finishers::threads / 32 + warp(),", "{warp(),"),
        *("late", "the finished tile is wrong"),
    ),
    "a row that is read in another row's place": (
        *("blocks/hopper_epilogue.h", "next_y += y_step;", "next_y += x_step + 8;"),
        *("late", "the finished tile is wrong"),
    ),
    "a tile that lies otherwise than it is read": (
        *("blocks/hopper_epilogue.h", "(lane() % 8 ^ row % 8) * 16", "lane() % 8 * 16"),
        *("late", "the finished tile is wrong"),
    ),
}


# what is wrong: the file, the right text, the wrong text; K or the inner product is then wrong
GRAM_FAULTS = {
    "a partial tile that another cluster overwrites": (
        "kernels/hopper_gram.cu",
        "add_to_partial(partial_tile(s.line + work), acc",
        "add_to_partial(partial_tile(s.line), acc",
    ),
    "a long sum whose first part is lost": ("kernels/hopper_gram.cu", "acc, done > 0);", "acc, false);"),
    "a segment that nobody waits for": (
        "kernels/hopper_gram.cu",
        "segments += views[view].count;",
        "segments += views[view].count - view;",
    ),
    "a segment in another block's place": (
        "kernels/hopper_gram.cu",
        "stride = cluster * Product::COLUMNS * Consumers::threads",
        "stride = Product::COLUMNS * Consumers::threads",
    ),
    "a tile beside the diagonal that loads its rows alone": (
        "kernels/hopper_gram.cu",
        "Product::multiply(ring, acc, steps, row == column);",
        "Product::multiply(ring, acc, steps, true);",
    ),
    "a piece that another slice overwrites": (
        "kernels/hopper_gram.cu",
        "partial_tile<Product>(params.p, params.tiles, tile, view, slice)",
        "partial_tile<Product>(params.p, params.tiles, tile, view, 0)",
    ),
    "a triangle that is stored across": ("kernels/gram.h", "(m + 8 * h - odd), across", "(m + 8 * h), across"),
}


def with_fault(folder: pathlib.Path, file: str, right: str, wrong: str) -> pathlib.Path:
    """A copy of the kernels."""
    source = folder / "csrc"
    shutil.copytree(SOURCES, source)
    text = (source / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: plant the fault anew"
    (source / file).write_text(text.replace(right, wrong))
    return source


@pytest.mark.parametrize(("file", "right", "wrong", "flags", "report"), CUDA_FAULTS.values(), ids=CUDA_FAULTS.keys())
def test_a_fault_of_the_portable_kernels_is_caught(file, right, wrong, flags, report, tmp_path):
    code, printed = run(build(tmp_path, "cuda_faults", with_fault(tmp_path, file, right, wrong), flags))
    assert code != 0
    assert report in printed


@pytest.mark.parametrize(
    ("file", "right", "wrong", "copies", "report"), HOPPER_FAULTS.values(), ids=HOPPER_FAULTS.keys()
)
def test_a_fault_of_hoppers_product_is_caught(file, right, wrong, copies, report, tmp_path):
    program = build(tmp_path, "hopper_faults", with_fault(tmp_path, file, right, wrong), ())
    code, printed = run(program, copies=copies)
    assert code != 0
    assert report in printed


@pytest.mark.parametrize(("file", "right", "wrong"), GRAM_FAULTS.values(), ids=GRAM_FAULTS.keys())
def test_a_fault_of_hoppers_gram_is_caught(file, right, wrong, tmp_path):
    code, printed = run(build(tmp_path, "gram_faults", with_fault(tmp_path, file, right, wrong), ()))
    assert code != 0
    assert "K is wrong" in printed


def test_a_block_alone_waits_for_its_ring(tmp_path):
    """The only barrier that no kernel comes to (mutations.py): they all have clusters of several blocks."""
    (site,) = [site for site in sites() if site.name == "blocks/hopper_multiply.h begin: barrier()"]
    code, printed = run(build(tmp_path, "hopper_faults", SOURCES, ()), order="reverse", drop=site.drop)
    assert code != 0
    assert "an mbarrier that nobody initialised" in printed
