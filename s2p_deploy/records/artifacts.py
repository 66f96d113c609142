"""Artifacts: folders whose ``manifest.json`` names, hashes and explains what is in them.

An artifact is written under a temporary name, synced, and renamed, its manifest last: a directory with a manifest is
whole. A nested directory that has a manifest of its own (a parent kept inside) is not part of the outer artifact, and
neither is ``manifest.sig``, a signature of the manifest's bytes. Nothing else in the project writes, copies or checks
content by digest.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, StringConstraints, with_config

from s2p_deploy import __version__
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError, S2PError
from s2p_deploy.records.files import (
    available_memory,
    check_place,
    check_room,
    claimed,
    is_plain_name,
    open_plain,
    read_at_most,
    read_plain,
    writing,
)
from s2p_deploy.records.typed_json import EXACT, parsed_json, read_value

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from s2p_deploy.records.engine import Engine

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
# Raised whenever an older artifact could be misread: readers refuse every other one by its number.
SCHEMA = 2
MOST_MANIFEST = 32 * 2**20  # bytes; an SDXL engine's has less than one MiB
MOST_SIGNATURE = 2**20  # bytes; it has about two thousand
MOST_IN_MEMORY = 256 * 2**20  # bytes of a file that is parsed in memory: tables, plans, JSON
_MOST_GENERATIONS = 16  # engine, graph, calibrated model, dataset; models that go on from models
_CHUNK = 2**20
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def _file_of_artifact(name: str) -> str:
    if not is_plain_name(name) or name in {MANIFEST, SIGNATURE}:
        raise ValueError(f"{name!r} is no file name inside the folder")
    return name


def _relative(path: str) -> str:
    if PurePosixPath(path).is_absolute() or "\0" in path:
        raise ValueError("a parent's path must be relative")
    return path


_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, AfterValidator(_file_of_artifact)]
_ParentName = Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")]


@with_config(EXACT)
@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from: its digest, and where it was (a relative path, outside the digest)."""

    digest: _Sha256
    path: Annotated[str, AfterValidator(_relative)]


@with_config(EXACT)
@dataclass(frozen=True)
class BaseOptions:
    """How a pipeline is read where its files leave it open.

    ``components`` is the folder or hub id that gives what a single file lacks, and ``vae`` the file or folder of
    another autoencoder. ``prediction_type`` replaces the scheduler's, ``variant`` names files (``fp16``), and ``ema``
    takes a single file's averaged weights.

    Example:
        >>> turned = calibrate(
        ...     "shapes", recipe="fp", out="build/turned", options=BaseOptions(prediction_type="v_prediction")
        ... )
        >>> turned.manifest.base.options.prediction_type
        'v_prediction'
    """

    components: str | None = None
    vae: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    variant: str | None = None
    ema: bool = False


@with_config(EXACT)
@dataclass(frozen=True)
class Base:
    """The floating-point pipeline at the root of a chain: the name, hub id or path given, and its content digest.

    ``options`` say how it was read, and ``file`` is the SHA-256 of a single file, whose pipeline was made of it.
    """

    source: str
    digest: str
    options: BaseOptions = field(default_factory=BaseOptions)
    file: _Sha256 | None = None


@with_config(EXACT)
@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json`` without its seal. ``content`` is the record's own part."""

    kind: str
    base: Base
    recipe: dict[str, Any]
    files: dict[_FileName, _Sha256]
    parents: dict[_ParentName, Parent] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    tool: str = f"s2p_deploy {__version__}"
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything but the parents' paths and the base's location."""
        data = asdict(self)
        data["parents"] = {name: parent.digest for name, parent in self.parents.items()}
        data["base"] = self.base.digest
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Artifact(Protocol):
    """The two fields that every record of an artifact on disk has."""

    @property
    def folder(self) -> Path:
        """Returns the artifact's folder."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest as it was when the artifact was opened."""


