from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from artifacts import tiny_inputs

from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export import GraphParts, block_subgraph, site_subgraph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.records import ExportedGraph

BLOCK = "down_blocks.0.attentions.0"


def test_parts_in_sequence_give_the_whole_graphs_own_tensors(w8a8_graph: ExportedGraph, run_onnx: Callable) -> None:
    """Blocks whose inputs are all known so far are run one after another; they must reproduce the graph bit for bit."""
    model = onnx.load(w8a8_graph.onnx_file)
    taps = [tap for block in w8a8_graph.blocks for tap in (*block.entering, *block.leaving)]
    wanted = {tap.tensor for tap in taps} - {"sample", "noise_pred"}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(wanted))
    values = tiny_inputs(2) | {"act_scales": w8a8_graph.scales.scales}
    whole = run_onnx(model, values)
    parts = GraphParts(w8a8_graph)
    for block in w8a8_graph.blocks:
        part = run_onnx(parts.block(block.block), whole | values)
        assert block.leaving
        for tap in block.leaving:
            np.testing.assert_array_equal(part[tap.tensor], whole[tap.tensor], err_msg=block.block)


def test_a_block_asks_only_for_what_it_needs(w8a8_graph: ExportedGraph) -> None:
    def inputs(block: str) -> list[str]:
        return [item.name for item in block_subgraph(w8a8_graph, block).graph.input]

    assert inputs("conv_in") == ["sample"]
    assert inputs("down_blocks.0.resnets.0") == ["conv_in/output", "step_index", "act_scales"]
    assert inputs(BLOCK)[1:] == ["step_index", "encoder_hidden_states", "act_scales"]
    assert inputs("output") == ["up_blocks.1.attentions.1/Add"]


def test_parts_are_valid_models_with_their_weights_inside(w8a8_graph: ExportedGraph) -> None:
    block = block_subgraph(w8a8_graph, "mid_block.resnets.0")
    onnx.checker.check_model(block, full_check=True)
    assert all(item.data_location == onnx.TensorProto.DEFAULT for item in block.graph.initializer)
    weight = next(item for item in block.graph.initializer if item.name.endswith("conv1/weight_quantizer/codes"))
    assert len(weight.raw_data) == 64 * 64 * 9


def test_a_site_gives_its_codes_too(w8a8_graph: ExportedGraph) -> None:
    site = w8a8_graph.sites[1]
    model = site_subgraph(w8a8_graph, site.site)
    assert [item.name for item in model.graph.output] == [site.output, site.codes]
    assert model.graph.output[1].type.tensor_type.elem_type == onnx.TensorProto.INT8
    weight_only = site_subgraph(w8a8_graph, "conv_in")
    assert [item.name for item in weight_only.graph.output] == ["conv_in/output"]


def test_the_same_part_is_cut_from_another_file(w8a8_graph: ExportedGraph, w4a4_graph: ExportedGraph) -> None:
    model = block_subgraph(w8a8_graph, "mid_block.resnets.0", w4a4_graph.onnx_file)
    assert "Clip" in {node.op_type for node in model.graph.node}


def test_wrong_names_are_refused(w8a8_graph: ExportedGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no block mid_block in .*: use one of conv_in"):
        block_subgraph(w8a8_graph, "mid_block")
    with pytest.raises(InputError, match="no site nothing"):
        site_subgraph(w8a8_graph, "nothing")
    onnx.save(block_subgraph(w8a8_graph, "conv_in"), tmp_path / "other.onnx")
    with pytest.raises(GraphContractError, match="has no tensor"):
        block_subgraph(w8a8_graph, BLOCK, tmp_path / "other.onnx")
