"""Every recipe of a comparison fits a real denoiser: its transforms, its plan, and the scales that it starts from."""

from __future__ import annotations

import copy

import pytest

from s2p_deploy.calib.modelopt import smoothed_layers
from s2p_deploy.calib.plan import check_plan, mixed_plan, plan_from_recipe
from s2p_deploy.calib.samples import calibrated_indices
from s2p_deploy.calib.starting_scales import starting_weight_scales
from s2p_deploy.calib.trajectories import FloatPipeline, sampler_of
from s2p_deploy.context import silent
from s2p_deploy.families import IndexedDenoiser, QuantizableLayer, apply_transforms, discover_layers
from s2p_deploy.recipe import preset_names
from s2p_deploy.records import LatentDataset, PrecisionPlan, PromptSet, TransformSpec
from s2p_research.recipe import ResearchRecipe, recipe_names
from s2p_research.starting_scales import GuidedSampling, progressive_grids, starting_grids
from s2p_research.transforms import research_transforms


def resolve(
    float_denoiser: IndexedDenoiser, recipe: ResearchRecipe
) -> tuple[PrecisionPlan, tuple[QuantizableLayer, ...]]:
    """Transforms ``float_denoiser`` as the recipe says and plans it; layers that come later count as more sensitive."""
    plain = plan_from_recipe(recipe, discover_layers(float_denoiser))
    transforms = research_transforms(float_denoiser, recipe)
    transforms.apply(float_denoiser)
    if recipe.scales.calibrator == "modelopt_smoothquant":
        apply_transforms(float_denoiser, TransformSpec(smoothed=smoothed_layers(plain)))
    layers = discover_layers(float_denoiser)
    plan = plan_from_recipe(recipe.model_copy(update={"rules": (*recipe.rules, *transforms.rules)}), layers)
    if recipe.mixed.sensitivity != "none":
        plan = mixed_plan(plan, layers, {layer.name: float(i) for i, layer in enumerate(layers)}, recipe.mixed)
    check_plan(plan, layers)
    return plan, layers


@pytest.mark.parametrize("name", [*recipe_names(), *preset_names()])
def test_a_shipped_recipe_resolves(float_denoiser: IndexedDenoiser, name: str) -> None:
    for recipe in (ResearchRecipe.load(name), ResearchRecipe.load(name, {"weights": "int8"})):
        plan, layers = resolve(copy.deepcopy(float_denoiser), recipe)
        quantized = [layer for layer in plan.layers if layer.weights != "none"]
        branches = sum(layer.name.endswith((".down", ".up")) for layer in layers)
        assert len(quantized) == (0 if recipe.weights == "none" else len(layers) - branches)
        assert bool(branches) == (name == "svdquant")
        assert bool(plan.activation_quantizers) == (recipe.activations != "none")


def test_what_the_mixed_recipes_change(float_denoiser: IndexedDenoiser) -> None:
    plan, _ = resolve(float_denoiser, ResearchRecipe.load("s2p-mixed"))
    formats = {point.name: point.activations for point in plan.activation_quantizers}
    chosen = {
        rule: {
            (layer.weights, formats.get(layer.activation_quantizer or "", "none"))
            for layer in plan.layers
            if layer.rule == rule
        }
        for rule in ("sensitive", "insensitive")
    }
    assert chosen == {"sensitive": {("int8", "none")}, "insensitive": {("int4", "int4")}}


@pytest.mark.parametrize("name", ["collapse", "q-diffusion", "svdquant", "pcr"])
def test_a_baselines_starting_scales(
    float_denoiser: IndexedDenoiser, source: FloatPipeline, dataset: LatentDataset, prompts: PromptSet, name: str
) -> None:
    recipe = ResearchRecipe.load(name, {"scales": {"latents": 2}})
    plan, _ = resolve(float_denoiser, recipe)
    weight_scales = starting_weight_scales(float_denoiser, plan, recipe.scales)
    if recipe.scales.progressive:
        sampling = GuidedSampling(prompts, dataset, sampler_of(source.pipe, source.timesteps, 6), 2.5)
        grids = progressive_grids(float_denoiser, plan, weight_scales, sampling, recipe.scales, silent)
    else:
        grids = starting_grids(float_denoiser, plan, dataset, recipe.scales, silent)
    scales = grids if grids.dim() == 2 else grids[..., 0]
    assert scales.shape == (len(calibrated_indices(dataset)), len(plan.activation_quantizers))
    assert bool((scales > 0).all())
    assert bool((scales == scales[0]).all()) == (recipe.scales.timesteps != "each")
    assert (grids.dim() == 3) == (name == "pcr")
