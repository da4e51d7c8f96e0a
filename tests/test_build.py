"""What pip makes with and without nvcc, on a copy of the project whose kernels are two empty ones."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import builds
import pytest
from builds import needs_nvcc

ROOT = builds.ROOT
BINDINGS = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(BARLOW_MODULE, module) { module.attr("architectures") = BARLOW_ARCHITECTURES; }
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with almost nothing to compile."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "barlow_fused", copy / "barlow_fused", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("CMakeLists.txt", "MANIFEST.in", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "csrc").mkdir()
    (copy / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (copy / "csrc" / "kernels.h").write_text("")
    (copy / "csrc" / "kernels").mkdir()
    (copy / "csrc" / "kernels" / "one.cu").write_text("__global__ void one() {}\n")
    (copy / "csrc" / "kernels" / "hopper_one.cu").write_text(
        '__global__ void two() { asm("wgmma.fence.sync.aligned;"); }\n'
    )
    return copy


def compiler(folder: pathlib.Path, release: str) -> dict[str, str]:
    """An environment whose nvcc says that it is of a CUDA release, and fails to compile."""
    path = folder / "nvcc"
    path.write_text(
        f"#!/bin/sh\ntest \"$1\" = --version && echo 'Cuda compilation tools, release {release}, V{release}'\n"
    )
    path.chmod(0o755)
    return {"CUDACXX": str(path)}


def without_nvcc(folder: pathlib.Path) -> dict[str, str]:
    """An environment that has none; one in the wheel cannot be hidden."""
    (folder / "programs").mkdir()
    environment = {"PATH": str(folder / "programs"), "CUDACXX": "", "CUDA_HOME": str(folder)}
    where = [sys.executable, ROOT / "barlow_fused" / "nvcc.py"]
    if subprocess.run(where, env={**os.environ, **environment}, capture_output=True).returncode == 0:
        pytest.skip("needs an environment without the nvidia-cuda-nvcc wheel")
    return environment


def pip(*arguments: str | pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    path = os.pathsep.join((str(pathlib.Path(sys.executable).parent), environment.pop("PATH", os.environ["PATH"])))
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, errors="replace"
    )
    done.printed = " ".join((done.stdout + done.stderr).split())
    return done


def wheel(tree: pathlib.Path, *flags: str, **environment: str) -> tuple[pathlib.Path | None, str]:
    """What ``pip wheel`` makes, and what it and the build printed."""
    folder = tree.parent / "wheels"
    done = pip(
        "wheel", "-v", "--no-deps", "--wheel-dir", folder, *(flags or ["--no-build-isolation"]), tree, **environment
    )
    assert (done.returncode == 0) == bool(list(folder.glob("*.whl"))), done.printed[-6000:]
    return next(folder.glob("*.whl"), None), done.printed


def extensions(path: pathlib.Path) -> list[str]:
    """The names of the compiled modules in a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert {"barlow_fused/loss.py", "barlow_fused/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("csrc", "tests"))]
    return [name for name in names if name.endswith(".so")]


@pytest.mark.kernels
@needs_nvcc
def test_an_isolated_build_has_the_extension(tree):
    """pip brings CMake, Ninja and pybind11; nvcc is this machine's."""
    if "No matching distribution" in pip("download", "--no-deps", "-d", tree.parent / "index", "ninja").printed:
        pytest.skip("needs a package index")
    made, printed = wheel(tree, "--use-pep517", BARLOW_FUSED_CUDA="1")
    assert made is not None, printed[-6000:]
    (module,) = extensions(made)
    assert module.startswith("barlow_fused/_cuda.cpython")
    assert "none-any" not in made.name
    with zipfile.ZipFile(made) as archive:
        archive.extract(module, tree.parent)
    assert builds.load(tree.parent / module).architectures == "sm_80 sm_90 sm_90a sm_100 compute_80"


def test_without_nvcc_the_package_has_no_extension_and_says_so(tree, tmp_path):
    made, printed = wheel(tree, **without_nvcc(tmp_path))
    assert made.name.endswith("-py3-none-any.whl")
    assert extensions(made) == []
    assert "barlow_fused is installed without its CUDA extension: there is no nvcc in CUDACXX" in printed


@pytest.mark.parametrize(
    ("wanted", "release", "reason"),
    [
        ("1", "12.4", "BARLOW_FUSED_CUDA=1, but the CUDA extension cannot be built: .* is of CUDA 12.4; 12.8 or newer"),
        ("1", "13.0", "the CUDA extension cannot be built: cmake's messages above say why"),
        ("yes", "13.0", "BARLOW_FUSED_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_what_is_forced_fails_loudly(tree, tmp_path, wanted, release, reason):
    made, printed = wheel(tree, BARLOW_FUSED_CUDA=wanted, **compiler(tmp_path, release))
    assert made is None
    assert re.search(reason, printed), printed[-6000:]


def test_forced_without_nvcc_fails_loudly(tree, tmp_path):
    made, printed = wheel(tree, BARLOW_FUSED_CUDA="1", **without_nvcc(tmp_path))
    assert made is None
    assert "BARLOW_FUSED_CUDA=1, but the CUDA extension cannot be built: there is no nvcc" in printed


@pytest.mark.parametrize(("environment", "release"), [({"BARLOW_FUSED_CUDA": "0"}, "13.0"), ({}, "12.4"), ({}, "13.0")])
def test_a_compiler_that_is_unwanted_or_does_not_work_is_no_obstacle(tree, tmp_path, environment, release):
    made, printed = wheel(tree, **environment, **compiler(tmp_path, release))
    assert made is not None, printed[-6000:]
    assert extensions(made) == []


@pytest.mark.kernels
@needs_nvcc
def test_an_editable_install_compiles_beside_the_sources(tree, tmp_path):
    done = pip(
        *("install", "--no-build-isolation", "--no-deps", "--target", tmp_path / "site", "-e", tree),
        BARLOW_FUSED_CUDA="1",
    )
    assert done.returncode == 0, done.printed[-6000:]
    assert (tree / "barlow_fused" / f"_cuda{builds.SUFFIX}").exists()


def install_again_and_again(tree: pathlib.Path, folder: pathlib.Path, *wanted: str) -> None:
    """``pip install .`` into one environment, with each BARLOW_FUSED_CUDA in turn."""
    if "No matching distribution" in pip("download", "--no-deps", "-d", folder / "index", "ninja").printed:
        pytest.skip("needs a package index")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for cuda in wanted:
        command = [folder / "env" / "bin" / "pip", "--disable-pip-version-check", "install", "--no-deps", "."]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"BARLOW_FUSED_CUDA": cuda}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        assert bool(list((packages / "barlow_fused").glob("_cuda*.so"))) == (cuda == "1")
        assert len(list(packages.glob("barlow_fused-*.dist-info"))) == 1
        command = [folder / "env" / "bin" / "barlow-fused", "--version"]
        said = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert said.stdout.startswith("barlow-fused "), said.stderr


@pytest.mark.kernels
def test_installing_twice(tree, tmp_path):
    install_again_and_again(tree, tmp_path, "0", "0")


@pytest.mark.kernels
@needs_nvcc
def test_installing_twice_with_the_extension_and_then_without(tree, tmp_path):
    install_again_and_again(tree, tmp_path, "1", "1", "0", "1")


def test_the_source_distribution_builds(tree, tmp_path):
    """From itself: nothing that a build needs is left out."""
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, check=True, capture_output=True)
    (made,) = (tree / "dist").glob("*.tar.gz")
    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, made, BARLOW_FUSED_CUDA="0")
    assert done.returncode == 0, done.printed[-6000:]
    assert extensions(next(tmp_path.glob("*.whl"))) == []


def test_the_source_distribution_has_what_the_build_needs(tree):
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, check=True, capture_output=True)
    (made,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "CMakeLists.txt", "csrc/bindings.cpp", "csrc/kernels/one.cu", "barlow_fused/nvcc.py"} <= names
