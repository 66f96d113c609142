"""What one iteration learns from: stored points of the dataset, drawn from the iteration's own seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.recipe import Training
    from s2p_deploy.records import LatentDataset


@dataclass(frozen=True)
class Batch:
    """Samples float32 [b, C, H, W] on their rows, their texts and what the teacher answered.

    ``row`` int64 [b], ``index`` int64 [b] the row's place among the calibrated ones. A paired batch
    holds the text branches of some points and then the empty branches of the same points.
    """

    sample: Tensor
    row: Tensor
    index: Tensor
    texts: Tensor
    added_cond: Tensor
    target: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The denoiser's arguments."""
        return self.sample, self.row, self.texts, self.added_cond

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.sample.to(device),
            self.row.to(device),
            self.index.to(device),
            self.texts.to(device),
            self.added_cond.to(device),
            self.target.to(device),
        )


def draw_batch(dataset: LatentDataset, rows: Tensor, training: Training, iteration: int, part: int = 0) -> Batch:
    """One of the ``training.accumulate`` batches of an iteration.

    ``mixed`` order draws over all prompts and rows. ``serial`` order stays on one of the calibrated ``rows`` (int64,
    ascending) for an iteration and goes from the noisiest row to the picture, over and over. The ``guided`` loss gets
    both branches of half as many points; otherwise each point is one CFG branch.
    """
    generator = np.random.default_rng((training.seed, iteration * training.accumulate + part))
    among = np.arange(len(dataset.rows))
    if training.order == "serial":
        row = int(rows[len(rows) - 1 - iteration % len(rows)])
        among = np.flatnonzero(dataset.rows == row)
    if training.loss == "guided":
        return take_pairs(dataset, rows, among[generator.integers(len(among), size=max(1, training.batch // 2))])
    points = among[generator.integers(len(among), size=training.batch)]
    return take(dataset, rows, points, generator.random(training.batch) < training.empty_prompt_share)


def take_pairs(dataset: LatentDataset, rows: Tensor, points: NDArray[np.int64]) -> Batch:
    """A paired batch [2 n, ...] of stored points int64 [n]."""
    return take(dataset, rows, np.tile(points, 2), np.repeat([False, True], len(points)))


def take(dataset: LatentDataset, rows: Tensor, points: NDArray[np.int64], uncond: NDArray[np.bool_]) -> Batch:
    """Stored points int64 [b], each as the branch that ``uncond`` bool [b] names."""
    prompt = dataset.prompt[points]
    text = np.where(uncond, dataset.uncond_text[prompt], dataset.cond_text[prompt])
    target = np.where(uncond[:, None, None, None], dataset.uncond[points], dataset.cond[points])
    row = torch.from_numpy(dataset.rows[points])
    return Batch(
        sample=torch.from_numpy(dataset.latents[points]).float(),
        row=row,
        index=torch.searchsorted(rows, row),
        texts=torch.from_numpy(dataset.texts[text]),
        added_cond=torch.from_numpy(dataset.added_cond[text]),
        target=torch.from_numpy(target).float(),
    )
