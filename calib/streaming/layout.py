"""What a streamed model will be, found from configurations alone: its tensors and their sources, its plan, its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import diffusers
import torch

from s2p_deploy.calib.quantization.fit_transforms import transform_spec
from s2p_deploy.calib.quantization.plan import check_plan, plan_from_recipe
from s2p_deploy.calib.streaming.hot_weights import Piece, split_pieces
from s2p_deploy.errors import InputError
from s2p_deploy.families import apply_transforms, discover_sites, hot_skeleton, load_time_path, text_tokens
from s2p_deploy.records import TimeTable
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from s2p_deploy.calib.job import Job
    from s2p_deploy.families import BasePipeline, HotDenoiser
    from s2p_deploy.records import PrecisionPlan, TimestepTable, TransformSpec

_KEPT = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class Layout:
    """``hot`` is on the meta device, transformed by ``spec``; ``pieces`` say what each tensor of its state is.

    ``plan`` is over its sites. There is no ``time_table`` where the time features depend on the prompt too: then the
    time path is in ``hot``. Its weights are the only ones that are read to make a table.
    """

    hot: HotDenoiser
    pieces: dict[str, Piece]
    spec: TransformSpec
    plan: PrecisionPlan
    time_table: TimeTable | None
    timesteps: TimestepTable
    tokens: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of ``hot``'s state."""
        return {name: tuple(tensor.shape) for name, tensor in self.hot.state_dict().items()}


def layout_of(job: Job) -> Layout:
    """Resolves the recipe of a job over its pipeline.

    Raises:
        InputError: the recipe or the plan does not fit the pipeline, or a part of the pipeline cannot be read.
    """
    base, recipe = job.base, job.recipe
    config = base.denoiser_config()
    conditioned = bool(base.kind.added_width(config))
    pipe = _networkless(base)
    timesteps = timestep_table_of(pipe.scheduler, recipe.sampling.steps, fractional=conditioned)
    table = None if conditioned else _time_table(base, len(timesteps.angle))
    skeleton = hot_skeleton(config, table or timesteps)
    hot = skeleton.hot
    plain = plan_from_recipe(recipe, discover_sites(hot))
    linears = [site.site for site in plain.sites if site.op == "linear" and site.act_point is not None]
    spec = transform_spec(hot, recipe.transforms, linears)
    shapes = {name: tuple(tensor.shape) for name, tensor in hot.state_dict().items()}
    pieces = split_pieces(skeleton.sources, shapes, spec.split)
    apply_transforms(hot, spec)
    sites = discover_sites(hot)
    if job.plan is not None:
        check_plan(job.plan, sites)
    plan = job.plan or plan_from_recipe(recipe, sites)
    tokens = text_tokens(pipe, recipe.sampling.max_sequence_length)
    return Layout(hot, pieces, spec, plan, table, timesteps, tokens)


@torch.no_grad()
def _time_table(base: BasePipeline, rows: int) -> TimeTable:
    path = load_time_path(base)
    return TimeTable(path(torch.arange(rows, dtype=torch.float32)).numpy(), path.slices)


def _networkless(base: BasePipeline) -> DiffusionPipeline:
    """The stock pipeline with its scheduler and its first tokenizer, and nothing else."""
    index = diffusers.DiffusionPipeline.load_config(base.folder)
    left_out = [name for name, part in index.items() if isinstance(part, list) and name not in _KEPT]
    try:
        pipe: DiffusionPipeline = getattr(diffusers, base.pipeline_class).from_pretrained(
            base.folder, **dict.fromkeys(left_out), local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{base.base.source} cannot be loaded by diffusers: {reason}") from error
    return pipe
