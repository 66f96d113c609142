"""Where training starts: closed-form scales of weights, and of activations by calibrated timestep.

Or, for models that are streamed, activation scales without a look at activations.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import weight_format
from s2p_deploy.calib.samples import calibrated_indices, samples_at
from s2p_deploy.errors import InputError
from s2p_deploy.numerics import (
    format_by_name,
    least_squares_weight_scale,
    max_scale,
    max_weight_scale,
    mse_best_scale,
)
from s2p_deploy.records import ScaleTable
from s2p_deploy.timesteps import interpolate_scales, scales_for_schedule, timestep_indices, with_schedules

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.samples import SamplePairs
    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.recipe import Scales
    from s2p_deploy.records import (
        ActivationQuantizer,
        CalibratedModel,
        LatentDataset,
        LayerPlan,
        PrecisionPlan,
        TimestepTable,
    )

SAMPLED = 65_536  # elements of an activation that decide its MSE-best clip; more change it by less than a candidate
DEFAULT_PEAK = 4.0  # standard deviations of a unit normal activation that are not clipped, next to the picture
DEFAULT_RISE = 0.25  # by how much more at the noisiest timestep: engines whose scales never vary would be other engines


def closed_form_scales(
    request: CalibrationRequest, source: FloatPipeline, plan: PrecisionPlan, dataset: LatentDataset
) -> tuple[dict[str, Tensor], Tensor]:
    """Finds starting scales as the recipe's ``scales`` section says.

    ``source.denoiser`` is the floating-point denoiser whose layers the plan names. Returns weight scales float32
    [out, 1, ...] by layer and activation scales float32 [calibrated, quantizers].

    Raises:
        InputError: an activation holds NaN or infinity.
    """
    scales, context = request.recipe.scales, request.context
    return (
        starting_weight_scales(source.denoiser, plan, scales, request.hooks.weight_format),
        starting_act_scales(
            source.denoiser, plan, dataset, scales, context.progress, samples_per_call=context.samples_per_call
        ),
    )


def starting_weight_scales(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    scales: Scales,
    weight_format: Callable[[LayerPlan], IntegerFormat | None] = weight_format,
) -> dict[str, Tensor]:
    """Computes scales float32 [out, 1, ...] of the layers whose weights the plan quantizes."""
    formats = {layer.name: weight_format(layer) for layer in plan.layers}
    return {
        name: weight_scale(denoiser.network.get_submodule(name).weight, fmt, scales)
        for name, fmt in formats.items()
        if fmt is not None
    }


def weight_scale(weight: Tensor, fmt: IntegerFormat, scales: Scales) -> Tensor:
    """Computes the scale float32 [out, 1, ...] of a weight, as ``scales.weights`` says."""
    return (least_squares_weight_scale if scales.weights == "least_squares" else max_weight_scale)(weight, fmt)


def starting_act_scales(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    dataset: LatentDataset,
    scales: Scales,
    progress: Progress,
    samples_per_call: int | None = None,
) -> Tensor:
    """Finds activation scales float32 [calibrated, quantizers] from up to ``scales.latents`` samples per timestep.

    Both CFG branches are seen, in calls of ``samples_per_call`` (None: one call for a timestep). A quantizer that does
    not depend on the timestep has one scale: of the mean clip, to which a timestep contributes by its samples.

    Raises:
        InputError: an activation holds NaN or infinity.
    """
    clips, counts = [], []
    indices = calibrated_indices(dataset)
    for number, index in enumerate(indices):
        which = np.flatnonzero(dataset.timestep_indices == index)
        clips.append(_clips(denoiser, plan, samples_at(dataset, which[: scales.latents]), scales, samples_per_call))
        counts.append(len(which))
        progress("scales", number + 1, len(indices))
    table, weights = torch.stack(clips), torch.tensor(counts, dtype=torch.float32)
    static = torch.tensor([not quantizer.timestep_dependent for quantizer in plan.activation_quantizers])
    mean = torch.einsum("t,tq->q", (weights / weights.sum()).to(table.device), table)
    table = torch.where(static.bool().to(table.device), mean, table).cpu()
    return table / torch.tensor([float(activation_format(each).qmax) for each in plan.activation_quantizers])


def _clips(
    denoiser: IndexedDenoiser, plan: PrecisionPlan, pairs: SamplePairs, scales: Scales, samples_per_call: int | None
) -> Tensor:
    """Finds the clips float32 [quantizers] of one timestep's samples."""
    if not plan.activation_quantizers:
        return torch.zeros(0)
    total = len(pairs.sample)
    read: dict[str, list[Tensor]] = {quantizer.name: [] for quantizer in plan.activation_quantizers}
    for part in torch.arange(total).split(samples_per_call or total):
        share = len(part) / total
        watch_quantizers(
            denoiser,
            plan,
            pairs.inputs(part),
            lambda quantizer, x, share=share: read[quantizer.name].append(decisive(x, scales, share)),  # type: ignore[misc]
        )
    found = [clip(torch.cat(read[each.name]), activation_format(each), scales) for each in plan.activation_quantizers]
    return checked(torch.stack(found), plan, int(pairs.timestep_index[0]))


def decisive(x: Tensor, scales: Scales, share: float) -> Tensor:
    """Takes the elements [n] that decide a clip from the ``share`` of an activation that one call sees."""
    return x.abs().amax().view(1) if scales.activations == "max" else sampled(x, round(SAMPLED * share))


def clip(x: Tensor, fmt: IntegerFormat, scales: Scales) -> Tensor:
    """Finds the largest magnitude that stays as it is, float32 [], from the elements that decide it."""
    return (max_scale(x, fmt) if scales.activations == "max" else mse_best_scale(x, fmt)) * fmt.qmax


