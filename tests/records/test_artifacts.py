from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2p_deploy.errors import InputError, IntegrityError, S2PError
from s2p_deploy.records import (
    Base,
    Manifest,
    copy_artifact,
    open_artifact,
    parent_folder,
    read_manifest,
    verify_files,
    write_artifact,
)
from s2p_deploy.records.artifacts import _exchange, _sealed_text

BASE = Base("somewhere", "b" * 64)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write(out: Path, files: dict[str, bytes] | None = None, **options: Any) -> Manifest:  # noqa: ANN401 - passed on
    def fill(folder: Path) -> dict[str, Any]:
        for name, data in (files or {"a.bin": b"abc", "deep/b.txt": b"xyz"}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return {"answer": 42}

    return write_artifact(out, **{"kind": "Thing", "base": BASE, "recipe": {"name": "r"}, "fill": fill} | options)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    read = open_artifact(tmp_path / "a", "Thing")
    assert read == written
    assert read.content == {"answer": 42}
    assert set(read.files) == {"a.bin", "deep/b.txt"}
    # sha-256 of b"abc", FIPS 180-2's first example
    assert read.files["a.bin"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "no temporary folder is left"


@given(content=st.dictionaries(st.text(), JSON_VALUES, max_size=3))
@settings(max_examples=25)
def test_any_content_comes_back_with_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    out = tmp_path_factory.mktemp("artifact") / "a"
    written = write(out, fill=lambda _folder: content)
    assert read_manifest(out).content == content
    assert read_manifest(out).digest == written.digest


@given(data=st.data())
@settings(max_examples=100)
def test_any_changed_byte_of_any_file_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    out = tmp_path_factory.getbasetemp() / "sealed"
    if not out.exists():
        write(out)
    path = data.draw(st.sampled_from(sorted(p for p in out.rglob("*") if p.is_file())))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != original[place]))
    path.write_bytes(original[:place] + bytes([value]) + original[place + 1 :])
    try:
        with pytest.raises(IntegrityError):
            open_artifact(out, "Thing")
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", '{"seal": 1}', "\xff"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {"../secret": "0" * 64}),
        ("files", {"/etc/passwd": "0" * 64}),
        ("files", {"manifest.sig": "0" * 64}),
        ("files", {"a.bin": "short"}),
        ("files", ["a.bin"]),
        ("parents", {"p": {"digest": "0" * 64, "path": "/etc"}}),
        ("parents", {"p": {"digest": "0" * 64}}),
        ("base", {"source": 3, "digest": ""}),
        ("content", []),
        ("extra", 1),
        ("kind", None),
    ],
)
def test_a_sealed_manifest_of_nonsense_is_refused(tmp_path: Path, key: str, value: object) -> None:
    data = asdict(write(tmp_path / "a")) | {key: value}
    (tmp_path / "a" / "manifest.json").write_text(_sealed_text(data))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"seal":' + "9" * 100_000 + "}", '{"seal":1,"a":' + "[" * 500 + "]" * 500 + "}"],
    ids=["deep", "long", "nested"],
)
def test_text_that_hurts_a_parser_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(tmp_path / "a")


def test_sizes_are_limited_before_memory_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = write(out)
    os.truncate(out / "a.bin", 1 << 40)
    with pytest.raises(IntegrityError, match="too much"):
        verify_files(out, manifest, keep=("a.bin",))
    os.truncate(out / "manifest.json", 1 << 40)
    with pytest.raises(IntegrityError, match="too much"):
        read_manifest(out)


