"""The files of a CalibratedModel, and what a calibration reports about itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.quantized_denoiser import weight_format
from s2p_deploy.families import zero_inputs
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records.files import write_tensors, write_text
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import json_data

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.training import TrainingOutcome
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import LayerPlan, ScaleTable, TimestepTable, TimeTable, TransformSpec

WEIGHTS, WEIGHT_SCALES = "weights.safetensors", "weight_scales.safetensors"
FLOAT_BITS = 16  # what stays in floating point is deployed in half precision


def write_model_files(  # noqa: PLR0913 - the parts of a model
    folder: Path,
    request: CalibrationRequest,
    denoiser: QuantizedDenoiser,
    *,
    weight_scales: Mapping[str, Tensor],
    act_scales: ScaleTable,
    timesteps: TimestepTable,
    time_table: TimeTable | None,
    transforms: TransformSpec,
    tokens: int,
) -> dict[str, Any]:
    """Writes all files but ``weights.safetensors``; returns the content of the manifest that follows from them.

    Args:
        folder: the model's folder.
        request: what was calibrated.
        denoiser: quantized as planned; may be on the meta device.
        weight_scales: float32 [out, 1, ...] by layer.
        act_scales: of every index of ``timesteps``.
        timesteps: with the calibrated ones.
        time_table: None where the time features depend on the prompt too.
        transforms: how the modules differ from the pipeline's own.
        tokens: length of the text states.
    """
    inner = denoiser.inner
    write_tensors(folder / WEIGHT_SCALES, weight_scales)
    if time_table is not None:
        write_tensors(folder / "time_table.safetensors", {"time_projections": torch.from_numpy(time_table.projections)})
    write_scale_table(act_scales, folder / "act_scales.safetensors")
    write_timestep_table(timesteps, folder / "timesteps.json")
    write_plan(denoiser.plan, folder / "plan.yaml")
    write_text(folder / "denoiser_config.json", json.dumps(inner.config, indent=1) + "\n")
    return {
        "time_slices": {name: list(columns) for name, columns in inner.time_slices().items()},
        "tokens": tokens,
        "added_width": inner.added_width,
        "request": {name: value for name, value in request.identity().items() if name != "recipe"},
        "average_bits": average_bits(denoiser, tokens, request.hooks.weight_format),
        "transforms": json_data(transforms),
        "research": request.hooks.research,
    }


def average_bits(
    denoiser: QuantizedDenoiser,
    tokens: int = 77,
    weight_format: Callable[[LayerPlan], IntegerFormat | None] = weight_format,
) -> dict[str, Any]:
    """Averages the bits of ``weights`` and ``activations`` over the layers, by three weightings, which differ widely.

    ``parameters`` weighs a layer by the number of its weights, ``layers`` not at all, ``input_elements`` by the
    elements that it reads for one sample, with a text of ``tokens`` tokens. Codes count log2(levels) bits,
    ``floating_point`` what all else counts.
    """
    plan = denoiser.plan
    formats = [weight_format(layer) for layer in plan.layers]
    weights = [FLOAT_BITS if fmt is None else fmt.bits for fmt in formats]
    quantizers = {name: format_by_name(plan.quantizer(name).activations) for name in plan.quantizer_names()}
    formats = [quantizers.get(layer.activation_quantizer or "") for layer in plan.layers]
    activations = [FLOAT_BITS if fmt is None else fmt.bits for fmt in formats]
    weightings = {
        "parameters": [denoiser.layer(layer.name).get_parameter("weight").numel() for layer in plan.layers],
        "layers": [1] * len(plan.layers),
        "input_elements": _input_elements(denoiser, tokens),
    }
    averages = {
        name: {"weights": _mean(weights, sizes), "activations": _mean(activations, sizes)}
        for name, sizes in weightings.items()
    }
    return averages | {"floating_point": FLOAT_BITS}


@torch.no_grad()
def _input_elements(denoiser: QuantizedDenoiser, tokens: int) -> list[int]:
    """Counts the elements of every layer's input for one sample, in one forward pass of the unquantized inputs."""
    elements: dict[str, int] = {}
    hooks = [
        denoiser.layer(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: elements.update({name: args[0].numel()})
        )
        for layer in denoiser.plan.layers
    ]
    inputs = zero_inputs(denoiser.inner, tokens=tokens)
    try:
        denoiser(*inputs.arguments(), inputs.sample.new_ones(1, len(denoiser.plan.activation_quantizers)))
    finally:
        for hook in hooks:
            hook.remove()
    return [elements[layer.name] for layer in denoiser.plan.layers]


def _mean(bits: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def training_summary(
    request: CalibrationRequest, calibrated: Sequence[int], outcome: TrainingOutcome
) -> dict[str, Any]:
    """Summarizes a training: mean squared errors and SQNR in dB before and after, by calibrated timestep index.

    ``starting_loss`` and ``final_loss`` are means over the timesteps of the error in units of its starting value.
    """
    start, final = outcome.start, outcome.final
    return {
        "iterations": len(outcome.iterations),
        "loss": request.recipe.training.loss,
        "selections": [[tried.iteration, tried.error] for tried in outcome.selections],
        "starting_loss": 1.0,
        "final_loss": float((final.error / start.error).mean()),
        "timestep_indices": list(calibrated),
        "errors_start": start.error.tolist(),
        "errors_final": final.error.tolist(),
        "sqnr_db_start": start.sqnr(),
        "sqnr_db_final": final.sqnr(),
    }
