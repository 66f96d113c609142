"""How tests run commands, and what the small chain of artifacts consists of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

QUICK = (
    "dataset.prompts=2",
    "dataset.samples_per_prompt=5",
    "dataset.width=2",
    "sampling.steps=5",
    "training.iterations=2",
    "training.batch=2",
    "scales.latents=2",
    "validation.pictures=2",
    "validation.latents=4",
)
PROMPTS = (
    "a large red circle at the top left, white background\na small blue square at the top right, gray background\n"
)


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        parsed = json.loads(self.out)
        assert isinstance(parsed, dict)
        return parsed


class Run(Protocol):
    """Runs the command line in this process."""

    def __call__(self, *arguments: object) -> Finished: ...


@dataclass(frozen=True)
class Chain:
    """Folders of one calibrated model, its graph and its engine."""

    prompts: Path
    calib: Path
    graph: Path
    engine: Path

    def folder_of(self, kind: str) -> Path:
        return self.calib / "dataset" if kind == "dataset" else Path(getattr(self, kind))


def quick_settings(*more: str) -> list[str]:
    """``--set`` options of a run that takes seconds."""
    return [part for setting in (*QUICK, *more) for part in ("--set", setting)]
