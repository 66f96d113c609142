"""The real exporter's graphs of a small UNet: the canonical form as it is, on every CPU engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.engines import (
    BuildOptions,
    ShapeProfile,
    build_engine,
    load_engine,
    runner_for_subgraph,
    sites_not_int8,
)
from s2p_deploy.export import block_subgraph, export_graph
from s2p_deploy.records import ExportedGraph
from tests.artifacts import tiny_calibrated, tiny_inputs


@pytest.fixture(scope="module")
def w4a8(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    folder = tmp_path_factory.mktemp("w4a8")
    return export_graph(tiny_calibrated(folder / "calib", "int4", "int8"), folder / "graph")


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((a**2).mean() / max(((a - b) ** 2).mean(), 1e-30)))


def compare(graph: ExportedGraph, folder: Path) -> float:
    """Builds both CPU engines, checks rows and precisions, and returns their SQNR against each other."""
    reference = build_engine(graph, "onnxruntime", folder / "onnxruntime")
    options = BuildOptions(profile=ShapeProfile(1, 3, 8))
    candidate = build_engine(graph, "openvino", folder / "openvino", options=options)
    assert sites_not_int8(candidate, graph.plan) == ()
    inputs = tiny_inputs(3)
    results = []
    for engine in (reference, candidate):
        with load_engine(engine, graph) as runner:
            together = runner.infer(inputs)["noise_pred"]
            single = [runner.infer({n: v[i : i + 1] for n, v in inputs.items()})["noise_pred"] for i in range(3)]
        if engine is reference:
            assert np.array_equal(together, np.concatenate(single))
        else:
            assert sqnr(np.concatenate(single), together) > 20
        results.append(together)
    return sqnr(*results)


def test_w4a8_engines_agree_and_run_int8(w4a8: ExportedGraph, tmp_path: Path) -> None:
    assert compare(w4a8, tmp_path) > 20  # rounding flips amplify from block to block: see the next test


def test_w4a8_blocks_agree_when_fed_the_same(w4a8: ExportedGraph) -> None:
    """Where nothing amplifies, OpenVINO's INT8 is ONNX Runtime's quantized arithmetic."""
    generator = np.random.default_rng(0)
    block = next(block for block in w4a8.blocks if block.block.endswith("attentions.0"))
    model = block_subgraph(w4a8, block.block)
    inputs: dict[str, np.ndarray] = {"act_scales": w4a8.scales.scales, **tiny_inputs(3)}
    shape = [3] + [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    inputs[model.graph.input[0].name] = generator.standard_normal(shape).astype(np.float32)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    outputs = []
    for backend in ("onnxruntime", "openvino"):
        with runner_for_subgraph(model, backend) as runner:
            outputs.append(next(iter(runner.infer(fed).values())))
    assert sqnr(*outputs) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations", "least"), [("int8", "int8", 20), ("int4", "none", 100), ("none", "none", 100)]
)
def test_other_formats_agree(tmp_path: Path, weights: str, activations: str, least: float) -> None:
    """Without quantized activations nothing flips; a backend that codes them behind the graph's back reads 40 dB."""
    graph = export_graph(tiny_calibrated(tmp_path / "calib", weights, activations), tmp_path / "graph")
    assert compare(graph, tmp_path) > least


@pytest.mark.trt
@pytest.mark.slow
def test_rtx_builds_the_whole_w4a8_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = export_graph(tiny_calibrated(tmp_path / "calib", "int4", "int8"), tmp_path / "graph", dtype="fp16")
    options = BuildOptions(profile=ShapeProfile(1, 2, 8))
    engine = build_engine(graph, "tensorrt_rtx", tmp_path / "engine", options=options)
    bits = Counter((site.op, site.weight_storage_bits, site.activation_bits) for site in engine.sites)
    assert bits == {("linear", 4, 8): 32, ("linear", 4, 16): 8, ("conv", 8, 8): 31, ("conv", 8, 16): 2}
