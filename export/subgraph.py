"""Subgraphs of a canonical graph as models of their own, which can be fed the reference's own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from s2p_deploy.errors import GraphContractError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

    from s2p_deploy.records import ExportedGraph


class Subgraphs:
    """Cuts subgraphs out of one graph file, which is parsed once.

    Args:
        graph: says where blocks and layers are.
        onnx_file: another file with the same tensor names, such as a backend's prepared graph.
    """

    def __init__(self, graph: ExportedGraph, onnx_file: Path | None = None) -> None:
        self.graph = graph
        self.file = onnx_file or graph.onnx_file
        self._model = ir.load(self.file)
        self._values = ir.convenience.create_value_mapping(self._model.graph)

    def block(self, block: str) -> onnx.ModelProto:
        """Cuts out a block, its weights inside.

        Inputs: the entering activations under their own names, then those graph inputs that it needs
            (``timestep_index``, ``encoder_hidden_states`` or ``text_projections``, ``act_scales``,
            ``time_projections``). Outputs: the leaving activations.

        Raises:
            InputError: there is no such block. GraphContractError: the file does not hold the block's tensors.
        """
        cut = next((item for item in self.graph.blocks if item.block == block), None)
        if cut is None:
            names = ", ".join(item.block for item in self.graph.blocks)
            raise InputError(f"no block {block} in {self.graph.folder}: use one of {names}")
        return _proto(self.between([tap.tensor for tap in cut.entering], [tap.tensor for tap in cut.leaving]))

    def layer(self, layer: str) -> onnx.ModelProto:
        """Cuts out a layer with its quantizers and weights, otherwise as :meth:`block`.

        A layer of the text is in the graph's ``text_file``.

        Where the layer's activation is quantized, its codes (INT8) are a second output.
        """
        cut = next((item for item in self.graph.layers if item.name == layer), None)
        if cut is None:
            raise InputError(f"no layer {layer} in the plan of {self.graph.folder}")
        return _proto(self.between([cut.input], [cut.output, cut.codes] if cut.codes else [cut.output]))

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> ir.Model:
        """Cuts out the nodes between tensors ``entries`` (and graph inputs) and ``outputs``; weights stay in the file.

        Raises:
            GraphContractError: the file has no such tensor.
        """
        missing = [name for name in (*entries, *outputs) if name not in self._values]
        if missing:
            raise GraphContractError(f"{self.file} has no tensor {missing[0]}: it is not made from this graph")
        starts, ends = ([self._values[name] for name in names] for names in (entries, outputs))
        graph = self._model.graph
        inputs = [*starts, *(value for value in _reached_inputs(graph, starts, ends) if value not in starts)]
        return ir.Model(ir.convenience.extract(graph, inputs, ends), ir_version=self._model.ir_version)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Returns the value of an initializer; None where there is none of that name."""
        value = self._model.graph.initializers.get(name)
        return None if value is None or value.const_value is None else value.const_value.numpy()


def _proto(part: ir.Model) -> onnx.ModelProto:
    """Puts the weights inside."""
    ir.external_data.load_to_model(part)
    return ir.to_proto(part)


def _reached_inputs(graph: ir.Graph, starts: Sequence[ir.Value], ends: Sequence[ir.Value]) -> list[ir.Value]:
    """Finds the graph inputs that ``ends`` depend on other than through ``starts``, in the graph's order."""
    pending, seen = list(ends), set(starts)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None:
            pending.extend(v for v in producer.inputs if v is not None)
    return [value for value in graph.inputs if value in seen]
