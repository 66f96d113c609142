"""Progress on stderr: bars where it is a terminal, otherwise a plain line per stage and now and then one between."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import TaskID

    from s2p_deploy.progress import Progress

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callable that draws on stderr until the context is left."""
    if not sys.stderr.isatty():
        yield _PlainLines()
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (*Bars.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield draw


class _PlainLines:
    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.last_line = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in self.started:
            self.started[stage] = self.last_line = now
        if done < total and now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        sys.stderr.write(f"{stage} {done}/{total} ({now - self.started[stage]:.0f} s)\n")
        if done >= total:
            del self.started[stage]
