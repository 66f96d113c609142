from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_from_text

from s2p_deploy.export.passes.time_projections import TimeProjections
from s2p_deploy.export.regions import NAME_SCOPES

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = """
g (float[batch,2] sample, int64[batch] timestep_index, float[3,2] traced) => (float[batch,2] out) {
    row = Gather(traced, timestep_index)
    out = Add(sample, row)
}
"""
TABLE = np.asarray([[0, 1], [10, 11], [20, 21]], np.float32)
VALUES = {
    "sample": np.zeros((2, 2), np.float32),
    "timestep_index": np.asarray([2, 0]),
    "time_projections": TABLE[[2, 0]],
}


def traced(module: str = "time") -> ir.Model:
    model = graph_from_text(GRAPH, {"traced": None})
    model.graph.node(0).metadata_props[NAME_SCOPES] = str(["", module, "embedding"])
    return model


@pytest.mark.parametrize(("form", "inputs"), [("constant", 2), ("input", 3)])
def test_both_forms_give_the_rows_features(form: str, inputs: int, run_onnx: Callable) -> None:
    model = traced()
    TimeProjections(TABLE, form, ir.DataType.FLOAT)(model)
    assert len(model.graph.inputs) == inputs
    assert ("time_projections" in model.graph.initializers) == (form == "constant")
    assert "traced" not in model.graph.initializers
    np.testing.assert_array_equal(run_onnx(ir.to_proto(model), VALUES)["out"], TABLE[[2, 0]])


def test_a_graph_that_reads_its_table_otherwise_is_refused() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="0 nodes read the time table"):
        TimeProjections(TABLE, "constant", ir.DataType.FLOAT)(traced("network.time_proj"))
