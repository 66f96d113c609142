"""An engine's files as verified bytes: what was hashed is what is loaded."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from s2p_deploy.records import Engine


def verified_files(engine: Engine) -> dict[str, bytearray]:
    """Every engine file in memory. Raises IntegrityError where one is not what the manifest says."""
    return {name: _verified(engine, name) for name in engine.engine_files}


def _verified(engine: Engine, name: str) -> bytearray:
    path = engine.folder / name
    data = bytearray(path.stat().st_size)
    with path.open("rb") as opened:
        opened.readinto(data)
    if hashlib.sha256(data).hexdigest() != engine.manifest.files.get(name):
        raise IntegrityError(f"{path} was changed after it was written: build the engine again")
    return data
