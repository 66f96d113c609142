"""Puts a second attention beside every cross-attention: image prompts of IP-Adapters, off where none is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.attention import find_attention
from s2p_deploy.export.regions import module_path
from s2p_deploy.export.tensors import constant
from s2p_deploy.records.optional_inputs import (
    IMAGE_BIAS,
    IMAGE_KEYS,
    IMAGE_REACH,
    IMAGE_VALUES,
    ImageSlot,
    ImageSlots,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.export.attention import Attention

CROSS_ATTENTION = "attn2"  # diffusers puts an IP-Adapter's processors there, whatever else reads a text


class ImageAttention(ir.passes.InPlacePass):
    """Adds to the result of every cross-attention what its queries find in image tokens.

        y + softmax(q k'ᵀ + bias) v'     k', v' = columns of image_keys and image_values [batch, tokens, W]

    Keys and values are inputs, not image tokens with matrices to multiply them with: they are the same in every step,
    so they are computed once per prompt, outside; adapters of other kinds need no rebuild; and the samples of one batch
    may have prompts of different adapters without a product per adapter. The scale of the scores lies in the keys, an
    adapter's strength in the values, so that zeros, which stand for no prompt, add exactly zero.

    Of several adapters at once each has ``tokens`` places and a softmax of its own, as in diffusers. ``image_bias``
    [batch, tokens] is added to the scores: a large negative number keeps places out that have no token. Where it is
    the same everywhere, as for a sample without a prompt, the shares are finite and the values zero.

    The layer's own attention keeps its form, which backends look for: queries are taken apart once more, and the sum is
    behind the Reshape that ends it.

    The sum is larger than what was calibrated. Where an activation quantizer reads it (``quantizers``, by attention),
    ``reach`` [batch, attentions] is one more input: the largest magnitude that prompts can add, for
    :class:`~s2p_deploy.export.passes.gather_scales.GatherScales` to add to the grid.

    ``slots`` says where the columns of each attention lie.

    Requires: a cross-attention. Ensures: ``slots`` has every one.
    """

    def __init__(self, tokens: int, adapters: int, dtype: ir.DataType, quantizers: Mapping[str, str]) -> None:
        super().__init__()
        self.tokens, self.adapters, self.dtype, self.quantizers = tokens, adapters, dtype, quantizers
        self.slots: ImageSlots | None = None
        self.reach: ir.Value | None = None

    def requires(self, model: ir.Model) -> None:
        """Checks the requirement."""
        if not _cross_attention(model.graph):
            raise ir.passes.PreconditionError("no cross-attention is in the graph")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the inputs and the attention."""
        graph, found = model.graph, _cross_attention(model.graph)
        slots, start = [], 0
        for match in found:
            width = match.queries.heads * match.queries.width
            layer = module_path(match.last)
            slots.append(ImageSlot(layer, start, width, match.scale, self.quantizers.get(layer)))
            start += width
        self.slots = ImageSlots(self.tokens, self.adapters, tuple(slots))
        beside = _Beside(graph, self.slots, self.dtype)
        for number, match in enumerate(found):
            beside.add(match, number)
        if self.slots.quantizers:
            shape = ir.Shape(["batch", len(found)])
            self.reach = ir.Value(name=IMAGE_REACH, type=ir.TensorType(self.dtype), shape=shape)
            graph.inputs.append(self.reach)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        layers = {module_path(node) for node in model.graph if node.op_type == "Softmax"}
        crossing = {layer for layer in layers if layer.endswith(f".{CROSS_ATTENTION}")}
        if self.slots is None or {slot.layer for slot in self.slots.layers} != crossing:
            raise ir.passes.PostconditionError(f"{model.graph.name}: a cross-attention takes no image prompts")


def _cross_attention(graph: ir.Graph) -> list[Attention]:
    return [match for match in find_attention(graph) if module_path(match.last).endswith(f".{CROSS_ATTENTION}")]


class _Beside:
    """The attention beside a graph's own while it is added."""

    def __init__(self, graph: ir.Graph, slots: ImageSlots, dtype: ir.DataType) -> None:
        self._graph, self._slots, self._type = graph, slots, ir.TensorType(dtype)
        first, tokens = next(iter(graph)), slots.most_tokens
        inputs = [
            ir.Value(name=name, type=self._type, shape=ir.Shape(["batch", tokens, *width]))
            for name, width in ((IMAGE_KEYS, [slots.width]), (IMAGE_VALUES, [slots.width]), (IMAGE_BIAS, []))
        ]
        graph.inputs.extend(inputs)
        sizes = self._integers(f"{IMAGE_KEYS}/sizes", [slot.width for slot in slots.layers])
        splits = [
            ir.node("Split", [value, sizes], {"axis": 2}, num_outputs=len(slots.layers), name=f"{value.name}/Split")
            for value in inputs[:2]
        ]
        spread = self._node("Unsqueeze", [inputs[2], self._integers(f"{IMAGE_BIAS}/axes", [1, 2])], f"{IMAGE_BIAS}/4d")
        spread.outputs[0].shape = ir.Shape(["batch", 1, 1, tokens])
        graph.insert_before(first, [*splits, spread])
        for split in splits:
            for number, (value, slot) in enumerate(zip(split.outputs, slots.layers, strict=True)):
                value.name, value.type = f"{split.name}.{number}", self._type
                value.shape = ir.Shape(["batch", tokens, slot.width])
        self._keys, self._values = (split.outputs for split in splits)
        self._bias = spread.outputs[0]

    def add(self, match: Attention, number: int) -> None:
        """Adds the attention of a layer; what read the layer's own result reads the sum, under the result's name."""
        name, tokens = f"{self._slots.layers[number].layer}/image", self._slots.most_tokens
        heads, width = match.queries.heads, match.queries.width
        asking = None if match.queries.source.shape is None else match.queries.source.shape[1]
        apart = self._integers(f"{name}/heads", [0, tokens, heads, width])
        shape_of_queries, back = match.queries.reshape.inputs[1], match.last.inputs[1]
        assert shape_of_queries is not None  # a Reshape has two inputs
        assert back is not None
        queries = self._in_heads(match.queries.source, shape_of_queries, f"{name}/queries", [0, 2, 1, 3])
        keys = self._in_heads(self._keys[number], apart, f"{name}/keys", [0, 2, 3, 1])
        values = self._in_heads(self._values[number], apart, f"{name}/values", [0, 2, 1, 3])
        scores = self._node("MatMul", [queries[-1].outputs[0], keys[-1].outputs[0]], f"{name}/scores")
        biased = self._node("Add", [scores.outputs[0], self._bias], f"{name}/biased")
        shares = self._shares(biased.outputs[0], name)
        mixed = self._node("MatMul", [shares[-1].outputs[0], values[-1].outputs[0]], f"{name}/mixed")
        turned = self._node("Transpose", [mixed.outputs[0]], f"{name}/turned", perm=[0, 2, 1, 3])
        flat = self._node("Reshape", [turned.outputs[0], back], f"{name}/flat")
        for node in (scores, biased, shares[-1]):
            node.outputs[0].shape = ir.Shape(["batch", heads, asking, tokens])
        self._add_to_result(match, [*queries, *keys, *values, scores, biased, *shares, mixed, turned, flat], name)

    def _add_to_result(self, match: Attention, nodes: Sequence[ir.Node], name: str) -> None:
        own = match.last.outputs[0]
        readers = list(own.uses())
        total = self._node("Add", [own, nodes[-1].outputs[0]], f"{name}/sum")
        total.outputs[0].shape = nodes[-1].outputs[0].shape = own.shape
        for node in (*nodes, total):
            node.metadata_props.update(match.last.metadata_props)  # part of the same module
        self._graph.insert_after(match.last, [*nodes, total])
        for reader, index in readers:
            reader.replace_input_with(index, total.outputs[0])
        total.outputs[0].name, own.name = own.name, f"{name}/without"

    def _in_heads(self, value: ir.Value, shape: ir.Value, name: str, order: Sequence[int]) -> list[ir.Node]:
        reshape = self._node("Reshape", [value, shape], f"{name}/apart")
        return [reshape, self._node("Transpose", [reshape.outputs[0]], name, perm=order)]

    def _shares(self, scores: ir.Value, name: str) -> list[ir.Node]:
        """Takes a softmax over the tokens of each adapter."""
        if self._slots.adapters == 1:
            return [self._node("Softmax", [scores], f"{name}/shares", axis=-1)]
        shape = self._integers(f"{name}/adapters", [0, 0, 0, self._slots.adapters, self._slots.tokens])
        apart = self._node("Reshape", [scores, shape], f"{name}/scores_apart")
        softmax = self._node("Softmax", [apart.outputs[0]], f"{name}/shares_apart", axis=-1)
        together = self._integers(f"{name}/together", [0, 0, 0, self._slots.most_tokens])
        return [apart, softmax, self._node("Reshape", [softmax.outputs[0], together], f"{name}/shares")]

    def _node(self, op: str, inputs: Sequence[ir.Value], name: str, **attributes: int | Sequence[int]) -> ir.Node:
        """Makes a node whose one value has its name."""
        node = ir.node(op, inputs, attributes, name=name)
        node.outputs[0].name, node.outputs[0].type = name, self._type
        return node

    def _integers(self, name: str, values: Sequence[int]) -> ir.Value:
        value = constant(name, np.asarray(values, np.int64))
        self._graph.initializers.add(value)
        return value
