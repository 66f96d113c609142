"""The trained activation scales, and the fixed parts of simulated grids beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s2p_deploy.calib.quantized_denoiser import SampleGrids

if TYPE_CHECKING:
    from collections.abc import Sequence


class ActScales(nn.Module):
    """Trained activation scales, as logarithms, and the grids that they are part of.

    ``rows`` [calibrated rows, points]; ``static`` [points] for the points that do not depend on the timestep. In
    simulation only, and not trained: ``offsets`` float32 [calibrated rows, points], the value of code 0, and
    ``relaxed`` bool [calibrated rows].
    """

    is_static: Tensor
    offsets: Tensor | None
    relaxed: Tensor | None

    def __init__(
        self,
        scales: Tensor,
        is_static: Sequence[bool],
        offsets: Tensor | None = None,
        relaxed: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(scales.log())
        self.static = nn.Parameter(scales[0].log())
        self.register_buffer("is_static", torch.tensor(is_static, dtype=torch.bool), persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("relaxed", relaxed, persistent=False)

    def forward(self, index: Tensor) -> SampleGrids:
        """The grids of samples on the calibrated rows ``index`` int64 [batch]."""
        return SampleGrids(
            torch.where(self.is_static, self.static, self.rows[index]).exp(),
            None if self.offsets is None else self.offsets[index],
            None if self.relaxed is None else self.relaxed[index],
        )

    @torch.no_grad()
    def table(self) -> Tensor:
        """Scales float32 [calibrated rows, points]."""
        grids: SampleGrids = self(torch.arange(len(self.rows), device=self.rows.device))
        return grids.scales
