"""A patched library computes what it computed before: same number, gradient and errors, under every name it has.

lightly and MONAI are imported as they are, solo-learn and stable-pretraining without what their losses do not use
(peers.py). Several processes are distributed/checks.py's.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from peers import losses_of
from torch import nn

from barlow_fused import barlow_twins_loss, configure
from barlow_fused.distributed.collectives import GATHER
from barlow_fused.integrations import Patch, libraries, patch, unpatch

NAMES = ("lightly", "solo-learn", "stable-pretraining", "monai")
CLASSES = ("lightly", "stable-pretraining", "monai")
SHAPES = ((7, 5), (8, 64), (64, 9), (2, 3), (16, 33), (5, 1))  # N > D and N < D/2, odd ones, the smallest


# The libraries


class Target:
    """One library: its loss in the form ``loss(z_a, z_b)``, whatever its own form is."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name = name
        self.module = module  # where users import the loss from
        self.is_class = name != "solo-learn"

    def loss(self, lambd: object = 0.005, scale: object = 0.025) -> Callable:
        if self.name == "lightly":
            return self.module.BarlowTwinsLoss(lambda_param=lambd)
        if self.is_class:
            return self.module.BarlowTwinsLoss(lambd=lambd)
        return lambda z1, z2: self.module.barlow_loss_func(z1, z2, lamb=lambd, scale_loss=scale)

    def default_loss(self) -> Callable:
        return self.module.BarlowTwinsLoss() if self.is_class else self.module.barlow_loss_func

    def function(self) -> Callable:
        """The object that a patch replaces."""
        return vars(self.module.BarlowTwinsLoss)["forward"] if self.is_class else self.module.barlow_loss_func


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The shapes are tiny: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def open_library() -> Iterator[Callable[[str], Target]]:
    """Opens a library by its name, and leaves it unpatched and ``sys.modules`` as it was."""
    before = dict(sys.modules)
    stubbed = ("solo", "stable_pretraining", "loguru")

    def forget() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] in stubbed:
                del sys.modules[name]

    def open_(name: str) -> Target:
        if name in ("lightly", "monai"):
            return Target(name, pytest.importorskip("lightly.loss" if name == "lightly" else "monai.losses"))
        if importlib.util.find_spec(libraries.LIBRARIES[name].module.partition(".")[0]) is None:
            pytest.skip(f"{name} is not installed")
        return Target(name, losses_of(name))

    forget()
    yield open_
    for name in NAMES:
        unpatch(name)
    torch.compiler.reset()
    forget()
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in stubbed})


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest, open_library: Callable) -> Target:
    return open_library(request.param)


@pytest.fixture(params=CLASSES)
def class_target(request: pytest.FixtureRequest, open_library: Callable) -> Target:
    return open_library(request.param)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype: solo-learn's batch norm takes float64 inputs only so."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def views(n: int, d: int, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Two views that are correlated, not centred, and of other deviations in every feature."""
    generator = torch.Generator().manual_seed(n * 1000 + d)
    common, noise_a, noise_b = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    deviation = torch.logspace(-4, 1, d, dtype=torch.float64) if d > 1 else 1.0
    z_a, z_b = (common + 0.7 * noise_a + 1) * deviation, (common + 0.7 * noise_b - 2) * deviation
    return [z.to(dtype or torch.get_default_dtype()).requires_grad_() for z in (z_a, z_b)]


