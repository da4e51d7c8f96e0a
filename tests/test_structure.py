"""How the package is cut: nothing imports in a circle, and what runs a call loads nothing that does not."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest
from subprocesses import ROOT, environment

PACKAGE = ROOT / "barlow_fused"
RUNS_A_CALL = (
    "loss",
    "function",
    "choice",
    "arguments",
    "normalization",
    "reference",
    "backends",
    "distributed",
    "linear",
)
DOES_NOT = ("planning", "train", "integrations")


def modules() -> dict[str, ast.Module]:
    """Of each module of the package, what it says."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known: set[str], is_package: bool) -> set[str]:
    """The package's modules that a module imports, wherever in it; not those that only type checkers see."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            wanted |= {name if name in known else base for name in names}
    return wanted & known - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    packages = {name for name in found if (ROOT / name.replace(".", "/")).is_dir()}
    return {name: imports(name, tree, set(found), name in packages) for name, tree in found.items()}


def test_no_module_imports_in_a_circle(graph):
    """Neither at once nor later, in a function."""
    graphlib.TopologicalSorter(graph).prepare()  # names the circle


def test_a_circle_would_be_seen():
    known = {"p", "p.a", "p.b"}
    sources = {"p.a": "from .b import x", "p.b": "def f():\n    from . import a"}
    graph = {name: imports(name, ast.parse(text), known, False) for name, text in sources.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_what_runs_a_call_imports_no_prediction_no_trainer_and_no_patch(graph):
    seen = {name for name in graph if any(f"{name}.".startswith(f"barlow_fused.{part}.") for part in RUNS_A_CALL)}
    assert len(seen) > 20
    todo = list(seen)
    while todo:
        more = graph[todo.pop()] - seen
        seen |= more
        todo += more
    assert not [name for name in seen if any(f"{name}.".startswith(f"barlow_fused.{part}.") for part in DOES_NOT)]


CALL = """
import sys, barlow_fused
assert "torch" not in sys.modules
import torch
at_first = set(sys.modules)
z_a, z_b = torch.randn(2, 8, 64).requires_grad_().unbind()
barlow_fused.barlow_twins_loss(z_a, z_b).backward()
assert not [name for name in sys.modules if name.startswith(("barlow_fused.planning", "barlow_fused.train"))]
assert "barlow_fused.integrations" not in sys.modules
assert not [name for name in at_first if name.startswith(("barlow_fused.distributed", "triton.", "torchvision"))]
assert barlow_fused.plan(8, 64).route == "gram" and {"plan", "Plan"} <= set(dir(barlow_fused))
"""


def test_a_call_loads_nothing_that_it_does_not_need():
    subprocess.run([sys.executable, "-c", CALL], env=environment(), check=True)


NAMES = """
import pickle, sys, torch, barlow_fused
assert set(barlow_fused.__all__) <= set(dir(barlow_fused))
for name in barlow_fused.__all__:
    assert getattr(barlow_fused, name) is getattr(barlow_fused, name), name
exec("from barlow_fused import *")
assert plan is barlow_fused.plan and BarlowTwinsLoss is barlow_fused.BarlowTwinsLoss
for value in (barlow_fused.BarlowTwinsLoss(lambd=0.5), barlow_fused.Normalization(1), barlow_fused.LossFloor(1, 2)):
    assert repr(pickle.loads(pickle.dumps(value))) == repr(value)
try:
    barlow_fused.nothing
except AttributeError as error:
    assert str(error) == "module 'barlow_fused' has no attribute 'nothing'"
"""


def test_names_are_loaded_when_they_are_asked_for():
    subprocess.run([sys.executable, "-c", NAMES], env=environment(), check=True)


COMPILED = """
import sys, torch, barlow_fused
assert "barlow_fused.loss" not in sys.modules
loss = torch.compile(lambda a, b: barlow_fused.barlow_twins_loss(a, b), fullgraph=True, backend="eager")
a, b = torch.randn(2, 8, 64)
torch.testing.assert_close(loss(a, b), barlow_fused.barlow_twins_loss(a, b))
"""


def test_a_name_can_be_asked_for_first_where_a_call_is_compiled():
    subprocess.run([sys.executable, "-c", COMPILED], env=environment(), check=True)


def test_what_type_checkers_see_is_what_there_is():
    """The imports under TYPE_CHECKING, the names by module, and __all__ agree."""
    import barlow_fused

    (block,) = (n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(n, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in barlow_fused._MODULES.items() for name in names}
    assert {name for _, name in seen} | {"__version__"} == set(barlow_fused.__all__)
