"""Some of a dataset's stored points, each under both of its texts: what the network is asked with once planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.records import LatentDataset

_ELEMENTS = 8192  # of latents in one batch: 32 of the bundled pipeline's, one of SD1's


@dataclass(frozen=True)
class StoredPoints:
    """The first half of all tensors is of the unconditional branch, the second, in the same order, of the other.

    ``sample`` float32 [n, C, H, W] network inputs; ``row`` int64 [n]; ``text`` int64 [n] indexes ``texts`` float32
    [m, tokens, D] and ``added_cond`` float32 [m, A]; ``output`` float32 [n, C, H, W] what the teacher answered.
    """

    sample: Tensor
    row: Tensor
    text: Tensor
    texts: Tensor
    added_cond: Tensor
    output: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Indices int64 that together are all of them, as many as fit into memory."""
        return iter(torch.arange(len(self.sample)).split(max(1, _ELEMENTS // self.sample[0].numel())))

    def inputs(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The denoiser's arguments for some of them."""
        text = self.text[which]
        return self.sample[which], self.row[which], self.texts[text], self.added_cond[text]


def draw_points(dataset: LatentDataset, count: int, seed: int) -> StoredPoints:
    """``count`` stored points drawn without replacement (all, where there are fewer), in the dataset's order."""
    total = len(dataset.rows)
    return points_at(dataset, np.sort(np.random.default_rng(seed).permutation(total)[:count]))


def points_at(dataset: LatentDataset, which: NDArray[np.int64]) -> StoredPoints:
    """The stored points of some indices, each under both of its texts."""
    prompt = dataset.prompt[which]
    return StoredPoints(
        torch.from_numpy(dataset.latents[which]).float().repeat(2, 1, 1, 1),
        torch.from_numpy(dataset.rows[which]).repeat(2),
        torch.from_numpy(np.concatenate([dataset.uncond_text[prompt], dataset.cond_text[prompt]])),
        torch.from_numpy(dataset.texts),
        torch.from_numpy(dataset.added_cond),
        torch.from_numpy(np.concatenate([dataset.uncond[which], dataset.cond[which]])).float(),
    )


def least_noisy(dataset: LatentDataset) -> NDArray[np.int64]:
    """Index of the stored point with the smallest row of every prompt, by prompt."""
    order = np.lexsort((dataset.rows, dataset.prompt))
    _, starts = np.unique(dataset.prompt[order], return_index=True)
    found: NDArray[np.int64] = order[starts]
    return found
