"""ValidationReport: every number with its n, the gates, and the verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.manifest import Manifest, open_artifact

if TYPE_CHECKING:
    from pathlib import Path

Status = Literal["passed", "failed", "not measured", "not applicable"]
Verdict = Literal["passed", "failed", "not verified"]


@dataclass(frozen=True)
class GateResult:
    """One gate: what was asked (``limit``, with its direction and unit), what was found (None: nothing), over how many.

    ``not measured``: the gate applies and could not be decided here. ``not applicable``: it asks nothing of this run.
    """

    name: str
    asks: str
    value: float | None
    limit: float | None
    n: int
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class ValidationReport:
    """A folder with ``report.json`` (all numbers: ``data``), ``report.html`` and ``pictures/*.png``."""

    folder: Path
    manifest: Manifest
    verdict: Verdict
    gates: tuple[GateResult, ...]
    data: dict[str, Any]

    @property
    def html_file(self) -> Path:
        """The page to look at."""
        return self.folder / "report.html"

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """The gates that were not met."""
        return tuple(gate for gate in self.gates if gate.status == "failed")

    @staticmethod
    def open(folder: Path) -> ValidationReport:
        """Verifies and reads a report."""
        manifest = open_artifact(folder, "ValidationReport")
        data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        gates = tuple(GateResult(**item) for item in data["gates"])
        return ValidationReport(folder, manifest, data["verdict"], gates, data)
