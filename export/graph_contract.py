"""The contract of the canonical graph, executable: what export may emit, and what every backend may rely on.

Rules, each one function:

1. interface: names, element types and dynamic dimensions of inputs and outputs, those of adapters behind the others;
   opset; ONNX's own operators only
2. names: every node has one, no two share one
3. weighted nodes: every Conv and MatMul with a stored weight is a planned layer, and every planned layer is there;
hence
   no time embedding and no time projection is left
4. quantizers: scales and zero points are constants, scales finite and positive, zero points zero
5. activation quantizers: one QuantizeLinear and one DequantizeLinear each, with one scale (and a second
DequantizeLinear with that
   scale in float32, for layers that a half-precision graph computes in float32); nothing else is quantized
6. layers: each reads its activation quantizer's values (or plain ones) and its weight in the planned type with one
scale per output
   channel, and scales its result back
7. types: one floating-point type everywhere but in the part that takes ratios of scales, and around layers that a
   half-precision graph computes in float32 because they could overflow: such values have names that end in ``_fp32``
8. data: external data lies in one file beside the graph
9. text: where products of the text are an input, ``text.onnx`` beside the graph holds those layers and keeps rules 1 to
   8 with ``encoder_hidden_states`` alone as input; it joins on the last axis, in order and with their names, the
   tensors that the graph divides
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export.passes.gather_scales import ACT_SCALES
from s2p_deploy.export.passes.hoisted_text import TEXT, TEXT_PROJECTIONS
from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.export.quantization import storage_type
from s2p_deploy.export.tensors import FLOAT32_SUFFIX
from s2p_deploy.export.tracing import INPUTS, OPSET, OUTPUT
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import PrecisionPlan
from s2p_deploy.records.exported_graph import TEXT_FILE
from s2p_deploy.records.optional_inputs import BOUND_MATRICES, is_optional

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.records import LayerPlan

_OPS = {"conv": "Conv", "linear": "MatMul"}
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


def check_graph(path: Path, plan: PrecisionPlan, text_layers: Collection[str] = ()) -> None:
    """Checks the graph in a file (its data beside it) against the contract and its plan.

    ``text_layers`` are those that ``text.onnx`` beside it computes.

    Raises:
        GraphContractError: a rule is broken; the message names the rule's subject and the node, tensor or layer.
    """
    model = ir.load(path)
    own = PrecisionPlan(
        tuple(layer for layer in plan.layers if layer.name not in text_layers), plan.activation_quantizers
    )
    dtype = _check_interface(model, own, TEXT_PROJECTIONS if text_layers else TEXT)
    _check_parts(model.graph, own, dtype, path)
    if text_layers:
        text, text_path = ir.load(path.with_name(TEXT_FILE)), path.with_name(TEXT_FILE)
        _check_text_interface(text, dtype)
        apart = PrecisionPlan(tuple(layer for layer in plan.layers if layer.name in text_layers), ())
        _check_parts(text.graph, apart, dtype, text_path)
        _check_joint(text.graph, model.graph)


def _check_parts(graph: ir.Graph, plan: PrecisionPlan, dtype: ir.DataType, path: Path) -> None:
    """Rules 2 to 8."""
    _check_names(graph)
    _check_weighted_nodes(graph, plan)
    _check_quantizers(graph)
    _check_activation_quantizers(graph, plan)
    nodes = {str(node.name): node for node in graph}
    for layer in plan.layers:
        _check_layer(nodes[f"{layer.name}/{_OPS[layer.op]}"], layer, dtype)
    _check_types(graph, dtype)
    _check_external_data(graph, path)


def _check_opset(model: ir.Model) -> None:
    if set(model.opset_imports) != {""} or model.opset_imports[""] < OPSET or model.functions:
        raise GraphContractError(
            f"opsets are {dict(model.opset_imports)}: the contract is plain ONNX, opset {OPSET} or later"
        )


def _check_interface(model: ir.Model, plan: PrecisionPlan, text: str) -> ir.DataType:
    """Rule 1, with ``text`` as the input that carries it; returns the graph's floating-point type."""
    _check_opset(model)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    expected = [text if name == TEXT else name for name in INPUTS] + (
        [ACT_SCALES] if plan.activation_quantizers else []
    )
    needed = [name for name in inputs if name != TIME_PROJECTIONS and not is_optional(str(name))]
    if needed != expected:
        raise GraphContractError(
            f"inputs are {', '.join(map(str, inputs))}: expected {', '.join(expected)} in this order"
        )
    dtype = inputs["sample"].dtype
    if dtype is None or dtype not in _FLOATS:
        raise GraphContractError(f"input sample is {dtype}: expected FLOAT or FLOAT16")
    types = {"timestep_index": ir.DataType.INT64, ACT_SCALES: ir.DataType.FLOAT}
    for name, value in inputs.items():
        wanted = types.get(str(name), dtype)
        if value.dtype != wanted:
            raise GraphContractError(f"input {name} is {value.dtype}: expected {wanted}")
        if name not in {ACT_SCALES, *BOUND_MATRICES} and _first_dimension(value) != "batch":
            raise GraphContractError(f"input {name} has first dimension {_first_dimension(value)}: expected batch")
    if plan.activation_quantizers and _sizes(inputs[ACT_SCALES])[1:] != (len(plan.activation_quantizers),):
        raise GraphContractError(
            f"input {ACT_SCALES} is {inputs[ACT_SCALES].shape}: the plan has {len(plan.activation_quantizers)}"
        )
    if [value.name for value in graph.outputs] != [OUTPUT] or graph.outputs[0].dtype != dtype:
        raise GraphContractError(
            f"outputs are {[value.name for value in graph.outputs]}: expected {OUTPUT} alone, of type {dtype}"
        )
    return dtype


