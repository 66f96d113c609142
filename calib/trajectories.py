"""Trajectories of a denoiser under the pipeline's scheduler.

:func:`walk_trajectories` stores samples of many prompts side by side (Algorithm 1 of arXiv 2412.06661);
:class:`Trajectory` runs a few prompts together to their last latents, with any denoiser.
"""

from __future__ import annotations

import copy
import heapq
import random
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.families import (
    EncodedText,
    denoiser_of,
    encode_texts,
    family_of,
    indexed_denoiser,
    latent_shape,
    load_pipeline,
    network_config,
    time_table_of,
    zero_inputs,
)
from s2p_deploy.families.model_family import has_branches
from s2p_deploy.schedulers import denoiser_input, first_latents, noised, skipped_calls, stepped
from s2p_deploy.timesteps import timestep_indices, timestep_table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Prompt, PromptSet, TimestepTable, TimeTable

    # sample, timestep index, text states, added_cond -> output; both branches in one batch
    Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TEXT_BATCH = 64
_LONG = 5.0  # seconds of a call after which its first one is measure enough
CPU = torch.device("cpu")


def in_parts(denoise: Denoise, samples: int | None) -> Denoise:
    """Makes a denoiser that calls ``denoise`` with at most ``samples`` at a time; None: with all at once."""
    if samples is None:
        return denoise

    def call(sample: Tensor, timestep_index: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        inputs = (sample, timestep_index, texts, added_cond)
        parts = zip(*(given.split(samples) for given in inputs), strict=True)
        return torch.cat([denoise(*part) for part in parts])

    return call


@torch.no_grad()
def call_with_zeros(
    denoiser: IndexedDenoiser, tokens: int, samples: int, samples_per_call: int | None = None
) -> Tensor:
    """Calls a denoiser with so many samples of nothing but zeros, to see what that takes."""
    inputs = zero_inputs(denoiser, tokens=tokens, batch=samples)
    call = in_parts(denoiser, samples_per_call)
    return call(inputs.sample, inputs.timestep_index, inputs.encoder_hidden_states, inputs.added_cond)


def seconds_of_call(denoiser: IndexedDenoiser, tokens: int, samples: int, samples_per_call: int | None = None) -> float:
    """Measures the seconds of :func:`call_with_zeros`; what is quick is measured three times."""

    def timed() -> float:
        started = time.perf_counter()
        call_with_zeros(denoiser, tokens, samples, samples_per_call).cpu()  # the copy waits for the device
        return time.perf_counter() - started

    first = timed()
    return first if first > _LONG else min(timed(), timed())


@dataclass(frozen=True)
class FloatPipeline:
    """A pipeline and its denoiser as a floating-point indexed denoiser, which has taken the network over.

    ``timesteps`` has every index of the scheduler, those of the schedule calibrated. ``time_table`` is the exact one of
    ``denoiser``, None where the time features depend on the prompt too; ``deployed_time_table`` the one of the result.
    """

    pipe: DiffusionPipeline
    denoiser: IndexedDenoiser
    timesteps: TimestepTable
    time_table: TimeTable | None
    deployed_time_table: TimeTable | None

    @property
    def device(self) -> torch.device:
        """Returns the denoiser's device."""
        return self.denoiser.device

    @property
    def time_source(self) -> TimeTable | TimestepTable:
        """Returns what an indexed denoiser of this pipeline is built with."""
        return self.time_table or self.timesteps


def load_float_pipeline(
    base: BasePipeline,
    steps: int,
    deployed_time_table: Callable[[torch.nn.Module, int], TimeTable] | None = None,
    device: torch.device = CPU,
    *,
    strength: float | None = None,
) -> FloatPipeline:
    """Loads a pipeline from disk, in float32, for trajectories of ``steps`` steps; its denoiser goes to ``device``.

    ``strength`` is the share of the schedule that is run (None: as the pipeline is meant to).
    ``deployed_time_table`` makes the table to deploy from the network and the number of timesteps; None: the exact one.

    Raises:
        InputError: the pipeline cannot be loaded, or its scheduler has no such schedule.
    """
    pipe = load_pipeline(base)
    network = denoiser_of(pipe).to(device)
    conditioned = bool(family_of(network).added_width(network_config(network)))
    share = base.default_strength if strength is None else strength
    timesteps = timestep_table_of(pipe.scheduler, steps, fractional=conditioned, strength=share)
    table = time_table_of(network, len(timesteps.angle))
    deployed = table if deployed_time_table is None else deployed_time_table(network, len(timesteps.angle))
    # Taking the time path out of the network comes last: both tables are made with its weights.
    denoiser = indexed_denoiser(network, table or timesteps).to(device).eval()
    return FloatPipeline(pipe, denoiser, timesteps, table, deployed)


@dataclass(frozen=True)
class PromptTexts:
    """The ``distinct`` texts of prompts; ``cond`` and ``uncond`` int64 [prompts] index them.

    Both are the prompts' own where a pipeline predicts with the prompt alone.
    """

    distinct: EncodedText
    cond: Tensor
    uncond: Tensor


def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    max_sequence_length: int,
    device: torch.device | None = None,
    guidance_scale: float | None = None,
) -> PromptTexts:
    """Encodes prompts and negative prompts, each distinct text once; the result is on the CPU.

    Negative ones are left out where ``guidance_scale`` makes no use of them (None: both are wanted).

    ``device`` is where the text encoders do it (None: where they are); they leave it again, because SD3's take 19 GB in
    float32. ``max_sequence_length`` as for :func:`encode_texts`.
    """
    guided = guidance_scale is None or has_branches(network_config(denoiser_of(pipe)), guidance_scale)
    options = {"max_sequence_length": max_sequence_length, "guidance_scale": guidance_scale or 0.0}
    with _text_encoders_on(pipe, device):
        return _encoded(pipe, prompts, options, guided=guided)


