"""Adam for a table of which each step sees some rows: an absent row is not moved by stale momentum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8


class RowAdam(nn.Module):
    """Moments float32 [rows, columns] and the number of updates int64 [rows] of one table, as buffers."""

    mean: Tensor
    square: Tensor
    updates: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros_like(table))
        self.register_buffer("square", torch.zeros_like(table))
        self.register_buffer("updates", torch.zeros(len(table), dtype=torch.int64, device=table.device))

    @torch.no_grad()
    def step(self, table: Tensor, gradient: Tensor, rows: Tensor, rate: float) -> None:
        """Moves ``rows`` (int64, distinct) of ``table`` by Adam's rule; bias correction counts a row's own updates."""
        self.updates[rows] += 1
        count = self.updates[rows].unsqueeze(1).double()
        grad = gradient[rows]
        mean = self.mean[rows].lerp(grad, 1 - BETAS[0])
        square = self.square[rows].lerp(grad * grad, 1 - BETAS[1])
        self.mean[rows], self.square[rows] = mean, square
        corrected = mean / (1 - BETAS[0] ** count)
        size = (square / (1 - BETAS[1] ** count)).sqrt()
        table[rows] -= (rate * corrected / (size + EPS)).float()
