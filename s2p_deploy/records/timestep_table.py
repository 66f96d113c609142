"""TimestepTable: the rows of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HELD_FRACTION = 0.06  # leading-spaced schedules stop that short of the last training timestep


@dataclass(frozen=True)
class TimestepTable:
    """The rows of a model: how many, which were calibrated, and each row's noise level.

    Where the time table is constant (SD1/SD2), rows are the training timesteps, 0 to 999. ``angle`` float64 [rows] is
    atan2(sigma, alpha): finite at both ends unlike log-SNR, and increasing with the row. ``calibrated`` is ascending.
    """

    scheduler_class: str
    scheduler_config: dict[str, Any]
    steps: int
    calibrated: tuple[int, ...]
    angle: NDArray[np.float64]

    @property
    def rows(self) -> int:
        """Number of rows (training timesteps)."""
        return len(self.angle)

    @property
    def covered(self) -> tuple[int, int]:
        """First and last row that may be used: the calibrated range and at most 6 % of all rows beyond either end."""
        margin = int(HELD_FRACTION * self.rows)
        return max(0, self.calibrated[0] - margin), min(self.rows - 1, self.calibrated[-1] + margin)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "scheduler_class": self.scheduler_class,
            "scheduler_config": self.scheduler_config,
            "steps": self.steps,
            "calibrated": list(self.calibrated),
            "angle": self.angle.tolist(),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> TimestepTable:
        """Inverse of :meth:`to_json`."""
        return TimestepTable(
            scheduler_class=data["scheduler_class"],
            scheduler_config=data["scheduler_config"],
            steps=data["steps"],
            calibrated=tuple(data["calibrated"]),
            angle=np.asarray(data["angle"], dtype=np.float64),
        )


def read_timestep_table(path: Path) -> TimestepTable:
    """Reads ``timesteps.json``."""
    return TimestepTable.from_json(json.loads(path.read_text(encoding="utf-8")))


def write_timestep_table(table: TimestepTable, path: Path) -> None:
    """Writes ``timesteps.json``."""
    path.write_text(json.dumps(table.to_json()) + "\n", encoding="utf-8")
