"""What the kernels became: Triton's, compiled ahead of time, and CUDA's. Neither a GPU nor its driver is needed.

python -m benchmarks.kernels
python -m benchmarks.kernels --arch gfx942
python -m benchmarks.kernels --arch sm_80 --dtype float32 --shape 256x8192 --shape 8192x2048:direct
python -m benchmarks.kernels --cuda                  the installed extension, barlow_fused/_cuda.*.so
python -m benchmarks.kernels --cuda build/.../_cuda.*.so

The operations run on tensors of the meta device, which have shapes and no data, with recorders in the place of the
kernels; what they would have launched is compiled for the architecture. For each kernel: the seconds that compiling it
took by the clock and of processor time (ptxas included), registers a thread, spilled bytes, and shared memory. What a
first call on a GPU takes beyond that is loading the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from barlow_fused.backends import accelerator, triton_backend
from barlow_fused.backends.accelerator import Accelerator
from barlow_fused.backends.operations import Spec
from barlow_fused.normalization import CONVENTIONS, Normalization
from barlow_fused.planning import cuda
from barlow_fused.planning.devices import KNOWN

from . import sass

KERNELS = (
    *("normalize_kernel", "moments_kernel", "apply_moments_kernel", "gram_kernel", "gram_grad_kernel"),
    *("grad_product_kernel", "grad_apply_kernel"),
    *("correlate_kernel", "correlate_terms_kernel", "direct_grad_kernel"),
)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
}
PREDICTED = [
    (256, 8192, "gram"),
    (2048, 8192, "gram"),
    (1024, 65536, "gram"),
    (2048, 262144, "gram"),
    (8192, 2048, "direct"),
]
SHAPES = ("256x8192", "2048x65536", "8192x2048:direct")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture."""

    ptx: str  # or AMD's assembly
    shared_memory: int  # bytes
    spilled: int  # bytes stored and loaded; AMD: of memory that a thread has for them
    registers: int  # of a thread


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, and what it would have been launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    @functools.cached_property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options

    @functools.cached_property
    def specialization(self) -> str:
        """What one compiled kernel is told from another by."""
        return repr((self.name, *self._specialized(small_pointers=False), self._compiler_options()))

    def _compiler_options(self) -> dict[str, int]:
        return {k: v for k, v in self.options.items() if k in ("num_warps", "num_stages", "maxnreg")}

    def _specialized(self, small_pointers: bool) -> tuple[dict, dict, dict]:
        """Types, constants and attributes, as Triton's launcher finds them; it compiles a kernel once for each.

        Integers of 1 are constants, multiples of 16 are known to be, and AMD's pointers to less than 2 GiB.
        """
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value, name = self.values[parameter.name], parameter.name
            aligned, small = False, False
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                if not (parameter.is_constexpr or value is None) and parameter.do_not_specialize:
                    signature[name] = "i32"
                else:
                    signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], aligned = "*" + TYPES[value.dtype], True
                small = small_pointers and value.untyped_storage().nbytes() < 2**31
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned or small:
                attributes[(index,)] = [["tt.divisibility", 16]] * aligned + [["tt.pointer_range", 32]] * small
        return signature, constants, attributes

    def compile(self, arch: int | str) -> Compiled:
        """As Triton's launcher would."""
        about = described(arch)
        source = ASTSource(self.kernel, *self._specialized(small_pointers=about.maker == "amd"))
        options = self._compiler_options()
        log = io.StringIO()  # of ptxas, which says how many registers it spilled
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True))
            stack.enter_context(mock.patch.object(triton.knobs.compilation, "always_compile", True))
            compiled = triton.compile(source, target=_target(about), options=options)
        if about.maker == "amd":
            said = {n: int(v) for n, v in re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])}
            spilled = said["private_segment_fixed_size"]
            return Compiled(compiled.asm["amdgcn"], compiled.metadata.shared, spilled, said["vgpr_count"])
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        return Compiled(
            ptx=compiled.asm["ptx"],
            shared_memory=compiled.metadata.shared,
            spilled=int(spilled[1]) + int(spilled[2]),
            registers=int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        )


def described(arch: int | str | Accelerator) -> Accelerator:
    """A GPU by its architecture: 90, "sm_90", "gfx942"."""
    if isinstance(arch, Accelerator):
        return arch
    return accelerator.named(f"sm_{arch}" if isinstance(arch, int) or arch.isdigit() else arch)


def _target(about: Accelerator) -> GPUTarget:
    if about.maker == "amd":
        return GPUTarget("hip", about.architecture, about.warp_size)
    return GPUTarget("cuda", int(about.architecture.removeprefix("sm_")), about.warp_size)


class Recorder:
    """In the place of a kernel: remembers what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append(Launch(self.kernel, grid, args, options))


@contextlib.contextmanager
def recorded(arch: int | str | Accelerator, precision: str = "highest"):  # noqa: ANN201
    """In this block the backend launches nothing; the list that it yields has what it would have launched there."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            recorder = Recorder(getattr(triton_backend, name), launches)
            stack.enter_context(mock.patch.object(triton_backend, name, recorder))
        for owner, name, value in (
            (accelerator, "of", described(arch)),
            (accelerator, "tf32", precision != "highest"),
        ):
            stack.enter_context(mock.patch.object(owner, name, return_value=value))
        triton_backend.forget()
        stack.callback(triton_backend.forget)
        yield launches


