"""Computes chosen layers of a half-precision graph in float32, where their products could leave the range of FP16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.tensors import FLOAT32_SUFFIX, constant, lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.export.regions import LayerNode

_WIDE = ir.DataType.FLOAT


class Float32Layers(ir.passes.InPlacePass):
    """Widens each chosen layer: types change, and values only by rounding.

        codes → DQ(c, float32) → op with weights in float32 → ·(s/c) in float32 → Cast → + bias

    Quantizers keep their scales' values, so that the codes are the same; what is float32 has a name that ends in
    ``_fp32``. Layers of the same activation quantizer that are not chosen keep their own DequantizeLinear.

    Requires: chosen layers have the form ``rescale``. Ensures: their Conv or MatMul gives float32.
    """

    def __init__(self, layers: Sequence[LayerNode]) -> None:
        super().__init__()
        self.layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the layers."""
        for layer in self.layers:
            quantizer = f"{layer.plan.activation_quantizer}/input_quantizer"
            narrow = layer.input.producer()
            assert narrow is not None  # lowered: its DequantizeLinear
            layer.node.replace_input_with(0, _wide_values(model.graph, narrow, quantizer))
            _widen_weight(model.graph, layer)
            _widen_result(model.graph, layer, quantizer)
            if not narrow.outputs[0].uses():
                model.graph.remove(narrow, safe=True)
        return ir.passes.PassResult(model, modified=bool(self.layers))

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        for layer in self.layers:
            if layer.node.outputs[0].dtype != _WIDE:
                raise ir.passes.PostconditionError(f"{layer.plan.name} is not computed in float32")


def _wide_values(graph: ir.Graph, narrow: ir.Node, quantizer: str) -> ir.Value:
    """Returns the quantizer's codes dequantized to float32, for all of its chosen layers."""
    codes, scale, zero_point = narrow.inputs
    assert codes is not None
    for reader in codes.consumers():
        if reader.outputs[0].dtype == _WIDE:
            return reader.outputs[0]
    assert scale is not None
    assert scale.const_value is not None  # the contract: a constant
    wide = constant(f"{quantizer}/scale{FLOAT32_SUFFIX}", scale.const_value.numpy().astype(np.float32))
    graph.initializers.add(wide)
    node = _wide_node(
        "DequantizeLinear", [codes, wide, zero_point], f"{quantizer}/dequantized{FLOAT32_SUFFIX}", narrow.outputs[0]
    )
    graph.insert_after(narrow, node)
    return node.outputs[0]


def _widen_weight(graph: ir.Graph, layer: LayerNode) -> None:
    weight, producer = layer.weight, layer.weight.producer()
    if producer is None:
        node = _wide_node("Cast", [weight], f"{layer.plan.name}/weight{FLOAT32_SUFFIX}", weight, to=_WIDE.value)
        graph.insert_before(layer.node, node)
        layer.node.replace_input_with(1, node.outputs[0])
        return
    scale = producer.inputs[1]
    assert scale is not None
    assert scale.shape is not None
    tensor = scale.const_value
    assert tensor is not None  # weight scales are initializers
    wide = lazy(f"{scale.name}{FLOAT32_SUFFIX}", scale.shape.numpy(), _WIDE, lambda: tensor.numpy().astype(np.float32))
    del graph.initializers[str(scale.name)]
    graph.initializers.add(wide)
    producer.replace_input_with(1, wide)
    weight.type, weight.name = ir.TensorType(_WIDE), f"{weight.name}{FLOAT32_SUFFIX}"


def _widen_result(graph: ir.Graph, layer: LayerNode, quantizer: str) -> None:
    """Makes the product and ·(s/c) float32; readers of the scaled result read a Cast of it, under its name."""
    product = layer.node.outputs[0]
    (rescaled,) = product.consumers()
    ratio, scaled = rescaled.inputs[1], rescaled.outputs[0]
    assert ratio is not None
    product.type = ir.TensorType(_WIDE)
    product.name = f"{product.name}{FLOAT32_SUFFIX}"
    rescaled.replace_input_with(1, _wide_ratio(graph, ratio, f"{quantizer}/from_reference{FLOAT32_SUFFIX}"))
    narrow = ir.node("Cast", [scaled], {"to": scaled.dtype.value if scaled.dtype else 0}, name=f"{rescaled.name}/cast")
    end = narrow.outputs[0]
    end.type, end.shape = scaled.type, scaled.shape
    graph.insert_after(rescaled, narrow)
    for reader, index in [use for use in scaled.uses() if use[0] is not narrow]:
        reader.replace_input_with(index, end)
    if scaled in graph.outputs:
        graph.outputs[graph.outputs.index(scaled)] = end
    scaled.type = ir.TensorType(_WIDE)
    name = str(scaled.name)
    scaled.name = f"{name}{FLOAT32_SUFFIX}"
    end.name = name


def _wide_ratio(graph: ir.Graph, ratio: ir.Value, name: str) -> ir.Value:
    for reader in ratio.consumers():
        if reader.op_type == "Cast":
            return reader.outputs[0]
    node = _wide_node("Cast", [ratio], name, ratio, to=_WIDE.value)
    producer = ratio.producer()
    assert producer is not None  # a Split
    graph.insert_after(producer, node)
    return node.outputs[0]


def _wide_node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, like: ir.Value, **attributes: int
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(_WIDE), like.shape
    return node