@contextmanager
def _text_encoders_on(pipe: DiffusionPipeline, device: torch.device | None) -> Iterator[None]:
    parts = () if device is None else pipe.components.items()
    before = {part: part.device for name, part in parts if name.startswith("text_encoder") and part is not None}
    try:
        for encoder in before:
            encoder.to(device)
        yield
    finally:
        for encoder, own in before.items():
            encoder.to(own)


def _encoded(pipe: DiffusionPipeline, prompts: PromptSet, options: dict[str, Any], *, guided: bool) -> PromptTexts:
    texts = list(dict.fromkeys(prompt.text for prompt in prompts.prompts))
    negatives = list(dict.fromkeys(prompt.negative for prompt in prompts.prompts)) if guided else []
    encoded = [
        encode_texts(pipe, group[start : start + TEXT_BATCH], negative=negative, **options)
        for group, negative in ((texts, False), (negatives, True))
        for start in range(0, len(group), TEXT_BATCH)
    ]
    cond = torch.tensor([texts.index(prompt.text) for prompt in prompts.prompts])
    if not guided:
        return PromptTexts(EncodedText.cat(encoded), cond, cond.clone())  # a file takes no tensor twice
    uncond = torch.tensor([len(texts) + negatives.index(prompt.negative) for prompt in prompts.prompts])
    return PromptTexts(EncodedText.cat(encoded), cond, uncond)


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler with its timesteps set, and the timestep ``indices`` of its calls.

    ``skipped`` calls of the schedule come before them: a picture that is changed begins later. Schedulers keep a state,
    so every trajectory takes a copy.
    """

    scheduler: Any  # diffusers' schedulers share no typed base
    indices: tuple[int, ...]
    skipped: int = 0

    def copy(self) -> Sampler:
        """Copies the scheduler with its state."""
        return replace(self, scheduler=copy.deepcopy(self.scheduler))

    def start(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """Scales standard normal noise to the first latents, or noises ``clean`` ones to that level."""
        if clean is None:
            return first_latents(self.scheduler, noise)
        return noised(self.scheduler, clean, noise, self._timestep(0).reshape(1))

    def net_input(self, latents: Tensor, call: int) -> Tensor:
        """Scales latents to the denoiser's input of a call."""
        return denoiser_input(self.scheduler, latents, self._timestep(call))

    def step(
        self, output: Tensor, call: int, latents: Tensor, generator: torch.Generator | list[torch.Generator]
    ) -> Tensor:
        """Computes the next latents; ``generator`` draws the noise of schedulers that add some."""
        return stepped(self.scheduler, output, self._timestep(call), latents, generator)

    def _timestep(self, call: int) -> Tensor:
        timestep: Tensor = self.scheduler.timesteps[self.skipped + call]
        return timestep


