"""Writes the transposition of attention's keys as one Transpose."""

from __future__ import annotations

import onnx_ir as ir


class TransposedKeys(ir.passes.InPlacePass):
    """Turns keys [B, H, T, D] to [B, H, D, T] by one Transpose.

    Torch's exporter flattens heads, swaps, and restores by shapes read at run time:

        Reshape(Transpose(Reshape(K, [B*H, T, D]), perm=[0, 2, 1]), [B, H, D, T])  =  Transpose(K, perm=[0, 1, 3, 2])

    Condition: (1) a 4-D value goes through Reshape, Transpose (0, 2, 1), Reshape, and comes out 4-D, with nobody else
    reading in between. The shape arithmetic that fed the Reshapes has no reader then and goes with them. Scores and
    probabilities get the shape that the arithmetic hid: [batch, heads, queries, keys].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every occurrence."""
        graph = model.graph
        found = [match for node in graph if (match := _match(node)) is not None]
        for keys, last in found:
            assert keys.shape is not None  # the pattern asks for four dimensions
            batch, heads, tokens, size = keys.shape
            transpose = ir.node(
                "Transpose", [keys], {"perm": [0, 1, 3, 2]}, name=last.name, metadata_props=dict(last.metadata_props)
            )
            turned = transpose.outputs[0]
            turned.name, turned.type = last.outputs[0].name, keys.type
            turned.shape = ir.Shape([batch, heads, size, tokens])
            graph.insert_before(last, transpose)
            ir.convenience.replace_all_uses_with(last.outputs[0], turned)
            _spread_shape(turned)
        if found:
            _remove_unread(graph)
        return ir.passes.PassResult(model, modified=bool(found))


def _match(last: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Returns K and the final Reshape, where ``last`` ends the pattern (condition 1)."""
    if last.op_type != "Reshape":
        return None
    middle = _only_producer(last, "Transpose")
    if middle is None or list(middle.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    first = _only_producer(middle, "Reshape")
    if first is None:
        return None
    keys = first.inputs[0]
    if keys is None or keys.shape is None or len(keys.shape) != 4:
        return None
    return keys, last


def _only_producer(node: ir.Node, op_type: str) -> ir.Node | None:
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.op_type != op_type or len(value.uses()) != 1:
        return None
    return producer


def _spread_shape(turned: ir.Value) -> None:
    """Writes the shapes that follow: Mul keeps them, MatMul with queries [B, H, Tq, D] gives [B, H, Tq, T]."""
    shape = turned.shape
    assert shape is not None  # set by the caller
    for reader, _ in turned.uses():
        if reader.op_type == "Mul":
            reader.outputs[0].shape = ir.Shape(list(shape))
            _spread_shape(reader.outputs[0])
        elif reader.op_type == "MatMul":
            queries = reader.inputs[0]
            if queries is None or queries.shape is None:
                continue
            scores = ir.Shape([*list(queries.shape)[:3], shape[3]])
            reader.outputs[0].shape = scores
            for softmax, _ in reader.outputs[0].uses():
                softmax.outputs[0].shape = ir.Shape(list(scores))


def _remove_unread(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(graph):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
