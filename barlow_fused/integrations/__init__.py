"""One line makes an existing training script use the fused loss; one line undoes it.

>>> from barlow_fused.integrations import patch, unpatch
>>> patch("lightly")          # from here on lightly.loss.BarlowTwinsLoss computes the fused loss
>>> unpatch("lightly")        # and from here on its own again
>>> with patch("lightly"):    # or for one block
...     train()

Names: ``"lightly"``, ``"solo-learn"``, ``"stable-pretraining"`` and ``"monai"``. ``libraries.py`` says what each loss
computes; the patched one has the same signature, gives the same number and raises the same errors.

How it is done, and what it reaches:

* **Classes** (lightly, stable-pretraining, MONAI) stay the library's own; only their ``forward`` is replaced. So a name
  imported before, an instance made before, a subclass, ``isinstance``, a pickle and the constructor with its checks all
  go on as they were. Out of reach: a ``forward`` that a subclass overrides (it is the user's own loss), and a bound
  method ``loss.forward`` that was stored before.
* **The function** (solo-learn) is replaced in every loaded module that holds that very object under some name, so names
  imported before are reached, and names imported while it is patched are given back. Out of reach: the object stored
  elsewhere, as in a list, a ``functools.partial`` or a default argument.
* **Code compiled before** by torch.compile is compiled again at its next call.
* **Restoring** puts back the very objects that were there.

``patch`` first compares the two losses on a few numbers and refuses a version of the library that computes something
else: lightly before 1.5.20 standardised both views together, stable-pretraining before 0.1.7 had a batch norm with
weights. It compares as if there were one process, and communicates with no other. What differs from the originals, by
design: half-precision inputs and autocast give a float32 loss, where lightly and stable-pretraining may give one in
half precision, and a second derivative is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ..choice import configure
from .libraries import LIBRARIES, Library

__all__ = ["Patch", "patch", "unpatch"]


def patch(library: str) -> Patch:
    """Make a library's Barlow Twins loss the fused one, until it is undone.

    >>> patch("lightly")                    # until unpatch("lightly")
    >>> handle = patch("lightly")           # until handle.undo()
    >>> with patch("lightly"): ...          # in this block

    Patches nest. The library's own loss is back when every handle is undone, or at once by ``unpatch``.

    Args:
        library: ``"lightly"``, ``"solo-learn"``, ``"stable-pretraining"`` or ``"monai"``.

    Returns:
        A ``Patch``: a handle, and a context manager.

    Raises:
        ValueError: Not one of these names.
        ImportError: The library is not installed (ModuleNotFoundError), cannot be imported, or has no such loss.
        RuntimeError: The installed version computes another loss.
    """
    return Patch(library).apply()


def unpatch(library: str) -> None:
    """Give a library its own loss back, whatever handles there are. Does nothing if it is not patched.

    Args:
        library: As in ``patch``.

    Raises:
        ValueError: Not one of the names that ``patch`` takes.
        RuntimeError: Something else has replaced the loss since. Undo that first.
    """
    _check_name(library)
    if library in _swaps:
        _swaps[library].restore()
        del _swaps[library]


class Patch:
    """What ``patch`` returns: a hold on a patched library. ``undo``, or the end of a ``with`` block, lets go."""

    def __init__(self, library: str) -> None:
        _check_name(library)
        self.library = library

    def apply(self) -> Patch:
        """Patch the library, if this handle does not do so already."""
        if self.library not in _swaps:
            swap = _Swap(self.library)
            swap.install()
            _swaps[self.library] = swap
        _swaps[self.library].handles.add(self)
        return self

    def undo(self) -> None:
        """Let go. The last handle to do so gives the library its own loss back. A second call does nothing."""
        swap = _swaps.get(self.library)
        if swap is None or self not in swap.handles:
            return
        if swap.handles == {self}:
            unpatch(self.library)
        swap.handles.discard(self)

    def __enter__(self) -> Patch:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        swap = _swaps.get(self.library)
        state = "applied" if swap is not None and self in swap.handles else "undone"
        return f"<Patch of {self.library}: {state}>"


class _Swap:
    """A library's original function and its fused twin, which change places."""

    def __init__(self, name: str) -> None:
        library = LIBRARIES[name]
        module, loss = _find(name, library)
        self.name = name
        self.handles: set[Patch] = set()
        self.owner, self.attribute = (loss, "forward") if inspect.isclass(loss) else (module, library.attribute)
        self.original = getattr(self.owner, self.attribute)
        twin = library.make_twin(self.original, self.owner)
        difference = _difference(loss, self.original, twin)
        if difference is not None:
            raise RuntimeError(f"the installed {name} has another loss than the fused one: {difference}")
        self.twin = functools.wraps(self.original)(twin)

    def install(self) -> None:
        self._replace(self.original, self.twin)

    def restore(self) -> None:
        if getattr(self.owner, self.attribute) is not self.twin:
            raise RuntimeError(
                f"cannot unpatch {self.name}: {self.owner.__name__}.{self.attribute} was replaced again after "
                "patch(), undo that first"
            )
        self._replace(self.twin, self.original)

    def _replace(self, old: Callable, new: Callable) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled before has the old function inside
        if inspect.isclass(self.owner):
            setattr(self.owner, self.attribute, new)
            return
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                names = [name for name, value in list(vars(module).items()) if value is old]
                vars(module).update(dict.fromkeys(names, new))


_swaps: dict[str, _Swap] = {}  # of the libraries that are patched now


def _check_name(library: str) -> None:
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(map(repr, LIBRARIES))}, got {library!r}")


def _find(name: str, library: Library) -> tuple[ModuleType, Any]:
    """The module that users import a library's loss from, and the loss."""
    package = library.module.partition(".")[0]
    try:
        importlib.import_module(package)
        module = importlib.import_module(library.module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ModuleNotFoundError(f"{name} is not installed: pip install {name}", name=package) from error
        raise ImportError(f"{name} is installed, but importing {library.module} fails: {error}") from error
    if not hasattr(module, library.attribute):
        raise ImportError(f"{library.module} has no {library.attribute}: it is not {name}'s, or another version's")
    return module, getattr(module, library.attribute)


def _difference(loss: Callable, original: Callable, twin: Callable) -> str | None:
    """How a library's loss differs from its twin in its parameters or in its number; None if it does not."""
    names = list(inspect.signature(original).parameters)
    if names != list(inspect.signature(twin).parameters):
        return f"its parameters are {', '.join(names)}"
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    z = torch.arange(21, dtype=dtype, device="cpu").mul(1.7).sin().view(7, 3)
    small = torch.tensor([1.0, 1e-2, 1e-4], dtype=dtype, device="cpu")  # deviations that tell one eps from another
    z_a, z_b = z * small, (z + 0.5 * z.flip(0) + 0.3) * small
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            configure(backend="torch"),
            _without_processes(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the library's, which a call will show
            instance = (loss(),) if inspect.isclass(loss) else ()
            own, fused = (function(*instance, z_a, z_b) for function in (original, twin))
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"
    return (
        None if torch.allclose(own, fused, rtol=1e-3) else f"it gives {own:.6g} where the fused one gives {fused:.6g}"
    )


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """In this block torch.distributed is as if it were not initialised: nothing can wait for another process."""
    if not dist.is_available() or not dist.is_initialized():
        yield
        return
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = world
