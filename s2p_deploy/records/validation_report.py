"""ValidationReport: every number with its n, the gates, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.records.manifest import Manifest, read_manifest, verify_files
from s2p_deploy.records.strict import Strict, parsed_json, read_as

if TYPE_CHECKING:
    from pathlib import Path

Status = Literal["passed", "failed", "not measured", "not applicable"]
Verdict = Literal["passed", "failed", "not verified"]

REPORT, MEASUREMENTS = "report.json", "measurements.json"


@dataclass(frozen=True)
class GateResult:
    """One gate: what was asked (``limit``, with its direction and unit), what was found (None: nothing), over how many.

    ``where`` names the site, block, row or CFG branch that ``value`` is of, where it is of one.
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
    """

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
        """Verifies and reads a report.

        Raises:
            InputError: there is none. IntegrityError: it was changed, or is damaged.
        """
        manifest = read_manifest(folder, "ValidationReport")
        text = verify_files(folder, manifest, keep=(REPORT,))[REPORT]
        form = read_as(_ReportForm, text, folder / REPORT)
        return ValidationReport(folder, manifest, form.verdict, tuple(form.gates), parsed_json(text, folder / REPORT))


class _ReportForm(Strict):
    """What of ``report.json`` is read as more than numbers to show."""

    verdict: Verdict
    gates: list[GateResult]
