"""Gives activation quantizers the lowering ``runtime_q``: QuantizeLinear divides by the timestep's own scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_quantizers import remove_unread, rescaled_quantizers
from s2p_deploy.export.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.engines.passes.rescaled_quantizers import RescaledQuantizer

_PREFIX = "act_scales/of_batch"


class RuntimeQuantize(ir.passes.InPlacePass):
    """Quantizers in ``columns`` (with their column of the scale table) lose the multiplication before Q.

        x·(c/s) → Q(c) → DQ(c) → op → ·(s/c)      becomes      x → Q(s) → DQ(c) → op → ·(s/c)

    Q has one scale for the whole tensor: s is the first sample's, so all samples of a batch need one timestep. Bounds
    of a Clip before Q become multiples of s. DQ keeps its constant: a runtime scale there kills TensorRT-RTX's builder.

    Requires: named quantizers have the form ``rescale``; inputs ``act_scales`` and ``timestep_index``. Ensures: nothing
        reads c/s of a named quantizer; every DequantizeLinear has a constant scale.
    """

    def __init__(self, columns: Mapping[str, int]) -> None:
        super().__init__()
        self.columns = columns

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the quantizers."""
        quantizers = rescaled_quantizers(model.graph, self.columns)
        if not quantizers:
            return ir.passes.PassResult(model, modified=False)
        a_scale = next(iter(quantizers.values())).quantize.inputs[1]
        assert a_scale is not None
        assert a_scale.dtype is not None
        scales = _batch_scales(model.graph, [self.columns[name] for name in quantizers], a_scale.dtype)
        for (name, quantizer), scale in zip(quantizers.items(), scales, strict=True):
            scale.name = f"{name}/scale"
            _quantize_by(model.graph, quantizer, scale)
        remove_unread(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks that dequantizers kept their constants."""
        for node in model.graph:
            scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
            if scale is not None and not scale.is_initializer():
                raise ir.passes.PostconditionError(f"{node.name}: its scale is not a constant")


def _batch_scales(graph: ir.Graph, columns: Sequence[int], dtype: ir.DataType) -> Sequence[ir.Value]:
    """Adds scalars of the graph's dtype: each column's scale at the first sample's timestep, cut out together."""
    inputs = {value.name: value for value in graph.inputs}
    stored = {
        "first": constant(f"{_PREFIX}/first", np.asarray(0, np.int64)),
        "columns": constant(f"{_PREFIX}/columns", np.asarray(columns, np.int64)),
        "axis": constant(f"{_PREFIX}/axis", np.zeros(1, np.int64)),
    }
    for value in stored.values():
        graph.initializers.add(value)
    nodes = [_node("Gather", [inputs["timestep_index"], stored["first"]], f"{_PREFIX}/timestep_index", axis=0)]
    nodes.append(_node("Gather", [inputs["act_scales"], nodes[-1].outputs[0]], f"{_PREFIX}/at_timestep", axis=0))
    nodes.append(_node("Gather", [nodes[-1].outputs[0], stored["columns"]], f"{_PREFIX}/quantizers", axis=0))
    if dtype != ir.DataType.FLOAT:
        nodes.append(_node("Cast", nodes[-1].outputs, f"{_PREFIX}/cast", to=dtype.value))
    count = len(columns)
    split = ir.node(
        "Split",
        nodes[-1].outputs,
        {"axis": 0, "num_outputs": count},
        num_outputs=count,
        name=f"{_PREFIX}/split",
    )
    squeezes = []
    for index, scale in enumerate(split.outputs):
        scale.name = f"{_PREFIX}/split.{index}"
        squeezes.append(_node("Squeeze", [scale, stored["axis"]], f"{_PREFIX}/scale.{index}"))
        squeezes[-1].outputs[0].type, squeezes[-1].outputs[0].shape = ir.TensorType(dtype), ir.Shape([])
    graph.insert_before(next(iter(graph)), [*nodes, split, *squeezes])
    return [node.outputs[0] for node in squeezes]


def _quantize_by(graph: ir.Graph, quantizer: RescaledQuantizer, scale: ir.Value) -> None:
    source, reference_scale = quantizer.scaled.inputs[0], quantizer.quantize.inputs[1]
    assert source is not None
    assert reference_scale is not None
    assert reference_scale.const_value is not None  # the contract: constants
    if quantizer.clip is not None:
        for index in (1, 2):
            bound = quantizer.clip.inputs[index]
            assert bound is not None
            assert bound.const_value is not None
            level = np.rint(bound.const_value.numpy() / reference_scale.const_value.numpy())
            limit = constant(f"{bound.name}/level", level.astype(reference_scale.const_value.numpy().dtype))
            graph.initializers.add(limit)
            product = _node("Mul", [scale, limit], f"{bound.name}/scaled")
            graph.insert_before(quantizer.clip, product)
            quantizer.clip.replace_input_with(index, product.outputs[0])
    ir.convenience.replace_all_uses_with(quantizer.scaled.outputs[0], source)
    quantizer.quantize.replace_input_with(1, scale)


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    return node
