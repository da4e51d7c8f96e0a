"""What nvcc makes of the CUDA kernels: no spills, tensor cores, TMA. Triton's wheel has the tools that read it."""

from __future__ import annotations

import builds
import pytest
from builds import needs_nvcc

from benchmarks import sass

pytestmark = needs_nvcc
ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100")


@pytest.fixture(scope="module")
def code() -> list[sass.Kernel]:
    if sass.tool() is None:
        pytest.skip("needs cuobjdump, of CUDA or of the package triton")
    return sass.kernels_of(builds.compiled(), ("sm_90", "sm_90a"))


def test_no_kernel_spills_or_keeps_anything_in_local_memory():
    """Registers that do not suffice are spilled to the stack, as is an array whose index the compiler does not know."""
    if sass.tool() is None:
        pytest.skip("needs cuobjdump, of CUDA or of the package triton")
    resources = sass.resources_of(builds.compiled())
    count = dict.fromkeys(ARCHITECTURES, 0)
    for (architecture, symbol), (_, stack, local) in resources.items():
        assert stack == local == 0, f"{symbol} on {architecture}"
        count[architecture] += 1
    assert count["sm_80"] == count["sm_90"] == count["sm_100"] >= 10
    assert count["sm_90a"] >= 4  # those of hopper_*.cu


def test_warm_up_knows_every_kernel(code):
    """A module lists its kernels by their types, and warm_up goes through the list."""
    for path in (builds.compiled(), builds.emulated()):
        listed = sass.listed(builds.load(path))
        for architecture in ("sm_90", "sm_90a"):
            of_code = {kernel.type for kernel in code if kernel.architecture == architecture}
            assert of_code == {
                name for name, kernel in listed.items() if kernel["hopper"] == (architecture == "sm_90a")
            }


def test_products_are_on_tensor_cores(code):
    products = [k for k in code if k.architecture == "sm_90" and "8Multiply" in k.type]
    assert len(products) >= 10
    assert [sass.label(k.type) for k in products if not k.count("HMMA") or not k.main_loop] == []


def test_hopper_kernels_multiply_by_wgmma_and_load_by_tma(code):
    products = [k for k in code if "HopperKernel" in k.type]
    assert products
    assert [sass.label(k.type) for k in products if not (k.count("HGMMA") and k.count("UTMALDG") and k.main_loop)] == []


def test_normalize_has_no_division_and_two_blocks_a_multiprocessor(code):
    """FCHK is where a division of floats begins."""
    listed = sass.listed(builds.load(builds.emulated()))
    of_normalize = [k for k in code if listed[k.type]["name"].startswith("normalize")]
    assert len(of_normalize) >= 15
    for kernel in of_normalize:
        assert kernel.count("FCHK") == 0, sass.label(kernel.type)
        about = listed[kernel.type]
        assert sass.blocks_at_once(kernel, about["threads"], about["shared_bytes"]) >= 2, sass.label(kernel.type)


def test_two_builds_load_into_one_process():
    """Each module knows its own types: the real one is imported where the tests load the emulated one."""
    for path in (builds.compiled(), builds.emulated()):
        assert builds.load(path).plan_normalize
