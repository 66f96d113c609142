"""What every calibration begins with: the floating-point denoiser, its time table, and the plan over its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.calib.quantization.fit_transforms import transform_spec
from s2p_deploy.calib.quantization.plan import check_plan, plan_from_recipe
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    apply_transforms,
    denoiser_of,
    discover_sites,
    hot_denoiser,
    hot_skeleton,
    kind_of,
    load_pipeline,
    network_config,
    time_table_of,
)
from s2p_deploy.numerics import format_by_name
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from s2p_deploy.calib.job import Job
    from s2p_deploy.families import HotDenoiser, Site
    from s2p_deploy.records import PrecisionPlan, TimestepTable, TimeTable, TransformSpec


@dataclass(frozen=True)
class Start:
    """``hot`` is the pipeline's own denoiser, not yet transformed; ``plan`` is over its sites after ``spec``.

    ``timesteps`` are the rows, the whole schedule's calibrated. ``time_table`` is the one to deploy, or None where the
    features depend on the prompt too; ``hot`` has the exact one.
    """

    pipe: DiffusionPipeline
    config: dict[str, Any]
    timesteps: TimestepTable
    time_table: TimeTable | None
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
    network = denoiser_of(pipe)
    config = network_config(network)
    conditioned = bool(kind_of(network).added_width(config))
    timesteps = timestep_table_of(pipe.scheduler, job.recipe.sampling.steps, fractional=conditioned)
    fmt = format_by_name(job.recipe.weights) if job.recipe.transforms.time_layers == "quantized" else None
    if conditioned and fmt is not None:
        raise InputError("transforms.time_layers: quantized needs a constant time table, this model has none")
    rows = len(timesteps.angle)
    table, deployed = (time_table_of(network, rows, quantized=quantized) for quantized in (None, fmt))
    hot = hot_denoiser(network, table or timesteps).eval()
    plain = plan_from_recipe(job.recipe, discover_sites(hot))
    linears = [site.site for site in plain.sites if site.op == "linear" and site.act_point is not None]
    spec = transform_spec(hot, job.recipe.transforms, linears)
    sites = sites_after(spec, config, table or timesteps)
    if job.plan is not None:
        check_plan(job.plan, sites)
    plan = job.plan or plan_from_recipe(job.recipe, sites)
    return Start(pipe, config, timesteps, deployed, hot, spec, sites, plan)


def sites_after(spec: TransformSpec, config: dict[str, Any], time: TimeTable | TimestepTable) -> tuple[Site, ...]:
    """The sites of a denoiser of this configuration after ``spec``, found without its weights."""
    hot = hot_skeleton(config, time).hot
    apply_transforms(hot, spec)
    return discover_sites(hot)
