"""Assembled pipelines: folders in diffusers' format, put together in a cache from files that lie elsewhere.

What a single file holds is converted once, and everything after that reads a folder, as for any other pipeline. A
folder's name follows from the content that it is made of, so the same one is made once and found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.network_files import read_json
from s2p_deploy.families.streamed_tensors import write_tensor_file
from s2p_deploy.records import file_digest
from s2p_deploy.records.files import check_room, claimed, link_or_copy, write_text, writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from s2p_deploy.families.single_file import ConvertedNetwork

CACHE = "S2P_CACHE"  # names the folder of the cache
_RECORD = "assembled.json"
_HASHED_SUFFIXES = {".json", ".safetensors", ".txt", ".model"}


@dataclass
class Assembly:
    """The content of a pipeline's folder by the names in it: files that exist, texts, and networks to convert."""

    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    networks: dict[str, ConvertedNetwork] = field(default_factory=dict)
    _digests: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    def put(self, component: str, files: Mapping[str, Path]) -> None:
        """Adds files to a component's folder."""
        self.files |= {f"{component}/{name}": path for name, path in files.items()}

    def drop(self, component: str) -> None:
        """Takes a component out."""
        self.files = {name: path for name, path in self.files.items() if not name.startswith(f"{component}/")}

    def key(self) -> str:
        """Computes SHA-256 over all that decides the folder's content. Raises InputError where a file is missing."""
        missing = next((path for path in self.files.values() if not path.is_file()), None)
        if missing is not None:
            raise InputError(f"{missing} is missing: give the whole pipeline")
        lines = [f"{name} {self.digest_of(path)}" for name, path in self.files.items()]
        lines += [f"{name} {text}" for name, text in self.texts.items()]
        for name, network in self.networks.items():
            sources = {tensor: sorted(deferred.sources) for tensor, deferred in network.deferred.items()}
            lines.append(f"{name} {self.digest_of(network.place)} {json.dumps(sources, sort_keys=True)}")
        return hashlib.sha256("\n".join((f"diffusers {diffusers.__version__}", *sorted(lines))).encode()).hexdigest()

    def digest_of(self, path: Path) -> str:
        """Returns the SHA-256 of a file that it is made of, computed once."""
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    def write(self, folder: Path) -> None:
        """Writes the folder, whose networks are read one tensor at a time."""
        for name in (*self.files, *self.texts, *self.networks):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, path in self.files.items():
            with writing(folder / name):
                link_or_copy(path.resolve(), folder / name)  # a link of a hub's cache leads out of its own folder
        for name, text in self.texts.items():
            write_text(folder / name, text)
        for name, network in self.networks.items():
            write_tensor_file(folder / name, network.forms, network.read, {"format": "pt"})
            with (folder / name).open("rb") as opened:
                os.fsync(opened.fileno())


def assembled(assembly: Assembly) -> tuple[Path, str]:
    """Finds the folder of an assembly in the cache, or makes it there; a kill leaves nothing under its name.

    Returns:
        The folder, and its digest.

    Raises:
        InputError: a tensor cannot be read or holds NaN, or the disk has no room.
        IntegrityError: the folder was changed since it was made.
    """
    folder = cache_folder() / assembly.key()[:16]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder.parent} cannot be made ({error.strerror or error}): name another folder by the environment"
            f" variable {CACHE}"
        ) from error
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}.writing")
        with claimed(temporary, wait=True):
            if not folder.is_dir():  # else another process made it meanwhile
                return folder, _make(assembly, temporary, folder)
    digest = pipeline_digest(folder)
    if read_json(folder / _RECORD).get("digest") != digest:
        raise IntegrityError(f"{folder} was changed since it was made: delete it, and it is made again")
    return folder, digest


def is_assembled(folder: Path) -> bool:
    """Tells whether a folder was made by :func:`assembled`."""
    return (folder / _RECORD).is_file()


def cache_folder() -> Path:
    """Returns the folder of assembled pipelines: of ``S2P_CACHE``, else of the user's cache."""
    given = os.environ.get(CACHE)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(user) / "s2p-deploy") / "pipelines"


def pipeline_files(folder: Path) -> Iterator[Path]:
    """Yields the files that a pipeline is loaded from."""
    tops = (folder / "model_index.json", folder / "sampling.json")
    inner = sorted(path for path in folder.glob("*/*") if path.suffix in _HASHED_SUFFIXES)
    yield from (path for path in (*tops, *inner) if path.is_file())


def pipeline_digest(folder: Path) -> str:
    """Computes SHA-256 over the names and digests of the files that a pipeline is loaded from."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in pipeline_files(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _make(assembly: Assembly, temporary: Path, folder: Path) -> str:
    """Makes a folder under a temporary name and renames it; returns its digest."""
    size = sum(tensor.nbytes for network in assembly.networks.values() for tensor in network.deferred.values())
    check_room(folder, size, f"make room, or name another folder by the environment variable {CACHE}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        assembly.write(temporary)
        sources = {name: str(path) for name, path in assembly.files.items()}
        sources |= {name: str(network.place) for name, network in assembly.networks.items()}
        digest = pipeline_digest(temporary)
        record = {"digest": digest, "made_of": sources}
        write_text(temporary / _RECORD, json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest
