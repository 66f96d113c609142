"""Algorithm 1 of the paper (arXiv 2412.06661): the floating-point denoiser's own trajectories, walked side by side.

Every forward pass has the same number of samples, and a prompt always walks in the same slot of it, whatever its
neighbors are: so neither kills nor the number of processes change a bit.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from s2p_deploy.families import EncodedText, latent_shape
from s2p_deploy.timesteps import rows_of_timesteps, timestep_table_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.calib.dataset.sampler import Sampler
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.records import Prompt, TimestepTable


@dataclass(frozen=True)
class StoredPoint:
    """One call of the denoiser on one row: float16 [C, H, W] what it was given, what it answered for each branch."""

    latents: Tensor
    row: int
    cond: Tensor
    uncond: Tensor


@dataclass(frozen=True)
class Itinerary:
    """What one prompt asks for: which of the scheduler's calls are stored (ascending), and its two texts."""

    prompt: Prompt
    calls: tuple[int, ...]
    cond: EncodedText
    uncond: EncodedText

    @property
    def length(self) -> int:
        """Calls of the denoiser that its walk takes."""
        return walk_length(self.calls)


def walk_length(calls: tuple[int, ...]) -> int:
    """Calls of the denoiser until the last stored one, which is where a walk stops."""
    return calls[-1] + 1


def choose_calls(prompt: Prompt, calls: int, count: int, timesteps: Literal["uniform", "normal"]) -> tuple[int, ...]:
    """``count`` of ``calls`` calls (all, where there are fewer), ascending, drawn from the prompt's own seed.

    Calls run from noise to picture. ``uniform`` draws them alike. ``normal`` draws timesteps, in units of the
    schedule's calls T with T - 1 the noisiest, as clip(round(N(0.4 T, (0.25 T)^2)), 0, T - 1), until ``count`` distinct
    ones are found: PTQ4DM's, which lean towards the picture (arXiv 2211.15736).
    """
    draws = random.Random(prompt.noise_seed)
    if timesteps == "uniform" or count >= calls:
        return tuple(sorted(draws.sample(range(calls), min(count, calls))))
    chosen: set[int] = set()
    while len(chosen) < count:
        timestep = round(draws.gauss(0.4 * calls, 0.25 * calls))
        chosen.add(calls - 1 - min(max(timestep, 0), calls - 1))
    return tuple(sorted(chosen))


def schedule_table(pipe: DiffusionPipeline, denoiser: HotDenoiser, steps: int) -> TimestepTable:
    """The rows of a pipeline's own scheduler with a number of steps, under one of its denoisers.

    Raises:
        InputError: as :func:`timestep_table_of`.
    """
    return timestep_table_of(pipe.scheduler, steps, fractional=bool(denoiser.added_width))


def call_rows(scheduler: Any, table: TimestepTable) -> tuple[int, ...]:  # noqa: ANN401 - diffusers' schedulers share no typed base
    """The row of every call of a scheduler whose timesteps are set: PNDM's 50 steps are 51 calls on 50 rows.

    Raises:
        InputError: a timestep has no row in ``table``.
    """
    return tuple(rows_of_timesteps(scheduler.timesteps.double().numpy(), table).tolist())


def slot_queues(lengths: Mapping[int, int], width: int, shard: int) -> tuple[tuple[int, ...], ...]:
    """Which prompts of a shard walk in which slot, in order: the longest first, each where a slot is free first.

    ``lengths`` gives every prompt's number of calls. Nothing but the shard's own prompts and its number decides, so a
    continued run and any number of processes give every prompt the same slot. The number draws the order of the slots:
    no slot gets the long walks of all shards.
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
def walk(
    teacher: HotDenoiser,
    sampler: Sampler,
    itineraries: Sequence[Itinerary],
    queues: Sequence[Sequence[int]],
    *,
    guidance_scale: float,
) -> Iterator[tuple[int, list[StoredPoint] | None]]:
    """Walks the prompts (indices of ``itineraries``) of every slot's queue, the slots side by side.

    ``sampler`` is copied for every walk. Yields (prompt, None) after each call of the
    denoiser that a prompt took part in, and (prompt, points) in place of the last.
    """
    device = teacher.network.device  # looked up once: diffusers takes milliseconds to find it
    waiting = [deque(queue) for queue in queues]
    slots: list[_Walk | None] = [None] * len(queues)
    while True:
        for slot, queue in enumerate(waiting):
            if slots[slot] is None and queue:
                prompt = queue.popleft()
                slots[slot] = _Walk(prompt, itineraries[prompt], sampler, latent_shape(teacher))
        if not any(slots):
            return
        inputs = [None if active is None else active.net_input() for active in slots]
        answers = _answer(teacher, slots, inputs, device)
        for slot, active in enumerate(slots):
            taken = inputs[slot]
            if active is None or taken is None:
                continue
            active.advance(taken, answers[0, slot], answers[1, slot], guidance_scale)
            if active.finished:
                slots[slot] = None
            yield active.index, active.points if active.finished else None


class _Walk:
    """One prompt on its way down the schedule."""

    def __init__(self, index: int, itinerary: Itinerary, sampler: Sampler, shape: tuple[int, ...]) -> None:
        self.index = index
        self.itinerary = itinerary
        self.sampler = sampler.copy()
        self.generator = torch.Generator().manual_seed(itinerary.prompt.noise_seed)
        self.latents = self.sampler.start(torch.randn((1, *shape), generator=self.generator))
        self.call = 0
        self.points: list[StoredPoint] = []

    @property
    def row(self) -> int:
        return self.sampler.rows[self.call]

    @property
    def finished(self) -> bool:
        return self.call > self.itinerary.calls[-1]

    def net_input(self) -> Tensor:
        """float32 [C, H, W], rounded to float16, so that the stored answer belongs to the stored input exactly."""
        return self.sampler.net_input(self.latents, self.call)[0].half().float()

    def advance(self, net_input: Tensor, uncond: Tensor, cond: Tensor, guidance_scale: float) -> None:
        """Takes the answers, float32 [C, H, W]; stores the call if it was chosen, and steps unless it is the last."""
        if self.call in self.itinerary.calls:
            self.points.append(StoredPoint(net_input.half(), self.row, cond.half(), uncond.half()))
        if self.call < self.itinerary.calls[-1]:
            guided = (uncond + guidance_scale * (cond - uncond)).unsqueeze(0)
            self.latents = self.sampler.step(guided, self.call, self.latents, self.generator)
        self.call += 1


def _answer(
    teacher: HotDenoiser, slots: Sequence[_Walk | None], inputs: Sequence[Tensor | None], device: torch.device
) -> Tensor:
    """One forward pass of 2 * width samples: [2, width, C, H, W], uncond first; idle slots repeat a busy one.

    The answers are on the CPU, where the schedulers step.
    """
    busy = next(slot for slot, active in enumerate(slots) if active is not None)
    filled = [slot if active is not None else busy for slot, active in enumerate(slots)]
    active = [walk for walk in (slots[slot] for slot in filled) if walk is not None]
    sample = torch.stack([taken for taken in (inputs[slot] for slot in filled) if taken is not None])
    rows = torch.tensor([walk.row for walk in active])
    uncond, cond = ([getattr(walk.itinerary, branch) for walk in active] for branch in ("uncond", "cond"))
    texts = EncodedText.stack(uncond + cond).to(device)
    both_samples, both_rows = torch.cat([sample, sample]).to(device), torch.cat([rows, rows]).to(device)
    output = teacher(both_samples, both_rows, texts.states, texts.added_cond)
    both: Tensor = output.cpu().unflatten(0, (2, len(slots)))
    return both
