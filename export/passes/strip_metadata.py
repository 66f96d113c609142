"""Removes what torch's exporter noted on the graph: Python objects' names, stack traces with paths of this machine."""

from __future__ import annotations

import onnx_ir as ir

from s2p_deploy import __version__


class StripMetadata(ir.passes.InPlacePass):
    """Ensures: no metadata and no documentation on the model, its nodes and values; this package is the producer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strips in place."""
        graph = model.graph
        for part in (model, graph, *graph, *graph.inputs, *graph.initializers.values(), *_values(graph)):
            part.metadata_props.clear()
            part.doc_string = None
        graph.name = "denoiser"
        model.producer_name, model.producer_version = "s2p_deploy", __version__
        return ir.passes.PassResult(model, modified=True)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]
