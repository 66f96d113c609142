from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_from_text

from s2p_deploy.export.passes.scale_rows import PointSpec, ScaleRows

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = """
g (float[batch,2] sample, int64[batch] step_index, float[batch,2] encoder_hidden_states) => (float[batch,2] noise_pred)
{ noise_pred = Identity(sample) }
"""
POINTS = (PointSpec("a", 2.0, 4), PointSpec("b", 4.0, 3), PointSpec("c", 8.0, 4))
SCALES = np.asarray([[1, 2, 4], [8, 8, 8]], np.float32)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_every_point_gets_its_own_ratios_of_each_samples_row(dtype: ir.DataType, run_onnx: Callable) -> None:
    model = graph_from_text(GRAPH, {})
    rows = ScaleRows(POINTS, 2, dtype)
    assert rows(model).modified
    for scales in rows.scales.values():
        model.graph.outputs.extend([scales.to_centre, scales.from_centre])
    unused = np.zeros((3, 2), np.float32)
    given = {"sample": unused, "encoder_hidden_states": unused, "step_index": np.asarray([1, 0, 1])}
    found = run_onnx(ir.to_proto(model), given | {"act_scales": SCALES})
    for column, point in enumerate(POINTS):
        trailing = (1,) * (point.rank - 1)
        expected = SCALES[[1, 0, 1], column].reshape(3, *trailing) / point.centre
        from_centre = found[f"{point.name}/input_quantizer/from_centre"]
        assert from_centre.dtype == dtype.numpy()
        np.testing.assert_array_equal(from_centre, expected)
        np.testing.assert_array_equal(found[f"{point.name}/input_quantizer/to_centre"], 1 / expected)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["Gather"] == 3
    assert counts["Split"] == 4
    assert counts["Cast"] == (0 if dtype == ir.DataType.FLOAT else 4)


def test_no_points_change_nothing() -> None:
    model = graph_from_text(GRAPH, {})
    assert not ScaleRows((), 2, ir.DataType.FLOAT)(model).modified
    assert len(model.graph.inputs) == 3


def test_rows_need_a_step_index() -> None:
    model = graph_from_text(GRAPH.replace("step_index", "other"), {})
    with pytest.raises(ir.passes.PreconditionError, match="no input step_index"):
        ScaleRows(POINTS, 2, ir.DataType.FLOAT)(model)
