from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.quantization.scale_start import calibrated_rows, seen, starting_grids, starting_weight_scales
from s2p_deploy.errors import S2PError
from s2p_deploy.families import HotDenoiser, apply_transforms, discover_sites
from s2p_deploy.numerics import (
    INT8,
    INT10,
    affine_grid,
    least_squares_weight_scale,
    max_weight_scale,
    mse_best_range,
    mse_best_scale,
)
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe, Scales
from s2p_deploy.records import LatentDataset, PrecisionPlan, TransformSpec

PROJECTION = "mid_block.attentions.0.proj_in"
AFTER_SILU = "mid_block.resnets.0.conv1"


@pytest.fixture
def plan(hot: HotDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_sites(hot))


@pytest.fixture
def text_plan(hot: HotDenoiser, recipe: Recipe) -> PrecisionPlan:
    """The text is quantized too: its point is the one that does not depend on the timestep."""
    plan = plan_from_recipe(recipe.model_copy(update={"rules": ()}), discover_sites(hot))
    assert sum(not point.timestep_dependent for point in plan.act_points) == 1
    return plan


@torch.no_grad()
def read_by(hot: HotDenoiser, site: str, dataset: LatentDataset, row: int) -> Tensor:
    """What a site reads on a row, at all of the row's stored points and with both texts."""
    inputs = []
    hook = hot.network.get_submodule(site).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    points = np.flatnonzero(dataset.rows == row)
    for texts in (dataset.uncond_text, dataset.cond_text):
        states = torch.from_numpy(dataset.texts[texts[dataset.prompt[points]]])
        hot(torch.from_numpy(dataset.latents[points]).float(), torch.full((len(points),), row), states)
    hook.remove()
    return torch.cat(inputs)


