"""The model in training: the quantized denoiser and the activation scales of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.quantized_denoiser import QuantizedConv2d, QuantizedDenoiser, QuantizedLinear, WeightQuantizer
from s2p_deploy.calib.training.act_scales import ActScales

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ActScales", "TrainingState"]


@dataclass(frozen=True)
class TrainingState:
    """What training changes, in place. ``rows`` int64 [calibrated rows], ascending."""

    denoiser: QuantizedDenoiser
    act_scales: ActScales
    rows: Tensor

    def modules(self) -> nn.ModuleDict:
        """All that may be trained, under the names that checkpoints have."""
        return nn.ModuleDict({"denoiser": self.denoiser.hot, "act_scales": self.act_scales})

    def weight_sites(self) -> dict[str, QuantizedConv2d | QuantizedLinear]:
        """The sites whose weights are quantized, in the plan's order."""
        sites = {site.site: self.denoiser.site(site.site) for site in self.denoiser.plan.sites}
        return {
            name: site
            for name, site in sites.items()
            if isinstance(site, QuantizedConv2d | QuantizedLinear)
            and isinstance(site.weight_quantizer, WeightQuantizer)
        }

    def answer(self, sample: Tensor, row: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        """The quantized network's raw output [batch, C, H, W] on calibrated rows ``row`` int64 [batch]."""
        output: Tensor = self.denoiser(sample, row, texts, added_cond, self.act_scales(self.index(row)))
        return output

    def index(self, row: Tensor) -> Tensor:
        """The places int64 [batch] of rows among the calibrated ones."""
        return torch.searchsorted(self.rows.to(row.device), row)

    def to(self, device: torch.device) -> None:
        """Moves all of it, in place."""
        self.modules().to(device)
