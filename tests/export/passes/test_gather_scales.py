from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_from_text

from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = """
g (float[batch,2] sample, int64[batch] timestep_index, float[batch,2] encoder_hidden_states) => (float[batch,2]
noise_pred) { noise_pred = Identity(sample) }
"""
POINTS = (QuantizerSpec("a", 2.0, 4), QuantizerSpec("b", 4.0, 3), QuantizerSpec("c", 8.0, 4))
SCALES = np.asarray([[1, 2, 4], [8, 8, 8]], np.float32)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_every_point_gets_its_own_ratios_of_each_samples_row(dtype: ir.DataType, run_onnx: Callable) -> None:
    model = graph_from_text(GRAPH, {})
    rows = GatherScales(POINTS, 2, dtype)
    assert rows(model).modified
    for scales in rows.scales.values():
        model.graph.outputs.extend([scales.to_reference, scales.from_reference])
    unused = np.zeros((3, 2), np.float32)
    given = {"sample": unused, "encoder_hidden_states": unused, "timestep_index": np.asarray([1, 0, 1])}
    found = run_onnx(ir.to_proto(model), given | {"act_scales": SCALES})
    for column, quantizer in enumerate(POINTS):
        trailing = (1,) * (quantizer.rank - 1)
        expected = SCALES[[1, 0, 1], column].reshape(3, *trailing) / quantizer.reference_scale
        from_reference = found[f"{quantizer.name}/input_quantizer/from_reference"]
        assert from_reference.dtype == dtype.numpy()
        np.testing.assert_array_equal(from_reference, expected)
        np.testing.assert_array_equal(found[f"{quantizer.name}/input_quantizer/to_reference"], 1 / expected)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["Gather"] == 3
    assert counts["Split"] == 4
    assert counts["Cast"] == (0 if dtype == ir.DataType.FLOAT else 4)


def test_no_points_change_nothing() -> None:
    model = graph_from_text(GRAPH, {})
    assert not GatherScales((), 2, ir.DataType.FLOAT)(model).modified
    assert len(model.graph.inputs) == 3


def test_rows_need_a_timestep_index() -> None:
    model = graph_from_text(GRAPH.replace("timestep_index", "other"), {})
    with pytest.raises(ir.passes.PreconditionError, match="no input timestep_index"):
        GatherScales(POINTS, 2, ir.DataType.FLOAT)(model)
