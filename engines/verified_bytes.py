"""An engine's and a graph's files: what was hashed is what is read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.engines.preflight import available_memory
from s2p_deploy.errors import IntegrityError, MissingEnvironmentError
from s2p_deploy.records.plain_files import open_plain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

    from s2p_deploy.records import Engine, ExportedGraph
    from s2p_deploy.records.copied import Artifact

_CHUNK = 2**20


def verified_files(engine: Engine) -> dict[str, bytearray]:
    """Every engine file in memory.

    Raises:
        IntegrityError: one is not what the manifest says, by its size (before memory is taken for it) or its bytes.
        MissingEnvironmentError: one is larger than the memory that is free.
    """
    return {name: verified_file(engine, name) for name in engine.engine_files}


def verified_file(artifact: Artifact, name: str) -> bytearray:
    """One file of an engine, or of another artifact, in memory; as :func:`verified_files`."""
    with open_plain(artifact.folder, name) as opened:
        return _verified(opened, artifact, name)


def _verified(opened: BufferedReader, artifact: Artifact, name: str) -> bytearray:
    path, size = artifact.folder / name, os.fstat(opened.fileno()).st_size
    changed = f"{path} was changed after it was written: build the {_made(artifact)} again"
    if artifact.manifest.content["sizes"].get(name, size) != size:
        raise IntegrityError(changed)
    free = available_memory()
    if free is not None and size > free:
        raise MissingEnvironmentError(f"{path} has {size} bytes, {free} bytes of memory are free")
    data = bytearray(size)
    count = opened.readinto(data)
    if count != size or hashlib.sha256(data).hexdigest() != artifact.manifest.files.get(name):
        raise IntegrityError(changed)
    return data


def _made(artifact: Artifact) -> str:
    return "engine" if artifact.manifest.kind == "Engine" else "parts"


@contextmanager
def verified_copy(graph: ExportedGraph, folder: Path) -> Iterator[Path]:
    """A private copy of the graph's ONNX file and its data in ``folder``, hashed as it was written; gone afterwards.

    Nobody else can change the copy, so what is read from it later, tensor by tensor, is what was hashed.

    Raises:
        IntegrityError: a file is missing, a link of either kind, or not what the manifest says.
    """
    names = [name for name in graph.manifest.files if name.startswith(graph.onnx_file.name)]
    with tempfile.TemporaryDirectory(prefix="verified-", dir=folder) as private:
        for name in (graph.onnx_file.name, *(name for name in names if name != graph.onnx_file.name)):
            copy_verified(graph, name, Path(private) / name)
        yield Path(private) / graph.onnx_file.name


def copy_verified(graph: ExportedGraph, name: str, out: Path) -> None:
    """Copies one of a graph's files. Raises IntegrityError where the copy is not what the manifest says."""
    digest = hashlib.sha256()
    with open_plain(graph.folder, name, one_link=True) as source, out.open("xb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != graph.manifest.files.get(name):
        raise IntegrityError(f"{graph.folder / name} was changed after it was written: export the graph again")
