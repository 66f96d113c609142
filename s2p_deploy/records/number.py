"""A measured number, and the word for one that is not there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A value over ``n`` samples; ``low`` and ``high`` are its 95 % bootstrap interval, where it has one."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    reason: str