def write_artifact(  # noqa: PLR0913 - a manifest has these parts
    out: Path,
    *,
    kind: str,
    base: Base,
    recipe: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    parents: Mapping[str, tuple[Path, Manifest | Parent]] | None = None,
    replace: bool = False,
) -> Manifest:
    """Writes an artifact: ``fill(folder)`` writes its files into a temporary folder and returns the record's content.

    The folder is ``.<name>.writing`` beside ``out``; where a kill left one, the next writer removes it.

    Raises:
        InputError: ``out`` may not be written (as :func:`check_vacant`), or another process is writing it. An artifact
            at ``out`` stays until the new one is whole.
    """
    check_vacant(out, kind, replace=replace)
    recorded_parents = {
        name: Parent(parent.digest, os.path.relpath(path.resolve(), out.resolve()))
        for name, (path, parent) in (parents or {}).items()
    }
    temporary = out.with_name(f".{out.name}.writing")
    with claimed(temporary):
        _undo_replacement(out)
        check_vacant(out, kind, replace=replace)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            content = fill(temporary)
            files = {
                path.relative_to(temporary).as_posix(): file_digest(path, sync=True) for path in _own_files(temporary)
            }
            manifest = Manifest(
                kind=kind, base=base, recipe=recipe, files=files, parents=recorded_parents, content=content
            )
            _write_synced(temporary / MANIFEST, _sealed_text(asdict(manifest)).encode())
            _swap_in(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def check_vacant(out: Path, kind: str, *, replace: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Checks that an artifact may be written to ``out``: for stages whose work before writing is long.

    Only an artifact of the same kind is ever replaced, be it damaged or of an older version.

    Args:
        out: folder of the artifact.
        kind: of the artifact.
        replace: whether one at ``out`` may be replaced.
        inputs: folders that it is made from, by what they are called.

    Raises:
        InputError: something else is at ``out``, or an artifact that may not be replaced; ``out`` is, holds or lies in
            an input; or nothing can be written there.
    """
    for name, folder in (inputs or {}).items():
        _check_apart(out, name, folder)
    if not os.path.lexists(out):
        return check_place(out)
    if out.is_symlink():
        raise InputError(f"{out} is a link: choose another --out, or give the folder that it leads to")
    if _written_kind(out) != kind:
        raise InputError(f"{out} exists and is no artifact of kind {kind}: choose another --out")
    if not replace:
        raise InputError(f"{out} exists: choose another --out, or pass --force to replace it")
    return None


def _check_apart(out: Path, name: str, folder: Path) -> None:
    place, given = out.resolve(), folder.resolve()
    if place == given:
        raise InputError(f"{out} is the {name} that is read: choose another --out")
    if place in given.parents:
        raise InputError(f"{out} holds the {name} that is read ({folder}): choose another --out")
    if given in place.parents:
        raise InputError(f"{out} lies in the {name} that is read ({folder}): choose another --out")


def _written_kind(folder: Path) -> object:
    """Reads the kind in a manifest that may be damaged or of another version; None where there is none."""
    try:
        data = parsed_json(read_plain(folder, MANIFEST, MOST_MANIFEST), folder / MANIFEST)
    except S2PError:
        return None
    return data.get("kind") if isinstance(data, dict) and "seal" in data else None


def copy_artifact(artifact: Artifact, out: Path) -> None:
    """Copies an artifact to ``out`` byte by byte, so its digest and signature stay, with the parents inside of it.

    Raises:
        InputError: ``out`` exists, or its disk has no room.
        IntegrityError: the artifact is not what it was when it was opened.
    """
    folder, manifest = artifact.folder, artifact.manifest
    if out.exists():
        raise InputError(f"{out} exists: choose another folder")
    check_room(out, bytes_of_artifact(artifact), "choose another folder")
    text = read_plain(folder, MANIFEST, MOST_MANIFEST)
    if manifest_from_bytes(text, folder) != manifest:
        raise IntegrityError(f"{folder} was changed since it was opened")
    temporary = out.with_name(f".{out.name}.writing")
    with claimed(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for name in manifest.files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                copy_verified(artifact, name, temporary / name)
                _sync(temporary / name)
            for inside in _parents_inside(artifact):
                copy_artifact(inside, temporary / inside.folder.relative_to(folder))
            if os.path.lexists(folder / SIGNATURE):
                _write_synced(temporary / SIGNATURE, read_plain(folder, SIGNATURE, MOST_SIGNATURE))
            _write_synced(temporary / MANIFEST, text)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def bytes_of_artifact(artifact: Artifact) -> int:
    """Returns the size of an artifact's files, and of those of the parents inside of it."""
    own = sum((artifact.folder / name).stat().st_size for name in artifact.manifest.files)
    return own + sum(map(bytes_of_artifact, _parents_inside(artifact)))


@dataclass(frozen=True)
class _Inside:
    folder: Path
    manifest: Manifest


def _parents_inside(artifact: Artifact) -> list[_Inside]:
    """Lists the parents that lie in an artifact's own folder. Raises IntegrityError where another artifact is there."""
    found = []
    for name, parent in artifact.manifest.parents.items():
        if _is_inside(parent):
            place = artifact.folder / parent.path
            found.append(_Inside(place, read_manifest(place)))
            if found[-1].manifest.digest != parent.digest:
                raise IntegrityError(f"{place} is not the {name} of {artifact.folder} (its digest differs)")
    return found


def _is_inside(parent: Parent) -> bool:
    return ".." not in PurePosixPath(parent.path).parts


def copy_verified(artifact: Artifact, name: str, out: Path, *, one_link: bool = False) -> None:
    """Copies one file of an artifact, hashing what is copied.

    Args:
        artifact: where the file is.
        name: the file's path in it.
        out: the copy, which must not exist.
        one_link: refuse a file that has another name elsewhere too.

    Raises:
        InputError: the copy cannot be written.
        IntegrityError: the file is missing, a link, or not what the manifest says.
    """
    digest = hashlib.sha256()
    with open_plain(artifact.folder, name, one_link=one_link) as source, writing(out), out.open("xb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != artifact.manifest.files.get(name):
        raise IntegrityError(f"{artifact.folder / name} was changed after it was written: make the artifact again")


def read_verified(artifact: Artifact, name: str) -> bytearray:
    """Reads one file of an artifact into memory: the bytes that are returned are those that were hashed.

    Raises:
        IntegrityError: it is not what the manifest says, by its size (where the content has ``sizes``, before memory is
            taken for it) or its bytes.
        MissingEnvironmentError: it is larger than the memory that is free.
    """
    path = artifact.folder / name
    with open_plain(artifact.folder, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        changed = IntegrityError(f"{path} was changed after it was written: make the artifact again")
        if artifact.manifest.content.get("sizes", {}).get(name, size) != size:
            raise changed
        free = available_memory()
        if free is not None and size > free:
            raise MissingEnvironmentError(f"{path} has {size} bytes, {free} bytes of memory are free")
        data = bytearray(size)
        count = opened.readinto(data)
    if count != size or hashlib.sha256(data).hexdigest() != artifact.manifest.files.get(name):
        raise changed
    return data


def verified_files(engine: Engine) -> dict[str, bytearray]:
    """Reads every engine file into memory; raises as :func:`read_verified`."""
    return {name: read_verified(engine, name) for name in engine.engine_files}


class VerifiedReader:
    """A file that was hashed once, whose ranges are checked against that each time they are read.

    A graph's weights are too large to be kept in memory, and a file that lies open to others could change between its
    hash and its use. A private copy would cost as much disk as the weights; instead a digest of every block is kept.

    Args:
        folder: the artifact.
        name: the file.
        digest: SHA-256 that it must have, in hex.

    Raises:
        IntegrityError: it is missing, a link of either kind, or not what the manifest says.
    """

    def __init__(self, folder: Path, name: str, digest: str | None) -> None:
        self._path = folder / name
        whole = hashlib.sha256()
        self._blocks: list[bytes] = []
        with open_plain(folder, name, one_link=True) as opened:
            while block := opened.read(_CHUNK):
                whole.update(block)
                self._blocks.append(hashlib.sha256(block).digest())
            self.size = opened.tell()
            self._descriptor = os.dup(opened.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        if whole.hexdigest() != digest:
            raise self._changed()

    def read(self, start: int, length: int) -> bytes:
        """Returns ``length`` bytes from ``start``. Raises IntegrityError where they are not those that were hashed."""
        first, last = start // _CHUNK, -(-(start + length) // _CHUNK)
        blocks = []
        for number in range(first, last):
            block = os.pread(self._descriptor, _CHUNK, number * _CHUNK)
            if hashlib.sha256(block).digest() != self._blocks[number]:
                raise self._changed()
            blocks.append(block)
        skipped = start - first * _CHUNK
        return b"".join(blocks)[skipped : skipped + length]

    def _changed(self) -> IntegrityError:
        return IntegrityError(f"{self._path} was changed after it was written: make the artifact again")


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """Reads the manifest of an artifact, with no look at its files.

    Raises:
        InputError: there is no artifact, or it is of another kind.
        IntegrityError: the manifest cannot be read as one.
    """
    if not os.path.lexists(folder / MANIFEST):
        if os.path.lexists(folder):
            raise InputError(
                f"{folder} is no artifact of s2p-deploy: it has no {MANIFEST} (an unfinished run leaves none)"
            )
        old = _old_folder(folder)
        if os.path.lexists(old / MANIFEST):
            raise InputError(f"{folder} is missing: its replacement was interrupted; rename {old} to {folder.name}")
        raise InputError(f"{folder} does not exist: give the folder of an artifact, which has a {MANIFEST}")
    manifest = manifest_from_bytes(read_plain(folder, MANIFEST, MOST_MANIFEST), folder)
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{folder} is of kind {manifest.kind}, expected {kind}")
    return manifest


def manifest_from_bytes(text: bytes, folder: Path) -> Manifest:
    """Reads the bytes of the ``manifest.json`` of ``folder``.

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
    return read_value(Manifest, data, file)


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
                kept[name] = read_at_most(opened, MOST_IN_MEMORY, folder / name)
                actual = hashlib.sha256(kept[name]).hexdigest()
            elif name not in leave_out:
                actual = hashlib.file_digest(opened, "sha256").hexdigest()
            else:
                continue
        if actual != digest:
            raise IntegrityError(f"{folder / name} was changed after it was written: make the artifact again")
    present = {path.relative_to(folder).as_posix() for path in _own_files(folder)} - {MANIFEST, SIGNATURE}
    for name in sorted(present - set(manifest.files)):
        raise IntegrityError(f"{folder / name} is not in the manifest: remove it or make the artifact again")
    return kept


def verify_whole(folder: Path, manifest: Manifest) -> None:
    """Hashes every file of an artifact, and of the parents inside of it; raises as :func:`verify_files`."""
    verify_files(folder, manifest)
    for inside in _parents_inside(_Inside(folder, manifest)):
        verify_whole(inside.folder, inside.manifest)


def open_artifact(folder: Path, kind: str) -> Manifest:
    """Reads and verifies an artifact: :func:`read_manifest`, then :func:`verify_files`."""
    manifest = read_manifest(folder, kind)
    verify_files(folder, manifest)
    return manifest


def parent_folder(folder: Path, manifest: Manifest, name: str, given: Path | None = None) -> Path:
    """Finds a parent artifact at ``given``, or where the manifest says that it was, and checks its digest.

    Raises:
        InputError: it cannot be found.
        IntegrityError: another artifact is there.
    """
    parent = manifest.parents[name]
    place = given if given is not None else folder / parent.path
    if not os.path.lexists(place / MANIFEST):
        raise InputError(f"the {name} that {folder} was made from is not at {place}: pass --{name} PATH")
    if read_manifest(place).digest != parent.digest:
        raise IntegrityError(f"{place} is not the {name} that {folder} was made from (its digest differs)")
    return place


@dataclass(frozen=True)
class Link:
    """One artifact of a chain: ``name`` is its part (``graph``, ``graph.calib``), ``files`` how many were hashed."""

    name: str
    folder: Path
    kind: str
    digest: str
    files: int
    state: Literal["verified", "not at hand"]


def verify_chain(folder: Path) -> tuple[Link, ...]:
    """Hashes every file of an artifact and of its parents, as far as they are where the manifests say they were.

    Raises:
        InputError: there is no artifact.
        IntegrityError: a file was changed, or another artifact is where a parent was.
    """
    return tuple(_links(folder, "", None, 0))


def file_digest(path: Path, *, sync: bool = False) -> str:
    """Returns the SHA-256 (hex) of a file's bytes; with ``sync`` they are flushed to the disk too."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if sync:
            os.fsync(opened.fileno())
    return digest


def _links(folder: Path, name: str, expected: Parent | None, depth: int, *, copied: bool = False) -> Iterator[Link]:
    """Follows an artifact's chain; where it is ``copied``, the paths of its parents may lead to other artifacts."""
    if depth > _MOST_GENERATIONS:
        raise IntegrityError(f"{folder}: more than {_MOST_GENERATIONS} generations of parents: refused")
    manifest = read_manifest(folder)
    if expected is not None and manifest.digest != expected.digest:
        raise IntegrityError(f"{folder} is not the {name} that this was made from (its digest differs)")
    verify_files(folder, manifest)
    yield Link(name, folder, manifest.kind, manifest.digest, len(manifest.files), "verified")
    for part, parent in manifest.parents.items():
        place, inner = folder / parent.path, f"{name}.{part}".strip(".")
        missing = not os.path.lexists(place / MANIFEST)
        if missing or (copied and read_manifest(place).digest != parent.digest):
            yield Link(inner, place, "", parent.digest, 0, "not at hand")
        else:
            yield from _links(place, inner, parent, depth + 1, copied=copied or _is_inside(parent))


def _is_sealed(text: bytes, data: dict[str, Any]) -> bool:
    """Returns whether ``text`` is what was written: byte for byte, white space too."""
    try:
        return text == _sealed_text(data).encode()
    except (ValueError, RecursionError):  # deeper than what is ever written, or numbers too long to print
        return False


def _sealed_text(data: dict[str, Any]) -> str:
    """Returns the text of ``manifest.json``: ``data`` and the SHA-256 of it."""
    seal = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return json.dumps(data | {"seal": seal}, indent=1, sort_keys=True) + "\n"


def _own_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            yield path
        elif not (path / MANIFEST).exists():
            yield from _own_files(path)


def _write_synced(path: Path, data: bytes) -> None:
    with writing(path), path.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _old_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _swap_in(temporary: Path, out: Path) -> None:
    """Puts the finished folder at ``out``; an artifact that was there is whole under some name until this is done."""
    if not os.path.lexists(out):
        temporary.rename(out)
    elif not _exchange(temporary, out):
        # Two renames: a kill between them leaves the old artifact under its other name, for _undo_replacement.
        old = _old_folder(out)
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)


def _undo_replacement(out: Path) -> None:
    """Puts an old artifact back where a kill between two renames left none, or removes it beside a new one."""
    old = _old_folder(out)
    if not os.path.lexists(old):
        return
    if os.path.lexists(out):
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(out)
