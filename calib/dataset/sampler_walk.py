"""Free-running trajectories of a few prompts side by side: the sampler's own loop with any denoiser in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.texts import encode_prompts
from s2p_deploy.calib.dataset.trajectories import call_rows, schedule_table
from s2p_deploy.families import EncodedText, latent_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PromptSet

    # sample, row, text states, added_cond -> output; both branches in one batch
    Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplerInputs:
    """What a sampler starts from.

    ``noise`` float32 [n, C, H, W], scaled by the scheduler's first sigma; ``cond`` and ``uncond`` n texts;
    ``generators`` draw the noise of steps that need any. ``sampler`` is copied for every walk, ``width`` prompts go
    through the denoiser at a time.
    """

    noise: Tensor
    cond: EncodedText
    uncond: EncodedText
    generators: tuple[torch.Generator, ...]
    sampler: Sampler
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


def sampler_inputs(pipe: DiffusionPipeline, teacher: HotDenoiser, prompts: PromptSet, recipe: Recipe) -> SamplerInputs:
    """The inputs of ``pipe``'s denoiser ``teacher`` under a recipe's sampling; noise is that of the prompts' own seeds.

    Raises:
        InputError: the schedule has a fractional timestep, and the denoiser a constant time table.
    """
    assert recipe.sampling.guidance_scale is not None, "the recipe is resolved"
    table = schedule_table(pipe, teacher, recipe.sampling.steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(recipe.sampling.steps)
    sampler = Sampler(scheduler, call_rows(scheduler, table))
    texts = encode_prompts(pipe, prompts, recipe.sampling.max_sequence_length)
    generators = tuple(torch.Generator().manual_seed(prompt.noise_seed) for prompt in prompts.prompts)
    shape = (1, *latent_shape(teacher))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return SamplerInputs(
        noise=sampler.start(noise),
        cond=texts.distinct[texts.cond],
        uncond=texts.distinct[texts.uncond],
        generators=generators,
        sampler=sampler,
        guidance_scale=recipe.sampling.guidance_scale,
        width=recipe.dataset.width,
    )


class SamplerWalk:
    """Some prompts on their way down the schedule, all at the same call."""

    def __init__(self, inputs: SamplerInputs) -> None:
        self.latents = inputs.noise
        self.call = 0
        self._inputs = inputs
        self._texts = EncodedText.cat([inputs.uncond, inputs.cond])
        self._sampler = inputs.sampler.copy()
        self._generators = [generator.clone_state() for generator in inputs.generators]

    @property
    def finished(self) -> bool:
        """Whether ``latents`` are the last ones."""
        return self.call == len(self._sampler.rows)

    @property
    def row(self) -> int:
        """The row of the next call."""
        return self._sampler.rows[self.call]

    def copy(self) -> SamplerWalk:
        """Another walk that goes on from here."""
        other = copy.copy(self)
        other._sampler = self._sampler.copy()
        other._generators = [generator.clone_state() for generator in self._generators]
        return other

    def answer(self, denoise: Denoise) -> Tensor:
        """What a denoiser says to the next call: [2 n, C, H, W], the empty branches first."""
        sample = self._sampler.net_input(self.latents, self.call)
        row = torch.full((2 * len(sample),), self.row, device=sample.device)
        return denoise(torch.cat([sample, sample]), row, self._texts.states, self._texts.added_cond)

    def advance(self, answer: Tensor) -> None:
        """Takes an answer and steps."""
        uncond, cond = answer.chunk(2)
        guided = uncond + self._inputs.guidance_scale * (cond - uncond)
        self.latents = self._sampler.step(guided, self.call, self.latents, self._generators)
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