def call_indices(scheduler: Any, table: TimestepTable, skipped: int = 0) -> tuple[int, ...]:  # noqa: ANN401 - diffusers' schedulers share no typed base
    """Finds the timestep index of every call but the first ``skipped`` of a scheduler whose timesteps are set.

    A schedule may visit an index twice: PNDM's 50 steps are 51 calls at 50 timesteps.

    Raises:
        InputError: a timestep is not in ``table``.
    """
    return tuple(timestep_indices(scheduler.timesteps[skipped:].double().numpy(), table).tolist())


def sampler_of(pipe: DiffusionPipeline, table: TimestepTable, steps: int, strength: float | None = None) -> Sampler:
    """Copies a pipeline's scheduler and sets its timesteps, of which the last ``strength`` are run (None: all).

    Raises:
        InputError: as :func:`call_indices`.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    skipped = skipped_calls(scheduler, steps, 1.0 if strength is None else strength)
    if skipped and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return Sampler(scheduler, call_indices(scheduler, table, skipped), skipped)


# Algorithm 1: prompts walk in slots of a batch of fixed width. Every forward pass has the same number of samples, and a
# prompt always has the same slot whatever its neighbors are, so neither kills nor the number of processes change a bit.


@dataclass(frozen=True)
class Sample:
    """A stored call of the denoiser: float16 [C, H, W] input, and the output of each CFG branch, or twice the one."""

    latents: Tensor
    timestep_index: int
    cond: Tensor
    uncond: Tensor


@dataclass(frozen=True)
class PromptWalk:
    """A prompt to walk: the scheduler calls to store (ascending), and the prompt's two texts.

    ``mask`` [1 + C, H, W] is what an inpainting network reads behind its latents; ``clean`` [C, H, W] are latents of
    the picture that is changed (None: it is drawn from noise).
    """

    prompt: Prompt
    calls: tuple[int, ...]
    cond: EncodedText
    uncond: EncodedText
    mask: Tensor | None = None
    clean: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of denoiser calls until the last stored one, which is where the walk stops."""
        return self.calls[-1] + 1


def uniform_calls(recipe: Recipe, prompt: Prompt, calls: int) -> tuple[int, ...]:
    """Draws the calls of a prompt to store, ascending, from the prompt's own seed.

    ``recipe.dataset.samples_per_prompt`` of ``calls`` calls, or all where there are fewer.
    """
    draws = random.Random(prompt.noise_seed)
    return tuple(sorted(draws.sample(range(calls), min(recipe.dataset.samples_per_prompt, calls))))


def slot_queues(lengths: Mapping[int, int], width: int, shard: int) -> tuple[tuple[int, ...], ...]:
    """Assigns the prompts of a shard to slots: the longest first, each to the slot that is free first.

    ``lengths`` is every prompt's number of calls. Nothing but the shard's own prompts and its number decides, so a
    continued run and any number of processes give every prompt the same slot. The number draws the order of the slots,
    so that no slot gets the long walks of all shards.
    """
    order = random.Random(shard).sample(range(width), width)
    free = [(0, place) for place in range(width)]
    queues: list[list[int]] = [[] for _ in range(width)]
    for prompt in sorted(lengths, key=lambda prompt: (-lengths[prompt], prompt)):
        when, place = heapq.heappop(free)
        queues[order[place]].append(prompt)
        heapq.heappush(free, (when + lengths[prompt], place))
    return tuple(tuple(queue) for queue in queues)


@torch.no_grad()
def walk_trajectories(
    denoiser: IndexedDenoiser,
    sampler: Sampler,
    walks: Sequence[PromptWalk],
    queues: Sequence[Sequence[int]],
    *,
    guidance_scale: float,
    samples_per_call: int | None = None,
) -> Iterator[tuple[int, list[Sample] | None]]:
    """Walks the prompts of every slot's queue (indices of ``walks``), the slots side by side.

    ``samples_per_call`` cuts the batch of all slots into several calls of the denoiser.
    Yields (prompt, None) after each call that a prompt took part in, and (prompt, samples) in place of the last.
    """
    waiting = [deque(queue) for queue in queues]
    slots: list[_Slot | None] = [None] * len(queues)
    while True:
        for number, queue in enumerate(waiting):
            if slots[number] is None and queue:
                prompt = queue.popleft()
                slots[number] = _Slot(prompt, walks[prompt], sampler, latent_shape(denoiser))
        if not any(slots):
            return
        inputs = [None if slot is None else slot.net_input() for slot in slots]
        guided = has_branches(denoiser.config, guidance_scale)
        outputs = _predict(in_parts(denoiser, samples_per_call), denoiser.device, slots, inputs, guided=guided)
        for number, slot in enumerate(slots):
            net_input = inputs[number]
            if slot is None or net_input is None:
                continue
            slot.advance(net_input, outputs[0, number], outputs[1, number], guidance_scale)
            if slot.finished:
                slots[number] = None
            yield slot.index, slot.samples if slot.finished else None


