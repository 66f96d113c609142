"""All measurements of a validation, part by part; every finished part is kept."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy import __version__
from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.texts import encode_prompts
from s2p_deploy.calib.dataset.trajectories import call_rows
from s2p_deploy.engines import backend_by_name, engine_parts, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Schedule, pipeline_with_engine, timesteps_of
from s2p_deploy.progress import silent
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.validation.end_to_end import measure_end_to_end
from s2p_deploy.validation.floors import measure_floors, whole_denoiser
from s2p_deploy.validation.inside import Inside
from s2p_deploy.validation.latents import choose_latents, latents_of_walk, seen_on_walk
from s2p_deploy.validation.measurements import NO_WEIGHTS, Measurements
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.perceptual import measure_perceptual
from s2p_deploy.validation.pictures import compare_drawings
from s2p_deploy.validation.report_pictures import Drawings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import Engine, PromptSet
    from s2p_deploy.timesteps import Timesteps
    from s2p_deploy.validation.chain import Chain
    from s2p_deploy.validation.kept import Kept
    from s2p_deploy.validation.latents import ValidationLatents
    from s2p_deploy.validation.measurements import EndToEnd, Floor, PictureComparison
    from s2p_deploy.validation.pictures import Drawing
    from s2p_deploy.validation.weights import MetricWeights


@dataclass(frozen=True)
class Asked:
    """What is measured besides the recipe's own questions.

    ``prompts`` are drawn; ``schedules`` are drawn too, and reported. ``floor`` is an engine of recipe ``fp`` of the
    same pipeline, ``weights`` are of the metrics that need some.
    """

    prompts: PromptSet
    schedules: tuple[Schedule, ...] = ()
    floor: Engine | None = None
    weights: MetricWeights | None = None

    def request(self, chain: Chain) -> dict[str, Any]:
        """Everything that decides what is measured, as JSON values; gates do not."""
        return {
            "engine": chain.engine.manifest.digest,
            "prompts": self.prompts.digest,
            "latents": chain.recipe.validation.latents,
            "schedules": [[one.scheduler, one.steps] for one in self.schedules],
            "floor engine": self.floor.manifest.digest if self.floor else None,
            "weights": self.weights.digests if self.weights else None,
            "number of threads": torch.get_num_threads(),
            "version": f"{__version__}, torch {torch.__version__}",
        }


def check_floor(floor: Engine, chain: Chain) -> None:
    """Raises InputError unless ``floor`` can be compared with the chain's engine."""
    if not recipe_from_data(floor.manifest.recipe, str(floor.folder)).is_float:
        raise InputError(f"--floor {floor.folder} quantizes something: give an engine of recipe fp")
    if floor.manifest.base.digest != chain.engine.manifest.base.digest:
        raise InputError(f"--floor {floor.folder} is of another pipeline: give one of {chain.base.base.source}")


def measure(
    chain: Chain, asked: Asked, kept: Kept, progress: Progress = silent
) -> tuple[Measurements, Drawings | None]:
    """All measurements, and the drawings where the engine can run here.

    Raises:
        InputError: a schedule is not covered. MissingEnvironmentError: an engine cannot be loaded. IntegrityError: what
            was kept, or a network's weights, are damaged.
    """
    pipe = load_pipeline(chain.base)
    own = Schedule.of(chain.recipe.sampling)
    schedules = (own, *(replace(other, max_sequence_length=own.max_sequence_length) for other in asked.schedules))
    with ExitStack() as stack:
        runner = _runner(chain, stack, [timesteps_of(pipe, schedule) for schedule in schedules])
        run = _Run(chain, asked, kept, progress, pipe)
        reference = run.drawn(pipe, own, "pictures, FP")
        latents = _latents(chain, pipe, reference, asked.prompts)
        inside = run.inside(latents, runner)
        if isinstance(runner, Skipped):
            return Measurements(**inside, end_to_end=runner, pictures=runner), None
        candidate_pipe = pipeline_with_engine(pipe, chain.engine, runner)
        candidate = run.drawn(candidate_pipe, own, "pictures, engine")
        drawings = Drawings(asked.prompts, reference, candidate)
        outside = run.end_to_end(latents, runner) | run.compared(drawings, own)
        others = tuple(run.redrawn(candidate_pipe, schedule) for schedule in schedules[1:])
    return Measurements(**inside, **outside, other_schedules=others), drawings


