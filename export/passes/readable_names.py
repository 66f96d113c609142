"""Names nodes and values after the module they came from."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.export.scopes import module_path

if TYPE_CHECKING:
    from collections.abc import Iterator


class ReadableNames(ir.passes.InPlacePass):
    """A node becomes ``<module path>/<Op>``, with ``_1``, ``_2`` where a module has more of the kind.

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


def _folded(graph: ir.Graph) -> Iterator[ir.Value]:
    """Small constants that folding left, in the order in which nodes read them."""
    seen: set[ir.Value] = set()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in seen:
                seen.add(value)
                if not isinstance(value.const_value, ir.LazyTensor):
                    yield value
