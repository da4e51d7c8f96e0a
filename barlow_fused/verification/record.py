"""A record: which kernels gave right numbers on a GPU, and how long each took there.

Records are JSON files of one form. Those of GPUs that the project has measured come with the package, in ``shipped/``.
This machine's own are in the first of ``$BARLOW_FUSED_CACHE_DIR``, ``$XDG_CACHE_HOME/barlow_fused`` and
``~/.cache/barlow_fused``. A file is written under another name and then renamed: a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .key import SCHEMA, Key, differences, digest, slug

SHIPPED = Path(__file__).resolve().parent / "shipped"
# A record that comes with the package was made on another machine: what that machine alone has does not count
OF_THE_MACHINE = ("barlow_fused", "torch", "driver", "memory")

# The shapes that are timed, and between which of them a call's shape lies nearest (at the geometric mean)
SAMPLES = (64, 256, 1024, 4096)
FEATURES = (2048, 8192, 65536)
SAMPLE_EDGES = (128, 512, 2048)
FEATURE_EDGES = (4096, 23170)
MARGIN = 0.95  # of the torch backend's time: a backend that is hardly faster is not taken

LATE = "the time had run out"  # a reason for UNKNOWN
PASSED, FAILED, UNKNOWN = "passed", "failed", "could not check"


class Unit(NamedTuple):
    """What is verified as one: it passes all checks, or is not taken."""

    backend: str  # "triton" or "cuda"
    dtype: str  # "bfloat16"
    route: str  # "gram" or "direct"
    ranks: bool = False  # its operations on one rank's part of a batch

    def __str__(self) -> str:
        return f"{self.backend}, {self.dtype}, {self.route}{' over ranks' if self.ranks else ''}"


class Outcome(NamedTuple):
    """How a unit's verification ended."""

    unit: Unit
    outcome: str  # PASSED, FAILED or UNKNOWN
    why: str  # one sentence where it has not passed


class Times(NamedTuple):
    """What one shape took, forward and backward, in seconds; medians of interleaved rounds."""

    dtype: str
    route: str
    n: int
    d: int
    seconds: dict[str, float]  # of "torch", "usual" and each verified backend; not of one that did not fit
    steady: bool  # whether the rounds agreed; else something else was using the GPU


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is known of the kernels on one GPU."""

    key: Key
    made: str  # when, ISO 8601
    seconds: float  # that it took
    outcomes: tuple[Outcome, ...]
    times: tuple[Times, ...]

    @functools.cached_property
    def digest(self) -> str:
        """Stands for everything that a choice follows from."""
        return digest((self.outcomes, self.times))

    def fastest(self, dtype: str, route: str, cell: Cell, ranks: bool = False) -> tuple[str, ...]:
        """The verified backends that are faster than PyTorch's operators near that shape, the fastest first."""
        right = {o.unit.backend for o in self.outcomes if o.unit[1:] == (dtype, route, ranks) and o.outcome == PASSED}
        measured = [t for t in self.times if (t.dtype, t.route) == (dtype, route) and "torch" in t.seconds]
        if not right or not measured:
            return ()
        seconds = min(measured, key=lambda t: cell.distance(Cell.of(t.n, t.d))).seconds
        faster = [name for name in right & seconds.keys() if seconds[name] <= MARGIN * seconds["torch"]]
        return tuple(sorted(faster, key=lambda name: seconds[name]))


class Cell(NamedTuple):
    """A shape as far as the choice looks at it."""

    n: int  # index into SAMPLES
    d: int  # index into FEATURES

    @classmethod
    def of(cls, n: int, d: int) -> Cell:
        """Compares only, so that sizes may be symbols: what is compiled then holds for all sizes of the cell."""
        return cls(sum(1 for edge in SAMPLE_EDGES if n >= edge), sum(1 for edge in FEATURE_EDGES if d >= edge))

    def distance(self, other: Cell) -> float:
        """How far apart, in octaves."""
        samples = math.log2(SAMPLES[self.n] / SAMPLES[other.n])
        features = math.log2(FEATURES[self.d] / FEATURES[other.d])
        return abs(samples) + abs(features)