def test_links_and_special_files_are_refused_without_being_opened(tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = write(out)
    (out / "a.bin").unlink()
    os.mkfifo(out / "a.bin")  # opened without care, it would block for ever
    with pytest.raises(IntegrityError, match="regular file"):
        verify_files(out, manifest)
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    (out / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(IntegrityError, match="link"):
        read_manifest(out)


def test_a_linked_folder_on_the_way_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = write(out)
    (out / "deep").rename(tmp_path / "elsewhere")
    (out / "deep").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="link"):
        verify_files(out, manifest)


def test_what_is_kept_is_what_was_hashed(tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = write(out)
    assert verify_files(out, manifest, keep=("a.bin",)) == {"a.bin": b"abc"}
    with pytest.raises(IntegrityError, match="missing"):
        verify_files(out, manifest, keep=("other.bin",))


def test_a_signature_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    (tmp_path / "a" / "manifest.sig").write_bytes(b"any")
    assert open_artifact(tmp_path / "a", "Thing") == manifest


def test_missing_extra_and_linked_files_are_found(tmp_path: Path) -> None:
    out = tmp_path / "a"
    write(out)
    (out / "extra").write_text("x")
    with pytest.raises(IntegrityError, match="extra is not in the manifest"):
        open_artifact(out, "Thing")
    (out / "extra").unlink()
    (out / "a.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="missing"):
        open_artifact(out, "Thing")
    (out / "a.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="link"):
        open_artifact(out, "Thing")


def test_a_file_left_to_its_reader_is_not_hashed_but_must_be_there(tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = write(out)
    (out / "a.bin").write_bytes(b"abd")
    verify_files(out, manifest, leave_out=frozenset({"a.bin"}))
    (out / "a.bin").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        verify_files(out, manifest, leave_out=frozenset({"a.bin"}))


def test_a_file_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"abc")
    out = tmp_path / "a"
    manifest = write(out, {"a.bin": b"abc"})
    escaping = Manifest(manifest.kind, BASE, {}, {"../secret": manifest.files["a.bin"]})  # only readers check names
    with pytest.raises(IntegrityError):
        verify_files(out, escaping)


def test_an_artifact_kept_inside_is_not_part_of_the_outer_one(tmp_path: Path) -> None:
    out = tmp_path / "outer"
    before = write(out)
    write(out / "inner")
    assert open_artifact(out, "Thing") == before


def test_refuses_to_overwrite_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = write(out)
    with pytest.raises(InputError, match="--force"):
        write(out, {"a.bin": b"new"})
    assert open_artifact(out, "Thing") == first
    second = write(out, {"a.bin": b"new"}, replace=True)
    assert open_artifact(out, "Thing") == second != first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_an_artifact_of_the_kind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"kind": "Thing"}')
    other = write(tmp_path / "other", kind="Other")
    for name in ("folder", "file", "foreign", "other"):
        with pytest.raises(InputError, match=f"{name} exists and is no artifact of kind Thing: choose another --out$"):
            write(tmp_path / name, replace=True)
    assert open_artifact(tmp_path / "other", "Other") == other
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "foreign", "other"]


def test_a_failing_fill_leaves_the_old_artifact_and_no_rest(tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = write(out)

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write(out, fill=fail, replace=True)
    assert open_artifact(out, "Thing") == first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def fill_slowly(folder: Path) -> dict[str, Any]:
    for number in range(200):
        (folder / f"{number}.bin").write_bytes(os.urandom(1000))
        time.sleep(0.01)
    return {}


def write_slowly(out: Path) -> None:
    write(out, fill=fill_slowly, replace=True)


def test_a_kill_between_writes_leaves_the_old_artifact_whole(tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = write(out)
    child = multiprocessing.get_context("fork").Process(target=write_slowly, args=(out,))
    child.start()
    half_done = tmp_path / ".a.writing" / "5.bin"
    deadline = time.monotonic() + 20
    while not half_done.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(InputError, match=r"another process is at work on .*\.a\.writing"):
        write(out, replace=True)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert half_done.exists(), "the kill must hit it in the middle"
    assert open_artifact(out, "Thing") == first
    with pytest.raises(InputError, match="unfinished"):
        open_artifact(half_done.parent, "Thing")
    second = write(out, {"a.bin": b"second"}, replace=True)
    assert open_artifact(out, "Thing") == second
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "the next writer clears up"


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot exchange two names, the old artifact is put back before anything is deleted."""
    out = tmp_path / "a"
    first = write(out)
    monkeypatch.setattr("s2p_deploy.records.artifacts._exchange", lambda *_paths: False)

    def killed(source: Path, target: Path, rename: Any = Path.rename) -> Path:  # noqa: ANN401 - a method
        if target == out:
            raise KeyboardInterrupt
        renamed: Path = rename(source, target)
        return renamed

    with monkeypatch.context() as between:
        between.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(out, {"a.bin": b"second"}, replace=True)
    assert not out.exists()
    with pytest.raises(InputError, match=r"replacement was interrupted; rename .*\.a\.replaced to a$"):
        read_manifest(out)
    with pytest.raises(InputError, match="--force"):
        write(out, {"a.bin": b"third"})
    assert open_artifact(out, "Thing") == first
    third = write(out, {"a.bin": b"third"}, replace=True)
    assert open_artifact(out, "Thing") == third
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_replacement_is_one_step_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not _exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two names")
    write(tmp_path / "a")

    def killed(*_paths: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)  # a kill at any rename: there is none
    second = write(tmp_path / "a", {"a.bin": b"second"}, replace=True)
    assert open_artifact(tmp_path / "a", "Thing") == second


def test_kind_and_presence_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    write(tmp_path / "a")
    with pytest.raises(InputError, match="of kind Thing, expected Engine"):
        open_artifact(tmp_path / "a", "Engine")


def test_the_digest_follows_content_and_parents_but_not_places(tmp_path: Path) -> None:
    parent = write(tmp_path / "p")
    child = write(tmp_path / "c", parents={"p": (tmp_path / "p", parent)})
    (tmp_path / "far").mkdir()
    moved = write(
        tmp_path / "far" / "c", parents={"p": (tmp_path / "p", parent)}, base=Base("another name", BASE.digest)
    )
    assert child.parents["p"].path == "../p"
    assert moved.parents["p"].path == "../../p"
    assert child.digest == moved.digest
    others = ({"recipe": {"name": "s"}}, {"kind": "Other"}, {"base": Base("somewhere", "c" * 64)}, {"parents": {}})
    for number, other in enumerate(others):
        options = {"parents": {"p": (tmp_path / "p", parent)}} | other
        assert write(tmp_path / f"d{number}", **options).digest != child.digest


def test_a_parent_is_found_by_hint_or_by_what_is_given(tmp_path: Path) -> None:
    parent = write(tmp_path / "p")
    child = write(tmp_path / "c", parents={"graph": (tmp_path / "p", parent)})
    assert parent_folder(tmp_path / "c", child, "graph").resolve() == tmp_path / "p"
    (tmp_path / "p").rename(tmp_path / "q")
    with pytest.raises(InputError, match="--graph"):
        parent_folder(tmp_path / "c", child, "graph")
    assert parent_folder(tmp_path / "c", child, "graph", tmp_path / "q") == tmp_path / "q"
    write(tmp_path / "r", {"a.bin": b"other"})
    with pytest.raises(IntegrityError, match="digest differs"):
        parent_folder(tmp_path / "c", child, "graph", tmp_path / "r")


def test_another_schema_is_refused_with_its_number(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    text = _sealed_text(asdict(manifest) | {"schema": 99})
    (tmp_path / "a" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="schema 99"):
        read_manifest(tmp_path / "a")


def test_every_error_of_a_manifest_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"seal": "x\ny"}))
    with pytest.raises(S2PError) as caught:
        read_manifest(tmp_path / "a")
    assert "\n" not in str(caught.value)


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
