"""Small faults in the Python core, one at a time: which of them does no test notice?

    python tests/support/mutants.py --sample 300 --out found.jsonl       some of all, or without --sample every one
    python tests/support/mutants.py torch_slabs part.py --quick          of these files, by their quick tests alone
    python tests/support/mutants.py --out found.jsonl --only survived    once more, what survived then

The package and its tests are copied to build/mutants, where one file is changed at a time. A process that has imported
PyTorch forks for each run, so that a fault costs seconds. What ``--out`` has already is not tried again. Limits are of
CPU time. tests/kernels takes the emulated kernels of build/emulated, which any run of its tests makes.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import importlib
import json
import os
import pathlib
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
ROOT = pathlib.Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutants"
LIMITS = {"quick": 45, "full": 600}  # seconds of CPU time of a process
PRELOADED = (
    *("pytest", "torch", "torch.testing", "torch._dynamo", "torch._functorch.aot_autograd", "torch._subclasses"),
    *("torch.distributed.fsdp", "torch.distributed.nn.functional", "torch.fx.experimental.proxy_tensor"),
)

LOSS = "tests/test_normalization.py tests/test_reference.py tests/test_loss.py -k 'not compile'"
GRID = "tests/backends/test_torch_backend.py -k '{} and ({}) and not 4097 and not 32768'"
FEW = GRID.format("{}", "(conventions and 17-256) or (zero_variance and 0.1 and std) or (300-2500 and float32)")
CONVENTIONS = GRID.format("{}", "over_conventions or zero_variance or large_means or slabs_and_panels")
EVERYTHING = GRID.format("{}", "test_")
MODES = "tests/test_transforms.py tests/test_compile.py tests/test_choice.py -k 'not inductor'"
ARGUMENTS = "tests/distributed/test_distributed.py -k 'wrong_arguments or no_default or without_a_process_group'"
SLABS = " ".join(f"tests/backends/test_torch_{name}.py" for name in ("slabs", "direct", "small", "saved"))
EMULATED = "-m telling tests/kernels/test_kernels.py", "tests/kernels/test_cuda_emulation.py"
# Of each file the steps that exercise it: those of "quick", and of "full" where nothing in them notices. A step is
# pytest's arguments, or "ranks" and how many of them run tests/distributed/checks.py.
STEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "normalization.py": ((LOSS, CONVENTIONS.format("17-256")), (EVERYTHING.format("test_"),)),
    "function.py": ((LOSS, MODES), ("tests/test_loss.py tests/test_compile.py tests/test_transforms.py",)),
    "loss.py": ((LOSS, ARGUMENTS), (MODES, "ranks 1 2")),
    "arguments.py": ((LOSS, ARGUMENTS), ("ranks 2", "tests/planning tests/test_width.py tests/integrations")),
    "backends/operations.py": ((LOSS, SLABS, FEW.format("test_")), (MODES, EVERYTHING.format("test_"))),
    "backends/slabs.py": ((LOSS, SLABS, FEW.format("slabs")), (EVERYTHING.format("slabs"), MODES)),
    "backends/torch_slabs.py": ((LOSS, SLABS, FEW.format("slabs")), (EVERYTHING.format("slabs"), MODES)),
    "backends/torch_direct.py": ((LOSS, SLABS, FEW.format("slabs")), (EVERYTHING.format("slabs"), MODES)),
    "backends/torch_small.py": ((LOSS, SLABS, FEW.format("small")), (EVERYTHING.format("small"), MODES)),
    "backends/bulk.py": ((LOSS, SLABS, FEW.format("slabs")), (EVERYTHING.format("not whole"), MODES)),
    "backends/torch_whole.py": (
        ("tests/backends/test_torch_whole.py", FEW.format("whole")),
        (EVERYTHING.format("whole"), "tests/backends/test_torch_partial.py"),
    ),
    "backends/torch_partial.py": (("tests/backends/test_torch_partial.py", "ranks 3"), ("ranks 2 4",)),
    "backends/passes.py": ((*EMULATED, "tests/kernels/test_triton_launch.py"), ("tests/kernels", MODES)),
    "backends/arrays.py": (EMULATED, ("tests/kernels", MODES)),
    "backends/cuda_backend.py": (EMULATED, ("tests/kernels",)),
    "backends/kernel_partial.py": (
        (EMULATED[1], "tests/distributed/test_distributed.py -k 'backends_of_kernels and cuda'"),
        ("tests/distributed/test_distributed.py -k 'backends_of_kernels and triton'",),
    ),
    "backends/triton_backend.py": (
        ("tests/kernels/test_triton_launch.py", "-m telling --kernels interpreter tests/kernels/test_kernels.py"),
        ("--kernels interpreter tests/kernels",),
    ),
    "distributed/": (("ranks 3", ARGUMENTS), ("ranks 2 1 4",)),
}

COMPARISONS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.BitOr: ast.BitAnd},
}


class Place(NamedTuple):
    """A node's field, and where that is a list, which element of it."""

    node: ast.AST
    field: str
    index: int | None

    @contextlib.contextmanager
    def holds(self, new: ast.AST) -> Iterator[None]:
        old = getattr(self.node, self.field)
        setattr(self.node, self.field, new if self.index is None else [*old[: self.index], new, *old[self.index + 1 :]])
        yield
        setattr(self.node, self.field, old)


