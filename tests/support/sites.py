"""Every place of csrc/ where threads are ordered: barriers, waits and fences."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

SOURCES = pathlib.Path(__file__).resolve().parents[2] / "csrc"
PRIMITIVES = (
    "barrier",
    "warp_barrier",
    "barrier_of",
    "cluster_barrier",
    "mbarrier_wait",
    "mbarrier_wait_cluster",
    "mbarrier_fence_init",
    "async_fence",
    "wgmma_fence",
    "wgmma_wait",
    "copy_async_wait",
    "fence_device",
)
CALL = re.compile(rf"((?:\w+::)?({'|'.join(PRIMITIVES)}))(?:<[^>]*>)?\((?!BARLOW)")
FUNCTION = re.compile(r"BARLOW_DEVICE [^=;]*?(\w+)\(")


class Site(NamedTuple):
    file: str  # in csrc/
    function: str
    call: str  # as it stands there, of several alike with its number
    line: int
    primitive: str

    @property
    def name(self) -> str:
        """What does not change when lines move."""
        return f"{self.file} {self.function}: {self.call}"

    @property
    def drop(self) -> str:
        """For BARLOW_EMULATION_DROP."""
        return f"{self.file}:{self.line}"


def sites() -> list[Site]:
    """All of csrc/kernels and csrc/blocks, in the order of the files."""
    found = []
    for path in sorted([*(SOURCES / "blocks").iterdir(), *(SOURCES / "kernels").iterdir()]):
        function, count = "", {}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.partition("//")[0]
            if match := FUNCTION.search(code):
                function = match[1]
            for match in CALL.finditer(code):
                if "BARLOW_SITE" in code:  # the definition of a team's barrier
                    continue
                call = code[match.start() :].partition(";")[0]
                alike = count[function, call] = count.get((function, call), 0) + 1
                name = f"{call} #{alike}" if alike > 1 else call
                file = str(path.relative_to(SOURCES))
                found.append(Site(file, function, name, number, match[2]))
    return found
