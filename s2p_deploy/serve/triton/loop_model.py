"""The sampling loop inside Triton's Python backend: the stock diffusers pipeline, its denoiser another model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines import ShapeProfile
from s2p_deploy.engines.load import bound_timesteps
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import load_pipeline, resolve_base, with_denoiser
from s2p_deploy.pipeline import Schedule, engine_denoiser, generate, picture_size
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.triton.bls import BlsRunner, array_of, tensor_of
from s2p_deploy.serve.triton.model_config import takes_table
from s2p_deploy.serve.triton.native import native_binding
from s2p_deploy.serve.triton.responses import error_response
from s2p_deploy.serve.triton.settings import PIPELINE, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine

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
        self._profile = ShapeProfile.from_json(engine.manifest.content["profile"])
        self._sampling = recipe_from_data(engine.manifest.recipe, str(engine.folder)).sampling
        self._guidance = self._sampling.guidance_scale or base.default_guidance
        self._pipe = with_denoiser(load_pipeline(base), self._component(lambda: False))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, one after the other."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:  # noqa: ANN401 - Triton's own type
        try:
            picture = self._draw(self._asked(request), request.is_cancelled)
        except Exception as error:  # the border to the server: what leaves here would end the model
            return error_response(self._backend, error)
        return self._backend.InferenceResponse([tensor_of(self._backend, "image", picture)])

    def _draw(self, asked: ImageRequest, is_cancelled: Callable[[], bool]) -> NDArray[np.uint8]:
        """A picture uint8 [H, W, 3]."""
        pipe = with_denoiser(self._pipe, self._component(is_cancelled)).to(self._device)
        schedule = Schedule(asked.steps, None, self._sampling.max_sequence_length, asked.size)
        prompt = Prompt("request", asked.prompt, asked.negative)
        picture = generate(pipe, prompt, schedule=schedule, guidance_scale=asked.guidance_scale, seed=asked.seed)
        return np.asarray(picture.convert("RGB"))

    def _component(self, is_cancelled: Callable[[], bool]) -> Any:  # noqa: ANN401 - of diffusers, which is not typed
        runner = BlsRunner(self._backend, self._denoiser, is_cancelled, batched=self._batched)
        return engine_denoiser(self._bind(runner), self._engine.denoiser_config, self._timesteps, self._profile)

    def _asked(self, request: Any) -> ImageRequest:  # noqa: ANN401 - Triton's own type
        def number(name: str, default: float) -> Any:  # noqa: ANN401 - int or float, as the model's input says
            tensor = self._backend.get_input_tensor_by_name(request, name)
            return default if tensor is None else array_of(tensor).reshape(-1)[0].item()

        def text(name: str) -> str:
            tensor = self._backend.get_input_tensor_by_name(request, name)
            return "" if tensor is None else _text_of(name, tensor.as_numpy().reshape(-1)[0])

        height, width = (number(name, 0) or None for name in ("height", "width"))
        asked = ImageRequest(
            prompt=text("prompt"),
            steps=number("steps", self._sampling.steps),
            guidance_scale=number("guidance_scale", self._guidance),
            seed=number("seed", 0),
            negative=text("negative_prompt"),
            size=picture_size(self._pipe, height, width),
        )
        check_asked(asked, self._most_steps)
        return asked

    def close(self) -> None:
        """Nothing to free: the engine belongs to the other model."""


def check_asked(asked: ImageRequest, most_steps: int) -> None:
    """Raises InputError where a request asks for too much, or for what makes no sense."""
    if not 1 <= asked.steps <= most_steps:
        raise InputError(f"steps is {asked.steps}: give 1 to {most_steps}")
    if not (math.isfinite(asked.guidance_scale) and 1 <= asked.guidance_scale <= _MOST_GUIDANCE):
        raise InputError(f"guidance_scale is {asked.guidance_scale}: give 1 to {_MOST_GUIDANCE:g}")
    if asked.seed < 0:
        raise InputError(f"seed is {asked.seed}: give 0 or more")
    if min(asked.size or (1, 1)) < 1:
        raise InputError(f"a picture of {asked.size} pixels: give a height and width above 0")
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative)):
        if len(text) > _MOST_CHARACTERS:
            raise InputError(f"{name} has {len(text)} characters: give up to {_MOST_CHARACTERS}")


def _text_of(name: str, given: bytes) -> str:
    try:
        return given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8") from error


def _base_of(engine: Engine, settings: ModelSettings) -> BasePipeline:
    """The pipeline beside the model, or where the configuration says; always the one that the engine was made from."""
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
