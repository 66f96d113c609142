"""Finds activation quantizers of the form ``rescale`` in a canonical graph, for passes that change the form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from s2p_deploy.export.passes.gather_scales import ACT_SCALES

if TYPE_CHECKING:
    from collections.abc import Collection

_PRODUCTS = frozenset({"Conv", "MatMul"})


@dataclass(frozen=True)
class Product:
    """A Conv or MatMul that reads a quantizer's values, and the Mul by s/c behind it."""

    node: ir.Node
    rescaled: ir.Node


@dataclass(frozen=True)
class RescaledQuantizer:
    """Nodes of one activation quantizer.

        x -> scaled (by c/s) -> [clip] -> quantize (by c) -> dequantizes (by c) -> products -> rescaled (by s/c)

    There is one DequantizeLinear, and a second one for the layers that compute in float32, if the quantizer has such.
    """

    scaled: ir.Node
    clip: ir.Node | None
    quantize: ir.Node
    dequantizes: tuple[ir.Node, ...]
    products: tuple[Product, ...]


def rescaled_quantizers(graph: ir.Graph, codes: Collection[str]) -> dict[str, RescaledQuantizer]:
    """Finds the quantizers whose codes (the tensor behind QuantizeLinear) are named, as far as the graph has them.

    Raises:
        ir.passes.PreconditionError: a named quantizer has another form.
    """
    quantizes = {str(n.outputs[0].name): n for n in graph if n.op_type == "QuantizeLinear"}
    return {name: _point(name, quantizes[name]) for name in codes if name in quantizes}


def remove_unread(model: ir.Model) -> None:
    """Removes nodes and initializers that nothing reads, and then the input of scales if nothing reads it."""
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name == ACT_SCALES and not value.uses()]:
        model.graph.inputs.remove(value)


def _point(name: str, quantize: ir.Node) -> RescaledQuantizer:
    before = _producer(quantize)
    clip = before if before is not None and before.op_type == "Clip" else None
    scaled = _producer(clip) if clip is not None else before
    readers = _readers(quantize)
    if scaled is None or scaled.op_type != "Mul" or any(n.op_type != "DequantizeLinear" for n in readers):
        raise ir.passes.PreconditionError(f"{name} is no activation quantizer in the form rescale")
    products = tuple(_product(name, node) for dequantize in readers for node in _readers(dequantize))
    return RescaledQuantizer(scaled, clip, quantize, readers, products)


def _product(name: str, node: ir.Node) -> Product:
    readers = _readers(node)
    if node.op_type not in _PRODUCTS or len(readers) != 1 or readers[0].op_type != "Mul":
        raise ir.passes.PreconditionError(f"{name}: the result of {node.name} is not scaled back")
    return Product(node, readers[0])


def _producer(node: ir.Node) -> ir.Node | None:
    value = node.inputs[0]
    return value.producer() if value is not None else None


def _readers(node: ir.Node) -> tuple[ir.Node, ...]:
    return tuple(node.outputs[0].consumers())
