"""What every calibration begins with: the floating-point denoiser, its time table, and the plan over its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.quantization.fit_transforms import transform_spec
from s2p_deploy.calib.quantization.plan import check_plan, plan_from_recipe
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    apply_transforms,
    discover_sites,
    hot_denoiser_from_unet,
    load_pipeline,
    new_hot_denoiser,
    time_table_from_unet,
)
from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from s2p_deploy.calib.job import Job
    from s2p_deploy.families import HotDenoiser, Site
    from s2p_deploy.records import PrecisionPlan, TimeTable, TransformSpec


@dataclass(frozen=True)
class Start:
    """``hot`` is the pipeline's own denoiser, not yet transformed; ``plan`` is over its sites after ``spec``.

    ``time_table`` is the one to deploy; ``hot`` has the exact one.
    """

    pipe: StableDiffusionPipeline
    config: dict[str, Any]
    time_table: TimeTable
    hot: HotDenoiser
    spec: TransformSpec
    sites: tuple[Site, ...]
    plan: PrecisionPlan


def start_of(job: Job) -> Start:
    """Loads the pipeline of a job and resolves its recipe over the denoiser.

    Raises:
        InputError: the recipe or the plan does not fit the pipeline, or its scheduler is of another kind.
    """
    pipe = load_pipeline(job.base)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        name = type(pipe.scheduler).__name__
        raise InputError(f"{name} has no alphas_cumprod: calibrate needs a variance-preserving scheduler")
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    rows = pipe.scheduler.config.num_train_timesteps
    fmt = format_by_name(job.recipe.weights) if job.recipe.transforms.time_layers == "quantized" else None
    table, deployed = (time_table_from_unet(pipe.unet, rows, quantized=quantized) for quantized in (None, fmt))
    hot = hot_denoiser_from_unet(pipe.unet, table).eval()
    plain = plan_from_recipe(job.recipe, discover_sites(hot))
    linears = [site.site for site in plain.sites if site.op == "linear" and site.act_point is not None]
    spec = transform_spec(hot, job.recipe.transforms, linears)
    sites = sites_after(spec, config, table)
    if job.plan is not None:
        check_plan(job.plan, sites)
    return Start(pipe, config, deployed, hot, spec, sites, job.plan or plan_from_recipe(job.recipe, sites))


def sites_after(spec: TransformSpec, config: dict[str, Any], table: TimeTable) -> tuple[Site, ...]:
    """The sites of a denoiser of this configuration after ``spec``, found without its weights."""
    with torch.device("meta"):
        hot = new_hot_denoiser(config, table).to(device="meta")
        apply_transforms(hot, spec)
    return discover_sites(hot)
