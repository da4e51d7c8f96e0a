"""Numbers that a call takes, checked. Nothing here needs PyTorch: the command line starts without it."""

from __future__ import annotations

import math
from numbers import Integral, Real


def finite(name: str, value: float) -> float:
    """A finite number, as a float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value if isinstance(value, float) else number}")
    return number


def integer(name: str, value: int, least: int) -> int:
    """A whole number of at least ``least``, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)
