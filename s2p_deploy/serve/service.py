"""A service: an engine that draws requests from any thread, in one thread of its own."""

from __future__ import annotations

import math
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Self

import torch

from s2p_deploy.context import Context
from s2p_deploy.engines.machine import free_gpu_memory
from s2p_deploy.errors import InputError, MissingEnvironmentError, S2PError
from s2p_deploy.families import denoiser_of, latent_shape_of
from s2p_deploy.families.model_family import guidance_width, has_branches
from s2p_deploy.families.pipelines import check_draws_from_text
from s2p_deploy.pipeline import (
    Control,
    ImagePrompt,
    IpAdapter,
    Schedule,
    StartPicture,
    controlnet_memory,
    generate,
    latent_size,
    open_controlnet,
    open_pipeline,
    timesteps_from_start,
    timesteps_of,
)
from s2p_deploy.pipeline.control import check_controls
from s2p_deploy.pipeline.ip_adapter import check_image_prompts
from s2p_deploy.pipeline.lora_files import LoraReader
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt
from s2p_deploy.records.files import available_memory
from s2p_deploy.schedulers import scheduler_names
from s2p_deploy.serve.batching import Batching, Capacity, policy_named, profile_batches
from s2p_deploy.serve.controlnets import ServedControlNet
from s2p_deploy.serve.generation_loop import GenerationLoop, Observer, RequestQueue
from s2p_deploy.serve.generation_task import GenerationTask, OffloadedModule, pausing_pipeline, with_offloaded
from s2p_deploy.serve.loras import ServedLoras, changed_text_encoders
from s2p_deploy.serve.request import ClosingError, ImageRequest, OverloadedError, RequestFuture

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from diffusers import DiffusionPipeline

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline import EngineDenoiser, EnginePipeline
    from s2p_deploy.records import ComponentEngines, Engine, Execution
    from s2p_deploy.serve.batching import BatchProfile

_BATCHES = (1, 2, 4, 8, 16)
_SCHEDULES = 1024  # whose number of calls is remembered
_WARM_UP_SECONDS = 600.0
_LONGEST_RETRY_AFTER = 600  # seconds
_MIB = 2**20


@dataclass(frozen=True)
class ServiceSettings:
    """How to serve.

    ``max_waiting`` requests are kept beside those that are active, of which there are ``max_active`` at the most (None:
    as many as the largest batch has samples, and two). ``batches`` are the sizes to profile (None: powers of two to 16,
    from what one picture needs on). ``schedules`` are those to bind where an engine takes fractional timesteps: without
    them only its own. ``component_engines`` run text encoders and autoencoder on a backend (None: PyTorch).
    ``controlnets`` are folders of ControlNets by the names that requests give, ``ip_adapters`` files of IP-Adapters.
    ``loras`` are files too; these and those that are registered later take ``lora_bytes`` of memory at the most.
    """

    batching: Batching = "step"
    max_waiting: int = 64
    max_active: int | None = None
    batches: tuple[int, ...] | None = None
    schedules: tuple[Schedule, ...] = ()
    component_engines: ComponentEngines | None = None
    controlnets: tuple[tuple[str, Path], ...] = ()
    ip_adapters: tuple[tuple[str, Path], ...] = ()
    loras: tuple[tuple[str, Path], ...] = ()
    lora_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or (self.max_active or 1) < 1:
            raise InputError("a service needs room: max_waiting from 0, max_active from 1")
        policy_named(self.batching)  # raises


@dataclass(frozen=True)
class ModelInfo:
    """Describes a model that is served.

    ``engine`` is its digest. ``batches`` are the engine's batch sizes with the milliseconds of each, the last of them
    the largest that is formed; ``size`` is height and width in pixels of what it draws by default, and ``sizes`` what
    may be requested, in words; ``schedulers`` those that run with ``steps`` steps. ``long_prompts`` says whether texts
    of several chunks may be requested, ``controlnets`` and ``ip_adapters`` which there are, ``lora_rank`` how many
    ranks LoRAs may have together.
    """

    name: str
    engine: str
    backend: str
    execution: Execution
    recipe: str
    batching: str
    batches: tuple[tuple[int, float], ...]
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    sizes: str
    schedulers: tuple[str, ...]
    long_prompts: bool = False
    controlnets: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    lora_rank: int = 0