def _check_text_interface(model: ir.Model, dtype: ir.DataType) -> None:
    """Rule 9: rule 1 of the text's graph."""
    _check_opset(model)
    for values, name in ((model.graph.inputs, TEXT), (model.graph.outputs, TEXT_PROJECTIONS)):
        found = [(value.name, value.dtype, _first_dimension(value)) for value in values]
        if found != [(name, dtype, "batch")]:
            raise GraphContractError(f"{TEXT_FILE} has {found}: expected {name} alone, {dtype}, batch first")


def _check_joint(text: ir.Graph, graph: ir.Graph) -> None:
    """Rule 9: what one graph joins is what the other divides."""
    joined = text.outputs[0].producer()
    divided = [node for node, _ in next(v for v in graph.inputs if v.name == TEXT_PROJECTIONS).uses()]
    if joined is None or joined.op_type != "Concat" or [node.op_type for node in divided] != ["Split"]:
        raise GraphContractError(f"{TEXT_PROJECTIONS} must come from one Concat, and go to one Split")
    ends = [(value.name, _sizes(value)) for value in joined.inputs if value is not None]
    starts = [(value.name, _sizes(value)) for value in divided[0].outputs]
    wrong = next((pair for pair in zip_longest(ends, starts) if pair[0] != pair[1]), None)
    axes = [node.attributes.get_int("axis", 0) for node in (joined, *divided)]
    if wrong is not None or set(axes) != {2}:
        raise GraphContractError(f"{TEXT_PROJECTIONS} is joined and divided otherwise: {wrong}, axes {axes}")


def _sizes(value: ir.Value | None) -> tuple[object, ...]:
    return tuple(value.shape) if value is not None and value.shape is not None else ()


def _first_dimension(value: ir.Value) -> str:
    return str(next(iter(_sizes(value)), "missing"))


def _check_names(graph: ir.Graph) -> None:
    """Rule 2. That values have distinct names is ONNX's own rule."""
    counts = Counter(node.name or "" for node in graph)
    name, count = max(counts.items(), key=lambda item: (not item[0], item[1]))
    if not name or count > 1:
        raise GraphContractError(f"node name {name!r} occurs {count} times: names must be there and distinct")


def _check_weighted_nodes(graph: ir.Graph, plan: PrecisionPlan) -> None:
    """Rule 3."""
    expected = {f"{layer.name}/{_OPS[layer.op]}" for layer in plan.layers}
    found = {str(node.name) for node in graph if node.op_type in _WEIGHTED and _stored_weight(node) is not None}
    for name in sorted(expected - found):
        raise GraphContractError(f"planned layer {name} is not in the graph, or its weight is not stored in it")
    for name in sorted(found - expected):
        raise GraphContractError(f"{name} has a stored weight and is no planned layer")


def _stored_weight(node: ir.Node) -> ir.Value | None:
    """Returns the initializer behind a node's second input, directly or through a DequantizeLinear or a Cast."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type in {"DequantizeLinear", "Cast"}:
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _quantizer_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"})


def _check_quantizers(graph: ir.Graph) -> None:
    """Rule 4. A scale that is computed at run time on a DequantizeLinear before a Conv kills TensorRT-RTX's builder."""
    for node in _quantizer_nodes(graph):
        scale = _constant(node, 1)
        if scale is None:
            raise GraphContractError(f"{node.name}: its scale is not a constant")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise GraphContractError(f"{node.name}: its scale must be finite and above zero, got {float(scale.min())}")
        if len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        zero_point = _constant(node, 2)
        if zero_point is None or zero_point.any():
            raise GraphContractError(f"{node.name}: its zero point must be the constant zero")


def _constant(node: ir.Node, index: int) -> NDArray[np.float32] | None:
    value = node.inputs[index]
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    array: NDArray[np.float32] = value.const_value.numpy().astype(np.float32)
    return array


