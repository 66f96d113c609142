"""A chain of artifacts: each names its parents by digest, and by a hint where they were."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.manifest import MANIFEST, Parent, read_manifest, verify_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DEEPEST = 16  # engine, graph, calibrated model, dataset; models that go on from models


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
        IntegrityError: a file was changed, or another artifact stands where a parent was.
    """
    return tuple(_links(folder, "", None, 0))


def _links(folder: Path, name: str, expected: Parent | None, depth: int) -> Iterator[Link]:
    if depth > _DEEPEST:
        raise IntegrityError(f"{folder}: more than {_DEEPEST} generations of parents: refused")
    manifest = read_manifest(folder)
    if expected is not None and manifest.digest != expected.digest:
        raise IntegrityError(f"{folder} is not the {name} that this was made from (its digest differs)")
    verify_files(folder, manifest)
    yield Link(name, folder, manifest.kind, manifest.digest, len(manifest.files), "verified")
    for part, parent in manifest.parents.items():
        place, inner = folder / parent.path, f"{name}.{part}".strip(".")
        if os.path.lexists(place / MANIFEST):
            yield from _links(place, inner, parent, depth + 1)
        else:
            yield Link(inner, place, "", parent.digest, 0, "not at hand")