@dataclass(frozen=True)
class ServedEngine:
    """An engine that is loaded and profiled.

    ``pipe`` pauses (:func:`s2p_deploy.serve.generation_task.pausing_pipeline`); ``stock`` is what it was made of.
    ``runner`` is the engine. ``calls`` is how often the denoiser is called for steps and a scheduler.
    ``mixed_timesteps`` says whether a batch may hold samples of several timesteps. ``controlnets`` and ``ip_adapters``
    are loaded, by name; ``loras`` are those that requests may name.
    """

    info: ModelInfo
    stock: EnginePipeline
    runner: Runner
    profile: BatchProfile
    pipe: DiffusionPipeline
    calls: Callable[[int, str | None], int]
    mixed_timesteps: bool
    max_sequence_length: int
    controlnets: Mapping[str, ServedControlNet] = field(default_factory=dict)
    ip_adapters: Mapping[str, IpAdapter] = field(default_factory=dict)
    loras: ServedLoras = field(default_factory=ServedLoras)

    @property
    def embeds_guidance(self) -> bool:
        """Returns whether the network reads the guidance scale, so that it predicts with the prompt alone."""
        return guidance_width(dict(denoiser_of(self.pipe).config)) > 0

    def check(self, request: ImageRequest) -> int:
        """Counts the calls of the denoiser that a request takes.

        Raises:
            InputError: no such scheduler, ControlNet or IP-Adapter; a step count, a size or long prompts, which the
                engine does not take.
        """
        if request.start is None:
            check_draws_from_text(type(self.stock.pipe).__name__)
            calls = self.calls(request.steps, request.scheduler)
        else:
            timesteps = timesteps_from_start(self.stock.pipe, self._schedule(request), request.start)
            self.stock.runner.check_timesteps(timesteps)
            calls = len(timesteps)
        trained = latent_shape_of(dict(denoiser_of(self.pipe).config))[1:]
        size = latent_size(self.pipe, self._schedule(request)) or trained
        profile = self.stock.runner.profile
        if request.long_prompts and profile.tokens is None:
            raise InputError("this engine takes texts of one chunk: leave long_prompts out, or export with --chunks")
        profile.check_latents(*size)
        if profile.height is None and size != trained:
            raise InputError(f"this engine draws {self.info.sizes} pixels: leave the size out")
        check_controls(self.pipe, self._controls(request), request.size or self.info.size)
        check_image_prompts(denoiser_of(self.pipe), len(self._images(request)))
        return calls

    def close(self) -> None:
        """Frees the memory of the engine, and of text encoders, autoencoder and ControlNets that are engines too."""
        for controlnet in self.controlnets.values():
            controlnet.close()
        self.stock.close()

    def task(self, future: RequestFuture) -> GenerationTask:
        """Makes the task of a checked request; it has not begun."""
        request = future.request
        draw = partial(
            generate,
            self._pipe_for(future),
            Prompt(future.id, request.prompt, request.negative),
            schedule=self._schedule(request),
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            long_prompts=request.long_prompts,
            start=request.start,
            controls=self._controls(request),
            images=self._images(request),
        )
        return GenerationTask(future, draw)

    def _images(self, request: ImageRequest) -> list[ImagePrompt]:
        """Raises InputError where a request names an IP-Adapter that there is not."""
        _check_known("IP-Adapter", "--ip-adapter", [one.name for one in request.images], self.ip_adapters)
        return [ImagePrompt(self.ip_adapters[one.name], one.picture, one.scale) for one in request.images]

    def _controls(self, request: ImageRequest) -> list[Control]:
        """Raises InputError where a request names a ControlNet that there is not."""
        _check_known("ControlNet", "--controlnet", [one.name for one in request.controls], self.controlnets)
        return [
            Control(self.controlnets[one.name].for_request(), one.picture, one.scale, one.start, one.end)
            for one in request.controls
        ]

    def _pipe_for(self, future: RequestFuture) -> DiffusionPipeline:
        """Returns the pipeline, with text encoders that have the request's LoRAs where these change some."""
        changed = changed_text_encoders(self.stock.pipe, future.loras)
        return with_offloaded(self.pipe, changed) if changed else self.pipe

    def _schedule(self, request: ImageRequest) -> Schedule:
        return Schedule(request.steps, request.scheduler, self.max_sequence_length, request.size)


def _check_known(what: str, option: str, names: Sequence[str], there: Collection[str]) -> None:
    unknown = [name for name in names if name not in there]
    if unknown:
        known = f"use {', '.join(there)}" if there else f"serve it with {option}"
        raise InputError(f"there is no {what} {unknown[0]!r}: {known}")


