"""Verifies the kernels on one device, in processes that may crash or hang, within a given time.

Correctness first: several processes side by side, each taking one unit (backend, dtype, route) after the other. What a
process was doing when it died or fell silent has failed; what passed is kept, and a new process goes on with the rest.
Then one process times what passed. A GPU that could not be used at all (another process has it to itself, its memory is
full) has not failed: it could not be checked.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..backends import accelerator
from . import ensure
from .checks import checks
from .key import installed, key
from .record import FAILED, LATE, PASSED, UNKNOWN, Outcome, Record, Times, Unit
from .speed import pending

COMMAND = (sys.executable, "-m", "barlow_fused.verification.child")
DTYPES = ("bfloat16", "float32", "float16")
ROUTES = ("gram", "direct")
PATIENCE = 25.0  # seconds without a word, after which a check counts as hanging
GRACE = 10.0  # that a process has to end by itself, once nothing is left for it to do
SHARE = 0.6  # of the time, after which correctness makes way for speed
PROCESSES = 8
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME")
OF_A_LAUNCHER_TOO = ("MASTER_", "TORCHELASTIC_", "TORCHFT_", "GROUP_WORLD_", "ROLE_WORLD_")
IS_EXCLUSIVE = ("busy or unavailable", "exclusive")  # what CUDA says where another process has the GPU to itself

Progress = Callable[[float, str], None]  # the share of what is to be done, and what is being done


def units(device: torch.device) -> list[Unit]:
    """What can be verified there, the most useful first."""
    names = installed(device)
    return [
        Unit(name, dtype, route, ranks)
        for ranks in (False, True)
        for dtype in DTYPES
        for route in ROUTES
        for name in names
    ]


def verify(
    device: torch.device,
    seconds: float = ensure.SECONDS,
    progress: Progress = lambda share, text: None,
    command: tuple[str, ...] | None = None,
) -> Record:
    """A record of ``device``, made in at most ``seconds`` and a moment."""
    start, command = time.monotonic(), command or COMMAND
    work = _Work(device, command, progress, start + SHARE * seconds)
    outcomes = work.check(units(device))
    passed = [outcome.unit for outcome in outcomes if outcome.outcome == PASSED and not outcome.unit.ranks]
    times, failed = _time(device, command, passed, start + seconds, progress)
    outcomes = [failed.get(outcome.unit, outcome) for outcome in outcomes]
    progress(1.0, "")
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Record(key(device), made, round(time.monotonic() - start, 1), tuple(outcomes), tuple(times))


# Correctness


class _Work:
    """Units that several processes share."""

    def __init__(self, device: torch.device, command: tuple[str, ...], progress: Progress, deadline: float) -> None:
        self._device, self._command, self._progress, self._deadline = device, command, progress, deadline
        self._todo: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        self._outcomes: dict[Unit, Outcome] = {}
        self._lock = threading.Lock()
        self._alive = 0

    def check(self, todo: list[Unit]) -> list[Outcome]:
        """The outcome of each."""
        self._total, self._done = sum(len(list(checks(unit, self._device))) for unit in todo), 0
        for unit in todo:
            self._todo.put(unit)
        self._alive = min(PROCESSES, len(os.sched_getaffinity(0)), len(todo))
        threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self._alive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self._outcomes.get(unit, Outcome(unit, UNKNOWN, LATE)) for unit in todo]

    def _run(self) -> None:
        child = None
        try:
            while time.monotonic() < self._deadline:
                try:
                    unit = self._todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    if child is None or child.ended:
                        child = _Child(self._device, self._command, self._deadline)
                    outcome = self._check(child, unit)
                except (OSError, ValueError) as error:  # no process can be started, or it talks nonsense
                    outcome = Outcome(unit, UNKNOWN, f"its process could not be followed: {error}")
                if outcome is None:
                    self._todo.put(unit)  # for the processes that have the device
                    return
                self._outcomes[unit] = outcome
        finally:
            with self._lock:
                self._alive -= 1
            if child is not None:
                child.end()

    def _check(self, child: _Child, unit: Unit) -> Outcome | None:
        """What a process makes of one unit; None where it cannot have the device because others of ours do."""
        if not child.ready:
            why = f"its process could not use the device: {child.last_words()}"
            with self._lock:
                alone = self._alive == 1
            exclusive = any(words in why for words in IS_EXCLUSIVE)
            if exclusive and not alone:
                return None
            return Outcome(unit, UNKNOWN, f"the GPU is in exclusive mode and taken ({why})" if exclusive else why)
        child.ask(unit=list(unit))
        doing = "its first check"
        for message in child.messages():
            if "begin" in message:
                doing = message["begin"]
                with self._lock:
                    self._done += 1
                    self._progress(SHARE * min(1.0, self._done / self._total), f"{unit}: {doing}")
            if "outcome" in message:
                if message.get("last"):  # it ends by itself
                    child.end()
                return Outcome(unit, message["outcome"], message["why"])
        return Outcome(unit, *child.why_ended(doing))


# Speed


def _time(
    device: torch.device, command: tuple[str, ...], passed: list[Unit], deadline: float, progress: Progress
) -> tuple[list[Times], dict[Unit, Outcome]]:
    """The times, and what failed only now."""
    times: dict[tuple, Times] = {}
    failed: dict[Unit, Outcome] = {}
    count = max(1, len(list(pending(passed))))
    left = list(passed)
    while left and time.monotonic() < deadline:
        child = _Child(device, command, deadline)
        try:
            if not child.ready:
                break
            child.ask(time=[list(unit) for unit in left])
            doing, unit = "the first of its timings", None
            for message in child.messages():
                if "begin" in message:
                    doing, unit = message["begin"], Unit(*message["unit"])
                    progress(SHARE + (1 - SHARE) * min(1.0, len(times) / count), doing)
                elif "times" in message:
                    found = Times(**message["times"])
                    times[found[:4]] = found
                elif "done" in message:
                    return list(times.values()), failed
            outcome, why = child.why_ended(doing)
        finally:
            child.end()
        if outcome == UNKNOWN or unit not in left:
            break
        failed[unit] = Outcome(unit, outcome, why)
        left.remove(unit)
    return list(times.values()), failed


# Processes


class _Child:
    """A process of child.py, what it is asked, and what it tells until it ends."""

    def __init__(self, device: torch.device, command: tuple[str, ...], deadline: float) -> None:
        self._deadline = deadline
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._reader, writer = os.pipe()
        index = ":0" if device.type != "cpu" else ""
        self._process = subprocess.Popen(
            [*command, "--device", f"{device.type}{index}", "--tell", str(writer)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            env=_environment(device),
            pass_fds=(writer,),
            start_new_session=True,  # what it starts ends with it
        )
        os.close(writer)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reader, selectors.EVENT_READ)
        self._buffer = b""
        self._killed: str | None = None  # "silent" or "late"
        self.ended = False
        self.ready = any("ready" in message for message in self.messages(until="ready"))

    def ask(self, **task: Any) -> None:
        """One task."""
        with contextlib.suppress(BrokenPipeError):  # it has died; messages() will end at once
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()

    def messages(self, until: str | None = None) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends, falls silent or the time has run out: then it is ended."""
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                message = json.loads(line)
                yield message
                if until in message:
                    return
            patience = self._deadline - time.monotonic()  # to start can take long: PyTorch is large
            if until is None:
                patience = min(PATIENCE, patience)
            if not self._selector.select(max(0.0, patience)):
                self._killed = "late" if time.monotonic() >= self._deadline else "silent"
                return self.end()
            more = os.read(self._reader, 2**16)
            if not more:
                return self.end()
            self._buffer += more

    def why_ended(self, doing: str) -> tuple[str, str]:
        """The outcome of what it was doing, and one sentence."""
        code = self._process.returncode
        if self._killed == "late":
            return UNKNOWN, f"{doing}: {LATE}"
        if self._killed == "silent":
            return FAILED, f"{doing}: it did not end within {PATIENCE:.0f} s"
        if code is not None and code < 0:
            return FAILED, f"{doing}: its process died of {signal.Signals(-code).name}"
        return FAILED, f"{doing}: its process ended with exit code {code}: {self.last_words()}"

    def last_words(self) -> str:
        """The last line that it printed."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def end(self) -> None:
        """Ends it and all that it has started."""
        if self.ended:
            return
        self.ended = True
        if self._killed is None:  # it has ended, or will where its input does
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        os.close(self._reader)


def _environment(device: torch.device) -> dict[str, str]:
    """Of a process that belongs to no launcher and sees one device."""
    names = [n for n in os.environ if n in OF_A_LAUNCHER or n.startswith(OF_A_LAUNCHER_TOO)]
    dropped = {*names, "BARLOW_FUSED_BACKEND", "BARLOW_FUSED_ROUTE"}
    if device.type != "cpu":
        dropped.add("TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["BARLOW_FUSED_VERIFY"] = "never"
    environment["PYTHONPATH"] = ensure.python_path()
    return {**environment, **accelerator.seeing_only(device, environment)}
