"""ONNX Runtime and OpenVINO on one graph: numbers, rows, precisions."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from s2p_deploy.engines import layers_not_int8, load_engine, runner_for_subgraph
from s2p_deploy.engines.machine import cpu_flags, int8_products_overflow
from s2p_deploy.engines.onnxruntime.backend import compute_types
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.records import Execution
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import build_options, small_inputs, small_model, small_scales

needs_vnni = pytest.mark.skipif(
    int8_products_overflow(), reason="without VNNI quantized layers are computed in floating point"
)
needs_bf16 = pytest.mark.skipif(not cpu_flags() & {"avx512_bf16", "amx_bf16"}, reason="this CPU has no bf16 products")
MODES = [("onnxruntime", "reference"), ("onnxruntime", "full"), ("openvino", "f32"), ("openvino", "bf16")]


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((a**2).mean() / max(((a - b) ** 2).mean(), 1e-30)))


def plain_onnxruntime(weights: str) -> np.ndarray:
    """The canonical graph as it is, without this package."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(small_model(weights=weights).SerializeToString(), options)
    result: np.ndarray = session.run(None, small_inputs() | {"act_scales": small_scales()})[0]
    return result


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("backend", "mode"), MODES)
def test_engines_agree_with_the_canonical_graph(engine_of: EngineOf, backend: str, mode: str, weights: str) -> None:
    with load_engine(engine_of(backend, mode, weights)) as runner:
        gc.collect()  # memory that only the loader held would be gone now
        first, again = (runner.infer(small_inputs())["noise_pred"] for _ in range(2))
    assert np.array_equal(first, again)
    assert sqnr(plain_onnxruntime(weights), first) > (30 if mode == "bf16" else 45)


@pytest.mark.parametrize(
    ("backend", "mode", "batch"),
    [("onnxruntime", "reference", 2), ("onnxruntime", "reference", 4), ("openvino", "f32", 4)],
)
def test_a_batch_of_mixed_rows_equals_single_calls(engine_of: EngineOf, backend: str, mode: str, batch: int) -> None:
    inputs = small_inputs(batch)
    with load_engine(engine_of(backend, mode, "int8")) as runner:
        together = runner.infer(inputs)["noise_pred"]
        single = [runner.infer({n: v[i : i + 1] for n, v in inputs.items()})["noise_pred"] for i in range(batch)]
        shifted = runner.infer(inputs | {"timestep_index": inputs["timestep_index"][::-1]})["noise_pred"]
    assert np.array_equal(together, np.concatenate(single))
    assert not np.array_equal(together, shifted)  # the row does matter


def test_openvinos_tuned_batch_agrees_with_its_other_sizes(engine_of: EngineOf) -> None:
    """Fixed shapes (batch 2) and dynamic ones choose other float kernels: close, not equal."""
    inputs = small_inputs(2)
    with load_engine(engine_of("openvino", "f32", "int8")) as runner:
        tuned = runner.infer(inputs)["noise_pred"]
        single = [runner.infer({n: v[i : i + 1] for n, v in inputs.items()})["noise_pred"] for i in range(2)]
    assert sqnr(np.concatenate(single), tuned) > 45


def test_openvino_compiles_for_every_batch_that_it_is_told_of(engine_of: EngineOf) -> None:
    inputs = small_inputs(4)
    with load_engine(engine_of("openvino", "f32", "int8")) as runner:
        dynamic = runner.infer(inputs)["noise_pred"]
        runner.tune(4)
        tuned = runner.infer(inputs)["noise_pred"]
        again = runner.infer(inputs)["noise_pred"]
    assert sqnr(dynamic, tuned) > 45
    np.testing.assert_array_equal(tuned, again)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("mode", ["f32", pytest.param("bf16", marks=needs_bf16)])
@needs_vnni
def test_openvino_runs_every_planned_layer_in_int8(
    engine_of: EngineOf, graph_of: GraphOf, weights: str, mode: str
) -> None:
    engine = engine_of("openvino", mode, weights)
    assert layers_not_int8(engine, graph_of("fp32", weights).plan) == ()
    compute = {layer.name: layer.compute for layer in engine.layers}
    floating = "fp32" if mode == "f32" else "bf16"
    assert compute == {"conv_in": floating, "conv": "int8", "to_q": "int8", "conv_out": floating}


def test_the_reference_computes_in_float_and_says_so(engine_of: EngineOf, graph_of: GraphOf) -> None:
    engine = engine_of("onnxruntime", "reference", "int8")
    assert {layer.compute for layer in engine.layers} == {"fp32"}
    assert layers_not_int8(engine, graph_of("fp32", "int8").plan) == ("conv", "to_q")


