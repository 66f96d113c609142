"""Everything that a command prints: its result on stdout, progress and one line of error on stderr."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.console import RenderableType
    from rich.progress import TaskID
    from rich.table import Table

    from s2p_deploy.context import Progress
    from s2p_deploy.records import Manifest

_PIPE_WIDTH = 400  # columns where stdout is no terminal: a wide table keeps each of its rows on one line
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Outcome:
    """A command's result: ``data`` for ``--json``, ``text`` for people.

    ``failure`` is set where the result is not good enough (a gate), as opposed to an error that left no result.
    """

    data: dict[str, Any]
    text: tuple[RenderableType, ...]
    failure: S2PError | None = None


def show(outcome: Outcome, *, as_json: bool) -> int:
    """Prints a result and returns the exit code."""
    failure = outcome.failure
    if as_json:
        _print_json(outcome.data | ({"error": _error_data(failure)} if failure else {}))
    else:
        _print_text(outcome.text)
    if failure is None:
        return 0
    _print_line(str(failure))
    return failure.exit_code


def show_error(error: BaseException, exit_code: int, message: str, *, as_json: bool) -> int:
    """Prints an error that left no result and returns the exit code."""
    if as_json:
        _print_json({"error": {"type": type(error).__name__, "exit_code": exit_code, "message": one_line(message)}})
    _print_line(message)
    return exit_code


def artifact_outcome(folder: Path, manifest: Manifest) -> Outcome:
    """Describes a stage's artifact: kind, digest, folder."""
    data = {"kind": manifest.kind, "path": str(folder), "digest": manifest.digest}
    return Outcome(data, (f"{manifest.kind} {manifest.digest[:16]} written to {folder}",))


def with_pipeline(outcome: Outcome, manifest: Manifest) -> Outcome:
    """Adds where the floating-point pipeline is, where a stage wrote one with LoRAs in its weights."""
    source = manifest.base.source
    return replace(
        outcome,
        data=outcome.data | {"pipeline": source},
        text=(*outcome.text, f"the floating-point pipeline, with the LoRAs in it, is {source}"),
    )


def two_columns(rows: Iterable[tuple[str, object]]) -> Table:
    """Lays out names and values as a plain grid."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name), Text(str(value)))
    return table


def table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Table:
    """Lays out a table with a head; every cell is printed as it is, without markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yields a progress callable: bars where stderr is a terminal, else a line per stage and every 15 s between."""
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


def one_line(message: str) -> str:
    """Replaces line breaks and control characters of a message by spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())


def _error_data(error: S2PError) -> dict[str, Any]:
    return {"type": type(error).__name__, "exit_code": error.exit_code, "message": one_line(str(error))}


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, default=str, allow_nan=False) + "\n")


def _print_text(parts: tuple[RenderableType, ...]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _print_line(message: str) -> None:
    sys.stderr.write(f"s2p-deploy: {one_line(message)}\n")


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
