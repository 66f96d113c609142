"""Graphs whose text has any number of tokens: the plain graph's numbers at one chunk, the network's at others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artifacts import TOKENS, tiny_inputs, tiny_unet

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.cli.export import chunks_from_option
from s2p_deploy.engines import TorchRunner
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.families import TimePath, resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.exported_graph import TextChunks
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Run

    from s2p_deploy.records import CalibratedModel, ExportedGraph

LEVEL = 25  # dB: rounding flips; at one chunk it is 31


@pytest.fixture(scope="module")
def graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "chunks", chunks=(1, 4))


def inputs(graph: ExportedGraph, tokens: int) -> dict[str, np.ndarray]:
    text = np.random.default_rng(2).standard_normal((2, tokens, 48)).astype(np.float32)
    return tiny_inputs() | {"encoder_hidden_states": text, "act_scales": graph.scales.scales}


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum().clip(1e-30)))


def test_the_graph_says_how_many_chunks_it_takes(graph: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    assert graph.inputs[2] == TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 48))
    assert graph.outputs == w8a8_graph.outputs
    assert graph.chunks == TextChunks(TOKENS, 1, 4)
    assert graph.manifest.content["chunks"] == {"tokens": TOKENS, "fewest": 1, "most": 4}
    assert w8a8_graph.chunks is None
    assert "chunks" not in w8a8_graph.manifest.content
    assert "tokens" not in json.dumps([spec.shape for spec in w8a8_graph.inputs])


def test_no_size_is_computed_at_run_time(graph: ExportedGraph) -> None:
    assert not [node.name for node in ir.load(graph.onnx_file).graph if node.op_type == "Shape"]


def test_at_one_chunk_both_graphs_agree_by_the_bit(
    graph: ExportedGraph, w8a8_graph: ExportedGraph, run_onnx: Run
) -> None:
    given = inputs(graph, TOKENS)
    plain, opened = (run_onnx(item.onnx_file, given)["noise_pred"] for item in (w8a8_graph, graph))
    np.testing.assert_array_equal(opened, plain)


@pytest.mark.parametrize("tokens", [2 * TOKENS, 4 * TOKENS, 1, 2 * TOKENS + 5])
def test_other_texts_agree_with_the_fake_quant_network(
    graph: ExportedGraph, w8a8: CalibratedModel, run_onnx: Run, tokens: int
) -> None:
    given = inputs(graph, tokens)
    expected = TorchRunner(fake_quant_denoiser(w8a8)).infer(given)["noise_pred"]
    assert sqnr(expected, run_onnx(graph.onnx_file, given)["noise_pred"]) > LEVEL


def test_blocks_are_the_plain_graphs_and_take_several_chunks(
    graph: ExportedGraph, w8a8_graph: ExportedGraph, run_onnx: Run
) -> None:
    assert [(b.block, b.entering, b.leaving) for b in graph.blocks] == [
        (b.block, b.entering, b.leaving) for b in w8a8_graph.blocks
    ]
    block = next(block for block in graph.blocks if block.block == "mid_block.attentions.0")
    entering, leaving = block.entering[0].tensor, block.leaving[0].tensor
    activation = {entering: np.random.default_rng(1).standard_normal((2, 64, 4, 4)).astype(np.float32)}
    one, two = inputs(graph, TOKENS) | activation, inputs(graph, 2 * TOKENS) | activation
    found, expected = (run_onnx(Subgraphs(item).block(block.block), one)[leaving] for item in (graph, w8a8_graph))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(run_onnx(Subgraphs(graph).block(block.block), two)[leaving] - expected).max() > 1e-3


def test_attention_is_still_fused(graph: ExportedGraph) -> None:
    model = ir.load(graph.onnx_file)
    softmaxes = sum(node.op_type == "Softmax" for node in model.graph)
    FusedAttention()(model)
    assert sum(node.op_type == "MultiHeadAttention" for node in model.graph) == softmaxes > 0


@pytest.mark.parametrize("chunks", [(0, 4), (4, 1), (1, 17)])
def test_other_numbers_of_chunks_are_refused(w8a8: CalibratedModel, tmp_path: Path, chunks: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{chunks[0]} to {chunks[1]} chunks of text: 1 to 16 are possible"):
        export_graph(w8a8, tmp_path / "graph", chunks=chunks)
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("text", ["4", "1:4", "1..", "..4", "-1..4", "a..b", "1..4..5", "1...4", "\u0661..\u0664", ""])
def test_chunks_are_given_as_a_range(text: str) -> None:
    assert chunks_from_option("1..4") == (1, 4)
    with pytest.raises(InputError, match=r"must be MIN\.\.MAX, e\.g\. 1\.\.4"):
        chunks_from_option(text)


def float_denoiser(calibrated: CalibratedModel) -> torch.nn.Module:
    inner = fake_quant_denoiser(calibrated).denoiser.inner
    return inner.with_given_features() if calibrated.added_width else inner


def fed(graph: ExportedGraph, width: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Random inputs of a graph, and the text where its products are an input."""
    random = np.random.default_rng(0)
    wanted = [spec for spec in graph.inputs if spec.name not in {"act_scales", "text_projections"}]
    given = {spec.name: random.standard_normal(shape_at(spec, sizes)).astype(spec.dtype) for spec in wanted}
    given["encoder_hidden_states"] = random.standard_normal((2, sizes["tokens"], width)).astype(np.float32)
    return given | {"act_scales": graph.scales.scales, "timestep_index": np.asarray([1, 5])}


