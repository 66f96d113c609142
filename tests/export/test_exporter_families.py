"""Graphs of networks whose time features depend on the prompt too: they are an input, and a graph beside computes them.

In floating point, where the graph must give what diffusers' own network gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch

from s2p_deploy.calib import calibrate, fp_denoiser
from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.export.float_networks import conditioning_model
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.export.tensors import write_model
from s2p_deploy.families import EncodedText, IndexedDenoiser, denoiser_of, family_of, load_pipeline, load_time_path
from s2p_deploy.recipe import Recipe
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.records import CalibratedModel, ExportedGraph

STEPS, TOKENS = 6, 8  # those of tests/test_family_pipelines.py, which can take the same traces


@dataclass(frozen=True)
class Family:
    """A floating-point model of a small pipeline, its graph, and the denoiser that both are of."""

    name: str
    model: CalibratedModel
    graph: ExportedGraph
    float_denoiser: IndexedDenoiser


@pytest.fixture(scope="module", params=["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder, base = tmp_path_factory.mktemp(request.param), sibling(request.param)
    recipe = Recipe.load("fp", {"sampling": {"steps": STEPS, "max_sequence_length": TOKENS}})
    model = calibrate(base, recipe, None, folder / "calib")
    return Family(request.param, model, export_graph(model, folder / "graph"), fp_denoiser(base, STEPS))


def asked(family: Family) -> tuple[torch.Tensor, torch.Tensor, EncodedText]:
    """Samples on different rows, each with a text and an ``added_cond`` of its own."""
    float_denoiser, generator = family.float_denoiser, torch.Generator().manual_seed(1)
    shapes = (
        (3, 4, 8, 8),
        (3, family.model.tokens, float_denoiser.family.text_width(float_denoiser.config)),
        (3, float_denoiser.added_width),
    )
    sample, states, added = (torch.randn(shape, generator=generator) for shape in shapes)
    rows = torch.tensor(family.model.timesteps.calibrated_indices)[[0, 4, 2]]
    return sample, rows, EncodedText(states, added.abs())


def sqnr(candidate: np.ndarray, reference: np.ndarray) -> float:
    error = np.square(candidate.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(error, 1e-300)))


def conditioned(family: Family, file: Path, run_onnx: Callable) -> np.ndarray:
    _, rows, text = asked(family)
    timesteps = family.model.timesteps.timesteps[rows.numpy()].astype(np.float32)
    return run_onnx(file, {"timesteps": timesteps, "added_cond": text.added_cond.numpy()})["time_projections"]


@torch.no_grad()
def test_the_conditioning_graph_gives_the_features_of_rows_and_prompts(family: Family, run_onnx: Callable) -> None:
    _, rows, text = asked(family)
    expected = family.float_denoiser.time(rows, text.added_cond).numpy()
    found = conditioned(family, family.graph.folder / "conditioning.onnx", run_onnx)
    assert found.dtype == np.float32
    assert sqnr(found, expected) > 110


@torch.no_grad()
def test_its_weights_may_be_stored_in_half(family: Family, tmp_path: Path, run_onnx: Callable) -> None:
    _, rows, text = asked(family)
    write_model(conditioning_model(family.model, family.float_denoiser.config, half=True), tmp_path / "half.onnx")
    found = conditioned(family, tmp_path / "half.onnx", run_onnx)
    assert found.dtype == np.float32
    assert sqnr(found, family.float_denoiser.time(rows, text.added_cond).numpy()) > 60
    whole = (family.graph.folder / "conditioning.onnx").stat().st_size
    assert (tmp_path / "half.onnx").stat().st_size < 0.7 * whole


@torch.no_grad()
def test_the_graph_answers_as_the_whole_network_does(family: Family, run_onnx: Callable) -> None:
    sample, rows, text = asked(family)
    network = denoiser_of(load_pipeline(sibling(family.name)))
    timesteps = torch.from_numpy(family.model.timesteps.timesteps).float()[rows]
    expected = family_of(network).predict(network, sample, timesteps, text.states, text.added_cond).numpy()
    assert [spec.name for spec in family.graph.inputs] == [
        "sample",
        "timestep_index",
        "encoder_hidden_states",
        "time_projections",
    ]
    values = {
        "sample": sample.numpy(),
        "timestep_index": rows.numpy(),
        "encoder_hidden_states": text.states.numpy(),
        "time_projections": conditioned(family, family.graph.folder / "conditioning.onnx", run_onnx),
    }
    assert sqnr(run_onnx(family.graph.onnx_file, values)["noise_pred"], expected) > 100


@torch.no_grad()
def test_every_block_agrees_when_it_is_fed_what_the_network_sees(family: Family, run_onnx: Callable) -> None:
    sample, rows, text = asked(family)
    float_denoiser, seen = family.float_denoiser, {}
    for block in family.graph.blocks:
        for tap in (*block.entering, *block.leaving):
            module = float_denoiser.network.get_submodule(tap.module)
            if tap.side == "input":
                module.register_forward_pre_hook(lambda _, args, name=tap.tensor: seen.update({name: args[0].numpy()}))
            else:
                module.register_forward_hook(
                    lambda _, __, output, name=tap.tensor: seen.update(
                        {name: (output if isinstance(output, torch.Tensor) else output[0]).numpy()}
                    )
                )
    float_denoiser(sample, rows, text.states, text.added_cond)
    values = {
        "timestep_index": rows.numpy(),
        "encoder_hidden_states": text.states.numpy(),
        "time_projections": float_denoiser.time(rows, text.added_cond).numpy(),
    }
    parts = Subgraphs(family.graph)
    assert [block.block for block in family.graph.blocks] == [
        block.name for block in float_denoiser.family.blocks(float_denoiser.network)
    ]
    for block in family.graph.blocks:
        found = run_onnx(parts.block(block.block), values | seen)
        assert set(found) == {tap.tensor for tap in block.leaving}
        assert min(sqnr(found[tap.tensor], seen[tap.tensor]) for tap in block.leaving) > 100, block.block


def test_branches_of_the_text_leave_with_it(family: Family, tmp_path: Path, run_onnx: Callable) -> None:
    """Beside the keys and values of cross-attention, or beside the context embedder."""
    sample, rows, text = asked(family)
    lora = LoraRequest(2, ("attention", "projections"))
    whole, apart = (
        export_graph(family.model, tmp_path / form, text_projections=form, lora=lora) for form in ("graph", "input")
    )
    assert [item.name for item in onnx.load(apart.text_file, load_external_data=False).graph.input][1:] == [
        spec.name for spec in apart.optional_inputs
    ]
    random = np.random.default_rng(0)
    shapes = {spec.name: [3 if size == "batch" else size for size in spec.shape] for spec in whole.optional_inputs}
    loras = {name: (0.3 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    given = loras | {
        "sample": sample.numpy(),
        "timestep_index": rows.numpy(),
        "encoder_hidden_states": text.states.numpy(),
        "time_projections": conditioned(family, family.graph.folder / "conditioning.onnx", run_onnx),
    }
    expected = run_onnx(whole.onnx_file, given)["noise_pred"]
    found = run_onnx(apart.onnx_file, given | run_onnx(apart.text_file, given))["noise_pred"]
    assert sqnr(found, expected) > 100
    plain = run_onnx(family.graph.onnx_file, given)["noise_pred"]
    assert sqnr(expected, plain) < 30


def test_every_layer_is_in_the_graph_and_the_time_path_is_not(family: Family) -> None:
    assert {layer.name for layer in family.graph.layers} == {layer.name for layer in family.model.plan.layers}
    names = {item.name for item in onnx.load(family.graph.onnx_file, load_external_data=False).graph.initializer}
    assert not [name for name in names if name.startswith("time")]
    assert family.graph.manifest.content["added_width"] == family.float_denoiser.added_width


def test_features_of_a_prompt_cannot_be_constant(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="depend on the prompt too, they cannot be constant"):
        export_graph(family.model, tmp_path / "constant", time_table="constant")
    path = load_time_path(sibling(family.name))
    with pytest.raises(InputError):
        export_graph(family.model, tmp_path / "given" / "x", time_table="constant", time_path=path)
    assert list(tmp_path.iterdir()) == []
