"""What is said of NVIDIA's, AMD's and Intel's GPUs and of others, and what follows from it."""

from __future__ import annotations

import dataclasses
import threading
import types

import pytest
import torch
from devices import ARC, H200, MAX1550, MI60, MI300X, RX7900, machine

from barlow_fused import backends, doctor, plan
from barlow_fused.backends import accelerator, cuda_backend
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.planning.devices import KNOWN, resolve_device
from barlow_fused.verification import checks, verify
from barlow_fused.verification.key import installed, key

GPU, XPU, MPS, CPU = torch.device("cuda", 0), torch.device("xpu", 0), torch.device("mps"), torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def test_an_nvidia_gpu():
    with machine(H200):
        about = accelerator.of(GPU)
    assert dataclasses.asdict(about) == {
        "maker": "nvidia", "architecture": "sm_90", "name": "NVIDIA H200", "features": "", "units": 132,
        "memory": 141 * 2**30, "mig": False, "warp_size": 32, "shared_memory": 227 * 2**10, "float64": True,
        "precisions": ("tf32", "tf32x3"), "tma": True, "ticket": "",
    }  # fmt: skip
    assert about.capability == (9, 0)


def test_an_amd_gpu_is_not_taken_for_a_hopper():
    """PyTorch calls it cuda, and its capability 9.4."""
    with machine(MI300X, hip="7.0.1"):
        about = accelerator.of(GPU)
        assert configs.has_tma(GPU) is False
        assert configs.architecture_of(about) == 80
        assert accelerator.runtime() == "HIP 7.0.1"
    assert dataclasses.asdict(about) == {
        "maker": "amd", "architecture": "gfx942", "name": "AMD Instinct MI300X", "features": "sramecc+:xnack-",
        "units": 304, "memory": 192 * 2**30, "mig": False, "warp_size": 64, "shared_memory": 64 * 2**10,
        "float64": True, "precisions": ("tf32",), "tma": False, "ticket": "wait",
    }  # fmt: skip
    assert about.capability is None


def test_an_intel_gpu():
    with machine(MAX1550):
        about = accelerator.of(XPU)
        assert accelerator.here() == [XPU]
        assert accelerator.driver(XPU) == "1.6.31294"
        assert accelerator.runtime() == "XPU 20250302"
        assert accelerator.widest(types.SimpleNamespace(device=XPU, dtype=FP32)) == torch.float64
    assert (about.maker, about.units, about.shared_memory, about.float64) == ("intel", 64, 128 * 2**10, True)


def test_an_intel_gpu_without_float64():
    """PyTorch's operators sum in what it has, and Triton's kernels, which need it, are refused."""
    with machine(ARC):
        assert accelerator.widest(types.SimpleNamespace(device=XPU, dtype=FP32)) == FP32
        assert "in float64, which this GPU does not have" in backends.why_unusable("triton", XPU)
        assert installed(XPU) == ()


def test_what_is_no_gpu_of_theirs():
    for device, name in ((MPS, "mps"), (CPU, "cpu")):
        about = accelerator.of(device)
        assert (about.maker, about.is_gpu, about.architecture) == (name, False, "")
        assert backends.why_unusable("triton", device).endswith(f"a GPU of NVIDIA, AMD or Intel; tensors are on {name}")
        assert backends.why_unusable("cuda", device).endswith(f"it needs an NVIDIA GPU; tensors are on {name}")
    assert accelerator.of(CPU).float64
    assert accelerator.of(MPS).float64 is False  # asked; here PyTorch has no such device either
    with machine():
        assert "PyTorch sees none here" in backends.why_unusable("triton", GPU)
        assert "PyTorch sees none here" in backends.why_unusable("cuda", GPU)


