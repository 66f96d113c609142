from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.samples import calibrated_indices, samples_at
from s2p_deploy.calib.starting_scales import starting_act_scales, starting_weight_scales
from s2p_deploy.context import silent
from s2p_deploy.errors import S2PError
from s2p_deploy.families import IndexedDenoiser, apply_transforms, discover_layers
from s2p_deploy.numerics import (
    INT8,
    least_squares_weight_scale,
    max_weight_scale,
    mse_best_scale,
)
from s2p_deploy.recipe import Recipe, Scales
from s2p_deploy.records import LatentDataset, PrecisionPlan, TransformSpec

PROJECTION = "mid_block.attentions.0.proj_in"
AFTER_SILU = "mid_block.resnets.0.conv1"


@pytest.fixture
def plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_layers(float_denoiser))


@pytest.fixture
def text_plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    """The text is quantized too: its quantizer is the one that does not depend on the timestep."""
    plan = plan_from_recipe(recipe.model_copy(update={"rules": ()}), discover_layers(float_denoiser))
    assert sum(not quantizer.timestep_dependent for quantizer in plan.activation_quantizers) == 1
    return plan


@torch.no_grad()
def read_by(float_denoiser: IndexedDenoiser, layer: str, dataset: LatentDataset, row: int) -> Tensor:
    """What a layer reads at a timestep, in all of its samples and with both texts."""
    inputs = []
    hook = float_denoiser.network.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    quantizers = np.flatnonzero(dataset.timestep_indices == row)
    for texts in (dataset.uncond_text, dataset.cond_text):
        states = torch.from_numpy(dataset.texts[texts[dataset.prompt[quantizers]]]).float()
        float_denoiser(
            torch.from_numpy(dataset.latents[quantizers]).float(), torch.full((len(quantizers),), row), states
        )
    hook.remove()
    return torch.cat(inputs)


def pair_inputs(dataset: LatentDataset, which: np.ndarray) -> tuple[Tensor, ...]:
    pairs = samples_at(dataset, which)
    return pairs.inputs(torch.arange(len(pairs.sample)))


