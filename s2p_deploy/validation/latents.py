"""The latents of the numeric questions: points of the calibration's trajectories, spread over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.records import LatentDataset


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

    def part(self, start: int, stop: int) -> ValidationLatents:
        """Those from ``start`` to ``stop``, end excluded."""
        return ValidationLatents(self.sample[start:stop], self.rows[start:stop], self.text[start:stop])


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
