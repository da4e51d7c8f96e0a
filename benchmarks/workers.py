"""Jobs for a pool of processes, of which any may crash or hang: that job has failed, and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclasses.dataclass(frozen=True)
class Done:
    """One job and how it ended."""

    job: Any
    problem: str | None  # None: it succeeded
    seconds: float


def run_jobs(
    jobs: Sequence[Any],
    work: Callable[[Any], object],  # of a module, so that a new process finds it
    processes: int | None = None,  # None: one a core
    patience: float = 60.0,  # seconds, after which a job counts as hanging
) -> Iterator[Done]:
    """Every job's end, as it comes."""
    todo = list(reversed(jobs))
    count = min(len(todo), processes or len(os.sched_getaffinity(0)))
    workers = [_Worker(work) for _ in range(count)]
    try:
        for worker in workers:
            worker.begin(todo.pop())
        while workers:
            ready = wait([worker.connection for worker in workers], timeout=0.2)
            for worker in workers[:]:
                done = worker.look(worker.connection in ready, patience)
                if done is None:
                    continue
                yield done
                if not worker.alive:
                    workers.remove(worker)
                    if todo:
                        worker = _Worker(work)
                        workers.append(worker)
                if todo:
                    worker.begin(todo.pop())
                elif worker in workers:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process with one job at a time."""

    def __init__(self, work: Callable[[Any], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, other), daemon=True)
        self._process.start()
        other.close()
        self.alive = True

    def begin(self, job: Any) -> None:
        self._job, self._begun = job, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: look() will see it
            self.connection.send(job)

    def look(self, ready: bool, patience: float) -> Done | None:
        """How its job ended; None where it has not yet."""
        seconds = time.monotonic() - self._begun
        if ready:
            try:
                return Done(self._job, self.connection.recv(), seconds)
            except (EOFError, OSError):
                self._process.join()
                self.alive = False
                return Done(self._job, f"its process ended with exit code {self._process.exitcode}", seconds)
        if seconds > patience:
            self.end()
            return Done(self._job, f"it did not end within {patience:.0f} s", seconds)
        return None

    def end(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.join()


def _serve(work: Callable[[Any], object], connection: Connection) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            work(job)
            problem = None
        except Exception as error:
            problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        connection.send(problem)
