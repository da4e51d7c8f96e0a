"""The environment in which a test starts Python: it finds the project and what the tests share."""

from __future__ import annotations

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PATH, **extra}
