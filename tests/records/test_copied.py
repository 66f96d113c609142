from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Base, Manifest, open_artifact, read_manifest, write_artifact
from s2p_deploy.records.copied import copy_artifact


@dataclass(frozen=True)
class Thing:
    """Any artifact."""

    folder: Path
    manifest: Manifest


@pytest.fixture
def thing(tmp_path: Path) -> Thing:
    """With a file, one in a folder, a signature, and another artifact inside."""

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.bin").write_bytes(b"a" * 3000)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(b"b")
        return {"n": 1}

    folder = tmp_path / "thing"
    manifest = write_artifact(folder, kind="Thing", base=Base("x", "1"), recipe={}, fill=fill)
    write_artifact(folder / "inner", kind="Thing", base=Base("x", "1"), recipe={}, fill=lambda _folder: {})
    (folder / "manifest.sig").write_bytes(b"signature")
    return Thing(folder, manifest)


def test_a_copy_is_the_same_artifact_byte_by_byte(thing: Thing, tmp_path: Path) -> None:
    out = tmp_path / "new" / "copy"
    copy_artifact(thing, out)
    assert open_artifact(out, "Thing") == thing.manifest
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == ["a.bin", "deep/b.bin", "manifest.json", "manifest.sig"], "what is inside is not part of it"
    assert all((out / name).read_bytes() == (thing.folder / name).read_bytes() for name in names)
    assert list(out.parent.iterdir()) == [out], "nothing temporary is left"


def test_nothing_is_written_over(thing: Thing, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    with pytest.raises(InputError, match="exists: choose another folder"):
        copy_artifact(thing, out)
    assert not list(out.iterdir())


def test_what_was_changed_is_not_copied(thing: Thing, tmp_path: Path) -> None:
    (thing.folder / "deep" / "b.bin").write_bytes(b"c")
    with pytest.raises(IntegrityError, match=r"b\.bin was changed"):
        copy_artifact(thing, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing"]


def test_what_was_replaced_since_it_was_opened_is_not_copied(thing: Thing, tmp_path: Path) -> None:
    other = Thing(thing.folder, read_manifest(thing.folder / "inner"))
    with pytest.raises(IntegrityError, match="was changed since it was opened"):
        copy_artifact(other, tmp_path / "copy")


def test_a_link_is_not_followed(thing: Thing, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"b")
    (thing.folder / "deep" / "b.bin").unlink()
    (thing.folder / "deep" / "b.bin").symlink_to(secret)
    with pytest.raises(IntegrityError, match="link"):
        copy_artifact(thing, tmp_path / "copy")