def observe_quantizers(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    measure: Callable[[ActivationQuantizer, Tensor], Tensor],
) -> Tensor:
    """Measures what every activation quantizer would read in one forward pass: float32 [quantizers, ...].

    Args:
        denoiser: a denoiser whose activations are not quantized.
        plan: names the quantizers' layers.
        inputs: sample, timestep index (one for all samples), text states, added_cond.
        measure: measures a quantizer's input.

    Raises:
        InputError: an activation holds NaN or infinity.
    """
    if not plan.activation_quantizers:
        return torch.zeros(0)
    measured: dict[str, Tensor] = {}

    def look(quantizer: ActivationQuantizer, x: Tensor) -> None:
        measured[quantizer.name] = measure(quantizer, x)

    watch_quantizers(denoiser, plan, inputs, look)
    values = torch.stack([measured[quantizer.name] for quantizer in plan.activation_quantizers])
    return checked(values, plan, int(inputs[1][0]))


@torch.no_grad()
def watch_quantizers(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    look: Callable[[ActivationQuantizer, Tensor], None],
) -> None:
    """Runs one forward pass and shows every activation quantizer's input to ``look``."""
    hooks = [
        denoiser.network.get_submodule(quantizer.layers[0]).register_forward_pre_hook(
            lambda _, args, quantizer=quantizer: look(quantizer, args[0])
        )
        for quantizer in plan.activation_quantizers
    ]
    try:
        denoiser(*(None if argument is None else argument.to(denoiser.device) for argument in inputs))
    finally:
        for hook in hooks:
            hook.remove()


def checked(values: Tensor, plan: PrecisionPlan, index: int) -> Tensor:
    """Returns measurements [quantizers, ...] of a timestep index. Raises InputError where one is NaN or infinity."""
    broken = (~torch.isfinite(values.reshape(len(values), -1)).all(1)).cpu().nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"the activation {plan.activation_quantizers[broken[0]].name} is not finite at timestep index {index},"
            " though every weight is: the scheduler's configuration (zero SNR, prediction type) does not suit it"
        )
    return values


def activation_format(quantizer: ActivationQuantizer) -> IntegerFormat:
    """Returns the integer format of an activation quantizer."""
    fmt = format_by_name(quantizer.activations)
    assert fmt is not None, "activation quantizers are quantized"
    return fmt


def sampled(x: Tensor, count: int = SAMPLED) -> Tensor:
    """Draws up to ``count`` elements: even strides would meet the same columns again and again."""
    flat = x.flatten()
    if flat.numel() <= count:
        return flat
    return flat[_draw(flat.numel(), count, flat.device)]


@lru_cache(maxsize=64)  # a network has few sizes, and each is drawn in every timestep; what is kept is device memory
def _draw(elements: int, count: int, device: torch.device) -> Tensor:
    """Draws ``count`` of so many elements with replacement, int64, the same ones every time."""
    return torch.randint(elements, (count,), generator=torch.Generator().manual_seed(0)).to(device)


def default_scales(plan: PrecisionPlan, timesteps: TimestepTable) -> ScaleTable:
    """Makes the scales of every timestep index as if all activations were unit normal.

    ``DEFAULT_PEAK / qmax`` next to the picture, rising linearly with the timestep by ``DEFAULT_RISE``; quantizers that
    do not depend on the timestep stay at the first. Engines get their real size and speed from them, and no pictures.
    """
    share = np.asarray(timesteps.calibrated) / (len(timesteps.angle) - 1)
    columns = [
        DEFAULT_PEAK / activation_format(quantizer).qmax * (1 + DEFAULT_RISE * share * quantizer.timestep_dependent)
        for quantizer in plan.activation_quantizers
    ]
    calibrated = np.stack(columns, 1) if columns else np.ones((len(share), 0))
    scales = interpolate_scales(calibrated.astype(np.float32), timesteps)
    return ScaleTable(scales, plan.quantizer_names(), timesteps.calibrated_indices)


def given_scales(
    plan: PrecisionPlan, timesteps: TimestepTable, given: CalibratedModel
) -> tuple[ScaleTable, TimestepTable]:
    """Takes the scales of another model's quantizers of the same names; its calibrated timesteps become this model's.

    ``timesteps`` is the schedule of this model; what it has and the other has not gets an index.

    Raises:
        InputError: the other model has another noise schedule, lacks an activation quantizer or has it in another
            format, cannot be deployed, or was not calibrated for timesteps of this schedule.
    """
    given.require_deployable()
    own, other = timesteps, given.timesteps
    same_levels = own.angle.shape == other.angle.shape and np.allclose(own.angle, other.angle, rtol=0, atol=1e-6)
    if own.flow_matching != other.flow_matching or not same_levels:
        raise InputError(f"cannot take activation scales from {given.folder}: its noise levels are of another schedule")
    formats = {quantizer.name: quantizer.activations for quantizer in given.plan.activation_quantizers}
    for quantizer in plan.activation_quantizers:
        theirs = formats.get(quantizer.name, "nothing")
        if theirs != quantizer.activations:
            raise InputError(
                f"{given.folder} has {theirs} for activation quantizer {quantizer.name}, which needs"
                f" {quantizer.activations} scales:"
                " give a model calibrated with the same formats"
            )
    known = dataclasses.replace(
        own, calibrated=other.calibrated, fractional=None if own.fractional is None else other.fractional
    )
    bound = known if own.fractional is None else with_schedules(known, [own.calibrated])
    timestep_indices(own.calibrated, bound)  # refuses what the other does not cover
    scales = scales_for_schedule(given.scales, other, bound).scales
    columns = [given.scales.quantizers.index(name) for name in plan.quantizer_names()]
    return ScaleTable(np.ascontiguousarray(scales[:, columns]), plan.quantizer_names(), bound.calibrated_indices), bound
