"""Folds shape arithmetic and removes identities, without looking at any weight."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from s2p_deploy.export.scopes import NAME_SCOPES

_FOLD_UP_TO = 1024  # elements; what is folded is shapes, axes and scalars


class FoldConstants(ir.passes.InPlacePass):
    """Runs onnxscript's optimizer while the weights stand among the graph's inputs, where it cannot ask for their data.

    Ensures: (1) no Identity and no Constant is left; (2) weights are initializers again, in their old order, with
    ``const_value`` None; (3) every node has name scopes: one that folding made takes those of its first reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in place."""
        graph = model.graph
        weights = list(graph.initializers.values())
        inputs = list(graph.inputs)
        for weight in weights:
            del graph.initializers[weight.name or ""]
            weight.const_value = None
            graph.inputs.append(weight)
        optimizer.optimize_ir(model, input_size_limit=_FOLD_UP_TO)
        del graph.inputs[len(inputs) :]
        for weight in weights:
            if weight.uses():
                graph.initializers.add(weight)
        for node in reversed(graph):
            if NAME_SCOPES not in node.metadata_props:
                _take_scopes_of_reader(node)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks (1)."""
        left = {"Identity", "Constant"} & {node.op_type for node in model.graph}
        if left:
            raise ir.passes.PostconditionError(f"{sorted(left)} left after folding")


def _take_scopes_of_reader(node: ir.Node) -> None:
    for output in node.outputs:
        for reader, _ in output.uses():
            if NAME_SCOPES in reader.metadata_props:
                node.metadata_props[NAME_SCOPES] = reader.metadata_props[NAME_SCOPES]
                return
