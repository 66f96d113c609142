"""Finds attention as torch's exporter writes it in a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_HEADS_FORWARD, _KEYS_TURNED = [0, 2, 1, 3], [0, 1, 3, 2]


@dataclass(frozen=True)
class Heads:
    """A value [B, T, H*D] that ``reshape`` takes apart into [B, T, H, D], and what it is multiplied with."""

    source: ir.Value
    reshape: ir.Node
    tokens: int
    heads: int
    width: int
    scale: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values, the scale, and the Reshape that ends it.

        heads(x) = Transpose(Reshape(x [B, T, H*D], [B, T, H, D]), perm=[0, 2, 1, 3])
        Reshape(Transpose(Softmax((heads(q)·a) @ (heads(k)ᵀ·b)) @ heads(v), perm=[0, 2, 1, 3]), [B, T, H*D])

    a and b are constants or not there, ``scale`` is their product. All three have the same number of heads, and nobody
    else reads a value in between.
    """

    queries: Heads
    keys: Heads
    values: Heads
    last: ir.Node

    @property
    def scale(self) -> float:
        """Returns the factor of the scores."""
        return self.queries.scale * self.keys.scale


def find_attention(graph: ir.Graph) -> list[Attention]:
    """Finds every attention of a graph."""
    return [match for node in graph if (match := _match(node)) is not None]


def _match(softmax: ir.Node) -> Attention | None:
    """Matches the attention around a Softmax over the last axis."""
    if softmax.op_type != "Softmax" or softmax.attributes.get_int("axis", -1) != -1:
        return None
    scores, mixed = producer_of(softmax.inputs[0], "MatMul"), reader_of(softmax, "MatMul")
    if scores is None or mixed is None:
        return None
    last = _back_together(mixed)
    queries, keys = _scaled_heads(scores.inputs[0], turned=False), _scaled_heads(scores.inputs[1], turned=True)
    values = _heads(mixed.inputs[1])
    if last is None or queries is None or keys is None or values is None:
        return None
    if not queries.heads == keys.heads == values.heads:
        return None
    return Attention(queries, keys, values, last)


def _back_together(mixed: ir.Node) -> ir.Node | None:
    """Finds the Reshape behind the Transpose behind the last product."""
    transpose = reader_of(mixed, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != _HEADS_FORWARD:
        return None
    last = reader_of(transpose, "Reshape")
    return last if last is not None and len(constant_of(last.inputs[1])) == 3 else None


def _scaled_heads(value: ir.Value | None, *, turned: bool) -> Heads | None:
    """Matches a value in heads, times a constant or as it is; the last two dimensions of keys are swapped before."""
    mul = producer_of(value, "Mul")
    scale = [1.0] if mul is None else constant_of(mul.inputs[1])
    if len(scale) != 1:
        return None
    inner = value if mul is None else mul.inputs[0]
    if turned:
        turn = producer_of(inner, "Transpose")
        if turn is None or list(turn.attributes["perm"].as_ints()) != _KEYS_TURNED:
            return None
        inner = turn.inputs[0]
    heads = _heads(inner)
    return None if heads is None else replace(heads, scale=scale[0])


def _heads(value: ir.Value | None) -> Heads | None:
    """Matches a value in heads; ``tokens`` is -1 where the graph leaves their number open, as a Reshape's 0 may too."""
    transpose = producer_of(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != _HEADS_FORWARD:
        return None
    reshape = producer_of(transpose.inputs[0], "Reshape")
    shape = constant_of(reshape.inputs[1]) if reshape is not None else []
    if reshape is None or reshape.inputs[0] is None or len(shape) != 4:
        return None
    source, (tokens, heads, width) = reshape.inputs[0], map(int, shape[1:])
    copied = source.shape[1] if tokens == 0 and source.shape is not None else tokens
    return Heads(source, reshape, copied if isinstance(copied, int) else -1, heads, width)


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Returns the producer of a value that only one node reads, if it is of that type."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type == op_type else None


def reader_of(node: ir.Node, op_type: str) -> ir.Node | None:
    """Returns the only node that reads a node's value, if it is of that type."""
    readers = list(node.outputs[0].consumers())
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def constant_of(value: ir.Value | None) -> list[float]:
    """Returns the numbers of an initializer; none where it is something else."""
    if value is None or not value.is_initializer() or value.const_value is None or value.const_value.size > 4:
        return []
    return list(value.const_value.numpy().reshape(-1).tolist())
