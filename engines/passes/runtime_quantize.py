"""Gives act points the lowering ``runtime_q``: QuantizeLinear divides by the row's own scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_points import remove_unread, rescaled_points
from s2p_deploy.export.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.engines.passes.rescaled_points import RescaledPoint

_PREFIX = "act_scales/first_row"


class RuntimeQuantize(ir.passes.InPlacePass):
    """Points whose codes are in ``columns`` (with their column of the scale table) lose the multiplication before Q.

        x·(c/s) → Q(c) → DQ(c) → op → ·(s/c)      becomes      x → Q(s) → DQ(c) → op → ·(s/c)

    Q has one scale for the whole tensor: s is the first sample's, so all samples of a batch must be on one row. Bounds
    of a Clip before Q become multiples of s. DQ keeps its constant: a runtime scale there kills TensorRT-RTX's builder.

    Requires: named points have the form ``rescale``; inputs ``act_scales`` and ``step_index``. Ensures: nothing reads
    c/s of a named point; every DequantizeLinear has a constant scale.
    """

    def __init__(self, columns: Mapping[str, int]) -> None:
        super().__init__()
        self.columns = columns

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the points."""
        found = rescaled_points(model.graph, self.columns)
        if not found:
            return ir.passes.PassResult(model, modified=False)
        scales = _first_row(model.graph, [self.columns[name] for name in found], _type_of(found))
        for (name, point), scale in zip(found.items(), scales, strict=True):
            scale.name = f"{name}/scale"
            _quantize_by(model.graph, point, scale)
        remove_unread(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks that dequantizers kept their constants."""
        for node in model.graph:
            scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
            if scale is not None and not scale.is_initializer():
                raise ir.passes.PostconditionError(f"{node.name}: its scale is not a constant")


def _type_of(points: Mapping[str, RescaledPoint]) -> ir.DataType:
    source = next(iter(points.values())).quantize.inputs[1]
    assert source is not None  # its scale
    assert source.dtype is not None
    return source.dtype


def _first_row(graph: ir.Graph, columns: Sequence[int], dtype: ir.DataType) -> Sequence[ir.Value]:
    """Scalars of the graph's dtype: the first sample's scale in each column, cut out of the table together."""
    inputs = {value.name: value for value in graph.inputs}
    stored = {
        "first": constant(f"{_PREFIX}/first", np.asarray(0, np.int64)),
        "columns": constant(f"{_PREFIX}/columns", np.asarray(columns, np.int64)),
        "axis": constant(f"{_PREFIX}/axis", np.zeros(1, np.int64)),
    }
    for value in stored.values():
        graph.initializers.add(value)
    nodes = [_node("Gather", [inputs["step_index"], stored["first"]], f"{_PREFIX}/row", axis=0)]
    nodes.append(_node("Gather", [inputs["act_scales"], nodes[-1].outputs[0]], f"{_PREFIX}/all", axis=0))
    nodes.append(_node("Gather", [nodes[-1].outputs[0], stored["columns"]], f"{_PREFIX}/select", axis=0))
    if dtype != ir.DataType.FLOAT:
        nodes.append(_node("Cast", nodes[-1].outputs, f"{_PREFIX}/cast", to=dtype.value))
    parts = len(columns)
    split = ir.node(
        "Split",
        nodes[-1].outputs,
        {"axis": 0, "num_outputs": parts},
        num_outputs=parts,
        name=f"{_PREFIX}/split",
    )
    squeezes = []
    for index, part in enumerate(split.outputs):
        part.name = f"{_PREFIX}/split.{index}"
        squeezes.append(_node("Squeeze", [part, stored["axis"]], f"{_PREFIX}/scale.{index}"))
        squeezes[-1].outputs[0].type, squeezes[-1].outputs[0].shape = ir.TensorType(dtype), ir.Shape([])
    graph.insert_before(next(iter(graph)), [*nodes, split, *squeezes])
    return [node.outputs[0] for node in squeezes]


def _quantize_by(graph: ir.Graph, point: RescaledPoint, scale: ir.Value) -> None:
    source, centre = point.scaled.inputs[0], point.quantize.inputs[1]
    assert source is not None
    assert centre is not None
    assert centre.const_value is not None  # the contract: constants
    if point.clip is not None:
        for index in (1, 2):
            bound = point.clip.inputs[index]
            assert bound is not None
            assert bound.const_value is not None
            level = np.rint(bound.const_value.numpy() / centre.const_value.numpy())
            limit = constant(f"{bound.name}/level", level.astype(centre.const_value.numpy().dtype))
            graph.initializers.add(limit)
            product = _node("Mul", [scale, limit], f"{bound.name}/scaled")
            graph.insert_before(point.clip, product)
            point.clip.replace_input_with(index, product.outputs[0])
    ir.convenience.replace_all_uses_with(point.scaled.outputs[0], source)
    point.quantize.replace_input_with(1, scale)


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    return node
