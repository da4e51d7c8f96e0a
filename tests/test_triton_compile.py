"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU: onto tensor cores, without spilled registers,
within the architecture's shared memory.

The operations run on tensors of the meta device, which have shapes and no data, with recorders in the place of the
kernels; what they would have launched is compiled. The default is a part of the table of block shapes that takes about
a minute; BARLOW_FUSED_TEST_WHOLE_TABLE=1 compiles all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
triton = pytest.importorskip("triton", reason="needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from barlow_fused.backends import Weights, triton_backend  # noqa: E402
from barlow_fused.backends.triton_kernels import configs  # noqa: E402
from barlow_fused.normalization import CONVENTIONS  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

WHOLE_TABLE = os.environ.get("BARLOW_FUSED_TEST_WHOLE_TABLE", "0") != "0"
KERNELS = (
    *("normalize_kernel", "moments_kernel", "apply_moments_kernel", "gram_kernel", "gram_grad_kernel"),
    *("correlate_kernel", "correlate_terms_kernel", "direct_grad_kernel"),
)
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_memory: int  # bytes
    spilled: int  # bytes stored and loaded
    registers: int


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple
    options: dict[str, Any]

    @functools.cached_property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compile(self, arch: int) -> Compiled:
        """As Triton's launcher would: integers of 1 are constants, multiples of 16 are known to be."""
        signature, constants, attributes = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options
        for index, parameter in enumerate(self.kernel.params):
            value, name = values[parameter.name], parameter.name
            aligned = False
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                if not (parameter.is_constexpr or value is None) and parameter.do_not_specialize:
                    signature[name] = "i32"
                else:
                    signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], aligned = "*" + TYPES[value.dtype], True
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {k: v for k, v in self.options.items() if k in ("num_warps", "num_stages")}
        log = io.StringIO()  # of ptxas, which says how many registers it spilled
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        return Compiled(
            ptx=compiled.asm["ptx"],
            shared_memory=compiled.metadata.shared,
            spilled=int(spilled[1]) + int(spilled[2]),
            registers=int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        )


class Recorder:
    """In the place of a kernel: remembers what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def launches_of(monkeypatch, arch, n, d, dtype, route, convention="batch_norm", precision="highest") -> list[Launch]:
    """What the forward and the backward pass launch."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.setattr(triton_backend, name, Recorder(getattr(triton_backend, name), launches))
        patch.setattr(configs, "architecture", lambda device: arch)
        patch.setattr(configs, "multiprocessors", lambda device: 132)
        patch.setattr(configs, "has_tma", lambda device: arch >= 90)
        patch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        z_a, z_b = (torch.empty(n, d, dtype=dtype, device="meta") for _ in range(2))
        x = triton_backend.normalize(z_a, z_b, CONVENTIONS[convention])
        reduce = triton_backend.gram if route == "gram" else triton_backend.correlate
        _, product = reduce(x, 0.0051, 1.0, True)
        scalar = torch.empty((), device="meta")
        triton_backend.input_grad(x, product, route, Weights(scalar, None, None, 0.0051, 1.0), (True, True))
    return launches


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


@pytest.fixture(autouse=True)
def ptxas_log(monkeypatch):
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)


@pytest.mark.parametrize(("arch", "n", "d", "dtype", "route", "convention", "precision"), CASES)
def test_compiles_onto_tensor_cores_without_spills(arch, n, d, dtype, route, convention, precision, monkeypatch):
    launches = launches_of(monkeypatch, arch, n, d, dtype, route, convention, precision)
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
def test_large_products_take_the_newest_tensor_cores(arch, instruction, monkeypatch):
    launches = launches_of(monkeypatch, arch, 2048, 8192, BF16, "gram")
    assert [launch.name for launch in launches][-2:] == ["gram_kernel", "gram_grad_kernel"]
    for launch in launches[-2:]:
        assert any(isinstance(a, TensorDescriptor) for a in launch.arguments)
        assert instruction in launch.compile(arch).ptx


@pytest.mark.parametrize(("n", "count"), [(256, 3), (512, 3), (2048, 4)])
def test_launches_of_the_gram_route(n, count, monkeypatch):
    """At most 3 forward and 3 backward: here 2 or 3, and 1."""
    assert len(launches_of(monkeypatch, 90, n, 8192, BF16, "gram")) == count
