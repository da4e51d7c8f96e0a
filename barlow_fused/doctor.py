"""``python -m barlow_fused doctor``: what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import textwrap
import warnings

import torch

from . import backends, nvcc
from .backends import accelerator
from .choice import choose_backend, choose_route, configured
from .planning.devices import cpu_model
from .verification.key import installed, key
from .verification.record import PASSED, Cell, Record, find
from .version import __version__

LIBRARIES = ("torch", "triton", "numpy")
EXTRAS = (
    *("torchvision", "timm", "scikit-learn", "matplotlib", "tensorboard", "rich", "tomli-w"),  # train and bench
    *("lightly", "monai", "solo-learn", "stable-pretraining"),  # what barlow_fused.integrations knows
)
VARIABLES = (
    *("BARLOW_FUSED_ROUTE", "BARLOW_FUSED_BACKEND", "BARLOW_FUSED_CUDA"),
    *("BARLOW_FUSED_VERIFY", "BARLOW_FUSED_CACHE_DIR"),
    *("TRITON_INTERPRET", "CUDA_HOME", "CUDACXX"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
)


def report() -> dict:
    """Everything that :func:`format_report` prints, as plain values: strings, numbers, None for what is not there."""
    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns where a driver is there but cannot be used
        warnings.simplefilter("always")
        gpus = accelerator.here()
    return {
        "system": {
            "barlow_fused": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "extras": {name: _version(name) for name in EXTRAS},
        "cuda": {
            "runtime": accelerator.runtime(),  # that PyTorch was built for: CUDA, HIP or XPU
            "driver": _nvidia_driver() or (accelerator.driver(gpus[0]) if gpus else None),
            "nvcc": nvcc.find(),  # CUDACXX, CUDA_HOME, PATH, then the nvidia-cuda-nvcc wheel
            "extension": _extension(),
            "warning": str(caught[0].message) if caught else None,
        },
        "gpus": [_gpu(device) for device in gpus],
        "backends": {str(device): _backends(device) for device in (torch.device("cpu"), *gpus)},
        "settings": {
            "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
            "configured": configured(),
            "problem": _settings_problem(),
        },
    }


def format_report(found: dict) -> str:
    """The report as text for a terminal of 80 columns."""
    system, cuda, settings = found["system"], found["cuda"], found["settings"]
    lines = [
        "system",
        _line("barlow_fused", system["barlow_fused"]),
        _line("Python", f"{system['python']} on {system['platform']}"),
        _line(
            "CPU",
            f"{system['cpu']}, {system['cpu_cores']} cores, {system['torch_threads']} PyTorch threads, "
            f"{system['cpu_instructions']}",
        ),
        *(_line(name, version or "not installed") for name, version in found["libraries"].items()),
        "",
        "GPUs",
        _line("runtime", cuda["runtime"] or "none: this PyTorch is built for CPUs"),
        _line("driver", cuda["driver"] or "not found"),
        _line("nvcc", cuda["nvcc"] or "not found"),
        _line("extension", cuda["extension"]),
        *([_line("warning", cuda["warning"])] if cuda["warning"] else []),
    ]
    for gpu in found["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(_line(gpu["device"], f"{gpu['name']}, {gpu['architecture']}, {memory}"))
    if not found["gpus"]:
        lines.append(_line("GPU", "none that PyTorch can use"))
    for device, on_device in found["backends"].items():
        lines += ["", f"backends on {device}", _line("auto", on_device["auto"])]
        lines += [_line("record", on_device["record"])] if on_device["record"] else []
        lines += [_line("", text) for text in on_device["not_verified"]]
        lines += [_line(name, reason or "usable") for name, reason in on_device["why_unusable"].items()]
    lines += ["", "settings"]
    lines += [_line(name, value, 24) for name, value in settings["environment"].items()]
    lines += [_line(f"configure({name}=)", value, 24) for name, value in settings["configured"].items()]
    if settings["problem"]:
        lines.append(_line("problem", settings["problem"], 24))
    if not settings["environment"] and not settings["configured"]:
        lines.append("  none: route and backend are on 'auto'")
    lines += ["", "optional libraries"]
    lines += [_line(name, version or "not installed", 24) for name, version in found["extras"].items()]
    return "\n".join(lines)


def _line(title: str, text: str, width: int = 14) -> str:
    return textwrap.fill(text, 80, initial_indent=f"  {title:<{width}}", subsequent_indent=" " * (width + 2))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict:
    about = accelerator.of(device)
    return {
        "device": str(device),
        "name": about.name,
        "maker": about.maker,
        "architecture": about.architecture,
        "memory_bytes": about.memory,
    }


def _backends(device: torch.device) -> dict:
    reasons = {name: backends.why_unusable(name, device) for name in backends.BACKENDS}
    if not installed(device):
        return {"auto": "torch", "record": None, "not_verified": [], "why_unusable": reasons}
    found = find(key(device))
    if found.record is None:
        auto = "torch: the other backends have not been verified here, which `barlow-fused verify` does"
        return {"auto": auto, "record": None, "not_verified": list(found.problems), "why_unusable": reasons}
    failed = [f"{unit} {outcome}: {why}" for unit, outcome, why in found.record.outcomes if outcome != PASSED]
    return {
        "auto": _taken(found.record),
        "record": str(found.path),
        "not_verified": [*found.problems, *failed],
        "why_unusable": reasons,
    }


def _taken(record: Record) -> str:
    """How often "auto" takes which backend, over the shapes that were timed."""
    counts = {}
    for t in record.times:
        taken = next(iter(record.fastest(t.dtype, t.route, Cell.of(t.n, t.d))), "torch")
        counts[taken] = counts.get(taken, 0) + 1
    shares = ", ".join(f"{name} for {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{shares or 'torch for all'} of {len(record.times)} timed shapes and dtypes, by the record"


def _settings_problem() -> str | None:
    """What is wrong with the route and the backend that are set, in one sentence."""
    try:
        choose_route("auto")
        choose_backend("auto")
    except ValueError as error:
        return str(error)
    return None


def _nvidia_driver() -> str | None:
    """Of the NVIDIA driver, by nvidia-smi."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _extension() -> str:
    """What the CUDA kernels are compiled for, or why there are none."""
    cuda = backends.load("cuda", torch.device("cuda"))
    reason = cuda.why_no_extension()
    return reason or f"built with CUDA {cuda.extension().cuda_version} for {cuda.extension().architectures}"
