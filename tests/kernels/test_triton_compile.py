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
from benchmarks.kernels import TensorDescriptor, described, launches_of  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

WHOLE_TABLE = os.environ.get("BARLOW_FUSED_TEST_WHOLE_TABLE", "0") != "0"
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
OLD_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)  # spills more
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
ODD = [  # rows of the inputs that do not begin at multiples of 16 bytes
    (300, 8191, BF16, "gram", "batch_norm", "highest"),
    (1301, 8191, BF16, "gram", "batch_norm", "highest"),
    (5000, 2001, BF16, "direct", "batch_norm", "highest"),
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
    assert len({launch.name for launch in launches}) <= forward + 2  # fewer where normalize needs one phase
    limit = 1024 if OLD_COMPILER and (arch == 100 or d % 16) else 0
    for launch in launches:
        compiled = launch.compile(arch)
        assert compiled.spilled <= limit, f"{launch.name}: {compiled.spilled} bytes of registers spilled"
        assert compiled.shared_memory <= described(arch).shared_memory, launch.name
        if "PRECISION" in launch.options:
            assert re.search(TENSOR_CORES[min(arch, 100) // 10 * 10], compiled.ptx), f"{launch.name}: no tensor cores"
        if arch >= 90 and any(isinstance(a, TensorDescriptor) for a in launch.arguments):
            assert "cp.async.bulk.tensor" in compiled.ptx, f"{launch.name}: no TMA"
        if arch == 80 and n % 64 == d % 64 == 0 and "PRECISION" in launch.options:
            assert "cp.async.cg" in compiled.ptx, f"{launch.name}: loads are not of 16 bytes"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("n", "d", "dtype"), [(300, 8191, BF16), (1301, 8191, FP16), (301, 1001, FP32)])
def test_products_of_odd_shapes_load_16_bytes_at_once(arch, n, d, dtype):
    """Whatever N and D are: rows of A_hat, B_hat, K and C are padded."""
    for route in ("gram", "direct"):
        launches = [x for x in launches_of(arch, n, d, dtype, route) if "PRECISION" in x.options]
        for launch in launches[0 if route == "gram" or dtype == FP32 else 1 :]:  # correlate of halves reads z itself
            ptx = launch.compile(arch).ptx
            wide = re.findall(r"cp\.async\.cg\.[^;]*, 0x10,|cp\.async\.bulk\.tensor", ptx)
            assert wide, launch.name
            assert not re.findall(r"cp\.async\.ca", ptx), launch.name


@pytest.mark.parametrize(("arch", "instruction"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_large_products_take_the_newest_tensor_cores(arch, instruction):
    launches = launches_of(arch, 2048, 8192, BF16, "gram")
    assert [launch.name for launch in launches][-3:-1] == ["gram_kernel", "grad_product_kernel"]
    for launch in launches[-3:-1]:
        assert any(isinstance(a, TensorDescriptor) for a in launch.arguments)
        assert instruction in launch.compile(arch).ptx


@pytest.mark.parametrize("arch", [80, 90])
def test_the_precision_of_halves_says_nothing(arch):
    """It is "ieee", which every maker's compiler accepts: NVIDIA's makes the same of it as of "tf32"."""
    ptx = []
    for precision in ("ieee", "tf32"):
        launches = launches_of(arch, 512, 8192, BF16, "gram")
        assert [launch.options.get("PRECISION", "ieee") for launch in launches] == ["ieee"] * len(launches)
        (launch,) = (launch for launch in launches if launch.name == "gram_kernel")
        launch.options["PRECISION"] = precision
        ptx.append(launch.compile(arch).ptx)
    assert ptx[0] == ptx[1]


@pytest.mark.parametrize(("n", "count"), [(256, 3), (512, 4), (2048, 5)])
def test_launches_of_the_gram_route(n, count):
    """At most 3 forward and 3 backward: here 2 or 3, and 1 or 2."""
    assert len(launches_of(90, n, 8192, BF16, "gram")) == count


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"views": (empty(2, 1), empty(2, 1))},  # Triton makes constants of integers that are 1
        {"views": (empty(100, 70).T, empty(70, 100, 2)[..., 0]), "need_grad": False},
        {
            "views": (empty(100, 70).T, empty(1, 100).expand(70, 100)),
            "used": (False, True, True),
            "needs": (False, True),
        },
    ],
    ids=["one feature", "strided, no gradient", "strided, one gradient"],
)
def test_every_kind_of_call_compiles(route, arguments):
    """The interpreter does not show what the compiler refuses."""
    n, d = arguments["views"][0].shape
    for launch in launches_of(90, n, d, BF16, route, **arguments):
        assert launch.compile(90).ptx


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_partial_tiles_are_handed_over_in_order(arch):
    """All stores, a barrier, the ticket (released and acquired by the whole GPU), a barrier, loads that skip L1."""
    launches = launches_of(arch, 256, 8192, BF16, "gram")
    (launch,) = (launch for launch in launches if launch.name == "gram_kernel")
    ptx = launch.compile(arch).ptx
    first, second = re.finditer(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    for begin, ticket, end in ((0, first.start(), second.start()), (first.end(), second.start(), len(ptx))):
        before, after = ptx[begin:ticket], ptx[ticket:end]
        assert 0 < before.rindex("st.global") < before.rindex("bar.sync")
        assert after.index("bar.sync") < after.index("ld.global.cg")
        assert after.index("ld.global.cg") == after.index("ld.global")


def test_the_gradients_of_many_rows_are_made_where_p_was_stored():
    """grad_apply loads P and stores the gradient by the same threads: loads of P never take the read-only path."""
    product, apply = launches_of(90, 2048, 8192, BF16, "gram")[-2:]
    assert [product.name, apply.name] == ["grad_product_kernel", "grad_apply_kernel"]
    assert product.grid == (2 * 16 * 64,)
    for name in ("grad_a", "grad_b"):
        assert product.values[name] is apply.values[name]
    assert "ld.global.nc" not in apply.compile(90).ptx


@pytest.mark.parametrize(
    ("d", "route", "sizes"),
    [
        (8192, "gram", (256, 200, 201)),
        (8191, "gram", (256, 200, 201)),
        (8192, "gram", (2048, 1304, 1301)),
        (2048, "direct", (8192, 5000, 4999)),
    ],
)
def test_a_smaller_last_batch_compiles_nothing_anew(d, route, sizes):
    """Where it takes the same blocks and TMA: N is an argument that no kernel is specialised on."""
    kinds = [[x.specialization for x in launches_of(90, n, d, BF16, route)] for n in sizes]
    assert len({len(kind) for kind in kinds}) == 1
    assert kinds[0] == kinds[1] == kinds[2]


def test_two_programs_share_a_multiprocessor():
    """By registers and by shared memory, of which each takes 1 KiB more: products of large half-precision inputs."""
    chip = configs.chip_of(described(90))
    for n, d, dtype in ((2048, 8192, BF16), (1300, 65536, FP16), (1024, 2000, BF16), (512, 300000, FP16)):
        launches = [x for x in launches_of(90, n, d, dtype, "gram") if x.name in ("gram_kernel", "grad_product_kernel")]
        assert len({x.name for x in launches}) == 2
        for launch in launches:
            compiled = launch.compile(90)
            threads = 32 * launch.options["num_warps"]
            assert 2 * threads * compiled.registers <= configs.REGISTERS, launch.name
            assert 2 * (compiled.shared_memory + 1024) <= chip.about.shared_memory + 1024, launch.name
            assert compiled.spilled == 0, launch.name
    assert chip.resident(chip.gram(2048, BF16)) == chip.resident(chip.gram_grad(2048, 8192, BF16, True)) == 2
    assert chip.resident(chip.gram(256, BF16)) == 3
    ampere = configs.chip_of(described(80))
    assert ampere.resident(ampere.gram(2048, BF16)) == 1


def test_grids_and_counters_fit_what_they_serve():
    """No grid beyond what CUDA takes, and a counter for every tile of gram and one for all of them."""
    for n, d, route in ((2, 2**24, "gram"), (2048, 262144, "gram"), (16384, 65536, "gram"), (64, 65536, "direct")):
        for launch in launches_of(90, n, d, BF16, route):
            assert launch.grid[0] < 2**31
            assert all(size < 2**16 for size in launch.grid[1:])
            if launch.name == "gram_kernel":
                values = launch.values
                assert values["counters"].numel() == values["tiles"] + 1
                rest = values["tiles"] - values["first_tiles"]
                items = 2 * (values["first_tiles"] * values["first_split"] + rest * values["rest_split"])
                assert launch.grid == (items,)
                assert values["partials"].numel() == items * values["BLOCK"] ** 2
