"""The sampling loop inside Triton's Python backend: the stock diffusers pipeline, its denoiser another model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines import BoundRunner
from s2p_deploy.engines.conditioning import text_projections
from s2p_deploy.engines.load import bound_features, bound_timesteps
from s2p_deploy.engines.runner import BOUND, OUTPUT, ClosingRunner
from s2p_deploy.errors import InputError, IntegrityError, S2PError
from s2p_deploy.families import load_pipeline, resolve_base, with_denoiser
from s2p_deploy.pipeline import Schedule, engine_denoiser, generate, picture_size
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt
from s2p_deploy.serve.request import CancelledRequestError, ImageRequest
from s2p_deploy.serve.triton.backend import (
    PIPELINE,
    TIMESTEP_INDEX,
    ModelSettings,
    array_of,
    error_response,
    takes_table,
    tensor_of,
)
from s2p_deploy.timesteps import scales_for_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.timesteps import Timesteps

    Bind = Callable[[Runner], Runner]

_MOST_CHARACTERS, _MOST_GUIDANCE = 2000, 50.0


class LoopModel:
    """A pipeline without a denoiser of its own. ``backend`` is Triton's module, ``args`` what ``initialize`` gets.

    Raises:
        IntegrityError: the engine or the pipeline is not what was exported. InputError: there is no such pipeline.
    """

    def __init__(self, backend: ModuleType, args: Mapping[str, str]) -> None:
        settings = ModelSettings.of(args)
        engine = settings.open_engine()
        base = _base_of(engine, settings)
        native = settings.value("native")
        self._backend, self._engine, self._device = backend, engine, settings.device
        self._denoiser = settings.parameters["denoiser"]
        self._most_steps = int(settings.parameters["most_steps"])
        self._batched = not (native and takes_table(engine))
        self._bind = native_binding(engine, settings.schedules) if native else _unchanged
        self._timesteps = bound_timesteps(engine, settings.schedules)
        self._profile = engine.profile
        self._sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
        self._guidance = self._sampling.guidance(base.default_guidance)
        self._pipe = with_denoiser(load_pipeline(base), self._component(lambda: False))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns one response for each request, one after the other."""
        return [self._response(request) for request in requests]

    def _response(self, given: Any) -> Any:  # noqa: ANN401 - Triton's own type
        try:
            picture = self._draw(self._request(given), given.is_cancelled)
        except Exception as error:  # the border to the server: what leaves here would end the model
            return error_response(self._backend, error)
        return self._backend.InferenceResponse([tensor_of(self._backend, "image", picture)])

    def _draw(self, request: ImageRequest, is_cancelled: Callable[[], bool]) -> NDArray[np.uint8]:
        """Draws a picture uint8 [H, W, 3]."""
        pipe = with_denoiser(self._pipe, self._component(is_cancelled)).to(self._device)
        schedule = Schedule(request.steps, None, self._sampling.max_sequence_length, request.size)
        prompt = Prompt("request", request.prompt, request.negative)
        picture = generate(pipe, prompt, schedule=schedule, guidance_scale=request.guidance_scale, seed=request.seed)
        return np.asarray(picture.convert("RGB"))

    def _component(self, is_cancelled: Callable[[], bool]) -> Any:  # noqa: ANN401 - of diffusers, which is not typed
        runner = BlsRunner(self._backend, self._denoiser, is_cancelled, batched=self._batched)
        return engine_denoiser(self._bind(runner), self._engine.denoiser_config, self._timesteps, self._profile)

    def _request(self, given: Any) -> ImageRequest:  # noqa: ANN401 - Triton's own type
        def number(name: str, default: float) -> Any:  # noqa: ANN401 - int or float, as the model's input says
            tensor = self._backend.get_input_tensor_by_name(given, name)
            return default if tensor is None else array_of(tensor).reshape(-1)[0].item()

        def text(name: str) -> str:
            tensor = self._backend.get_input_tensor_by_name(given, name)
            return "" if tensor is None else _text_of(name, tensor.as_numpy().reshape(-1)[0])

        height, width = (number(name, 0) or None for name in ("height", "width"))
        request = ImageRequest(
            prompt=text("prompt"),
            steps=number("steps", self._sampling.steps),
            guidance_scale=number("guidance_scale", self._guidance),
            seed=number("seed", 0),
            negative=text("negative_prompt"),
            size=picture_size(self._pipe, height, width),
        )
        check_request(request, self._most_steps)
        return request

    def close(self) -> None:
        """Does nothing: the engine belongs to the other model."""


class DenoiserError(S2PError):
    """The denoiser's model returned an error."""


