"""Lowers activation quantizers whose scale does not depend on the timestep to ``static``: no multiplications."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_quantizers import remove_unread, rescaled_quantizers
from s2p_deploy.export.tensors import reshaped

if TYPE_CHECKING:
    from collections.abc import Collection

    from s2p_deploy.engines.passes.rescaled_quantizers import Product


class StaticQuantizers(ir.passes.InPlacePass):
    """Points whose codes are in ``codes`` lose both multiplications; their quantizers have the constant c already.

        x·(c/s) → Q(c) → DQ(c) → op → ·(s/c) → + bias      becomes      x → Q(c) → DQ(c) → op + bias

    Equal where s = c. The bias of a Conv becomes its own again. Tensors that others know by name (codes, a layer's
    result) keep their names.

    Requires: named quantizers have the form ``rescale``. Ensures: nothing reads a ratio of theirs; ``act_scales`` goes
    where nothing reads it.
    """

    def __init__(self, codes: Collection[str]) -> None:
        super().__init__()
        self.codes = codes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the quantizers."""
        quantizers = rescaled_quantizers(model.graph, self.codes)
        for quantizer in quantizers.values():
            source = quantizer.scaled.inputs[0]
            assert source is not None  # a Mul has both
            ir.convenience.replace_all_uses_with(quantizer.scaled.outputs[0], source)
            for product in quantizer.products:
                _unscale(model.graph, product)
        if quantizers:
            remove_unread(model)
        return ir.passes.PassResult(model, modified=bool(quantizers))


def _unscale(graph: ir.Graph, product: Product) -> None:
    """Replaces the Mul by the product; then a bias behind the Mul of a Conv goes into the Conv."""
    _stand_in(graph, product.rescaled, product.node)
    readers = list(product.node.outputs[0].consumers())
    if product.node.op_type != "Conv" or len(readers) != 1 or readers[0].op_type != "Add":
        return
    bias = readers[0].inputs[1]
    channels = _channels_of_bias(bias) if bias is not None else None
    if bias is None or channels is None:
        return
    own = reshaped(bias, (channels,))
    _stand_in(graph, readers[0], product.node)
    del graph.initializers[str(bias.name)]
    graph.initializers.add(own)
    product.node.resize_inputs(3)
    product.node.replace_input_with(2, own)


def _channels_of_bias(bias: ir.Value) -> int | None:
    """Counts the channels of an initializer [1, out, 1, 1] or [out, 1, 1] that nothing else reads; None for others."""
    if bias.shape is None or not bias.is_initializer() or len(bias.uses()) != 1:
        return None
    shape = bias.shape.numpy()
    # one number for all channels is no Conv's bias
    return shape[-3] if shape[-2:] == (1, 1) and shape[-3:-2] == (max(shape),) and max(shape) > 1 else None


def _stand_in(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """``new`` takes the readers, the name and the place among the outputs of ``old``, which goes."""
    gone, kept = old.outputs[0], new.outputs[0]
    ir.convenience.replace_all_uses_with(gone, kept, replace_graph_outputs=True)
    kept.shape = gone.shape or kept.shape
    graph.remove(old, safe=True)
    name, gone.name = gone.name, None
    kept.name = name
