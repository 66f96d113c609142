"""What an attacker who may write to an artifact's folder does last: every digest and the seal made anew."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

from s2p_deploy.records.artifacts import _sealed_text
from tests.mutations.targets import manifest_data

_MOST = 2**24


def seal_anew(folder: Path, change: dict[str, Any] | None = None) -> None:
    """Rewrites the manifest around what lies in the folder; ``change`` replaces the manifest's data."""
    data = manifest_data(folder) if change is None else change
    data.pop("seal", None)
    if change is None:
        present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if _readable(path)}
        digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()}
        data["files"] = {name: digests.get(name, digest) for name, digest in data["files"].items()}
        sizes = data["content"].get("sizes")
        if sizes is not None:
            data["content"]["sizes"] = {name: _size(present.get(name), size) for name, size in sizes.items()}
    (folder / "manifest.json").write_text(_sealed_text(data), encoding="utf-8")


def _readable(path: Path) -> bool:
    """A file, or a link to one; no device, no pipe, nothing endless."""
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size < _MOST


def _size(path: Path | None, size: int) -> int:
    return size if path is None else path.stat().st_size
