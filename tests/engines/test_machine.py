"""Compiled code is loaded from the cache: it must be the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.engines import machine
from s2p_deploy.engines.machine import plain_name, private_folder
from s2p_deploy.errors import MissingEnvironmentError


def test_the_folder_is_made_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = private_folder("kernels")
    assert folder == tmp_path / "s2p_deploy" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder("kernels") == folder


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    private_folder("kernels").chmod(mode)
    with pytest.raises(MissingEnvironmentError, match="not this user's alone"):
        private_folder("kernels")


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert private_folder("kernels") == tmp_path / ".cache" / "s2p_deploy" / "kernels"


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s2p_deploy").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingEnvironmentError, match="cannot be made"):
        private_folder("kernels")


def test_a_name_cannot_lead_out_of_its_folder() -> None:
    assert plain_name("a", "../../b c", "NVIDIA RTX/4090") == "a-.._.._b_c-NVIDIA_RTX_4090"


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [
        ({"avx", "avx2", "fma"}, True),
        ({"avx2", "avx512f"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx512f", "avx512_vnni", "amx_int8"}, False),
        (set(), False),  # no x86 Linux: nothing is known against its kernels
    ],
)
def test_int8_products_overflow_without_vnni(flags: set[str], overflow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.int8_products_overflow() is overflow
