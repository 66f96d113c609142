from __future__ import annotations

from graph_text import graph_from_text

from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.regions import NAME_SCOPES, module_path

GRAPH = """
g (float[batch,4] sample, float[4] second, float[4] first) => (float[batch,4] out) {
    one = Constant <value_float: float = 1.0> ()
    two = Add(one, one)
    same = Identity(sample)
    a = Mul(same, second)
    b = Mul(a, two)
    out = Add(b, first)
}
"""


def test_constants_fold_and_weights_come_back_without_data_in_their_order() -> None:
    model = graph_from_text(GRAPH, {"second": None, "first": None})
    for node in model.graph:
        node.metadata_props[NAME_SCOPES] = "['', 'network', 'network.norm', 'op']"
    FoldConstants()(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Mul", "Add"]
    assert [value.name for value in model.graph.inputs] == ["sample"]
    weights = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    assert weights == ["second", "first"]


def test_nodes_without_scopes_take_those_of_their_reader() -> None:
    model = graph_from_text(GRAPH, {"second": None, "first": None})
    last = model.graph.node(-1)
    last.metadata_props[NAME_SCOPES] = "['', 'network', 'network.norm', 'op']"
    FoldConstants()(model)
    assert {module_path(node) for node in model.graph} == {"norm"}
