"""TensorRT-RTX builds without a GPU; running needs one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from s2p_deploy.engines import BuildOptions, ShapeProfile, build_engine, load_engine
from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.engines.tensorrt.inspector import compute_types
from s2p_deploy.errors import EngineBuildError, InputError, MissingEnvironmentError
from tests.engines.conftest import GraphOf
from tests.engines.small_graph import CHANNELS, ROWS, SIZE, TOKENS, GraphWriter, small_inputs, small_model

WIDTH = 2048
BUILDER = "s2p_deploy.engines.tensorrt.builder"


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def gpu() -> None:
    if not has_gpu():
        pytest.skip("needs a CUDA GPU")


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def child_request(folder: Path, model: onnx.ModelProto) -> dict[str, object]:
    path = folder / "block.onnx"
    path.write_bytes(model.SerializeToString())
    batches = (1, 2, 8)
    shapes = {
        "sample": [[b, 4, SIZE, SIZE] for b in batches],
        "step_index": [[b] for b in batches],
        "encoder_hidden_states": [[b, TOKENS, CHANNELS] for b in batches],
        "act_scales": [[ROWS, 2]] * 3,
    }
    return {"library": "tensorrt_rtx", "onnx": str(path), "shapes": shapes, "out": str(folder / "plan")}


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rtx_builds_ahead_of_time_with_a_dynamic_batch(graph_of: GraphOf, tmp_path: Path, weights: str) -> None:
    graph = graph_of("fp16", weights)
    options = BuildOptions(profile=ShapeProfile(1, 2, 8))
    engine = build_engine(graph, "tensorrt_rtx", tmp_path / "engine", options=options)
    bits = {site.site: site.weight_storage_bits for site in engine.sites}
    packed = 4 if weights == "int4" else 8
    assert bits == {"conv_in": packed, "conv": 8, "to_q": packed, "conv_out": 16}
    assert engine.environment["device"] == "CUDA GPU"
    assert engine.engine_files == ("denoiser.plan",)
    assert {site.compute for site in engine.sites} == {"unknown"} or has_gpu()
    if not has_gpu():
        with pytest.raises(MissingEnvironmentError, match="GPU"):
            load_engine(engine, graph)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_an_int4_conv_with_int8_activations_fails_in_the_builder(tmp_path: Path) -> None:
    """Why the canonical graph is not given to TensorRT-RTX as it is."""
    with pytest.raises(EngineBuildError, match=r"\Athe build failed: \[E\] IBuilder") as caught:
        run_child(BUILDER, child_request(tmp_path, small_model("fp16", "int4")), tmp_path, Limits(120))
    assert "CHECK(dtype == W.type()) failed" in str(caught.value)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_a_real_crash_of_the_builder_ends_as_an_error(tmp_path: Path) -> None:
    """A runtime scale on a DequantizeLinear that feeds a conv kills the TensorRT-RTX 1.7 builder with SIGSEGV."""
    model = small_model("fp16", "int8")
    for node in model.graph.node:
        if node.name == "conv/input_quantizer/DequantizeLinear":
            node.input[1] = "runtime_scale"
    position = next(
        i for i, node in enumerate(model.graph.node) if node.name == "conv/input_quantizer/DequantizeLinear"
    )
    scalar = onnx.numpy_helper.from_array(np.asarray([0, 0]), "first_scale")
    model.graph.initializer.append(scalar)
    half = onnx.TensorProto.FLOAT16
    model.graph.node.insert(position, onnx.helper.make_node("GatherND", ["act_scales", "first_scale"], ["wide_scale"]))
    model.graph.node.insert(position + 1, onnx.helper.make_node("Cast", ["wide_scale"], ["runtime_scale"], to=half))
    with pytest.raises(EngineBuildError, match="SIGSEGV"):
        run_child(BUILDER, child_request(tmp_path, model), tmp_path, Limits(120))


@pytest.mark.usefixtures("rtx")
def test_an_fp32_graph_is_refused_before_anything_starts(graph_of: GraphOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 graphs"):
        build_engine(graph_of("fp32", "int8"), "tensorrt_rtx", tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_an_engine_runs_on_the_gpu_as_onnxruntime_does(graph_of: GraphOf, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    graph = graph_of("fp16", "int8")
    built = build_engine(graph, backend, tmp_path / backend, options=BuildOptions(profile=ShapeProfile(1, 2, 8)))
    reference = build_engine(graph, "onnxruntime", tmp_path / "reference")
    with load_engine(built, graph) as candidate, load_engine(reference, graph) as expected:
        for batch in (1, 3, 8):
            a, b = (
                r.infer(small_inputs(batch, dtype="fp16"))["noise_pred"].astype(np.float64)
                for r in (candidate, expected)
            )
            assert 10 * np.log10((b**2).mean() / ((a - b) ** 2).mean()) > 25
        with pytest.raises(InputError, match="larger profile"):
            candidate.infer(small_inputs(9, dtype="fp16"))


def test_the_inspector_speaks_only_for_layers_with_one_product() -> None:
    def layer(metadata: str, kind: str) -> dict[str, object]:
        return {"Name": "x", "Metadata": metadata, "Inputs": [{"Name": "y", "Format/Datatype": kind}]}

    information = {
        "Layers": [
            layer("[ONNX Layer: conv/Conv]\x1e[ONNX Layer: conv/biased]", "Int8 NC/32HW32"),
            layer("[ONNX Layer: a/MatMul]\x1e[ONNX Layer: b/MatMul]", "Int8"),
            layer("[ONNX Layer: c/MatMul]", "Half"),
            "a name alone",
        ]
    }
    assert compute_types(json.dumps(information)) == {"conv/Conv": "int8", "c/MatMul": "fp16"}


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_int4_stays_packed_in_the_plan_of_a_matmul_with_int8_activations(tmp_path: Path) -> None:
    """A 2048 x 2048 product: INT4 data takes 2.1 MB, INT8 4.2."""
    sizes = {}
    for weights in ("int8", "int4"):
        folder = tmp_path / weights
        folder.mkdir()
        request = child_request(folder, wide_matmul(weights))
        request["shapes"] = {
            "tokens": [[b, 16, WIDTH] for b in (1, 2, 8)],
            "scale": [[b, 1] for b in (1, 2, 8)],
        }
        run_child(BUILDER, request, folder, Limits(120))
        sizes[weights] = (folder / "plan").stat().st_size
    assert sizes["int8"] - sizes["int4"] > 1_500_000


def wide_matmul(weights: str) -> onnx.ModelProto:
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    g = GraphWriter("fp16", weights)
    data, back = g.quantized("to_q", "tokens", "scale", 3)
    product = g.op("MatMul", [data, g.weight("to_q", (WIDTH, WIDTH), 0.02, 1)], "product", "to_q/MatMul")
    g.op("Mul", [product, back], "query")
    inputs = [
        onnx.helper.make_tensor_value_info("tokens", half, ["batch", 16, WIDTH]),
        onnx.helper.make_tensor_value_info("scale", single, ["batch", 1]),
    ]
    outputs = [onnx.helper.make_tensor_value_info("query", half, ["batch", 16, WIDTH])]
    graph = onnx.helper.make_graph(g.nodes, "wide", inputs, outputs, g.initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
