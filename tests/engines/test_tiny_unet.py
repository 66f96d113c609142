"""The real exporter's graphs of a small UNet: the canonical form as it is, on every CPU engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.engines import (
    BuildOptions,
    ShapeProfile,
    build_engine,
    layers_not_int8,
    load_engine,
    runner_for_subgraph,
)
from s2p_deploy.engines.lowerings import Lowerings, QuantizerLowering, apply_passes, weight_only
from s2p_deploy.engines.machine import int8_products_overflow
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.records import ExportedGraph
from tests.artifacts import tiny_calibrated, tiny_inputs
from tests.engines.passes.reference_run import run_reference
from tests.engines.small_graph import build_options


@pytest.fixture(scope="module")
def w4a8(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    folder = tmp_path_factory.mktemp("w4a8")
    return export_graph(tiny_calibrated(folder / "calib", "int4", "int8"), folder / "graph")


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((a**2).mean() / max(((a - b) ** 2).mean(), 1e-30)))


def compare(graph: ExportedGraph, folder: Path) -> float:
    """Builds both CPU engines, checks rows and precisions, and returns their SQNR against each other."""
    reference = build_engine(graph, folder / "onnxruntime", backend="onnxruntime")
    options = BuildOptions(profile=ShapeProfile(1, 3, 8))
    candidate = build_engine(graph, folder / "openvino", backend="openvino", options=options)
    if not int8_products_overflow():
        assert layers_not_int8(candidate, graph.plan) == ()
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
    model = Subgraphs(w4a8).block(block.block)
    inputs: dict[str, np.ndarray] = {"act_scales": w4a8.scales.scales, **tiny_inputs(3)}
    shape = [3] + [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    inputs[model.graph.input[0].name] = generator.standard_normal(shape).astype(np.float32)
    fed = {value.name: inputs[value.name] for value in model.graph.input}
    outputs = []
    for backend in ("onnxruntime", "openvino"):
        with runner_for_subgraph(ir.from_proto(model), backend) as runner:
            outputs.append(next(iter(runner.infer(fed).values())))
    assert sqnr(*outputs) > 50


def test_every_lowering_of_the_real_graph_computes_the_same(w4a8: ExportedGraph) -> None:
    """Points take turns: static, runtime_q, rescale. One row, whose scales are the constants of the static ones."""
    codes = {layer.activation_quantizer: str(layer.codes) for layer in w4a8.layers if layer.activation_quantizer}
    names = w4a8.scales.quantizers
    turns = ("static", "runtime_q", "rescale")
    chosen = Lowerings(tuple(QuantizerLowering(n, codes[n], i, turns[i % 3]) for i, n in enumerate(names)))
    scales = w4a8.scales.scales.copy()
    for column in range(0, len(names), 3):
        scales[:, column] = w4a8.manifest.content["quantizers"][names[column]]["reference_scale"]
    given = {"act_scales": scales, **tiny_inputs(2), "timestep_index": np.full(2, 601)}
    results = []
    for lowerings in (Lowerings(), chosen):
        model = ir.load(w4a8.onnx_file)
        ir.external_data.load_to_model(model)
        apply_passes(model, lowerings, weight_only)
        results.append(run_reference(ir.to_proto(model), given)["noise_pred"])
    left = {str(node.name): len(node.outputs) for node in model.graph if node.op_type == "Split"}
    back = sum(count for name, count in left.items() if "from_reference" in name)
    to = sum(count for name, count in left.items() if "to_reference" in name)
    of = Counter(turns[i % 3] for i in range(len(names)))
    assert to >= of["rescale"]
    assert back == of["rescale"] + of["runtime_q"]
    assert left["act_scales/of_batch/split"] == of["runtime_q"]
    assert sqnr(*results) > 20  # x/s and x·(c/s)/c round apart, and flips amplify
    for quantizer, lowering in chosen.by_quantizer.items():
        scaled = f"{quantizer}/input_quantizer/scaled" in {str(node.name) for node in model.graph}
        assert scaled is (lowering == "rescale")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "mode", "least"),
    [("onnxruntime", "reference", None), ("openvino", "f32", 20), ("openvino", "bf16", 15)],
)
def test_every_sample_of_a_mixed_batch_equals_its_lone_run(
    w4a8: ExportedGraph, tmp_path: Path, backend: str, mode: str, least: float | None
) -> None:
    """Batches of 1 to 8, none of which has the tuned shape. In dB (None: bit for bit); a wrong row is far below."""
    engine = build_engine(
        w4a8, tmp_path / "engine", backend=backend, options=build_options(mode, ShapeProfile(1, 16, 16))
    )
    inputs = tiny_inputs(8)
    assert len(set(inputs["timestep_index"].tolist())) > 1
    with load_engine(engine) as runner:
        alone = [runner.infer({n: v[i : i + 1] for n, v in inputs.items()})["noise_pred"][0] for i in range(8)]
        wrong = runner.infer(inputs | {"timestep_index": inputs["timestep_index"][::-1]})["noise_pred"]
        for batch in range(1, 9):
            together = runner.infer({n: v[:batch] for n, v in inputs.items()})["noise_pred"]
            for lone, sample in zip(alone, together, strict=False):
                if least is None:
                    assert np.array_equal(lone, sample)
                else:
                    assert sqnr(lone, sample) > least
    assert max(sqnr(lone, sample) for lone, sample in zip(alone, wrong, strict=True)) < (least or 60)


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
    engine = build_engine(graph, tmp_path / "engine", backend="tensorrt_rtx", options=options)
    bits = Counter((layer.op, layer.weight_storage_bits, layer.activation_bits) for layer in engine.layers)
    assert bits == {("linear", 4, 8): 32, ("linear", 4, 16): 8, ("conv", 8, 8): 31, ("conv", 8, 16): 2}
