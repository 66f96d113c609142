"""Manifests: every artifact is a directory whose ``manifest.json`` names, hashes and explains what is in it.

An artifact is written under a temporary name, synced, and renamed, its manifest last: a directory with a manifest is
whole. A nested directory that has a manifest of its own (a parent kept inside) is not part of the outer artifact, and
neither is ``manifest.sig``, a signature of the manifest's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from s2p_deploy import __version__
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.lock import claimed
from s2p_deploy.records.plain_files import is_plain_name, open_plain, read_at_most, read_plain
from s2p_deploy.records.strict import Strict, checked, parsed_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SCHEMA = 1
MOST_MANIFEST = 32 * 2**20  # bytes; an SDXL engine's has less than one MiB
MOST_KEPT = 256 * 2**20  # bytes of a file that is parsed in memory: tables, plans, JSON


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

    The folder is ``.<name>.writing`` beside ``out``; where a kill left one, the next writer removes it.

    Raises:
        InputError: ``out`` exists and ``replace`` is not set, or another process is writing it. What stood at ``out``
            stays until the new one is whole.
    """
    check_vacant(out, replace=replace)
    hints = {
        name: Parent(manifest.digest, os.path.relpath(path.resolve(), out.resolve()))
        for name, (path, manifest) in (parents or {}).items()
    }
    temporary = out.with_name(f".{out.name}.writing")
    with claimed(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            content = fill(temporary)
            files = {
                path.relative_to(temporary).as_posix(): file_digest(path, sync=True) for path in _own_files(temporary)
            }
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
    if not os.path.lexists(folder / MANIFEST):
        raise InputError(f"{folder} is no artifact of s2p-deploy: it has no {MANIFEST} (an unfinished run leaves none)")
    manifest = manifest_from_bytes(read_plain(folder, MANIFEST, MOST_MANIFEST), folder)
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder} is of kind {manifest.kind}, expected {kind}")
    return manifest


def manifest_from_bytes(text: bytes, folder: Path) -> Manifest:
    """What the bytes of ``manifest.json`` say.

    Raises:
        InputError: another version wrote it. IntegrityError: it was changed, or is none.
    """
    file = folder / MANIFEST
    data = parsed_json(text, file)
    if not isinstance(data, dict) or data.pop("seal", None) is None:
        raise IntegrityError(f"{file} is damaged (it has no seal): make the artifact again")
    if not _is_sealed(text, data):
        raise IntegrityError(f"{file} was changed after it was written: make the artifact again")
    if data.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} has schema {data.get('schema')}, this version reads {SCHEMA}: make the artifact again"
        )
    checked(_ManifestFile, data, file)
    parents = {name: Parent(**parent) for name, parent in data.pop("parents").items()}
    return Manifest(**data | {"base": Base(**data["base"]), "parents": parents})


def verify_files(
    folder: Path, manifest: Manifest, leave_out: frozenset[str] = frozenset(), keep: Collection[str] = ()
) -> dict[str, bytes]:
    """Hashes every file of an artifact against its manifest; the reader of those in ``leave_out`` hashes them itself.

    Returns:
        The content of the files in ``keep``: the very bytes that were hashed.

    Raises:
        IntegrityError: a file is missing, changed, not in the manifest or no regular file, or its path leads out of
            the folder.
    """
    for name in keep:
        if name not in manifest.files:
            raise IntegrityError(f"{folder / name} is missing: make the artifact again")
    kept = {}
    for name, digest in manifest.files.items():
        with open_plain(folder, name) as opened:
            if name in keep:
                kept[name] = read_at_most(opened, MOST_KEPT, folder / name)
                found = hashlib.sha256(kept[name]).hexdigest()
            elif name not in leave_out:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            else:
                continue
        if found != digest:
            raise IntegrityError(f"{folder / name} was changed after it was written: make the artifact again")
    present = {path.relative_to(folder).as_posix() for path in _own_files(folder)} - {MANIFEST, SIGNATURE}
    for name in sorted(present - set(manifest.files)):
        raise IntegrityError(f"{folder / name} is not in the manifest: remove it or make the artifact again")
    return kept


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
    if not os.path.lexists(place / MANIFEST):
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


def _is_sealed(text: bytes, data: dict[str, Any]) -> bool:
    """Whether ``text`` is what was written: byte for byte, white space too."""
    try:
        return text == _sealed_text(data).encode()
    except (ValueError, RecursionError):  # deeper than what is ever written, or numbers too long to print
        return False


def _sealed_text(data: dict[str, Any]) -> str:
    """The text of ``manifest.json``: ``data`` and the SHA-256 of it."""
    seal = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return json.dumps(data | {"seal": seal}, indent=1, sort_keys=True) + "\n"


def _file_of_artifact(name: str) -> str:
    if not is_plain_name(name) or name in {MANIFEST, SIGNATURE}:
        raise ValueError(f"{name!r} is no file name inside the folder")
    return name


def _relative(path: str) -> str:
    if PurePosixPath(path).is_absolute() or "\0" in path:
        raise ValueError("a hint must be relative")
    return path


_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_ParentName = Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")]


class _Exact(Strict):
    model_config = ConfigDict(extra="forbid")


class _ParentEntry(_Exact):
    digest: _Sha256
    path: Annotated[str, AfterValidator(_relative)]


class _BaseEntry(_Exact):
    source: str
    digest: str


class _ManifestFile(_Exact):
    """``manifest.json`` without its seal."""

    kind: str
    base: _BaseEntry
    recipe: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_file_of_artifact)], _Sha256]
    parents: dict[_ParentName, _ParentEntry]
    content: dict[str, Any]
    tool: str
    schema_: int = Field(alias="schema")


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
    aside = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)  # left by a kill
        out.rename(aside)
    temporary.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
