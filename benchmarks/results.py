"""A run as a file: JSON, which has everything, and CSV, which has one line for each shape, method and mode.

The JSON is one object. Times are in seconds, memory in bytes, rates in FLOP/s and bytes/s; what is not known (or is not
a finite number) is null.

    machine    cpu, architecture, cores, threads, cache_bytes (of the device), memory_bytes, load (average, before the
               run), system, gpu {name, memory_bytes, driver, cuda}
    versions   python, torch, triton, barlow_fused, lightly
    git        commit, dirty
    started    when, in UTC
    seconds    how long the run took so far
    settings   device, dtype, presets, shapes, peers, modes, rounds, seconds (of timing a shape), budget_s (of the run),
               memory, lambd, tolerances {loss, gradient}, float32_matmul_precision, environment
    shapes     one object a shape: run.ShapeResult, with every method's raw times, round by round (run.MethodResult)
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

CSV_FIELDS = (
    *("n", "d", "dtype", "device", "method", "mode", "status", "median_ms", "q1_ms", "q3_ms", "ratio_to_eager"),
    *("extra_memory_mb", "tflop_per_s", "gb_per_s", "share_of_floor", "launches", "loss", "gradient_error", "message"),
)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_json(path: Path, report: dict[str, Any]) -> None:
    text = json.dumps(plain(report), indent=1, allow_nan=False)
    short = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    path.write_text(short + "\n")


def write_csv(path: Path, report: dict[str, Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_FIELDS)
        writer.writeheader()
        writer.writerows(_rows(report))


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    settings, rows = report["settings"], []
    for shape in report["shapes"]:
        for method in shape["methods"]:
            common = {
                **{"n": shape["n"], "d": shape["d"], "dtype": settings["dtype"], "device": settings["device"]},
                "method": method["name"],
                "status": method["status"],
                "extra_memory_mb": _scaled(method["peak_extra_bytes"], 1e-6),
                "launches": method["launches"],
                "loss": method["loss"],
                "gradient_error": max(method["grad_errors"]) if method["grad_errors"] else None,
                "message": method["message"],
            }
            for mode, times in (method["times"] or {None: None}).items():
                row = common | {"mode": mode}
                if times is not None:
                    total = times["total"] or {}
                    row |= {f"{field}_ms": _scaled(total.get(field), 1e3) for field in ("median", "q1", "q3")}
                    row["ratio_to_eager"] = times["ratio"] and times["ratio"]["median"]
                    row["message"] = times["message"] or method["message"]
                if mode == method["rates_of"]:
                    row["tflop_per_s"] = _scaled(method["flops_per_s"], 1e-12)
                    row["gb_per_s"] = _scaled(method["bytes_per_s"], 1e-9)
                    row["share_of_floor"] = method["share_of_floor"]
                rows.append(row)
    return rows


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def plain(value: Any) -> Any:
    """Only what JSON has; of a measured time, seven digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
