"""Stage: recipes calibrated alike on one pipeline, and how close each one's pictures come to floating point."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.calib import calibrate, dataset_name, fake_quant_denoiser
from s2p_deploy.context import Context
from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, load_pipeline, with_denoiser
from s2p_deploy.metrics import mean_of, median_of, psnr_db, quantile_of, sqnr_db
from s2p_deploy.numerics import format_by_name
from s2p_deploy.pipeline import Schedule, engine_denoiser
from s2p_deploy.records import Number, check_vacant
from s2p_deploy.records.files import check_file, write_text
from s2p_deploy.validation.end_to_end import outputs_on, whole_denoiser
from s2p_deploy.validation.pictures import generate_pictures, pictures_to_change
from s2p_deploy.validation.placement import onloaded
from s2p_deploy.validation.reference import latents_of_pictures

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.families.pictures import PictureInputs
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import CalibratedModel, PromptSet
    from s2p_deploy.validation.pictures import GeneratedPictures

COMPARISON = "comparison.json"
_LATENTS = 64  # of the floating-point trajectories, for SQNR
_FLOAT_BYTES = 2  # what stays in floating point is deployed in half precision
_SCALE_BYTES = 4


@dataclass(frozen=True)
class ComparedRecipe:
    """A calibrated recipe against the floating-point pipeline.

    PSNR in dB over the held-out pictures: median, 10th percentile and ``worst``; ``sqnr`` in dB of single calls on
    latents of the floating-point trajectories. Average bits of a weight and of an element that a layer reads; ``size``
    in bytes of the deployed denoiser, counted from its formats.
    """

    name: str
    psnr: Number
    psnr_tenth: Number
    worst_psnr: float
    sqnr: Number
    weight_bits: float
    activation_bits: float
    size: int


def compare(  # noqa: PLR0913 - what is compared, on what, to where, and options by keyword
    base: BasePipeline,
    recipes: Sequence[Recipe],
    prompts: PromptSet,
    held_out: PromptSet,
    out: Path,
    *,
    replace: bool = False,
    context: Context = Context(),
) -> tuple[ComparedRecipe, ...]:
    """Calibrates recipes on the same prompts and compares the pictures that they generate with the pipeline's own.

    The fake-quantized models generate them, from the same noise as the pipeline. Finished calibrations in
    ``out/<recipe>/calib`` are used again. The table is written to ``out/comparison.json``.

    Args:
        base: the floating-point pipeline.
        recipes: with equal ``sampling`` and different names.
        prompts: what the recipes are calibrated on.
        held_out: what is drawn; none of ``prompts``.
        out: folder of the calibrations and the table.
        replace: whether to calibrate anew what is there.
        context: device, threads and progress.

    Raises:
        InputError: names repeat, sampling differs, a held-out prompt is also a training prompt, or a recipe does not
            fit the pipeline.
    """
    check_comparable(recipes, prompts, held_out)
    check_file(out / COMPARISON)
    for recipe in recipes:  # a finished one is used again, or replaced
        check_vacant(out / recipe.name / "calib", "CalibratedModel", replace=True, inputs={"pipeline": base.folder})
    context.set_threads()
    sampling, device, progress = recipes[0].sampling, context.torch_device, context.progress
    schedule, guidance = Schedule.of(sampling), sampling.guidance(base.default_guidance)
    pipe = load_pipeline(base)

    def drawn(stage: str, inputs: PictureInputs | None) -> GeneratedPictures:
        return generate_pictures(pipe, held_out, schedule, guidance, inputs=inputs, stage=stage, progress=progress)

    with context.arithmetic(), onloaded(pipe, device):
        changed = pictures_to_change(pipe, held_out, sampling, lambda whole: drawn("pictures to change", whole))
        reference = drawn("pictures, FP", changed)
    results = []
    for recipe in recipes:
        calibrated = calibrate(
            base,
            recipe,
            prompts,
            out / recipe.name / "calib",
            dataset=out / "datasets" / dataset_name(recipe),
            replace=replace,
            context=context,
        )
        with context.arithmetic():
            results.append(_compared(pipe, calibrated, recipe, held_out, reference, context))
    write_text(out / COMPARISON, json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return tuple(results)


def check_comparable(recipes: Sequence[Recipe], prompts: PromptSet, held_out: PromptSet) -> None:
    """Raises InputError where names repeat, sampling differs, or a held-out prompt is a training prompt."""
    names = [recipe.name for recipe in recipes]
    for recipe in recipes:
        if names.count(recipe.name) > 1:
            raise InputError(f"two recipes are named {recipe.name!r}: give one of them another name")
        if recipe.sampling != recipes[0].sampling:
            raise InputError(
                f"recipes {names[0]!r} and {recipe.name!r} sample differently: set sampling.steps and"
                " sampling.guidance_scale for all of them"
            )
    trained = {prompt.text for prompt in prompts.prompts}
    for prompt in held_out.prompts:
        if prompt.text in trained:
            raise InputError(f"held-out prompt {prompt.text!r} is also a training prompt: give other prompts")


def quantized_bytes(calibrated: CalibratedModel) -> int:
    """Counts the bytes of a deployed denoiser: packed engines of every format do not exist.

    Weights in their format's bits, the rest and the time table, if any, in half precision, scales in float32.
    Activation scales count on the calibrated timesteps only: the others follow from them.
    """
    formats = {f"network.{layer.name}.weight": format_by_name(layer.weights) for layer in calibrated.plan.layers}
    total = 0.0
    for name, value in calibrated.weights().items():
        fmt = formats.get(name)
        total += value.size * (_FLOAT_BYTES if fmt is None else fmt.bits / 8)
    scales = sum(scale.size for scale in calibrated.weight_scales().values())
    scales += len(calibrated.scales.calibrated) * len(calibrated.scales.quantizers)
    table = 0 if calibrated.added_width else calibrated.time_table().projections.size
    return math.ceil(total) + scales * _SCALE_BYTES + table * _FLOAT_BYTES


def float_bytes(denoiser: torch.nn.Module) -> int:
    """Counts the bytes of all parameters in half precision."""
    return sum(parameter.numel() for parameter in denoiser.parameters()) * _FLOAT_BYTES


def _compared(
    pipe: DiffusionPipeline,
    calibrated: CalibratedModel,
    recipe: Recipe,
    held_out: PromptSet,
    reference: GeneratedPictures,
    context: Context,
) -> ComparedRecipe:
    device, progress = context.torch_device, context.progress
    fake_quant = fake_quant_denoiser(calibrated)
    denoiser = engine_denoiser(TorchRunner(fake_quant), denoiser_of(pipe).config, calibrated.timesteps)
    schedule, other = Schedule.of(recipe.sampling), with_denoiser(pipe, denoiser)
    guidance = calibrated.manifest.recipe["sampling"]["guidance_scale"]
    stage = f"pictures, {recipe.name}"
    with onloaded(fake_quant, device), onloaded(other, device):
        candidate = generate_pictures(
            other, held_out, schedule, guidance, inputs=reference.inputs, stage=stage, progress=progress
        )
    psnr = psnr_db(reference.pictures, candidate.pictures)
    timesteps = calibrated.timesteps
    latents = latents_of_pictures(pipe, held_out, reference, recipe.sampling, timesteps, _LATENTS, device=device)
    references = (whole_denoiser(pipe, timesteps), fake_quant)
    floating, quantized = (outputs_on(device, network, latents) for network in references)
    bits = calibrated.manifest.content["average_bits"]
    return ComparedRecipe(
        name=recipe.name,
        psnr=median_of(psnr),
        psnr_tenth=quantile_of(psnr, 0.1),
        worst_psnr=float(np.min(psnr)),
        sqnr=mean_of(sqnr_db(floating, quantized)),
        weight_bits=bits["parameters"]["weights"],
        activation_bits=bits["input_elements"]["activations"],
        size=quantized_bytes(calibrated),
    )
