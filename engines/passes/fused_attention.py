"""Writes attention as the one operator that ONNX Runtime has for it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_points import remove_unread

DOMAIN = "com.microsoft"
_HEADS_FORWARD, _KEYS_TURNED = [0, 2, 1, 3], [0, 1, 3, 2]


class FusedAttention(ir.passes.InPlacePass):
    """Attention of torch's exporter becomes ``com.microsoft.MultiHeadAttention``, which never holds all scores.

        heads(x) = Transpose(Reshape(x [B, T, H*D], [B, T, H, D]), perm=[0, 2, 1, 3])
        Reshape(Transpose(Softmax((heads(q)·a) @ (heads(k)ᵀ·b)) @ heads(v), perm=[0, 2, 1, 3]), [B, T, H*D])
            =  MultiHeadAttention(q, k, v, num_heads=H, scale=a·b)

    Condition: (1) a and b are constants; (2) all three have the same number of heads; (3) nobody else reads a value in
    between.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every occurrence."""
        found = [match for node in model.graph if (match := _match(node)) is not None]
        for match in found:
            _fuse(model.graph, match)
        if found:
            model.opset_imports[DOMAIN] = 1
            remove_unread(model)
        return ir.passes.PassResult(model, modified=bool(found))


@dataclass(frozen=True)
class _Attention:
    """Queries, keys and values [B, T, H*D], the number of heads, the scale, and the Reshape that ends it."""

    operands: tuple[ir.Value, ir.Value, ir.Value]
    heads: int
    scale: float
    last: ir.Node


@dataclass(frozen=True)
class _Heads:
    """A value [B, T, H*D] that is taken apart into heads, and what it is multiplied with."""

    source: ir.Value
    heads: int
    scale: float = 1.0


def _match(softmax: ir.Node) -> _Attention | None:
    """The attention around a Softmax over the last axis."""
    if softmax.op_type != "Softmax" or softmax.attributes.get_int("axis", -1) != -1:
        return None
    scores, mixed = _producer(softmax.inputs[0], "MatMul"), _reader(softmax, "MatMul")
    if scores is None or mixed is None:
        return None
    last = _back_together(mixed)
    queries, keys = _scaled_heads(scores.inputs[0], turned=False), _scaled_heads(scores.inputs[1], turned=True)
    values = _heads(mixed.inputs[1])
    if last is None or queries is None or keys is None or values is None:
        return None
    if not queries.heads == keys.heads == values.heads:
        return None
    return _Attention((queries.source, keys.source, values.source), queries.heads, queries.scale * keys.scale, last)


def _fuse(graph: ir.Graph, match: _Attention) -> None:
    old = match.last.outputs[0]
    node = ir.node(
        "MultiHeadAttention",
        match.operands,
        {"num_heads": match.heads, "scale": match.scale},
        domain=DOMAIN,
        name=f"{match.last.name}/MultiHeadAttention",
    )
    made = node.outputs[0]
    made.type, made.shape = old.type, old.shape
    graph.insert_before(match.last, node)
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(match.last, safe=True)
    name, old.name = old.name, None
    made.name = name


def _back_together(mixed: ir.Node) -> ir.Node | None:
    """The Reshape behind the Transpose behind the last product."""
    transpose = _reader(mixed, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != _HEADS_FORWARD:
        return None
    last = _reader(transpose, "Reshape")
    return last if last is not None and len(_constant(last.inputs[1])) == 3 else None


def _scaled_heads(value: ir.Value | None, *, turned: bool) -> _Heads | None:
    """A value in heads times a constant; keys are turned (their last two dimensions swapped) in between."""
    mul = _producer(value, "Mul")
    scale = _constant(mul.inputs[1]) if mul is not None else []
    if mul is None or len(scale) != 1:
        return None
    inner: ir.Value | None = mul.inputs[0]
    if turned:
        turn = _producer(inner, "Transpose")
        if turn is None or list(turn.attributes["perm"].as_ints()) != _KEYS_TURNED:
            return None
        inner = turn.inputs[0]
    found = _heads(inner)
    return None if found is None else _Heads(found.source, found.heads, scale[0])


def _heads(value: ir.Value | None) -> _Heads | None:
    transpose = _producer(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != _HEADS_FORWARD:
        return None
    reshape = _producer(transpose.inputs[0], "Reshape")
    shape = _constant(reshape.inputs[1]) if reshape is not None else []
    if reshape is None or reshape.inputs[0] is None or len(shape) != 4:
        return None
    return _Heads(reshape.inputs[0], int(shape[2]))


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """What makes a value that only one node reads."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type == op_type else None


def _reader(node: ir.Node, op_type: str) -> ir.Node | None:
    """The only node that reads a node's value."""
    readers = list(node.outputs[0].consumers())
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def _constant(value: ir.Value | None) -> list[float]:
    """The numbers of an initializer; none where it is something else."""
    if value is None or not value.is_initializer() or value.const_value is None or value.const_value.size > 4:
        return []
    return list(value.const_value.numpy().reshape(-1).tolist())
