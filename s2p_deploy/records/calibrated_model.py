"""CalibratedModel: trained weights and scales, the plan, and the table that replaced the time path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from s2p_deploy.records.manifest import Manifest, open_artifact
from s2p_deploy.records.precision_plan import PrecisionPlan, read_plan
from s2p_deploy.records.scale_table import ScaleTable, read_scale_table
from s2p_deploy.records.timestep_table import TimestepTable, read_timestep_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class TimeTable:
    """Projected time features float32 [rows, P]; ``slices`` names each consumer's columns, in order, end excluded."""

    projections: NDArray[np.float32]
    slices: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class CalibratedModel:
    """A calibrated model on disk.

    Files: ``weights.safetensors`` (float32, names as in the hot denoiser), ``weight_scales.safetensors`` (one float32
    [out, 1, ...] per weight-quantized site), ``act_scales.safetensors``, ``time_table.safetensors``,
    ``plan.yaml``, ``timesteps.json`` and ``denoiser_config.json`` (the denoiser's diffusers configuration).
    """

    folder: Path
    manifest: Manifest
    plan: PrecisionPlan
    scales: ScaleTable
    timesteps: TimestepTable

    @staticmethod
    def open(folder: Path) -> CalibratedModel:
        """Verifies and reads a calibrated model (its tensors stay on disk until asked for)."""
        manifest = open_artifact(folder, "CalibratedModel")
        return CalibratedModel(
            folder,
            manifest,
            read_plan(folder / "plan.yaml"),
            read_scale_table(folder / "act_scales.safetensors"),
            read_timestep_table(folder / "timesteps.json"),
        )

    @property
    def tokens(self) -> int:
        """Number of text tokens that the denoiser was calibrated with: the sequence length of the text states."""
        return int(self.manifest.content["tokens"])

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """All parameters and buffers of the hot denoiser but the time table."""
        return load_file(self.folder / "weights.safetensors")

    def weight_scales(self) -> dict[str, NDArray[np.float32]]:
        """Weight scales by site."""
        return load_file(self.folder / "weight_scales.safetensors")

    def time_table(self) -> TimeTable:
        """The projected time features of every row."""
        projections = load_file(self.folder / "time_table.safetensors")["time_projections"]
        return TimeTable(projections, {k: (v[0], v[1]) for k, v in self.manifest.content["time_slices"].items()})