def test_a_rows_scale_is_the_mse_best_of_what_the_site_reads_there(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_rows(dataset)
    grids = starting_grids(hot, plan, dataset, Scales(), silent)
    assert grids.scales.shape == (len(rows), len(plan.act_points))
    assert grids.offsets is None
    assert grids.relaxed is None
    expected = mse_best_scale(read_by(hot, PROJECTION, dataset, rows[2]), INT8)
    torch.testing.assert_close(grids.scales[2, plan.point_names().index(PROJECTION)], expected, rtol=1e-4, atol=0)


def test_max_puts_the_largest_magnitude_on_the_last_code(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_rows(dataset)
    scales = starting_grids(hot, plan, dataset, Scales(activations="max"), silent).scales
    peak = read_by(hot, PROJECTION, dataset, rows[1]).abs().max()
    torch.testing.assert_close(scales[1, plan.point_names().index(PROJECTION)], peak / 127, rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["max", "mean", "min"])
def test_rows_are_collapsed_to_one_scale(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, how: str
) -> None:
    each = starting_grids(hot, plan, dataset, Scales(activations="max"), silent).scales
    one = starting_grids(hot, plan, dataset, Scales(activations="max", timesteps=how), silent).scales
    stored_points_per_row = torch.from_numpy(np.unique(dataset.rows, return_counts=True)[1]).float()
    expected = {
        "max": each.amax(0),
        "min": each.amin(0),
        "mean": (each * stored_points_per_row[:, None]).sum(0) / len(dataset.rows),
    }
    assert bool((one == one[0]).all())
    torch.testing.assert_close(one[0], expected[how])


def test_a_zero_points_grid_is_over_the_mse_best_range(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_rows(dataset)
    grids = starting_grids(hot, plan, dataset, Scales(zero_point=True), silent)
    assert grids.offsets is not None
    column = plan.point_names().index(AFTER_SILU)
    x = read_by(hot, AFTER_SILU, dataset, rows[3])
    expected = torch.stack(affine_grid(*mse_best_range(x, INT8), INT8))
    found = torch.stack((grids.scales[3, column], grids.offsets[3, column]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    symmetric = starting_grids(hot, plan, dataset, Scales(), silent).scales[3, column]
    assert found[0] < 0.8 * symmetric  # SiLU's values below zero are few and small: half a symmetric grid is idle


@pytest.mark.parametrize("how", ["each", "max", "mean", "min"])
def test_zero_points_are_whole_codes_and_collapse_with_the_range(
    hot: HotDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset, how: str
) -> None:
    scales = Scales(zero_point=True, activations="max", timesteps=how)
    grids = starting_grids(hot, text_plan, dataset, scales, silent)
    assert grids.offsets is not None
    zero = -grids.offsets / grids.scales
    torch.testing.assert_close(zero, zero.round(), rtol=0, atol=1e-4)
    assert (zero.min() >= -128.01, zero.max() <= 127.01) == (True, True)
    assert how == "each" or bool((grids.scales == grids.scales[0]).all())


def test_the_widest_range_holds_all_rows(hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset) -> None:
    each, widest = (
        starting_grids(hot, plan, dataset, Scales(zero_point=True, activations="max", timesteps=how), silent)
        for how in ("each", "max")
    )
    assert each.offsets is not None
    assert widest.offsets is not None
    step = widest.scales  # rounding the zero points may move an end by half a code in either
    assert bool((widest.offsets - 128 * step <= each.offsets - 128 * each.scales + step).all())
    assert bool((widest.offsets + 127 * step >= each.offsets + 127 * each.scales - step).all())


def test_rows_nearest_the_picture_are_relaxed(
    hot: HotDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    plan, rows = text_plan, calibrated_rows(dataset)
    strict, relaxed = (
        starting_grids(hot, plan, dataset, Scales(activations="max", relaxed=share), silent) for share in (0, 0.34)
    )
    assert relaxed.relaxed is not None
    assert relaxed.relaxed.tolist() == [True, True, *[False] * (len(rows) - 2)]  # round(0.34 * 6) smallest rows
    moving = torch.tensor([point.timestep_dependent for point in plan.act_points])
    ratio = strict.scales / relaxed.scales
    torch.testing.assert_close(ratio[:2, moving], torch.full_like(ratio[:2, moving], INT10.qmax / INT8.qmax))
    assert torch.equal(strict.scales[2:], relaxed.scales[2:])
    assert torch.equal(strict.scales[:, ~moving], relaxed.scales[:, ~moving])


def test_the_order_of_the_points_changes_no_scale(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    order = np.random.default_rng(0).permutation(len(dataset.rows))
    columns = {name: getattr(dataset, name)[order] for name in ("latents", "rows", "cond", "uncond", "prompt")}
    shuffled = dataclasses.replace(dataset, **columns)
    how = Scales(activations="max")
    first, second = (starting_grids(hot, plan, data, how, silent).scales for data in (dataset, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)


def test_only_so_many_latents_of_a_row_are_looked_at(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    keep = np.sort([np.flatnonzero(dataset.rows == row)[0] for row in calibrated_rows(dataset)])
    columns = {name: getattr(dataset, name)[keep] for name in ("latents", "rows", "cond", "uncond", "prompt")}
    first = dataclasses.replace(dataset, **columns)
    how = Scales(activations="max", latents=1)
    few, all_of_few = (starting_grids(hot, plan, data, how, silent) for data in (dataset, first))
    assert torch.equal(few.scales, all_of_few.scales)
    assert not torch.equal(few.scales, starting_grids(hot, plan, dataset, Scales(activations="max"), silent).scales)


def test_a_point_that_reads_only_the_text_has_one_scale(
    hot: HotDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    scales = starting_grids(hot, text_plan, dataset, Scales(activations="max"), silent).scales
    static = [not point.timestep_dependent for point in text_plan.act_points]
    assert bool((scales[:, static] == scales[0, static]).all())
    assert not bool((scales[:, 0] == scales[0, 0]).all())


def test_rewritten_sites_are_found_under_their_new_names(
    hot: HotDenoiser, recipe: Recipe, dataset: LatentDataset
) -> None:
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    apply_transforms(hot, TransformSpec(smoothed=(query,)))
    plan = plan_from_recipe(recipe, discover_sites(hot))
    scales = starting_grids(hot, plan, dataset, Scales(), silent).scales
    row = calibrated_rows(dataset)[0]
    expected = mse_best_scale(read_by(hot, f"{query}.layer", dataset, row), INT8)
    torch.testing.assert_close(scales[0, plan.point_names().index(f"{query}.layer")], expected, rtol=1e-4, atol=0)


def test_a_plan_of_weights_alone_has_no_grids(hot: HotDenoiser, recipe: Recipe, dataset: LatentDataset) -> None:
    weights_alone = recipe.model_copy(update={"activations": "none"})
    plan = plan_from_recipe(weights_alone, discover_sites(hot))
    rows = calibrated_rows(dataset)
    assert starting_grids(hot, plan, dataset, Scales(timesteps="mean"), silent).scales.shape == (len(rows), 0)


def test_weight_scales_are_of_the_planned_sites(hot: HotDenoiser, plan: PrecisionPlan) -> None:
    weight = hot.network.conv_in.weight
    for how, scale_of in (("least_squares", least_squares_weight_scale), ("max", max_weight_scale)):
        scales = starting_weight_scales(hot, plan, Scales(weights=how))
        assert set(scales) == {site.site for site in plan.sites}
        assert torch.equal(scales["conv_in"], scale_of(weight, INT8))


def test_both_branches_of_a_point_are_seen(dataset: LatentDataset) -> None:
    sample, rows, texts, added_cond = seen(dataset, np.array([2, 5]))
    assert added_cond.shape == (4, 0)
    assert torch.equal(sample, torch.from_numpy(dataset.latents[[2, 5, 2, 5]]).float())
    assert rows.tolist() == dataset.rows[[2, 5, 2, 5]].tolist()
    prompt = dataset.prompt[[2, 5]]
    expected = [*dataset.uncond_text[prompt], *dataset.cond_text[prompt]]
    assert torch.equal(texts, torch.from_numpy(dataset.texts[expected]))


@pytest.mark.parametrize("zero_point", [False, True])
def test_a_broken_pipeline_is_named(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, zero_point: bool
) -> None:
    with torch.no_grad():
        hot.network.get_submodule(PROJECTION).weight.fill_(torch.nan)
    with pytest.raises(S2PError, match=r"the activation mid_block.* is not finite on row"):
        starting_grids(hot, plan, dataset, Scales(zero_point=zero_point), silent)
