"""What a training is given beside its state and dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from s2p_deploy.calib.training.selection import HeldOut
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.recipe import Training


@dataclass(frozen=True)
class TrainingSetting:
    """The recipe's section and what its choices need; the rest may stay None.

    ``noise_levels`` float64 [rows], sigma over alpha (sigma for flow matching), for the loss ``sampler``; ``influence``
    float32 [calibrated rows] from :func:`row_influence` for ``trajectory``; ``teacher`` for feature losses, the
    floating-point denoiser with the module paths of the trained one; ``sensitive`` names the sites of
    ``features.targets: sensitive``; ``sensitivities`` by site for ``freezing.what: layers``; ``held_out`` where
    ``selection.prompts`` is not 0.
    ``device`` decides the bits, as the number of threads does.

    Raises:
        InputError: the recipe asks for something that was not given, or for two things that exclude each other.
    """

    training: Training
    guidance_scale: float
    noise_levels: Tensor | None = None
    influence: Tensor | None = None
    teacher: HotDenoiser | None = None
    sensitive: tuple[str, ...] = ()
    sensitivities: Mapping[str, float] | None = None
    held_out: HeldOut | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        training = self.training
        targets, freezing = training.features.targets, training.freezing.what
        for asked, given, key, need in (
            (training.loss == "sampler", self.noise_levels is not None, "loss: sampler", "the rows' noise levels"),
            (training.loss == "trajectory", self.influence is not None, "loss: trajectory", "measured influences"),
            (targets != "none", self.teacher is not None, f"features.targets: {targets}", "a teacher"),
            (targets == "sensitive", bool(self.sensitive), f"features.targets: {targets}", "sensitive sites"),
            (freezing == "layers", bool(self.sensitivities), "freezing.what: layers", "mixed.sensitivity"),
            (training.selection.prompts > 0, self.held_out is not None, "selection.prompts", "held-out prompts"),
        ):
            if asked and not given:
                raise InputError(f"recipe training.{key} needs {need}")
        if training.adapter_rank and freezing == "oscillation":
            raise InputError("recipe training.adapter_rank has no codes to freeze: set training.freezing.what: none")
