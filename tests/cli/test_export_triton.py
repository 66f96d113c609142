from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.records import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.commands import Chain, Run


def test_export_triton_writes_a_repository_of_two_models(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "models"
    finished = run("export-triton", made_chain.engine, "--out", out, "--name", "shapes", "--json")
    assert finished.code == 0
    assert finished.data["model"] == "shapes"
    assert finished.data["native"] is False
    assert finished.data["digest"] == read_manifest(out, "TritonRepository").digest
    assert run("verify", out).code == 0
    assert 'string_value: "shapes"' in (out / "shapes" / "config.pbtxt").read_text()


def test_export_triton_replaces_nothing_unasked(
    run: Run, made_chain: Chain, tmp_path: Path, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    out = tmp_path / "models"
    assert run("export-triton", made_chain.engine, "--out", out).code == 0
    before = snapshot(out)
    refused = run("export-triton", made_chain.engine, "--out", out, "--instances", 3)
    assert refused.code == 2
    assert "--force" in refused.err
    assert snapshot(out) == before
    assert run("export-triton", made_chain.engine, "--out", out, "--instances", 3, "--force").code == 0
    assert snapshot(out) != before


@pytest.mark.parametrize("package", ["google.protobuf", "grpc", "tritonclient"])
def test_without_its_extra_it_says_what_to_install(
    run: Run, made_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ModuleNotFoundError
    refused = run("export-triton", made_chain.engine, "--out", tmp_path / "models")
    assert refused.code == 4
    assert f"export-triton needs {package}: pip install 's2p-deploy[serve]'" in refused.err


def test_a_bad_name_is_a_usage_error(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    refused = run("export-triton", made_chain.engine, "--out", tmp_path / "models", "--name", "../up")
    assert refused.code == 2
    assert "--name" in refused.err
    assert list(tmp_path.iterdir()) == []
