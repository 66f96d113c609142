from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.samples import calibrated_indices
from s2p_deploy.context import silent
from s2p_deploy.errors import S2PError
from s2p_deploy.families import IndexedDenoiser, discover_layers
from s2p_deploy.numerics import (
    INT8,
)
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan
from s2p_research.formats import INT10
from s2p_research.grids import affine_grid, mse_best_range
from s2p_research.recipe import ResearchScales
from s2p_research.starting_scales import starting_grids

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


def scales_of(grids: Tensor) -> Tensor:
    return grids if grids.dim() == 2 else grids[..., 0]


@pytest.mark.parametrize("how", ["max", "mean", "min"])
def test_rows_are_collapsed_to_one_scale(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, how: str
) -> None:
    each = scales_of(starting_grids(float_denoiser, plan, dataset, ResearchScales(activations="max"), silent))
    one = scales_of(
        starting_grids(float_denoiser, plan, dataset, ResearchScales(activations="max", timesteps=how), silent)
    )
    samples_per_timestep = torch.from_numpy(np.unique(dataset.timestep_indices, return_counts=True)[1]).float()
    expected = {
        "max": each.amax(0),
        "min": each.amin(0),
        "mean": (each * samples_per_timestep[:, None]).sum(0) / len(dataset.timestep_indices),
    }
    assert bool((one == one[0]).all())
    torch.testing.assert_close(one[0], expected[how])


def test_a_zero_points_grid_is_over_the_mse_best_range(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    rows = calibrated_indices(dataset)
    grids = starting_grids(float_denoiser, plan, dataset, ResearchScales(zero_point=True), silent)
    assert grids.dim() == 3
    column = plan.quantizer_names().index(AFTER_SILU)
    x = read_by(float_denoiser, AFTER_SILU, dataset, rows[3])
    expected = torch.stack(affine_grid(*mse_best_range(x, INT8), INT8))
    found = torch.stack((grids[3, column, 0], grids[3, column, 1]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    symmetric = scales_of(starting_grids(float_denoiser, plan, dataset, ResearchScales(), silent))[3, column]
    assert found[0] < 0.8 * symmetric  # SiLU's values below zero are few and small: half a symmetric grid is idle


@pytest.mark.parametrize("how", ["each", "max", "mean", "min"])
def test_zero_points_are_whole_codes_and_collapse_with_the_range(
    float_denoiser: IndexedDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset, how: str
) -> None:
    scales = ResearchScales(zero_point=True, activations="max", timesteps=how)
    grids = starting_grids(float_denoiser, text_plan, dataset, scales, silent)
    assert grids.dim() == 3
    zero = -grids[..., 1] / grids[..., 0]
    torch.testing.assert_close(zero, zero.round(), rtol=0, atol=1e-4)
    assert (zero.min() >= -128.01, zero.max() <= 127.01) == (True, True)
    assert how == "each" or bool((grids[..., 0] == grids[..., 0][0]).all())


def test_the_widest_range_holds_all_rows(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    each, widest = (
        starting_grids(
            float_denoiser, plan, dataset, ResearchScales(zero_point=True, activations="max", timesteps=how), silent
        )
        for how in ("each", "max")
    )
    assert each.dim() == 3
    assert widest.dim() == 3
    step = widest[..., 0]  # rounding the zero points may move an end by half a code in either
    assert bool((widest[..., 1] - 128 * step <= each[..., 1] - 128 * each[..., 0] + step).all())
    assert bool((widest[..., 1] + 127 * step >= each[..., 1] + 127 * each[..., 0] - step).all())


def test_rows_nearest_the_picture_are_relaxed(
    float_denoiser: IndexedDenoiser, text_plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    plan, rows = text_plan, calibrated_indices(dataset)
    strict, relaxed = (
        starting_grids(float_denoiser, plan, dataset, ResearchScales(activations="max", relaxed=share), silent)
        for share in (0, 0.34)
    )
    assert (relaxed[:, 0, 2] > 0).tolist() == [True, True, *[False] * (len(rows) - 2)]  # round(0.34 * 6) smallest rows
    moving = torch.tensor([quantizer.timestep_dependent for quantizer in plan.activation_quantizers])
    ratio = strict / relaxed[..., 0]
    torch.testing.assert_close(ratio[:2, moving], torch.full_like(ratio[:2, moving], INT10.qmax / INT8.qmax))
    assert torch.equal(strict[2:], relaxed[..., 0][2:])
    assert torch.equal(strict[:, ~moving], relaxed[..., 0][:, ~moving])


@pytest.mark.parametrize("zero_point", [False, True])
def test_a_broken_pipeline_is_named(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, zero_point: bool
) -> None:
    with torch.no_grad():
        float_denoiser.network.get_submodule(PROJECTION).weight.fill_(torch.nan)
    with pytest.raises(S2PError, match=r"the activation mid_block.* is not finite at timestep index"):
        starting_grids(float_denoiser, plan, dataset, ResearchScales(zero_point=zero_point), silent)
