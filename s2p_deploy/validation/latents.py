"""The latents of the numeric questions: points of the calibration's trajectories, spread over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.families import EncodedText

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from s2p_deploy.calib.dataset.sampler import Sampler
    from s2p_deploy.records import LatentDataset

_MOST_PER_CALL = 16
_ELEMENTS_PER_CALL = 2**15  # of latents: two of 64x64


@dataclass(frozen=True)
class ValidationLatents:
    """Denoiser inputs: ``sample`` float32 [n, C, H, W], ``rows`` int64 [n], ``text`` float32 [n, tokens, D].

    ``added_cond`` float32 [n, A] is what the time features depend on besides the row; A may be 0. The two CFG branches
    of a point stand side by side: n is even.
    """

    sample: NDArray[np.float32]
    rows: NDArray[np.int64]
    text: NDArray[np.float32]
    added_cond: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """As a runner takes them, in the order of a denoiser's arguments."""
        given: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            "sample": self.sample,
            "step_index": self.rows,
            "encoder_hidden_states": self.text,
        }
        if self.added_cond.shape[1]:
            given["added_cond"] = self.added_cond
        return given

    def parts(self) -> Iterator[ValidationLatents]:
        """All of them in order, as many at a time as a full-size model's activations fit into memory."""
        size = max(1, min(_MOST_PER_CALL, _ELEMENTS_PER_CALL // self.sample[0].size))
        for start in range(0, len(self), size):
            yield self._some(slice(start, start + size))

    def first(self, count: int) -> ValidationLatents:
        """The first of them."""
        return self._some(slice(count))

    def spread(self, count: int) -> ValidationLatents:
        """At most ``count`` (an even number) of them: pairs, evenly spaced."""
        pairs = np.linspace(0, len(self) // 2 - 1, min(count, len(self)) // 2).round().astype(np.int64)
        return self._some(np.stack([2 * pairs, 2 * pairs + 1], 1).ravel())

    def _some(self, some: slice | NDArray[np.int64]) -> ValidationLatents:
        return ValidationLatents(self.sample[some], self.rows[some], self.text[some], self.added_cond[some])


def branch_of(latent: int) -> str:
    """Which CFG branch a latent of a pair is of."""
    return "text of the prompt" if latent % 2 else "text of the empty prompt"


def choose_latents(dataset: LatentDataset, count: int) -> ValidationLatents:
    """At least ``count`` latents (all, where there are fewer): evenly spaced over the points in order of their rows."""
    chosen = _chosen_points(dataset, count)
    prompt = dataset.prompt[chosen]
    text = np.stack([dataset.uncond_text[prompt], dataset.cond_text[prompt]], 1).ravel()
    return ValidationLatents(
        sample=np.repeat(dataset.latents[chosen].astype(np.float32), 2, axis=0),
        rows=np.repeat(dataset.rows[chosen], 2),
        text=dataset.texts[text],
        added_cond=dataset.added_cond[text],
    )


def stored_answers(dataset: LatentDataset, count: int) -> NDArray[np.float32]:
    """What the FP denoiser answered to :func:`choose_latents` of as many, float32 [n, C, H, W], as float16 kept it."""
    chosen = _chosen_points(dataset, count)
    pairs = np.stack([dataset.uncond[chosen], dataset.cond[chosen]], 1)
    return pairs.reshape(-1, *pairs.shape[2:]).astype(np.float32)


def _chosen_points(dataset: LatentDataset, count: int) -> NDArray[np.int64]:
    points = min((count + 1) // 2, len(dataset.rows))
    order = np.lexsort((dataset.prompt, dataset.rows))
    return order[np.linspace(0, len(order) - 1, points).round().astype(np.int64)]


def seen_on_walk(sampler: Sampler, trajectory: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the denoiser is given in every call but the first, float32 [calls - 1, n, C, H, W].

    ``trajectory`` float32 [calls, n, C, H, W] are the latents after each call. ``sampler`` has not begun.
    """
    after = zip(range(1, len(sampler.rows)), trajectory, strict=False)  # nothing is asked of the last
    # a scheduler that has begun takes the scale of the step that it is at, whatever the timestep
    seen = [sampler.copy().net_input(torch.from_numpy(latents), call) for call, latents in after]
    return torch.stack(seen).numpy()


def latents_of_walk(
    trajectory: NDArray[np.float32],
    rows: NDArray[np.int64],
    cond: EncodedText,
    uncond: EncodedText,
    count: int,
) -> ValidationLatents:
    """As :func:`choose_latents`, from a pipeline's own walk, for a model that was not calibrated on a dataset.

    Args:
        trajectory: float32 [calls, n, C, H, W] what the denoiser is given in each call.
        rows: int64 [calls] of the scheduler's timesteps.
        cond: the n prompts; ``uncond`` the negative ones.
        uncond: as ``cond``.
        count: how many.
    """
    calls, prompts = trajectory.shape[:2]
    total = calls * prompts
    points = np.linspace(0, total - 1, min((count + 1) // 2, total)).round().astype(np.int64)
    call, prompt = points // prompts, points % prompts
    each = [branch[int(index)] for index in prompt for branch in (uncond, cond)]
    texts = EncodedText.stack(each)
    return ValidationLatents(
        sample=np.repeat(trajectory[call, prompt], 2, axis=0),
        rows=np.repeat(rows[call], 2),
        text=texts.states.numpy(),
        added_cond=texts.added_cond.numpy(),
    )
