"""An engine and the pipeline it was made from -> a service, warm and profiled."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from s2p_deploy.engines.lowerings import MIXED_ROWS
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, latent_shape_of
from s2p_deploy.pipeline import Schedule, open_engine_pipeline
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.schedulers import scheduler_names
from s2p_deploy.serve.batch_profile import profile_batches
from s2p_deploy.serve.components import pausing_pipeline
from s2p_deploy.serve.facts import ServiceFacts
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.served_engine import ServedEngine, calls_of_schedule
from s2p_deploy.serve.service import ImageService, ServiceSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from s2p_deploy.engines import Span
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.serve.observer import Observer

_BATCHES = (1, 2, 4, 8, 16)
_SCHEDULES = 1024  # whose number of calls is remembered
_WARM_UP_SECONDS = 600.0


def open_service(
    engine: Engine, base: BasePipeline, settings: ServiceSettings, observer: Observer, name: str | None = None
) -> ImageService:
    """Loads an engine, times its batches, and draws a first picture. Takes seconds.

    Raises:
        IntegrityError, MissingEnvironmentError, InputError: as :func:`s2p_deploy.pipeline.open_engine_pipeline`.
    """
    served = served_engine(engine, base, settings, name)
    service = ImageService(served, settings, observer)
    warm_up = ImageRequest("", served.facts.steps, served.facts.guidance_scale, seed=0)
    service.submit(warm_up, timeout=_WARM_UP_SECONDS, id="warm-up").picture.result()
    return service


def served_engine(
    engine: Engine, base: BasePipeline, settings: ServiceSettings, name: str | None = None
) -> ServedEngine:
    """Loads an engine and times its batches; raises as :func:`open_service`."""
    sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
    schedules = (Schedule.of(sampling), *settings.schedules)
    opened = open_engine_pipeline(engine, base, schedules=schedules, parts=settings.parts)
    stock, runner = opened.pipe, opened.runner
    guidance = sampling.guidance_scale or base.default_guidance
    batches = settings.batches or (_BATCHES[1:] if guidance > 1 else _BATCHES)
    profile = profile_batches(runner, runner.timesteps.calibrated_rows[0], batches)
    calls = lru_cache(maxsize=_SCHEDULES)(partial(calls_of_schedule, stock, runner))
    facts = ServiceFacts(
        name=name or engine.folder.resolve().name,
        engine=engine.manifest.digest,
        backend=engine.backend,
        hint=engine.hint,
        recipe=str(engine.manifest.recipe["name"]),
        batching=settings.batching,
        batches=tuple((size, 1000 * seconds) for size, seconds in zip(profile.sizes, profile.seconds, strict=True)),
        steps=sampling.steps,
        guidance_scale=guidance,
        size=_trained_size(stock),
        sizes=_sizes(stock, runner.profile.height, runner.profile.width),
        schedulers=tuple(name for name in scheduler_names() if _runs(calls, sampling.steps, name)),
    )
    pipe = pausing_pipeline(stock, engine.denoiser_config, runner)
    mixed_rows = bool(engine.manifest.content.get(MIXED_ROWS, True))
    return ServedEngine(facts, opened, runner, profile, pipe, calls, mixed_rows, sampling.max_sequence_length)


def _trained_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    factor = pipe.vae_scale_factor
    _, height, width = latent_shape_of(dict(denoiser_of(pipe).config))
    return factor * height, factor * width


def _sizes(pipe: DiffusionPipeline, height: Span | None, width: Span | None) -> str:
    if height is None or width is None:
        return "{}x{}".format(*_trained_size(pipe))
    return f"latents of height {height} and width {width}, {pipe.vae_scale_factor} pixels each"


def _runs(calls: Callable[[int, str], int], steps: int, scheduler: str) -> bool:
    try:
        calls(steps, scheduler)
    except InputError:
        return False
    return True
