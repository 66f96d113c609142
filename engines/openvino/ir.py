"""OpenVINO's models: what the runtime model computes each ONNX node in, and subgraphs cut out of an IR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.subgraphs import RunnableSubgraph
from s2p_deploy.errors import GraphContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import onnx_ir as ir
    import openvino
    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner

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
    types: dict[str, str] = {}
    for layer in runtime.get_ordered_ops():
        info = layer.get_rt_info()
        if _text(info, "layerType") not in _PRODUCT_LAYERS:
            continue
        node = _product_of(_text(info, "originalLayersNames"), products)
        if node is not None:
            types[node] = _operand_type(layer)
    return types


def product_names(model: ir.Model) -> dict[str, str]:
    """Returns names by which a runtime layer may be known -> the ONNX product in it.

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
    """Picks the product among a layer's names; its own name goes before one of something fused."""
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


class IrSubgraphs:
    """Cuts copies of ``model``; constants are shared. ``running`` compiles one as the whole engine is compiled."""

    def __init__(self, model: openvino.Model, running: Callable[[openvino.Model], Runner]) -> None:
        self._model, self._running = model, running

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> RunnableSubgraph:
        """Cuts out the operations between tensors ``entries`` (and the model's inputs) and ``outputs``.

        Raises:
            GraphContractError: the model has no such tensor.
        """
        import openvino

        model = self._model.clone()
        tensors = _tensors(model)
        missing = [name for name in (*entries, *outputs) if name not in tensors]
        if missing:
            raise GraphContractError(f"the engine's IR has no tensor {missing[0]}: it is not made from this graph")
        ends = [tensors[name] for name in outputs]
        for name in entries:
            _replace_by_input(tensors[name], name)
        parameters = _inputs_of(ends)
        subgraph = openvino.Model([openvino.opset13.result(end) for end in ends], parameters, "subgraph")
        types = {value.get_any_name(): np.dtype(value.get_element_type().to_dtype()) for value in subgraph.inputs}
        return RunnableSubgraph(self._running(subgraph), types)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Returns the value of the constant that a tensor is; None where there is none of that name."""
        constants = (node for node in self._model.get_ops() if node.get_type_name() == "Constant")
        constant = next((node for node in constants if node.get_friendly_name() == name), None)
        return None if constant is None else np.array(constant.data)


def _tensors(model: openvino.Model) -> dict[str, openvino.Output]:
    return {name: value for node in model.get_ops() for value in node.outputs() for name in value.get_names()}


def _replace_by_input(value: openvino.Output, name: str) -> None:
    """Whoever reads ``value`` reads an input of the same name, type and shape from now on."""
    import openvino

    if value.get_node().get_type_name() == "Parameter":
        return
    given = openvino.opset13.parameter(value.get_partial_shape(), value.get_element_type(), name)
    readers = value.get_target_inputs()
    value.set_names(set())
    given.output(0).set_names({name})
    for reader in readers:
        reader.replace_source_output(given.output(0))


def _inputs_of(ends: Sequence[openvino.Output]) -> list[openvino.Node]:
    """Collects the inputs that tensors depend on."""
    pending, seen, inputs = [end.get_node() for end in ends], set(), []
    while pending:
        node = pending.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            inputs.append(node)
        pending.extend(node.input_value(index).get_node() for index in range(node.get_input_size()))
    return inputs
