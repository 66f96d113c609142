from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.records.disk_room import check_room, free_bytes


def test_a_full_disk_is_told_before_anything_is_made(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "folder", 1)
    with pytest.raises(InputError, match=r"folder needs 1\.15e\+09 GB and its disk has .* GB left: make room"):
        check_room(tmp_path / "new" / "folder", 2**60)
    with pytest.raises(InputError, match=r"left: think again$"):
        check_room(tmp_path, 2**60, "think again")
    assert list(tmp_path.iterdir()) == []


def test_what_is_free_is_looked_up_where_the_folder_will_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "new" / "folder") == pytest.approx(free_bytes(tmp_path), rel=0.05)