class Mutant(NamedTuple):
    file: str  # in the package
    line: int
    before: str
    after: str
    tree: ast.Module
    place: Place
    new: ast.AST

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}  {self.before} -> {self.after}"

    def source(self) -> str:
        with self.place.holds(self.new):
            return ast.unparse(self.tree)


def ignored(node: ast.AST) -> bool:
    """What only readers and type checkers see."""
    if isinstance(node, ast.If | ast.Assign):
        return ast.unparse(node).startswith(("if TYPE_CHECKING", "__all__"))
    return isinstance(node, ast.keyword) and node.arg == "strict"


def places(node: ast.AST) -> Iterator[tuple[ast.AST, Place]]:
    """What is below a node, and where."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "ctx"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST) and not ignored(child):
                yield child, Place(node, field, index if isinstance(value, list) else None)
                yield from places(child)


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def variants(node: ast.AST, field: str, bound: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """What a node may be replaced by, and how to say it, where that is not the new node's text."""
    match node:
        case ast.Compare(ops=[op, *rest]):
            yield changed(node, ops=[COMPARISONS[type(op)](), *rest]), ""
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield changed(node, op=OPERATORS[type(op)]()), ""
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand, ""
        case ast.BoolOp(op=op):
            yield changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And()), ""
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value), ""
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 2), ""
            if isinstance(node.value, int) and node.value > 1:
                yield ast.Constant(node.value * 2), ""
        case ast.Return(value=ast.expr() as value):
            nothing = isinstance(value, ast.Constant) and value.value is None
            yield ast.Return(ast.Constant(0 if nothing else None)), ""
        case ast.Call(args=args, keywords=keywords):
            for index, keyword in enumerate(keywords):
                if not ignored(keyword):
                    rest = keywords[:index] + keywords[index + 1 :]
                    yield changed(node, keywords=rest), f"no {ast.unparse(keyword)}"
            if len(args) > 1:
                yield changed(node, args=args[:-1]), f"no {ast.unparse(args[-1])}"
    if field == "test" and isinstance(node, ast.expr):
        yield ast.Constant(True), "if True"
        yield ast.Constant(False), "if False"
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.Pass(), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass(), "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in bound:
            yield ast.Pass(), "pass"


def mutants(file: str) -> Iterator[Mutant]:
    tree = ast.parse((ROOT / "barlow_fused" / file).read_text())
    bound: set[str] = set()  # names that a statement left out does not leave without a value
    names: set[str] = set()
    line = 0
    for node, place in places(tree):
        line = getattr(node, "lineno", line)
        for new, text in variants(node, place.field, bound):
            of_constant = isinstance(node, ast.Constant) and isinstance(place.node, ast.expr)
            shown = place.node if of_constant and len(ast.unparse(place.node)) <= 100 else node
            before = ast.unparse(shown).partition("\n")[0]
            with place.holds(new):
                after = text or ast.unparse(new if shown is node else shown).partition("\n")[0]
            mutant = Mutant(file, line, before, after, tree, place, new)
            while mutant.name in names:
                mutant = mutant._replace(after=mutant.after + " again")
            names.add(mutant.name)
            yield mutant
        if isinstance(node, ast.FunctionDef):
            bound = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)


class Recorder:
    """A plugin of pytest that keeps the first failure."""

    failure = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)[-300:]
            self.failure = f"{report.nodeid}: {said.partition(chr(10))[0][:200]}"


def on_ranks(counts: list[str]) -> str:
    """What goes wrong first in tests/distributed/checks.py."""
    sys.path[:0] = [str(TREE), *(str(TREE / "tests" / name) for name in ("support", "distributed"))]
    import checks
    import forked

    for name in checks.PATCHED:
        checks.library(name)
    for count in map(int, counts):
        for name, check in checks.CHECKS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "problems.json")
                forked.run(count, checks.run_checks, {name: check}, path)
                for text in json.loads(path.read_text())[name].values():
                    return f"{count} ranks, {name}: {text.strip().splitlines()[-1][:200]}"
    return ""


