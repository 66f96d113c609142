from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s2p_deploy.errors import InputError
from s2p_deploy.records.files import (
    check_file,
    check_place,
    check_room,
    claimed,
    free_bytes,
    is_claimed,
    link_or_copy,
    link_or_copy_files,
    lock_file,
    write_tensors,
    write_text,
)


def test_a_text_replaces_what_stood_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_text(path, "old")
    write_text(path, "new: ×")
    assert path.read_text(encoding="utf-8") == "new: ×"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "old"


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    write_tensors(tmp_path / "a", {"x": turned, "y": torch.ones(2)})
    write_tensors(tmp_path / "b", {"y": torch.ones(2), "x": turned.contiguous()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(load_file(tmp_path / "a")["x"], turned)


def test_a_second_name_outlives_the_first(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_text(source / "a", "1")
    link_or_copy_files(source, tmp_path / "target")
    link_or_copy(source / "a", tmp_path / "b")
    write_text(source / "a", "2")  # renamed over, so the other names keep what they had
    assert (
        (tmp_path / "target" / "a").read_text(encoding="utf-8") == (tmp_path / "b").read_text(encoding="utf-8") == "1"
    )


def test_a_full_disk_is_told_before_anything_is_made(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "folder", 1)
    with pytest.raises(InputError, match=r"folder needs 1\.15e\+09 GB and its disk has .* GB left: make room"):
        check_room(tmp_path / "new" / "folder", 2**60)
    with pytest.raises(InputError, match=r"left: think again$"):
        check_room(tmp_path, 2**60, "think again")
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_looked_at_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for good in ("new", "new/deep/page.md", "file"):
        check_place(tmp_path / good)
        check_file(tmp_path / good)
    for bad, words in (("file/page.md", "file is no folder"), ("x" * 300, "too long"), ("a\0b", "null")):
        for check in (check_place, check_file):
            with pytest.raises(InputError, match=rf"cannot be used \(.*{words}.*\): choose another path"):
                check(tmp_path / bad)
    with pytest.raises(InputError, match="is a folder: give the name of a file"):
        check_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_in(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no right to write in"):
        check_place(tmp_path / "new")


def test_what_is_free_is_looked_up_where_the_folder_will_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "new" / "folder") == pytest.approx(free_bytes(tmp_path), rel=0.05)


# As a claim does, without the package's long way of imports.
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_claim_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.partial"
    with claimed(path):
        assert is_claimed(path)
        with pytest.raises(InputError, match=r"another process is at work on .*model\.partial: let") as caught:
            claimed(path).__enter__()
        assert "\n" not in str(caught.value)
        assert is_claimed(path)


def test_a_place_that_takes_no_lock_is_told_by_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / ".model.lock").mkdir()
    with pytest.raises(InputError, match=r"model cannot be used \(Is a directory\): choose another --out"):
        claimed(tmp_path / "model").__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="a file system that makes no files")
def test_a_file_system_without_new_files_is_not_another_process() -> None:
    with pytest.raises(InputError, match=r"/proc/model cannot be used \(No such file or directory\)"):
        claimed(Path("/proc/model")).__enter__()


def test_a_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "x"):
        raise KeyError
    assert not is_claimed(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "x"):
        pass


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "x"
    command = [sys.executable, "-c", HOLD, str(lock_file(path))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError), claimed(path):
        pass
    process.kill()
    process.communicate()
    assert lock_file(path).exists()
    with claimed(path):
        pass
    assert list(tmp_path.iterdir()) == []
