"""A record as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from .record import FAILED, LATE, PASSED, UNKNOWN, Cell, Record, Unit

DTYPES = ("bfloat16", "float32", "float16")
SHOWN = {PASSED: "ok", FAILED: "FAILED", UNKNOWN: "unchecked", None: ""}
HEADS = (("gram", False), ("direct", False), ("gram", True), ("direct", True))


def format_record(record: Record) -> str:
    """What has been verified, what ``"auto"`` takes at every shape, and a sentence on all that did not pass."""
    device = record.key
    title = f"{device['gpu']}, {record.made}, {record.seconds:.0f} s"
    return "\n".join([title, "", *_verified(record), "", *_taken(record), *_sentences(record)]).rstrip()


def _verified(record: Record) -> list[str]:
    outcomes = {o.unit: o.outcome for o in record.outcomes}
    rows = list(dict.fromkeys((unit.backend, unit.dtype) for unit in outcomes))
    heads = "".join(f"{route + (', ranks' if ranks else ''):>15}" for route, ranks in HEADS)
    lines = [f"{'verified':19}{heads}"]
    for backend, dtype in rows:
        cells = [SHOWN[outcomes.get(Unit(backend, dtype, *head))] for head in HEADS]
        lines.append(f"{backend:8}{dtype:11}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


def _taken(record: Record) -> list[str]:
    """Of every shape: the backend, its time, and how many times longer the torch backend and the usual code take."""
    lines = []
    widths = sorted({t.d for t in record.times})
    for dtype in DTYPES:
        of_dtype = {(t.n, t.d): t for t in record.times if t.dtype == dtype}
        if not of_dtype:
            continue
        lines += [f"{dtype:9}" + "".join(f"{f'D = {d}':>23}" for d in widths)]
        for n in sorted({n for n, _ in of_dtype}):
            cells = []
            for d in widths:
                t = of_dtype.get((n, d))
                cells.append("" if t is None else _cell(record, t.route, t.seconds, dtype, n, d) + " ~"[not t.steady])
            lines.append((f"N = {n:<5}" + "".join(f"{cell:>23}" for cell in cells)).rstrip())
        lines.append("")
    if not lines:
        return ["Nothing was timed, so PyTorch's operators stay.", ""]
    note = (
        'What "auto" takes: the backend, its time, and how many times longer PyTorch\'s operators and the usual '
        "implementation (where it fits) take."
    )
    unsteady = " ~: something else was using the device; verify again when it is free."
    return lines + textwrap.wrap(note + unsteady * any(not t.steady for t in record.times), 80)


def _cell(record: Record, route: str, seconds: dict[str, float], dtype: str, n: int, d: int) -> str:
    taken = next(iter(record.fastest(dtype, route, Cell.of(n, d))), "torch")
    taken = taken if taken in seconds else "torch"
    own = seconds[taken]
    ratios = [f"{seconds[name] / own:.2g}x" if name in seconds else "-" for name in ("torch", "usual")]
    return f"{taken} {_time(own)} {' '.join(ratios)}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _sentences(record: Record) -> list[str]:
    """One for each reason why something has not passed."""
    units: dict[tuple[str, str], list[str]] = {}
    for unit, outcome, why in record.outcomes:
        if outcome != PASSED:
            units.setdefault((outcome, why), []).append(str(unit))
    lines = [
        line
        for (outcome, why), which in units.items()
        for line in textwrap.wrap(f"{outcome}: {'; '.join(which)}: {why}", 80, subsequent_indent="  ")
    ]
    if any(LATE in why for _, why in units):
        lines.append("More time: barlow-fused verify --again --seconds 180")
    return ["", *lines] if lines else []
