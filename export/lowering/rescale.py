"""The lowering ``rescale``: per-sample scales through multiplications around quantizers with constant scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export.tensors import constant, reshaped
from s2p_deploy.numerics import INT8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.export.passes.gather_scales import QuantizerScales
    from s2p_deploy.export.regions import LayerNode
    from s2p_deploy.numerics import IntegerFormat

ZERO_POINT = "input_quantizer/zero_point"


def lower_rescale(
    graph: ir.Graph, quantizer: str, fmt: IntegerFormat, layers: Sequence[LayerNode], scales: QuantizerScales
) -> None:
    """Quantizes the tensor x that all ``layers`` read: s is the scale at the sample's timestep, c the reference scale.

        x·(c/s) → [Clip to c·qmin, c·qmax] → Q(c) → DQ(c) → op → ·(s/c) → + bias

    Equal to op(s · clamp(round(x/s))) + bias in real arithmetic, because op is linear and zero points are 0; the bias
    comes last, or it would be scaled too.

    Conditions: (1) all layers read the same value; (2) a format below 8 bits is clipped before the INT8 quantizer, so
    that its codes stay on its own grid; (3) one Quantize and one Dequantize serve all layers of the quantizer.

    Raises:
        GraphContractError: condition 1 does not hold.
    """
    source = layers[0].input
    if any(layer.input is not source for layer in layers):
        raise GraphContractError(
            f"activation quantizer {quantizer}: {', '.join(s.plan.name for s in layers)} do not read one tensor"
        )
    dtype = source.dtype
    assert dtype is not None  # traced values have types
    prefix = f"{quantizer}/input_quantizer"
    nodes = [_node("Mul", [source, scales.to_reference], f"{prefix}/scaled", like=source)]
    if fmt != INT8:
        lowest = _scalar(graph, f"{prefix}/lowest", fmt.qmin * scales.reference_scale, dtype)
        highest = _scalar(graph, f"{prefix}/highest", fmt.qmax * scales.reference_scale, dtype)
        nodes.append(_node("Clip", [nodes[-1].outputs[0], lowest, highest], f"{prefix}/clipped", like=source))
    grid = [_scalar(graph, f"{prefix}/scale", scales.reference_scale, dtype), _zero_point(graph)]
    nodes.append(_node("QuantizeLinear", [nodes[-1].outputs[0], *grid], f"{prefix}/codes", like=source))
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.INT8)
    nodes.append(_node("DequantizeLinear", [nodes[-1].outputs[0], *grid], f"{prefix}/dequantized", like=source))
    members = {layer.node for layer in layers}
    graph.insert_before(next(node for node in graph if node in members), nodes)
    for layer in layers:
        layer.node.replace_input_with(0, nodes[-1].outputs[0])
        _scale_back(graph, layer, scales.from_reference)


def _scale_back(graph: ir.Graph, layer: LayerNode, from_reference: ir.Value) -> None:
    """Puts ·(s/c), and a Conv's bias, behind the op; its readers read the end of that."""
    raw, name = layer.node.outputs[0], layer.plan.name
    readers = list(raw.uses())
    nodes = [_node("Mul", [raw, from_reference], f"{name}/rescaled", like=raw)]
    bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
    if bias is not None:
        moved = _after_rescale(graph, layer, bias)
        nodes.append(_node("Add", [nodes[-1].outputs[0], moved], f"{name}/biased", like=raw))
    end = nodes[-1].outputs[0]
    graph.insert_after(layer.node, nodes)
    for reader, index in readers:
        reader.replace_input_with(index, end)
    if raw in graph.outputs:
        graph.outputs[graph.outputs.index(raw)] = end
    if raw is layer.output:
        end.name, raw.name = raw.name, f"{name}/unscaled"
    else:
        raw.name = f"{name}/unscaled"


def _after_rescale(graph: ir.Graph, layer: LayerNode, bias: ir.Value) -> ir.Value:
    """Makes an initializer [1, out, 1, 1] of the Conv's own bias [out]."""
    assert bias.shape is not None  # parameters have shapes
    layer.node.resize_inputs(2)
    channels = bias.shape.numpy()[0]
    moved = reshaped(bias, (1, channels, 1, 1))
    del graph.initializers[bias.name or ""]
    graph.initializers.add(moved)
    return moved


def _zero_point(graph: ir.Graph) -> ir.Value:
    """Returns the one INT8 zero that all quantizers share; it makes their codes signed."""
    if ZERO_POINT not in graph.initializers:
        graph.initializers.add(constant(ZERO_POINT, np.zeros((), np.int8)))
    return graph.initializers[ZERO_POINT]


def _scalar(graph: ir.Graph, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    value = constant(name, np.asarray(number, dtype.numpy()))
    graph.initializers.add(value)
    return value


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, *, like: ir.Value) -> ir.Node:
    """Makes a node whose value has its name, and the type and shape of ``like``."""
    node = ir.node(op_type, inputs, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, like.type, like.shape
    return node
