"""The tables that ship decide how graphs are lowered; without one, builds take the conservative form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from s2p_deploy.engines import BuildOptions, backend_by_name, backend_names
from s2p_deploy.engines.lowerings import lowered_model
from s2p_deploy.engines.support import (
    Finding,
    Pattern,
    SupportTable,
    Verdict,
    key_of,
    read_table,
    shipped_folder,
    support_of,
)
from s2p_deploy.errors import IntegrityError
from tests.engines.conftest import GraphOf
from tools.check_backends import all_patterns, table_text

RESCALE = Pattern("rescale", "matmul", "int8", "int8")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the one of the shipped tables."""
    monkeypatch.setattr("s2p_deploy.engines.support.shipped_folder", lambda: tmp_path)
    return tmp_path


def ship(folder: Path, backend: str, findings: Iterable[Finding]) -> Path:
    table = SupportTable(key_of(backend), findings=tuple(findings))
    path = folder / table.key.file_name
    path.write_text(table_text(table), encoding="utf-8")
    return path


def finding(pattern: Pattern, verdict: Verdict = "builds", compute: str = "unknown", dtype: str = "fp16") -> Finding:
    return Finding(pattern, dtype, verdict, "" if verdict == "builds" else "refused", compute)


def all_but(refused: Iterable[Pattern]) -> Iterable[Finding]:
    left_out = set(refused)
    return (finding(pattern, "fails" if pattern in left_out else "builds") for pattern in all_patterns())


@pytest.mark.parametrize("file", sorted(shipped_folder().glob("*.json")), ids=lambda file: file.stem)
def test_a_shipped_table_is_whole(file: Path) -> None:
    shipped = read_table(file)
    assert file.name == shipped.key.file_name
    assert file.read_text(encoding="utf-8") == table_text(shipped)
    dtypes = {f.dtype for f in shipped.findings}
    assert {(f.pattern, f.dtype) for f in shipped.findings} == {(p, d) for p in all_patterns() for d in dtypes}
    assert "unknown" not in {f.verdict for f in shipped.findings}


def test_tables_ship_of_three_backends() -> None:
    assert {read_table(f).key.backend for f in shipped_folder().glob("*.json")} == set(backend_names()) - {"tensorrt"}


def test_without_a_table_nothing_is_taken(shipped: Path) -> None:
    assert not any(shipped.iterdir())
    support = support_of("onnxruntime")
    assert support.key.version == backend_by_name("onnxruntime").capabilities().version
    assert {support.verdict(pattern) for pattern in all_patterns()} == {"unknown"}


@pytest.mark.parametrize("damage", ["", "{}", "[]", "not json", "cut", "nested"])
def test_a_damaged_table_is_an_error(damage: str, shipped: Path) -> None:
    path = ship(shipped, "onnxruntime", [finding(RESCALE, "wrong")])
    text = path.read_text(encoding="utf-8")
    path.write_text({"cut": text[:-20], "nested": "[" * 100_000}.get(damage, damage), encoding="utf-8")
    with pytest.raises(IntegrityError, match="no support table"):
        support_of("onnxruntime")


def test_a_pattern_builds_only_if_it_does_in_every_dtype(shipped: Path) -> None:
    ship(shipped, "onnxruntime", [finding(RESCALE, dtype="fp32"), finding(RESCALE, "crashes", dtype="fp16")])
    assert support_of("onnxruntime").verdict(RESCALE) == "crashes"


def stored(backend: str, graph_of: GraphOf) -> dict[str, str]:
    """Type of each layer's weights in the graph prepared for a backend, from a W4A8 graph with one weight-only conv."""
    model, _ = lowered_model(graph_of("fp16", "int4"), backend_by_name(backend), BuildOptions())
    values = model.graph.initializers.items()
    suffix = "/weight_quantizer/codes"
    return {
        name.removesuffix(suffix): value.const_value.dtype.name
        for name, value in values
        if name.endswith(suffix) and value.const_value is not None
    }


def test_a_release_that_loses_int4_matmul_gets_it_expanded(graph_of: GraphOf, shipped: Path) -> None:
    conv = Pattern("rescale", "conv", "int4", "int8")
    ship(shipped, "tensorrt_rtx", all_but([conv]))
    assert stored("tensorrt_rtx", graph_of) == {"conv_in": "INT4", "conv": "INT8", "to_q": "INT4"}
    ship(shipped, "tensorrt_rtx", all_but([conv, replace(conv, op="matmul")]))
    assert stored("tensorrt_rtx", graph_of) == {"conv_in": "INT4", "conv": "INT8", "to_q": "INT8"}


def test_a_release_that_gains_int4_conv_keeps_it_packed(graph_of: GraphOf, shipped: Path) -> None:
    ship(shipped, "tensorrt_rtx", all_but([]))
    assert stored("tensorrt_rtx", graph_of) == {"conv_in": "INT4", "conv": "INT4", "to_q": "INT4"}