# Files


class Found(NamedTuple):
    """The answer to a search for a record."""

    record: Record | None
    path: Path  # where it is, or would be
    problems: tuple[str, ...]  # a sentence on each file that was left out


def folder() -> Path:
    """Where this machine's records are."""
    named = os.environ.get("BARLOW_FUSED_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path("~/.cache").expanduser()) / "barlow_fused"


def path_of(key: Key) -> Path:
    """This machine's record with that key."""
    return folder() / f"{slug(key['gpu'])}-{digest(sorted(key.items(), key=str))}.json"


def find(key: Key) -> Found:
    """The record of that key: one that came with the package, or this machine's own."""
    problems: list[str] = []
    for path in sorted(SHIPPED.glob(f"{slug(key['gpu'])}*.json")):
        record = _load(path, problems)
        if record and not differences(record.key, key).keys() - set(OF_THE_MACHINE):
            return Found(record, path, tuple(problems))
    path = path_of(key)
    record = _load(path, problems)
    if record is not None and not differences(record.key, key):
        return Found(record, path, tuple(problems))
    if record is not None:
        problems.append(f"{path} is of another machine: {_differ(record.key, key)}")
    with contextlib.suppress(OSError):
        others = [other for other in path.parent.glob(f"{slug(key['gpu'])}-*.json") if other != path]
        for other in sorted(others, key=lambda file: file.stat().st_mtime)[-1:]:  # the latest
            record = _load(other, problems)
            if record is not None:
                problems.append(f"{other} no longer holds: {_differ(record.key, key)}")
    return Found(None, path, tuple(problems))


def write(record: Record, path: Path) -> None:
    """Puts it there in one step.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.chmod(name, 0o644)  # others' jobs may share the folder
        with os.fdopen(handle, "w") as file:
            json.dump(_plain(record), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Held by one process at a time, for ``path``; the others wait.

    Where the file system knows no locks there is none: records are still written whole.

    Raises:
        OSError: there is nowhere to write.
        TimeoutError: another process has held it for ``seconds``.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + seconds
    with path.with_suffix(".lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
            if time.monotonic() > stop:
                raise TimeoutError(f"another process has been verifying for {seconds:.0f} s ({path.name})")
            time.sleep(0.1)
        yield


def to_json(record: Record) -> dict[str, Any]:
    """The record as its file has it."""
    return _plain(record)


def _plain(record: Record) -> dict[str, Any]:
    outcomes = [{**o.unit._asdict(), "outcome": o.outcome, "why": o.why} for o in record.outcomes]
    times = [t._asdict() for t in record.times]
    return {
        "key": record.key,
        "made": record.made,
        "seconds": record.seconds,
        "outcomes": outcomes,
        "times": times,
    }


def _load(path: Path, problems: list[str]) -> Record | None:
    """What a file says; None where there is none, or with a word on what is wrong with it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    try:
        said = json.loads(text)
        if said["key"]["schema"] != SCHEMA:
            problems.append(f"{path} is of schema {said['key']['schema']}, accepted is {SCHEMA}")
            return None
        outcomes = [Outcome(Unit(*map(o.__getitem__, Unit._fields)), o["outcome"], o["why"]) for o in said["outcomes"]]
        times = [Times(**t) for t in said["times"]]
        for seconds in (seconds for t in times for seconds in t.seconds.values()):
            if not (isinstance(seconds, float) and math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"a time of {seconds!r}")
        return Record(dict(said["key"]), said["made"], float(said["seconds"]), tuple(outcomes), tuple(times))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problems.append(f"{path} is damaged and was left out ({type(error).__name__}: {error})")
        return None


def _differ(old: Key, new: Key) -> str:
    return ", ".join(f"{name} was {was}, is {now}" for name, (was, now) in differences(old, new).items())
