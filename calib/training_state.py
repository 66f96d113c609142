"""The model in training: the quantized denoiser and its activation scales by timestep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.quantized_denoiser import QuantizedConv2d, QuantizedDenoiser, QuantizedLinear, WeightQuantizer
from s2p_deploy.calib.trajectories import in_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PrecisionPlan


class ActScales(nn.Module):
    """Trained activation scales, as logarithms.

    ``by_timestep`` [calibrated, quantizers]; ``static`` [quantizers] for the quantizers that do not depend on the
    timestep, which ``is_static`` marks.
    """

    is_static: Tensor

    def __init__(self, scales: Tensor, is_static: Sequence[bool]) -> None:
        super().__init__()
        self.by_timestep = nn.Parameter(scales.log())
        self.static = nn.Parameter(scales[0].log())
        self.register_buffer("is_static", torch.tensor(is_static, dtype=torch.bool), persistent=False)

    def scales(self, position: Tensor) -> Tensor:
        """Looks up the scales float32 [batch, quantizers] of the calibrated timesteps ``position`` int64 [batch]."""
        return torch.where(self.is_static, self.static, self.by_timestep[position]).exp()

    def forward(self, position: Tensor) -> Tensor:
        """Returns what the input quantizers take: :meth:`scales`, where the grid has nothing but a scale."""
        return self.scales(position)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Returns the scales float32 [calibrated, quantizers]."""
        return self.scales(torch.arange(len(self.by_timestep), device=self.by_timestep.device))


def trained_scales(recipe: Recipe, plan: PrecisionPlan, starting: Tensor) -> ActScales:
    """Makes the trained scales from starting ones, float32 [calibrated, quantizers].

    nvidia-modelopt's calibrators know one scale for all timesteps, and training leaves it at that.
    """
    one_for_all = recipe.scales.calibrator != "own"
    static = [one_for_all or not quantizer.timestep_dependent for quantizer in plan.activation_quantizers]
    return ActScales(starting, static)


@dataclass(frozen=True)
class TrainingState:
    """The modules that training changes in place, all on one device.

    ``calibrated`` int64, on the CPU: the calibrated timestep indices, ascending. ``samples_per_call`` bounds the batch
    of :meth:`predict` alone; None does not.
    """

    denoiser: QuantizedDenoiser
    act_scales: ActScales
    calibrated: Tensor
    samples_per_call: int | None = None

    def modules(self) -> nn.ModuleDict:
        """Collects all that may be trained, under the names that checkpoints have."""
        return nn.ModuleDict({"denoiser": self.denoiser.inner, "act_scales": self.act_scales})

    def weight_layers(self) -> dict[str, QuantizedConv2d | QuantizedLinear]:
        """Returns the layers whose weights are quantized, in the plan's order."""
        layers = {layer.name: self.denoiser.layer(layer.name) for layer in self.denoiser.plan.layers}
        return {
            name: layer
            for name, layer in layers.items()
            if isinstance(layer, QuantizedConv2d | QuantizedLinear)
            and isinstance(layer.weight_quantizer, WeightQuantizer)
        }

    @property
    def device(self) -> torch.device:
        """Returns the device of all of it."""
        return self.act_scales.by_timestep.device

    def predict(self, sample: Tensor, timestep_index: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        """Computes the quantized network's raw output [batch, C, H, W] at calibrated timesteps int64 [batch]."""
        return in_parts(self._predict, self.samples_per_call)(sample, timestep_index, texts, added_cond)

    def _predict(self, sample: Tensor, timestep_index: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        position = torch.searchsorted(self._calibrated_there, timestep_index)
        output: Tensor = self.denoiser(sample, timestep_index, texts, added_cond, self.act_scales(position))
        return output

    @cached_property
    def _calibrated_there(self) -> Tensor:
        return self.calibrated.to(self.device)