@pytest.mark.parametrize(("backend", "mode"), [("onnxruntime", "full"), ("openvino", "f32")])
def test_quantized_layers_are_computed_in_float_where_int8_products_overflow(
    graph_of: GraphOf, backend: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"s2p_deploy.engines.{backend}.backend.int8_products_overflow", lambda: True)
    model = ir.from_proto(small_model())
    with runner_for_subgraph(model, backend, build_options(mode).execution) as runner:
        output = runner.infer(small_inputs() | {"act_scales": small_scales()})["noise_pred"]
    assert sqnr(plain_onnxruntime("int8"), output) > 60


@needs_vnni
def test_full_optimization_has_an_integer_matmul(engine_of: EngineOf) -> None:
    compute = {layer.name: layer.compute for layer in engine_of("onnxruntime", "full", "int8").layers}
    assert (compute["conv"], compute["to_q"]) == ("fp32", "int8")


def test_compute_is_the_type_of_a_kernels_first_input() -> None:
    events = [
        {
            "cat": "Node",
            "name": "a/MatMul_kernel_time",
            "args": {"input_type_shape": [{"uint8": [1, 2]}, {"int8": [2]}]},
        },
        {"cat": "Node", "name": "b/Conv_kernel_time", "args": {"input_type_shape": [{"float": [1]}]}},
        {"cat": "Session", "name": "model_run", "args": {}},
    ]
    assert compute_types(events) == {"a/MatMul": "int8", "b/Conv": "fp32"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_fp16_graph_runs_too(graph_of: GraphOf, backend: str) -> None:
    inputs = small_inputs(dtype="fp16") | {"act_scales": small_scales()}
    with runner_for_subgraph(ir.from_proto(small_model("fp16")), backend) as runner:
        output = runner.infer(inputs)["noise_pred"]
    assert output.dtype == np.float16
    assert sqnr(plain_onnxruntime("int8"), output) > 20


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_subgraph_takes_the_engines_way(engine_of: EngineOf, backend: str, weights: str) -> None:
    mode = "reference" if backend == "onnxruntime" else "f32"
    model = ir.from_proto(small_model(weights=weights))
    before = ir.to_proto(model).SerializeToString()
    with runner_for_subgraph(model, backend) as part, load_engine(engine_of(backend, mode, weights)) as whole:
        gc.collect()
        expected = whole.infer(small_inputs())["noise_pred"]
        found = part.infer(small_inputs() | {"act_scales": small_scales()})["noise_pred"]
    assert np.array_equal(expected, found)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_subgraph_may_have_more_weights_than_one_message_holds(tmp_path: Path, backend: str) -> None:
    """2.2 GB, as a block of SDXL in float32; protobuf's limit is 2 GiB. The file of zeros has holes."""
    count = 1_100_000_000
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2 * count)
    int8 = ir.TensorType(ir.DataType.INT8)
    index = ir.Value(name="index", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    weights, outputs, nodes = [], [], []
    for at, name in enumerate(("first", "second")):
        tensor = ir.ExternalTensor(
            "weights", at * count, count, ir.DataType.INT8, name=name, shape=ir.Shape([count]), base_dir=tmp_path
        )
        weights.append(ir.Value(name=name, const_value=tensor, shape=ir.Shape([count]), type=int8))
        outputs.append(ir.Value(name=f"of {name}", shape=ir.Shape(["batch"]), type=int8))
        nodes.append(ir.Node("", "Gather", [weights[-1], index], outputs=[outputs[-1]]))
    graph = ir.Graph([index], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21})
    with runner_for_subgraph(ir.Model(graph, ir_version=10), backend) as runner:
        found = runner.infer({"index": np.asarray([3, count - 1])})
    assert {name: value.tolist() for name, value in found.items()} == {"of first": [0, 0], "of second": [0, 0]}


def test_a_subgraph_needs_a_known_backend() -> None:
    with pytest.raises(InputError, match="unknown backend"):
        runner_for_subgraph(ir.from_proto(small_model()), "nonsense")
    with pytest.raises(InputError, match="no precision"):
        runner_for_subgraph(ir.from_proto(small_model()), "openvino", Execution("f8"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_closed_runner_says_so(engine_of: EngineOf, backend: str) -> None:
    runner = load_engine(engine_of(backend, "reference" if backend == "onnxruntime" else "f32", "int8"))
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.infer(small_inputs())


def test_a_missing_library_is_a_missing_environment(graph_of: GraphOf) -> None:
    from s2p_deploy.engines import backend_by_name

    missing = [name for name in ("tensorrt", "tensorrt_rtx") if backend_by_name(name).capabilities().missing]
    for name in missing:
        with pytest.raises(MissingEnvironmentError, match="pip install") as caught:
            runner_for_subgraph(ir.from_proto(small_model("fp16")), name)
        assert caught.value.exit_code == 4
