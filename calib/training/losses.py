"""Errors of a batch's samples, and how much each row's error counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training.setting import TrainingSetting
    from s2p_deploy.recipe import Training


@dataclass(frozen=True)
class RowErrors:
    """Means over all stored points of each calibrated row, float32 [calibrated rows].

    ``error``: squared error of both branches' outputs; ``guided``: that of the guided output; ``signal``: the
    teacher's mean square.
    """

    error: Tensor
    guided: Tensor
    signal: Tensor

    def sqnr(self) -> list[float]:
        """Signal to quantization noise of each row, in dB."""
        return [float(value) for value in 10 * torch.log10(self.signal / self.error)]

    def own(self, training: Training) -> Tensor:
        """The kind of error that the recipe's loss is made of."""
        return self.guided if training.loss == "guided" else self.error


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    """Each sample's mean squared error, float32 [b], of outputs [b, C, H, W]."""
    return (output.float() - target).square().mean((1, 2, 3))


def guided_errors(output: Tensor, target: Tensor, guidance_scale: float) -> Tensor:
    """Mean squared errors float32 [b / 2] of ``g e_c - (g - 1) e_u`` in a paired batch [b, C, H, W]."""
    cond, uncond = (output.float() - target).chunk(2)
    return (guidance_scale * cond - (guidance_scale - 1) * uncond).square().mean((1, 2, 3))


def batch_errors(output: Tensor, target: Tensor, setting: TrainingSetting) -> Tensor:
    """The errors that the recipe's loss is made of: [b], or [b / 2] in a paired batch."""
    if setting.training.loss == "guided":
        return guided_errors(output, target, setting.guidance_scale)
    return squared_errors(output, target)


def row_weights(setting: TrainingSetting, rows: Tensor, start: RowErrors, shares: Tensor) -> Tensor:
    """What a sample's error is multiplied with, float32 [calibrated rows].

    Scaled so that the loss is 1 at the start; ``uniform`` stays the plain error.

    Args:
        setting: names the loss and holds what it needs.
        rows: int64 [calibrated rows], ascending.
        start: errors before training.
        shares: float [calibrated rows], how often each row is drawn; they sum to 1.
    """
    error = start.own(setting.training).double()
    if setting.training.loss == "uniform":
        return torch.ones_like(error).float()
    weights = {
        "sampler": lambda: sampler_steps(_given(setting.noise_levels)[rows]),
        "trajectory": lambda: _given(setting.influence).double(),
    }.get(setting.training.loss, lambda: error**-setting.training.balance)()
    return (weights / (shares * weights * error).sum()).float()


def sampler_steps(levels: Tensor) -> Tensor:
    """(d x_0 / d output)^2 of the schedule alone, float64 [calibrated rows], of the rows' noise ``levels``, ascending.

    A deterministic step of a variance-preserving schedule from row r to the next row r' below moves latents in units
    of x_0 by eps (level(r') - level(r)), level = sigma / alpha; one of flow matching by the velocity and its levels are
    sigma. Below the last row the level is 0.
    """
    return levels.double().diff(prepend=levels.new_zeros(1).double()).square()


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the setting was checked"
    return tensor