class _Slot:
    """A prompt on its way down the schedule."""

    def __init__(self, index: int, walk: PromptWalk, sampler: Sampler, shape: tuple[int, ...]) -> None:
        self.index, self.walk = index, walk
        self.sampler = sampler.copy()
        self.generator = torch.Generator().manual_seed(walk.prompt.noise_seed)
        clean = None if walk.clean is None else walk.clean.float().unsqueeze(0)
        self.latents = self.sampler.start(torch.randn((1, *shape), generator=self.generator), clean)
        self.call = 0
        self.samples: list[Sample] = []

    @property
    def timestep_index(self) -> int:
        return self.sampler.indices[self.call]

    @property
    def finished(self) -> bool:
        return self.call > self.walk.calls[-1]

    def net_input(self) -> Tensor:
        """Returns float32 [C, H, W], rounded to float16: the stored output belongs to the stored input exactly."""
        scaled = self.sampler.net_input(self.latents, self.call)[0]
        whole = scaled if self.walk.mask is None else torch.cat([scaled, self.walk.mask])
        return whole.half().float()

    def advance(self, net_input: Tensor, uncond: Tensor, cond: Tensor, guidance_scale: float) -> None:
        """Stores the outputs, float32 [C, H, W], if the call was chosen, and steps unless it is the last."""
        if self.call in self.walk.calls:
            self.samples.append(Sample(net_input.half(), self.timestep_index, cond.half(), uncond.half()))
        if self.call < self.walk.calls[-1]:
            guided = (uncond + guidance_scale * (cond - uncond)).unsqueeze(0)
            self.latents = self.sampler.step(guided, self.call, self.latents, self.generator)
        self.call += 1


def _predict(
    denoise: Denoise,
    device: torch.device,
    slots: Sequence[_Slot | None],
    inputs: Sequence[Tensor | None],
    *,
    guided: bool,
) -> Tensor:
    """Denoises 2 * width samples: [2, width, C, H, W], uncond first; idle slots repeat a busy one.

    Without guidance it denoises width samples, and the two outputs are the same. The result is on the CPU, where the
    schedulers step.
    """
    busy = next(number for number, slot in enumerate(slots) if slot is not None)
    filled = [number if slot is not None else busy for number, slot in enumerate(slots)]
    active = [slot for slot in (slots[number] for number in filled) if slot is not None]
    sample = torch.stack([taken for taken in (inputs[number] for number in filled) if taken is not None])
    indices = torch.tensor([slot.timestep_index for slot in active])
    branches = ("uncond", "cond") if guided else ("cond",)
    texts = EncodedText.stack([getattr(slot.walk, branch) for branch in branches for slot in active]).to(device)
    samples, calls = (torch.cat([given] * len(branches)).to(device) for given in (sample, indices))
    output = denoise(samples, calls, texts.states.float(), texts.added_cond)
    both: Tensor = output.cpu().unflatten(0, (len(branches), len(slots)))
    return both.expand(2, *both.shape[1:])


# Free-running trajectories, to see where a denoiser ends.


@dataclass(frozen=True)
class TrajectoryInputs:
    """Starting points of trajectories.

    ``noise`` float32 [n, C, H, W], scaled by the scheduler's first sigma; ``cond`` and ``uncond`` n texts, the latter
    read where ``guided``; ``mask`` [n, 1 + C, H, W] what an inpainting network reads behind its latents, or of no
    channels; ``generators`` draw the noise of schedulers that add some. ``width`` prompts share a batch.
    """

    noise: Tensor
    cond: EncodedText
    uncond: EncodedText
    mask: Tensor
    generators: tuple[torch.Generator, ...]
    sampler: Sampler
    guidance_scale: float
    width: int
    guided: bool = True

    def batches(self) -> Iterator[TrajectoryInputs]:
        """Yields all of it in order, ``width`` prompts at a time."""
        for start in range(0, len(self.noise), self.width):
            yield self[start : start + self.width]

    def __getitem__(self, some: slice) -> TrajectoryInputs:
        """Takes some of the prompts."""
        return replace(
            self,
            noise=self.noise[some],
            cond=self.cond[some],
            uncond=self.uncond[some],
            mask=self.mask[some],
            generators=self.generators[some],
        )

    def to(self, device: torch.device) -> TrajectoryInputs:
        """Moves the tensors; generators stay on the CPU, so that the noise is the same on every device."""
        moved = {name: getattr(self, name).to(device) for name in ("noise", "cond", "uncond", "mask")}
        return replace(self, **moved)