def test_a_rows_scale_is_the_mse_best_of_what_the_layer_reads_there(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_indices(dataset)
    scales = starting_act_scales(float_denoiser, plan, dataset, Scales(), silent)
    assert scales.shape == (len(rows), len(plan.activation_quantizers))
    expected = mse_best_scale(read_by(float_denoiser, PROJECTION, dataset, rows[2]), INT8)
    torch.testing.assert_close(scales[2, plan.quantizer_names().index(PROJECTION)], expected, rtol=1e-4, atol=0)


def test_max_puts_the_largest_magnitude_on_the_last_code(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_indices(dataset)
    scales = starting_act_scales(float_denoiser, plan, dataset, Scales(activations="max"), silent)
    peak = read_by(float_denoiser, PROJECTION, dataset, rows[1]).abs().max()
    torch.testing.assert_close(scales[1, plan.quantizer_names().index(PROJECTION)], peak / 127, rtol=1e-4, atol=0)


def test_the_order_of_the_samples_changes_no_scale(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    order = np.random.default_rng(0).permutation(len(dataset.timestep_indices))
    columns = {
        name: getattr(dataset, name)[order] for name in ("latents", "timestep_indices", "cond", "uncond", "prompt")
    }
    shuffled = dataclasses.replace(dataset, **columns)
    how = Scales(activations="max")
    first, second = (starting_act_scales(float_denoiser, plan, data, how, silent) for data in (dataset, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)


def test_only_so_many_latents_of_a_row_are_looked_at(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    keep = np.sort([np.flatnonzero(dataset.timestep_indices == row)[0] for row in calibrated_indices(dataset)])
    columns = {
        name: getattr(dataset, name)[keep] for name in ("latents", "timestep_indices", "cond", "uncond", "prompt")
    }
    first = dataclasses.replace(dataset, **columns)
    how = Scales(activations="max", latents=1)
    few, all_of_few = (starting_act_scales(float_denoiser, plan, data, how, silent) for data in (dataset, first))
    assert torch.equal(few, all_of_few)
    assert not torch.equal(few, starting_act_scales(float_denoiser, plan, dataset, Scales(activations="max"), silent))


def test_a_point_that_reads_only_the_text_has_one_scale(
    float_denoiser: IndexedDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    scales = starting_act_scales(float_denoiser, text_plan, dataset, Scales(activations="max"), silent)
    static = [not quantizer.timestep_dependent for quantizer in text_plan.activation_quantizers]
    assert bool((scales[:, static] == scales[0, static]).all())
    assert not bool((scales[:, 0] == scales[0, 0]).all())


def test_rewritten_layers_are_found_under_their_new_names(
    float_denoiser: IndexedDenoiser, recipe: Recipe, dataset: LatentDataset
) -> None:
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    apply_transforms(float_denoiser, TransformSpec(smoothed=(query,)))
    plan = plan_from_recipe(recipe, discover_layers(float_denoiser))
    scales = starting_act_scales(float_denoiser, plan, dataset, Scales(), silent)
    row = calibrated_indices(dataset)[0]
    expected = mse_best_scale(read_by(float_denoiser, f"{query}.layer", dataset, row), INT8)
    torch.testing.assert_close(scales[0, plan.quantizer_names().index(f"{query}.layer")], expected, rtol=1e-4, atol=0)


def test_a_plan_of_weights_alone_has_no_grids(
    float_denoiser: IndexedDenoiser, recipe: Recipe, dataset: LatentDataset
) -> None:
    weights_alone = recipe.model_copy(update={"activations": "none"})
    plan = plan_from_recipe(weights_alone, discover_layers(float_denoiser))
    rows = calibrated_indices(dataset)
    assert starting_act_scales(float_denoiser, plan, dataset, Scales(), silent).shape == (
        len(rows),
        0,
    )


def test_weight_scales_are_of_the_planned_layers(float_denoiser: IndexedDenoiser, plan: PrecisionPlan) -> None:
    weight = float_denoiser.network.conv_in.weight
    for how, scale_of in (("least_squares", least_squares_weight_scale), ("max", max_weight_scale)):
        scales = starting_weight_scales(float_denoiser, plan, Scales(weights=how))
        assert set(scales) == {layer.name for layer in plan.layers}
        assert torch.equal(scales["conv_in"], scale_of(weight, INT8))


def test_both_branches_of_a_point_are_seen(dataset: LatentDataset) -> None:
    sample, rows, texts, added_cond = pair_inputs(dataset, np.array([2, 5]))
    assert added_cond.shape == (4, 0)
    assert torch.equal(sample, torch.from_numpy(dataset.latents[[2, 5, 2, 5]]).float())
    assert rows.tolist() == dataset.timestep_indices[[2, 5, 2, 5]].tolist()
    prompt = dataset.prompt[[2, 5]]
    expected = [*dataset.uncond_text[prompt], *dataset.cond_text[prompt]]
    assert torch.equal(texts, torch.from_numpy(dataset.texts[expected]).float())


def test_a_broken_pipeline_is_named(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    with torch.no_grad():
        float_denoiser.network.get_submodule(PROJECTION).weight.fill_(torch.nan)
    with pytest.raises(S2PError, match=r"the activation mid_block.* is not finite at timestep index"):
        starting_act_scales(float_denoiser, plan, dataset, Scales(), silent)


def test_calls_of_fewer_samples_find_the_largest_magnitudes_all_the_same(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    how = Scales(activations="max")
    whole = starting_act_scales(float_denoiser, plan, dataset, how, silent)
    cut = starting_act_scales(float_denoiser, plan, dataset, how, silent, samples_per_call=1)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


def test_calls_of_fewer_samples_find_clips_next_to_those_of_one_call(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    whole = starting_act_scales(float_denoiser, plan, dataset, Scales(), silent)
    cut = starting_act_scales(float_denoiser, plan, dataset, Scales(), silent, samples_per_call=1)
    assert ((cut / whole).log().abs() < 0.1).all()  # the elements that decide are drawn from every call
