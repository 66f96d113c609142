"""What OpenVINO's runtime model says each ONNX node is computed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir
    import openvino

_INTEGER = {"i8", "u8"}
_PRODUCT_LAYERS = {"Convolution", "FullyConnected", "MatMul", "GroupConvolution"}
_PRODUCT_OPS = {"Conv", "MatMul", "Gemm"}
_TYPES = {"f32": "fp32", "f16": "fp16"}
_FUSED_SUFFIX = "/DequantizationMultiply"  # appended to a MatMul whose scale OpenVINO moved behind it


def compute_types(runtime: openvino.Model, products: Mapping[str, str]) -> dict[str, str]:
    """ONNX node -> ``int8``, ``fp32``, ``bf16``, ... of every convolution and matrix product in the runtime model.

    ``runtimePrecision`` of a FullyConnected is the narrowest of its operands', so a weight-only INT8 product would read
    as i8 too: a product counts as int8 only where its data operand arrives in i8 or u8 as well. ``products`` is what
    :func:`product_names` says of the graph.
    """
    found: dict[str, str] = {}
    for layer in runtime.get_ordered_ops():
        info = layer.get_rt_info()
        if _text(info, "layerType") not in _PRODUCT_LAYERS:
            continue
        node = _product_of(_text(info, "originalLayersNames"), products)
        if node is not None:
            found[node] = _operand_type(layer)
    return found


def product_names(model: ir.Model) -> dict[str, str]:
    """Names by which a runtime layer may be known -> the ONNX product in it.

    A product has its own name. OpenVINO calls a layer after the last operator fused into it, so the operators that
    alone read a product (bias, transpose, ...) and the graph output that it makes stand for it too, unless two products
    claim them (a residual sum).
    """
    names: dict[str, str] = {}
    shared = set()
    for product in (node for node in model.graph if node.op_type in _PRODUCT_OPS):
        names[str(product.name)] = str(product.name)
        for follower in _followers(product):
            if names.setdefault(follower, str(product.name)) != product.name:
                shared.add(follower)
    return {name: product for name, product in names.items() if name not in shared}


def _followers(product: ir.Node) -> Iterator[str]:
    node = product
    while len(node.outputs) == 1:
        value = node.outputs[0]
        readers = [reader for reader, _ in value.uses()]
        if value.is_graph_output():
            yield str(value.name)
        if len(readers) != 1 or readers[0].op_type in _PRODUCT_OPS:
            return
        node = readers[0]
        yield str(node.name)


def _product_of(layer_names: str, products: Mapping[str, str]) -> str | None:
    """The product among a layer's names; one by its own name goes before one that something fused stands for."""
    names = [name.removesuffix(_FUSED_SUFFIX) for name in layer_names.split(",")]
    own = [name for name in names if products.get(name) == name]
    return next(iter(own), None) or next((products[name] for name in names if name in products), None)


def _operand_type(layer: openvino.Node) -> str:
    source = layer.input_value(0)
    offered = _text(source.get_node().get_rt_info(), "outputPrecisions").split(",")
    operand = offered[min(source.get_index(), len(offered) - 1)]
    if {operand, _text(layer.get_rt_info(), "runtimePrecision")} <= _INTEGER:
        return "int8"
    kind: str = _TYPES.get(operand, operand)
    return kind


def _text(info: openvino.RTMap, key: str) -> str:
    if key not in info:
        return ""
    return str(info[key].astype(str))
