"""Copies of artifacts, byte by byte: the digest stays, and so does a signature."""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING, Protocol

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.disk_room import check_room, writing
from s2p_deploy.records.lock import claimed
from s2p_deploy.records.manifest import MANIFEST, MOST_MANIFEST, SIGNATURE, Manifest, manifest_from_bytes
from s2p_deploy.records.plain_files import open_plain, read_plain

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 2**20
_MOST_SIGNATURE = 2**20  # bytes


class Artifact(Protocol):
    """What every record of an artifact on disk has."""

    @property
    def folder(self) -> Path:
        """Where it is."""

    @property
    def manifest(self) -> Manifest:
        """What its manifest said when it was opened."""


def copy_artifact(artifact: Artifact, out: Path) -> None:
    """Copies an artifact to ``out``, hashing what is copied; artifacts inside it are left out.

    It is written under a temporary name and renamed, as :func:`~s2p_deploy.records.write_artifact` does.

    Raises:
        InputError: ``out`` exists, or its disk has no room.
        IntegrityError: the artifact is not what it was when it was opened.
    """
    folder, manifest = artifact.folder, artifact.manifest
    if out.exists():
        raise InputError(f"{out} exists: choose another folder")
    check_room(out, sum((folder / name).stat().st_size for name in manifest.files), "choose another folder")
    text = read_plain(folder, MANIFEST, MOST_MANIFEST)
    if manifest_from_bytes(text, folder) != manifest:
        raise IntegrityError(f"{folder} was changed since it was opened")
    temporary = out.with_name(f".{out.name}.writing")
    with claimed(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name, digest in manifest.files.items():
                _copy_verified(folder, name, digest, temporary / name)
            if os.path.lexists(folder / SIGNATURE):
                _write_synced(temporary / SIGNATURE, read_plain(folder, SIGNATURE, _MOST_SIGNATURE))
            _write_synced(temporary / MANIFEST, text)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_verified(folder: Path, name: str, digest: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with open_plain(folder, name) as source, writing(out), out.open("xb") as target:
        while chunk := source.read(_CHUNK):
            found.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    if found.hexdigest() != digest:
        raise IntegrityError(f"{folder / name} was changed after it was written: make the artifact again")


def _write_synced(path: Path, data: bytes) -> None:
    with writing(path), path.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
