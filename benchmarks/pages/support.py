"""A support table as a matrix: one row per lowering and operator, one column per weight format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.check_backends import LOWERINGS, OPS, WEIGHTS

if TYPE_CHECKING:
    from s2p_deploy.engines.support import Finding, SupportTable

COLUMNS = ("lowering", "operator", "activations", *WEIGHTS)


@dataclass(frozen=True)
class Problem:
    """One reason why patterns do not build, and those patterns, as ``lowering operator weights``."""

    verdict: str
    detail: str
    patterns: tuple[str, ...]


def dtypes_of(table: SupportTable) -> tuple[str, ...]:
    """The dtypes that were tried, in order."""
    return tuple(dict.fromkeys(finding.dtype for finding in table.findings))


def matrix_rows(table: SupportTable, dtype: str) -> list[tuple[str, ...]]:
    """Rows of :data:`COLUMNS` in one dtype; what was not tried is empty."""
    found = {(f.pattern.lowering, f.pattern.op, f.pattern.weights): f for f in table.findings if f.dtype == dtype}
    return [
        (
            lowering,
            op,
            "none" if lowering == "float" else "int8",
            *(_cell(found.get((lowering, op, weights))) for weights in WEIGHTS),
        )
        for lowering in LOWERINGS
        for op in OPS
        if any((lowering, op, weights) in found for weights in WEIGHTS)
    ]


def problems(table: SupportTable, dtype: str) -> list[Problem]:
    """Every verdict but ``builds``, those of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for finding in table.findings:
        if finding.dtype == dtype and finding.verdict != "builds":
            pattern = f"{finding.pattern.lowering} {finding.pattern.op} {finding.pattern.weights}"
            reasons.setdefault((finding.verdict, finding.detail), []).append(pattern)
    return [Problem(verdict, detail, tuple(patterns)) for (verdict, detail), patterns in reasons.items()]


def _cell(finding: Finding | None) -> str:
    """The verdict, and of what builds the type that the backend reports for the product."""
    if finding is None:
        return ""
    known = finding.verdict == "builds" and finding.compute != "unknown"
    return f"builds, {finding.compute}" if known else finding.verdict