@pytest.mark.parametrize("text_projections", ["graph", "input"])
@pytest.mark.parametrize("name", ["shapes", "sd2", "sdxl", "sd3"])
@pytest.mark.slow
def test_every_kind_takes_chunks(
    name: str, text_projections: Literal["graph", "input"], tmp_path: Path, run_onnx: Run
) -> None:
    """In floating point, where nothing but the graph can differ; text products once per prompt, and in every step."""
    base = resolve_base("shapes") if name == "shapes" else sibling(name)
    calibrated = calibrate(base, Recipe.load("fp"), None, tmp_path / "calib")
    graph = export_graph(calibrated, tmp_path / "graph", chunks=(1, 4), text_projections=text_projections)
    config = calibrated.denoiser_config()
    width = config.get("cross_attention_dim") or config["joint_attention_dim"]
    for chunks in (1, 3, 4):
        given = fed(graph, width, {"batch": 2, "tokens": chunks * calibrated.tokens})
        names = ("sample", "timestep_index", "encoder_hidden_states", "time_projections")
        with torch.no_grad():
            expected = float_denoiser(calibrated)(*(torch.from_numpy(given[n]) for n in names if n in given)).numpy()
        if text_projections == "input":
            given |= run_onnx(graph.text_file, given)
            assert given["text_projections"].shape[:2] == (2, chunks * calibrated.tokens)
        assert sqnr(expected, run_onnx(graph.onnx_file, given)["noise_pred"]) > 100


@pytest.mark.slow
def test_chunks_sizes_and_inputs_are_open_together(w8a8: CalibratedModel, tmp_path: Path, run_onnx: Run) -> None:
    """Open sizes, time table and text products as inputs, quantized: the fake-quant network's numbers."""
    options: dict[str, Any] = {"time_table": "input", "time_path": TimePath(tiny_unet()), "text_projections": "input"}
    graph = export_graph(w8a8, tmp_path / "graph", sizes="dynamic", chunks=(1, 4), **options)
    assert graph.inputs[0].shape == ("batch", 4, "height", "width")
    conditions = {"timesteps": w8a8.timesteps.timesteps[[1, 5]].astype(np.float32)}
    features = run_onnx(graph.folder / "conditioning.onnx", conditions)
    for height, width, tokens in ((8, 8, TOKENS), (12, 10, 4 * TOKENS)):
        given = fed(graph, 48, {"batch": 2, "tokens": tokens, "height": height, "width": width}) | features
        plain = {name: given[name] for name in ("sample", "timestep_index", "encoder_hidden_states")}
        expected = TorchRunner(fake_quant_denoiser(w8a8)).infer(plain)["noise_pred"]
        given |= run_onnx(graph.text_file, given)
        assert sqnr(expected, run_onnx(graph.onnx_file, given)["noise_pred"]) > LEVEL
