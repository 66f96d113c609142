"""CalibratedModel: trained weights and scales, the plan, and the table that replaced the time path."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt, with_config
from safetensors.numpy import load_file

from s2p_deploy.errors import InputError
from s2p_deploy.records.artifacts import MANIFEST, Manifest, read_manifest, verify_files
from s2p_deploy.records.exported_graph import Width
from s2p_deploy.records.precision_plan import PLAN_FILE, PrecisionPlan, check_columns, plan_from_bytes
from s2p_deploy.records.scale_table import (
    SCALES_FILE,
    TIMESTEPS_FILE,
    ScaleTable,
    TimestepTable,
    scale_table_from_bytes,
    timestep_table_from_bytes,
)
from s2p_deploy.records.tensor_file import TensorFile
from s2p_deploy.records.typed_json import OPEN, Dimension, Name, read_value, reading_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_WEIGHTS, _WEIGHT_SCALES = "weights.safetensors", "weight_scales.safetensors"


@with_config(OPEN)
@dataclass(frozen=True)
class TransformSpec:
    """Rewrites of module paths, applied in this order; all are exact in floating point.

    ``split`` maps a convolution to the number of its leading input channels: it becomes ``<path>.head`` and
    ``<path>.skip``. ``smoothed`` are linears that became ``<path>.layer`` behind a division by ``<path>.factor``;
    ``shifted`` are layers that became ``<path>.layer`` behind a subtraction of ``<path>.shift``; ``shifted_norms`` maps
    norms, whose bias the same subtraction went into, to the layers that read them.
    """

    split: dict[str, PositiveInt] = field(default_factory=dict)
    smoothed: tuple[Name, ...] = ()
    shifted: tuple[Name, ...] = ()
    shifted_norms: dict[Name, tuple[Name, ...]] = field(default_factory=dict)

    @property
    def shifts(self) -> tuple[str, ...]:
        """Lists the paths that have a ``shift``: shifted layers, then norms."""
        return (*self.shifted, *self.shifted_norms)


@dataclass(frozen=True)
class TimeTable:
    """Projected time features float32 [timesteps, P]; ``slices`` names each consumer's columns, end excluded."""

    projections: NDArray[np.float32]
    slices: dict[str, tuple[int, int]]


@with_config(OPEN)
@dataclass(frozen=True, kw_only=True)
class CalibratedContent:
    """The model's own part of its manifest.

    ``tokens`` is the number of text tokens that the denoiser was calibrated with (the sequence length of the text
    states); ``time_slices`` each consumer's columns of the projected time features; ``added_width`` the width of what
    those depend on besides the timestep (above 0 there is no constant time table); ``transforms`` how the denoiser's
    modules differ from the pipeline's own; ``research`` what of a model made for a comparison no engine can run, in
    words (empty for every other model).
    """

    tokens: Annotated[int, Field(ge=1, le=2**20)]
    time_slices: dict[str, tuple[Dimension, Dimension]]
    transforms: TransformSpec
    added_width: Width = 0
    research: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibratedModel(CalibratedContent):
    """A calibrated model on disk.

    Files: ``weights.safetensors`` (names as in the indexed denoiser; float32, or where they are the pipeline's own in
        its dtype), ``weight_scales.safetensors`` (one float32 [out, 1, ...] per weight-quantized layer),
        ``act_scales.safetensors``, ``time_table.safetensors``, ``plan.yaml``, ``timesteps.json`` and
        ``denoiser_config.json`` (the denoiser's diffusers configuration).

    Example:
        >>> model = CalibratedModel.open(Path("build/calib"))
        >>> model.manifest.recipe["name"], model.timesteps.steps
        ('ptq-stream', 50)
    """

    folder: Path
    manifest: Manifest
    plan: PrecisionPlan
    scales: ScaleTable
    timesteps: TimestepTable

    @staticmethod
    def open(folder: Path) -> CalibratedModel:
        """Verifies and reads a calibrated model; its tensors stay on disk.

        Raises:
            InputError: there is none, or its plan or scales are none. IntegrityError: it was changed, or is damaged.
        """
        manifest = read_manifest(folder, "CalibratedModel")
        content = read_value(CalibratedContent, manifest.content, folder / MANIFEST)
        small = verify_files(folder, manifest, keep=(PLAN_FILE, SCALES_FILE, TIMESTEPS_FILE))
        plan = plan_from_bytes(small[PLAN_FILE], folder / PLAN_FILE)
        scales = scale_table_from_bytes(small[SCALES_FILE], folder / SCALES_FILE)
        check_columns(scales, plan, folder / SCALES_FILE)
        return CalibratedModel(
            **vars(content),
            folder=folder,
            manifest=manifest,
            plan=plan,
            scales=scales,
            timesteps=timestep_table_from_bytes(small[TIMESTEPS_FILE], folder / TIMESTEPS_FILE),
        )

    @cached_property
    def _weights(self) -> TensorFile:
        return TensorFile(self.folder / _WEIGHTS)

    def require_deployable(self) -> None:
        """Raises InputError where the model was made for a comparison that no engine can run."""
        if self.research:
            raise InputError(
                f"{self.folder} was made for comparison only: no engine has {self.research}; calibrate without"
            )

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Reads all parameters and buffers of the indexed denoiser but the time table, as float32."""
        return {name: self.tensor(name) for name in self._weights.names}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads one of :meth:`weights`, as float32; the others are not read.

        Raises:
            InputError: there is none of that name.
        """
        import torch

        # through torch, because NumPy has no bfloat16
        array: NDArray[np.float32] = self._weights.read(name).to(torch.float32).numpy()
        return array

    def weight_scales(self) -> dict[str, NDArray[np.float32]]:
        """Weight scales by layer."""
        with reading_tensors(self.folder / _WEIGHT_SCALES):
            return load_file(self.folder / _WEIGHT_SCALES)

    def denoiser_config(self) -> dict[str, Any]:
        """Reads the denoiser's diffusers configuration.

        Raises:
            InputError: it cannot be read.
        """
        file = self.folder / "denoiser_config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as JSON: make the calibrated model again") from error
        return config

    def time_source(self) -> TimeTable | TimestepTable:
        """Returns the constant time table, or the timesteps where the time path is among the weights."""
        return self.timesteps if self.added_width else self.time_table()

    def time_table(self) -> TimeTable:
        """Reads the projected time features of every timestep."""
        file = self.folder / "time_table.safetensors"
        with reading_tensors(file):
            projections = load_file(file)["time_projections"]
        return TimeTable(projections, self.time_slices)


def parameter_name(path: str) -> str:
    """Returns the name in the indexed denoiser's state of a parameter or buffer, from its path in the network."""
    return f"network.{path}"
