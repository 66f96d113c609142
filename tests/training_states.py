"""The tiny pipeline's quantized denoiser as training takes it, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib import QuantizedDenoiser, fp_denoiser, plan_from_recipe
from s2p_deploy.calib.quantization.scale_start import calibrated_rows
from s2p_deploy.calib.training.act_scales import ActScales
from s2p_deploy.calib.training.state import TrainingState
from s2p_deploy.families import discover_sites
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale

if TYPE_CHECKING:
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import LatentDataset


def new_state(base: BasePipeline, recipe: Recipe, dataset: LatentDataset, act_scale: float = 0.05) -> TrainingState:
    """One activation scale for every point and row."""
    hot = fp_denoiser(base, 50).requires_grad_()
    plan = plan_from_recipe(recipe, discover_sites(hot))
    scales = {}
    for site in plan.sites:
        fmt = format_by_name(site.weights)
        if fmt is not None:
            scales[site.site] = least_squares_weight_scale(hot.network.get_submodule(site.site).weight, fmt)
    rows = torch.tensor(calibrated_rows(dataset))
    act_scales = torch.full((len(rows), len(plan.act_points)), act_scale)
    static = [not point.timestep_dependent for point in plan.act_points]
    return TrainingState(QuantizedDenoiser(hot, plan, scales), ActScales(act_scales, static), rows)
