"""Turns a linear layer whose result is cut into equal parts into one linear layer for each part."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

_ELEMENTWISE = frozenset({"Add", "Mul"})


class SplitLinears(ir.passes.InPlacePass):
    """A gated layer (GEGLU) computes value and gate in one product and cuts the result.

        Split(r·(x @ W) + b, axis=-1)  =  r·(x @ W_1) + b_1,  r·(x @ W_2) + b_2,  ...

    with W, its scales and b cut by columns: the same numbers, no copy of the result, and each part can be fused with
    what reads it. OpenVINO runs a Split as a copy by a reference kernel. The first part keeps the
    names of nodes and tensors, so that a layer is still found by them.

    Condition: (1) the parts are equal and the axis is the last; (2) between the MatMul and the Split there are only
    sums and products with constants of one dimension or with values that do not vary along the axis; (3) W is a
    constant or the dequantized codes of one, per column; (4) nobody else reads a value in between,
    or one of the constants that are cut.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every occurrence."""
        matches = [match for node in model.graph if (match := _match(node)) is not None]
        for match in matches:
            _cut(model.graph, match)
        return ir.passes.PassResult(model, modified=bool(matches))


@dataclass(frozen=True)
class _CutLinear:
    """Occurrence: the Split, the nodes before it from the weight's DequantizeLinear on, and the number of columns."""

    split: ir.Node
    nodes: tuple[ir.Node, ...]
    columns: int


@dataclass(frozen=True)
class _Columns:
    """Columns ``start`` to ``stop``; ``suffix`` is appended to the names of what is made for them."""

    start: int
    stop: int
    suffix: str


def _match(split: ir.Node) -> _CutLinear | None:
    value = split.inputs[0] if split.op_type == "Split" and len(split.inputs) == 1 else None
    if value is None or value.shape is None or not isinstance(value.shape[-1], int):
        return None
    columns, rank = value.shape[-1], len(value.shape)
    if any(part.is_graph_output() for part in split.outputs):
        return None
    if columns % len(split.outputs) or split.attributes.get_int("axis", 0) not in {-1, rank - 1}:
        return None
    nodes = _nodes_before(value, columns)
    return None if nodes is None else _CutLinear(split, nodes, columns)


def _nodes_before(value: ir.Value, columns: int) -> tuple[ir.Node, ...] | None:
    """Collects the nodes that make ``value``, which the Split alone reads; None where it is no linear layer."""
    nodes: list[ir.Node] = []
    while (node := value.producer()) is not None and len(value.uses()) == 1 and node.op_type in _ELEMENTWISE:
        nodes.insert(0, node)
        left, right = node.inputs
        if left is None or right is None or not _is_cut_or_constant_along(right, columns):
            return None
        value = left
    product = value.producer()
    if product is None or product.op_type != "MatMul" or len(value.uses()) != 1 or product.inputs[1] is None:
        return None
    weight = product.inputs[1]
    nodes.insert(0, product)
    if weight.is_initializer():
        return tuple(nodes) if _is_cut(weight, columns) else None
    dequantize = weight.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(weight.uses()) != 1:
        return None
    per_column = dequantize.attributes.get_int("axis", 1) in {-1, 1}
    codes, *grid = (value for value in dequantize.inputs if value is not None)
    usable = _is_cut(codes, columns) and all(_is_cut_or_constant_along(value, columns) for value in grid)
    return (dequantize, *nodes) if per_column and usable else None


def _is_cut(value: ir.Value, columns: int) -> bool:
    """Tells whether a constant has a column for each of the result's, and one reader."""
    if not value.is_initializer() or value.shape is None or len(value.shape) == 0:
        return False
    return bool(len(value.uses()) == 1 and value.shape[-1] == columns)


def _is_cut_or_constant_along(value: ir.Value, columns: int) -> bool:
    same = value.shape is not None and (len(value.shape) == 0 or value.shape[-1] == 1)
    return same or _is_cut(value, columns)


def _cut(graph: ir.Graph, match: _CutLinear) -> None:
    """Turns the nodes that are there into the first part, copies of them into the others."""
    first, *others = match.split.outputs
    size = match.columns // len(match.split.outputs)
    taken = [value for node in match.nodes for value in node.inputs if value is not None]
    constants = [value for value in taken if _is_cut(value, match.columns)]
    for number, old in enumerate(others, 1):
        part = _Columns(number * size, (number + 1) * size, f"/part{number}")
        ir.convenience.replace_all_uses_with(old, _copied(graph, match, part))
    ir.convenience.replace_all_uses_with(first, match.nodes[-1].outputs[0])
    graph.remove(match.split, safe=True)
    for value in constants:
        _narrow(value, value, _Columns(0, size, ""))
    for node in match.nodes:
        _set_columns(node.outputs[0], size)


def _copied(graph: ir.Graph, match: _CutLinear, part: _Columns) -> ir.Value:
    """Copies the nodes with the part's columns of their constants; returns the last result."""
    replaced: dict[ir.Value, ir.Value] = {}
    for node in match.nodes:
        for value in node.inputs:
            if value is not None and _is_cut(value, match.columns):
                replaced[value] = ir.Value(name=f"{value.name}{part.suffix}", type=value.type)
                _narrow(value, replaced[value], part)
                graph.initializers.add(replaced[value])
        inputs = [replaced.get(value, value) if value is not None else None for value in node.inputs]
        name = f"{node.name}{part.suffix}"
        copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name=name)
        old, new = node.outputs[0], copy.outputs[0]
        new.name, new.type, new.shape = f"{old.name}{part.suffix}", old.type, old.shape
        _set_columns(new, part.stop - part.start)
        replaced[old] = new
        graph.insert_before(match.split, copy)
    return replaced[match.nodes[-1].outputs[0]]


def _narrow(whole: ir.Value, value: ir.Value, part: _Columns) -> None:
    """Gives ``value`` the part's columns of a constant; they are read when the model is written."""
    tensor, name = whole.const_value, str(value.name)
    assert tensor is not None  # a constant has a value
    shape = ir.Shape([*tensor.shape.numpy()[:-1], part.stop - part.start])

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy()[..., part.start : part.stop].copy(), dtype=tensor.dtype, name=name)

    value.const_value = ir.LazyTensor(read, tensor.dtype, shape, name=name)
    value.shape = shape


def _set_columns(value: ir.Value, columns: int) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:-1], columns])
