"""The tests that need a GPU, one line each as they end; one that hangs or crashes is named, and the rest go on.

python -m benchmarks.gpu_tests --seconds 160
python -m benchmarks.gpu_tests -- tests/gpu -k graph

pytest runs in a process of its own (benchmarks/telling.py). When it dies or is silent for too long, the test that it
was at has failed, and a new process goes on behind it. When the time is up no further test begins, and what has not run
is named; a test that has begun may end. Exit code 0 if all ran, and none failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0  # seconds of one test; those on a GPU take a few
START = 60.0  # of a process, until it has collected the tests
GRACE = 10.0  # of a process that has closed its end of the pipe, to end by itself
STARTS_IN_VAIN = 3  # processes that end without a test, after which it is given up


@dataclasses.dataclass
class Outcome:
    """How a test ended: passed, failed, skipped, hung or crashed."""

    name: str
    how: str
    seconds: float
    why: str = ""


class Tests:
    """The tests of one call, and what became of them so far."""

    def __init__(self, arguments: Sequence[str], seconds: float, patience: float) -> None:
        self._arguments, self._patience = arguments, patience
        self._until = time.time() + seconds
        self.collected: list[str] = []
        self.done: dict[str, Outcome] = {}
        self.problem = ""  # of pytest itself

    @property
    def left(self) -> list[str]:
        """Those that have not run."""
        return [name for name in self.collected if name not in self.done]

    def run(self) -> Iterator[Outcome]:
        """Each test's end, as it comes."""
        in_vain = 0
        while in_vain < STARTS_IN_VAIN and time.time() < self._until and (self.left or not self.collected):
            before = len(self.done)
            yield from self._process()
            in_vain = in_vain + 1 if len(self.done) == before else 0
            if self.problem and not self.collected:
                return

    def _process(self) -> Iterator[Outcome]:
        """One process of pytest, until it ends or hangs."""
        reader, writer = os.pipe()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
            done = Path(folder) / "done"
            done.write_text("\n".join(self.done))
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-p", "benchmarks.telling", *self._arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "BARLOW_FUSED_TELL": str(writer),
                    "BARLOW_FUSED_DONE": str(done),
                    "BARLOW_FUSED_UNTIL": str(self._until),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
            )
            os.close(writer)
            try:
                at = yield from self._follow(reader)
                if at is None or not at[2]:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                os.close(reader)
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
            if at is not None:
                name, begun, silent = at
                how = f"did not end within {self._patience:.0f} s" if silent else _death(code)
                yield self._end(Outcome(name, "hung" if silent else "crashed", time.monotonic() - begun, how))
            elif not self.collected:
                self.problem = "\n".join(said[-20:]) or f"pytest ended with exit code {code}, and said nothing"

    def _follow(self, reader: int) -> Generator[Outcome, None, tuple[str, float, bool] | None]:
        """Returns the test that a process did not end, when it began, and whether it still runs."""
        at: tuple[str, float] | None = None
        now: Outcome | None = None
        messages = _messages(reader)
        next(messages)
        while True:
            try:
                message = messages.send(START if at is None else self._patience)
            except StopIteration:
                return None if at is None else (*at, False)
            if message is None:
                return None if at is None else (*at, True)
            if "collected" in message:
                self.collected = self.collected or message["collected"]
            elif "begin" in message:
                at = (message["begin"], time.monotonic())
                now = Outcome(at[0], "passed", 0.0)
            elif "failed" in message:
                now.how = "failed"
                now.why += f"{message['when']}: {message['why']}\n"
            elif "skipped" in message and now.how == "passed":
                now.how, now.why = "skipped", message["why"]
            elif "end" in message:
                now.seconds = time.monotonic() - at[1]
                at = None
                yield self._end(now)

    def _end(self, outcome: Outcome) -> Outcome:
        self.done[outcome.name] = outcome
        return outcome


def _messages(reader: int) -> Generator[dict | None, float, None]:
    """What a process tells. It is sent the seconds of patience with the next message; None: they went by."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        patience = yield None
        while True:
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                patience = yield json.loads(line)
            if not selector.select(patience):
                yield None
                return
            more = os.read(reader, 2**16)
            if not more:
                return
            buffer += more


def _death(code: int) -> str:
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S", help="in which tests begin (3600)")
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="S", help="with one test (60)")
    parser.add_argument("pytest", nargs="*", help="pytest's arguments (-m gpu)")
    args = parser.parse_args(argv)
    tests = Tests(args.pytest or ["-m", "gpu"], args.seconds, args.patience)
    counts: dict[str, int] = {}
    for outcome in tests.run():
        counts[outcome.how] = counts.get(outcome.how, 0) + 1
        why = f"  ({outcome.why})" if outcome.how in ("skipped", "hung", "crashed") else ""
        print(f"{outcome.how:8}{outcome.seconds:7.1f} s  {outcome.name}{why}", flush=True)
        if outcome.how == "failed":
            print("    " + outcome.why.replace("\n", "\n    "), flush=True)
    for name in tests.left:
        print(f"not run: {name}")
    if not tests.collected:
        print(tests.problem or "no tests were collected")
    counts["not run"] = len(tests.left)
    print(", ".join(f"{count} {how}" for how, count in counts.items() if count) or "no tests")
    for outcome in tests.done.values():
        if outcome.how in ("failed", "hung", "crashed"):
            print(f"{outcome.how}: {outcome.name}")
    bad = sum(counts.get(how, 0) for how in ("failed", "hung", "crashed", "not run"))
    return int(bad > 0 or not tests.collected)


if __name__ == "__main__":
    sys.exit(main())
