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

    from s2p_deploy.export.passes.scale_rows import PointScales
    from s2p_deploy.export.regions import SiteNode
    from s2p_deploy.numerics import IntegerFormat

ZERO_POINT = "input_quantizer/zero_point"


def lower_rescale(
    graph: ir.Graph, point: str, fmt: IntegerFormat, sites: Sequence[SiteNode], scales: PointScales
) -> None:
    """Quantizes the tensor x that all ``sites`` read, with s the row's scale and c the point's constant.

        x·(c/s) → [Clip to c·qmin, c·qmax] → Q(c) → DQ(c) → op → ·(s/c) → + bias

    Equal to op(s · clamp(round(x/s))) + bias in real arithmetic, because op is linear and zero points are 0; the bias
    comes last, or it would be scaled too.

    Conditions: (1) all sites read the same value; (2) a format below 8 bits is clipped before the INT8 quantizer, so
    that its codes stay on its own grid; (3) one Quantize and one Dequantize serve all sites of the point.

    Raises:
        GraphContractError: condition 1 does not hold.
    """
    source = sites[0].input
    if any(site.input is not source for site in sites):
        raise GraphContractError(f"act point {point}: {', '.join(s.plan.site for s in sites)} do not read one tensor")
    dtype = source.dtype
    assert dtype is not None  # traced values have types
    prefix = f"{point}/input_quantizer"
    nodes = [_node("Mul", [source, scales.to_centre], f"{prefix}/scaled", like=source)]
    if fmt != INT8:
        lowest = _scalar(graph, f"{prefix}/lowest", fmt.qmin * scales.centre, dtype)
        highest = _scalar(graph, f"{prefix}/highest", fmt.qmax * scales.centre, dtype)
        nodes.append(_node("Clip", [nodes[-1].outputs[0], lowest, highest], f"{prefix}/clipped", like=source))
    quantizer = [_scalar(graph, f"{prefix}/scale", scales.centre, dtype), _zero_point(graph)]
    nodes.append(_node("QuantizeLinear", [nodes[-1].outputs[0], *quantizer], f"{prefix}/codes", like=source))
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.INT8)
    nodes.append(_node("DequantizeLinear", [nodes[-1].outputs[0], *quantizer], f"{prefix}/dequantized", like=source))
    members = {site.node for site in sites}
    graph.insert_before(next(node for node in graph if node in members), nodes)
    for site in sites:
        site.node.replace_input_with(0, nodes[-1].outputs[0])
        _scale_back(graph, site, scales.from_centre)


def _scale_back(graph: ir.Graph, site: SiteNode, from_centre: ir.Value) -> None:
    """Puts ·(s/c), and a Conv's bias, behind the op; whoever read the op reads the end of that."""
    raw, name = site.node.outputs[0], site.plan.site
    readers = list(raw.uses())
    nodes = [_node("Mul", [raw, from_centre], f"{name}/rescaled", like=raw)]
    bias = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    if bias is not None:
        moved = _after_rescale(graph, site, bias)
        nodes.append(_node("Add", [nodes[-1].outputs[0], moved], f"{name}/biased", like=raw))
    end = nodes[-1].outputs[0]
    graph.insert_after(site.node, nodes)
    for reader, index in readers:
        reader.replace_input_with(index, end)
    if raw in graph.outputs:
        graph.outputs[graph.outputs.index(raw)] = end
    if raw is site.output:
        end.name, raw.name = raw.name, f"{name}/unscaled"
    else:
        raw.name = f"{name}/unscaled"


def _after_rescale(graph: ir.Graph, site: SiteNode, bias: ir.Value) -> ir.Value:
    """The Conv's own bias [out] becomes an initializer [1, out, 1, 1]."""
    assert bias.shape is not None  # parameters have shapes
    site.node.resize_inputs(2)
    channels = bias.shape.numpy()[0]
    moved = reshaped(bias, (1, channels, 1, 1))
    del graph.initializers[bias.name or ""]
    graph.initializers.add(moved)
    return moved


def _zero_point(graph: ir.Graph) -> ir.Value:
    """The one INT8 zero that all quantizers share; it makes their codes signed."""
    if ZERO_POINT not in graph.initializers:
        graph.initializers.add(constant(ZERO_POINT, np.zeros((), np.int8)))
    return graph.initializers[ZERO_POINT]


def _scalar(graph: ir.Graph, name: str, number: float, dtype: ir.DataType) -> ir.Value:
    value = constant(name, np.asarray(number, dtype.numpy()))
    graph.initializers.add(value)
    return value


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, *, like: ir.Value) -> ir.Node:
    """A node whose value has its name, and the type and shape of ``like``."""
    node = ir.node(op_type, inputs, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, like.type, like.shape
    return node
