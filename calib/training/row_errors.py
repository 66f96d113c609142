"""The error of every calibrated row, over the whole dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.training.batches import take_pairs
from s2p_deploy.calib.training.losses import RowErrors, guided_errors, squared_errors

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training.state import TrainingState
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import LatentDataset

_POINTS = 32  # of which both branches are looked at together


@torch.no_grad()
def row_errors(
    state: TrainingState, dataset: LatentDataset, guidance_scale: float, progress: Progress, stage: str
) -> RowErrors:
    """The errors of the model as it is, over every stored point and both branches."""
    device = state.act_scales.rows.device
    points = np.arange(len(dataset.rows))
    total = torch.zeros(3, len(state.rows), dtype=torch.float64)
    for begin in range(0, len(points), _POINTS):
        chunk = points[begin : begin + _POINTS]
        batch = take_pairs(dataset, state.rows, chunk)
        there = batch.to(device)
        output = state.answer(*there.inputs())
        plain = squared_errors(output, there.target).unflatten(0, (2, -1)).mean(0)
        signal = there.target.square().mean((1, 2, 3)).unflatten(0, (2, -1)).mean(0)
        found = torch.stack([plain, guided_errors(output, there.target, guidance_scale), signal])
        total.index_add_(1, batch.index[: len(chunk)], found.double().cpu())
        progress(stage, begin + len(chunk), len(points))
    means = total / row_counts(dataset, state.rows)
    return RowErrors(*means.clamp_min(torch.finfo(torch.float32).tiny).float())


def row_counts(dataset: LatentDataset, rows: Tensor) -> Tensor:
    """Number of stored points of each calibrated row, int64 [calibrated rows]."""
    return torch.bincount(torch.searchsorted(rows, torch.from_numpy(dataset.rows)), minlength=len(rows))
