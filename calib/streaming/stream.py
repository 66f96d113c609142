"""The stage for models of any size: a CalibratedModel from the pipeline's files, without loading the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.job import KIND
from s2p_deploy.calib.model_files import WEIGHT_SCALES, WEIGHTS, Description, write_description
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.streaming.act_scales import default_scales, given_scales
from s2p_deploy.calib.streaming.checkpoint import Checkpoint
from s2p_deploy.calib.streaming.hot_weights import HotWeights
from s2p_deploy.calib.streaming.layout import layout_of
from s2p_deploy.calib.streaming.tensor_file import write_tensor_file
from s2p_deploy.calib.streaming.weight_scales import closed_form_scales
from s2p_deploy.errors import InputError
from s2p_deploy.records import write_artifact
from s2p_deploy.records.disk_room import check_room
from s2p_deploy.records.whole_files import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.job import Job
    from s2p_deploy.calib.streaming.layout import Layout
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PrecisionPlan, ScaleTable, TimestepTable

_SLACK = 16 * 2**20  # bytes; plans, timesteps and headers


def streams(recipe: Recipe, plan: PrecisionPlan | None) -> bool:
    """Whether a calibration looks at nothing but weights; ``plan`` stands in place of the recipe's rules."""
    return not recipe.scales.measured or (recipe.is_float and plan is None)


def stream_model(job: Job) -> None:
    """Writes the CalibratedModel of a job that :func:`streams`, holding one tensor at a time.

    Weights keep the pipeline's values and dtype. What was interrupted leaves nothing behind and starts anew.

    Raises:
        InputError: the recipe asks for what needs activations; the recipe, the plan or the model whose scales are taken
            does not fit the pipeline; its weights are not whole; there is no room on the disk.
    """
    _check_recipe(job)
    checkpoint = Checkpoint(job.base.denoiser_folder)
    layout = layout_of(job)
    weights = HotWeights(checkpoint, layout.pieces, layout.shapes)
    act_scales, timesteps = _act_scales(job, layout)
    check_room(job.out, sum(form.bytes for form in weights.forms.values()) + act_scales.scales.nbytes + _SLACK)

    def fill(folder: Path) -> dict[str, Any]:
        scales = closed_form_scales(weights.read, layout.plan, job.recipe.scales, job.progress)
        _write_weights(folder / WEIGHTS, weights, job)
        write_tensors(folder / WEIGHT_SCALES, scales)
        on_meta = {site: scale.to("meta") for site, scale in scales.items()}
        described = Description(
            denoiser=QuantizedDenoiser(layout.hot, layout.plan, on_meta),
            spec=layout.spec,
            config=layout.hot.config,
            time_table=layout.time_table,
            timesteps=timesteps,
            act_scales=act_scales,
            tokens=layout.tokens,
        )
        return write_description(folder, job, described)

    recipe = job.recipe.model_dump(mode="json")
    write_artifact(job.out, kind=KIND, base=job.base.base, recipe=recipe, fill=fill, replace=job.replace)


def _act_scales(job: Job, layout: Layout) -> tuple[ScaleTable, TimestepTable]:
    if job.initial is None:
        return default_scales(layout.plan, layout.timesteps), layout.timesteps
    return given_scales(layout.plan, layout.timesteps, job.initial)


def _write_weights(path: Path, weights: HotWeights, job: Job) -> None:
    done = 0

    @torch.no_grad()
    def read(name: str) -> Tensor:
        nonlocal done
        tensor = weights.read(name)
        done += 1
        job.progress("write weights", done, len(weights.forms))
        return tensor

    write_tensor_file(path, weights.forms, read)


def _check_recipe(job: Job) -> None:
    recipe, given = job.recipe, job.initial is not None
    if given != (recipe.scales.activations == "given"):
        remedy = "set it to given to take those of --from" if given else "name the model that has them with --from"
        raise InputError(f"recipe {recipe.name} has scales.activations: {recipe.scales.activations}: {remedy}")
    if recipe.scales.measured:
        return  # nothing is quantized, so nothing is looked at
    scales, transforms, mixed = recipe.scales, recipe.transforms, recipe.mixed
    asked = {
        "training": recipe.training.iterations > 0,
        "mixed": mixed.sensitivity != "none" or mixed.low_bit is not None,
        "transforms.smoothing": transforms.smoothing is not None,
        "transforms.low_rank": transforms.low_rank > 0,
        "transforms.time_layers": transforms.time_layers != "exact",
        "scales.calibrator": scales.calibrator != "own",
        "scales.timesteps": scales.timesteps != "each",
        "scales.zero_point": scales.zero_point,
        "scales.progressive": scales.progressive,
        "scales.relaxed": scales.relaxed > 0,
    }
    for key in (key for key, wanted in asked.items() if wanted):
        raise InputError(
            f"recipe {recipe.name} asks for {key}, which needs stored latents or the whole denoiser: leave it out,"
            " or set scales.activations to mse"
        )
