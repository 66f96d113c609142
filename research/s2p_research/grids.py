"""Activation grids that no engine has: asymmetric ones, and 10 bits at some timesteps.

A grid is three numbers in place of the product's one scale: scale, offset (the value of code 0), and 1 where the
activation has 10 bits. Only the scale is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from s2p_deploy.calib.quantized_denoiser import InputQuantizer, per_sample
from s2p_deploy.calib.training_state import ActScales
from s2p_deploy.numerics import dequantize, fake_quantize, quantize
from s2p_deploy.records.typed_json import reading_tensors
from s2p_deploy.timesteps import angles_of_timesteps
from s2p_research.formats import INT10

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import ScaleTable, TimestepTable

FILE = "simulation.safetensors"
_FLOOR = torch.finfo(torch.float32).tiny ** 0.5  # keeps the scale of an all-zero tensor positive and invertible


class SimulatedInputQuantizer(InputQuantizer):
    """Fake-quantizes a layer's input on grids [batch, 3]: scale, offset, 1 where it has 10 bits."""

    def on_grid(self, x: Tensor, act_scale: Tensor) -> Tensor:
        """Fake-quantizes ``x`` [batch, ...]; ``act_scale`` [batch] alone is a symmetric grid."""
        if act_scale.dim() == 1:
            return super().on_grid(x, act_scale)
        scale, offset, relaxed = (per_sample(part, x) for part in act_scale.unbind(-1))
        shifted = x - offset
        result = fake_quantize(shifted, scale, self.fmt)
        if relaxed.any():
            result = torch.where(relaxed > 0, fake_quantize(shifted, scale, INT10), result)
        return result + offset


class SimulatedActScales(ActScales):
    """Trained scales, and the fixed parts [calibrated, quantizers, 2] of their grids."""

    fixed: Tensor

    def __init__(self, grids: Tensor, is_static: Sequence[bool]) -> None:
        super().__init__(grids[..., 0], is_static)
        self.register_buffer("fixed", grids[..., 1:].clone(), persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """Returns the grids [batch, quantizers, 3] of calibrated timesteps ``position`` int64 [batch]."""
        return torch.cat([self.scales(position).unsqueeze(-1), self.fixed[position]], -1)


@dataclass(frozen=True)
class Simulation:
    """``offsets`` float32 [timesteps, quantizers]; the timestep indices ``relaxed`` have 10 bits."""

    offsets: NDArray[np.float32]
    relaxed: tuple[int, ...]

    def grids(self, scales: ScaleTable) -> Tensor:
        """Makes the grids [timesteps, quantizers, 3] of a scale table."""
        relaxed = np.zeros(scales.scales.shape, np.float32)
        relaxed[list(self.relaxed)] = 1
        return torch.from_numpy(np.stack([scales.scales, self.offsets, relaxed], -1))


def simulation_of(fixed: Tensor, timesteps: TimestepTable, scales: NDArray[np.float32]) -> Simulation:
    """Extends the fixed parts [calibrated, quantizers, 2] to all timesteps, whose ``scales`` are interpolated already.

    Offsets interpolate over the angle, each on its own grid. A timestep is relaxed where the nearest calibrated one at
    or below it is.
    """
    angles = angles_of_timesteps(timesteps.timesteps, timesteps)
    known = angles_of_timesteps(np.asarray(timesteps.calibrated), timesteps)
    columns = [np.interp(angles, known, column) for column in fixed[..., 0].double().numpy().T]
    offsets = scales * np.round(np.stack(columns, axis=1) / scales).astype(np.float32)
    relaxed = (fixed[..., 1] > 0).any(1).numpy()
    nearest = np.searchsorted(known, angles, side="right").clip(1) - 1
    return Simulation(offsets, tuple(np.flatnonzero(relaxed[nearest]).tolist()))


def write_simulation(simulation: Simulation, path: Path) -> None:
    """Writes ``simulation.safetensors``."""
    save_file({"offsets": simulation.offsets, "relaxed": np.asarray(simulation.relaxed, np.int64)}, path)


def read_simulation(path: Path) -> Simulation | None:
    """Reads ``simulation.safetensors``; None where there is none."""
    if not path.exists():
        return None
    with reading_tensors(path):
        tensors = load_file(path)
        return Simulation(tensors["offsets"], tuple(int(index) for index in tensors["relaxed"]))


def affine_grid(low: Tensor, high: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Computes scale and offset (float32, shapes as given) of the asymmetric grid over ``low`` <= 0 <= ``high``.

    ``offset`` is the value of code 0, ``-scale * z`` with an integer zero point ``z``; so zero is on the grid, which
    the padding of convolutions needs, and ``scale * clip(round((x - offset) / scale)) + offset`` is the standard
    asymmetric quantizer ``scale * (clip(round(x / scale) + z) - z)``.
    """
    scale = ((high - low) / (fmt.levels - 1)).clamp_min(_FLOOR)
    zero_point = (fmt.qmin - torch.round(low / scale)).clamp(fmt.qmin, fmt.qmax)
    return scale, -scale * zero_point


def full_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the smallest and the largest value (float32 scalars) of ``x`` and zero."""
    flat = x.detach().float().flatten()
    return flat.min().clamp_max(0), flat.max().clamp_min(0)


def mse_best_range(x: Tensor, fmt: IntegerFormat, candidates: int = 24, lowest: float = 0.3) -> tuple[Tensor, Tensor]:
    """Finds the range (float32 scalars, as for :func:`affine_grid`) whose grid has the least squared error over ``x``.

    Candidates are evenly spaced fractions of ``full_range(x)`` from ``lowest`` to 1: both ends shrink alike.
    """
    flat = x.detach().float().flatten()
    ends = torch.stack(full_range(flat))
    ranges = ends * torch.linspace(lowest, 1.0, candidates, device=flat.device).unsqueeze(1)
    errors = []
    for low, high in ranges:
        scale, offset = affine_grid(low, high, fmt)
        errors.append((dequantize(quantize(flat - offset, scale, fmt), scale) + offset - flat).square().mean())
    low, high = ranges[int(torch.stack(errors).argmin())]
    return low, high
