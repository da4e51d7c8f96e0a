"""A compiler for tests of the pool that runs it: in a process of its own, it fails, hangs or crashes as it is told."""

from __future__ import annotations

import os
import signal
import time


def compile_job(job: str) -> None:
    if job == "hangs":
        time.sleep(1000)
    if job == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "fails":
        raise ValueError("out of registers\nand more")
