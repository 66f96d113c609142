from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from artifacts import tiny_inputs

from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export import Subgraphs

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
    parts = Subgraphs(w8a8_graph)
    for block in w8a8_graph.blocks:
        part = run_onnx(parts.block(block.block), whole | values)
        assert block.leaving
        for tap in block.leaving:
            np.testing.assert_array_equal(part[tap.tensor], whole[tap.tensor], err_msg=block.block)


def test_a_block_asks_only_for_what_it_needs(w8a8_graph: ExportedGraph) -> None:
    def inputs(block: str) -> list[str]:
        return [item.name for item in Subgraphs(w8a8_graph).block(block).graph.input]

    assert inputs("conv_in") == ["sample"]
    assert inputs("down_blocks.0.resnets.0") == ["conv_in/output", "timestep_index", "act_scales"]
    assert inputs(BLOCK)[1:] == ["timestep_index", "encoder_hidden_states", "act_scales"]
    assert inputs("output") == ["up_blocks.1.attentions.1/Add"]


def test_parts_are_valid_models_with_their_weights_inside(w8a8_graph: ExportedGraph) -> None:
    block = Subgraphs(w8a8_graph).block("mid_block.resnets.0")
    onnx.checker.check_model(block, full_check=True)
    assert all(item.data_location == onnx.TensorProto.DEFAULT for item in block.graph.initializer)
    weight = next(item for item in block.graph.initializer if item.name.endswith("conv1/weight_quantizer/codes"))
    assert len(weight.raw_data) == 64 * 64 * 9


def test_a_layer_gives_its_codes_too(w8a8_graph: ExportedGraph) -> None:
    layer = w8a8_graph.layers[1]
    model = Subgraphs(w8a8_graph).layer(layer.name)
    assert [item.name for item in model.graph.output] == [layer.output, layer.codes]
    assert model.graph.output[1].type.tensor_type.elem_type == onnx.TensorProto.INT8
    weight_only = Subgraphs(w8a8_graph).layer("conv_in")
    assert [item.name for item in weight_only.graph.output] == ["conv_in/output"]


def test_the_same_part_is_cut_from_another_file(w8a8_graph: ExportedGraph, w4a4_graph: ExportedGraph) -> None:
    model = Subgraphs(w8a8_graph, w4a4_graph.onnx_file).block("mid_block.resnets.0")
    assert "Clip" in {node.op_type for node in model.graph.node}


def test_wrong_names_are_refused(w8a8_graph: ExportedGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no block mid_block in .*: use one of conv_in"):
        Subgraphs(w8a8_graph).block("mid_block")
    with pytest.raises(InputError, match="no layer nothing"):
        Subgraphs(w8a8_graph).layer("nothing")
    onnx.save(Subgraphs(w8a8_graph).block("conv_in"), tmp_path / "other.onnx")
    with pytest.raises(GraphContractError, match="has no tensor"):
        Subgraphs(w8a8_graph, tmp_path / "other.onnx").block(BLOCK)
