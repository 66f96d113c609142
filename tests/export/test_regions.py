from __future__ import annotations

from typing import Literal

import onnx_ir as ir
import pytest
from graph_text import graph_from_text

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export.regions import NAME_SCOPES, conditions, inside, locate_layers, module_path, tapped
from s2p_deploy.families import Tap
from s2p_deploy.records import LayerPlan

# Two convolutions in a block, with text added inside it, and a linear layer behind.
GRAPH = """
denoiser (
    float[1,2,4,4] sample, int64[1] timestep_index, float[1,2,1,1] encoder_hidden_states,
    float[2,2,1,1] first, float[2,2,1,1] second, float[4,4] last, float[4] bias
) => (float[1,2,4,4] noise_pred) {
    entered = Sigmoid(sample)
    a = Conv(entered, first)
    b = Add(a, encoder_hidden_states)
    c = Conv(b, second)
    d = MatMul(c, last)
    noise_pred = Add(d, bias)
}
"""
SCOPES = ["", "block.first", "block", "block.second", "last", "last"]
PLAN = (
    LayerPlan("block.first", "conv", "int8", None, ""),
    LayerPlan("block.second", "conv", "int8", None, ""),
    LayerPlan("last", "linear", "int8", None, ""),
)


def graph(scopes: list[str]) -> ir.Graph:
    made = graph_from_text(GRAPH, dict.fromkeys(("first", "second", "last", "bias"))).graph
    for node, path in zip(made, scopes, strict=True):
        node.metadata_props[NAME_SCOPES] = str(["", "network", f"network.{path}" if path else "network", "op"])
    return made


def test_module_path_is_the_innermost_module() -> None:
    assert [module_path(node) for node in graph(SCOPES)] == SCOPES
    assert module_path(ir.node("Add", [])) == ""


def test_inside_takes_whole_path_components() -> None:
    assert inside("up.1", ("up.1",))
    assert inside("up.1.conv", ("down", "up.1"))
    assert not inside("up.10", ("up.1",))


def test_layers_are_found_by_scope_whatever_the_order() -> None:
    made = graph(["", "block.second", "block", "block.first", "last", "last"])
    first, second, last = locate_layers(made, PLAN)
    assert (first.input.name, first.weight.name, first.output.name) == ("b", "second", "c")
    assert second.input.name == "entered"
    assert (last.input.name, last.output.name) == ("c", "noise_pred")  # with its bias


@pytest.mark.parametrize(
    ("scopes", "count"), [(["", "x", "x", "x", "last", "last"], 0), (["", *["block.first"] * 3, "last", "last"], 2)]
)
def test_a_layer_without_exactly_one_node_is_named(scopes: list[str], count: int) -> None:
    with pytest.raises(GraphContractError, match=f"layer block.first has {count} Conv nodes"):
        locate_layers(graph(scopes), PLAN)


def tap(made: ir.Graph, module: str, side: Literal["input", "output"]) -> str | None:
    value = tapped(made, Tap(module, side), conditions(made))
    return None if value is None else value.name


def test_a_module_has_one_activation_in_and_one_out_besides_text() -> None:
    made = graph(SCOPES)
    assert (tap(made, "block", "input"), tap(made, "block", "output")) == ("entered", "c")
    assert (tap(made, "last", "input"), tap(made, "last", "output")) == ("c", "noise_pred")


def test_a_module_with_two_activations_is_refused() -> None:
    made = graph(["", "block.first", "", "block.second", "block", "block"])
    for side in ("input", "output"):
        with pytest.raises(GraphContractError, match=f"module block has 2 activations as {side}, expected one"):
            tap(made, "block", side)


def test_what_depends_on_the_text_alone_neither_enters_nor_leaves() -> None:
    text = """
    g (float[2] sample, float[2] encoder_hidden_states, float[2] time_projections) => (float[2] out) {
        embedded = Mul(encoder_hidden_states, time_projections)
        out = Add(embedded, sample)
    }
    """
    made = graph_from_text(text, {}).graph
    for node, path in zip(made, ("embedder", "norm"), strict=True):
        node.metadata_props[NAME_SCOPES] = str(["", "network", f"network.{path}", "op"])
    assert tap(made, "embedder", "input") is None
    with pytest.raises(GraphContractError, match="module embedder has 0 activations as output"):
        tap(made, "embedder", "output")
    assert (tap(made, "norm", "input"), tap(made, "norm", "output")) == ("sample", "out")


def test_a_module_that_gives_nothing_is_refused() -> None:
    with pytest.raises(GraphContractError, match="module absent has 0 activations as output"):
        tap(graph(SCOPES), "absent", "output")


def test_what_hangs_on_conditions_alone_is_a_condition() -> None:
    text = """
    g (float[2] sample, int64[1] timestep_index, float[5] table) => (float[1] out) {
        row = Gather(table, timestep_index)
        twice = Add(row, row)
        out = Mul(twice, sample)
    }
    """
    made = graph_from_text(text, {"table": None}).graph
    assert {value.name for value in conditions(made)} == {"timestep_index", "table", "row", "twice"}
