"""The tiny pipeline's quantized denoiser as training takes it, the same each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib import QuantizedDenoiser, fp_denoiser, plan_from_recipe
from s2p_deploy.calib.samples import calibrated_indices
from s2p_deploy.calib.training_state import ActScales, TrainingState
from s2p_deploy.families import discover_layers
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale

if TYPE_CHECKING:
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import LatentDataset


def new_state(base: BasePipeline, recipe: Recipe, dataset: LatentDataset, act_scale: float = 0.05) -> TrainingState:
    """One activation scale for every point and row."""
    float_denoiser = fp_denoiser(base, 50).requires_grad_()
    plan = plan_from_recipe(recipe, discover_layers(float_denoiser))
    scales = {}
    for layer in plan.layers:
        fmt = format_by_name(layer.weights)
        if fmt is not None:
            scales[layer.name] = least_squares_weight_scale(
                float_denoiser.network.get_submodule(layer.name).weight, fmt
            )
    rows = torch.tensor(calibrated_indices(dataset))
    act_scales = torch.full((len(rows), len(plan.activation_quantizers)), act_scale)
    static = [not point.timestep_dependent for point in plan.activation_quantizers]
    return TrainingState(QuantizedDenoiser(float_denoiser, plan, scales), ActScales(act_scales, static), rows)
