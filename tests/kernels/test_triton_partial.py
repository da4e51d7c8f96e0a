"""The Triton backend's operations on a part of a batch, compiled for GPUs that are not here.

That they are right is tests/distributed_checks.py's, in Triton's interpreter.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from barlow_fused.backends import triton_partial  # noqa: E402
from barlow_fused.backends.torch_partial import Result, Segments  # noqa: E402
from barlow_fused.normalization import Normalization  # noqa: E402
from benchmarks.kernels import Recorder, described, recorded  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)


def launches_of(arch: int, n: int, d: int, dtype: torch.dtype, segments: Segments, monkeypatch) -> list:
    """Those of one view's K, and of its gradient, where a rank has an eighth of the features."""
    with recorded(arch) as launches, monkeypatch.context() as patch:
        patch.setattr(triton_partial, "partial_gram_kernel", Recorder(triton_partial.partial_gram_kernel, launches))
        z = torch.empty(n, d, dtype=dtype, device="meta")
        moments = torch.empty(3, len(segments.sizes), d, device="meta")
        views = [triton_partial.View(z, moments, Normalization(), segments) for _ in range(2)]
        triton_partial.partial_gram(views[0])
        product = torch.empty(2, n, n, dtype=views[0].product_dtype, device="meta")
        scalar = torch.empty((), dtype=torch.float64, device="meta")
        tau = torch.empty(2, len(segments.sizes), dtype=torch.float64, device="meta")
        c = torch.empty(d, device="meta")
        triton_partial.input_grad(views, 1, Result("gram", n, 8 * d, product, c, tau, scalar, scalar))
    return launches


ONE, TWO = Segments((512,), (512,), (1.0,)), Segments((256, 256), (256, 256), (1.0, 1.0))


@pytest.mark.parametrize(
    ("arch", "dtype", "segments"),
    [(80, torch.bfloat16, ONE), (90, torch.bfloat16, ONE), (90, torch.float32, TWO), (100, torch.bfloat16, ONE)],
)
def test_compiles_onto_tensor_cores_without_spills(arch, dtype, segments, monkeypatch):
    launches = launches_of(arch, 512, 1024, dtype, segments, monkeypatch)
    one = len(segments.sizes) == 1
    of_grad = ["grad_product_kernel", "grad_apply_kernel"] if one else ["gram_grad_kernel"]
    assert [launch.name for launch in launches] == ["partial_gram_kernel", *of_grad]
    for launch in launches:
        compiled = launch.compile(arch)
        assert compiled.spilled == 0, launch.name
        assert compiled.shared_memory <= described(arch).shared_memory, launch.name
        if launch.name != "grad_apply_kernel":
            assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", compiled.ptx), f"{launch.name}: no tensor cores"
