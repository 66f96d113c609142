"""Calibrations of comparisons: the product's stage with hooks, and the models that only this package can open."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import calib
from s2p_deploy.calib import FakeQuantDenoiser, Hooks, QuantizedDenoiser
from s2p_deploy.calib.trajectories import uniform_calls
from s2p_deploy.errors import InputError
from s2p_deploy.families import apply_transforms, new_indexed_denoiser
from s2p_deploy.numerics import format_by_name
from s2p_deploy.timesteps import interpolate_scales
from s2p_deploy.validation.compare import quantized_bytes
from s2p_research import grids, packed_weights
from s2p_research.formats import weight_format
from s2p_research.grids import SimulatedActScales, SimulatedInputQuantizer
from s2p_research.losses import ResearchBatchOrder, research_loss
from s2p_research.low_bit import low_bit_plan
from s2p_research.packed_weights import format_of
from s2p_research.recipe import is_product_recipe
from s2p_research.starting_scales import research_act_scales, research_starting_scales
from s2p_research.time_table import quantized_time_table
from s2p_research.transforms import apply_low_rank, read_low_rank, research_transforms, write_low_rank

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.plan import Transforms
    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.samples import BatchOrder
    from s2p_deploy.calib.training_state import ActScales, TrainingState
    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.recipe import Recipe, Training
    from s2p_deploy.records import (
        CalibratedModel,
        LatentDataset,
        PrecisionPlan,
        Prompt,
        PromptSet,
        TimestepTable,
    )
    from s2p_research.recipe import ResearchRecipe


def calibrate(
    base: BasePipeline,
    recipe: ResearchRecipe,
    prompts: PromptSet | None,
    out: Path,
    **options: Any,  # noqa: ANN401 - calibrate's own
) -> CalibratedModel:
    """Calibrates by a recipe of a comparison; ``options`` and errors as for :func:`s2p_deploy.calib.calibrate`."""
    resolved = recipe.with_sampling(base.default_guidance, base.default_strength)
    if not recipe.scales.measured and not is_product_recipe(recipe):
        raise InputError(
            f"recipe {recipe.name} measures no activation, which a comparison needs: set scales.activations to mse"
        )
    return calib.calibrate(base, resolved, prompts, out, hooks=hooks_for(resolved), **options)


def hooks_for(recipe: ResearchRecipe) -> Hooks:
    """Makes the hooks of a resolved recipe."""
    fmt = format_by_name(recipe.weights) if recipe.transforms.time_layers == "quantized" else None

    def refined_plan(
        request: CalibrationRequest, denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
    ) -> PrecisionPlan:
        return low_bit_plan(denoiser, plan, dataset, recipe.mixed, request.context.progress)

    def transforms(denoiser: IndexedDenoiser, given: Recipe) -> Transforms:
        del given
        return research_transforms(denoiser, recipe)

    def act_scales(given: Recipe, plan: PrecisionPlan, starting: Tensor) -> ActScales:
        del given
        return research_act_scales(recipe, plan, starting)

    def batch_order(dataset: LatentDataset, calibrated: Tensor, given: Training) -> BatchOrder:
        del given
        return ResearchBatchOrder(dataset, calibrated, recipe.training)

    return Hooks(
        research=recipe.not_deployable,
        stored_calls=normal_calls if recipe.dataset.timesteps == "normal" else uniform_calls,
        time_table=None if fmt is None else partial(quantized_time_table, fmt=fmt),
        transforms=transforms,
        refined_plan=refined_plan,
        weight_format=weight_format,
        input_quantizer=SimulatedInputQuantizer,
        starting_scales=partial(research_starting_scales, recipe),
        act_scales=act_scales,
        loss=partial(research_loss, recipe),
        needs_teacher=recipe.training.loss == "trajectory",
        batch_order=batch_order,
        stored_weights=stored_weights,
    )


def normal_calls(recipe: Recipe, prompt: Prompt, calls: int) -> tuple[int, ...]:
    """Draws the calls of a prompt to store, ascending, leaning towards the picture (PTQ4DM, arXiv 2211.15736).

    Timesteps, in units of the schedule's calls T with T - 1 the noisiest, are drawn as
    clip(round(N(0.4 T, (0.25 T)^2)), 0, T - 1), until enough distinct ones are found. Calls run from noise to picture.
    """
    count, draws = recipe.dataset.samples_per_prompt, random.Random(prompt.noise_seed)
    if count >= calls:
        return uniform_calls(recipe, prompt, calls)
    chosen: set[int] = set()
    while len(chosen) < count:
        timestep = round(draws.gauss(0.4 * calls, 0.25 * calls))
        chosen.add(calls - 1 - min(max(timestep, 0), calls - 1))
    return tuple(sorted(chosen))


def stored_weights(folder: Path, state: TrainingState, timesteps: TimestepTable) -> dict[str, Tensor]:
    """Writes low-bit weights, low-rank branches and simulated grids; returns the other weights."""
    packed = packed_weights.packed_weights(state.denoiser)
    packed_weights.write_packed_weights(packed, folder / packed_weights.FILE)
    write_low_rank(state.denoiser.inner, folder)
    if isinstance(state.act_scales, SimulatedActScales):
        scales = interpolate_scales(state.act_scales.table().numpy(), timesteps)
        simulation = grids.simulation_of(state.act_scales.fixed, timesteps, scales)
        grids.write_simulation(simulation, folder / grids.FILE)
    left_out = {f"network.{layer}.weight" for layer in packed}
    return {name: value for name, value in state.denoiser.inner_state().items() if name not in left_out}


def deployed_bytes(calibrated: CalibratedModel) -> int:
    """Counts the bytes of a deployed denoiser as the product does, with low-bit weights at log2(levels) bits."""
    packed = packed_weights.read_packed_weights(calibrated.folder / packed_weights.FILE)
    bits = sum(math.prod(weight.shape) * format_of(weight).bits for weight in packed.values())
    return quantized_bytes(calibrated) + math.ceil(bits / 8)


def fake_quant_denoiser(calibrated: CalibratedModel) -> FakeQuantDenoiser:
    """Loads the fake-quant reference of any calibrated model, in evaluation mode, float32 on the CPU."""
    folder = calibrated.folder
    config = json.loads((folder / "denoiser_config.json").read_text(encoding="utf-8"))
    inner = new_indexed_denoiser(config, calibrated.time_source())
    apply_transforms(inner, calibrated.transforms)
    apply_low_rank(inner, read_low_rank(folder))
    scales = calibrated.weight_scales()
    weights = calibrated.weights()
    for layer, packed in packed_weights.read_packed_weights(folder / packed_weights.FILE).items():
        weights[f"network.{layer}.weight"] = packed.values(scales[layer])
    inner.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    denoiser = QuantizedDenoiser(
        inner,
        calibrated.plan,
        {name: torch.from_numpy(value) for name, value in scales.items()},
        bake=True,
        weight_format=weight_format,
        input_quantizer=SimulatedInputQuantizer,
    )
    simulation = grids.read_simulation(folder / grids.FILE)
    table = torch.from_numpy(calibrated.scales.scales) if simulation is None else simulation.grids(calibrated.scales)
    return FakeQuantDenoiser(denoiser, table).eval().requires_grad_(requires_grad=False)
