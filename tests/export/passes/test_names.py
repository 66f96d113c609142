from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from graph_text import graph_from_text

from s2p_deploy.export.passes.names import ReadableNames, StripMetadata
from s2p_deploy.export.regions import NAME_SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = """
g (float[2,4] sample, float val_3) => (float[2,2] noise_pred) {
    x = Mul(sample, val_3)
    y = Mul(x, val_3)
    p, q = Split <axis: int = 1, num_outputs: int = 2> (y)
    noise_pred = Add(p, q)
}
"""


def named() -> ir.Model:
    model = graph_from_text(GRAPH, {"val_3": np.asarray(2, np.float32)})
    for node in list(model.graph)[:3]:
        node.metadata_props[NAME_SCOPES] = "['', 'network', 'network.mid.norm', 'op']"
    ReadableNames()(model)
    return model


def test_names_follow_the_modules_and_are_distinct() -> None:
    graph = named().graph
    assert [node.name for node in graph] == ["mid.norm/Mul", "mid.norm/Mul_1", "mid.norm/Split", "Add"]
    assert [value.name for node in graph for value in node.outputs] == [
        "mid.norm/Mul",
        "mid.norm/Mul_1",
        "mid.norm/Split.0",
        "mid.norm/Split.1",
        "noise_pred",
    ]
    assert list(graph.initializers) == ["constants/0"]


def test_nothing_of_the_trace_is_left() -> None:
    model = named()
    model.graph.node(0).doc_string = "stack trace"
    StripMetadata()(model)
    assert all(not node.metadata_props and node.doc_string is None for node in model.graph)
    assert model.producer_name == "s2p_deploy"
