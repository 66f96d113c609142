"""Every recipe that ships fits a real denoiser: its transforms, its plan, and the grids that it starts from."""

from __future__ import annotations

import copy

import pytest
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.trajectories import call_rows, schedule_table
from s2p_deploy.calib.quantization.fit_transforms import transform_spec
from s2p_deploy.calib.quantization.modelopt_start import smoothed_by_modelopt
from s2p_deploy.calib.quantization.plan import check_plan, mixed_plan
from s2p_deploy.calib.quantization.progressive import GuidedSampling, progressive_grids
from s2p_deploy.calib.quantization.scale_start import calibrated_rows, starting_grids, starting_weight_scales
from s2p_deploy.families import HotDenoiser, Site, apply_transforms, discover_sites
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe, load_recipe, preset_names
from s2p_deploy.records import LatentDataset, PrecisionPlan, PromptSet, TransformSpec


def resolve(hot: HotDenoiser, recipe: Recipe) -> tuple[PrecisionPlan, tuple[Site, ...]]:
    """Transforms ``hot`` as the recipe says and plans it; sites that come later count as more sensitive."""
    plain = plan_from_recipe(recipe, discover_sites(hot))
    linears = [site.site for site in plain.sites if site.op == "linear" and site.weights != "none"]
    spec = transform_spec(hot, recipe.transforms, linears)
    if recipe.scales.calibrator == "modelopt_smoothquant":
        spec = TransformSpec(smoothed=smoothed_by_modelopt(plain))
    apply_transforms(hot, spec)
    sites = discover_sites(hot)
    plan = plan_from_recipe(recipe, sites)
    if recipe.mixed.sensitivity != "none":
        plan = mixed_plan(plan, sites, {site.name: float(i) for i, site in enumerate(sites)}, recipe.mixed)
    check_plan(plan, sites)
    return plan, sites


@pytest.mark.parametrize("name", preset_names())
def test_a_shipped_recipe_resolves(hot: HotDenoiser, name: str) -> None:
    for recipe in (load_recipe(name), load_recipe(name, {"weights": "int8"})):
        plan, sites = resolve(copy.deepcopy(hot), recipe)
        quantized = [site for site in plan.sites if site.weights != "none"]
        assert len(quantized) == (0 if recipe.weights == "none" else len([site for site in sites if not site.branch]))
        assert bool(plan.act_points) == (recipe.activations != "none")


def test_what_the_mixed_recipes_change(hot: HotDenoiser) -> None:
    plan, _ = resolve(hot, load_recipe("s2p-mixed"))
    formats = {point.name: point.activations for point in plan.act_points}
    chosen = {
        rule: {(site.weights, formats.get(site.act_point or "", "none")) for site in plan.sites if site.rule == rule}
        for rule in ("sensitive", "insensitive")
    }
    assert chosen == {"sensitive": {("int8", "none")}, "insensitive": {("int4", "int4")}}


@pytest.mark.parametrize("name", ["collapse", "q-diffusion", "svdquant", "pcr"])
def test_a_rivals_starting_grids(
    hot: HotDenoiser, pipe: StableDiffusionPipeline, dataset: LatentDataset, prompts: PromptSet, name: str
) -> None:
    recipe = load_recipe(name, {"scales": {"latents": 2}})
    plan, _ = resolve(hot, recipe)
    weight_scales = starting_weight_scales(hot, plan, recipe.scales)
    if recipe.scales.progressive:
        pipe.scheduler.set_timesteps(6)
        sampler = Sampler(pipe.scheduler, call_rows(pipe.scheduler, schedule_table(pipe, hot, 6)))
        sampling = GuidedSampling(prompts, dataset, sampler, 2.5)
        grids = progressive_grids(hot, plan, weight_scales, sampling, recipe.scales, silent)
    else:
        grids = starting_grids(hot, plan, dataset, recipe.scales, silent)
    assert grids.scales.shape == (len(calibrated_rows(dataset)), len(plan.act_points))
    assert bool((grids.scales > 0).all())
    assert bool((grids.scales == grids.scales[0]).all()) == (recipe.scales.timesteps != "each")
    assert (grids.relaxed is not None) == (name == "pcr")
