"""Removes the columns that no activation quantizer reads any more from the ratios of scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_quantizers import remove_unread
from s2p_deploy.export.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_THROUGH = frozenset({"Unsqueeze", "Div", "Cast"})


class UnreadColumns(ir.passes.InPlacePass):
    """Keeps only the columns that are read in every ``Gather(scales, columns) → Unsqueeze → Div → [Cast] → Split``.

    Condition: (1) columns and reference scales are initializers that nothing else reads. Ensures: every column that
        is still gathered is read as one ratio or the other.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Narrows every group of columns."""
        remove_unread(model)
        changed = [_narrow(model.graph, node) for node in list(model.graph) if _selects_columns(node)]
        if any(changed):
            remove_unread(model)
        return ir.passes.PassResult(model, modified=any(changed))


def _selects_columns(node: ir.Node) -> bool:
    columns = node.inputs[1] if node.op_type == "Gather" else None
    return columns is not None and columns.is_initializer() and node.attributes.get_int("axis", 0) == 1


def _narrow(graph: ir.Graph, select: ir.Node) -> bool:
    nodes = list(_group(select))
    splits = [node for node in nodes if node.op_type == "Split"]
    columns = select.inputs[1]
    assert columns is not None
    assert columns.const_value is not None  # _selects_columns saw it
    count = columns.const_value.size
    if not splits or any(len(node.outputs) != count for node in splits):
        return False
    outputs = set(graph.outputs)
    read = [i for i in range(count) if any(s.outputs[i].uses() or s.outputs[i] in outputs for s in splits)]
    if len(read) == count:
        return False
    _replace(graph, select, 1, read)
    for node in [node for node in nodes if node.op_type == "Div"]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer():
                _replace(graph, node, index, read)
    for split in splits:
        _split_anew(graph, split, read)
    return True


def _group(select: ir.Node) -> Iterable[ir.Node]:
    """Collects the nodes behind ``select`` up to the Splits."""
    for reader in select.outputs[0].consumers():
        if reader.op_type == "Split":
            yield reader
        elif reader.op_type in _THROUGH:
            yield reader
            yield from _group(reader)


def _replace(graph: ir.Graph, node: ir.Node, index: int, rows: Sequence[int]) -> None:
    """Keeps these entries of the first axis of the initializer at an input, under a name of the node's own."""
    old = node.inputs[index]
    assert old is not None
    assert old.const_value is not None
    new = constant(f"{node.name}/kept", old.const_value.numpy()[list(rows)])
    graph.initializers.add(new)
    node.replace_input_with(index, new)


def _split_anew(graph: ir.Graph, old: ir.Node, kept: Sequence[int]) -> None:
    new = ir.node(
        "Split",
        [old.inputs[0]],
        {"axis": 1, "num_outputs": len(kept)},
        num_outputs=len(kept),
        name=old.name,
    )
    graph.insert_before(old, new)
    values = [old.outputs[index] for index in kept]
    ir.convenience.replace_all_uses_with(values, new.outputs, replace_graph_outputs=True)
    for value, made in zip(values, new.outputs, strict=True):
        made.type, made.shape = value.type, value.shape
        made.name, value.name = value.name, None
    graph.remove(old, safe=True)
