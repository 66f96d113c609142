"""Moves what reads nothing but the text into a graph of its own, which runs once per prompt and not in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.tensors import constant
from s2p_deploy.records.optional_inputs import LORA_INPUTS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

TEXT, TEXT_PROJECTIONS = "encoder_hidden_states", "text_projections"
_AXIS = 2  # of [batch, tokens, width]


class HoistedText(ir.passes.InPlacePass):
    """Cuts the products of the text out: to_k and to_v of cross-attention, or the context embedder.

        before        text → op_i → y_i → rest
        text graph    text → op_i → y_i → Concat → text_projections [batch, tokens, sum of widths]
        this graph    text_projections → Split → y_i → rest

    Every node moves that leads from the text, constants and the inputs of LoRAs alone to one of ``products``, and the
    Adds right behind those (a bias). Reshapes into heads stay. The y_i have their names in both graphs. What depends on
    no text stays here too where it is read here: the strengths of LoRAs act in both graphs.

    ``text_graph`` is the new graph, whose inputs are the text and those of LoRAs that it needs; ``columns`` are the y_i
    in order, ``moved`` the nodes that are there.

    Requires: a graph input ``encoder_hidden_states``, and a product that reads no latents. Ensures: nothing here reads
    that input, and ``text_projections`` is in its place.
    """

    def __init__(self, products: Collection[ir.Node]) -> None:
        super().__init__()
        self.products = products
        self.text_graph: ir.Model | None = None
        self.columns: tuple[ir.Value, ...] = ()
        self.moved: frozenset[ir.Node] = frozenset()

    def requires(self, model: ir.Model) -> None:
        """Checks the requirements."""
        if not set(self.products) & _of_text(model.graph):
            raise ir.passes.PreconditionError(f"no product reads {TEXT} alone")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Divides the graph."""
        graph = model.graph
        text = next(value for value in graph.inputs if value.name == TEXT)
        of_text = _of_text(graph)
        self.moved = _behind(graph, _leading_to(of_text & set(self.products)), of_text)
        made = [value for node in graph if node in self.moved & of_text for value in node.outputs]
        ends = [value for value in made if any(reader not in self.moved for reader in value.consumers())]
        read = {value for node in self.moved for value in node.inputs}
        taken = [text, *(value for value in graph.inputs if value.name in LORA_INPUTS and value in read)]
        self.text_graph = ir.Model(ir.convenience.extract(graph, taken, ends), ir_version=model.ir_version)
        _sort_initializers(self.text_graph.graph, graph)
        _join(self.text_graph.graph)
        self.columns = _divide(graph, text, ends)
        _remove_unread(graph, self.moved)
        graph.inputs.remove(text)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        for node in model.graph:
            if TEXT in {value.name for value in node.inputs if value is not None}:
                raise ir.passes.PostconditionError(f"{node.name} still reads {TEXT}")


def _of_text(graph: ir.Graph) -> set[ir.Node]:
    """Finds the nodes that depend on the text, and besides on constants and the inputs of LoRAs alone."""
    dependent = {value for value in graph.inputs if value.name == TEXT}
    beside = {*graph.initializers.values(), *(value for value in graph.inputs if value.name in LORA_INPUTS)}
    found = set()
    for node in graph:
        read = {value for value in node.inputs if value is not None}
        if read <= beside:
            beside.update(node.outputs)
        elif read <= beside | dependent:
            dependent.update(node.outputs)
            found.add(node)
    return found


def _leading_to(nodes: Collection[ir.Node]) -> set[ir.Node]:
    """``nodes`` and all that they depend on."""
    found: set[ir.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    return found


def _behind(graph: ir.Graph, moved: set[ir.Node], of_text: Collection[ir.Node]) -> frozenset[ir.Node]:
    """``moved`` and the Adds of what they and constants give."""
    found = set(moved)
    for node in graph:
        makers = {value.producer() for value in node.inputs if value is not None and not value.is_initializer()}
        if node.op_type == "Add" and node in of_text and makers <= found:
            found.add(node)
    return frozenset(found)


def _sort_initializers(graph: ir.Graph, whole: ir.Graph) -> None:
    """Gives initializers the order that they had in the whole graph; what extracts leaves it to chance."""
    for name in [name for name in whole.initializers if name in graph.initializers]:
        graph.initializers.add(graph.initializers.pop(name))


def _join(graph: ir.Graph) -> None:
    """Makes one output of the graph's outputs."""
    parts = list(graph.outputs)
    node = ir.node("Concat", parts, {"axis": _AXIS}, name=f"{TEXT_PROJECTIONS}/Concat")
    joined, first = node.outputs[0], parts[0]
    joined.name, joined.type = TEXT_PROJECTIONS, first.type
    joined.shape = _joined_shape(parts)
    graph.append(node)
    graph.outputs[:] = [joined]


def _divide(graph: ir.Graph, text: ir.Value, ends: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """Puts ``text_projections`` in the text's place among the inputs; its parts take over the readers and the names."""
    given = ir.Value(name=TEXT_PROJECTIONS, type=ends[0].type, shape=_joined_shape(ends))
    graph.inputs.insert(graph.inputs.index(text), given)
    sizes = constant(f"{TEXT_PROJECTIONS}/sizes", np.asarray([_width(end) for end in ends], np.int64))
    graph.initializers.add(sizes)
    node = ir.node("Split", [given, sizes], {"axis": _AXIS}, num_outputs=len(ends), name=f"{TEXT_PROJECTIONS}/Split")
    graph.insert_before(next(iter(graph)), node)
    for end, part in zip(ends, node.outputs, strict=True):
        part.type, part.shape = end.type, end.shape
        ir.convenience.replace_all_uses_with(end, part)
        part.name, end.name = end.name, f"{end.name}/moved"
    return tuple(node.outputs)


def _joined_shape(parts: Sequence[ir.Value]) -> ir.Shape:
    assert parts[0].shape is not None  # traced values have shapes
    return ir.Shape([*list(parts[0].shape)[:_AXIS], sum(map(_width, parts))])


def _width(value: ir.Value) -> int:
    assert value.shape is not None  # as above
    width = value.shape[_AXIS]
    assert isinstance(width, int)  # a layer's number of channels
    return width


def _remove_unread(graph: ir.Graph, moved: Collection[ir.Node]) -> None:
    for node in reversed(graph):
        if node in moved and not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
