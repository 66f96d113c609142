"""A diffusers scheduler as a walk uses it: one way to start, to ask and to step, whatever its kind."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """A scheduler whose timesteps are set, with the ``rows`` of its calls. It has a state: every walk has a copy."""

    scheduler: Any  # diffusers' schedulers share no typed base
    rows: tuple[int, ...]

    def copy(self) -> Sampler:
        """One with a state of its own."""
        return Sampler(copy.deepcopy(self.scheduler), self.rows)

    def start(self, noise: Tensor) -> Tensor:
        """The first latents from standard normal noise; flow matching starts from the noise itself."""
        latents: Tensor = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        return latents

    def net_input(self, latents: Tensor, call: int) -> Tensor:
        """What the denoiser is given in a call; flow matching gives the latents themselves."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = self.scheduler.scale_model_input(latents, self.scheduler.timesteps[call])
        return scaled

    def step(
        self, output: Tensor, call: int, latents: Tensor, generator: torch.Generator | list[torch.Generator]
    ) -> Tensor:
        """The next latents; ``generator`` draws the noise of steps that need any."""
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        drawing: dict[str, Any] = {"generator": generator} if draws else {}
        timestep = self.scheduler.timesteps[call]
        stepped: Tensor = self.scheduler.step(output, timestep, latents, return_dict=False, **drawing)[0]
        return stepped
