"""ControlNets that the requests of a service share: calls of several are computed as one batch.

Every request draws with a ControlNet of its own, which pauses the request's task in every call. Behind them all is one
network, in floating point or an engine.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, SD3ControlNetModel

from s2p_deploy.engines.runner import ClosingRunner, Runner
from s2p_deploy.pipeline import EngineComponent, EngineControlNet
from s2p_deploy.serve.generation_task import PausingTensorRunner, pausing_runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import ModelMixin
    from numpy.typing import NDArray
    from torch import Tensor

_ADDED = "added_cond_kwargs"  # the keyword for SDXL's conditions, a mapping of further ones
_SCALE = "conditioning_scale"


@dataclass(frozen=True, eq=False)
class ServedControlNet:
    """A ControlNet that is loaded.

    Attributes:
        network: of diffusers, or on an engine.
        runner: computes the calls of a batch.
        mixed_timesteps: whether a batch may hold samples of several timesteps.
        most: the most samples of a batch (None: as many as there are).
    """

    network: ModelMixin
    runner: Runner
    mixed_timesteps: bool = True
    most: int | None = None

    @classmethod
    def of(cls, network: ModelMixin) -> ServedControlNet:
        """Makes it of a network that :func:`s2p_deploy.pipeline.open_controlnet` opened."""
        if not isinstance(network, EngineControlNet):
            return cls(network, _NetworkRunner(network))
        bound = network.bound
        return cls(network, bound, network.saved_engine().mixed_timesteps, bound.profile.maximum)

    def for_request(self) -> ModelMixin:
        """Makes the ControlNet of one request, for stock pipelines; it pauses the request's task in every call."""
        if isinstance(self.network, EngineControlNet):
            return self.network.computing_on(pausing_runner(self.runner, self))
        kind = _PausingSD3ControlNet if isinstance(self.network, SD3ControlNetModel) else _PausingControlNet
        return kind(self).place(self.network.device, self.network.dtype)

    def close(self) -> None:
        """Frees the memory of an engine."""
        self.runner.close()


class _NetworkRunner(ClosingRunner):
    """A ControlNet of diffusers as a runner; its outputs are the residuals, by their numbers."""

    def __init__(self, network: ModelMixin) -> None:
        self._network = network
        self._taken = inspect.signature(network.forward).parameters

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Computes residuals of arrays."""
        outputs = self.infer_tensors({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    @torch.no_grad()
    def infer_tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes residuals where the weights are; what the network does not take by its name is an added one."""
        added = {name: value for name, value in inputs.items() if name not in self._taken}
        own: dict[str, Any] = {name: value for name, value in inputs.items() if name in self._taken}
        blocks, *middle = self._network(**own, **({_ADDED: added} if added else {}), return_dict=False)
        return {str(number): residual for number, residual in enumerate((*blocks, *middle))}

    def close(self) -> None:
        """Does nothing: the network holds its weights as long as it is there."""


class _PausingNetwork(EngineComponent):
    """A ControlNet of diffusers that pauses the generation task in every call.

    Requests do not ask for guess mode or scale LoRAs in it, and it takes neither.
    """

    def __init__(self, served: ServedControlNet) -> None:
        super().__init__(served.network.config)
        self._runner = PausingTensorRunner(served)
        self._signature = inspect.signature(served.network.forward)

    def forward(self, *given: object, **named: object) -> tuple[Any, ...]:
        """Returns the residuals, as the network does without ``return_dict``.

        The strength acts behind the network, so that samples of one batch may have several.
        """
        arguments = self._signature.bind(*given, **named).arguments
        inputs: dict[str, Any] = arguments | (arguments.pop(_ADDED, None) or {})
        scale = inputs.pop(_SCALE, 1.0)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        samples = len(tensors["encoder_hidden_states"])
        tensors["timestep"] = torch.as_tensor(inputs["timestep"]).reshape(-1).expand(samples)
        outputs = self._runner.infer_tensors(tensors)
        return self._record([residual * scale for residual in outputs.values()])

    def _record(self, residuals: list[Tensor]) -> tuple[Any, ...]:
        raise NotImplementedError


class _PausingControlNet(_PausingNetwork, ControlNetModel):  # type: ignore[misc]  # diffusers is not typed
    """That of a UNet."""

    def _record(self, residuals: list[Tensor]) -> tuple[Any, ...]:
        *down, middle = residuals
        return down, middle


class _PausingSD3ControlNet(_PausingNetwork, SD3ControlNetModel):  # type: ignore[misc]  # diffusers is not typed
    """That of SD3's transformer."""

    def _record(self, residuals: list[Tensor]) -> tuple[Any, ...]:
        return (residuals,)
