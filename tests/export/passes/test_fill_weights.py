from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graph_text import graph_from_text

from s2p_deploy.export.passes.fill_weights import FillWeights

GRAPH = """
g (
    float[batch,2] sample, float[3,2] network__fc__weight, float[3] network__fc__bias, float three
) => (float[batch,3] out) {
    turned = Transpose <perm: ints = [1, 0]> (network__fc__weight)
    a = MatMul(sample, turned)
    b = Mul(a, three)
    out = Add(b, network__fc__bias)
}
"""


def test_parameters_get_data_matrices_turn_and_constants_stay() -> None:
    matrix, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(3, np.float32)
    weights = {"network.fc.weight": matrix, "network.fc.bias": bias}
    stored = {"network__fc__weight": None, "network__fc__bias": None, "three": np.asarray(3, np.float32)}
    model = graph_from_text(GRAPH, stored)
    graph = model.graph
    FillWeights(weights.__getitem__, ir.DataType.FLOAT16)(model)
    assert [node.op_type for node in graph] == ["MatMul", "Mul", "Add"]
    assert set(graph.initializers) == {"fc.weight", "fc.bias", "three"}
    weight = graph.initializers["fc.weight"].const_value
    assert weight is not None
    assert weight.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(weight.numpy(), matrix.T)
    assert graph.node(0).inputs[1] is graph.initializers["fc.weight"]
