"""Folds shape arithmetic and removes identities, without looking at any weight."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as clean_up
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from s2p_deploy.export.regions import NAME_SCOPES

_FOLD_UP_TO = 1024  # elements; what is folded is shapes, axes and scalars
# onnxscript's own list but for what no denoiser has, and for the search of Slices that form a Split: it looks through
# the whole graph again for every Slice, half of the export's time at full size
_RULES = (
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.two_reshapes_matmul_reshape_rule,  # the larger pattern goes first
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
_ROUNDS = 2


class FoldConstants(ir.passes.InPlacePass):
    """Runs onnxscript's folding and rewriting while the weights are inputs of the graph, whose data it cannot ask for.

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
        _simplify(model)
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


def _simplify(model: ir.Model) -> None:
    clean_up.InlinePass()(model)
    for _ in range(_ROUNDS):
        fold_constants(model, onnx_shape_inference=True, input_size_limit=_FOLD_UP_TO)
        RewritePass(_RULES)(model)
        clean_up.RemoveUnusedNodesPass()(model)
    for tidy in (
        clean_up.RemoveUnusedOpsetsPass(),
        clean_up.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        clean_up.DeduplicateInitializersPass(),
        clean_up.CommonSubexpressionEliminationPass(),
        clean_up.OutputFixPass(),
        clean_up.NameFixPass(),
    ):
        tidy(model)


def _take_scopes_of_reader(node: ir.Node) -> None:
    for output in node.outputs:
        for reader, _ in output.uses():
            if NAME_SCOPES in reader.metadata_props:
                node.metadata_props[NAME_SCOPES] = reader.metadata_props[NAME_SCOPES]
                return
