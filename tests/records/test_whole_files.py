from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from s2p_deploy.records.whole_files import link_or_copy, link_or_copy_files, write_tensors, write_text

if TYPE_CHECKING:
    from pathlib import Path


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