def value_and_gradients(loss: Callable, z_a: torch.Tensor, z_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    value = loss(z_a, z_b)
    return value.detach(), *torch.autograd.grad(value, (z_a, z_b))


def outcome(call: Callable) -> tuple[type, str] | None:
    """The exception that a call ends in, None if in none."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def assert_close(actual: tuple, expected: tuple, rtol: float) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert (x - y).norm() <= rtol * y.norm() + 1e-30


# Same numbers


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(("lambd", "scale"), [(0.005, 0.025), (0.3, 2.0), (0, 1), (-1.5, -0.1)])
@pytest.mark.usefixtures("float64")
def test_loss_and_gradient_are_the_librarys(target: Target, n: int, d: int, lambd: float, scale: float) -> None:
    loss = target.loss(lambd, scale)
    expected = value_and_gradients(loss, *views(n, d))
    with patch(target.name):
        actual = value_and_gradients(loss, *views(n, d))
    assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_loss_and_gradient_are_the_librarys_in_float32(target: Target, n: int, d: int) -> None:
    loss = target.default_loss()
    expected = value_and_gradients(loss, *views(n, d))
    with patch(target.name):
        actual = value_and_gradients(loss, *views(n, d))
    ill_conditioned = n == 2 or d == 1  # the gradient, or the loss, is a difference of near equals
    assert_close(actual, expected, 1e-4 if ill_conditioned else 1e-5)


@pytest.mark.usefixtures("float64")
def test_constant_feature(target: Target) -> None:
    z_a, z_b = views(9, 6)
    with torch.no_grad():
        z_a[:, 2] = 3.0
    expected = value_and_gradients(target.default_loss(), z_a, z_b)
    with patch(target.name):
        actual = value_and_gradients(target.default_loss(), z_a, z_b)
    assert all(x.isfinite().all() for x in expected)
    assert_close(actual, expected, 1e-9)


def test_nan_reaches_the_loss(target: Target) -> None:
    z_a, z_b = views(9, 6)
    with torch.no_grad():
        z_a[1, 1] = torch.nan
    with patch(target.name):
        assert target.default_loss()(z_a, z_b).isnan()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_and_autocast_give_float32(target: Target, dtype: torch.dtype, autocast: bool) -> None:
    z_a, z_b = (z.to(dtype) for z in views(16, 8))
    exact = target.loss()(z_a.float(), z_b.float())
    with torch.autocast("cpu", enabled=autocast):
        own = target.loss()(z_a, z_b)
        with patch(target.name):
            actual = target.loss()(z_a, z_b)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(own.float(), exact, rtol=5e-2, atol=0)


def test_autocast_takes_views_of_two_dtypes(target: Target) -> None:
    z_a, z_b = views(16, 8)
    with torch.autocast("cpu"):
        own = target.loss()(z_a, z_b.bfloat16())
        with patch(target.name):
            actual = target.loss()(z_a, z_b.bfloat16())
    torch.testing.assert_close(actual, own.float(), rtol=5e-2, atol=0)


@pytest.mark.usefixtures("float64")
def test_weight_may_be_a_tensor_and_learn(target: Target) -> None:
    lambd = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    weights = (lambd,) if target.is_class else (lambd, scale)
    gradients = []
    for on in (False, True):
        z_a, z_b = views(7, 12)
        handle = patch(target.name) if on else None
        gradients.append(torch.autograd.grad(target.loss(lambd, scale)(z_a, z_b), (*weights, z_a, z_b)))
    handle.undo()
    assert_close(gradients[1], gradients[0], 1e-9)


@pytest.mark.parametrize("lambd", [float("inf"), float("nan"), True])
def test_weight_may_be_any_real_number(target: Target, lambd: float) -> None:
    z_a, z_b = views(7, 5)
    expected = target.loss(lambd)(z_a, z_b)
    with patch(target.name):
        torch.testing.assert_close(target.loss(lambd)(z_a, z_b), expected, equal_nan=True, rtol=1e-5, atol=0)


def test_monai_takes_its_own_tensors(open_library: Callable) -> None:
    target = open_library("monai")
    MetaTensor = pytest.importorskip("monai.data").MetaTensor  # noqa: N806
    z_a, z_b = views(7, 12)
    expected = value_and_gradients(target.loss(), z_a, z_b)
    z_a, z_b = (MetaTensor(z.detach()).requires_grad_() for z in (z_a, z_b))
    with patch("monai"):
        loss = target.loss()(z_a, z_b)
        loss.backward()
    actual = (loss.detach(), z_a.grad.as_subclass(torch.Tensor), z_b.grad.as_subclass(torch.Tensor))
    assert_close(actual, expected, 1e-5)


def test_patched_loss_is_the_fused_one(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def spy(z_a: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        shapes.append(tuple(z_a.shape))
        return z_a.sum()

    shapes = []
    loss = target.default_loss() if target.is_class else (lambda *z: target.module.barlow_loss_func(*z))
    with patch(target.name):
        monkeypatch.setattr(libraries, "barlow_twins_loss", spy)
        loss(*views(4, 3))
        assert shapes == [(4, 3)]
    loss(*views(5, 3))
    assert shapes == [(4, 3)]


def test_patched_loss_obeys_configure(target: Target) -> None:
    z_a, z_b = views(4, 16)
    with patch(target.name), configure(backend="reference"):
        value = target.loss()(z_a, z_b)
        (gradient,) = torch.autograd.grad(value, z_a, create_graph=True)
        gradient.sum().backward()  # only the reference has a second derivative


def test_torch_compile_has_one_graph(target: Target) -> None:
    loss = target.loss()
    z_a, z_b = views(4, 16)
    with patch(target.name):
        compiled = torch.compile(lambda z_a, z_b: loss(z_a, z_b), backend="eager", fullgraph=True)
        assert_close(value_and_gradients(compiled, z_a, z_b), value_and_gradients(loss, z_a, z_b), 1e-6)


def test_compiled_code_follows_the_patch(target: Target) -> None:
    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append("barlow_fused.forward" in graph.print_readable(print_output=False))
        return graph

    graphs = []  # is it the fused loss's? of each graph since the last look
    loss = target.loss()
    z_a, z_b = (z.detach() for z in views(4, 16))
    expected = loss(z_a, z_b)
    compiled = torch.compile(lambda z_a, z_b: loss(z_a, z_b), backend=backend)

    def compiles_the_fused_loss() -> bool:
        graphs.clear()
        torch.testing.assert_close(compiled(z_a, z_b), expected)
        assert graphs
        return any(graphs)

    assert not compiles_the_fused_loss()
    with patch(target.name):
        assert compiles_the_fused_loss()
    assert not compiles_the_fused_loss()


# Same errors

BAD_INPUT = {
    "one view missing": lambda loss: loss(torch.ones(4, 3)),
    "wrong keyword": lambda loss: loss(torch.ones(4, 3), torch.ones(4, 3), temperature=1),
    "too many views": lambda loss: loss(*torch.ones(6, 4, 3)),
    "not tensors": lambda loss: loss([[1.0], [2.0]], [[1.0], [2.0]]),
    "second not a tensor": lambda loss: loss(torch.ones(4, 3), None),
    "scalars": lambda loss: loss(torch.tensor(1.0), torch.tensor(1.0)),
    "1-D": lambda loss: loss(torch.randn(8), torch.randn(8)),
    "3-D": lambda loss: loss(torch.randn(2, 3, 4), torch.randn(2, 3, 4)),
    "3-D cube": lambda loss: loss(torch.randn(3, 3, 3), torch.randn(3, 3, 3)),
    "other samples": lambda loss: loss(torch.randn(4, 5), torch.randn(6, 5)),
    "other features": lambda loss: loss(torch.randn(4, 5), torch.randn(4, 6)),
    "one sample": lambda loss: loss(torch.randn(1, 5), torch.randn(1, 5)),
    "no samples": lambda loss: loss(torch.randn(0, 5), torch.randn(0, 5)),
    "no features": lambda loss: loss(torch.randn(4, 0), torch.randn(4, 0)),
    "integers": lambda loss: loss(torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)),
    "complex": lambda loss: loss(torch.randn(4, 5) + 0j, torch.randn(4, 5) + 0j),
    "two dtypes": lambda loss: loss(torch.randn(4, 5), torch.randn(4, 5).double()),
    "two dtypes, half": lambda loss: loss(torch.randn(4, 5), torch.randn(4, 5).bfloat16()),
}
# What the library answers (with NaN, 0 or a complex number) and the fused loss refuses.
ANSWERED = {
    "lightly": {"no samples", "no features"},
    "solo-learn": {"no samples", "no features"},
    "stable-pretraining": {"one sample", "no samples", "no features", "complex"},
    "monai": {"no features", "complex"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # the libraries' own, of the same inputs
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_the_librarys_error(target: Target, case: str) -> None:
    expected = outcome(lambda: BAD_INPUT[case](target.default_loss()))
    with patch(target.name):
        actual = outcome(lambda: BAD_INPUT[case](target.default_loss()))
    if case in ANSWERED[target.name]:
        assert expected is None
        assert actual[0] in (TypeError, ValueError)
    else:
        assert expected is not None
        assert actual == expected


@pytest.mark.parametrize("lambd", ["0.005", None, [0.1], torch.ones(7), 1j], ids=str)
def test_bad_weight_gets_the_librarys_error(target: Target, lambd: object) -> None:
    z_a, z_b = views(4, 3)
    expected = outcome(lambda: target.loss(lambd)(z_a, z_b))
    with patch(target.name):
        actual = outcome(lambda: target.loss(lambd)(z_a, z_b))
    if expected is None:
        assert actual[0] is TypeError
        assert "must be a real number or a 0-d tensor" in actual[1]
    else:
        assert actual == expected


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_is_taken_where_the_library_takes_it(target: Target, dtype: torch.dtype, default: torch.dtype) -> None:
    z_a, z_b = views(4, 3, dtype)
    torch.set_default_dtype(default)
    try:
        expected = outcome(lambda: target.loss()(z_a, z_b))
        with patch(target.name):
            assert outcome(lambda: target.loss()(z_a, z_b)) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert (expected is None) == (target.is_class or dtype == default)


def test_constructor_is_the_librarys(class_target: Target) -> None:
    expected = outcome(lambda: class_target.module.BarlowTwinsLoss(temperature=1))
    signature = inspect.signature(class_target.module.BarlowTwinsLoss)
    with patch(class_target.name):
        assert outcome(lambda: class_target.module.BarlowTwinsLoss(temperature=1)) == expected
        assert inspect.signature(class_target.module.BarlowTwinsLoss) == signature
    assert expected[0] is TypeError


def test_signature_and_documentation_are_the_librarys(target: Target) -> None:
    original = target.function()
    with patch(target.name):
        twin = target.function()
        assert twin is not original
        assert inspect.signature(twin) == inspect.signature(original)
        assert inspect.signature(twin, follow_wrapped=False).parameters.keys() == (
            inspect.signature(original).parameters.keys()
        )
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__"):
            assert getattr(twin, attribute) == getattr(original, attribute)


# Every name it has


def test_instances_and_names_from_before_are_patched(class_target: Target) -> None:
    BarlowTwinsLoss = class_target.module.BarlowTwinsLoss  # noqa: N806 - as a script's import has done
    instance = BarlowTwinsLoss()
    with patch(class_target.name):
        assert class_target.module.BarlowTwinsLoss is BarlowTwinsLoss
        assert sys.modules[BarlowTwinsLoss.__module__].BarlowTwinsLoss is BarlowTwinsLoss
        assert isinstance(instance, class_target.module.BarlowTwinsLoss)
        assert is_fused(instance)
        assert is_fused(BarlowTwinsLoss())
        assert is_fused(copy.deepcopy(instance))
        assert is_fused(pickle.loads(pickle.dumps(instance)))
        made_inside = BarlowTwinsLoss()
    assert not is_fused(instance)
    assert not is_fused(made_inside)


def is_fused(loss: Callable) -> bool:
    """The fused loss is the one that refuses a second derivative."""
    z_a, z_b = views(4, 16)
    (gradient,) = torch.autograd.grad(loss(z_a, z_b), z_a, create_graph=True)
    return outcome(lambda: gradient.sum().backward()) is not None


def test_subclasses_keep_what_they_override(class_target: Target) -> None:
    class Doubled(class_target.module.BarlowTwinsLoss):
        def forward(self, z_a, z_b):
            return 2 * super().forward(z_a, z_b)

    class Other(class_target.module.BarlowTwinsLoss):
        def forward(self, z_a, z_b):
            return (z_a * z_b).sum()

    z_a, z_b = views(7, 5)
    doubled, other = Doubled()(z_a, z_b), Other()(z_a, z_b)
    with patch(class_target.name):
        torch.testing.assert_close(Doubled()(z_a, z_b), doubled, rtol=1e-5, atol=0)
        assert is_fused(Doubled())
        assert Other()(z_a, z_b) == other


def test_stable_pretraining_subclass_with_its_own_normalization_is_refused(open_library: Callable) -> None:
    class Unscaled(open_library("stable-pretraining").module.BarlowTwinsLoss):
        @staticmethod
        def _normalize(z):
            return z - z.mean(0)

    with patch("stable-pretraining"), pytest.raises(NotImplementedError, match="Unscaled has its own _normalize"):
        Unscaled()(*views(4, 3))
    assert Unscaled()(*views(4, 3)).isfinite()


def test_solo_learn_is_patched_under_every_name(open_library: Callable) -> None:
    target = open_library("solo-learn")
    original = target.module.barlow_loss_func
    before, during = ModuleType("solo.methods.barlow_twins"), ModuleType("solo.user_script")
    sys.modules[before.__name__], sys.modules[during.__name__] = before, during
    before.barlow_loss_func = before.alias = original
    before.other = other = object()
    stored_elsewhere = [original]
    with patch("solo-learn"):
        twin = target.module.barlow_loss_func
        assert twin is not original
        assert before.barlow_loss_func is before.alias is sys.modules["solo.losses.barlow"].barlow_loss_func is twin
        assert pickle.loads(pickle.dumps(twin)) is twin
        assert stored_elsewhere == [original]
        during.barlow_loss_func = twin
    for module in (before, during, target.module, sys.modules["solo.losses.barlow"]):
        assert module.barlow_loss_func is original
    assert before.alias is original
    assert before.other is other


# Undoing


def test_undo_restores_the_very_objects(target: Target) -> None:
    def everything() -> tuple:
        modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == package]
        return [(m, dict(vars(m))) for m in modules], target.is_class and dict(vars(target.module.BarlowTwinsLoss))

    package = target.module.__name__.partition(".")[0]
    target.default_loss()(*views(4, 3))
    before = everything()
    patch(target.name)
    assert everything() != before
    unpatch(target.name)
    assert everything() == before
    patch(target.name).undo()
    assert everything() == before
    with patch(target.name):
        assert everything() != before
    assert everything() == before


def test_undoing_twice_does_nothing(target: Target) -> None:
    original = target.function()
    unpatch(target.name)
    handle = patch(target.name)
    for _ in range(2):
        handle.undo()
        assert target.function() is original
    for _ in range(2):
        unpatch(target.name)
        assert target.function() is original


def test_context_ends_with_an_exception_too(target: Target) -> None:
    original = target.function()
    with pytest.raises(KeyError), patch(target.name):
        raise KeyError
    assert target.function() is original


def test_nested_patches_end_with_the_last(target: Target) -> None:
    original = target.function()
    with patch(target.name):
        twin = target.function()
        with patch(target.name):
            assert target.function() is twin
        assert target.function() is twin
    assert target.function() is original

    first, second = patch(target.name), patch(target.name)  # not in the order of a stack
    first.undo()
    first.undo()
    assert target.function() is not original
    second.undo()
    assert target.function() is original


def test_unpatch_ends_every_patch(target: Target) -> None:
    original = target.function()
    patch(target.name)
    with patch(target.name) as handle:
        unpatch(target.name)
        assert target.function() is original
        patch(target.name)
        handle.undo()  # of a patch that is over
        assert target.function() is not original
    assert target.function() is not original
    unpatch(target.name)
    assert target.function() is original


def test_handle_can_be_applied_again(target: Target) -> None:
    original = target.function()
    handle = patch(target.name)
    assert isinstance(handle, Patch)
    assert repr(handle) == f"<Patch of {target.name}: applied>"
    handle.undo()
    assert repr(handle) == f"<Patch of {target.name}: undone>"
    with handle:
        assert target.function() is not original
    assert target.function() is original


def test_libraries_are_patched_apart(open_library: Callable) -> None:
    lightly, monai = open_library("lightly"), open_library("monai")
    own_lightly, own_monai = lightly.function(), monai.function()
    with patch("lightly"):
        assert monai.function() is own_monai
        with patch("monai"):
            unpatch("lightly")
            assert lightly.function() is own_lightly
            assert monai.function() is not own_monai


def test_a_patch_over_the_patch_is_not_lost(target: Target) -> None:
    owner, attribute = (
        (target.module.BarlowTwinsLoss, "forward") if target.is_class else (target.module, "barlow_loss_func")
    )
    original = target.function()
    patch(target.name)
    twin = target.function()
    setattr(owner, attribute, lambda *z: 2 * twin(*z))
    with pytest.raises(RuntimeError, match=f"cannot unpatch {target.name}: .* was replaced again"):
        unpatch(target.name)
    setattr(owner, attribute, twin)
    unpatch(target.name)
    assert target.function() is original


# What cannot be patched


def test_unknown_library() -> None:
    accepted = "'lightly', 'solo-learn', 'stable-pretraining', 'monai'"
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match=f"library must be one of {accepted}, got 'solo'"):
            function("solo")


@pytest.mark.parametrize("name", NAMES)
def test_library_not_installed(name: str, open_library: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, libraries.LIBRARIES[name].module.partition(".")[0], None)
    with pytest.raises(ModuleNotFoundError, match=f"^{name} is not installed: pip install {name}$"):
        patch(name)
    unpatch(name)


def test_library_whose_import_fails(open_library: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "solo", ModuleType("solo"))
    with pytest.raises(
        ImportError, match=r"^solo-learn is installed, but importing solo\.losses fails: .*not a package"
    ):
        patch("solo-learn")


def test_library_without_the_loss(open_library: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "solo", ModuleType("solo"))
    monkeypatch.setitem(sys.modules, "solo.losses", ModuleType("solo.losses"))
    with pytest.raises(ImportError, match=r"^solo\.losses has no barlow_loss_func"):
        patch("solo-learn")


def _both_views_together(self, z_a, z_b):  # lightly before 1.5.20
    z_a, z_b = nn.functional.batch_norm(torch.cat((z_a, z_b)), None, None, training=True).chunk(2)
    return barlow_twins_loss(z_a, z_b, self.lambda_param, normalization="none")


def _unbiased(self, z_a, z_b):
    return barlow_twins_loss(z_a, z_b, self.lambda_param, normalization="std")


def _other_names(self, x, y):
    return barlow_twins_loss(x, y, self.lambda_param)


def _no_longer(self, z_a, z_b):
    raise ZeroDivisionError("gone")


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (_both_views_together, "it gives .* where the fused one gives"),
        (_unbiased, "it gives .* where the fused one gives"),
        (_other_names, "its parameters are self, x, y"),
        (_no_longer, "it raises ZeroDivisionError: gone"),
    ],
)
def test_version_with_another_loss_is_refused(
    open_library: Callable, monkeypatch: pytest.MonkeyPatch, forward: Callable, why: str
) -> None:
    loss = open_library("lightly").module.BarlowTwinsLoss
    monkeypatch.setattr(loss, "forward", forward)
    with pytest.raises(RuntimeError, match=f"the installed lightly has another loss than the fused one: {why}"):
        patch("lightly")
    assert vars(loss)["forward"] is forward


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_version_with_another_eps_is_refused(
    open_library: Callable, monkeypatch: pytest.MonkeyPatch, eps: float
) -> None:
    loss = open_library("stable-pretraining").module.BarlowTwinsLoss
    monkeypatch.setattr(loss, "_normalize", staticmethod(lambda z: (z - z.mean(0)) / (z.std(0) + eps)))
    with pytest.raises(RuntimeError, match="another loss"):
        patch("stable-pretraining")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_stable_pretraining_with_its_former_batch_norm_is_refused(open_library: Callable) -> None:
    class BarlowTwinsLoss(nn.Module):  # before 0.1.7
        def __init__(self, lambd=5e-3):
            super().__init__()
            self.lambd = lambd
            self.bn = nn.LazyBatchNorm1d()

        def forward(self, z_i, z_j):
            c = self.bn(z_i).T @ self.bn(z_j) / z_i.size(0)
            on_diag = (torch.diagonal(c) - 1).pow(2).sum()
            return on_diag + self.lambd * (c.pow(2).sum() - torch.diagonal(c).pow(2).sum())

    open_library("stable-pretraining").module.BarlowTwinsLoss = BarlowTwinsLoss
    with pytest.raises(RuntimeError, match="another loss"):
        patch("stable-pretraining")


def test_patching_touches_no_state(target: Target) -> None:
    state = torch.random.get_rng_state()
    with torch.autocast("cpu"), configure(backend="reference"), patch(target.name):
        target.default_loss()(*views(4, 16)).backward()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_patching_does_not_need_the_configured_backend(target: Target) -> None:
    with configure(backend="cuda"), patch(target.name), pytest.raises(RuntimeError):
        target.default_loss()(*views(4, 16))  # CPU tensors: the call obeys, and says that it cannot


# Several processes


@pytest.mark.filterwarnings("ignore:c10d", "ignore:torch.distributed.nn.functional")
@pytest.mark.usefixtures("process_group")
def test_group_of_one_process(target: Target) -> None:
    loss = target.loss()
    if target.name == "lightly":
        loss = target.module.BarlowTwinsLoss(gather_distributed=True)
    expected = value_and_gradients(loss, *views(8, 12))
    with patch(target.name):
        assert_close(value_and_gradients(loss, *views(8, 12)), expected, 1e-5)


@pytest.mark.usefixtures("process_group")
def test_patching_communicates_with_nobody(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def communicate(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    world = dist.group.WORLD
    for name in ("all_reduce", GATHER, "all_to_all_single"):
        monkeypatch.setattr(dist, name, communicate)
        monkeypatch.setattr(dist.distributed_c10d, name, communicate)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    patch(target.name)
    assert dist.group.WORLD is world


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("name", "gradient"), [("lightly", "lightly"), ("solo-learn", "official"), ("stable-pretraining", "lightly")]
)
def test_several_processes_get_the_loss_over_all_of_them(
    open_library: Callable, name: str, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    target = open_library(name)
    loss = target.module.BarlowTwinsLoss(gather_distributed=True) if name == "lightly" else target.loss()
    with patch(name):
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(libraries, "barlow_twins_loss", lambda *_, **kwargs: seen.append(kwargs))
        loss(*views(4, 3))
        if name == "lightly":
            target.module.BarlowTwinsLoss()(*views(4, 3))
    assert seen.pop(0) == {"group": "world", "gradient": gradient, "statistics": "local"}
    assert seen == ([{}] if name == "lightly" else [])


def _official(self, z_a, z_b):  # lightly before 1.5.26
    return _sum(self, z_a, z_b, dist.all_reduce)


def _not_at_all(self, z_i, z_j):  # stable-pretraining before 0.1.8
    return _sum(self, z_i, z_j, lambda c: c)


def _sum(self, z_a, z_b, all_reduce):
    return barlow_twins_loss(z_a, z_b, 0.005, normalization=libraries.STABLE_PRETRAINING)


@pytest.mark.usefixtures("process_group")
def test_former_versions_keep_their_own_gradient(open_library: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(libraries, "fused", lambda *args: seen.append(args[-1]))
    for name, former in (("lightly", _official), ("stable-pretraining", _not_at_all)):
        loss = open_library(name).module.BarlowTwinsLoss()
        loss.gather_distributed = True
        library = libraries.LIBRARIES[name]
        library.make_twin(former, type(loss))(loss, *views(4, 3))
        library.make_twin(type(loss).forward, type(loss))(loss, *views(4, 3))
    assert seen == ["official", "lightly", None, "lightly"]


# The official script has no loss to patch: docs/switch.md shows the lines to change


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_official_script(n: int, d: int) -> None:
    bn = nn.BatchNorm1d(d, affine=False)

    def official(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        c = bn(z1).T @ bn(z2)
        c.div_(n)
        on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
        off_diag = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().pow_(2).sum()
        return on_diag + 0.0051 * off_diag

    expected = value_and_gradients(official, *views(n, d))
    actual = value_and_gradients(lambda z1, z2: barlow_twins_loss(z1, z2, lambd=0.0051), *views(n, d))
    assert_close(actual, expected, 1e-9)
