from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import graph_from_text
from onnx.reference import ReferenceEvaluator

from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.passes.float32_layers import Float32Layers
from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec
from s2p_deploy.export.passes.weights import StoredWeights
from s2p_deploy.export.regions import LayerNode
from s2p_deploy.numerics import INT8
from s2p_deploy.records import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable

# Two convolutions read one tensor; in the rescaled domain the first one's result is beyond FP16.
GRAPH = """
g (
    float16[batch,2,4,4] sample, int64[batch] timestep_index, float16[batch,1,2] encoder_hidden_states,
    float16[3,2,3,3] a__weight, float16[3] a__bias, float16[3,2,3,3] b__weight
) => (float16[batch,3,4,4] noise_pred) {
    y = Conv <pads: ints = [1, 1, 1, 1]> (sample, a__weight, a__bias)
    z = Conv <pads: ints = [1, 1, 1, 1]> (sample, b__weight)
    noise_pred = Add(y, z)
}
"""
SCALES = np.asarray([[0.01], [1.0]], np.float32)
REFERENCE_SCALE = 0.1
LARGE, SMALL = 400.0, 0.5  # |sum of codes * c| <= 128 * 0.1 * 18 * weight


def lowered(full: tuple[str, ...], weights: str) -> ir.Model:
    stored = {
        "a__weight": np.full((3, 2, 3, 3), LARGE, np.float16),
        "a__bias": np.ones(3, np.float16),
        "b__weight": np.full((3, 2, 3, 3), SMALL, np.float16),
    }
    model = graph_from_text(GRAPH, stored)
    graph = model.graph
    first, second, _ = graph
    for node in (first, second):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch", 3, 4, 4]), ir.TensorType(ir.DataType.FLOAT16)
    layers = [
        LayerNode(LayerPlan(name, "conv", weights, "a", ""), node, None) for name, node in (("a", first), ("b", second))
    ]
    rows = GatherScales((QuantizerSpec("a", REFERENCE_SCALE, 4),), 2, ir.DataType.FLOAT16)
    tensors = {f"network.{key.replace('__', '.')}": value.astype(np.float32) for key, value in stored.items()}
    scales = {name: np.full((3, 1, 1, 1), top / 127, np.float32) for name, top in (("a", LARGE), ("b", SMALL))}
    keys = {value: (f"network.{name}", False) for name, value in graph.initializers.items()}
    StoredWeights(keys, tensors.__getitem__, ir.DataType.FLOAT16, layers, scales)(model)
    rows(model)
    lower_rescale(graph, "a", INT8, layers, rows.scales["a"])
    Float32Layers([layer for layer in layers if layer.plan.name in full])(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("weights", ["int8", "none"])
def test_what_overflows_in_half_is_right_in_full(weights: str, run_onnx: Callable) -> None:
    given = {
        "sample": np.full((2, 2, 4, 4), 1.2, np.float16),
        "timestep_index": np.asarray([0, 1]),
        "encoder_hidden_states": np.zeros((2, 1, 2), np.float16),
        "act_scales": SCALES,
    }
    # ONNX Runtime on the CPU has no half convolution and goes on in float32 by itself; ONNX's reference has one
    (plain,) = ReferenceEvaluator(ir.to_proto(lowered((), weights))).run(None, given)
    assert np.isinf(plain[0]).any()
    full = ir.to_proto(lowered(("a",), weights))
    (found,) = ReferenceEvaluator(full).run(None, given)
    np.testing.assert_allclose(run_onnx(full, given)["noise_pred"], found, rtol=2e-3)
    # the tensor is 1.2 on the first row (120 codes of 0.01) and 1 on the second; corners see 4 of 9 pixels
    expected = np.asarray([1.2, 1.0]) * 2 * 4 * (LARGE + SMALL) + 1
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, rtol=2e-3)
    assert np.isfinite(found).all()


def test_the_other_layer_of_the_point_stays_in_half() -> None:
    nodes = {str(node.name): node for node in lowered(("a",), "int8").graph}
    types = {name: nodes[name].outputs[0].dtype.name for name in nodes if nodes[name].outputs[0].dtype is not None}
    assert types["a/input_quantizer/dequantized"] == "FLOAT16"
    assert types["a/input_quantizer/dequantized_fp32"] == "FLOAT"
    assert types["a/rescaled"] == "FLOAT"
    assert types["a/rescaled/cast"] == "FLOAT16"
    assert nodes["a/biased"].inputs[0] is nodes["a/rescaled/cast"].outputs[0]
    assert nodes["a/input_quantizer/codes"].outputs[0].dtype == ir.DataType.INT8
    assert types["b/weight_quantizer/DequantizeLinear"] == "FLOAT16"


def test_a_dequantizer_that_nobody_reads_goes() -> None:
    names = [node.name for node in lowered(("a", "b"), "int8").graph]
    assert "a/input_quantizer/dequantized" not in names
    assert names.count("a/input_quantizer/dequantized_fp32") == 1
