"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU: onto tensor cores, without spilled registers,
within the architecture's shared memory.

benchmarks/kernels.py says how. The default is a part of the table of block shapes that takes about a minute;
BARLOW_FUSED_TEST_WHOLE_TABLE=1 compiles all of it.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from barlow_fused.backends.triton_kernels import configs  # noqa: E402
from barlow_fused.normalization import CONVENTIONS  # noqa: E402
from benchmarks.kernels import TensorDescriptor, launches_of  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

WHOLE_TABLE = os.environ.get("BARLOW_FUSED_TEST_WHOLE_TABLE", "0") != "0"
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (n, d, dtype, route, convention, precision of float32)
EVERY_KERNEL = [
    (256, 8192, BF16, "gram", "batch_norm", "highest"),
    (2048, 65536, BF16, "gram", "batch_norm", "highest"),
    (8192, 2048, BF16, "direct", "batch_norm", "highest"),
    (256, 8192, FP32, "gram", "batch_norm", "highest"),
]
UNEVEN = [  # rows and columns that no block divides
    (250, 1040, FP16, "gram", "none", "highest"),
    (1300, 1040, FP32, "gram", "std", "highest"),
    (300, 208, FP32, "direct", "std", "highest"),
]
ODD = [  # rows that do not begin at multiples of 16 bytes: a pointer for every number, and too few registers for them
    (250, 1001, FP16, "gram", "none", "highest"),
    (1300, 1001, FP32, "gram", "std", "highest"),
    (300, 201, FP32, "direct", "std", "highest"),
]
WHOLE = [
    *((n, 8192, FP16, "gram", "std", "highest") for n in (32, 100, 512, 1024)),
    *((n, 8192, FP32, "gram", "batch_norm", "highest") for n in (64, 128, 700, 3000)),
    *((n, 8192, FP32, "gram", "std", "high") for n in (64, 128, 256, 1000, 3000)),
    (2048, 262144, BF16, "gram", "batch_norm", "highest"),
    (512, 2000, BF16, "gram", "batch_norm", "highest"),
    (2048, 8192, BF16, "gram", "none", "highest"),
    *((n, d, BF16, "direct", "std", "highest") for n, d in ((700, 300), (5000, 3000), (20000, 2048))),
    *((n, d, FP32, "direct", "std", p) for n, d in ((700, 300), (4096, 2048)) for p in ("highest", "high")),
    (4096, 2048, BF16, "direct", "none", "highest"),
]
CASES = [(arch, *case) for arch in (80, 90, 100) for case in EVERY_KERNEL]
if WHOLE_TABLE:
    CASES = [(arch, *case) for arch in configs.TABLE for case in (*EVERY_KERNEL, *UNEVEN, *ODD, *WHOLE)]
else:
    CASES += [(90, *case) for case in (*UNEVEN, *ODD)]


@pytest.mark.parametrize(("arch", "n", "d", "dtype", "route", "convention", "precision"), CASES)
def test_compiles_onto_tensor_cores_without_spills(arch, n, d, dtype, route, convention, precision):
    launches = launches_of(arch, n, d, dtype, route, CONVENTIONS[convention], precision)
    forward = 3 if route == "gram" else 4
    assert len(launches) <= forward + 2  # one launch fewer where normalize needs one phase
    for launch in launches:
        compiled = launch.compile(arch)
        assert compiled.spilled <= (0 if d % 16 == 0 else 512), (
            f"{launch.name}: {compiled.spilled} bytes of registers spilled"
        )
        assert compiled.shared_memory <= configs.SHARED_MEMORY[arch], launch.name
        if "PRECISION" in launch.options:
            assert re.search(TENSOR_CORES[min(arch, 100) // 10 * 10], compiled.ptx), f"{launch.name}: no tensor cores"
        if arch >= 90 and any(isinstance(a, TensorDescriptor) for a in launch.arguments):
            assert "cp.async.bulk.tensor" in compiled.ptx, f"{launch.name}: no TMA"
        if arch == 80 and n % 64 == d % 64 == 0 and "PRECISION" in launch.options:
            assert "cp.async.cg" in compiled.ptx, f"{launch.name}: loads are not of 16 bytes"


@pytest.mark.parametrize(("arch", "instruction"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_large_products_take_the_newest_tensor_cores(arch, instruction):
    launches = launches_of(arch, 2048, 8192, BF16, "gram")
    assert [launch.name for launch in launches][-2:] == ["gram_kernel", "gram_grad_kernel"]
    for launch in launches[-2:]:
        assert any(isinstance(a, TensorDescriptor) for a in launch.arguments)
        assert instruction in launch.compile(arch).ptx


@pytest.mark.parametrize(("n", "count"), [(256, 3), (512, 3), (2048, 4)])
def test_launches_of_the_gram_route(n, count):
    """At most 3 forward and 3 backward: here 2 or 3, and 1."""
    assert len(launches_of(90, n, 8192, BF16, "gram")) == count
