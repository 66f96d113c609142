"""Graphs whose latents have any height and width: the fixed graph's numbers at its size, the network's at others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artifacts import tiny_inputs, tiny_unet

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.engines import BuildOptions, ShapeProfile, Span, TorchRunner, build_engine, load_engine
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.families import TimePath
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import TensorSpec
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Run

    from s2p_deploy.records import CalibratedModel, ExportedGraph

OPEN = ("batch", 4, "height", "width")


@pytest.fixture(scope="module")
def graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "dynamic", sizes="dynamic")


def inputs(graph: ExportedGraph, height: int, width: int) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32)
    return tiny_inputs() | {"sample": sample, "act_scales": graph.scales.scales}


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum().clip(1e-30)))


def test_the_graph_says_which_sizes_are_open(graph: ExportedGraph) -> None:
    assert graph.inputs[0] == TensorSpec("sample", "float32", OPEN)
    assert graph.outputs[0] == TensorSpec("noise_pred", "float32", OPEN)
    assert graph.manifest.content["latents"] == {"height": 8, "width": 8, "multiple": 2, "largest": None}


def test_at_the_trained_size_both_graphs_agree_by_the_bit(
    graph: ExportedGraph, w8a8_graph: ExportedGraph, run_onnx: Run
) -> None:
    given = inputs(graph, 8, 8)
    fixed, opened = (run_onnx(item.onnx_file, given)["noise_pred"] for item in (w8a8_graph, graph))
    np.testing.assert_array_equal(opened, fixed)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 10), (2, 6)])
def test_other_sizes_agree_with_the_fake_quant_network(
    graph: ExportedGraph, w8a8: CalibratedModel, run_onnx: Run, height: int, width: int
) -> None:
    given = inputs(graph, height, width)
    expected = TorchRunner(fake_quant_denoiser(w8a8)).infer(given)["noise_pred"]
    found = run_onnx(graph.onnx_file, given)["noise_pred"]
    assert found.shape == (2, 4, height, width)
    assert sqnr(expected, found) > 25  # rounding flips; at the trained size it is 31 dB


def test_blocks_are_the_fixed_graphs(graph: ExportedGraph, w8a8_graph: ExportedGraph, run_onnx: Run) -> None:
    assert [(b.block, b.entering, b.leaving) for b in graph.blocks] == [
        (b.block, b.entering, b.leaving) for b in w8a8_graph.blocks
    ]
    block = next(block for block in graph.blocks if block.block == "mid_block.attentions.0")
    entering, leaving = block.entering[0].tensor, block.leaving[0].tensor
    given = inputs(graph, 8, 8)
    given |= {entering: np.random.default_rng(1).standard_normal((2, 64, 4, 4)).astype(np.float32)}
    found, expected = (run_onnx(Subgraphs(item).block(block.block), given) for item in (graph, w8a8_graph))
    np.testing.assert_array_equal(found[leaving], expected[leaving])


def test_attention_is_still_fused(graph: ExportedGraph) -> None:
    model = ir.load(graph.onnx_file)
    softmaxes = sum(node.op_type == "Softmax" for node in model.graph)
    FusedAttention()(model)
    assert sum(node.op_type == "MultiHeadAttention" for node in model.graph) == softmaxes > 0


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.slow
def test_the_other_kinds_take_any_size_too(name: str, tmp_path: Path, run_onnx: Run) -> None:
    """In floating point, where nothing but the graph can differ."""
    calibrated = calibrate(sibling(name), Recipe.load("fp"), None, tmp_path / "calib")
    graph = export_graph(calibrated, tmp_path / "graph", sizes="dynamic")
    assert graph.inputs[0].shape == OPEN
    float_denoiser, random = (
        fake_quant_denoiser(calibrated).denoiser.inner.with_given_features(),
        np.random.default_rng(0),
    )
    for height, width in ((8, 8), (12, 4)):
        sizes = {"batch": 2, "height": height, "width": width}
        given = {spec.name: random.standard_normal(shape_at(spec, sizes)).astype(spec.dtype) for spec in graph.inputs}
        arguments = ("sample", "timestep_index", "encoder_hidden_states", "time_projections")
        with torch.no_grad():
            expected = float_denoiser(*(torch.from_numpy(given[argument]) for argument in arguments)).numpy()
        assert sqnr(expected, run_onnx(graph.onnx_file, given)["noise_pred"]) > 100


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.slow
def test_quantized_and_without_their_text_products_too(name: str, tmp_path: Path, run_onnx: Run) -> None:
    """The other kinds in W8A8: the graph and its text graph give what the whole one gives."""
    calibrated = calibrate(sibling(name), Recipe.load("ptq-stream"), None, tmp_path / "calib")
    whole, apart = (
        export_graph(calibrated, tmp_path / form, sizes="dynamic", text_projections=form) for form in ("graph", "input")
    )
    random = np.random.default_rng(0)
    for height, width in ((8, 8), (12, 4)):
        sizes = {"batch": 2, "height": height, "width": width}
        fed = [spec for spec in whole.inputs if spec.name != "act_scales"]
        given = {spec.name: random.standard_normal(shape_at(spec, sizes)).astype(spec.dtype) for spec in fed}
        given["act_scales"] = whole.scales.scales
        expected = run_onnx(whole.onnx_file, given)["noise_pred"]
        found = run_onnx(apart.onnx_file, given | run_onnx(apart.text_file, given))["noise_pred"]
        assert found.shape == (2, *shape_at(whole.outputs[0], sizes)[1:])
        assert sqnr(expected, found) > 60


@pytest.mark.slow
def test_every_option_at_once_is_the_plain_graph(w8a8: CalibratedModel, graph: ExportedGraph, tmp_path: Path) -> None:
    """Open sizes, time table and text products as inputs: an engine of it answers as one of the plain graph."""
    options: dict[str, Any] = {"time_table": "input", "time_path": TimePath(tiny_unet()), "text_projections": "input"}
    apart = export_graph(w8a8, tmp_path / "apart", sizes="dynamic", **options)
    span = Span(8, 8, 16, 2)
    plain, split = (
        build_engine(
            one, folder, backend="onnxruntime", options=BuildOptions(profile=ShapeProfile(1, 2, 2, span, span))
        )
        for one, folder in ((graph, tmp_path / "plain"), (apart, tmp_path / "split"))
    )
    with load_engine(plain, graph) as one, load_engine(split, apart) as other:
        for height, width in ((8, 8), (12, 16)):
            given = {name: value for name, value in inputs(graph, height, width).items() if name != "act_scales"}
            expected, found = (runner.infer(given)["noise_pred"] for runner in (one, other))
            assert sqnr(expected, found) > 25  # time features differ in their last bits, and roundings flip
