"""Recipes of every kind go the whole way of calibrate: what is stored computes what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy import calib
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.records import CalibratedModel, LatentDataset, PromptSet, parent_folder
from s2p_deploy.validation.compare import quantized_bytes
from s2p_research.calibrate import calibrate, deployed_bytes, fake_quant_denoiser
from s2p_research.packed_weights import read_packed_weights
from s2p_research.recipe import ResearchRecipe

QUICK: dict[str, Any] = {
    "sampling": {"steps": 6, "guidance_scale": 2.5},
    "dataset": {"prompts": 4, "samples_per_prompt": 3, "width": 2, "prompts_per_shard": 2},
    "scales": {"latents": 4},
}
TRAINED: dict[str, Any] = {"training": {"iterations": 2, "batch": 4}}
SLOW = pytest.mark.slow


def made(name: str, base: BasePipeline, prompts: PromptSet, out: Path, extra: dict[str, Any]) -> CalibratedModel:
    torch.set_num_threads(1)
    return calibrate(base, ResearchRecipe.load(name, QUICK | extra), prompts, out)


@torch.no_grad()
def stored_and_reloaded_errors(model: CalibratedModel) -> tuple[np.ndarray, np.ndarray]:
    """Per calibrated row: the error that training measured last, and that of the model as it is on disk."""
    dataset = LatentDataset.open(parent_folder(model.folder, model.manifest, "dataset"))
    denoiser = fake_quant_denoiser(model)
    sample, rows = torch.from_numpy(dataset.latents[:]).float(), torch.from_numpy(dataset.timestep_indices)
    squares = []
    for target, texts in ((dataset.cond, dataset.cond_text), (dataset.uncond, dataset.uncond_text)):
        output = denoiser(sample, rows, torch.from_numpy(dataset.texts[texts[dataset.prompt]]).float())
        squares.append((output - torch.from_numpy(target[:]).float()).square().mean((1, 2, 3)))
    error = torch.stack(squares).mean(0)
    training = model.manifest.content["training"]
    found = np.array([float(error[rows == row].mean()) for row in training["timestep_indices"]])
    return np.array(training["errors_final"]), found


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("svdquant", {}),
        ("pcr", {}),
        ("asymmetric-trained", TRAINED),
        ("bitsfusion", TRAINED | {"mixed": {"latents": 2}}),
        pytest.param("q-diffusion", {}, marks=SLOW),
        pytest.param("ptq4dm", {}, marks=SLOW),
        pytest.param("efficientdm", TRAINED, marks=SLOW),
        pytest.param("freeze-layers", TRAINED | {"mixed": {"latents": 4}}, marks=SLOW),
        pytest.param("trajectory-loss", TRAINED, marks=SLOW),
        pytest.param("time-quantized", TRAINED, marks=SLOW),
        pytest.param("serial-parts", TRAINED | {"mixed": {"latents": 4}}, marks=SLOW),
        pytest.param("blocks", TRAINED, marks=SLOW),
    ],
)
def test_the_model_on_disk_has_the_error_that_was_measured(
    name: str, extra: dict[str, Any], base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    model = made(name, base, prompts, tmp_path / "model", extra)
    measured, found = stored_and_reloaded_errors(model)
    np.testing.assert_allclose(found, measured, rtol=0.05)  # other batches round a few codes the other way
    assert (model.folder / "simulation.safetensors").exists() == (name in {"pcr", "asymmetric-trained"})
    assert (model.folder / "low_bit.safetensors").exists() == (name == "bitsfusion")
    assert (model.folder / "low_rank.json").exists() == (name == "svdquant")
    assert bool(model.research) == (name in {"pcr", "asymmetric-trained", "bitsfusion", "svdquant"})
    if model.research:
        with pytest.raises(InputError, match="made for comparison only: no engine has"):
            calib.fake_quant_denoiser(model)
    if name == "bitsfusion":
        bits = model.manifest.content["average_bits"]["parameters"]["weights"]
        assert bits < 3
        packed = read_packed_weights(model.folder / "low_bit.safetensors").values()
        count = sum(math.prod(weight.shape) for weight in packed)
        assert 0 < deployed_bytes(model) - quantized_bytes(model) < 3 / 8 * count, "bytes of weights below 3 bits"
