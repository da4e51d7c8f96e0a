"""Every Triton kernel compiles for AMD's GPUs without one: onto matrix cores, without spilled registers, within the
local data share, and with partial tiles handed over as that memory wants it.

Run on such a GPU they have not been. BARLOW_FUSED_TEST_WHOLE_TABLE=1 compiles more shapes for each architecture.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from barlow_fused.normalization import CONVENTIONS  # noqa: E402
from benchmarks.kernels import described, launches_of  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

WHOLE_TABLE = os.environ.get("BARLOW_FUSED_TEST_WHOLE_TABLE", "0") != "0"
OLD_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CDNA, RDNA = ("gfx90a", "gfx942", "gfx950"), ("gfx1100", "gfx1201")
EVERY_KERNEL = [  # (n, d, dtype, route, convention)
    (256, 8192, BF16, "gram", "batch_norm"),
    (2048, 65536, BF16, "gram", "batch_norm"),
    (8192, 2048, BF16, "direct", "batch_norm"),
    (256, 8192, FP32, "gram", "batch_norm"),
]
UNEVEN = [(250, 1040, FP16, "gram", "none"), (1300, 1040, FP32, "gram", "std")]
ODD = [(1300, 1001, FP16, "gram", "std"), (300, 201, FP32, "direct", "std")]
WHOLE = [(n, 8192, FP16, "gram", "std") for n in (32, 100, 512, 1024)] + [
    (2048, 8192, BF16, "gram", "none"),
    (512, 2000, BF16, "gram", "batch_norm"),
    (20000, 2048, BF16, "direct", "std"),
    (4096, 2048, FP32, "direct", "std"),
]
CASES = [(arch, *case) for arch in (*CDNA, *RDNA) for case in EVERY_KERNEL]
if WHOLE_TABLE:
    CASES += [(arch, *case) for arch in (*CDNA, *RDNA) for case in (*UNEVEN, *ODD, *WHOLE)]
else:
    CASES += [(arch, *case) for arch in ("gfx942", "gfx1100") for case in (*UNEVEN, *ODD)]


def matrix_instruction(arch, dtype):
    """The one that every product takes; None: RDNA multiplies float32 outside of its matrix cores."""
    if arch in RDNA:
        return {FP32: None, BF16: "v_wmma_f32_16x16x16_bf16", FP16: "v_wmma_f32_16x16x16_f16"}[dtype]
    factors = {FP32: r"2_?f32", BF16: r"\d+_?bf16", FP16: r"\d+_?f16"}
    return f"v_mfma_f32_32x32x{factors[dtype]}"


@pytest.mark.parametrize(("arch", "n", "d", "dtype", "route", "convention"), CASES)
def test_compiles_onto_matrix_cores_without_spills(arch, n, d, dtype, route, convention):
    about = described(arch)
    instruction = matrix_instruction(arch, dtype)
    for launch in launches_of(arch, n, d, dtype, route, CONVENTIONS[convention]):
        compiled = launch.compile(arch)
        limit = 0 if d % 16 == 0 and not OLD_COMPILER else 512
        assert compiled.spilled <= limit, f"{launch.name}: {compiled.spilled} bytes of registers spilled"
        assert compiled.shared_memory <= about.shared_memory, launch.name
        assert compiled.registers <= (256 if arch in RDNA else 512), launch.name
        assert "cp.async" not in compiled.ptx
        if "PRECISION" not in launch.options:
            continue
        assert launch.options["num_warps"] * about.warp_size == 256
        if instruction is not None:
            assert re.search(instruction, compiled.ptx), f"{launch.name}: no matrix cores"
        if d % 64 == 0:
            assert re.search(r"(global|buffer)_load_(dwordx4|b128)", compiled.ptx), f"{launch.name}: narrow loads"


def test_float32_as_tf32_where_there_is_such_an_instruction():
    for arch, instruction in (("gfx942", "v_mfma_f32_32x32x4_xf32"), ("gfx950", "v_mfma_f32_32x32x2_f32")):
        launches = launches_of(arch, 256, 8192, FP32, "gram", precision="high")
        (launch,) = (launch for launch in launches if launch.name == "gram_kernel")
        assert instruction in launch.compile(arch).ptx


def ticket(arch: str, kind: str | None = None) -> list[str]:
    """gram's instructions that move or order memory, from the tile's partial sums on; ``kind``: another hand-over."""
    (launch,) = (launch for launch in launches_of(arch, 256, 8192, BF16, "gram") if launch.name == "gram_kernel")
    if kind is not None:
        launch.options["TICKET"] = kind
    lines = [line.split(";")[0].strip() for line in launch.compile(arch).ptx.splitlines()]
    lines = [line for line in lines if re.match(r"(global|buffer)_|s_wait|s_barrier", line)]
    first = next(i for i, line in enumerate(lines) if "atomic_add" in line)
    start = max(i for i, line in enumerate(lines[:first]) if "_store_" in line)
    end = next(i for i, line in enumerate(lines) if i > first and re.search(r"_store_|_load_", line))
    return lines[start:end]


def position(lines: list[str], pattern: str, after: int = 0) -> int:
    return next((i for i, line in enumerate(lines) if i > after and re.match(pattern, line)), len(lines))


@pytest.mark.parametrize("arch", CDNA)
def test_cdna_waits_for_every_threads_stores_before_the_ticket(arch):
    """One wavefront's release waits for its own; the barrier by itself waits for none."""
    lines = ticket(arch)
    wait, barrier = position(lines, r"s_waitcnt vmcnt\(0\)"), position(lines, "s_barrier")
    assert 0 < wait < barrier < position(lines, "global_atomic_add")
    lines = ticket(arch, "")
    assert position(lines, "s_barrier") < position(lines, r"s_waitcnt vmcnt\(0\)")


@pytest.mark.parametrize("arch", RDNA)
def test_rdna_invalidates_every_threads_cache_after_the_ticket(arch):
    """Two compute units share a workgroup, and each has a cache of its own."""
    for kind, count in ((None, 2), ("", 1)):  # of the wavefront that draws it, and of all
        lines = ticket(arch, kind)
        wait, barrier = position(lines, r"s_wait(cnt_vscnt null|_storecnt)"), position(lines, "s_barrier")
        drawn = position(lines, "global_atomic_add")
        assert 0 < wait < barrier < drawn
        assert sum(bool(re.match("buffer_gl0_inv|global_inv", line)) for line in lines[drawn:]) == count
