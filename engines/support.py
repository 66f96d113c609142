"""What a backend's installed version takes: verdicts on patterns, found by building them (``doctor --probe``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Verdict = Literal["builds", "fails", "crashes", "wrong", "unknown"]

_FIRST_OF_SEVERAL: tuple[Verdict, ...] = ("crashes", "wrong", "fails", "unknown", "builds")


@dataclass(frozen=True)
class Pattern:
    """A quantized (or floating) product as a backend sees it.

    ``lowering`` is one of the exported graph's, ``rescale``, ``runtime_q``, ``static`` or ``float``, or one of those
    that the probe tries besides (:mod:`s2p_deploy.engines.probe.patterns`). ``op`` is ``conv`` or ``matmul``;
    ``weights`` are ``int8`` or ``int4`` (per output channel), ``int4_block`` or ``none``; ``activations`` are ``int8``
    or ``none``.
    """

    lowering: str
    op: str
    weights: str
    activations: str


@dataclass(frozen=True)
class Finding:
    """What became of one pattern in one dtype.

    ``detail`` is the first line of the error (empty where it builds), ``compute`` the type that the backend reports for
    the product (``unknown`` where it reports none).
    """

    pattern: Pattern
    dtype: str
    verdict: Verdict
    detail: str
    compute: str


@dataclass(frozen=True)
class Support:
    """Verdicts on the patterns of one version of a backend; a pattern that was never tried is ``unknown``.

    ``loses_int8`` are patterns that build, but whose product the backend reports in floating point where it computes
    the same operator with constant scales and INT8 weights in INT8.
    """

    version: str
    verdicts: Mapping[Pattern, Verdict]
    loses_int8: frozenset[Pattern] = frozenset()

    def takes(self, pattern: Pattern) -> bool:
        """Whether it builds, and where the backend executes here, also computes the right values."""
        return self.verdicts.get(pattern, "unknown") == "builds"


def support_of(backend: str) -> Support:
    """What the installed version of a backend takes.

    From the probe's result in the user's cache, else from the table that ships for this version and platform; with
    neither, everything is ``unknown``.

    Raises:
        InputError: there is no backend of that name.
    """
    from s2p_deploy.engines.support_tables import find_table, key_of

    key = key_of(backend)
    table = find_table(key)
    if table is None:
        return Support(key.version, {})
    return Support(key.version, folded(table.findings), frozenset(_losing_int8(table.findings)))


def folded(findings: Iterable[Finding]) -> dict[Pattern, Verdict]:
    """One verdict per pattern: it builds only if it builds in every dtype that was tried."""
    verdicts: dict[Pattern, Verdict] = {}
    for finding in findings:
        both = {verdicts.get(finding.pattern, finding.verdict), finding.verdict}
        verdicts[finding.pattern] = next(verdict for verdict in _FIRST_OF_SEVERAL if verdict in both)
    return verdicts


def _losing_int8(findings: Iterable[Finding]) -> Iterator[Pattern]:
    compute = {(finding.pattern, finding.dtype): finding.compute for finding in findings}
    for (pattern, dtype), kind in compute.items():
        quantized = pattern.activations == "int8" and pattern.weights != "none"
        best = compute.get((Pattern("static", pattern.op, "int8", "int8"), dtype))
        if quantized and best == "int8" and kind != "int8":
            yield pattern