@dataclass(frozen=True)
class _Run:
    """A validation that is under way; ``pipe`` is in floating point."""

    chain: Chain
    asked: Asked
    kept: Kept
    progress: Progress
    pipe: DiffusionPipeline

    @cached_property
    def fake_quant(self) -> FakeQuantDenoiser:
        """The model that the engine was made from, as PyTorch simulates it."""
        return fake_quant_denoiser(self.chain.calibrated)

    def drawn(self, pipe: DiffusionPipeline, schedule: Schedule, stage: str) -> Drawing:
        """The prompts as ``pipe`` draws them."""
        guidance = self.chain.guidance_scale
        return self.kept.drawing(stage, pipe, self.asked.prompts, schedule, guidance, self.progress)

    def inside(self, latents: ValidationLatents, runner: BoundRunner | Skipped) -> dict[str, Any]:
        """What is measured with the reference's own inputs, and what kind of engine it is."""
        with ExitStack() as stack:
            can_run = not isinstance(runner, Skipped)
            parts = stack.enter_context(engine_parts(self.chain.engine, self.chain.graph)) if can_run else None
            inside = Inside(self.chain, self.fake_quant, latents, runner, parts, self.progress)
            measured = inside.measured(self.kept.found)
        return measured | {"floors": self.kept.found("floors", lambda: self._floors(latents))}

    def end_to_end(self, latents: ValidationLatents, runner: Runner) -> dict[str, Any]:
        """One call of each denoiser."""

        def made() -> EndToEnd:
            whole = whole_denoiser(self.pipe, self.chain.calibrated.timesteps)
            return measure_end_to_end(whole, self.fake_quant, runner, latents)

        return {"end_to_end": self.kept.found("end_to_end", made)}

    def compared(self, drawings: Drawings, schedule: Schedule) -> dict[str, Any]:
        """What the pictures say."""
        weights, pairs = self.asked.weights, drawings.pairs
        found = self.kept.found
        return {
            "pictures": found("pictures", lambda: self._comparison(drawings.reference, drawings.candidate, schedule)),
            "perceptual": NO_WEIGHTS
            if weights is None
            else found("perceptual", lambda: measure_perceptual(pairs, weights, self.progress)),
        }

    def redrawn(self, candidate: DiffusionPipeline, schedule: Schedule) -> PictureComparison:
        """The same on another schedule."""
        stage = f"pictures, {schedule.scheduler} {schedule.steps}"
        pairs = (("FP", self.pipe), ("engine", candidate))
        first, second = (self.drawn(pipe, schedule, f"{stage}, {name}") for name, pipe in pairs)
        return self._comparison(first, second, schedule)

    def _comparison(self, reference: Drawing, candidate: Drawing, schedule: Schedule) -> PictureComparison:
        guidance = self.chain.guidance_scale
        return compare_drawings(reference, candidate, self.asked.prompts, schedule, guidance, CLASSIFIER)

    def _floors(self, latents: ValidationLatents) -> tuple[Floor, ...]:
        timesteps = self.chain.calibrated.timesteps
        if self.asked.floor is None:
            return measure_floors(self.pipe, timesteps, latents, None, self.progress)
        with load_engine(self.asked.floor) as engine:
            return measure_floors(self.pipe, timesteps, latents, engine, self.progress)


def _runner(chain: Chain, stack: ExitStack, schedules: Sequence[Timesteps]) -> BoundRunner | Skipped:
    able = backend_by_name(chain.engine.backend).capabilities()
    if not able.executes:
        return Skipped(able.missing or f"{chain.engine.backend} cannot execute here: it needs a GPU")
    return stack.enter_context(load_engine(chain.engine, chain.graph, schedules=schedules))


def _latents(chain: Chain, pipe: DiffusionPipeline, walk: Drawing, prompts: PromptSet) -> ValidationLatents:
    count = chain.recipe.validation.latents
    if chain.dataset is not None:
        return choose_latents(chain.dataset, count)
    texts = encode_prompts(pipe, prompts, chain.recipe.sampling.max_sequence_length)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(chain.recipe.sampling.steps)
    sampler = Sampler(scheduler, call_rows(scheduler, chain.calibrated.timesteps))
    cond, uncond = texts.distinct[texts.cond], texts.distinct[texts.uncond]
    return latents_of_walk(seen_on_walk(sampler, walk.trajectory), np.asarray(sampler.rows[1:]), cond, uncond, count)
