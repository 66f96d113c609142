"""What a table says decides how graphs are prepared; a table that cannot be trusted says nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from s2p_deploy.engines import BuildOptions, backend_by_name, backend_names
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.engines.probe.patterns import all_patterns
from s2p_deploy.engines.support import Finding, Pattern, Support, Verdict, folded, support_of
from s2p_deploy.engines.support_tables import (
    SupportTable,
    find_table,
    key_of,
    read_table,
    shipped_folder,
    table_text,
    write_to_cache,
)
from s2p_deploy.errors import IntegrityError
from tests.engines.conftest import GraphOf

RESCALE = Pattern("rescale", "matmul", "int8", "int8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "s2p_deploy" / "support"


def finding(pattern: Pattern, verdict: Verdict = "builds", compute: str = "unknown", dtype: str = "fp16") -> Finding:
    return Finding(pattern, dtype, verdict, "" if verdict == "builds" else "refused", compute)


def table(backend: str, findings: Iterable[Finding]) -> SupportTable:
    return SupportTable(key_of(backend), "fast", tuple(findings))


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


def test_without_a_table_nothing_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("s2p_deploy.engines.support_tables.shipped_folder", lambda: tmp_path)
    support = support_of("onnxruntime")
    assert support.version == backend_by_name("onnxruntime").capabilities().version
    assert not any(support.takes(pattern) for pattern in all_patterns())


def test_the_cache_goes_before_what_ships(cache: Path) -> None:
    path = write_to_cache(table("onnxruntime", [finding(RESCALE, "wrong")]))
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    assert support_of("onnxruntime").verdicts == {RESCALE: "wrong"}
    assert not support_of("onnxruntime").takes(RESCALE)


def test_a_table_of_something_else_is_not_used() -> None:
    other = table("onnxruntime", [finding(RESCALE)])
    for changed in ({"version": "0.1"}, {"platform": "win32-AMD64"}, {"device": "sm_89"}):
        write_to_cache(replace(other, key=replace(other.key, **changed)))
    found = find_table(other.key)
    assert found is None or len(found.findings) > 1  # none of those, though what ships may match


@pytest.mark.parametrize("damage", ["", "{}", "[]", "not json", "cut", "flipped", "other version", "nested"])
def test_a_damaged_table_is_passed_over_with_a_line(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_to_cache(table("onnxruntime", [finding(RESCALE, "wrong")]))
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    data["key"]["version"] = "0.1"
    path.write_text(
        {
            "cut": text[:-20],
            "flipped": text.replace("wrong", "builds"),
            "other version": json.dumps(data),
            "nested": "[" * 100_000,
        }.get(damage, damage),
        encoding="utf-8",
    )
    with caplog.at_level(logging.WARNING):
        assert support_of("onnxruntime").verdicts.get(RESCALE) != "wrong"
    assert path.name in caplog.text
    assert "doctor --probe" in caplog.text
    with pytest.raises(IntegrityError):
        read_table(path)


def test_a_whole_table_under_another_name_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    made = table("onnxruntime", [finding(RESCALE, "wrong")])
    path = write_to_cache(replace(made, key=replace(made.key, version="0.1")))
    path.rename(path.with_name(made.key.file_name))
    with caplog.at_level(logging.WARNING):
        assert support_of("onnxruntime").verdicts.get(RESCALE) != "wrong"
    assert "0.1" in caplog.text


def test_a_cache_that_others_may_write_is_not_read(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_to_cache(table("onnxruntime", [finding(RESCALE, "wrong")]))
    cache.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert support_of("onnxruntime").verdicts.get(RESCALE) != "wrong"
    assert "chmod 700" in caplog.text


def test_a_pattern_builds_only_if_it_does_in_every_dtype() -> None:
    both: list[Verdict] = ["builds", "crashes"]
    assert folded(finding(RESCALE, verdict, dtype=d) for verdict, d in zip(both, ("fp32", "fp16"), strict=True)) == {
        RESCALE: "crashes"
    }
    assert not Support("1", {}).takes(RESCALE)


def test_a_product_that_falls_back_to_floating_point_is_named() -> None:
    static, runtime_q = replace(RESCALE, lowering="static"), replace(RESCALE, lowering="runtime_q")
    packed = replace(RESCALE, weights="int4")
    write_to_cache(
        table(
            "openvino",
            [
                finding(static, compute="int8"),
                finding(RESCALE, compute="int8"),
                finding(runtime_q, compute="fp32"),
                finding(packed),
                finding(Pattern("float", "matmul", "int4", "none"), compute="fp32"),
            ],
        )
    )
    assert support_of("openvino").loses_int8 == {runtime_q, packed}


def stored(backend: str, graph_of: GraphOf, folder: Path) -> dict[str, str]:
    """Type of each site's weights in the graph prepared for a backend, from a W4A8 graph with one weight-only conv."""
    prepared = backend_by_name(backend).prepare(graph_of("fp16", "int4"), folder, BuildOptions())
    values = read_onnx(prepared).graph.initializers.items()
    suffix = "/weight_quantizer/codes"
    return {
        name.removesuffix(suffix): value.const_value.dtype.name
        for name, value in values
        if name.endswith(suffix) and value.const_value is not None
    }


def test_a_release_that_loses_int4_matmul_gets_it_expanded(graph_of: GraphOf, tmp_path: Path) -> None:
    conv = Pattern("rescale", "conv", "int4", "int8")
    write_to_cache(table("tensorrt_rtx", all_but([conv])))
    assert stored("tensorrt_rtx", graph_of, tmp_path) == {"conv_in": "INT4", "conv": "INT8", "to_q": "INT4"}
    write_to_cache(table("tensorrt_rtx", all_but([conv, replace(conv, op="matmul")])))
    assert stored("tensorrt_rtx", graph_of, tmp_path) == {"conv_in": "INT4", "conv": "INT8", "to_q": "INT8"}


def test_a_release_that_gains_int4_conv_keeps_it_packed(graph_of: GraphOf, tmp_path: Path) -> None:
    write_to_cache(table("tensorrt_rtx", all_but([])))
    assert stored("tensorrt_rtx", graph_of, tmp_path) == {"conv_in": "INT4", "conv": "INT4", "to_q": "INT4"}
