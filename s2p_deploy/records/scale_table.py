"""TimestepTable and ScaleTable: the timestep indices of a model, and its activation scales at each of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator, with_config
from safetensors.numpy import load, save_file

from s2p_deploy.errors import InputError
from s2p_deploy.records.typed_json import OPEN, Name, array_of, json_data, read_json

if TYPE_CHECKING:
    from pathlib import Path

SCALES_FILE, TIMESTEPS_FILE = "act_scales.safetensors", "timesteps.json"

CLAMPED_FRACTION = 0.06  # leading-spaced schedules stop that short of the last training timestep

_Timestep = Annotated[float, Field(ge=0)]
_Angles = Annotated[
    list[Annotated[float, Field(ge=0, le=math.pi / 2)]],
    Field(min_length=1, max_length=100_000),
]
_Fractional = Annotated[list[_Timestep], Field(max_length=100_000)]


@with_config(OPEN)
@dataclass(frozen=True)
class TimestepTable:
    """Timesteps by timestep index: which of them were calibrated, and the noise level of the training timesteps.

    Args:
        scheduler_class: diffusers' class of the calibrated scheduler.
        scheduler_config: its configuration.
        steps: number of steps that it was calibrated with.
        calibrated: the calibrated timesteps, ascending, and so are their indices.
        angle: float64 [training timesteps], atan2(sigma, alpha): finite at both ends unlike log-SNR, and increasing
            with the timestep. For ``flow_matching`` sigma itself, in [0, 1], of the timesteps 0 to 1000.
        flow_matching: the training timesteps have no indices then, only those in ``fractional``.
        fractional: float64 [n], ascending. The training timesteps 0 to 999 are their own indices; these timesteps have
            the indices that follow: those of a calibrated schedule, and of the schedules that an engine with the time
            table as an input is bound to. A schedule that mixes integer and fractional timesteps has all of them here,
            and the training timesteps have no indices. None where there can be none: the time table is constant.

    Example:
        >>> timesteps = Engine.open(Path("build/engine")).timesteps
        >>> timesteps.scheduler_class, timesteps.steps, timesteps.calibrated[:2]
        ('PNDMScheduler', 50, (1.0, 21.0))
    """

    scheduler_class: Name
    scheduler_config: dict[str, Any]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    calibrated: Annotated[tuple[_Timestep, ...], Field(min_length=1)]
    angle: Annotated[NDArray[np.float64], array_of(_Angles)]
    flow_matching: bool = False
    fractional: Annotated[NDArray[np.float64], array_of(_Fractional)] | None = None

    @model_validator(mode="after")
    def _check_read(self) -> TimestepTable:
        fractional = [] if self.fractional is None else self.fractional.tolist()
        if sorted(set(fractional)) != fractional:
            raise ValueError("fractional timesteps must be ascending")
        if sorted(set(self.calibrated)) != list(self.calibrated):
            raise ValueError("calibrated timesteps must be ascending")
        if not set(self.calibrated) <= set(self.timesteps.tolist()):
            raise ValueError("calibrated timesteps must be within the table")
        if (np.diff(self.angle) < 0).any():
            raise ValueError("angles must be ascending")
        return self

    def __len__(self) -> int:
        """Number of timestep indices."""
        return self.integer_indices + (0 if self.fractional is None else len(self.fractional))

    @property
    def integer_indices(self) -> int:
        """Number of training timesteps that are their own indices; those come first. 0 where none is."""
        mixed = self.fractional is not None and bool((self.fractional == np.rint(self.fractional)).any())
        return 0 if self.flow_matching or mixed else len(self.angle)

    @property
    def training_timesteps(self) -> int:
        """Number of timesteps that the network was trained with."""
        return len(self.angle) - int(self.flow_matching)  # whose levels begin with that of no noise

    @property
    def timesteps(self) -> NDArray[np.float64]:
        """Returns the timestep of every index, float64 [timesteps]."""
        training = np.arange(self.integer_indices, dtype=np.float64)
        return training if self.fractional is None else np.concatenate([training, self.fractional])

    @property
    def calibrated_indices(self) -> tuple[int, ...]:
        """Returns the timestep indices of the calibrated timesteps."""
        indices = {timestep: index for index, timestep in enumerate(self.timesteps.tolist())}
        return tuple(indices[timestep] for timestep in self.calibrated)

    @property
    def covered(self) -> tuple[float, float]:
        """Returns the first and last usable timestep: the calibrated range and at most 6 % beyond either end."""
        training = len(self.angle)
        margin = int(CLAMPED_FRACTION * training)
        return max(0, self.calibrated[0] - margin), min(training - 1, self.calibrated[-1] + margin)


def write_timestep_table(table: TimestepTable, path: Path) -> None:
    """Writes ``timesteps.json``."""
    path.write_text(json.dumps(json_data(table)) + "\n", encoding="utf-8")


def read_timestep_table(path: Path) -> TimestepTable:
    """Reads ``timesteps.json``. Raises IntegrityError where it is no table of timesteps."""
    return timestep_table_from_bytes(path.read_bytes(), path)


def timestep_table_from_bytes(data: bytes, path: Path) -> TimestepTable:
    """Reads the bytes of the file at ``path`` as :func:`read_timestep_table` does."""
    return read_json(TimestepTable, data, path)


@dataclass(frozen=True)
class ScaleTable:
    """Activation scales float32 [timesteps, quantizers]; column ``i`` belongs to ``quantizers[i]``.

    ``calibrated`` lists the timestep indices that were calibrated; the others were interpolated (or clamped, beyond the
    ends).

    Example:
        >>> table = ScaleTable(np.asarray([[0.1], [0.4]], np.float32), ("conv_in",), calibrated=(0, 1))
        >>> table.reference_scales.round(3).tolist()
        [0.20000000298023224]
    """

    scales: NDArray[np.float32]
    quantizers: tuple[str, ...]
    calibrated: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.scales.dtype != np.float32 or self.scales.ndim != 2 or self.scales.shape[1] != len(self.quantizers):
            raise InputError(
                f"a scale table must be float32 [timesteps, {len(self.quantizers)}],"
                f" got {self.scales.dtype} {self.scales.shape}"
            )
        bad = ~(np.isfinite(self.scales) & (self.scales > 0))
        if bad.any():
            index, column = (int(places[0]) for places in np.nonzero(bad))
            raise InputError(
                f"scale table: {self.quantizers[column]} at timestep index {index} is {self.scales[index, column]};"
                " scales must be finite and above zero"
            )

    @property
    def reference_scales(self) -> NDArray[np.float32]:
        """Computes the constant c of every column, float32 [quantizers]: sqrt(min * max) over the timesteps."""
        if not len(self.quantizers):
            return np.ones(0, np.float32)
        products: NDArray[np.float64] = self.scales.min(0).astype(np.float64) * self.scales.max(0)
        return np.sqrt(products).astype(np.float32)


def write_scale_table(table: ScaleTable, path: Path) -> None:
    """Writes ``act_scales.safetensors``."""
    tensors: dict[str, NDArray[Any]] = {
        "act_scales": table.scales,
        "calibrated": np.asarray(table.calibrated, dtype=np.int64),
    }
    save_file(tensors, path, metadata={"quantizers": "\n".join(table.quantizers)})


def read_scale_table(path: Path) -> ScaleTable:
    """Reads and checks ``act_scales.safetensors``.

    Raises:
        InputError: it is no scale table, or a scale is zero, negative, infinite or NaN.
    """
    try:
        return scale_table_from_bytes(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} is no scale table") from error


def scale_table_from_bytes(data: bytes, path: Path) -> ScaleTable:
    """Reads the bytes of the file at ``path`` as :func:`read_scale_table` does."""
    from safetensors import SafetensorError

    try:
        tensors = load(data)  # checks the header, its length and every tensor's bounds
        scales, calibrated = tensors["act_scales"], tensors["calibrated"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no scale table ({type(error).__name__})") from error
    if (
        calibrated.dtype != np.int64
        or calibrated.ndim != 1
        or not ((calibrated >= 0) & (calibrated < len(scales))).all()
    ):
        raise InputError(f"{path} is no scale table: its calibrated indices must be int64 and within the table")
    names = header.get("__metadata__", {}).get("quantizers", "")
    return ScaleTable(scales, tuple(names.split("\n")) if names else (), tuple(int(index) for index in calibrated))
