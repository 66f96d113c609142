"""Names nodes and values after the module they came from, and removes what torch's exporter noted on them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy import __version__
from s2p_deploy.export.regions import module_path

if TYPE_CHECKING:
    from collections.abc import Iterator


class ReadableNames(ir.passes.InPlacePass):
    """Names a node ``<module path>/<Op>``, with ``_1``, ``_2`` where a module has more of the kind.

    Its value gets the node's name (``.0``, ``.1`` appended where it has several). Folded constants become
    ``constants/<n>``.

    Requires: parameters have their names already. Ensures: names are unique; graph inputs and outputs keep theirs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames in place."""
        graph = model.graph
        for number, value in enumerate(list(_folded(graph))):
            value.name = f"constants/{number}"
        seen: Counter[str] = Counter()
        outputs = set(graph.outputs)
        for node in graph:
            path = module_path(node)
            name = f"{path}/{node.op_type}" if path else node.op_type
            number = seen[name]
            seen[name] += 1
            node.name = f"{name}_{number}" if number else name
            for index, value in enumerate(node.outputs):
                if value not in outputs:
                    value.name = f"{node.name}.{index}" if len(node.outputs) > 1 else node.name
        return ir.passes.PassResult(model, modified=True)


class StripMetadata(ir.passes.InPlacePass):
    """Removes Python objects' names and stack traces, which have paths of this machine.

    Ensures: no metadata and no documentation on the model, its nodes and values; this package is the producer.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strips in place."""
        graph = model.graph
        for part in (
            model,
            graph,
            *graph,
            *graph.inputs,
            *graph.initializers.values(),
            *(v for n in graph for v in n.outputs),
        ):
            part.metadata_props.clear()
            part.doc_string = None
        graph.name = "denoiser"
        model.producer_name, model.producer_version = "s2p_deploy", __version__
        return ir.passes.PassResult(model, modified=True)


def _folded(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yields the small constants that folding left, in the order in which nodes read them."""
    seen: set[ir.Value] = set()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in seen:
                seen.add(value)
                if value.const_value is not None and not isinstance(value.const_value, ir.LazyTensor):
                    yield value
