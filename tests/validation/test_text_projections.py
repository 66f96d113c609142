"""Validation of a graph whose products of the text are an input: its parts are fed the reference's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser
from s2p_deploy.engines import PreparedSubgraphs, build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import ExportedGraph, PromptSet
from s2p_deploy.validation import Chain, validate
from s2p_deploy.validation.parity import REFERENCE, block_agreement, code_agreement, layer_agreement
from s2p_deploy.validation.reference import ValidationLatents, choose_latents, unquantized_denoiser
from tests.validation.conftest import RECIPE

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def graph(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    return export_graph(chain.calibrated, tmp_path_factory.mktemp("apart") / "graph", text_projections="input")


def test_blocks_agree_as_those_of_the_whole_graph(
    chain: Chain, graph: ExportedGraph, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    found, whole = (
        block_agreement(fake_quant, one, latents, PreparedSubgraphs(one, *REFERENCE)) for one in (graph, chain.graph)
    )
    assert [block.block for block in found] == [block.block for block in whole]
    assert min(block.sqnr for block in found) >= 50.0
    assert max(point.mismatch for point in code_agreement(fake_quant, graph, latents)) <= 0.001


def test_a_blocks_text_is_the_references(
    graph: ExportedGraph, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    """A wrong product of the text in the reference reaches the graph's block too: both agree on its consequences."""
    with torch.no_grad():
        fake_quant.layer(KEY).weight.mul_(-1)
    blocks = block_agreement(fake_quant, graph, latents, PreparedSubgraphs(graph, *REFERENCE))
    found = {block.block: block.sqnr for block in blocks}
    assert found["mid_block.attentions.0"] >= 50.0


@pytest.mark.slow
def test_its_engine_validates(chain: Chain, graph: ExportedGraph, prompts: PromptSet, tmp_path: Path) -> None:
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime")
    report = validate(engine, prompts, tmp_path / "report", pictures=1)
    assert report.verdict == "passed", report.failed_gates
    assert report.data["sizes"]["graph"] > sum(f.stat().st_size for f in graph.folder.glob("denoiser.onnx*"))


@pytest.mark.slow
def test_layers_with_branches_agree(chain: Chain, prompts: PromptSet, tmp_path: Path) -> None:
    """The branch of a shifted layer reads what is before the shift, which other inputs lead to."""
    recipe = recipe_from_data(RECIPE | {"transforms": {"shift": "channel"}}, "test")
    shifted = calibrate(chain.base, recipe, prompts, tmp_path / "calib")
    assert shifted.transforms.shifted
    lora = LoraRequest(2, ("attention", "feed-forward", "convolutions"))
    graph = export_graph(shifted, tmp_path / "graph", text_projections="input", lora=lora)
    assert chain.dataset is not None
    given, parts = choose_latents(chain.dataset, 4), PreparedSubgraphs(graph, *REFERENCE)
    reference, twin = fake_quant_denoiser(shifted), unquantized_denoiser(shifted)
    found = layer_agreement(reference, twin, graph, given, parts, scales=graph.scales.scales)
    assert {layer.name for layer in found} == {layer.name for layer in graph.layers if layer.graph == "denoiser"}
    assert min(layer.sqnr for layer in found) >= 50.0
