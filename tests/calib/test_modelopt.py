from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.modelopt import ModeloptScales, modelopt_scales, set_smoothing, smoothed_layers
from s2p_deploy.calib.samples import samples_at
from s2p_deploy.context import silent
from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser, apply_transforms, discover_layers
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan, TransformSpec

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"
TEXT_K = f"{BLOCK}.attn2.to_k"
PROJ_OUT = "down_blocks.0.attentions.0.proj_out"  # modelopt's own list leaves it out


def sample_inputs(dataset: LatentDataset, count: int) -> tuple[torch.Tensor, ...]:
    pairs = samples_at(dataset, np.arange(count))
    return pairs.inputs(torch.arange(len(pairs.sample)))


@pytest.fixture
def plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_layers(float_denoiser))


@torch.no_grad()
def inputs_of(float_denoiser: IndexedDenoiser, dataset: LatentDataset, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """What layers read in all samples with both texts."""
    found: dict[str, Tensor] = {}
    hooks = [
        float_denoiser.network.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: found.__setitem__(layer, args[0])
        )
        for layer in layers
    ]
    float_denoiser(*sample_inputs(dataset, len(dataset.timestep_indices)))
    for hook in hooks:
        hook.remove()
    return found


def test_default_scales_are_the_largest_magnitudes(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    start = modelopt_scales(float_denoiser, plan, dataset, "modelopt", silent)
    assert capsys.readouterr().out == ""
    assert start.smoothing == {}
    scales = start.act_scales(plan, 6)
    assert bool((scales == scales[0]).all())
    assert scales.shape == (6, len(plan.activation_quantizers))
    for layer, x in inputs_of(float_denoiser, dataset, (TO_Q, PROJ_OUT)).items():
        scale = scales[0, plan.quantizer_names().index(layer)]
        torch.testing.assert_close(scale, x.abs().max() / 127, rtol=1e-4, atol=0)
    weight_scales = start.weight_scales(plan)
    assert set(weight_scales) == {layer.name for layer in plan.layers if layer.weights != "none"}
    for layer, largest in (("conv_in", 127), (PROJ_OUT, 7), (TEXT_K, 7)):
        weight = float_denoiser.network.get_submodule(layer).weight
        expected = weight.abs().flatten(1).amax(1) / largest
        assert weight_scales[layer].shape == (len(weight),) + (1,) * (weight.dim() - 1)
        torch.testing.assert_close(weight_scales[layer].flatten(), expected)


def test_layers_that_stay_in_floating_point_are_left_out(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    start = modelopt_scales(float_denoiser, plan, dataset, "modelopt", silent)
    assert set(start.act_peaks) == {layer.name for layer in plan.layers if layer.activation_quantizer is not None}
    assert {"conv_in", TEXT_K}.isdisjoint(start.act_peaks)


def test_a_point_takes_the_largest_of_its_layers(plan: PrecisionPlan) -> None:
    peaks = {layer.name: torch.tensor(127.0) for layer in plan.layers}
    start = ModeloptScales({}, peaks | {TO_K: torch.tensor(254.0)}, {})
    scales = start.act_scales(plan, 1)[0]
    assert {name: float(scale) for name, scale in zip(plan.quantizer_names(), scales, strict=True)} == dict.fromkeys(
        plan.quantizer_names(), 1.0
    ) | {TO_Q: 2.0}


def test_smoothquant_can_be_applied(
    float_denoiser: IndexedDenoiser, recipe: Recipe, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    start = modelopt_scales(float_denoiser, plan, dataset, "modelopt_smoothquant", silent)
    smoothed = smoothed_layers(plan)
    assert set(start.smoothing) == set(smoothed)
    assert TEXT_K not in smoothed
    inputs = inputs_of(float_denoiser, dataset, smoothed)
    for layer in smoothed:
        factor, weight = start.smoothing[layer], float_denoiser.network.get_submodule(layer).weight
        torch.testing.assert_close(start.act_peaks[layer], (inputs[layer] / factor).abs().max(), rtol=1e-4, atol=0)
        torch.testing.assert_close(start.weight_peaks[layer], (weight * factor).abs().amax(1, keepdim=True))
    sample = sample_inputs(dataset, 3)
    with torch.no_grad():
        expected = float_denoiser(*sample)
        apply_transforms(float_denoiser, TransformSpec(smoothed=smoothed))
        set_smoothing(float_denoiser, start.smoothing)
        torch.testing.assert_close(float_denoiser(*sample), expected, rtol=1e-4, atol=1e-5)
    renamed = plan_from_recipe(recipe, discover_layers(float_denoiser))
    assert set(start.weight_scales(renamed)) == {layer.name for layer in renamed.layers}
    columns = {name: start.act_scales(renamed, 2)[1, i] for i, name in enumerate(renamed.quantizer_names())}
    for layer in (TO_Q, TO_K):  # one tensor before, a factor each now
        torch.testing.assert_close(columns[f"{layer}.layer"], start.act_peaks[layer] / 127)


@pytest.mark.parametrize("calibrator", ["modelopt", "modelopt_smoothquant"])
def test_the_denoiser_and_torch_stay_as_they_were(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, calibrator: str
) -> None:
    before = copy.deepcopy(float_denoiser.state_dict())
    kinds = [type(module) for module in float_denoiser.modules()]
    attention = torch.nn.functional.scaled_dot_product_attention
    sample = sample_inputs(dataset, 3)
    with torch.no_grad():
        expected = float_denoiser(*sample)
        modelopt_scales(float_denoiser, plan, dataset, calibrator, silent)  # type: ignore[arg-type]
        assert torch.equal(float_denoiser(*sample), expected)
    assert [type(module) for module in float_denoiser.modules()] == kinds
    assert torch.nn.functional.scaled_dot_product_attention is attention
    after = float_denoiser.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_stored_point_is_reported(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    told: list[tuple[str, int, int]] = []
    modelopt_scales(float_denoiser, plan, dataset, "modelopt", lambda *where: told.append(where), samples_per_call=5)
    assert told[0] == ("modelopt", 5, 2 * len(dataset.timestep_indices))
    assert told[-1] == ("modelopt", 2 * len(dataset.timestep_indices), 2 * len(dataset.timestep_indices))


def test_a_broken_pipeline_is_named(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    with torch.no_grad():
        float_denoiser.network.get_submodule(TO_Q).weight.fill_(torch.nan)
    with pytest.raises(InputError, match="nvidia-modelopt found an activation that is not finite") as caught:
        modelopt_scales(float_denoiser, plan, dataset, "modelopt", silent)
    assert "\n" not in str(caught.value)
