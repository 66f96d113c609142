"""Calibrations of the other families: time features that depend on the prompt, fractional timesteps, flow matching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate, fake_quant_denoiser, fp_denoiser
from s2p_deploy.calib.samples import samples_at
from s2p_deploy.calib.sensitivity import layer_sensitivities
from s2p_deploy.context import silent
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.recipe import Mixed, Recipe, recipe_from_data
from s2p_deploy.records import CalibratedModel, LatentDataset, Prompt, PromptSet
from s2p_deploy.timesteps import scales_for_schedule, with_schedules
from tests.small_pipelines import sibling

PROMPTS = PromptSet((Prompt("a", "a large red circle"),))
STEPS = 4
FAMILIES = ("sd2", "sdxl", "sd3")
Calibrate = Callable[[str], CalibratedModel]


def recipe(**sampling: object) -> Recipe:
    data: dict[str, Any] = {
        "name": "tiny",
        "weights": "int8",
        "activations": "int8",
        "rules": [{"match": match, "activations": "none"} for match in ("input", "output", "text")],
        "sampling": {"steps": STEPS, "guidance_scale": 2.0, "max_sequence_length": 3} | sampling,
        "dataset": {"prompts": 1, "samples_per_prompt": 20, "width": 1, "prompts_per_shard": 1},
        "training": {"iterations": 1, "batch": 2, "weight_rate": 1e-5},
        "scales": {"activations": "max"},
    }
    return recipe_from_data(data, "test")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    made: dict[str, CalibratedModel] = {}

    def model(name: str) -> CalibratedModel:
        if name not in made:
            made[name] = calibrate(sibling(name), recipe(), PROMPTS, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return model


def dataset_of(model: CalibratedModel) -> LatentDataset:
    return LatentDataset.open(model.folder / "dataset")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantized_model_answers_nearly_as_the_pipelines_own_denoiser(name: str, calibrated: Calibrate) -> None:
    model = calibrated(name)
    stored = dataset_of(model)
    points = samples_at(stored, np.arange(len(stored.timestep_indices)))
    assert len(set(stored.timestep_indices.tolist())) == STEPS
    found = fake_quant_denoiser(model)(*points.inputs(torch.arange(len(points.timestep_index))))
    error = (found - points.output).norm() / points.output.norm()
    assert 1e-4 < float(error) < 0.1
    if points.added_cond.shape[1]:
        other = fake_quant_denoiser(model)(
            points.sample,
            points.timestep_index,
            points.texts[points.text].float(),
            points.added_cond[points.text].flip(0),
        )
        assert not torch.allclose(other, found, rtol=1e-2)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_time_path_is_kept_as_the_pipeline_has_it(name: str, calibrated: Calibrate) -> None:
    model, fp = calibrated(name), fp_denoiser(sibling(name), STEPS)
    assert model.added_width == fp.added_width > 0
    assert not (model.folder / "time_table.safetensors").exists()
    own = {key: value for key, value in fp.state_dict().items() if key.startswith("time.path.")}
    kept = {key: value for key, value in model.weights().items() if key.startswith("time.")}
    assert set(kept) == set(own)
    assert all(np.array_equal(kept[key], value.numpy()) for key, value in own.items())
    moved = model.weights()["network.proj_out.weight" if name == "sd3" else "network.conv_in.weight"]
    whole = denoiser_of(load_pipeline(sibling(name))).state_dict()
    assert not np.array_equal(moved, whole["proj_out.weight" if name == "sd3" else "conv_in.weight"].numpy())


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_going_on_takes_scales_by_timestep_not_by_row(name: str, calibrated: Calibrate, tmp_path: Path) -> None:
    """On another schedule row 3 is another timestep."""
    first = calibrated(name)
    data = recipe(steps=7).model_dump(mode="json")
    data["training"]["iterations"] = 0
    model = calibrate(sibling(name), recipe_from_data(data, "t"), PROMPTS, tmp_path / "on", initial=first)
    bound = with_schedules(first.timesteps, [model.timesteps.calibrated], covered=False)
    expected = scales_for_schedule(first.scales, first.timesteps, bound).scales
    rows = [bound.timesteps.tolist().index(timestep) for timestep in model.timesteps.calibrated]
    found = model.scales.scales[list(model.timesteps.calibrated_indices)]
    assert len(rows) == 7
    np.testing.assert_allclose(found, expected[rows], rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_reading_of_sensitivity_has_scores(name: str, calibrated: Calibrate) -> None:
    model, float_denoiser = calibrated(name), fp_denoiser(sibling(name), STEPS)
    unread = {"transformer_blocks.5.attn.add_q_proj"} if name == "sd3" else set()  # the last block ends with the image
    for reading in ("fisher", "literal", "quantized"):
        mixed = Mixed.model_validate({"sensitivity": reading, "latents": 2})
        scores = layer_sensitivities(
            float_denoiser, model.plan, model.timesteps, dataset_of(model), mixed, seed=0, progress=silent
        )
        assert list(scores) == [layer.name for layer in model.plan.layers]
        assert {layer for layer, score in scores.items() if not score > 0} == unread, reading
