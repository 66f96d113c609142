"""What training did, from the log that a CalibratedModel keeps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from s2p_deploy.validation.figures import FIRST, SECOND, legend, svg

if TYPE_CHECKING:
    from pathlib import Path

Log = list[dict[str, Any]]


def read_training_log(folder: Path) -> Log:
    """The lines of ``training.jsonl`` of a calibrated model; none where it was not trained."""
    file = folder / "training.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def training_figures(log: Log) -> dict[str, str]:
    """Figures by name: loss, SQNR per timestep before and after, weights that oscillate. Those that the log allows."""
    iterations = [line for line in log if line["kind"] == "iteration"]
    if not iterations:
        return {}
    found = {"loss": _loss(iterations, [line for line in log if line["kind"] == "selection"])}
    found["rows"] = _rows([line for line in log if line["kind"] == "rows"])
    if "oscillating" in iterations[0]:
        found["oscillation"] = _oscillation(iterations)
    return found


def _loss(iterations: Log, selections: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        axes.semilogy([line["iteration"] for line in iterations], [line["loss"] for line in iterations], color=FIRST)
        axes.set(xlabel="iteration", ylabel="training loss")
        if selections:
            errors = axes.twinx()
            errors.plot([s["iteration"] for s in selections], [s["error"] for s in selections], "o-", color=SECOND)
            errors.set_ylabel("error of held-out trajectories")

    return svg("loss", draw)


def _rows(measured: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for line, color, label in zip(measured, (FIRST, SECOND), ("before training", "after"), strict=False):
            axes.plot(line["rows"], line["sqnr_db"], color=color, label=label)
        axes.set(xlabel="timestep", ylabel="SQNR to FP, dB")
        legend(axes)

    return svg("rows", draw)


def _oscillation(iterations: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for key, color in (("oscillating", FIRST), ("frozen", SECOND)):
            axes.plot([line["iteration"] for line in iterations], [line[key] for line in iterations], color, label=key)
        axes.set(xlabel="iteration", ylabel="weights")
        legend(axes)

    return svg("oscillation", draw)