def trajectory_inputs(
    source: FloatPipeline,
    prompts: PromptSet,
    recipe: Recipe,
    *,
    mask: Tensor | None = None,
    clean: Tensor | None = None,
) -> TrajectoryInputs:
    """Prepares prompts under a (resolved) recipe's sampling, on the denoiser's device; the noise is of their own seeds.

    ``mask`` and ``clean`` of every prompt are as for :class:`PromptWalk`.

    Raises:
        InputError: the schedule has a fractional timestep, and the denoiser a constant time table.
    """
    sampling, guidance = recipe.sampling, recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    sampler = sampler_of(source.pipe, source.timesteps, sampling.steps, sampling.strength)
    texts = encode_prompts(source.pipe, prompts, sampling.max_sequence_length, source.device, guidance)
    generators = tuple(torch.Generator().manual_seed(prompt.noise_seed) for prompt in prompts.prompts)
    shape = (1, *latent_shape(source.denoiser))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return TrajectoryInputs(
        noise=sampler.start(noise, clean),
        cond=texts.distinct[texts.cond],
        uncond=texts.distinct[texts.uncond],
        mask=noise[:, :0] if mask is None else mask,
        generators=generators,
        sampler=sampler,
        guidance_scale=guidance,
        width=recipe.dataset.width,
        guided=has_branches(source.denoiser.config, guidance),
    ).to(source.device)


class Trajectory:
    """Some prompts on their way down the schedule, all at the same call."""

    def __init__(self, inputs: TrajectoryInputs) -> None:
        self.latents = inputs.noise
        self.call = 0
        self._inputs = inputs
        self._texts = EncodedText.cat([inputs.uncond, inputs.cond]) if inputs.guided else inputs.cond
        self._sampler = inputs.sampler.copy()
        self._generators = [generator.clone_state() for generator in inputs.generators]

    @property
    def finished(self) -> bool:
        """Returns whether ``latents`` are the last ones."""
        return self.call == len(self._sampler.indices)

    @property
    def timestep_index(self) -> int:
        """Timestep index of the next call."""
        return self._sampler.indices[self.call]

    def copy(self) -> Trajectory:
        """Copies the trajectory at its present call."""
        other = copy.copy(self)
        other._sampler = self._sampler.copy()
        other._generators = [generator.clone_state() for generator in self._generators]
        return other

    def predict(self, denoise: Denoise) -> Tensor:
        """Runs a denoiser on the next call: [2 n, C, H, W], the empty branches first; without guidance [n, ...]."""
        sample = torch.cat([self._sampler.net_input(self.latents, self.call), self._inputs.mask], 1)
        samples = torch.cat([sample, sample]) if self._inputs.guided else sample
        index = torch.full((len(samples),), self.timestep_index, device=sample.device)
        return denoise(samples, index, self._texts.states, self._texts.added_cond)

    def advance(self, output: Tensor) -> None:
        """Steps by an output of :meth:`predict`."""
        guided = output
        if self._inputs.guided:
            uncond, cond = output.chunk(2)
            guided = uncond + self._inputs.guidance_scale * (cond - uncond)
        self.latents = self._sampler.step(guided, self.call, self.latents, self._generators)
        self.call += 1

    def finish(self, denoise: Denoise) -> Tensor:
        """Goes to the end; returns the last latents float32 [n, C, H, W]."""
        while not self.finished:
            self.advance(self.predict(denoise))
        return self.latents


@torch.no_grad()
def final_latents(denoise: Denoise, inputs: TrajectoryInputs) -> Tensor:
    """Runs all trajectories to their end; returns the last latents float32 [n, C, H, W]."""
    return torch.cat([Trajectory(batch).finish(denoise) for batch in inputs.batches()])
