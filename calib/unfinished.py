"""The folder where unfinished work stands, and the request that it is of: a second start goes on with the same only."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.records.whole_files import write_text

if TYPE_CHECKING:
    from pathlib import Path

_REQUEST = "request.json"


def partial_of(out: Path) -> Path:
    """Where the unfinished work on ``out`` stands."""
    return out.with_name(f"{out.name}.partial")


def claim_unfinished(folder: Path, request: dict[str, Any], *, replace: bool) -> None:
    """Makes the work folder of a request of JSON values, or finds the one that was left behind.

    Raises:
        InputError: what was left behind is of another request, and ``replace`` is not set.
    """
    if folder.exists():
        found = request_of(folder)
        if found == request:
            return
        if found and not replace:
            other = next((name for name in request if found.get(name) != request[name]), "version")
            raise InputError(
                f"{folder} holds unfinished work with another {other}:"
                " start it as it was, choose another --out, or pass --force to drop it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_text(folder / _REQUEST, json.dumps(request, indent=1) + "\n")


def request_of(folder: Path) -> dict[str, Any]:
    """The request of the work folder that stands there, or nothing."""
    file = folder / _REQUEST
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found
