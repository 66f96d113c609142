"""``s2p-deploy doctor --probe``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from s2p_deploy.cli.doctor import _probe_tables
from s2p_deploy.engines.support_tables import read_table, shipped_folder
from tests.cli.commands import Run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_backend_goes_with_the_probe(run: Run) -> None:
    ended = run("doctor", "--backend", "openvino")
    assert ended.code == 2
    assert "--probe" in ended.err


def test_an_unknown_backend_is_refused(run: Run) -> None:
    assert run("doctor", "--probe", "--backend", "nonsense").code == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_backend_that_is_not_installed_is_missing(run: Run) -> None:
    assert run("doctor", "--probe", "--backend", "tensorrt").code == 4


@pytest.mark.parametrize("file", sorted(shipped_folder().glob("*.json")), ids=lambda file: file.stem)
def test_a_table_is_shown(file: Path) -> None:
    found = read_table(file)
    first, *_ = _probe_tables(found)
    assert [column.header for column in first.columns][:3] == ["lowering", "operator", "activations"]
    assert first.row_count == 16
    assert found.key.version in str(first.title)


@pytest.mark.slow
def test_the_probe_of_onnxruntime(run: Run, tmp_path: Path) -> None:
    ended = run("doctor", "--probe", "--backend", "onnxruntime", "--json")
    assert ended.code == 0, ended.err
    (probe,) = ended.data["probes"]
    assert {finding["verdict"] for finding in probe["findings"]} == {"builds"}
    assert len(probe["findings"]) == 128
    assert probe["seconds"] > 0
    assert Path(probe["path"]).is_relative_to(tmp_path)
    assert json.loads(json.dumps(probe["key"]))["backend"] == "onnxruntime"
    assert read_table(Path(probe["path"])).key.version == probe["key"]["version"]