def in_child(step: str, limit: int, out: pathlib.Path) -> None:
    """Runs a step; writes what noticed."""
    os.setsid()
    log = os.open(TREE / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)
    os.chdir(TREE)
    if step.startswith("ranks "):
        said = on_ranks(step.split()[1:])
    elif "interpreter" in step:  # which starts with the import of Triton, and PyTorch's compiler has imported it
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *shlex.split(step)]
        code = subprocess.run(command, check=False).returncode
        said = f"pytest ends with {code}" if code else ""
    else:
        import pytest

        recorder = Recorder()
        code = pytest.main(["-x", "-p", "no:cacheprovider", "--tb=short", *shlex.split(step)], plugins=[recorder])
        said = recorder.failure or (f"pytest ends with {code}" if code else "")
    out.write_text(said)


def run(step: str, limit: int) -> str:
    """What notices: a failure, or "timeout"; nothing where all is well."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "said")
        if (pid := os.fork()) == 0:
            try:
                in_child(step, limit, out)
            except BaseException as error:
                out.write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:300])
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return "timeout" if number in (signal.SIGXCPU, signal.SIGKILL) else f"signal {number}"
        return out.read_text()


def steps_of(file: str) -> tuple[tuple[str, ...], ...]:
    return next(steps for part, steps in STEPS.items() if file.startswith(part))


def try_out(file: str, source: str, quick: bool) -> tuple[str, str]:
    """The outcome, and what notices."""
    path = TREE / "barlow_fused" / file
    steps = steps_of(file)
    original = path.read_text()
    try:
        write(path, source)
        for kind, those in zip(LIMITS, steps[: 1 if quick else 2], strict=False):
            for step in those:
                if said := run(step, LIMITS[kind]):
                    return ("timeout" if said == "timeout" else "killed"), f"{step[:40]}: {said}"
        return "survived", "quick" if quick else "full"
    finally:
        write(path, original)


def write(path: pathlib.Path, text: str) -> None:
    """Also what was compiled goes: its time stamp, in seconds, may be the same."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    path.write_text(text)


def copy_tree() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, TREE / name)
    (TREE / "build").mkdir()
    (TREE / "build" / "emulated").symlink_to(ROOT / "build" / "emulated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of FILE:LINE; default: all")
    parser.add_argument("--sample", type=int, help="so many, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="results, a line of JSON each; goes on from there")
    parser.add_argument("--only", help="those that have this outcome in --out, once more")
    parser.add_argument("--quick", action="store_true", help="the quick tests alone")
    parser.add_argument("--list", action="store_true", help="says what would be tried")
    parser.add_argument("--baseline", action="store_true", help="tries the files as they are")
    args = parser.parse_args()
    package = ROOT / "barlow_fused"
    paths = [path for part in STEPS for path in sorted(package.glob(f"{part}*.py" if part[-1] == "/" else part))]
    files = [str(path.relative_to(package)) for path in paths]
    chosen = [mutant for file in files for mutant in mutants(file)]
    if args.parts:
        chosen = [m for m in chosen if any(part in f"{m.file}:{m.line} " for part in args.parts)]
    done: dict[str, dict] = {}
    if args.out and args.out.exists():
        done = {result["name"]: result for result in map(json.loads, args.out.read_text().splitlines())}
    if args.only:
        chosen = [m for m in chosen if m.name in done and done[m.name]["outcome"] == args.only]
    elif args.sample is not None and args.sample < len(chosen):
        chosen = random.Random(args.seed).sample(chosen, args.sample)
    if args.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        print(collections.Counter(mutant.file for mutant in chosen))
        return
    for module in PRELOADED:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)  # threads do not survive a fork
    assert "barlow_fused" not in sys.modules
    copy_tree()
    if args.baseline:
        kinds = dict(zip(LIMITS, range(1 if args.quick else 2), strict=False))
        todo = {step: LIMITS[kind] for kind, i in kinds.items() for m in chosen for step in steps_of(m.file)[i]}
        for step, limit in todo.items():
            begin = time.monotonic()
            print(f"{step}: {run(step, limit) or 'nothing fails'}, {time.monotonic() - begin:.0f} s", flush=True)
        return
    for mutant in chosen:
        if mutant.name in done and not args.only:
            continue
        begin = time.monotonic()
        outcome, by = try_out(mutant.file, mutant.source(), args.quick)
        done[mutant.name] = result = {"name": mutant.name, "file": mutant.file, "outcome": outcome, "by": by}
        print(
            outcome, f"{time.monotonic() - begin:.0f} s", mutant.name, "" if outcome == "survived" else by, flush=True
        )
        if args.out:
            with args.out.open("a") as out:
                print(json.dumps(result), file=out)
    counts = collections.Counter((done[m.name]["file"], done[m.name]["outcome"]) for m in chosen)
    print(*(f"{file}: {count} {outcome}" for (file, outcome), count in sorted(counts.items())), sep="\n")
    print("Survivors:", *(m.name for m in chosen if done[m.name]["outcome"] == "survived"), sep="\n")


if __name__ == "__main__":
    main()
