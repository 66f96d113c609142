from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from s2p_deploy.export.passes.fill_weights import FillWeights

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,2] sample) => (float[batch,3] out) <float[3,2] matrix, float[3] bias, float three = {3.0}> {
    turned = Transpose <perm: ints = [1, 0]> (matrix)
    a = MatMul(sample, turned)
    b = Mul(a, three)
    out = Add(b, bias)
}
"""


def test_parameters_get_data_matrices_turn_and_constants_stay(tmp_path: Path) -> None:
    matrix, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(3, np.float32)
    save_file({"unet.fc.weight": matrix, "unet.fc.bias": bias}, tmp_path / "weights.safetensors")
    model = ir.from_onnx_text(GRAPH)
    graph = model.graph
    for old, new in (("matrix", "unet.fc.weight"), ("bias", "unet.fc.bias")):
        graph.initializers[old].const_value = None
        graph.initializers[old].name = new
    FillWeights(tmp_path / "weights.safetensors", ir.DataType.FLOAT16)(model)
    assert [node.op_type for node in graph] == ["MatMul", "Mul", "Add"]
    assert set(graph.initializers) == {"fc.weight", "fc.bias", "three"}
    stored = graph.initializers["fc.weight"].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(stored.numpy(), matrix.T)
    assert graph.node(0).inputs[1] is graph.initializers["fc.weight"]
