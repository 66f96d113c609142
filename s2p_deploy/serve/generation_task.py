"""A request's stock pipeline, run as a coroutine: it pauses wherever it needs the engine or another slow network.

diffusers' pipelines are one long call each. Run in a greenlet of its own, such a call stops inside the denoiser, many
of them wait there side by side, and the generation loop completes as many as fit into one batch of the engine.
Everything else (text, guidance, scheduler, autoencoder) stays diffusers' own code, with the request's own scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet

from s2p_deploy.engines.runner import ClosingRunner, TensorRunner
from s2p_deploy.families import denoiser_of, with_denoiser
from s2p_deploy.pipeline import engine_denoiser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.serve.controlnets import ServedControlNet
    from s2p_deploy.serve.request import RequestFuture

_OFFLOADED = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")  # components besides the denoiser
_SLOW_METHODS = ("encode", "decode")  # of an autoencoder


@dataclass(frozen=True)
class EngineCall:
    """One call of the denoiser, or of a ControlNet; the task is resumed with the outputs.

    Attributes:
        inputs: those of the runner, each [samples, ...]. All are arrays, or all are tensors: on a device, but for
            ``timestep_index``.
        controlnet: the ControlNet that is called (None: the denoiser).
    """

    inputs: Mapping[str, NDArray[Any]] | Mapping[str, Tensor]
    controlnet: ServedControlNet | None = None

    @property
    def samples(self) -> int:
        """Latents in the call: two where the picture is guided, else one."""
        inputs: Mapping[str, Any] = self.inputs
        return len(next(iter(inputs.values())))

    @property
    def on_device(self) -> bool:
        """Returns whether the inputs are tensors."""
        return isinstance(next(iter(self.inputs.values())), torch.Tensor)


@dataclass(frozen=True)
class BackgroundTask:
    """Work beside the engine, such as encoding a text; the task is resumed with what ``run`` returns."""

    run: Callable[[], object]


def pause(until: EngineCall | BackgroundTask) -> Any:  # noqa: ANN401 - the result of what is waited for
    """Suspends the generation task that this is called in, and returns what it is resumed with.

    Raises:
        RuntimeError: called outside a generation task.
    """
    loop = getcurrent().parent
    if loop is None:
        raise RuntimeError("only a generation task can pause")
    return loop.switch(until)


class GenerationTask:
    """A request that has begun; all of it runs in the thread that starts it.

    ``waiting_for`` is what it paused for, None once ``picture`` is there. ``done`` counts completed calls of the
    denoiser. What ``generate`` raises comes out of :meth:`resume` and :meth:`throw`.
    """

    def __init__(self, future: RequestFuture, generate: Callable[[], Image]) -> None:
        self.future = future
        self.done = 0
        self.waiting_for: EngineCall | BackgroundTask | None = None
        self.picture: Image | None = None
        self._greenlet = greenlet(generate)

    @property
    def samples(self) -> int:
        """Latents per call of the denoiser."""
        return self.future.request.samples

    @property
    def denoised(self) -> bool:
        """Returns whether all calls of the engine that the picture takes are done."""
        return self.done >= self.future.calls

    def resume(self, *result: object) -> None:
        """Runs to the next pause, from the beginning or with the result of the last one."""
        if isinstance(self.waiting_for, EngineCall) and self.waiting_for.controlnet is None:
            self.done += 1
            self.future.progress = (self.done, self.future.calls)
        self._paused(self._greenlet.switch(*result))

    def throw(self, error: BaseException) -> None:
        """Raises an error where the task is paused."""
        self._paused(self._greenlet.throw(error))

    def _paused(self, given: Any) -> None:  # noqa: ANN401 - what pause() was called with, or the picture at the end
        ended = self._greenlet.dead
        self.picture = given if ended else None
        self.waiting_for = None if ended else given


class PausingRunner(ClosingRunner):
    """A runner that pauses the generation task in every call; the engine belongs to the service.

    ``controlnet`` is the ControlNet that it stands for (None: the denoiser).
    """

    def __init__(self, controlnet: ServedControlNet | None = None) -> None:
        self._controlnet = controlnet

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the outputs that the generation loop resumes the task with."""
        outputs: dict[str, NDArray[Any]] = pause(EngineCall(dict(inputs), self._controlnet))
        return outputs

    def close(self) -> None:
        """Does nothing."""


class PausingTensorRunner(PausingRunner):
    """A pausing runner for an engine that takes tensors: they stay on their device until the batch is run."""

    def infer_tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the outputs that the generation loop resumes the task with; valid until it runs the next batch."""
        outputs: dict[str, Tensor] = pause(EngineCall(dict(inputs), self._controlnet))
        return outputs


def pausing_runner(runner: Runner, controlnet: ServedControlNet | None = None) -> PausingRunner:
    """Makes a runner that pauses in the place of one, of arrays or of tensors as that is."""
    return PausingTensorRunner(controlnet) if isinstance(runner, TensorRunner) else PausingRunner(controlnet)


class OffloadedModule:
    """A network whose slow calls run in the background while the task is paused; its attributes are its own."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a network of diffusers or transformers, or a stand-in
        self._module = module

    def __call__(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - what the network returns
        """Calls the network in the background."""
        return _offloaded(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - an attribute of any kind
        attribute = getattr(self._module, name)
        return partial(_offloaded, attribute) if name in _SLOW_METHODS else attribute


def pausing_pipeline(base: DiffusionPipeline, config: Mapping[str, Any], runner: BoundRunner) -> DiffusionPipeline:
    """Replaces the networks of a pipeline by ones that pause the generation task; ``base`` stays as it is.

    Args:
        base: a stock pipeline.
        config: the configuration of its denoiser.
        runner: the engine, for its timesteps and sizes; it is not called.
    """
    pausing = pausing_runner(runner)
    adapters: dict[str, Any] = {"optional": runner.optional, "images": runner.images}
    denoiser = engine_denoiser(pausing, config, runner.timesteps, runner.profile, indices=runner.indices, **adapters)
    own = denoiser_of(base)
    pipe = with_denoiser(base, denoiser.place(own.device, own.dtype))
    parts = {name: part for name, part in pipe.components.items() if name in _OFFLOADED and part is not None}
    return with_offloaded(pipe, parts)


def with_offloaded(pipe: DiffusionPipeline, modules: Mapping[str, Any]) -> DiffusionPipeline:
    """Makes a pipeline like ``pipe`` with other components, whose slow calls run in the background."""
    other = with_denoiser(pipe, denoiser_of(pipe))
    for name, module in modules.items():
        setattr(other, name, OffloadedModule(module))
    return other


def _offloaded(call: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - as above
    return pause(BackgroundTask(partial(call, *args, **kwargs)))
