"""Pads narrow heads of long attention, which OpenVINO computes faster so in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.attention import find_attention

if TYPE_CHECKING:
    from s2p_deploy.export.attention import Attention, Heads

_TILE = 32  # bfloat16 values in a row of an AMX tile
_TEXT_TOKENS = "tokens"
_LONG = 512  # tokens from which on the product of scores is worth more than the copies


class PaddedHeads(ir.passes.InPlacePass):
    """Queries and keys in heads [B, T, H, D] get zeros up to the next multiple of 32.

        Reshape(x, [B, T, H, D])  ->  Pad(Reshape(x, [B, T, H, D]), up to D')

    Zeros add nothing to a score, so the numbers stay. Condition: at least 512 tokens, or an open number that is not the
    text's: on a core with AMX and D = 40, one attention of Stable Diffusion v1 with 4096 tokens took 111 instead of 136
    ms (119 with padded values, which were cut off again), with 512 2.9 instead of 3.2; with 256 and with 77 nothing was
    gained, and float32 lost a fifth. ``benchmarks/engines/attention_forms.py`` measures again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every occurrence."""
        matches = [match for match in find_attention(model.graph) if _gains(match)]
        for match in matches:
            for heads in (match.queries, match.keys):
                _forget_shapes(_pad(model.graph, heads))
        return ir.passes.PassResult(model, modified=bool(matches))


def _gains(match: Attention) -> bool:
    width, tokens = match.keys.width, match.keys.tokens
    many = tokens >= _LONG or (tokens < 0 and not _of_text(match.keys.source))
    return match.queries.width == width and width % _TILE != 0 and many


def _of_text(keys: ir.Value) -> bool:
    """Returns whether an open number of tokens is that of the text: it alone has a name."""
    return keys.shape is not None and keys.shape[1] == _TEXT_TOKENS


def _pad(graph: ir.Graph, heads: Heads) -> ir.Value:
    """Pads, and returns what the others read now."""
    whole = heads.reshape.outputs[0]
    missing = -heads.width % _TILE
    ends = _initializer(graph, f"{whole.name}/pads", [0, 0, 0, 0, 0, 0, 0, missing])
    pad = ir.node("Pad", (whole, ends), name=f"{whole.name}/Pad")
    pad.outputs[0].type = whole.type
    for user, index in tuple(whole.uses()):
        if user is not pad:
            user.replace_input_with(index, pad.outputs[0])
    graph.insert_after(heads.reshape, pad)
    return pad.outputs[0]


def _forget_shapes(padded: ir.Value) -> None:
    """Drops the recorded shapes from the padded value up to the scores: the width changed."""
    (node,) = padded.consumers()
    while node.op_type != "MatMul":
        node.outputs[0].shape = None
        (node,) = node.outputs[0].consumers()


def _initializer(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(numbers, dtype=np.int64), name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(numbers)])
    graph.register_initializer(value)
    return value
