"""Manifests: every artifact is a directory whose ``manifest.json`` names, hashes and explains what is in it.

An artifact is written under a temporary name, synced, and renamed, its manifest last: a directory with a manifest is
whole. A nested directory that has a manifest of its own (a parent kept inside) is not part of the outer artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from s2p_deploy import __version__
from s2p_deploy.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from: its digest, and where it was (a relative hint, not in the digest)."""

    digest: str
    path: str


@dataclass(frozen=True)
class Base:
    """The floating-point pipeline at the root of a chain: the name, hub id or path given, and its content digest."""

    source: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``content`` is the record's own part."""

    kind: str
    base: Base
    recipe: dict[str, Any]
    files: dict[str, str]
    parents: dict[str, Parent] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    tool: str = f"s2p_deploy {__version__}"
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything but the parents' path hints and the base's location."""
        data = asdict(self)
        data["parents"] = {name: parent.digest for name, parent in self.parents.items()}
        data["base"] = self.base.digest
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def write_artifact(  # noqa: PLR0913 - a manifest has these parts
    out: Path,
    *,
    kind: str,
    base: Base,
    recipe: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    parents: dict[str, tuple[Path, Manifest]] | None = None,
    replace: bool = False,
) -> Manifest:
    """Writes an artifact: ``fill(folder)`` writes its files into a temporary folder and returns the record's content.

    Raises:
        InputError: ``out`` exists and ``replace`` is not set. What stood at ``out`` stays until the new one is whole.
    """
    check_vacant(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        content = fill(temporary)
        hints = {
            name: Parent(manifest.digest, os.path.relpath(path.resolve(), out.resolve()))
            for name, (path, manifest) in (parents or {}).items()
        }
        files = {path.relative_to(temporary).as_posix(): file_digest(path, sync=True) for path in _own_files(temporary)}
        manifest = Manifest(kind=kind, base=base, recipe=recipe, files=files, parents=hints, content=content)
        _write_synced(temporary / MANIFEST, _sealed_text(asdict(manifest)))
        _swap_in(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def check_vacant(out: Path, *, replace: bool) -> None:
    """Raises InputError where ``out`` exists and may not be replaced: for stages whose work before writing is long."""
    if out.exists() and not replace:
        raise InputError(f"{out} exists: choose another --out, or pass --force to replace it")


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """The manifest of an artifact, with no look at its files.

    Raises:
        InputError: there is no artifact, or it is of another kind.
        IntegrityError: the manifest cannot be read as one.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} is no artifact of s2p-deploy: it has no {MANIFEST} (an unfinished run leaves none)")
    try:
        text = file.read_bytes().decode()
        data = json.loads(text)
        data.pop("seal")
        intact = text == _sealed_text(data)  # byte for byte, white space too
        data["base"] = Base(**data["base"])
        data["parents"] = {name: Parent(**parent) for name, parent in data["parents"].items()}
        manifest = Manifest(**data)
        manifest.digest  # noqa: B018 - fails on parts that are not JSON-like
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{file} is damaged ({type(error).__name__}): make the artifact again") from error
    if not intact:
        raise IntegrityError(f"{file} was changed after it was written: make the artifact again")
    if manifest.schema != SCHEMA:
        raise InputError(f"{folder} has schema {manifest.schema}, this version reads {SCHEMA}: make the artifact again")
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder} is of kind {manifest.kind}, expected {kind}")
    return manifest


def verify_files(folder: Path, manifest: Manifest, leave_out: frozenset[str] = frozenset()) -> None:
    """Hashes every file of an artifact against its manifest; the reader of those in ``leave_out`` hashes them itself.

    Raises:
        IntegrityError: a file is missing, changed, or not in the manifest, or its path leads out of the folder.
    """
    present = {path.relative_to(folder).as_posix() for path in _own_files(folder)} - {MANIFEST}
    for name, digest in manifest.files.items():
        if name not in present or (folder / name).is_symlink():
            raise IntegrityError(f"{folder / name} is missing or a link: make the artifact again")
        if name not in leave_out and file_digest(folder / name) != digest:
            raise IntegrityError(f"{folder / name} was changed after it was written: make the artifact again")
    for name in sorted(present - set(manifest.files)):
        raise IntegrityError(f"{folder / name} is not in the manifest: remove it or make the artifact again")


def open_artifact(folder: Path, kind: str) -> Manifest:
    """Reads and verifies: :func:`read_manifest`, then :func:`verify_files`."""
    manifest = read_manifest(folder, kind)
    verify_files(folder, manifest)
    return manifest


def parent_folder(folder: Path, manifest: Manifest, name: str, given: Path | None = None) -> Path:
    """Where a parent artifact is: ``given``, or the manifest's hint; its digest is checked.

    Raises:
        InputError: it cannot be found.
        IntegrityError: what is there is another artifact.
    """
    parent = manifest.parents[name]
    place = given if given is not None else folder / parent.path
    if not (place / MANIFEST).is_file():
        raise InputError(f"the {name} that {folder} was made from is not at {place}: pass --{name} PATH")
    if read_manifest(place).digest != parent.digest:
        raise IntegrityError(f"{place} is not the {name} that {folder} was made from (its digest differs)")
    return place


def file_digest(path: Path, *, sync: bool = False) -> str:
    """SHA-256 (hex) of a file's bytes; with ``sync`` they are flushed to the disk too."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if sync:
            os.fsync(opened.fileno())
    return digest


def _sealed_text(data: dict[str, Any]) -> str:
    """The text of ``manifest.json``: ``data`` and the SHA-256 of it."""
    seal = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return json.dumps(data | {"seal": seal}, indent=1, sort_keys=True) + "\n"


def _own_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            yield path
        elif not (path / MANIFEST).exists():
            yield from _own_files(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _swap_in(temporary: Path, out: Path) -> None:
    """Renames the finished folder into place; an old one steps aside first and is deleted last."""
    aside = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(aside)
    temporary.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
