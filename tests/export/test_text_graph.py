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
from s2p_deploy.export import check_graph, export_graph, site_subgraph
from s2p_deploy.families import LowRankLinear, SmoothedLinear, apply_transforms
from s2p_deploy.records import ExportedGraph, TransformSpec
from s2p_deploy.records.exported_graph import graph_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.records import CalibratedModel

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
VALUE = KEY.removesuffix("k") + "v"


@pytest.fixture(scope="module")
def apart(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "apart", text_projections="input")


def values(graph: ExportedGraph, batch: int = 3) -> dict[str, np.ndarray]:
    return tiny_inputs(batch) | {"act_scales": graph.scales.scales}


def text_sites(graph: ExportedGraph) -> list[str]:
    return [site.site for site in graph.sites if site.graph == "text"]


def test_the_graph_takes_products_where_it_took_the_text(apart: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    names = [spec.name for spec in w8a8_graph.inputs]
    taken = ["text_projections" if name == "encoder_hidden_states" else name for name in names]
    assert [spec.name for spec in apart.inputs] == taken
    assert apart.inputs[2].shape == ("batch", 6, 2 * (32 + 64 + 32 + 32))  # k and v of four attentions
    assert [spec.name for spec in apart.outputs] == ["noise_pred"]
    assert apart.manifest.content["text_projections"] == "input"


def test_every_site_says_which_file_it_is_in(apart: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    assert len(text_sites(apart)) == 8
    assert all(".attn2.to_" in site for site in text_sites(apart))
    assert text_sites(w8a8_graph) == []
    assert [tap.module for tap in apart.text] == text_sites(apart)
    assert [replace(site, graph="denoiser") for site in apart.sites] == list(w8a8_graph.sites)
    assert apart.blocks == w8a8_graph.blocks
    for file, sites in ((apart.text_file, text_sites(apart)), (apart.onnx_file, ["conv_in"])):
        model = onnx.load(file, load_external_data=False)
        stored = {item.name for item in model.graph.initializer}
        named = {name for node in model.graph.node for name in (*node.input, *node.output)}
        for site in (site for site in apart.sites if site.site in sites):
            assert {site.weight} <= stored
            assert {site.input, site.output} <= named
            assert site.node in {node.name for node in model.graph.node}


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


@pytest.mark.slow
def test_transformed_layers_leave_whole(tmp_path: Path, run_onnx: Callable) -> None:
    """A smoothed key with a low-rank branch is one column: its sum, not its halves."""
    spec = TransformSpec(smoothed=(KEY,), low_rank={f"{KEY}.layer": 2})

    def rewrite(hot: HotDenoiser) -> TransformSpec:
        apply_transforms(hot, spec)
        smoothed = hot.network.get_submodule(KEY)
        assert isinstance(smoothed, SmoothedLinear)
        smoothed.set_factor(smoothed.factor * 3)
        assert isinstance(smoothed.layer, LowRankLinear)
        smoothed.layer.decompose()
        return spec

    calibrated = tiny_calibrated(tmp_path / "calib", rewrite=rewrite)
    plain, apart = (export_graph(calibrated, tmp_path / form, text_projections=form) for form in ("graph", "input"))
    assert {f"{KEY}.layer.{part}" for part in ("residual", "down", "up")} <= set(text_sites(apart))
    assert [tap.module for tap in apart.text if tap.module.startswith(KEY)] == [f"{KEY}.layer"]
    given = values(apart)
    expected = run_onnx(plain.onnx_file, given)["noise_pred"]
    found = run_onnx(apart.onnx_file, given | run_onnx(apart.text_file, given))["noise_pred"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_site_is_cut_from_the_file_that_it_is_in(apart: ExportedGraph, run_onnx: Callable) -> None:
    given = values(apart)
    projections = run_onnx(apart.text_file, given)["text_projections"]
    first = run_onnx(site_subgraph(apart, text_sites(apart)[0]), given)
    (found,) = first.values()
    np.testing.assert_array_equal(found, projections[..., : found.shape[-1]])


def test_a_quantized_text_stays_in_the_graph(w8a8: CalibratedModel, tmp_path: Path) -> None:
    point = replace(w8a8.plan.act_points[0], timestep_dependent=False)
    quantized = replace(w8a8, plan=replace(w8a8.plan, act_points=(point, *w8a8.plan.act_points[1:])))
    with pytest.raises(InputError, match=f"{point.sites[0]} reads the text in int8.*--text-projections graph"):
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
        (other_interface, "expected encoder_hidden_states alone"),
        (floating_weight, f"site {VALUE}: weights are planned int8"),
    ],
)
def test_the_contract_covers_the_text_graph(
    apart: ExportedGraph, tmp_path: Path, change: Callable, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(apart.folder, copy)
    check_graph(copy / "denoiser.onnx", apart.plan, text_sites(apart))
    model = onnx.load(copy / "text.onnx", load_external_data=False)
    change(model)
    onnx.save(model, copy / "text.onnx")
    with pytest.raises(GraphContractError, match=message):
        check_graph(copy / "denoiser.onnx", apart.plan, text_sites(apart))


def test_a_text_site_missing_from_both_graphs_is_found(apart: ExportedGraph) -> None:
    with pytest.raises(GraphContractError, match=text_sites(apart)[0]):
        check_graph(apart.onnx_file, apart.plan, text_sites(apart)[1:])


def test_sites_without_columns_are_refused(apart: ExportedGraph, tmp_path: Path) -> None:
    text = graph_json(dtype="fp32", inputs=(), outputs=(), sites=apart.sites, blocks=(), text=())
    assert json.loads(text)["text"] == []
    from s2p_deploy.records.json_forms import GraphForm
    from s2p_deploy.records.strict import read_as

    with pytest.raises(IntegrityError, match="its columns must both be there"):
        read_as(GraphForm, text.encode(), tmp_path / "graph.json")
