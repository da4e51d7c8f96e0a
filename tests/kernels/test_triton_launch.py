"""Stored launches of Triton kernels hand over what Triton's own would, and are made only where that is known."""

from __future__ import annotations

import inspect

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from barlow_fused.backends import passes, triton_backend, triton_launch  # noqa: E402
from barlow_fused.backends.operations import Spec  # noqa: E402
from barlow_fused.backends.triton_kernels.correlate import correlate_terms_kernel  # noqa: E402
from barlow_fused.normalization import CONVENTIONS  # noqa: E402
from benchmarks.kernels import recorded  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)


class Driver:
    """In the place of a kernel and of what it is compiled to: remembers both kinds of launches."""

    def __init__(self, kernel, own, stored):
        self.kernel, self.arg_names, self.own, self.stored = kernel, kernel.arg_names, own, stored

    def __getitem__(self, grid):
        def launch(*values, stream=None, **options):
            (self.own if stream is None else self.stored).append((self, grid, values, options))
            return self

        return launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize("n", [40, 700])
@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
def test_a_stored_launch_takes_what_tritons_own_took(n, route, dtype, needs, monkeypatch):
    """By position, in the order of the kernel's parameters, with addresses in the place of tensors."""
    own, stored = [], []
    plan = passes.Pass

    def twice(launch, *memory):
        return plan(lambda *call: (launch(*call), launch(*call)), *memory)

    spec = Spec("triton", route, CONVENTIONS["std"], 0.1, 2.0)
    z_a, z_b = torch.randn(2, n, 80, dtype=dtype).unbind()
    with recorded(arch=80), monkeypatch.context() as patch:
        patch.setattr(triton_launch, "can_launch", lambda kernel, compiled: True)
        patch.setattr(passes, "Pass", twice)
        for name in (name for name in vars(triton_backend) if name.endswith("_kernel")):
            kernel = getattr(triton_backend, name).kernel  # of a recorder
            patch.setattr(triton_backend, name, Driver(kernel, own, stored))
        _, saved = triton_backend.forward(z_a, z_b, spec, True, False)
        triton_backend.backward(z_a, z_b, saved, spec, (torch.ones(()), None, None), needs)
    assert len(own) >= 3
    for (driver, grid, values, options), (same, whole_grid, again, no_options) in zip(own, stored, strict=True):
        assert (same, whole_grid, no_options) == (driver, (*grid, 1, 1)[:3], {})
        constants = {name: value for name, value in options.items() if name in driver.arg_names}
        bound = inspect.signature(driver.kernel.fn).bind(*values, **constants).arguments
        wanted = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in bound.values()]
        assert list(again) == wanted


def test_only_what_is_known_is_launched_without_triton(monkeypatch):
    kernel = correlate_terms_kernel
    types = {"lambd": "fp32", "scale": "fp32", "D": "i32", "tiles": "i32", "slabs": "i32"}
    constants = {"BLOCK_D": 128, "BLOCK_SUM": 16, "row_sums": None}
    doubles = ("off_sums", "sums")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp64" if name in doubles else "*fp32")
        for name in kernel.arg_names
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert triton_launch.KNOWN[0] <= triton_launch._version <= triton_launch.KNOWN[1]
    assert triton_launch.can_launch(kernel, compiled)
    assert not triton_launch.can_launch(kernel, None)  # the interpreter
    assert not triton_launch.can_launch(triton_backend._autotuner(kernel, 4, 255), compiled)
    hip = compiled.metadata._replace(target=GPUTarget("hip", "gfx942", 64))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "metadata", hip)
        assert not triton_launch.can_launch(kernel, compiled)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pre_run_hooks", [print])
        assert not triton_launch.can_launch(kernel, compiled)
    for version in ((3, 4), (3, 10), (4, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "_version", version)
            assert not triton_launch.can_launch(kernel, compiled)


def test_without_the_short_way_every_launch_is_tritons_own(monkeypatch):
    own, stored = [], []
    kernel = Driver(correlate_terms_kernel, own, stored)
    launch = triton_launch.Launch(kernel, (1,), (3, triton_launch.LAMBD), {"BLOCK_D": 128})
    for lambd in (0.1, 0.2, 0.3):
        launch((), (), lambd, 1.0, 0)
    assert [values for _, _, values, _ in own] == [(3, 0.1), (3, 0.2), (3, 0.3)]
    assert not stored


def test_arrays_end_where_their_last_row_is_filled_up():
    """The kernels write zeros there: 3 rows of 5 numbers, which begin at multiples of 128 bytes, are 384 bytes."""
    array = triton_launch.Now(torch.empty(1)).empty(torch.float32, 3, 5, row_bytes=128)
    assert (array.shape, array.stride()) == ((3, 5), (32, 1))
    assert array.untyped_storage().nbytes() == 384
