"""How long work tells how far it is: a callable of (stage, done, total). The command line draws bars with it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after every unit of work; ``done`` starts above zero where a run was resumed."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Reports that ``done`` of ``total`` units of ``stage`` are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress that shows nothing."""
