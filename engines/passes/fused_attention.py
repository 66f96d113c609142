"""Writes attention as the one operator that ONNX Runtime has for it."""

from __future__ import annotations

import onnx_ir as ir

from s2p_deploy.engines.passes.rescaled_quantizers import remove_unread
from s2p_deploy.export.attention import Attention, find_attention

DOMAIN = "com.microsoft"


class FusedAttention(ir.passes.InPlacePass):
    """Attention of torch's exporter becomes ``com.microsoft.MultiHeadAttention``, which never holds all scores.

    attention of q, k, v (:class:`Attention`) = MultiHeadAttention(q, k, v, num_heads=H, scale=a·b)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every occurrence."""
        matches = find_attention(model.graph)
        for match in matches:
            _fuse(model.graph, match)
        if matches:
            model.opset_imports[DOMAIN] = 1
            remove_unread(model)
        return ir.passes.PassResult(model, modified=bool(matches))


def _fuse(graph: ir.Graph, match: Attention) -> None:
    old = match.last.outputs[0]
    node = ir.node(
        "MultiHeadAttention",
        (match.queries.source, match.keys.source, match.values.source),
        {"num_heads": match.queries.heads, "scale": match.scale},
        domain=DOMAIN,
        name=f"{match.last.name}/MultiHeadAttention",
    )
    made = node.outputs[0]
    made.type, made.shape = old.type, old.shape
    graph.insert_before(match.last, node)
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(match.last, safe=True)
    name, old.name = old.name, None
    made.name = name
