"""The choice of lowerings, and engines built with each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.engines import BuildOptions, build_engine, check_scales, load_engine, recorded_lowerings
from s2p_deploy.engines.lowerings import (
    Lowerings,
    QuantizerLowering,
    any_use,
    choose_lowerings,
    int4_rule,
    variation,
    weight_only,
    weight_only_or_matmul,
)
from s2p_deploy.engines.passes.expand_int4 import Int4Use
from s2p_deploy.engines.support import Finding, Pattern, SupportTable, TableKey, Verdict
from s2p_deploy.errors import InputError
from s2p_deploy.records import Engine, ExportedGraph, ScaleTable
from s2p_deploy.records.optional_inputs import ImageSlot, ImageSlots
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import CALIBRATED, POINTS, REFERENCE_SCALE, small_inputs, small_scales


def table(verdicts: dict[Pattern, Verdict]) -> SupportTable:
    findings = tuple(Finding(pattern, "fp32", verdict, "", "unknown") for pattern, verdict in verdicts.items())
    return SupportTable(TableKey("onnxruntime", "1.0", "linux-x86_64", "cpu"), findings=findings)


UNKNOWN = table({})


def support(**verdicts: Verdict) -> SupportTable:
    """One verdict per lowering, for INT8 weights of either operator."""
    patterns = {Pattern(low, op, "int8", "int8"): v for low, v in verdicts.items() for op in ("conv", "matmul")}
    return table(patterns)


def with_columns(graph: ExportedGraph, conv: np.ndarray, to_q: np.ndarray) -> ExportedGraph:
    table = np.stack([np.broadcast_to(column, 1000) for column in (conv, to_q)], 1).astype(np.float32)
    return replace(graph, scales=ScaleTable(table, POINTS, CALIBRATED))


@pytest.fixture
def graph(graph_of: GraphOf) -> ExportedGraph:
    return graph_of("fp32", "int8")


def test_constant_columns_are_static_and_others_rescale(graph: ExportedGraph) -> None:
    mixed = with_columns(graph, np.float32(REFERENCE_SCALE), np.linspace(0.03, 0.031, 1000))
    chosen = choose_lowerings(mixed, BuildOptions(), UNKNOWN)
    assert chosen.by_quantizer == {"conv": "static", "to_q": "rescale"}
    assert chosen.columns("rescale") == {"to_q/codes": 1}
    wide = choose_lowerings(mixed, BuildOptions(static_tolerance=0.04), UNKNOWN)
    assert wide.by_quantizer == {"conv": "static", "to_q": "static"}


def test_scales_that_grow_with_image_prompts_stay_inputs(graph: ExportedGraph) -> None:
    slots = ImageSlots(4, 1, (ImageSlot("attn2", 0, 8, 0.25, quantizer="conv"),))
    constant = np.float32(REFERENCE_SCALE)
    taking = replace(with_columns(graph, constant, constant), images=slots)
    assert choose_lowerings(taking, BuildOptions(), UNKNOWN).by_quantizer == {"conv": "rescale", "to_q": "static"}
    varied = replace(taking, scales=with_columns(graph, constant, np.linspace(0.03, 0.06, 1000)).scales)
    asked = BuildOptions(lowering="runtime_q", static_tolerance=0.1)
    assert choose_lowerings(varied, asked, UNKNOWN).by_quantizer == {"conv": "rescale", "to_q": "runtime_q"}
    with pytest.raises(InputError, match=r"rescale of conv.*refuses"):
        choose_lowerings(taking, BuildOptions(), support(rescale="fails", runtime_q="builds"))


def test_the_tolerance_is_of_the_largest_over_the_smallest() -> None:
    assert variation(np.asarray([0.5, 0.25, 0.4], np.float32)) == 1.0
    assert variation(np.asarray([0.3, 0.3], np.float32)) == 0.0


@pytest.mark.parametrize(
    ("lowering", "seen", "expected"),
    [
        ("auto", UNKNOWN, "rescale"),
        ("auto", support(rescale="builds", runtime_q="builds"), "rescale"),
        ("auto", support(rescale="crashes", runtime_q="builds"), "runtime_q"),
        ("auto", support(rescale="crashes"), "rescale"),  # nothing better is known
        ("rescale", support(runtime_q="builds"), "rescale"),
        ("runtime_q", UNKNOWN, "runtime_q"),
    ],
)
def test_what_is_requested_and_what_is_supported(
    graph: ExportedGraph, lowering: str, seen: SupportTable, expected: str
) -> None:
    chosen = choose_lowerings(graph, BuildOptions(lowering=lowering), seen)  # type: ignore[arg-type]
    assert set(chosen.by_quantizer.values()) == {expected}
    assert chosen.mixed_timesteps is (expected != "runtime_q")


def test_what_a_backend_refuses_is_not_built(graph: ExportedGraph) -> None:
    with pytest.raises(InputError, match="runtime_q of conv: with this version the backend crashes on it"):
        choose_lowerings(graph, BuildOptions(lowering="runtime_q"), support(runtime_q="crashes"))
    constant = with_columns(graph, np.float32(REFERENCE_SCALE), np.float32(REFERENCE_SCALE))
    assert set(choose_lowerings(constant, BuildOptions(), support(static="wrong")).by_quantizer.values()) == {"rescale"}


MATMUL, CONV, WEIGHT_ONLY = Int4Use("MatMul", True), Int4Use("Conv", True), Int4Use("Conv", False)


@pytest.mark.parametrize(
    ("verdicts", "kept"),
    [
        ({}, {MATMUL, WEIGHT_ONLY}),
        ({Pattern("rescale", "conv", "int4", "int8"): "builds"}, {MATMUL, CONV, WEIGHT_ONLY}),
        ({Pattern("rescale", "matmul", "int4", "int8"): "crashes"}, {WEIGHT_ONLY}),
        ({Pattern("float", "conv", "int4", "none"): "fails"}, {MATMUL}),
        ({Pattern("static", "matmul", "int4", "int8"): "fails"}, {MATMUL, WEIGHT_ONLY}),  # no quantizer is static
    ],
)
def test_int4_stays_packed_where_the_backend_takes_it(verdicts: dict[Pattern, Verdict], kept: set[Int4Use]) -> None:
    lowerings = Lowerings((QuantizerLowering("p", "p/codes", 0, "rescale"),))
    keep = int4_rule(table(verdicts), lowerings, wanted=any_use, untried=weight_only_or_matmul)
    assert {use for use in (MATMUL, CONV, WEIGHT_ONLY) if keep(use)} == kept


def test_int4_is_not_packed_where_it_would_cost_integers() -> None:
    seen = table({Pattern("rescale", "matmul", "int4", "int8"): "builds"})
    keep = int4_rule(seen, Lowerings(), wanted=weight_only, untried=weight_only)
    assert not keep(MATMUL)


@pytest.fixture(scope="module")
def static_engine(graph_of: GraphOf, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("static") / "engine"
    return build_engine(
        graph_of("fp32", "int8"), out, backend="onnxruntime", options=BuildOptions(static_tolerance=1.5)
    )


def test_a_static_engine_takes_no_scales_and_equals_the_reference_scale(
    static_engine: Engine, engine_of: EngineOf
) -> None:
    assert [spec.name for spec in static_engine.inputs] == ["sample", "timestep_index", "encoder_hidden_states"]
    lowerings = {layer.name: layer.lowering for layer in static_engine.layers}
    assert lowerings == {"conv_in": "weight_only", "conv": "static", "to_q": "static", "conv_out": "float"}
    reference_scale = ScaleTable(np.full_like(small_scales(), REFERENCE_SCALE), POINTS, CALIBRATED)
    with (
        load_engine(static_engine) as static,
        load_engine(engine_of("onnxruntime", "reference", "int8"), scales=reference_scale) as rescaled,
    ):
        found, expected = (runner.infer(small_inputs())["noise_pred"] for runner in (static, rescaled))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_static_engine_refuses_a_table_that_differs(static_engine: Engine, graph: ExportedGraph) -> None:
    assert recorded_lowerings(static_engine, graph).by_quantizer == {"conv": "static", "to_q": "static"}
    check_scales(static_engine, static_engine.scales)  # within the tolerance that was asked for
    content = static_engine.manifest.content | {"options": {"static_tolerance": 0}}
    exact = replace(static_engine.manifest, content=content)
    with pytest.raises(
        InputError, match=r"scale of conv at timestep index 999 is 0\.0424264, but .* has 0\.03 built in"
    ):
        check_scales(replace(static_engine, manifest=exact), static_engine.scales)


def test_an_engine_that_quantizes_by_the_row_refuses_mixed_rows(
    graph: ExportedGraph, engine_of: EngineOf, tmp_path: Path
) -> None:
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime", options=BuildOptions(lowering="runtime_q"))
    assert engine.manifest.content["mixed_timesteps"] is False
    assert engine.inputs == graph.inputs
    together = small_inputs() | {"timestep_index": np.full(3, 501)}
    with load_engine(engine) as runner, load_engine(engine_of("onnxruntime", "reference", "int8")) as rescaled:
        found, expected = (each.infer(together)["noise_pred"] for each in (runner, rescaled))
        with pytest.raises(InputError, match="batches of one timestep"):
            runner.infer(small_inputs())
    assert np.median(np.abs(found - expected)) < 1e-5
