"""``training.jsonl``: what every iteration came to, the rows before and after, and the checkpoints that were tried."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.calib.training.losses import RowErrors
    from s2p_deploy.recipe import Training

RATES = ("weight_rate", "weight_scale_rate", "act_scale_rate")


@dataclass(frozen=True)
class IterationRecord:
    """Losses before an update (``feature`` without its weight); weights frozen and flipping after it."""

    out: float
    feature: float
    frozen: float
    oscillating: float

    def loss(self, training: Training) -> float:
        """What was minimized."""
        return self.out + training.features.weight * self.feature


@dataclass(frozen=True)
class SelectionRecord:
    """The error of the held-out trajectories after ``iteration`` updates, and whether it was the best so far."""

    iteration: int
    error: float
    best: bool


@dataclass(frozen=True)
class RowRecord:
    """The errors of all rows after ``iteration`` updates."""

    iteration: int
    errors: RowErrors


def cosine(iteration: int, iterations: int) -> float:
    """Factor of every rate: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def log_text(
    training: Training,
    calibrated: Sequence[int],
    rows: Sequence[RowRecord],
    iterations: Sequence[IterationRecord],
    selections: Sequence[SelectionRecord],
) -> str:
    """The log as JSON lines in the order of events; ``kind`` is ``rows``, ``selection`` or ``iteration``."""
    lines: list[tuple[int, int, dict[str, Any]]] = []
    for row in rows:
        figures = {"rows": list(calibrated), "sqnr_db": row.errors.sqnr(), "error": row.errors.error.tolist()}
        last = row.iteration > 0  # the errors at the end are those of what was selected
        lines.append((row.iteration, 2 if last else 0, {"kind": "rows", "iteration": row.iteration, **figures}))
    for tried in selections:
        error = tried.error if math.isfinite(tried.error) else None  # JSON has no NaN
        line = {"kind": "selection", "iteration": tried.iteration, "error": error, "best": tried.best}
        lines.append((tried.iteration, 1, line))
    lines += [(number, 3, _iteration(number, record, training)) for number, record in enumerate(iterations)]
    return "".join(json.dumps(line) + "\n" for _, _, line in sorted(lines, key=lambda entry: entry[:2]))


def _iteration(number: int, record: IterationRecord, training: Training) -> dict[str, Any]:
    factor = cosine(number, training.iterations)
    line = {"kind": "iteration", "iteration": number, "loss": record.loss(training), "out_loss": record.out}
    if training.features.targets != "none":
        line["feature_loss"] = record.feature
    if training.freezing.what == "oscillation":
        line |= {"frozen": int(record.frozen), "oscillating": int(record.oscillating)}
    return line | {name: factor * getattr(training, name) for name in RATES}
