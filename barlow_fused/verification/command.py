"""``barlow-fused verify``: a record of every GPU of this machine."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from ..backends import accelerator
from . import ensure, record
from .key import installed, key
from .table import format_record
from .verify import verify


def run(args: argparse.Namespace) -> int:
    """0: there is a record of each device; 2: there is not, and one sentence says why."""
    try:
        devices = _devices(args.device)
        found = [_of(device, args) for device in devices]
    except (ImpossibleError, OSError, TimeoutError) as error:
        print(f"barlow-fused verify: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([{"path": str(path), **record.to_json(made)} for made, path in found], indent=1))
    else:
        print("\n\n".join(f"{format_record(made)}\n\n{path}" for made, path in found))
    return 0


class ImpossibleError(Exception):
    """There is nothing to verify, or nowhere to write; the message says so."""


def _devices(wanted: str | None) -> list[torch.device]:
    """The device that is asked for, or one of each GPU model."""
    if wanted is not None:
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ImpossibleError(f"--device must be like cuda:0, got {wanted!r}") from None
        count = accelerator.count(device.type)
        if device.type != "cpu" and (device.index or 0) >= count:
            raise ImpossibleError(f"--device {wanted}: PyTorch finds {count} such devices here")
        found = [device if device.index is not None or device.type == "cpu" else torch.device(device.type, 0)]
    else:
        found = accelerator.here()
    if not found:
        raise ImpossibleError("PyTorch finds no GPU here")
    models = {record.path_of(key(device)): device for device in reversed(found) if installed(device)}
    if not models:
        from .. import backends

        reasons = [backends.why_unusable(name, found[0]) for name in ("cuda", "triton")]
        raise ImpossibleError("there is nothing to verify: " + "; ".join(map(str, reasons)))
    return list(models.values())[::-1]


def _of(device: torch.device, args: argparse.Namespace) -> tuple[record.Record, Path]:
    """The record of a device, made unless there is one."""
    this = key(device)
    path = record.path_of(this)
    try:
        with record.lock(path, args.seconds + ensure.START):
            found = record.find(this)
            made = None if args.again else found.record
            if made is None:
                for problem in found.problems:
                    print(f"barlow-fused verify: {problem}", file=sys.stderr)
                with _Bar(f"verifying {this['gpu']}") as bar:
                    made = verify(device, args.seconds, bar)
                record.write(made, path)
                found = found._replace(path=path)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        raise ImpossibleError(
            f"cannot write a record into {path.parent}: {error.strerror or error}; "
            "BARLOW_FUSED_CACHE_DIR names another folder"
        ) from None
    if args.output is not None:
        record.write(made, args.output)
    return made, found.path


class _Bar:
    """A progress bar on a terminal; elsewhere one line at the start."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = sys.stderr.isatty()

    def __call__(self, share: float, text: str) -> None:
        if self._shown:
            columns = shutil.get_terminal_size().columns
            filled = round(20 * share)
            line = f"{self._title} [{'#' * filled}{'.' * (20 - filled)}] {text}"
            print(f"\r\x1b[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _Bar:
        if not self._shown:
            print(f"{self._title}, at most a minute", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
