"""Arrays of a call lie in one allocation: the address sanitizer is told of the gaps between them."""

from __future__ import annotations

import ctypes

import pytest

from barlow_fused.backends import arrays, passes


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned from now on has gaps between its arrays, and whoever touches one during a launch is reported."""
    sanitizer = ctypes.CDLL(None)  # loaded before everything
    poison, unpoison = (getattr(sanitizer, f"__asan_{name}_memory_region") for name in ("poison", "unpoison"))
    for function in (poison, unpoison):
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    plan = passes.Pass

    def watched(launch, scratch: arrays.Memory, saved: arrays.Memory) -> passes.Pass:
        def run(addresses, *rest) -> None:
            gaps = [
                (addresses[memory.slot] + begin, end - begin)
                for memory in (scratch, saved)
                for begin, end in memory.gaps
                if addresses[memory.slot]
            ]
            for gap in gaps:
                poison(*gap)
            try:
                launch(addresses, *rest)
            finally:
                for gap in gaps:
                    unpoison(*gap)

        return plan(run, scratch, saved)

    monkeypatch.setattr(arrays, "GAP", 256)
    monkeypatch.setattr(passes, "Pass", watched)
