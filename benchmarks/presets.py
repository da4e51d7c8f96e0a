"""The shapes (N, D) that have a name."""

from __future__ import annotations

Shape = tuple[int, int]

PRESETS: dict[str, tuple[Shape, ...]] = {
    # within two minutes on two CPU cores, nearly half of that for torch.compile; what the first leave goes to the last
    "small": ((256, 512), (1024, 512), (256, 1024), (256, 2048)),
    "paper": ((32, 8192), (64, 8192), (256, 8192), (2048, 8192)),  # one GPU's share of the paper's batch, and all of it
    "wide": ((256, 16384), (512, 32768), (1024, 65536), (1024, 131072), (2048, 262144)),
    "tall": ((2048, 2048), (4096, 4096), (8192, 2048), (16384, 1024)),  # N >= D
    "grid": tuple((n, d) for n in (32, 128, 512, 2048, 4096) for d in (128, 512, 2048, 8192)),
    "over-d": tuple((256, 2**p) for p in range(9, 19)),
    "headline": ((256, 2048), (256, 8192), (512, 8192), (128, 16384)),  # of the README
}
PRESETS["all"] = tuple(dict.fromkeys(shape for name in ("small", "paper", "wide", "tall") for shape in PRESETS[name]))
BUDGETS_S = {"small": 105.0}  # of a preset, where --budget says nothing else


def shapes_of(names: list[str]) -> list[Shape]:
    """The shapes of several presets, each once."""
    return list(dict.fromkeys(shape for name in names for shape in PRESETS[name]))
