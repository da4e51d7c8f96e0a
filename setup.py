"""Builds the CUDA extension, barlow_fused/_cuda.*.so, by CMake; everything else stands in pyproject.toml.

BARLOW_FUSED_CUDA=0 leaves it out, =1 fails where it cannot be built. Without either, a machine that has no nvcc gets
the package without the extension.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class BuildByCMake(build_ext):
    """Compiles in build/, where the next build finds what has not changed."""

    def build_extension(self, ext: Extension) -> None:
        """The setuptools hook: puts the module where setuptools wants it."""
        folder = ROOT / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}"
        cmake, ninja = _tool("cmake"), _tool("ninja")
        if cmake is None:
            raise CompileError("cmake is needed to build the CUDA extension: pip install 'cmake>=3.24'")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *generator]
        if subprocess.run(configure, capture_output=True).returncode:
            # compilers and Python may have moved since, as they do from one isolated build to the next
            _run([*configure, "--fresh"])
        _run([cmake, "--build", folder, "--parallel"])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / Path(self.get_ext_filename(ext.name)).name, target)


def _run(command: list) -> None:
    if subprocess.run(command).returncode:
        raise CompileError("the CUDA extension cannot be built: cmake's messages above say why")


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _extensions() -> list[Extension]:
    wanted = os.environ.get("BARLOW_FUSED_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"BARLOW_FUSED_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return []
    nvcc = runpy.run_path(str(ROOT / "barlow_fused" / "nvcc.py"))
    reason = nvcc["why_not"](nvcc["find"]())
    if reason is None:
        return [Extension("barlow_fused._cuda", sources=[], optional=wanted == "auto")]
    if wanted == "1":
        raise SystemExit(f"BARLOW_FUSED_CUDA=1, but the CUDA extension cannot be built: {reason}")
    print(f"barlow_fused is installed without its CUDA extension: {reason}", file=sys.stderr)
    return []


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildByCMake})
