"""Everything that training changes, and the one file that it is kept in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from s2p_deploy.calib.atomic import write_tensors
from s2p_deploy.calib.row_adam import BETAS, EPS, RowAdam

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
    from s2p_deploy.recipe import Training

_WEIGHT_SCALE = "weight_quantizer.log_scale"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class ActScales(nn.Module):
    """Trained activation scales, as logarithms.

    ``rows`` [calibrated rows, points]; ``static`` [points] for the points that do not depend on the timestep.
    """

    is_static: Tensor

    def __init__(self, scales: Tensor, is_static: Sequence[bool]) -> None:
        super().__init__()
        self.rows = nn.Parameter(scales.log())
        self.static = nn.Parameter(scales[0].log())
        self.register_buffer("is_static", torch.tensor(is_static, dtype=torch.bool), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Scales float32 [batch, points] of samples on the calibrated rows ``index`` int64 [batch]."""
        return torch.where(self.is_static, self.static, self.rows[index]).exp()

    @torch.no_grad()
    def table(self) -> Tensor:
        """Scales float32 [calibrated rows, points]."""
        scales: Tensor = self(torch.arange(len(self.rows)))
        return scales


class TrainingState:
    """Model, activation scales, moments, row errors at the start, losses so far.

    ``rows`` int64 [calibrated rows] ascending; ``row_error`` float32 [calibrated rows].
    """

    def __init__(
        self, denoiser: QuantizedDenoiser, act_scales: ActScales, rows: Sequence[int], training: Training
    ) -> None:
        self.denoiser, self.act_scales = denoiser, act_scales
        self.rows = torch.tensor(rows)
        self.trained = nn.ModuleDict({"denoiser": denoiser.hot, "act_scales": act_scales})
        self.row_adam = RowAdam(act_scales.rows.detach())
        self.row_error = torch.ones(len(rows))
        self.losses: list[float] = []
        self._rates = training
        self._adam = torch.optim.AdamW(self._groups(), betas=BETAS, eps=EPS, weight_decay=0.0)

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return len(self.losses)

    def update(self, rows: Tensor, factor: float) -> None:
        """One step along the gradients; ``rows`` int64 are the calibrated rows present, ``factor`` scales all rates."""
        for group in self._adam.param_groups:
            group["lr"] = factor * group["full_rate"]
        self._adam.step()
        gradient = self.act_scales.rows.grad
        if gradient is not None:
            self.row_adam.step(self.act_scales.rows, gradient, rows, factor * self._rates.act_scale_rate)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for the checkpoint."""
        named: dict[str, Tensor] = {f"parameter/{name}": value for name, value in self.trained.named_parameters()}
        named |= {f"row_adam/{name}": value for name, value in self.row_adam.named_buffers()}
        for name, parameter in self.trained.named_parameters():
            moments = self._adam.state.get(parameter, {})
            named |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        return named | {"row_error": self.row_error, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for name, parameter in self.trained.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
            moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS if f"{moment}/{name}" in tensors}
            if moments:
                self._adam.state[parameter] = moments
        for name, buffer in self.row_adam.named_buffers():
            buffer.copy_(tensors[f"row_adam/{name}"])
        self.row_error.copy_(tensors["row_error"])
        self.losses = [float(loss) for loss in tensors["losses"]]

    def _groups(self) -> list[dict[str, object]]:
        named = list(self.denoiser.hot.named_parameters())
        scales = [parameter for name, parameter in named if name.endswith(_WEIGHT_SCALE)]
        weights = [parameter for name, parameter in named if not name.endswith(_WEIGHT_SCALE)]
        groups = (
            (weights, self._rates.weight_rate),
            (scales, self._rates.weight_scale_rate),
            ([self.act_scales.static], self._rates.act_scale_rate),
        )
        return [{"params": parameters, "full_rate": rate} for parameters, rate in groups if parameters]


def save_state(state: TrainingState, path: Path) -> None:
    """Writes the checkpoint in one piece."""
    write_tensors(path, state.tensors())


def load_state(state: TrainingState, path: Path) -> None:
    """Takes everything from a checkpoint of the same plan and rows."""
    state.restore(load_file(path))
