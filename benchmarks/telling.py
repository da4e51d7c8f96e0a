"""A pytest plugin that tells another process what it does, before it does it: pytest -p benchmarks.telling.

BARLOW_FUSED_TELL is a descriptor, for a line of JSON each; BARLOW_FUSED_DONE a file with the names of tests that need
not run; BARLOW_FUSED_UNTIL the time (of time.time) after which no test begins. After an error of the device this
process ends: what is left of a CUDA context fails every test that follows.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEVICE_ERROR = re.compile(r"(CUDA|HIP|XPU|Triton) error|illegal memory access|device-side assert", re.IGNORECASE)

_out = os.fdopen(int(os.environ["BARLOW_FUSED_TELL"]), "w", buffering=1)
_until = float(os.environ["BARLOW_FUSED_UNTIL"])


def _tell(**message: Any) -> None:
    _out.write(json.dumps(message) + "\n")


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(os.environ["BARLOW_FUSED_DONE"]).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_collection_finish(session: pytest.Session) -> None:
    _tell(collected=[item.nodeid for item in session.items])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if time.time() > _until:
        item.session.shouldstop = "the time is up"
        return True
    _tell(begin=item.nodeid)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        _tell(failed=item.nodeid, when=report.when, why=report.longreprtext)
        if DEVICE_ERROR.search(report.longreprtext):
            item.session.shouldstop = "the device is lost to this process"
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _tell(skipped=item.nodeid, why=reason.removeprefix("Skipped: "))
    if report.when == "teardown":
        _tell(end=item.nodeid)
    return report
