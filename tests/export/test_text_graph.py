"""Graphs whose products of the text are an input, with ``text.onnx`` beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from artifacts import tiny_calibrated, tiny_inputs

from s2p_deploy.errors import GraphContractError, InputError, IntegrityError
from s2p_deploy.export import Subgraphs, check_graph, export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import SmoothedLinear, apply_transforms
from s2p_deploy.records import ExportedGraph, TransformSpec
from s2p_deploy.records.exported_graph import GraphDescription
from s2p_deploy.records.optional_inputs import LORA_INPUTS
from s2p_deploy.records.typed_json import json_text, read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import CalibratedModel

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
VALUE = KEY.removesuffix("k") + "v"


@pytest.fixture(scope="module")
def apart(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "apart", text_projections="input")


@pytest.fixture(scope="module")
def adapted(w8a8: CalibratedModel) -> dict[str, ExportedGraph]:
    """Graphs of both forms with low-rank branches beside attention."""
    folder = w8a8.folder.parent
    return {
        form: export_graph(w8a8, folder / f"lora-{form}", text_projections=form, lora=LoraRequest(3))
        for form in ("graph", "input")
    }


def lora_values(graph: ExportedGraph, batch: int = 3, *, acting: bool = True) -> dict[str, np.ndarray]:
    random, sizes = np.random.default_rng(2), {spec.name: spec.shape for spec in graph.optional_inputs}
    found = {name: 0.3 * random.standard_normal(sizes[name]) for name in LORA_INPUTS[:2]}
    found["lora_strengths"] = random.standard_normal((batch, 3)) * acting
    return {name: value.astype(np.float32) for name, value in found.items()}


def values(graph: ExportedGraph, batch: int = 3) -> dict[str, np.ndarray]:
    return tiny_inputs(batch) | {"act_scales": graph.scales.scales}


def text_layers(graph: ExportedGraph) -> list[str]:
    return [layer.name for layer in graph.layers if layer.graph == "text"]


def test_the_graph_takes_products_where_it_took_the_text(apart: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    names = [spec.name for spec in w8a8_graph.inputs]
    taken = ["text_projections" if name == "encoder_hidden_states" else name for name in names]
    assert [spec.name for spec in apart.inputs] == taken
    assert apart.inputs[2].shape == ("batch", 6, 2 * (32 + 64 + 32 + 32))  # k and v of four attentions
    assert [spec.name for spec in apart.outputs] == ["noise_pred"]
    assert apart.manifest.content["text_projections"] == "input"


def test_every_layer_says_which_file_it_is_in(apart: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    assert len(text_layers(apart)) == 8
    assert all(".attn2.to_" in layer for layer in text_layers(apart))
    assert text_layers(w8a8_graph) == []
    assert [tap.module for tap in apart.text] == text_layers(apart)
    assert [replace(layer, graph="denoiser") for layer in apart.layers] == list(w8a8_graph.layers)
    assert apart.blocks == w8a8_graph.blocks
    for file, layers in ((apart.text_file, text_layers(apart)), (apart.onnx_file, ["conv_in"])):
        model = onnx.load(file, load_external_data=False)
        stored = {item.name for item in model.graph.initializer}
        named = {name for node in model.graph.node for name in (*node.input, *node.output)}
        for layer in (layer for layer in apart.layers if layer.name in layers):
            assert {layer.weight} <= stored
            assert {layer.input, layer.output} <= named
            assert layer.node in {node.name for node in model.graph.node}


def test_both_graphs_together_are_the_one(apart: ExportedGraph, w8a8_graph: ExportedGraph, run_onnx: Callable) -> None:
    given = values(apart)
    expected = run_onnx(w8a8_graph.onnx_file, given)["noise_pred"]
    found = run_onnx(apart.onnx_file, given | run_onnx(apart.text_file, given))["noise_pred"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_half_precision_too(w8a8: CalibratedModel, w8a8_half_graph: ExportedGraph, run_onnx: Callable) -> None:
    apart = export_graph(w8a8, w8a8.folder.parent / "apart16", dtype="fp16", text_projections="input")
    given = {
        k: v.astype(np.float16) if k in {"sample", "encoder_hidden_states"} else v for k, v in values(apart).items()
    }
    projections = run_onnx(apart.text_file, given)
    assert projections["text_projections"].dtype == np.float16
    expected = run_onnx(w8a8_half_graph.onnx_file, given)["noise_pred"]
    np.testing.assert_array_equal(run_onnx(apart.onnx_file, given | projections)["noise_pred"], expected)


def test_branches_of_text_layers_are_in_the_text_graph(
    adapted: dict[str, ExportedGraph], apart: ExportedGraph, run_onnx: Callable
) -> None:
    whole, divided = adapted["graph"], adapted["input"]
    assert divided.text == apart.text
    assert divided.lora == whole.lora
    text = onnx.load(divided.text_file, load_external_data=False).graph
    assert [item.name for item in text.input] == ["encoder_hidden_states", *LORA_INPUTS]
    predictions = []
    for acting in (False, True):
        given = values(divided) | lora_values(divided, acting=acting)
        expected = run_onnx(whole.onnx_file, given)["noise_pred"]
        found = run_onnx(divided.onnx_file, given | run_onnx(divided.text_file, given))["noise_pred"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        predictions.append(found)
    plain = run_onnx(apart.onnx_file, values(apart) | run_onnx(apart.text_file, values(apart)))["noise_pred"]
    np.testing.assert_array_equal(predictions[0], plain)
    assert np.abs(predictions[1] - plain).max() > 0.1


def test_without_a_branch_the_text_graph_takes_the_text_alone(
    w8a8: CalibratedModel, apart: ExportedGraph, tmp_path: Path
) -> None:
    graph = export_graph(w8a8, tmp_path / "ff", text_projections="input", lora=LoraRequest(2, ("feed-forward",)))
    assert graph.text_file.read_bytes() == apart.text_file.read_bytes()


@pytest.mark.slow
def test_transformed_layers_leave_whole(tmp_path: Path, run_onnx: Callable) -> None:
    """A smoothed key leaves with its division."""
    spec = TransformSpec(smoothed=(KEY,))

    def rewrite(float_denoiser: IndexedDenoiser) -> TransformSpec:
        apply_transforms(float_denoiser, spec)
        smoothed = float_denoiser.network.get_submodule(KEY)
        assert isinstance(smoothed, SmoothedLinear)
        smoothed.set_factor(smoothed.factor * 3)
        return spec

    calibrated = tiny_calibrated(tmp_path / "calib", rewrite=rewrite)
    plain, apart = (export_graph(calibrated, tmp_path / form, text_projections=form) for form in ("graph", "input"))
    assert f"{KEY}.layer" in text_layers(apart)
    assert [tap.module for tap in apart.text if tap.module.startswith(KEY)] == [f"{KEY}.layer"]
    given = values(apart)
    expected = run_onnx(plain.onnx_file, given)["noise_pred"]
    found = run_onnx(apart.onnx_file, given | run_onnx(apart.text_file, given))["noise_pred"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_layer_is_cut_from_the_file_that_it_is_in(apart: ExportedGraph, run_onnx: Callable) -> None:
    given = values(apart)
    projections = run_onnx(apart.text_file, given)["text_projections"]
    first = run_onnx(Subgraphs(apart, apart.text_file).layer(text_layers(apart)[0]), given)
    (found,) = first.values()
    np.testing.assert_array_equal(found, projections[..., : found.shape[-1]])


def test_a_quantized_text_stays_in_the_graph(w8a8: CalibratedModel, tmp_path: Path) -> None:
    quantizer = replace(w8a8.plan.activation_quantizers[0], timestep_dependent=False)
    quantized = replace(
        w8a8, plan=replace(w8a8.plan, activation_quantizers=(quantizer, *w8a8.plan.activation_quantizers[1:]))
    )
    with pytest.raises(InputError, match=f"{quantizer.layers[0]} reads the text in int8.*--text-projections graph"):
        export_graph(quantized, tmp_path / "out", text_projections="input")
    assert not (tmp_path / "out").exists()


def axis_of_join(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Concat").attribute[0].i = 1


def other_order(model: onnx.ModelProto) -> None:
    inputs = next(node for node in model.graph.node if node.op_type == "Concat").input
    inputs[0], inputs[1] = inputs[1], inputs[0]


def other_interface(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "text"
    for node in model.graph.node:
        node.input[:] = ["text" if name == "encoder_hidden_states" else name for name in node.input]


def floating_weight(model: onnx.ModelProto) -> None:
    product = next(node for node in model.graph.node if node.name == f"{VALUE}/MatMul")
    array = np.zeros((48, 64), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "plain"))
    product.input[1] = "plain"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (axis_of_join, "joined and divided otherwise"),
        (other_order, "joined and divided otherwise"),
        (other_interface, "expected encoder_hidden_states, FLOAT, batch first"),
        (floating_weight, f"layer {VALUE}: weights are planned int8"),
    ],
)
def test_the_contract_covers_the_text_graph(
    apart: ExportedGraph, tmp_path: Path, change: Callable, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(apart.folder, copy)
    check_graph(copy / "denoiser.onnx", apart.plan, text_layers(apart))
    model = onnx.load(copy / "text.onnx", load_external_data=False)
    change(model)
    onnx.save(model, copy / "text.onnx")
    with pytest.raises(GraphContractError, match=message):
        check_graph(copy / "denoiser.onnx", apart.plan, text_layers(apart))


def other_size(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value += 1


def one_of_three(model: onnx.ModelProto) -> None:
    del model.graph.input[2:]


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].name = "mid_residual"


@pytest.mark.parametrize("change", [other_size, one_of_three, another_input])
def test_the_text_graph_takes_the_graphs_own_loras(
    adapted: dict[str, ExportedGraph], tmp_path: Path, change: Callable
) -> None:
    graph, copy = adapted["input"], tmp_path / "copy"
    shutil.copytree(graph.folder, copy)
    model = onnx.load(copy / "text.onnx", load_external_data=False)
    change(model)
    onnx.save(model, copy / "text.onnx")
    with pytest.raises(GraphContractError, match=r"text\.onnx takes .*expected the graph's inputs of LoRAs"):
        check_graph(copy / "denoiser.onnx", graph.plan, text_layers(graph))


def test_a_text_layer_missing_from_both_graphs_is_found(apart: ExportedGraph) -> None:
    with pytest.raises(GraphContractError, match=text_layers(apart)[0]):
        check_graph(apart.onnx_file, apart.plan, text_layers(apart)[1:])


def test_layers_without_columns_are_refused(apart: ExportedGraph, tmp_path: Path) -> None:
    text = json_text(GraphDescription(dtype="fp32", inputs=(), outputs=(), layers=apart.layers, blocks=(), text=()))
    assert json.loads(text)["text"] == []

    with pytest.raises(IntegrityError, match="its columns must both be there"):
        read_json(GraphDescription, text.encode(), tmp_path / "graph.json")
