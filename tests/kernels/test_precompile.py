"""Kernels that are compiled before they are needed are those that a call then finds: benchmarks/precompile.py."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from barlow_fused.backends import accelerator, triton_backend  # noqa: E402
from barlow_fused.backends.operations import Spec  # noqa: E402
from barlow_fused.normalization import CONVENTIONS  # noqa: E402
from benchmarks import precompile  # noqa: E402
from benchmarks.kernels import KERNELS  # noqa: E402
from benchmarks.precompile import Call, Job  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

GPU = torch.device("cuda", 0)


class Driver:
    """As on a machine with a GPU of that target; nothing can be launched."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@pytest.fixture(params=["sm_90", "gfx942"])
def cache(request, monkeypatch, tmp_path):
    """Triton's folder of compiled kernels, on a machine with that GPU."""
    about = accelerator.named(request.param)
    target = GPUTarget("hip", "gfx942", 64) if about.maker == "amd" else GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(accelerator, "of", lambda device: about)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(target))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    forget()
    yield tmp_path
    triton.runtime.driver._active = before
    forget()


def forget() -> None:
    """What was compiled or planned in this process."""
    precompile.launches.cache_clear()
    triton_backend.forget()
    for name in KERNELS:
        getattr(triton_backend, name).device_caches.clear()


class WarmUp:
    """In the place of a kernel: compiles for the arguments of a launch."""

    def __init__(self, kernel) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def compiled(folder) -> set[str]:
    return {path.parent.name for path in folder.rglob("*_kernel.json")}


@pytest.mark.parametrize("call", [Call(17, 64, "bfloat16", "gram"), Call(40, 30, "float32", "direct", "std")], ids=str)
def test_a_call_finds_what_was_compiled_before(cache, call, monkeypatch):
    """Tensors without data are specialised for as those with data are."""
    for index, launch in enumerate(precompile.launches(call, GPU)):
        precompile.compile_job(Job(call, index, launch.name), GPU)
    before = compiled(cache)
    assert len(before) >= 3
    forget()
    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.setattr(triton_backend, name, WarmUp(getattr(triton_backend, name)))
        _calls_what_is_compiled(call, cache, before)


def _calls_what_is_compiled(call: Call, cache, before: set[str]) -> None:
    z_a, z_b = torch.randn(2, call.n, call.d, dtype=getattr(torch, call.dtype)).unbind()
    spec = Spec("triton", call.route, CONVENTIONS[call.convention], 0.1, 1.0)
    _, saved = triton_backend.forward(z_a, z_b, spec, True, True)
    triton_backend.backward(z_a, z_b, saved, spec, (torch.ones(()), None, None), (True, True))
    assert compiled(cache) == before
    z_a, z_b = torch.randn(2, call.n, call.d + 1, dtype=z_a.dtype)[:, :, 1:].unbind()  # not aligned
    triton_backend.forward(z_a, z_b, spec, True, True)
    assert compiled(cache) > before  # it would be seen


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_each_kernel_is_compiled_once(architecture, monkeypatch):
    monkeypatch.setattr(accelerator, "of", lambda device: accelerator.named(architecture))
    precompile.launches.cache_clear()
    jobs = precompile.jobs(GPU)
    kinds = [precompile.launches(job.call, GPU)[job.index].specialization for job in jobs]
    precompile.launches.cache_clear()
    assert len(kinds) == len(set(kinds)) > 150
    assert {job.kernel for job in jobs} == set(KERNELS)


def test_without_a_gpu_there_is_nothing_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "here", list)
    assert precompile.main([]) == 0
    assert capsys.readouterr().out == "nothing to compile: PyTorch finds no GPU here\n"