@pytest.mark.parametrize(
    ("gpu", "hip", "triton", "cuda"),
    [
        (H200, None, None, "the extension"),
        ({**H200, "major": 7, "minor": 5}, None, "8.0 or newer, this GPU has 7.5", "8.0 or newer, this GPU has 7.5"),
        (MI300X, "7.0", None, "it needs an NVIDIA GPU; this GPU is AMD's"),
        (RX7900, "7.0", None, "it needs an NVIDIA GPU; this GPU is AMD's"),
        (MI60, "7.0", "it needs gfx90a, gfx94.., gfx95.., gfx11.., gfx120..; this GPU is gfx906", "this GPU is AMD's"),
        (MAX1550, None, None, "it needs an NVIDIA GPU; this GPU is Intel's"),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else None,
)
def test_who_can_run_where(gpu, hip, triton, cuda, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = XPU if "has_fp64" in gpu else GPU
    with machine(gpu, hip=hip):
        reasons = [backends.why_unusable(name, device) for name in ("triton", "cuda")]
        assert reasons[0] is None if triton is None else triton in reasons[0]
        if reasons[1] is not None:  # the extension may be built here
            assert cuda in reasons[1]
        else:
            assert gpu is H200


@pytest.mark.parametrize(
    ("architecture", "stages", "warps", "tile", "precise", "fast"),
    [
        ("sm_80", 3, 8, 128, "tf32x3", "tf32"),
        ("sm_90", 3, 8, 128, "tf32x3", "tf32"),
        ("gfx90a", 2, 4, 128, "ieee", "ieee"),
        ("gfx942", 2, 4, 128, "ieee", "tf32"),
        ("gfx950", 2, 4, 128, "ieee", "ieee"),
        ("gfx1100", 2, 8, 64, "ieee", "ieee"),
        ("gfx1201", 2, 8, 64, "ieee", "ieee"),
    ],
)
def test_blocks_and_precision(architecture, stages, warps, tile, precise, fast, monkeypatch):
    about = accelerator.named(architecture)
    chip = configs.chip_of(about)
    blocks = chip.gram(2048, BF16)
    assert (blocks.num_stages, blocks.num_warps, blocks.m) == (stages, warps, tile)
    for tf32, expected in ((False, precise), (True, fast)):
        monkeypatch.setattr(accelerator, "tf32", lambda tf32=tf32: tf32)
        assert chip.precision(FP32) == expected
        assert chip.precision(BF16) == "half"
        for blocks in (chip.gram(2048, FP32), chip.gram_grad(256, 8192, FP32, True), chip.correlate(4096, FP32)):
            buffers = blocks.num_stages - (about.maker == "amd" and architecture != "gfx950")
            assert buffers * (blocks.m + blocks.n) * blocks.k * 4 <= about.shared_memory


def test_an_architecture_that_does_not_exist():
    for name in ("h100", "sm90", "gfx9", "", "sm_9x"):
        with pytest.raises(ValueError, match="architecture must be like 'sm_90' or 'gfx942', got"):
            accelerator.named(name)


# What asks for it


def test_the_key_of_a_record():
    with machine({**H200, "name": "NVIDIA H200 MIG 1g.18gb", "multi_processor_count": 16}):
        found = key(GPU)
        assert [found[name] for name in ("gpu", "architecture", "units", "memory", "mig", "runtime")] == [
            *("NVIDIA H200 MIG 1g.18gb", "sm_90", 16, 141 * 2**30, True, "CUDA 13.0")
        ]
    with machine(MI300X, hip="7.0.1"):
        found = key(GPU)
        assert [found[name] for name in ("gpu", "architecture", "units", "mig", "runtime")] == [
            *("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 304, False, "HIP 7.0.1")
        ]
    with machine(MAX1550):
        assert [key(XPU)[name] for name in ("architecture", "driver", "runtime")] == [
            *("xe-13", "1.6.31294", "XPU 20250302")
        ]


def test_the_driver_is_read_from_where_its_maker_writes_it(tmp_path, monkeypatch):
    for name in ("NVIDIA_DRIVER", "AMD_DRIVER"):
        (tmp_path / name).write_text(f"{name} 6.12\nand more\n")
        monkeypatch.setattr(accelerator, name, tmp_path / name)
    with machine(H200):
        assert accelerator.driver(GPU) == "NVIDIA_DRIVER 6.12"
    with machine(MI300X, hip="7.0"):
        assert accelerator.driver(GPU) == "AMD_DRIVER 6.12"
        (tmp_path / "AMD_DRIVER").unlink()
        assert accelerator.driver(GPU) is None


def test_the_current_device_is_changed_only_where_it_must_be():
    def z(device):
        return types.SimpleNamespace(device=device)

    with machine(H200, H200) as entered:
        for device in (torch.device("cuda", 0), torch.device("cuda", 1), CPU, MPS):
            with accelerator.guard(z(device)):
                pass
        assert entered == [torch.device("cuda", 1)]
    with machine(MAX1550, MAX1550) as entered:
        for device in (XPU, torch.device("xpu", 1)):
            with accelerator.guard(z(device)):
                pass
        assert entered == [torch.device("xpu", 1)]
        assert accelerator.current_stream(XPU) == 0  # Triton's own launch asks for it


def test_a_thread_binds_a_device_once(monkeypatch):
    """Autograd's threads may begin with a tensor descriptor."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(threading.get_ident()))

    def twice():
        for device in (GPU, GPU, CPU):
            accelerator.bind(device)

    threads = [threading.Thread(target=twice) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("hip", "device", "before", "after"),
    [
        (None, GPU, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        (None, torch.device("cuda", 1), {"CUDA_VISIBLE_DEVICES": "4, 6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        ("7.0", torch.device("cuda", 1), {}, {"HIP_VISIBLE_DEVICES": "1"}),
        ("7.0", torch.device("cuda", 1), {"CUDA_VISIBLE_DEVICES": "4,6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        ("7.0", GPU, {"HIP_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "5"}, {"HIP_VISIBLE_DEVICES": "3"}),
        (None, XPU, {"ZE_AFFINITY_MASK": "2,3"}, {"ZE_AFFINITY_MASK": "2"}),
        (None, CPU, {"CUDA_VISIBLE_DEVICES": "4"}, {}),
    ],
)
def test_a_process_that_sees_one_gpu(hip, device, before, after, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert accelerator.seeing_only(device, before) == after
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    environment = verify._environment(device)
    assert {**before, **after}.items() <= environment.items()


def test_what_is_verified_there():
    """TF32 and a second stream on all, a graph where PyTorch can capture one."""
    from barlow_fused.verification.record import Unit

    unit = Unit("triton", "float32", "gram", False)
    with machine(MI300X, hip="7.0"):
        names = [name for name, _ in checks.checks(unit, GPU)]
    assert {"TF32", "a captured graph", "the same bits again"} <= set(names)
    with machine(MAX1550), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.xpu, "XPUGraph", None, raising=False)
        names = [name for name, _ in checks.checks(unit, XPU)]
    assert "TF32" in names
    assert "a captured graph" not in names


def test_the_graph_and_the_stream_are_of_the_devices_module(monkeypatch):
    class Graph:
        pass

    entered = []

    class Capture:
        def __init__(self, graph):
            entered.append(graph)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            entered.append("ended")

    monkeypatch.setattr(torch.xpu, "XPUGraph", Graph, raising=False)
    monkeypatch.setattr(torch.xpu, "graph", Capture, raising=False)
    assert accelerator.can_capture(XPU)
    with accelerator.capture(XPU) as graph:
        assert isinstance(graph, Graph)
    assert entered == [graph, "ended"]


def test_doctor_on_other_makers_machines():
    with machine(MI300X, hip="7.0.1"):
        text = " ".join(doctor.format_report(doctor.report()).split())
        assert "runtime HIP 7.0.1" in text
        assert "cuda:0 AMD Instinct MI300X, gfx942, 192 GiB" in text
        assert "backend='cuda' cannot run on cuda:0: it needs an NVIDIA GPU; this GPU is AMD's" in text
    with machine(ARC):
        text = " ".join(doctor.format_report(doctor.report()).split())
        assert "xpu:0 Intel(R) Arc(TM) A770 Graphics, xe-13, 64 GiB" in text


def test_plan_for_amds_gpus():
    with machine(MI300X, hip="7.0"):
        here = resolve_device(None)
        assert (here.known, here.about.architecture, here.about.units) == (KNOWN["mi300x"], "gfx942", 304)
    made = plan(256, 8192, BF16, device="mi300x", backend="triton")
    assert made.backend == "triton"
    with pytest.raises(RuntimeError, match="it needs an NVIDIA GPU; this GPU is AMD's"):
        plan(256, 8192, BF16, device="mi355x", backend="cuda")
    with machine(MAX1550):
        assert resolve_device(None).torch_device == XPU
        with pytest.raises(ValueError, match="device='xpu:1' is not on this machine, which has 1 XPU GPUs"):
            resolve_device("xpu:1")


@pytest.mark.parametrize(
    ("version", "reason"), [(13000, None), (14010, None), (12080, "of CUDA 12"), (None, "no libcuda")]
)
def test_a_driver_that_is_older_than_the_extension(version, reason, monkeypatch):
    def library(name):
        if version is None:
            raise OSError(name)
        return types.SimpleNamespace(cuDriverGetVersion=lambda pointer: setattr(pointer._obj, "value", version))

    monkeypatch.setattr(cuda_backend.ctypes, "CDLL", library)
    monkeypatch.setattr(cuda_backend, "extension", lambda: types.SimpleNamespace(cuda_version="13.0"))
    cuda_backend._why_old_driver.cache_clear()
    try:
        found = cuda_backend._why_old_driver()
    finally:
        cuda_backend._why_old_driver.cache_clear()
    assert found is None if reason is None else reason in found
