"""The loss of a batch: outputs against the teacher's stored answers, features against the teacher's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.training.features import feature_loss, feature_targets, tapped
from s2p_deploy.calib.training.losses import batch_errors

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training.batches import Batch
    from s2p_deploy.calib.training.setting import TrainingSetting
    from s2p_deploy.calib.training.state import TrainingState
    from s2p_deploy.families import HotDenoiser


class Objective:
    """L = L_out + weight * L_features; ``weights`` float32 [calibrated rows] multiply the errors of L_out.

    Losses and scales are float32 in every recipe; ``precision`` is that of the denoiser's arithmetic.
    """

    def __init__(self, setting: TrainingSetting, state: TrainingState, weights: Tensor) -> None:
        self.setting, self.state = setting, state
        self.weights = weights.to(setting.device)
        self.targets = feature_targets(setting, state.denoiser.hot)
        self.teacher = setting.teacher if self.targets else None
        if self.teacher is not None:
            self.teacher.to(setting.device)

    def add_gradients(self, batch: Batch, share: float) -> tuple[float, float]:
        """Adds the gradients of ``share`` times the batch's loss; returns L_out and L_features, without its weight."""
        wanted = self._teacher_features(batch)

        def learn(hot: HotDenoiser) -> tuple[Tensor, Tensor]:
            with tapped(hot, self.targets) as found, self._precision():
                output = hot(*batch.inputs())
            errors = batch_errors(output, batch.target, self.setting)
            out = (errors * self.weights[batch.index[: len(errors)]]).mean()
            features = self.setting.training.features
            feature = feature_loss(found, wanted, relative=features.relative) if wanted else out.new_zeros(())
            (share * (out + features.weight * feature)).backward()
            return out.detach(), feature.detach()

        # A recomputed forward pass needs the grids again, so the backward pass is inside too.
        out, feature = self.state.denoiser.within(self.state.act_scales(batch.index), learn)
        return float(out), float(feature)

    @torch.no_grad()
    def _teacher_features(self, batch: Batch) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        with tapped(self.teacher, self.targets) as wanted, self._precision():
            self.teacher(*batch.inputs())
        return wanted

    def _precision(self) -> torch.autocast:
        half = self.setting.training.precision == "bf16"
        return torch.autocast(self.setting.device.type, torch.bfloat16, enabled=half)
