"""No Ray cluster without a token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.serve.ray.access import MODE, TOKEN, TOKEN_FILE, require_token
from s2p_deploy.serve.ray.run import RaySettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (MODE, TOKEN, TOKEN_FILE, "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_cluster_of_its_own_gets_a_token_of_its_own() -> None:
    require_token(own_cluster=True)
    assert os.environ[MODE] == "token"
    assert len(os.environ[TOKEN]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    first = os.environ[TOKEN]
    require_token(own_cluster=True)
    assert os.environ[TOKEN] == first


def test_a_token_that_is_there_is_used(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x" * 64)
    require_token(own_cluster=True)
    assert TOKEN not in os.environ


def test_a_cluster_to_join_has_one_already(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=TOKEN):
        require_token(own_cluster=False)
    monkeypatch.setenv(TOKEN, "x" * 64)
    require_token(own_cluster=False)


@pytest.mark.parametrize("mode", ["disabled", "", "k8s"])
def test_token_mode_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv(MODE, mode)
    with pytest.raises(InputError, match="RAY_AUTH_MODE=token"):
        require_token(own_cluster=True)


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"replicas": 257}, {"cpus": 0}])
def test_numbers_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="give"):
        RaySettings(**wrong)