class ImageService:
    """Draws requests with one engine. A context manager; closed, it holds no memory."""

    def __init__(self, engine: ServedEngine, settings: ServiceSettings, observer: Observer) -> None:
        self.info: ModelInfo = engine.info
        self.loras: ServedLoras = engine.loras
        self._engine, self._max_waiting = engine, settings.max_waiting
        self._queue = RequestQueue()
        self.loras.watch(self._queue.wake)  # whose loop takes out of the engine what is not needed any more
        # a new thread would not start with as many of PyTorch's own as this one has, and bits depend on their number
        threads = torch.get_num_threads()
        self._background = ThreadPoolExecutor(1, f"{self.info.name} background", torch.set_num_threads, (threads,))
        capacity = Capacity(engine.profile.largest, settings.max_active or engine.profile.largest + 2)
        policy = policy_named(settings.batching)
        self._loop = GenerationLoop(engine, policy, capacity, self._queue, self._background, observer)
        self._thread = threading.Thread(target=self._loop.run, name=f"{self.info.name} generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._queue.waiting

    @property
    def active(self) -> int:
        """Requests that have begun and are not done."""
        return self._queue.active

    @property
    def alive(self) -> bool:
        """Returns whether the generation loop runs, and the engine did not fail in all of its last calls."""
        return self._thread.is_alive() and self._loop.healthy

    def submit(self, request: ImageRequest, *, timeout: float, id: str | None = None) -> RequestFuture:  # noqa: A002
        """Accepts a request, which must be done within ``timeout`` seconds.

        Raises:
            InputError: no such scheduler or LoRA, a step count, a size or ranks that the engine does not take.
            OverloadedError: too many requests wait.
            ClosingError: the service is closing. StoppedError: it ended by a defect.
        """
        request = replace(request, embedded=self._engine.embeds_guidance)
        calls, now = self._engine.check(request), time.monotonic()
        loras = self.loras.use(request.lora)
        future = RequestFuture(id or uuid.uuid4().hex, request, calls, now, now + timeout, loras)
        try:
            self._queue.put(future, self._overload)
        except S2PError:
            self.loras.unuse(loras)
            raise
        future.add_done_callback(lambda _: self.loras.unuse(loras))
        return future

    def drain(self, seconds: float) -> bool:
        """Accepts nothing more and finishes what is there, within ``seconds``; returns whether all of it was done."""
        self._queue.refuse(ClosingError("the service is closing: ask another one"))
        return self._queue.wait_until_empty(seconds)

    def close(self) -> None:
        """Stops; what is not done ends with ClosingError. May be called twice."""
        self._queue.refuse(ClosingError("the service is closed"))
        self._queue.stop()
        self._thread.join()
        self._background.shutdown()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _overload(self, waiting: tuple[RequestFuture, ...]) -> OverloadedError | None:
        if len(waiting) < self._max_waiting:
            return None
        samples = sum(future.request.steps * future.request.samples for future in waiting)
        seconds = math.ceil(samples * self._engine.profile.seconds_per_sample)
        return OverloadedError(len(waiting), min(max(1, seconds), _LONGEST_RETRY_AFTER))


def open_service(
    engine: Engine,
    base: BasePipeline,
    settings: ServiceSettings,
    observer: Observer,
    name: str | None = None,
    context: Context = Context(),
) -> ImageService:
    """Loads an engine, times its batches, and draws a first picture. Takes seconds.

    ``context`` is the device and the threads of PyTorch's networks.

    Raises:
        IntegrityError, MissingEnvironmentError, InputError: as :func:`s2p_deploy.pipeline.open_pipeline`.
    """
    context.set_threads()
    with ExitStack() as opened:  # one that draws no picture is closed
        service = opened.enter_context(
            ImageService(load_served_engine(engine, base, settings, name, context), settings, observer)
        )
        start = None
        if base.task != "text-to-image":
            start = StartPicture.blank(*service.info.size, base.default_strength, masked=base.task == "inpainting")
        warm_up = ImageRequest("", service.info.steps, service.info.guidance_scale, seed=0, start=start)
        service.submit(warm_up, timeout=_WARM_UP_SECONDS, id="warm-up").result()
        opened.pop_all()
    return service


def load_served_engine(
    engine: Engine,
    base: BasePipeline,
    settings: ServiceSettings,
    name: str | None = None,
    context: Context = Context(),
) -> ServedEngine:
    """Loads an engine and times its batches; raises as :func:`open_service`, and leaves nothing open then."""
    sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
    schedules, components = (Schedule.of(sampling), *settings.schedules), settings.component_engines
    with ExitStack() as opened:
        stock = opened.enter_context(
            open_pipeline(engine, base, schedules=schedules, components=components, context=context)
        )
        controlnets = _controlnets(stock.pipe, settings.controlnets, context.device, opened)
        served = _profiled_engine(engine, base, settings, stock, controlnets, name)
        opened.pop_all()
    return served


def _profiled_engine(
    engine: Engine,
    base: BasePipeline,
    settings: ServiceSettings,
    stock: EnginePipeline,
    controlnets: Mapping[str, ServedControlNet],
    name: str | None,
) -> ServedEngine:
    """Loads the other adapters of an opened engine and times its batches; raises as :func:`open_service`."""
    sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
    runner, factor = stock.runner, stock.pipe.vae_scale_factor
    guidance = sampling.guidance(base.default_guidance)
    guided = has_branches(engine.denoiser_config, guidance)
    batches = settings.batches or (_BATCHES[1:] if guided else _BATCHES)
    loras = ServedLoras(runner.loras, cache(partial(LoraReader, stock.pipe, base)), settings.lora_bytes)
    for lora, file in settings.loras:
        loras.add(lora, file)
    # the noisiest timestep: of joined engines, that of the one which runs most of the schedule
    profile = profile_batches(runner, runner.timesteps.calibrated_indices[-1], batches)
    calls = lru_cache(maxsize=_SCHEDULES)(partial(_calls_of_schedule, stock.pipe, runner))
    _, *latents = latent_shape_of(dict(denoiser_of(stock.pipe).config))
    height, width = (factor * size for size in latents)
    dynamic = runner.profile.height is not None and runner.profile.width is not None
    info = ModelInfo(
        name=name or engine.folder.resolve().name,
        engine=engine.manifest.digest,
        backend=engine.backend,
        execution=engine.execution,
        recipe=str(engine.manifest.recipe["name"]),
        batching=settings.batching,
        batches=tuple((size, 1000 * seconds) for size, seconds in zip(profile.sizes, profile.seconds, strict=True)),
        steps=sampling.steps,
        guidance_scale=guidance,
        size=(height, width),
        sizes=f"latents of height {runner.profile.height} and width {runner.profile.width}, {factor} pixels each"
        if dynamic
        else f"{height}x{width}",
        schedulers=tuple(name for name in scheduler_names() if _runs(calls, sampling.steps, name)),
        long_prompts=runner.profile.tokens is not None,
        controlnets=tuple(name for name, _ in settings.controlnets),
        ip_adapters=tuple(name for name, _ in settings.ip_adapters),
        lora_rank=loras.rank,
    )
    pipe = pausing_pipeline(stock.pipe, engine.denoiser_config, runner)
    return ServedEngine(
        info,
        stock,
        runner,
        profile,
        pipe,
        calls,
        engine.mixed_timesteps,
        sampling.max_sequence_length,
        controlnets=controlnets,
        ip_adapters={name: _pausing(IpAdapter.load(file, stock.pipe)) for name, file in settings.ip_adapters},
        loras=loras,
    )


def _pausing(adapter: IpAdapter) -> IpAdapter:
    """Encodes pictures in the background."""
    return replace(adapter, encoder=OffloadedModule(adapter.encoder))


def _controlnets(
    pipe: DiffusionPipeline, folders: tuple[tuple[str, Path], ...], device: str, opened: ExitStack
) -> dict[str, ServedControlNet]:
    """Loads ControlNets by name; ``device`` is a context's, and ``opened`` closes those that are engines.

    Raises:
        InputError: one does not fit the pipeline, or its engine takes none.
        MissingEnvironmentError: their weights are more than the memory that is free.
    """
    denoiser = denoiser_of(pipe)
    if folders and not denoiser.takes_residuals:
        raise InputError("this engine takes no ControlNet: export with --controlnet, and build again")
    _check_memory(folders, denoiser, device)
    config, factor = dict(denoiser.config), pipe.vae_scale_factor
    networks = {}
    for name, folder in folders:
        network = open_controlnet(folder, config, factor, denoiser.dtype, device)
        networks[name] = ServedControlNet.of(network.to(pipe.device))
        opened.callback(networks[name].close)
    return networks


def _check_memory(folders: tuple[tuple[str, Path], ...], denoiser: EngineDenoiser, device: str) -> None:
    """Raises MissingEnvironmentError where ControlNets have more weights than there is memory for, as far as known."""
    sizes = {name: controlnet_memory(folder, denoiser.dtype, denoiser.device) for name, folder in folders}
    for on_gpu, free in ((False, available_memory), (True, partial(free_gpu_memory, device))):
        taken = {name: size for name, (there, size) in sizes.items() if there is on_gpu}
        left = free() if taken else None
        if left is not None and sum(taken.values()) > left:
            each = ", ".join(f"{name} {size / _MIB:.1f}" for name, size in taken.items())
            raise MissingEnvironmentError(
                f"the ControlNets take {sum(taken.values()) / _MIB:.1f} MiB of memory ({each}), {left / _MIB:.1f} are"
                " free: serve fewer, or quantize them (calibrate --controlnet)"
            )


def _calls_of_schedule(pipe: DiffusionPipeline, runner: BoundRunner, steps: int, scheduler: str | None) -> int:
    """Counts the calls of the denoiser on a schedule.

    Raises:
        InputError: no such scheduler, or a timestep that the engine has no scales for.
    """
    timesteps = timesteps_of(pipe, Schedule(steps, scheduler))
    runner.check_timesteps(timesteps)
    return len(timesteps)


def _runs(calls: Callable[[int, str], int], steps: int, scheduler: str) -> bool:
    try:
        calls(steps, scheduler)
    except InputError:
        return False
    return True