class BlsRunner(ClosingRunner):
    """A runner whose engine is another model of the same server, called from inside the Python backend (BLS).

    ``backend`` is Triton's own module, which only exists inside its Python backend. With ``batched``, the model's
    batch axis is Triton's. ``is_cancelled`` is checked before every call.
    """

    def __init__(
        self, backend: ModuleType, denoiser: str, is_cancelled: Callable[[], bool], *, batched: bool = True
    ) -> None:
        self._backend, self._denoiser = backend, denoiser
        self._is_cancelled, self._batched = is_cancelled, batched

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns ``noise_pred`` [batch, C, H, W] of the other model, in memory of its own.

        Raises:
            CancelledRequestError: the client has left. DenoiserError: the other model returned an error.
        """
        if self._is_cancelled():
            raise CancelledRequestError("the client has left")
        given = dict(inputs)
        if self._batched:
            given[TIMESTEP_INDEX] = given[TIMESTEP_INDEX][:, None]
        request = self._backend.InferenceRequest(
            model_name=self._denoiser,
            requested_output_names=[OUTPUT],
            inputs=[tensor_of(self._backend, name, value) for name, value in given.items()],
        )
        response = request.exec()
        if response.has_error():
            raise DenoiserError(f"{self._denoiser}: {response.error().message()}")
        return {OUTPUT: array_of(self._backend.get_output_tensor_by_name(response, OUTPUT))}

    def close(self) -> None:
        """Does nothing: the engine belongs to the other model."""


class TableRunner(ClosingRunner):
    """A runner that adds the scale table to every call: Triton keeps no state between the calls of a model.

    Where the engine leaves the number of timesteps open (``fixed`` is False), only the scales of the call's timesteps
    go along, and ``timestep_index`` counts them: 4 bytes for each sample and activation quantizer. Otherwise the whole
    table does: for 1000 timesteps and 59 activation quantizers that is 236 kB a step.
    """

    def __init__(self, runner: Runner, scales: NDArray[np.float32], *, fixed: bool) -> None:
        self._runner, self._scales, self._fixed = runner, np.ascontiguousarray(scales), fixed

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the runner's outputs."""
        if self._fixed:
            return self._runner.infer({**inputs, BOUND: self._scales})
        indices = inputs[TIMESTEP_INDEX]
        own = np.arange(len(indices), dtype=indices.dtype)
        return self._runner.infer({**inputs, TIMESTEP_INDEX: own, BOUND: self._scales[indices]})

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()


def native_binding(engine: Engine, schedules: Sequence[Timesteps]) -> Bind:
    """Binds scales, time features and products of the text to a runner of the bare engine, as ``load_engine`` does.

    Where Triton's own backend runs the engine's file, this is the part of loading an engine that stays outside it.

    Raises:
        InputError: the engine does not run one of ``schedules``. IntegrityError: a side graph was changed.
    """
    timesteps = bound_timesteps(engine, schedules)
    table = scales_for_schedule(engine.scales, engine.timesteps, timesteps).scales
    features = bound_features(engine, timesteps, schedules)
    texts = text_projections(engine) if engine.takes_text_projections else None
    per_step = tuple(spec for spec in engine.inputs if spec.name != BOUND)
    fixed = any(spec.name == BOUND and isinstance(spec.shape[0], int) for spec in engine.inputs)
    profile = engine.profile

    def bind(runner: Runner) -> Runner:
        inner = TableRunner(runner, table, fixed=fixed) if takes_table(engine) else runner
        return BoundRunner(inner, per_step, timesteps, features, texts, profile=profile)

    return bind


def check_request(request: ImageRequest, most_steps: int) -> None:
    """Checks a request's numbers and texts; raises InputError where one is out of its range."""
    if not 1 <= request.steps <= most_steps:
        raise InputError(f"steps is {request.steps}: give 1 to {most_steps}")
    if not (math.isfinite(request.guidance_scale) and 0 <= request.guidance_scale <= _MOST_GUIDANCE):
        raise InputError(f"guidance_scale is {request.guidance_scale}: give 0 to {_MOST_GUIDANCE:g}")
    if request.seed < 0:
        raise InputError(f"seed is {request.seed}: give 0 or more")
    if min(request.size or (1, 1)) < 1:
        raise InputError(f"a picture of {request.size} pixels: give a height and width above 0")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative)):
        if len(text) > _MOST_CHARACTERS:
            raise InputError(f"{name} has {len(text)} characters: give up to {_MOST_CHARACTERS}")


def _text_of(name: str, given: bytes) -> str:
    try:
        return given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8") from error


def _base_of(engine: Engine, settings: ModelSettings) -> BasePipeline:
    """Opens the pipeline beside the model, or where the configuration says; the engine must be made from it."""
    copied = settings.folder / PIPELINE
    base = resolve_base(str(copied) if copied.is_dir() else settings.parameters["base"])
    if base.base.digest != engine.manifest.base.digest:
        raise IntegrityError(
            f"{base.folder} is not the pipeline that the engine was made from (its digest differs): "
            "set parameter base of config.pbtxt"
        )
    return base


def _unchanged(runner: Any) -> Any:  # noqa: ANN401 - a runner
    return runner
