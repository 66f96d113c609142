"""Free-running trajectories of a few prompts side by side: the sampler's own loop with any denoiser in it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.dataset.texts import encode_texts
from s2p_deploy.calib.dataset.trajectories import call_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PromptSet

    Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # sample, row, texts -> output; both branches in one batch


@dataclass(frozen=True)
class SamplerInputs:
    """What a sampler starts from.

    ``noise`` float32 [n, C, H, W], scaled by the scheduler's first sigma; ``cond`` and ``uncond`` float32
    [n, tokens, D]; ``generators`` draw the noise of steps that need any. ``scheduler`` has its timesteps set and is
    copied for every walk, ``width`` prompts go through the denoiser at a time.
    """

    noise: Tensor
    cond: Tensor
    uncond: Tensor
    generators: tuple[torch.Generator, ...]
    scheduler: Any
    guidance_scale: float
    width: int

    def parts(self) -> Iterator[SamplerInputs]:
        """All of it in order, ``width`` prompts at a time."""
        for start in range(0, len(self.noise), self.width):
            some = slice(start, start + self.width)
            yield replace(
                self,
                noise=self.noise[some],
                cond=self.cond[some],
                uncond=self.uncond[some],
                generators=self.generators[some],
            )

    def to(self, device: torch.device) -> SamplerInputs:
        """The tensors on a device; generators stay where they are, so that noise is the same everywhere."""
        return replace(self, noise=self.noise.to(device), cond=self.cond.to(device), uncond=self.uncond.to(device))


def sampler_inputs(pipe: StableDiffusionPipeline, prompts: PromptSet, recipe: Recipe) -> SamplerInputs:
    """The inputs of prompts under a recipe's sampling: its noise is that of the prompts' own seeds.

    Raises:
        InputError: the schedule has a fractional timestep.
    """
    assert recipe.sampling.guidance_scale is not None, "the recipe is resolved"
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(recipe.sampling.steps)
    call_rows(scheduler)
    texts = encode_texts(pipe, prompts)
    config = pipe.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    generators = tuple(torch.Generator().manual_seed(prompt.noise_seed) for prompt in prompts.prompts)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return SamplerInputs(
        noise=noise * scheduler.init_noise_sigma,
        cond=texts.states[texts.cond],
        uncond=texts.states[texts.uncond],
        generators=generators,
        scheduler=scheduler,
        guidance_scale=recipe.sampling.guidance_scale,
        width=recipe.dataset.width,
    )


class SamplerWalk:
    """Some prompts on their way down the schedule, all at the same call."""

    def __init__(self, inputs: SamplerInputs) -> None:
        self.latents = inputs.noise
        self.call = 0
        self._inputs = inputs
        self._texts = torch.cat([inputs.uncond, inputs.cond])
        self._rows = call_rows(inputs.scheduler)
        self._scheduler = copy.deepcopy(inputs.scheduler)
        self._generators = [generator.clone_state() for generator in inputs.generators]
        self._draws = "generator" in inspect.signature(self._scheduler.step).parameters

    @property
    def finished(self) -> bool:
        """Whether ``latents`` are the last ones."""
        return self.call == len(self._rows)

    @property
    def row(self) -> int:
        """The row of the next call."""
        return self._rows[self.call]

    def copy(self) -> SamplerWalk:
        """Another walk that goes on from here."""
        other = copy.copy(self)
        other._scheduler = copy.deepcopy(self._scheduler)
        other._generators = [generator.clone_state() for generator in self._generators]
        return other

    def answer(self, denoise: Denoise) -> Tensor:
        """What a denoiser says to the next call: [2 n, C, H, W], the empty branches first."""
        sample = self._scheduler.scale_model_input(self.latents, self._scheduler.timesteps[self.call])
        row = torch.full((2 * len(sample),), self.row, device=sample.device)
        return denoise(torch.cat([sample, sample]), row, self._texts)

    def advance(self, answer: Tensor) -> None:
        """Takes an answer and steps."""
        uncond, cond = answer.chunk(2)
        guided = uncond + self._inputs.guidance_scale * (cond - uncond)
        drawing: dict[str, Any] = {"generator": self._generators} if self._draws else {}
        timestep = self._scheduler.timesteps[self.call]
        self.latents = self._scheduler.step(guided, timestep, self.latents, return_dict=False, **drawing)[0]
        self.call += 1

    def finish(self, denoise: Denoise) -> Tensor:
        """Goes to the end; the last latents float32 [n, C, H, W]."""
        while not self.finished:
            self.advance(self.answer(denoise))
        return self.latents


@torch.no_grad()
def final_latents(denoise: Denoise, inputs: SamplerInputs) -> Tensor:
    """The last latents float32 [n, C, H, W] of free-running trajectories."""
    return torch.cat([SamplerWalk(part).finish(denoise) for part in inputs.parts()])
