from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.scale_start import calibrated_rows, starting_act_scales, starting_weight_scales
from s2p_deploy.errors import S2PError
from s2p_deploy.families import HotDenoiser, discover_sites
from s2p_deploy.numerics import INT8, mse_best_scale
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan

PROJECTION = "mid_block.attentions.0.proj_in"


@pytest.fixture
def plan(hot: HotDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_sites(hot))


@torch.no_grad()
def test_a_rows_scale_is_the_mse_best_of_what_the_site_reads_there(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_rows(dataset)
    scales = starting_act_scales(hot, plan, dataset, 64, silent)
    assert scales.shape == (len(rows), len(plan.act_points))
    points = np.flatnonzero(dataset.rows == rows[2])
    seen = []
    hot.unet.get_submodule(PROJECTION).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for texts in (dataset.uncond_text, dataset.cond_text):
        states = torch.from_numpy(dataset.texts[texts[dataset.prompt[points]]])
        hot(torch.from_numpy(dataset.latents[points]).float(), torch.full((len(points),), rows[2]), states)
    expected = mse_best_scale(torch.cat(seen), INT8)
    torch.testing.assert_close(scales[2, plan.point_names().index(PROJECTION)], expected, rtol=1e-4, atol=0)


def test_the_order_of_the_points_changes_no_scale(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    order = np.random.default_rng(0).permutation(len(dataset.rows))
    columns = {name: getattr(dataset, name)[order] for name in ("latents", "rows", "cond", "uncond", "prompt")}
    shuffled = dataclasses.replace(dataset, **columns)
    first, second = (starting_act_scales(hot, plan, data, 64, silent) for data in (dataset, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)


def test_a_point_that_reads_only_the_text_has_one_scale(
    hot: HotDenoiser, recipe: Recipe, dataset: LatentDataset
) -> None:
    plan = plan_from_recipe(recipe.model_copy(update={"rules": ()}), discover_sites(hot))
    scales = starting_act_scales(hot, plan, dataset, 2, silent)
    static = [not point.timestep_dependent for point in plan.act_points]
    assert sum(static) == 1  # every cross-attention reads the one text tensor
    assert bool((scales[:, static] == scales[0, static]).all())
    assert not bool((scales[:, 0] == scales[0, 0]).all())


def test_weight_scales_are_of_the_planned_sites(hot: HotDenoiser, plan: PrecisionPlan) -> None:
    scales = starting_weight_scales(hot, plan)
    assert set(scales) == {site.site for site in plan.sites}
    weight = hot.unet.conv_in.weight
    torch.testing.assert_close(scales["conv_in"].flatten(), weight.abs().amax((1, 2, 3)) / 127, rtol=0.05, atol=0)


def test_a_broken_pipeline_is_named(hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset) -> None:
    with torch.no_grad():
        hot.unet.get_submodule(PROJECTION).weight.fill_(torch.nan)
    with pytest.raises(S2PError, match=r"the activation mid_block.* is not finite at timestep"):
        starting_act_scales(hot, plan, dataset, 2, silent)
