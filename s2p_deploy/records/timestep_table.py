"""TimestepTable: the rows of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.records.json_forms import TimestepForm
from s2p_deploy.records.strict import parsed_json, read_as

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HELD_FRACTION = 0.06  # leading-spaced schedules stop that short of the last training timestep


@dataclass(frozen=True)
class TimestepTable:
    """The rows of a model: how many, which were calibrated, and each row's noise level.

    The first rows are the training timesteps, 0 to 999. ``angle`` float64 [training timesteps] is atan2(sigma, alpha):
    finite at both ends unlike log-SNR, and increasing with the timestep. For ``flow_matching`` it is sigma itself, in
    [0, 1] and of the timesteps 0 to 1000, which have no rows of their own. ``calibrated`` are the calibrated timesteps,
    ascending, and so are their rows: where ``fractional`` holds whole timesteps too, those of a schedule that mixes
    both, it holds all rows.

    ``fractional`` float64 [n], ascending, are the timesteps of the rows that follow: those of a calibrated schedule,
    and of the schedules that an engine of the input form is bound to, as far as they have no row yet. None says that
    there can be none: the time table is constant.
    """

    scheduler_class: str
    scheduler_config: dict[str, Any]
    steps: int
    calibrated: tuple[float, ...]
    angle: NDArray[np.float64]
    flow_matching: bool = False
    fractional: NDArray[np.float64] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.training_rows + (0 if self.fractional is None else len(self.fractional))

    @property
    def training_rows(self) -> int:
        """Number of rows of training timesteps, which come first."""
        mixed = self.fractional is not None and bool((self.fractional == np.rint(self.fractional)).any())
        return 0 if self.flow_matching or mixed else len(self.angle)

    @property
    def timesteps(self) -> NDArray[np.float64]:
        """Every row's timestep, float64 [rows]."""
        training = np.arange(self.training_rows, dtype=np.float64)
        return training if self.fractional is None else np.concatenate([training, self.fractional])

    @property
    def calibrated_rows(self) -> tuple[int, ...]:
        """The rows of the calibrated timesteps."""
        rows = {timestep: row for row, timestep in enumerate(self.timesteps.tolist())}
        return tuple(rows[timestep] for timestep in self.calibrated)

    @property
    def covered(self) -> tuple[float, float]:
        """First and last timestep that may be used: the calibrated range and at most 6 % of all beyond either end."""
        training = len(self.angle)
        margin = int(HELD_FRACTION * training)
        return max(0, self.calibrated[0] - margin), min(training - 1, self.calibrated[-1] + margin)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        fractional = {} if self.fractional is None else {"fractional": self.fractional.tolist()}
        return {
            "scheduler_class": self.scheduler_class,
            "scheduler_config": self.scheduler_config,
            "steps": self.steps,
            "calibrated": list(self.calibrated),
            "angle": self.angle.tolist(),
            "flow_matching": self.flow_matching,
        } | fractional

    @staticmethod
    def from_json(data: dict[str, Any]) -> TimestepTable:
        """Inverse of :meth:`to_json`."""
        return TimestepTable(
            scheduler_class=data["scheduler_class"],
            scheduler_config=data["scheduler_config"],
            steps=data["steps"],
            calibrated=tuple(data["calibrated"]),
            angle=np.asarray(data["angle"], dtype=np.float64),
            flow_matching=data.get("flow_matching", False),
            fractional=np.asarray(data["fractional"], dtype=np.float64) if "fractional" in data else None,
        )


def read_timestep_table(path: Path) -> TimestepTable:
    """Reads ``timesteps.json``. Raises IntegrityError where it is no table of timesteps."""
    return timestep_table_from_bytes(path.read_bytes(), path)


def timestep_table_from_bytes(data: bytes, path: Path) -> TimestepTable:
    """The same for the bytes of the file at ``path``."""
    read_as(TimestepForm, data, path)
    return TimestepTable.from_json(parsed_json(data, path))


def write_timestep_table(table: TimestepTable, path: Path) -> None:
    """Writes ``timesteps.json``."""
    path.write_text(json.dumps(table.to_json()) + "\n", encoding="utf-8")
