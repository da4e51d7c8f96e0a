"""What a record is bound to. Where one of these fields is another, the kernels have to be verified again."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..backends import accelerator
from ..version import __version__

SCHEMA = 1  # of the record
KERNELS = ("cuda", "triton")  # the backends that are taken only where they have been verified
PACKAGE = Path(__file__).resolve().parents[1]

Key = dict[str, Any]


def installed(device: torch.device) -> tuple[str, ...]:
    """The backends that could be verified on ``device``: they can run there."""
    return tuple(name for name in KERNELS if backends.why_unusable(name, device) is None)


def key(device: torch.device) -> Key:
    """The fields, by name. Costs some milliseconds; starts nothing on the device."""
    return {
        "schema": SCHEMA,
        "barlow_fused": __version__,
        "kernels": _sources(),
        "extension": _extension(device),
        "torch": torch.__version__,
        "triton": _triton(),
        "runtime": accelerator.runtime(),
        "driver": None if device.type == "cpu" else accelerator.driver(device),
        **_hardware(device),
    }


def differences(key: Key, other: Key) -> dict[str, tuple[Any, Any]]:
    """The fields in which two keys differ, with both values."""
    return {name: (key.get(name), other.get(name)) for name in {**key, **other} if key.get(name) != other.get(name)}


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def digest(fields: Any) -> str:
    """Twelve digits that stand for ``fields``."""
    return hashlib.sha256(repr(fields).encode()).hexdigest()[:12]


def _hardware(device: torch.device) -> Key:
    """The device: what it is called, what it understands, how large it is."""
    if device.type == "cpu":  # Triton's interpreter and the emulated CUDA kernels run there
        architecture = f"{platform.machine()}, interpreted" if backends.interpreted() else platform.machine()
        return {"gpu": "cpu", "architecture": architecture, "units": os.cpu_count(), "memory": None, "mig": False}
    about = accelerator.of(device)
    return {
        "gpu": about.name,
        "architecture": ":".join(filter(None, (about.architecture, about.features))),
        "units": about.units,
        "memory": about.memory,
        "mig": about.mig,
    }


@functools.cache
def _sources() -> str:
    """The Python sources that decide what is launched, Triton's kernels among them."""
    found = hashlib.sha256()
    for path in sorted((PACKAGE / "backends").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _extension(device: torch.device) -> str | None:
    """What the CUDA kernels were compiled from, and by what."""
    cuda = backends.load("cuda", device)
    if cuda.why_no_extension() is not None:
        return None
    module = cuda.extension()
    sources = getattr(module, "sources", "unknown")  # a module that was built before it said so
    if module.emulated:
        return f"emulated {sources}"
    return f"{sources} CUDA {module.cuda_version} {module.architectures}"


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib import metadata

    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "unknown"