def launches_of(
    arch: int | str | Accelerator,
    n: int,
    d: int,
    dtype: torch.dtype,
    route: str,
    convention: Normalization | None = CONVENTIONS["batch_norm"],
    precision: str = "highest",
    views: Sequence[torch.Tensor] | None = None,  # None: contiguous ones
    need_grad: bool = True,
    used: tuple[bool, bool, bool] = (True, False, False),  # which of the terms have a gradient
    needs: tuple[bool, bool] = (True, True),  # which of the inputs want theirs
) -> list[Launch]:
    """What the forward and the backward pass launch."""
    z_a, z_b = views or (torch.empty(n, d, dtype=dtype, device="meta") for _ in range(2))
    with recorded(arch, precision) as launches:
        spec = Spec("triton", route, convention, 0.0051, 1.0)
        _, saved = triton_backend.forward(z_a, z_b, spec, need_grad, every_term=True)
        if need_grad:
            gradients = tuple(torch.empty((), device="meta") if use else None for use in used)
            triton_backend.backward(z_a, z_b, saved, spec, gradients, needs)
    return launches


def main(argv: list[str] | None = None) -> int:
    """Compile everything that the shapes need, and print what it took."""
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=_arch, default="sm_90", help="sm_80, gfx942 and so on (default: sm_90)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--shape", action="append", metavar="NxD[:direct]", help=f"may be repeated (default: {', '.join(SHAPES)})"
    )
    parser.add_argument(
        "--cuda", nargs="?", const="", metavar="MODULE", help="the CUDA extension (default: the installed one) instead"
    )
    args = parser.parse_args(argv)
    if args.cuda is not None:
        return _cuda(args.cuda)
    print(f"Triton {triton.__version__}, {args.arch}, {args.dtype}; processor time is that of this and of ptxas")
    _compile(launches_of(args.arch, 16, 64, torch.float32, "gram")[0], args.arch)  # sets Triton up
    for shape in args.shape or SHAPES:
        size, _, route = shape.partition(":")
        n, d = map(int, size.split("x"))
        title = f"N={n} D={d} {route or 'gram'}"
        print(f"\n{title:26}seconds  processor  registers  spilled  shared memory")
        total = [0.0, 0.0]
        for launch in launches_of(args.arch, n, d, getattr(torch, args.dtype), route or "gram"):
            compiled, *seconds = _compile(launch, args.arch)
            total = [x + y for x, y in zip(total, seconds, strict=True)]
            print(
                f"{launch.name:26}{seconds[0]:7.2f}{seconds[1]:11.2f}{compiled.registers:11}{compiled.spilled:9}"
                f"{compiled.shared_memory / 1024:11.0f} KiB"
            )
        print(f"{'together':26}{total[0]:7.2f}{total[1]:11.2f}")
    return 0


def _arch(name: str) -> str:
    try:
        return described(name).architecture
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _cuda(path: str) -> int:
    """Print what nvcc made of the CUDA kernels, and what they are predicted to take."""
    if path:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module("barlow_fused._cuda")
    listed = sass.listed(module)
    print("registers of a thread; KiB of shared memory (0: by the shape); blocks that a multiprocessor holds;")
    print("instructions of the main loop and of the epilogue; divisions (FCHK); KiB of code\n")
    print(f"{'':8}registers  shared  blocks  main loop  epilogue  divisions   code  kernel")
    for kernel in sass.kernels_of(module.__file__, ("sm_90", "sm_90a")):
        about = listed[kernel.type]
        blocks = sass.blocks_at_once(kernel, about["threads"], about["shared_bytes"])
        print(
            f"{kernel.architecture:8}{kernel.registers:9}{about['shared_bytes'] / 1024:8.1f}{blocks:8}"
            f"{len(kernel.main_loop):11}{kernel.epilogue:10}{kernel.count('FCHK'):11}{kernel.bytes / 1024:7.1f}"
            f"  {sass.label(kernel.type)}"
        )
    print("\npredicted, half precision, microseconds (barlow_fused/planning/cuda.py says what is assumed)")
    print(f"{'':24}normalize  product  gradient     sum   steps of gram  row tiles of gram_grad")
    for gpu in ("h200", "h100"):
        for n, d, route in PREDICTED:
            times = cuda.predict(n, d, route, KNOWN[gpu])
            line = f"{gpu} N={n} D={d}"
            row = "".join(f"{1e6 * t:{w}.0f}" for t, w in zip((*times, times.total), (9, 9, 10, 8), strict=True))
            rounds, parts = cuda.gram_grad_tiles(n, d)
            steps = f"{cuda.gram_steps(n, d)[0]:16}{rounds * parts:12}" if route == "gram" else ""
            print(f"{line:24}{row}{steps}")
    return 0


def _compile(launch: Launch, arch: int | str) -> tuple[Compiled, float, float]:
    """A kernel, and the seconds that compiling it took: by the clock, and of processor time."""
    wall, processor = time.perf_counter(), _processor_seconds()
    compiled = launch.compile(arch)
    return compiled, time.perf_counter() - wall, _processor_seconds() - processor


def _processor_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    sys.exit(main())