def _check_activation_quantizers(graph: ir.Graph, plan: PrecisionPlan) -> None:
    """Rule 5."""
    quantizes = {str(node.name): node for node in graph if node.op_type == "QuantizeLinear"}
    expected = {f"{quantizer.name}/input_quantizer/codes" for quantizer in plan.activation_quantizers}
    if set(quantizes) != expected:
        name = sorted(set(quantizes) ^ expected)[0]
        raise GraphContractError(f"{name}: every activation quantizer has one QuantizeLinear, and nothing else has")
    for name, node in quantizes.items():
        codes = node.outputs[0]
        readers = [reader for reader, _ in codes.uses()]
        types = [reader.outputs[0].dtype for reader in readers]
        if not types or len(set(types)) < len(types) or not all(_decodes(reader, node) for reader in readers):
            raise GraphContractError(
                f"{name}: its codes must go to one DequantizeLinear with the same scale, or to one of each type"
            )
        if codes.dtype != ir.DataType.INT8 or _sizes(node.inputs[1]) != ():
            raise GraphContractError(f"{name}: activations are quantized to INT8 with one scale")
    quantizers = {quantizer.name: quantizer.activations for quantizer in plan.activation_quantizers}
    for name, activations in quantizers.items():
        source = quantizes[f"{name}/input_quantizer/codes"].inputs[0]
        clipped = source is not None and _made_by(source, "Clip")
        if clipped != (activations != "int8"):
            raise GraphContractError(
                f"activation quantizer {name}: {activations} and {'a' if clipped else 'no'} Clip before its quantizer"
            )


def _decodes(node: ir.Node, quantize: ir.Node) -> bool:
    """Returns whether ``node`` is a DequantizeLinear by the number that ``quantize`` divides by."""
    if node.op_type != "DequantizeLinear":
        return False
    decodes_by, codes_by = _constant(node, 1), _constant(quantize, 1)
    return decodes_by is not None and codes_by is not None and np.array_equal(decodes_by, codes_by)


def _check_layer(node: ir.Node, layer: LayerPlan, dtype: ir.DataType) -> None:
    """Rule 6; rule 3 saw the node and its weight."""
    suffix = FLOAT32_SUFFIX if node.outputs[0].dtype != dtype else ""
    source, weight, stored = node.inputs[0], node.inputs[1], _stored_weight(node)
    assert source is not None
    assert weight is not None
    assert stored is not None
    read = f"{layer.activation_quantizer}/input_quantizer/dequantized{suffix}" if layer.activation_quantizer else None
    wrong = source.name != read if read else _made_by(source, "DequantizeLinear")
    if wrong:
        raise GraphContractError(
            f"layer {layer.name} reads {source.name}: its activation quantizer is {layer.activation_quantizer}"
        )
    if (layer.weights != "none") != _made_by(weight, "DequantizeLinear"):
        raise GraphContractError(f"layer {layer.name}: weights are planned {layer.weights}, stored {stored.dtype}")
    if layer.weights != "none":
        _check_weight(layer, weight, stored)
    if layer.activation_quantizer is not None:
        _check_scaled_back(layer, node, suffix)


def _check_weight(layer: LayerPlan, weight: ir.Value, stored: ir.Value) -> None:
    fmt = format_by_name(layer.weights)
    assert fmt is not None  # the caller took the layers whose weights have a format
    if stored.dtype != storage_type(fmt):
        raise GraphContractError(f"layer {layer.name}: weights are planned {layer.weights}, stored {stored.dtype}")
    dequantize = weight.producer()
    assert dequantize is not None  # the caller saw it
    axis = 0 if layer.op == "conv" else 1
    shape, channels = _sizes(dequantize.inputs[1]), _sizes(stored)[axis : axis + 1]
    if dequantize.attributes.get_int("axis", 1) != axis or shape != channels:
        raise GraphContractError(
            f"layer {layer.name}: weights need one scale per output channel on axis {axis}, got {shape}"
        )


def _check_scaled_back(layer: LayerPlan, node: ir.Node, suffix: str) -> None:
    """Checks that the result of quantized operands is multiplied by s/c first, so that a bias comes after."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    factor = f"{layer.activation_quantizer}/input_quantizer/from_reference{suffix}"
    scaled = len(readers) == 1 and readers[0].op_type == "Mul" and factor in [v.name for v in readers[0].inputs if v]
    if len(node.inputs) > 2 or not scaled:
        raise GraphContractError(
            f"layer {layer.name}: its result must be multiplied by {factor} before a bias is added"
        )


def _check_types(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Rule 7. ONNX itself wants the factors of a Resize in float32."""
    for value in _values(graph):
        ratio = str(value.name).startswith(ACT_SCALES) or all(node.op_type == "Resize" for node in value.consumers())
        full = value.dtype == ir.DataType.FLOAT and str(value.name).endswith(FLOAT32_SUFFIX)
        if value.dtype in _FLOATS and value.dtype != dtype and not ratio and not full:
            raise GraphContractError(f"{value.name} is {value.dtype} in a graph of {dtype}")


def _check_external_data(graph: ir.Graph, path: Path) -> None:
    """Rule 8."""
    wanted = f"{path.name}.data"
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != wanted:
            raise GraphContractError(
                f"{name} lies in {tensor.location}: external data belongs in {wanted} beside the graph"
            )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _made_by(value: ir.Value, op_type: str) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == op_type
