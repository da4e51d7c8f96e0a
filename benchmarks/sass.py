"""What nvcc made of the CUDA kernels: registers, memory, and machine code, as cuobjdump prints it. It needs no GPU.

cuobjdump comes with the CUDA toolkit, and with the package triton.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from types import ModuleType

REGISTERS = 65536  # of a multiprocessor, 8.0 to 10.0
THREADS = 2048
SHARED_MEMORY = {
    80: 164 * 1024,
    90: 228 * 1024,
    100: 228 * 1024,
}  # of a multiprocessor; CUDA takes 1 a block
TENSOR_CORES = ("HGMMA", "HMMA")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    address: int
    opcode: str  # with its modifiers, "HGMMA.64x256x16.F32.BF16"
    target: int | None  # where a branch goes

    @property
    def name(self) -> str:
        """Without modifiers."""
        return self.opcode.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's machine code for one architecture."""

    symbol: str
    architecture: str  # "sm_90a"
    registers: int  # of a thread
    stack: int  # bytes of a thread, spilled registers among them
    local: int
    code: tuple[Instruction, ...]

    @functools.cached_property
    def type(self) -> str:
        """The kernel's C++ type, as ``kernels()`` of a module names it: mangled, without nvcc's name of the file."""
        inner = re.search(r"(?:5entry|13cluster_entry)I(.*)EEvNT_6ParamsE$", self.symbol)[1]
        return "N6barlow" + plain(inner).removeprefix("NS_")

    @property
    def bytes(self) -> int:
        """Of machine code."""
        return 16 * len(self.code)

    def count(self, name: str) -> int:
        """How many instructions have that name."""
        return sum(instruction.name == name for instruction in self.code)

    @functools.cached_property
    def main_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop that is fullest of the tensor cores' instructions; empty where they have none."""
        loops = [
            [i for i in self.code if branch.target <= i.address <= branch.address]
            for branch in self.code
            if branch.target is not None and branch.target < branch.address
        ]
        with_products = [loop for loop in loops if any(i.name in TENSOR_CORES for i in loop)]
        return tuple(max(with_products, key=_fullness, default=()))

    @property
    def epilogue(self) -> int:
        """Instructions between the main loop's end and that of the loop around it, or of the code."""
        if not self.main_loop:
            return 0
        first, last = self.main_loop[0].address, self.main_loop[-1].address
        around = [i.address for i in self.code if i.target is not None and i.target < first and i.address > last]
        end = min(around, default=self.code[-1].address)
        return sum(last < i.address <= end for i in self.code)


def _fullness(loop: list[Instruction]) -> float:
    return sum(instruction.name in TENSOR_CORES for instruction in loop) / len(loop)


def plain(mangled: str) -> str:
    """A mangled name with nvcc's names of anonymous namespaces as other compilers write them."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", mangled)


def label(kernel_type: str) -> str:
    """A mangled type for readers: GramKernel<Multiply<bfloat16, 64, ...>>."""
    filt = shutil.which("c++filt")
    if filt is None:
        return kernel_type
    name = subprocess.run([filt, "-t", kernel_type], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"barlow::|\(anonymous namespace\)::|HopperKernel<(?=.*>$)", "", name)


def tool() -> str | None:
    """Where cuobjdump is."""
    folders = [os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def dump(module: str | pathlib.Path, *arguments: str) -> Iterator[str]:
    """The lines that cuobjdump prints about a module."""
    cuobjdump = tool()
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump is needed, of the CUDA toolkit or of the package triton")
    path = os.pathsep.join((str(pathlib.Path(cuobjdump).parent), os.environ.get("PATH", "")))  # for nvdisasm
    command = [cuobjdump, *arguments, str(module)]
    with subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True) as run:
        yield from run.stdout
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {run.returncode}")


def kernels_of(module: str | pathlib.Path, architectures: tuple[str, ...] = ()) -> list[Kernel]:
    """All kernels of a module or of a cubin, of all architectures or of those named."""
    resources = resources_of(module)
    wanted = architectures or tuple(dict.fromkeys(architecture for architecture, _ in resources))
    return [
        Kernel(symbol, architecture, *resources[architecture, symbol], tuple(code))
        for architecture in wanted
        for symbol, code in _code(module, architecture)
    ]


def resources_of(module: str | pathlib.Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, symbol) of every kernel: its registers, bytes of stack, and bytes of local memory."""
    resources, architecture, symbol = {}, "", ""
    for line in dump(module, "--dump-resource-usage"):
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif line.startswith(" Function "):
            symbol = line.split()[-1].rstrip(":")
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            resources[architecture, symbol] = tuple(map(int, match.groups()))
    return resources


def _code(module: str | pathlib.Path, architecture: str) -> Iterator[tuple[str, list[Instruction]]]:
    # -arch sm_90a prints sm_90 as well: the header before each piece says which it is
    symbol, code, here = "", [], not architecture  # a cubin has one architecture and does not name it
    for line in dump(module, "-sass", *(("-arch", architecture) if architecture else ())):
        if match := re.match(r"arch = (\S+)", line):
            here = match[1] == architecture
        elif match := re.match(r"\s+Function : (\S+)", line):
            if code:
                yield symbol, code
            symbol, code = match[1], []
        elif here and (match := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?(\S+)(.*?);", line)):
            target = re.search(r"0x([0-9a-f]+)\s*$", match[3]) if match[2].startswith("BRA") else None
            code.append(Instruction(int(match[1], 16), match[2], int(target[1], 16) if target else None))
    if code:
        yield symbol, code


def blocks_at_once(kernel: Kernel, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel a multiprocessor holds, by registers (8 at a time a thread), threads and memory."""
    capability = int(re.search(r"\d+", kernel.architecture)[0])
    by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
    return min(by_registers, THREADS // threads, SHARED_MEMORY[capability] // (shared_bytes + 1024))


def listed(module: ModuleType) -> dict[str, dict]:
    """What a module, emulated or not, says of its kernels, by their type: name, threads, bytes of shared memory."""
    return {plain(kernel["type"]): kernel for kernel in module.kernels()}
