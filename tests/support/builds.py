"""Builds of the CUDA kernels for the tests, by CMake alone, in build/: what has not changed is not compiled again."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from types import ModuleType

import pytest

from barlow_fused import nvcc

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
needs_nvcc = pytest.mark.skipif(nvcc.why_not(nvcc.find()) is not None, reason="needs nvcc of CUDA 12.8 or newer")
PYTHON = f"-DPython_EXECUTABLE={sys.executable}"


def tool(name: str) -> str | None:
    """A program of the system, or of this environment: setup.py's choice, or its objects would be compiled again."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def cmake(folder: pathlib.Path, module: str, *options: str) -> pathlib.Path:
    """A module, built in ``folder`` unless it is newer than all that it is made of."""
    made = folder / f"{module}{SUFFIX}"
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [tool("cmake"), "-S", ROOT, "-B", folder, PYTHON, *generator, *options]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitized compiler
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not _is_newer(made):
            for command in (configure, [tool("cmake"), "--build", folder, "--parallel"]):
                done = subprocess.run(command, env=plain, capture_output=True, text=True)
                assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
            made.touch()  # also where a change made no difference
    return made


@functools.cache
def emulated(sanitize: str = "OFF") -> pathlib.Path:
    """The module of kernels for the CPU. ``sanitize``: OFF, address or thread, as CMakeLists.txt says."""
    if tool("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = ROOT / "build" / ("emulated" if sanitize == "OFF" else f"emulated-{sanitize}")
    return cmake(folder, "_cuda_emulated", "-DBARLOW_EMULATION=ON", f"-DBARLOW_SANITIZE={sanitize}")


def _is_newer(made: pathlib.Path) -> bool:
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return made.exists() and all(made.stat().st_mtime > path.stat().st_mtime for path in sources)


def sanitizers() -> dict[str, str]:
    """The environment of a process that loads the sanitized kernels."""
    names = ("libasan.so", "libubsan.so")
    ask = [[tool("c++"), f"-print-file-name={name}"] for name in names]
    paths = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in ask]
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}


@functools.cache
def compiled() -> pathlib.Path:
    """The module of kernels for GPUs, in setup.py's folder."""
    reason = nvcc.why_not(nvcc.find())
    if reason is not None:
        pytest.skip(f"needs nvcc: {reason}")
    return cmake(ROOT / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}", "_cuda")


def load(path: pathlib.Path) -> ModuleType:
    """An extension module from its file; pybind11 takes two of one name for the same."""
    spec = importlib.util.spec_from_file_location(f"{path.parent}.{path.name.partition('.')[0]}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
