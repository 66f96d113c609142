"""ValidationReport: every number with its n, the gates, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.artifacts import Manifest, read_manifest, verify_files
from s2p_deploy.records.typed_json import Strict, parsed_json, read_json

if TYPE_CHECKING:
    from pathlib import Path

Status = Literal["passed", "failed", "not measured", "not applicable"]
Verdict = Literal["passed", "failed", "not verified"]

REPORT, MEASUREMENTS = "report.json", "measurements.json"


@dataclass(frozen=True)
class Number:
    """A value over ``n`` samples; ``low`` and ``high`` are its 95 % bootstrap interval, where it has one."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A measurement that was not made, and why."""

    reason: str


@dataclass(frozen=True)
class GateResult:
    """One gate: its ``limit``, with direction and unit in ``asks``, and the measured ``value`` over ``n`` samples.

    ``where`` names the layer, block, timestep index or CFG branch that ``value`` is of, where it is of one.
    ``not measured``: the gate applies and could not be decided here. ``not applicable``: it asks nothing of this run.
    """

    name: str
    asks: str
    value: float | None
    limit: float | None
    n: int
    status: Status
    reason: str = ""
    where: str = ""


@dataclass(frozen=True)
class ValidationReport:
    """A folder with ``report.json`` (all numbers: ``data``), ``report.html`` and ``pictures/*.png``.

    ``measurements.json`` holds what was measured, for :func:`s2p_deploy.validation.recheck`.

    Example:
        >>> report = ValidationReport.open(Path("build/report"))
        >>> report.verdict in {"passed", "failed", "not verified"}, report.html_file.name
        (True, 'report.html')
    """

    folder: Path
    manifest: Manifest
    verdict: Verdict
    gates: tuple[GateResult, ...]
    data: dict[str, Any]

    @property
    def html_file(self) -> Path:
        """Returns the file of the report's page."""
        return self.folder / "report.html"

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """Returns the gates that were not met."""
        return tuple(gate for gate in self.gates if gate.status == "failed")

    @staticmethod
    def open(folder: Path) -> ValidationReport:
        """Verifies and reads a report.

        Raises:
            InputError: there is none. IntegrityError: it was changed, or is damaged.
        """
        manifest = read_manifest(folder, "ValidationReport")
        text = verify_files(folder, manifest, keep=(REPORT,))[REPORT]
        form = read_json(_ReportForm, text, folder / REPORT)
        return ValidationReport(folder, manifest, form.verdict, tuple(form.gates), parsed_json(text, folder / REPORT))


class _ReportForm(Strict):
    """The parts of ``report.json`` that are more than numbers to show."""

    verdict: Verdict
    gates: list[GateResult]
