"""The latents of the numeric questions: points of the calibration's trajectories, spread over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import LatentDataset

_MOST_PER_CALL = 16
_ELEMENTS_PER_CALL = 2**15  # of latents: two of 64x64


@dataclass(frozen=True)
class ValidationLatents:
    """Denoiser inputs: ``sample`` float32 [n, C, H, W], ``rows`` int64 [n], ``text`` float32 [n, tokens, D].

    The two CFG branches of a point stand side by side: n is even.
    """

    sample: NDArray[np.float32]
    rows: NDArray[np.int64]
    text: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """As a runner takes them."""
        return {"sample": self.sample, "step_index": self.rows, "encoder_hidden_states": self.text}

    def parts(self) -> Iterator[ValidationLatents]:
        """All of them in order, as many at a time as a full-size model's activations fit into memory."""
        size = max(1, min(_MOST_PER_CALL, _ELEMENTS_PER_CALL // self.sample[0].size))
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            yield ValidationLatents(self.sample[some], self.rows[some], self.text[some])


def choose_latents(dataset: LatentDataset, count: int) -> ValidationLatents:
    """At least ``count`` latents (all, where there are fewer): evenly spaced over the points in order of their rows."""
    points = min((count + 1) // 2, len(dataset.rows))
    order = np.lexsort((dataset.prompt, dataset.rows))
    chosen = order[np.linspace(0, len(order) - 1, points).round().astype(np.int64)]
    prompt = dataset.prompt[chosen]
    texts = np.stack([dataset.texts[dataset.uncond_text[prompt]], dataset.texts[dataset.cond_text[prompt]]], 1)
    return ValidationLatents(
        sample=np.repeat(dataset.latents[chosen].astype(np.float32), 2, axis=0),
        rows=np.repeat(dataset.rows[chosen], 2),
        text=texts.reshape(-1, *texts.shape[2:]).astype(np.float32),
    )


def latents_of_walk(
    trajectory: NDArray[np.float32],
    timesteps: Sequence[float],
    cond: NDArray[np.float32],
    uncond: NDArray[np.float32],
    count: int,
) -> ValidationLatents:
    """As :func:`choose_latents`, from a pipeline's own walk, for a model that was not calibrated on a dataset.

    Args:
        trajectory: float32 [calls, n, C, H, W] latents after each call; the scheduler does not scale them.
        timesteps: [calls] the scheduler's.
        cond: float32 [n, tokens, D] text states; ``uncond`` those of the negative prompts.
        uncond: as ``cond``.
        count: how many.
    """
    calls, prompts = trajectory.shape[:2]
    points = (
        np.linspace(0, (calls - 1) * prompts - 1, min((count + 1) // 2, (calls - 1) * prompts)).round().astype(np.int64)
    )
    call, prompt = points // prompts, points % prompts
    rows = np.asarray(timesteps, dtype=np.float64)[call + 1].round().astype(np.int64)  # seen by the next call
    texts = np.stack([uncond[prompt], cond[prompt]], 1)
    return ValidationLatents(
        sample=np.repeat(trajectory[call, prompt], 2, axis=0),
        rows=np.repeat(rows, 2),
        text=texts.reshape(-1, *cond.shape[1:]),
    )
