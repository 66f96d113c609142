"""CalibratedModel: trained weights and scales, the plan, and the table that replaced the time path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from s2p_deploy.errors import InputError
from s2p_deploy.records.json_forms import CalibratedContent, check_plan
from s2p_deploy.records.manifest import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.packed_weights import packed_sites, read_packed_weight
from s2p_deploy.records.precision_plan import PrecisionPlan, plan_from_bytes
from s2p_deploy.records.scale_table import ScaleTable, scale_table_from_bytes
from s2p_deploy.records.simulation import Simulation, read_simulation
from s2p_deploy.records.strict import checked, reading_tensors
from s2p_deploy.records.timestep_table import TimestepTable, timestep_table_from_bytes
from s2p_deploy.records.transforms import TransformSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_WEIGHTS, _WEIGHT_SCALES, _LOW_BIT = "weights.safetensors", "weight_scales.safetensors", "low_bit.safetensors"
_PLAN, _SCALES, _TIMESTEPS = "plan.yaml", "act_scales.safetensors", "timesteps.json"


@dataclass(frozen=True)
class TimeTable:
    """Projected time features float32 [rows, P]; ``slices`` names each consumer's columns, in order, end excluded."""

    projections: NDArray[np.float32]
    slices: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class CalibratedModel:
    """A calibrated model on disk.

    Files: ``weights.safetensors`` (names as in the hot denoiser; float32, or where they are the pipeline's own in its
    dtype), ``weight_scales.safetensors`` (one float32 [out, 1, ...] per weight-quantized site),
    ``act_scales.safetensors``, ``time_table.safetensors``, ``plan.yaml``, ``timesteps.json`` and
    ``denoiser_config.json`` (the denoiser's diffusers configuration). A model with ``simulation.safetensors`` exists
    for comparison only and cannot be exported. Weights of few bits may lie packed in ``low_bit.safetensors`` in place
    of ``weights.safetensors``: they read back as codes times scale.
    """

    folder: Path
    manifest: Manifest
    plan: PrecisionPlan
    scales: ScaleTable
    timesteps: TimestepTable
    simulation: Simulation | None = None

    @staticmethod
    def open(folder: Path) -> CalibratedModel:
        """Verifies and reads a calibrated model (its tensors stay on disk until asked for)."""
        manifest = read_manifest(folder, "CalibratedModel")
        checked(CalibratedContent, manifest.content, folder / MANIFEST)
        small = verify_files(folder, manifest, keep=(_PLAN, _SCALES, _TIMESTEPS))
        plan = plan_from_bytes(small[_PLAN], folder / _PLAN)
        scales = scale_table_from_bytes(small[_SCALES], folder / _SCALES)
        check_plan(scales.points, plan.point_names(), folder / _SCALES)
        return CalibratedModel(
            folder,
            manifest,
            plan,
            scales,
            timestep_table_from_bytes(small[_TIMESTEPS], folder / _TIMESTEPS),
            read_simulation(folder / "simulation.safetensors"),
        )

    @property
    def tokens(self) -> int:
        """Number of text tokens that the denoiser was calibrated with: the sequence length of the text states."""
        return int(self.manifest.content["tokens"])

    @property
    def transforms(self) -> TransformSpec:
        """How the denoiser's modules differ from the pipeline's own."""
        return TransformSpec.from_json(self.manifest.content["transforms"])

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """All parameters and buffers of the hot denoiser but the time table, as float32."""
        packed = [_weight_name(site) for site in packed_sites(self.folder / _LOW_BIT)]
        file = self.folder / _WEIGHTS
        with reading_tensors(file), safe_open(file, "pt") as opened:
            plain = {name: _float32(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - no dictionary
        return plain | {name: self.tensor(name) for name in packed}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One of :meth:`weights`, as float32; the others are not read.

        Raises:
            InputError: there is none of that name.
        """
        packed = {_weight_name(site): site for site in packed_sites(self.folder / _LOW_BIT)}
        if name in packed:
            scale = _read(self.folder / _WEIGHT_SCALES, packed[name])
            return read_packed_weight(self.folder / _LOW_BIT, packed[name]).values(scale)
        return _read(self.folder / _WEIGHTS, name)

    def weight_scales(self) -> dict[str, NDArray[np.float32]]:
        """Weight scales by site."""
        with reading_tensors(self.folder / _WEIGHT_SCALES):
            return load_file(self.folder / _WEIGHT_SCALES)

    @property
    def added_width(self) -> int:
        """Width of what the time features depend on besides the timestep; above 0 there is no constant time table."""
        return int(self.manifest.content.get("added_cond", 0))

    def time_source(self) -> TimeTable | TimestepTable:
        """What stands for the time path: the constant table, or the timesteps, the path being among the weights."""
        return self.timesteps if self.added_width else self.time_table()

    def time_table(self) -> TimeTable:
        """The projected time features of every row."""
        file = self.folder / "time_table.safetensors"
        with reading_tensors(file):
            projections = load_file(file)["time_projections"]
        return TimeTable(projections, {k: (v[0], v[1]) for k, v in self.manifest.content["time_slices"].items()})


def parameter_name(path: str) -> str:
    """The name in the hot denoiser's state of a parameter or buffer, from its path in the network."""
    return f"network.{path}"


def _weight_name(site: str) -> str:
    return parameter_name(f"{site}.weight")


def _read(file: Path, name: str) -> NDArray[np.float32]:
    with reading_tensors(file), safe_open(file, "pt") as opened:
        if name not in opened.keys():  # noqa: SIM118 - a safetensors file is no dictionary
            raise InputError(f"{file} lacks {name}: make the calibrated model again")
        return _float32(opened.get_tensor(name))


def _float32(stored: Tensor) -> NDArray[np.float32]:
    """A copy: the stored tensor is a view of the file. Through torch, because NumPy has no bfloat16."""
    import torch

    array: NDArray[np.float32] = stored.to(torch.float32, copy=True).numpy()
    return array
