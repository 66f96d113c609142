from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.validation import open_weights
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.weights import LPIPS, SUMS
from tests.validation.networks import pin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / LPIPS).write_bytes(b"weights")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not read, not pinned", encoding="utf-8")
    return pin(tmp_path)


def test_what_is_pinned_is_there_with_its_digest(folder: Path) -> None:
    found = open_weights(folder)
    assert set(found.digests) == {LPIPS, "clip/config.json"}
    assert found.place(LPIPS) == folder / LPIPS
    assert found.place("inception-v3-fid.safetensors") == Skipped(
        "the folder of weights has no inception-v3-fid.safetensors"
    )


@pytest.mark.parametrize("line", ["{} *{}", "{}  ./{}"])
def test_other_forms_of_sha256sum(folder: Path, line: str) -> None:
    digests = open_weights(folder).digests
    text = "".join(line.format(digest, name) + "\n" for name, digest in digests.items())
    (folder / SUMS).write_text(text, encoding="utf-8")
    assert open_weights(folder).digests == digests


def test_a_folder_without_a_list_is_refused(folder: Path) -> None:
    (folder / SUMS).unlink()
    with pytest.raises(InputError, match="sha256sum"):
        open_weights(folder)
    with pytest.raises(InputError, match="sha256sum"):
        open_weights(folder / "missing")


def test_a_changed_file_is_refused(folder: Path) -> None:
    (folder / LPIPS).write_bytes(b"Weights")
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        open_weights(folder)


def test_a_file_that_is_not_in_the_list_is_refused(folder: Path) -> None:
    (folder / "clip" / "model.safetensors").write_bytes(b"more")
    with pytest.raises(IntegrityError, match=r"clip/model\.safetensors is not pinned"):
        open_weights(folder)


@pytest.mark.parametrize(
    "text", ["abc  lpips", f"{'0' * 64}  ../up\n", f"{'0' * 64}  /root\n", f"{'G' * 64}  a\n", "\n"]
)
def test_a_damaged_list_is_refused(folder: Path, text: str) -> None:
    (folder / SUMS).write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"SHA256SUMS:1 is not a SHA-256"):
        open_weights(folder)
