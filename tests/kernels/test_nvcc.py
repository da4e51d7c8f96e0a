"""What nvcc makes of the CUDA kernels: no spills, tensor cores, TMA. Triton's wheel has the tools that read it."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import builds
import pytest
from builds import needs_nvcc

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100")


def dump(*arguments: str) -> Iterator[str]:
    """The lines that cuobjdump prints about the extension."""
    module = builds.compiled()
    tools = [os.environ["PATH"]]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        tools.append(str(pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join(tools)
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of CUDA or of the package triton")
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen([cuobjdump, *arguments, module], env=environment, stdout=subprocess.PIPE, text=True) as run:
        yield from run.stdout
    assert run.returncode == 0


@needs_nvcc
def test_no_kernel_spills_or_keeps_anything_in_local_memory():
    """Registers that do not suffice are spilled to the stack, as is an array whose index the compiler does not know."""
    architecture, name, kernels = "", "", dict.fromkeys(ARCHITECTURES, 0)
    for line in dump("--dump-resource-usage"):
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.split()[-1].rstrip(":")
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            assert match.group(2, 3) == ("0", "0"), f"{name} on {architecture}: {line}"
            kernels[architecture] += 1
    assert kernels["sm_80"] == kernels["sm_90"] == kernels["sm_100"] >= 10
    assert kernels["sm_90a"] >= 4  # those of hopper_*.cu


def instructions(architecture: str, wanted: str) -> dict[str, set[str]]:
    """Of every kernel, those of the wanted instructions that it has."""
    name, found = "", {}
    for line in dump("-sass", "-arch", architecture):
        if line.lstrip().startswith("Function :"):
            name = line.split()[-1]
            found[name] = set()
        elif match := re.search(rf"\b({wanted})\b", line):
            found[name].add(match[1])
    return found


PRODUCTS = r"(Gram|Correlate|PartialGram|GramGrad|DirectGrad)Kernel"


@needs_nvcc
def test_products_are_on_tensor_cores():
    found = {name: has for name, has in instructions("sm_80", "HMMA").items() if re.search(PRODUCTS, name)}
    assert len(found) >= 10
    assert [name for name, has in found.items() if not has] == []


@needs_nvcc
def test_hopper_kernels_multiply_by_wgmma_and_load_by_tma():
    found = {name: has for name, has in instructions("sm_90a", "HGMMA|UTMALDG").items() if "hopper" in name.lower()}
    assert found
    assert [name for name, has in found.items() if has != {"HGMMA", "UTMALDG"}] == []


@needs_nvcc
def test_two_builds_load_into_one_process():
    """Each module knows its own types: the real one is imported where the tests load the emulated one."""
    for path in (builds.compiled(), builds.emulated()):
        assert builds.load(path).plan_normalize
