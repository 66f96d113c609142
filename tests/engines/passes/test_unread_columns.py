"""Structure and numbers: the ratio part keeps what is read, under the same names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.unread_columns import UnreadColumns
from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec
from tests.engines.passes.reference_run import run_reference
from tests.graph_text import graph_from_text

GRAPH = """
g (float[batch,2] sample, int64[batch] timestep_index, float[batch,2] encoder_hidden_states) => (float[batch,2]
noise_pred) { noise_pred = Identity(sample) }
"""
POINTS = (
    QuantizerSpec("a", 2.0, 4),
    QuantizerSpec("b", 4.0, 3),
    QuantizerSpec("c", 8.0, 4),
    QuantizerSpec("d", 16.0, 4),
)
SCALES = np.asarray([[1, 2, 4, 3], [8, 8, 8, 5]], np.float32)


def with_ratios(names: tuple[str, ...], dtype: ir.DataType) -> ir.Model:
    """A graph whose outputs are the named ratios; the others are read by nobody."""
    model = graph_from_text(GRAPH, {})
    rows = GatherScales(POINTS, 2, dtype)
    rows(model)
    values = {str(v.name): v for s in rows.scales.values() for v in (s.to_reference, s.from_reference)}
    model.graph.outputs.extend(values[f"{name}_reference"] for name in names)
    return model


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_what_is_read_keeps_its_values(dtype: ir.DataType) -> None:
    names = ("a/input_quantizer/to", "d/input_quantizer/from", "d/input_quantizer/to")
    model = with_ratios(names, dtype)
    unused = np.zeros((3, 2), np.float32)
    given = {"sample": unused, "encoder_hidden_states": unused, "timestep_index": np.asarray([1, 0, 1])}
    before = run_reference(ir.to_proto(model), given | {"act_scales": SCALES})
    assert UnreadColumns()(model).modified
    after = run_reference(ir.to_proto(model), given | {"act_scales": SCALES})
    for name in names:
        np.testing.assert_array_equal(after[f"{name}_reference"], before[f"{name}_reference"])
    splits = {str(node.name): len(node.outputs) for node in model.graph if node.op_type == "Split"}
    assert splits == {"act_scales/rank4/to_reference/split": 2, "act_scales/rank4/from_reference/split": 2}
    gathered = {str(v.name): v.const_value.numpy().tolist() for v in model.graph.initializers.values()}
    assert gathered["act_scales/rank4/select/kept"] == [0, 3]


def test_a_group_that_nobody_reads_goes_and_so_does_the_input() -> None:
    model = with_ratios((), ir.DataType.FLOAT)
    UnreadColumns()(model)
    assert [node.op_type for node in model.graph] == ["Identity"]
    assert "act_scales" not in [value.name for value in model.graph.inputs]


def test_columns_that_are_all_read_stay() -> None:
    names = tuple(f"{quantizer.name}/input_quantizer/{way}" for quantizer in POINTS for way in ("to", "from"))
    model = with_ratios(names, ir.DataType.FLOAT)
    count = len(list(model.graph))
    assert not UnreadColumns()(model).modified
    assert len(list(model.graph)) == count
