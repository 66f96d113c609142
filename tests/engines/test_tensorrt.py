"""TensorRT-RTX builds without a GPU; running needs one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from s2p_deploy.child_process import Limits
from s2p_deploy.engines import BuildOptions, ShapeProfile, backend_by_name, build_engine, load_engine
from s2p_deploy.engines.backend import call_in_child
from s2p_deploy.engines.options import profile_shapes, spec_of
from s2p_deploy.engines.tensorrt.backend import refusal
from s2p_deploy.engines.tensorrt.plan import compute_types, layer_table, open_plan
from s2p_deploy.engines.tensorrt.runner import OutputShapes, TensorRtRunner, check_shape
from s2p_deploy.errors import EngineBuildError, InputError, MissingEnvironmentError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LORA_KINDS, LoraRequest
from s2p_deploy.records import Execution
from s2p_deploy.records.optional_inputs import LORA_DOWN, LORA_STRENGTHS, LORA_UP
from tests.artifacts import tiny_calibrated
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import CHANNELS, ROWS, SIZE, TOKENS, GraphWriter, on_the_gpu, small_inputs, small_model

WIDTH = 2048
BUILDER = "s2p_deploy.engines.tensorrt.builder:build_in_child"


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


def child_request(folder: Path, model: onnx.ModelProto, **options: bool) -> dict[str, Any]:
    path = folder / "block.onnx"
    path.write_bytes(model.SerializeToString())
    batches = (1, 2, 8)
    shapes = {
        "sample": [[b, 4, SIZE, SIZE] for b in batches],
        "timestep_index": [[b] for b in batches],
        "encoder_hidden_states": [[b, TOKENS, CHANNELS] for b in batches],
        "act_scales": [[ROWS, 2]] * 3,
    }
    request = {"library": "tensorrt_rtx", "onnx": str(path), "shapes": shapes, "out": str(folder / "plan")}
    return request | {"options": options}


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rtx_builds_ahead_of_time_with_a_dynamic_batch(graph_of: GraphOf, tmp_path: Path, weights: str) -> None:
    graph = graph_of("fp16", weights)
    options = BuildOptions(profile=ShapeProfile(1, 2, 8))
    engine = build_engine(graph, tmp_path / "engine", backend="tensorrt_rtx", options=options)
    bits = {layer.name: layer.weight_storage_bits for layer in engine.layers}
    packed = 4 if weights == "int4" else 8
    assert bits == {"conv_in": packed, "conv": 8, "to_q": packed, "conv_out": 16}
    assert engine.environment["device"] == "CUDA GPU"
    assert engine.engine_files == ("denoiser.plan",)
    assert {layer.compute for layer in engine.layers} == {"unknown"} or has_gpu()
    if not has_gpu():
        with pytest.raises(MissingEnvironmentError, match="GPU"):
            load_engine(engine, graph)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_an_int4_conv_with_int8_activations_fails_in_the_builder(tmp_path: Path) -> None:
    """Why the canonical graph is not given to TensorRT-RTX as it is."""
    with pytest.raises(EngineBuildError, match=r"\Athe build failed: \[E\] IBuilder") as caught:
        call_in_child(BUILDER, child_request(tmp_path, small_model("fp16", "int4")), Limits(120))
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
        call_in_child(BUILDER, child_request(tmp_path, model), Limits(120))


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_rtx_builds_for_any_number_of_rows(tmp_path: Path) -> None:
    """As the input form of the time table needs it: schedules are bound when the engine is loaded."""
    model = small_model("fp16", "int8")
    scales = next(value for value in model.graph.input if value.name == "act_scales")
    scales.type.tensor_type.shape.dim[0].dim_param = "timesteps"
    specs = [spec_of(value) for value in ir.from_proto(model).graph.inputs]
    request = child_request(tmp_path, model) | {"shapes": profile_shapes(specs, ShapeProfile(1, 2, 8), timesteps=1000)}
    call_in_child(BUILDER, request, Limits(240))
    assert (tmp_path / "plan").stat().st_size > 100_000


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("option", ["refit", "stripped"])
def test_without_a_driver_the_builder_makes_no_refittable_plan(tmp_path: Path, option: str) -> None:
    """Why such builds are refused before they start."""
    if has_gpu():
        pytest.skip("needs a machine without a GPU")
    request = child_request(tmp_path, small_model("fp16", "int8"), **{option: True})
    with pytest.raises(EngineBuildError, match="CUDA_SUCCESS"):
        call_in_child(BUILDER, request, Limits(240))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("options", [BuildOptions(refit=True), BuildOptions(stripped=True)])
def test_refittable_engines_are_refused_where_they_cannot_be_built(
    graph_of: GraphOf, tmp_path: Path, options: BuildOptions
) -> None:
    if not has_gpu():
        with pytest.raises(MissingEnvironmentError, match="beside a GPU's driver"):
            build_engine(graph_of("fp16", "int8"), tmp_path / "out", backend="tensorrt_rtx", options=options)
    with pytest.raises(InputError, match="onnxruntime engines cannot be refitted"):
        build_engine(graph_of("fp16", "int8"), tmp_path / "out", backend="onnxruntime", options=options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("rtx")
def test_which_gpus_run_tensorrt_rtx_is_the_librarys_own_list() -> None:
    for runs in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)):
        assert refusal("tensorrt_rtx", runs) is None
    for capability in ((7, 0), (8, 7), (9, 0), (10, 0)):
        said = str(refusal("tensorrt_rtx", capability))
        assert "runs on compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1 and later" in said
        assert said.endswith("not on {}.{}: build with --backend tensorrt".format(*capability))


def test_tensorrt_runs_on_any_gpu_but_needs_one() -> None:
    assert refusal("tensorrt", (9, 0)) is None
    assert "needs a CUDA GPU" in str(refusal("tensorrt", None))


@pytest.mark.parametrize(
    ("key", "value"), [("tensorrt_rtx", "0.1.0"), ("device", "TPU"), ("compute_capability", "7.0")]
)
def test_another_version_or_device_is_refused_before_the_plan_is_read(
    engine_of: EngineOf, key: str, value: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    built_for = backend_by_name("tensorrt_rtx").environment() | {key: value}
    plan = replace(engine_of("onnxruntime", "reference", "int8"), backend="tensorrt_rtx", environment=built_for)
    with pytest.raises(MissingEnvironmentError, match=f"needs {key} {value}, here it is "):
        load_engine(plan)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((9, 4, 8, 8), "larger profile"), ((2, 4, 16, 16), "this engine takes"), ((0, 4, 8, 8), "this engine takes")],
)
def test_shapes_outside_the_profile_are_refused(shape: tuple[int, ...], message: str) -> None:
    check_shape("sample", (8, 4, 8, 8), (1, 4, 8, 8), (8, 4, 8, 8))
    with pytest.raises(InputError, match=message):
        check_shape("sample", shape, (1, 4, 8, 8), (8, 4, 8, 8))


@pytest.mark.usefixtures("rtx")
def test_an_fp32_graph_is_refused_before_anything_starts(graph_of: GraphOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 graphs"):
        build_engine(graph_of("fp32", "int8"), tmp_path / "out", backend="tensorrt_rtx")


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_an_engine_runs_on_the_gpu_as_onnxruntime_does(graph_of: GraphOf, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    graph = graph_of("fp16", "int8")
    built = build_engine(
        graph, tmp_path / backend, backend=backend, options=BuildOptions(profile=ShapeProfile(1, 2, 8))
    )
    reference = build_engine(graph, tmp_path / "reference", backend="onnxruntime")
    with load_engine(built, graph) as candidate, load_engine(reference, graph) as expected:
        for batch in (1, 3, 8):
            a, b = (
                r.infer(small_inputs(batch, dtype="fp16"))["noise_pred"].astype(np.float64)
                for r in (candidate, expected)
            )
            assert 10 * np.log10((b**2).mean() / ((a - b) ** 2).mean()) > 25
        with pytest.raises(InputError, match="larger profile"):
            candidate.infer(small_inputs(9, dtype="fp16"))


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_captured_steps_equal_plain_ones_on_the_gpu(graph_of: GraphOf, tmp_path: Path, backend: str) -> None:
    """Batches alternate, rows are mixed, and every step is asked for three times: run, captured, replayed."""
    pytest.importorskip(backend)
    graph = graph_of("fp16", "int8")
    built = build_engine(
        graph, tmp_path / backend, backend=backend, options=BuildOptions(profile=ShapeProfile(1, 2, 8))
    )
    plan = open_plan(backend, (built.folder / "denoiser.plan").read_bytes(), torch.device("cuda", 0))
    bound = {"act_scales": built.scales.scales}
    with TensorRtRunner(plan, bound, capture=False) as plain, TensorRtRunner(plan, bound) as captured:
        for batch, seed in ((1, 1), (3, 2), (1, 3), (3, 4), (1, 5), (3, 6)):
            inputs = small_inputs(batch, seed, dtype="fp16")
            expected = plain.infer(inputs)["noise_pred"]
            assert np.array_equal(captured.infer(inputs)["noise_pred"], expected)
            on_device = captured.infer_tensors(on_the_gpu(inputs))["noise_pred"]
            assert on_device.is_cuda
            assert np.array_equal(on_device.cpu().numpy(), expected)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_mixed_rows_equal_lone_runs_on_the_gpu(graph_of: GraphOf, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    graph = graph_of("fp16", "int8")
    built = build_engine(
        graph, tmp_path / backend, backend=backend, options=BuildOptions(profile=ShapeProfile(1, 2, 8))
    )
    inputs = small_inputs(4, dtype="fp16")
    with load_engine(built, graph) as runner:
        together = runner.infer(inputs)["noise_pred"].astype(np.float64)
        lone = [runner.infer({n: v[i : i + 1] for n, v in inputs.items()})["noise_pred"] for i in range(4)]
    difference = together - np.concatenate(lone).astype(np.float64)
    assert 10 * np.log10((together**2).mean() / max((difference**2).mean(), 1e-30)) > 25


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_stripped_engine_gets_its_weights_from_the_graph_on_the_gpu(
    graph_of: GraphOf, tmp_path: Path, backend: str
) -> None:
    pytest.importorskip(backend)
    graph = graph_of("fp16", "int8")
    whole = build_engine(graph, tmp_path / "whole", backend=backend, options=BuildOptions(refit=True))
    stripped = build_engine(graph, tmp_path / "stripped", backend=backend, options=BuildOptions(stripped=True))
    with load_engine(whole, graph) as first, load_engine(stripped, graph) as second:
        a, b = (runner.infer(small_inputs(2, dtype="fp16"))["noise_pred"] for runner in (first, second))
    assert np.array_equal(a, b)
    assert (whole.folder / "layers.json").is_file()


def test_types_are_read_in_the_words_of_every_version() -> None:
    tensors = [
        {"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"},
        {"Format/Datatype": "Row major linear FP16 format"},
        {"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"},
        {"Format": "Row major linear", "DataType": "BFloat16"},
        {"Format/Datatype": "N/A due to dynamic shapes"},
    ]
    layer = {"Name": "x", "LayerType": "kgen", "Inputs": tensors, "Outputs": [], "Metadata": "[ONNX Layer: a/Conv]"}
    (row,) = layer_table(json.dumps({"Layers": [layer, "a name alone"]}))
    assert row["inputs"] == ["int8", "fp16", "fp32", "bf16", None]
    assert (row["name"], row["kind"], row["nodes"], row["outputs"]) == ("x", "kgen", ["a/Conv"], [])


def test_a_network_is_built_on_the_gpu_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "s2p_deploy.engines.tensorrt.backend.call_in_child", lambda _name, message, _limits: sent.append(message)
    )
    backend = backend_by_name("tensorrt_rtx")
    made = backend.write_network(tmp_path / "vae_decoder.onnx", tmp_path, {}, Execution(), "cuda:1")
    assert made.files == ("vae_decoder.plan",)
    assert [message["device"] for message in sent] == ["cuda:1"]


def test_outputs_have_the_shapes_that_the_plan_infers() -> None:
    """As for networks whose outputs have other sizes than their inputs, an autoencoder's say; asked once per shapes."""
    asked: list[tuple[str, tuple[int, ...]]] = []
    context = SimpleNamespace(
        set_input_shape=lambda name, shape: asked.append((name, shape)),
        get_tensor_shape=lambda _name: [asked[-1][1][0], 3, 8 * asked[-1][1][2], 8 * asked[-1][1][3]],
    )
    plan = SimpleNamespace(
        library=SimpleNamespace(
            __name__="tensorrt", ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2)
        ),
        engine=SimpleNamespace(create_execution_context=lambda strategy: context if strategy == 2 else None),
    )
    shapes = OutputShapes(plan, ("image",))
    assert shapes.at({"latents": (2, 4, 8, 16)}) == {"image": (2, 3, 64, 128)}
    assert shapes.at({"latents": (2, 4, 8, 16)}) == {"image": (2, 3, 64, 128)}
    assert len(asked) == 1
    assert shapes.at({"latents": (1, 4, 8, 8)}) == {"image": (1, 3, 64, 64)}
    plan.engine.create_execution_context = lambda _strategy: None
    with pytest.raises(EngineBuildError, match="tensorrt made no execution context"):
        OutputShapes(plan, ("image",))


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
        call_in_child(BUILDER, request, Limits(120))
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


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_rtx_builds_low_rank_branches_whose_matrices_are_inputs(tmp_path: Path) -> None:
    request = LoraRequest(8, LORA_KINDS)
    graph = export_graph(tiny_calibrated(tmp_path / "calib"), tmp_path / "graph", dtype="fp16", lora=request)
    options = BuildOptions(profile=ShapeProfile(1, 2, 4))
    engine = build_engine(graph, tmp_path / "engine", backend="tensorrt_rtx", options=options)
    assert engine.lora is not None
    assert {slot.op for slot in engine.lora.layers} == {"conv", "linear"}
    assert {spec.name for spec in engine.inputs} >= {LORA_DOWN, LORA_UP, LORA_STRENGTHS}
