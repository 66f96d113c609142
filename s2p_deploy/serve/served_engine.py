"""An engine ready to draw requests: its runner, its pipeline, and what was found out about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, latent_shape_of
from s2p_deploy.pipeline import Schedule, generate, latent_size, timesteps_of
from s2p_deploy.records import Prompt
from s2p_deploy.serve.batching import samples_of
from s2p_deploy.serve.drawing import Drawing
from s2p_deploy.timesteps import rows_of_timesteps

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.pipeline import EnginePipeline
    from s2p_deploy.serve.batch_profile import BatchProfile
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.ticket import Ticket


@dataclass(frozen=True)
class ServedEngine:
    """``pipe`` pauses (:func:`s2p_deploy.serve.components.pausing_pipeline`); ``opened`` is what it was made of.

    ``calls`` is :func:`calls_of_schedule` of steps and scheduler, remembered. ``mixed_rows`` says whether a batch may
    hold samples of several timesteps.
    """

    facts: ServiceFacts
    opened: EnginePipeline
    runner: Runner
    profile: BatchProfile
    pipe: DiffusionPipeline
    calls: Callable[[int, str | None], int]
    mixed_rows: bool
    max_sequence_length: int

    def check(self, request: ImageRequest) -> int:
        """How often the denoiser is called for a request.

        Raises:
            InputError: no such scheduler, a step count or a size that the engine does not take.
        """
        calls = self.calls(request.steps, request.scheduler)
        trained = latent_shape_of(dict(denoiser_of(self.pipe).config))[1:]
        asked = latent_size(self.pipe, self._schedule(request)) or trained
        self.opened.runner.profile.check_latents(*asked)
        if self.opened.runner.profile.height is None and asked != trained:
            raise InputError(f"this engine draws {self.facts.sizes} pixels: leave the size out")
        return calls

    def drawing(self, ticket: Ticket) -> Drawing:
        """A drawing that has not begun."""
        request = ticket.request
        draw = partial(
            generate,
            self.pipe,
            Prompt(ticket.id, request.prompt, request.negative),
            schedule=self._schedule(request),
            guidance_scale=request.guidance_scale,
            seed=request.seed,
        )
        return Drawing(ticket, draw, self.check(request), samples_of(request))

    def _schedule(self, request: ImageRequest) -> Schedule:
        return Schedule(request.steps, request.scheduler, self.max_sequence_length, request.size)


def calls_of_schedule(pipe: DiffusionPipeline, runner: BoundRunner, steps: int, scheduler: str | None) -> int:
    """How often a pipeline calls its denoiser on a schedule.

    Raises:
        InputError: no such scheduler, or a timestep that the engine has no row for.
    """
    timesteps = timesteps_of(pipe, Schedule(steps, scheduler))
    rows_of_timesteps(timesteps, runner.timesteps)
    return len(timesteps)
