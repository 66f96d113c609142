from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from graph_text import graph_from_text

from s2p_deploy.export.passes.transposed_keys import TransposedKeys

if TYPE_CHECKING:
    from collections.abc import Callable

# What torch's exporter writes for scaled_dot_product_attention, with the shape arithmetic cut short.
GRAPH = """
g (float[batch,2,3,4] queries, float[batch,2,5,4] keys, int64[3] flat, int64[4] whole) => (float[batch,2,3,5] out) {
    a = Reshape(keys, flat)
    b = Transpose <perm: ints = [0, 2, 1]> (a)
    c = Reshape(b, whole)
    scores = MatMul(queries, c)
    out = Softmax <axis: int = -1> (scores)
}
"""


def test_three_nodes_become_one_transpose_with_the_same_result(run_onnx: Callable) -> None:
    generator = np.random.default_rng(0)
    values = {
        "queries": generator.standard_normal((2, 2, 3, 4)).astype(np.float32),
        "keys": generator.standard_normal((2, 2, 5, 4)).astype(np.float32),
        "flat": np.asarray([4, 5, 4]),
        "whole": np.asarray([2, 2, 4, 5]),
    }
    model = graph_from_text(GRAPH, {})
    before = run_onnx(ir.to_proto(model), values)["out"]
    assert TransposedKeys()(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Softmax"]
    assert str(next(iter(model.graph)).outputs[0].shape) == "[batch,2,4,5]"
    assert str(model.graph.node(1).outputs[0].shape) == "[batch,2,3,5]"
    np.testing.assert_array_equal(run_onnx(ir.to_proto(model), values)["out"], before)


def test_a_value_that_someone_else_reads_is_left_alone() -> None:
    model = graph_from_text(GRAPH.replace("out = Softmax", "unused = Identity(b)\n    out = Softmax"), {})
    assert not TransposedKeys()(model).modified
    assert len(model.graph) == 6
