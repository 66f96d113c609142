"""What a command prints: one JSON object or text for people on stdout, one line on stderr where something failed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import RenderableType
    from rich.table import Table

    from s2p_deploy.records import Manifest

_PIPE_WIDTH = 400  # columns where stdout is no terminal, so that rows stay on one line


@dataclass(frozen=True)
class Outcome:
    """What a command found: ``data`` for ``--json``, ``text`` for people.

    ``failure`` is a result that is not good enough (a gate), as opposed to an error that left no result.
    """

    data: dict[str, Any]
    text: tuple[RenderableType, ...]
    failure: S2PError | None = None


def show(outcome: Outcome, *, as_json: bool) -> int:
    """Prints an outcome; the exit code."""
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
    """Prints an error that left no result; the exit code."""
    if as_json:
        _print_json({"error": {"type": type(error).__name__, "exit_code": exit_code, "message": one_line(message)}})
    _print_line(message)
    return exit_code


def artifact_outcome(folder: Path, manifest: Manifest) -> Outcome:
    """What a stage wrote, and where."""
    data = {"kind": manifest.kind, "path": str(folder), "digest": manifest.digest}
    return Outcome(data, (f"{manifest.kind} {manifest.digest[:16]} written to {folder}",))


def two_columns(rows: Iterable[tuple[str, object]]) -> Table:
    """A plain grid of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name), Text(str(value)))
    return table


def table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Table:
    """A table with a head; every cell is printed as it is, without markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result


def one_line(message: str) -> str:
    """A message without line breaks and control characters."""
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
