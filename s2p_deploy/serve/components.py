"""The components of a pipeline that pauses: each stands where a network stood, and asks the service to run it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.families import with_denoiser
from s2p_deploy.pipeline import engine_denoiser
from s2p_deploy.serve.drawing import EngineCall, SideTask, pause

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.engines import BoundRunner

_NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")  # besides the denoiser
_SLOW_METHODS = ("encode", "decode")  # of an autoencoder


class PausingRunner(ClosingRunner):
    """A runner whose every call pauses the drawing that makes it."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What the service answers."""
        outputs: dict[str, NDArray[Any]] = pause(EngineCall(dict(inputs)))
        return outputs

    def close(self) -> None:
        """Nothing to free: the engine belongs to the service."""


class AsideNetwork:
    """A network whose calls pause the drawing and run beside the engine; everything else is the network's own."""

    def __init__(self, network: Any) -> None:  # noqa: ANN401 - a network of diffusers or transformers, or a stand-in
        self._network = network

    def __call__(self, *given: object, **options: object) -> Any:  # noqa: ANN401 - what the network gives
        """What the network gives."""
        return pause(SideTask(partial(self._network, *given, **options)))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as above
        found = getattr(self._network, name)
        return partial(_aside, found) if name in _SLOW_METHODS else found


def pausing_pipeline(base: DiffusionPipeline, config: Mapping[str, Any], runner: BoundRunner) -> DiffusionPipeline:
    """``base`` with components that pause: of a denoiser of ``config`` whose rows are those of ``runner``."""
    denoiser = engine_denoiser(PausingRunner(), config, runner.timesteps, runner.profile)
    pipe = with_denoiser(base, denoiser)
    for name in _NETWORKS:
        network = pipe.components.get(name)
        if network is not None:
            setattr(pipe, name, AsideNetwork(network))
    return pipe


def _aside(method: Any, *given: object, **options: object) -> Any:  # noqa: ANN401 - as above
    return pause(SideTask(partial(method, *given, **options)))
