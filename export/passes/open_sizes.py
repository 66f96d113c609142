"""Makes a graph traced with open sizes readable: constant shapes where they can be, and names for sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from s2p_deploy.export.tensors import constant

BATCH, HEIGHT, WIDTH, TOKENS = "batch", "height", "width", "tokens"
SAMPLE = "sample"
_COPIED, _INFERRED = 0, -1  # what a Reshape's sizes may say besides numbers


class OpenSizes(ir.passes.InPlacePass):
    """Opens a graph to latents [batch, C, height, width] of any size that the network takes, or to texts of any length.

    1. A Reshape whose sizes are computed at run time gets constants, where each is a number or the size of the same
       dimension before, but for at most one. What computed them goes, where nothing else reads it.
    2. Where height and width are open, ``sample`` and the output are [batch, C, height, width]; other sizes that depend
       on these have no name. Texts keep their [batch, tokens, ...].

    Requires: ``sample`` of rank 4. Ensures: no symbolic size but ``batch``, ``height``, ``width`` and ``tokens`` has a
    name.
    """

    def requires(self, model: ir.Model) -> None:
        """Checks the requirement."""
        if not any(value.name == SAMPLE and _rank(value) == 4 for value in model.graph.inputs):
            raise ir.passes.PreconditionError("the graph has no input sample of rank 4")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place."""
        graph = model.graph
        sample = next(value for value in graph.inputs if value.name == SAMPLE)
        assert sample.shape is not None  # traced
        latents = (sample, *graph.outputs) if not isinstance(sample.shape[2], int) else ()
        for node in graph:
            target = _constant_target(node) if node.op_type == "Reshape" else None
            if target is not None:
                _reshape_to(graph, node, target)
        RemoveUnusedNodesPass()(model)
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_known(size) for size in value.shape])
        for value in latents:
            assert value.shape is not None  # traced
            value.shape = ir.Shape([BATCH, value.shape[1], HEIGHT, WIDTH])
        return ir.passes.PassResult(model, modified=True)


def _constant_target(node: ir.Node) -> list[int] | None:
    """Returns the sizes of a Reshape as constants; None where they are, or where two are known at run time alone."""
    source, target = node.inputs[0], node.inputs[1]
    given, made = (source.shape if source is not None else None), node.outputs[0].shape
    if given is None or made is None or target is None or target.is_initializer():
        return None
    sizes = [_size(size, given[at] if at < len(given) else None) for at, size in enumerate(made)]
    return sizes if sizes.count(_INFERRED) <= 1 else None


def _size(size: int | ir.SymbolicDim, before: int | ir.SymbolicDim | None) -> int:
    if isinstance(size, int):
        return size
    return _COPIED if size.value is not None and size == before else _INFERRED


def _reshape_to(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    """Gives a Reshape constant sizes; equal sizes are one initializer."""
    name = f"sizes/{'x'.join(map(str, sizes))}"
    if name not in graph.initializers:
        graph.initializers.add(constant(name, np.asarray(sizes, np.int64)))
    node.replace_input_with(1, graph.initializers[name])
    node.attributes.pop("allowzero", None)  # a zero copies


def _known(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value if size.value in {BATCH, TOKENS} else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0
