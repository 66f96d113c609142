"""Gates: limits that the recipe fixed before the run, and the verdict. Nothing that is not a number ever passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.records import GateResult
from s2p_deploy.validation.latents import branch_of
from s2p_deploy.validation.numbers import Skipped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records.validation_report import Verdict
    from s2p_deploy.validation.measurements import BlockAgreement, Measurements, TableGap

_OFF = "switched off in the recipe"
_FLOAT = "nothing is quantized"
_PART = "dB at least, above what quantization leaves"


def judge(found: Measurements, gates: Gates) -> tuple[GateResult, ...]:
    """The result of every gate."""
    least = -math.inf if found.graph_half else gates.block_sqnr  # its arithmetic is fake-quant's, node by node
    return (
        *_table_gates(found, gates),
        *_code_gates(found, gates),
        _block_gate("blocks of the graph", found.graph_blocks, found, gates, half=found.graph_half, least=least),
        _block_gate("blocks of the engine", found.engine_blocks, found, gates, half=found.engine_half),
        _site_gate(found, gates),
        *_end_to_end_gates(found, gates),
        *_picture_gates(found, gates),
    )


def verdict_of(results: Iterable[GateResult]) -> Verdict:
    """``failed`` where a gate failed, ``not verified`` where one could not be measured or none applied."""
    statuses = {result.status for result in results}
    if "failed" in statuses:
        return "failed"
    return "passed" if "passed" in statuses and "not measured" not in statuses else "not verified"


def _table_gates(found: Measurements, gates: Gates) -> tuple[GateResult, ...]:
    """One for each table; a scale table is in float32 and copied, so it is asked to be equal."""
    return tuple(_table_gate(table, gates) for table in found.tables)


def _table_gate(table: TableGap, gates: Gates) -> GateResult:
    limit = gates.table_difference_half if table.half else gates.table_difference_fp32
    limit = gates.scale_difference if table.kind == "scales" else limit
    asks = "relative difference at most"
    if not table.n:
        return _not_applicable(table.table, asks, limit, "it has no columns")
    where = table.where if table.difference else ""  # of no difference, no place is the worst
    return _at_most(table.table, asks, table.difference, limit, table.n, where)


def _code_gates(found: Measurements, gates: Gates) -> tuple[GateResult, GateResult]:
    share = ("codes that differ, worst act point", "fraction at most")
    size = ("largest code difference", "LSB at most")
    limit = gates.site_code_mismatch_fp16 if found.graph_half else gates.site_code_mismatch_fp32
    largest_limit = gates.site_code_max_lsb
    points = found.points
    if isinstance(points, Skipped):
        return _not_measured(*share, limit, points), _not_measured(*size, largest_limit, points)
    if not points:
        reason = "no activation is quantized"
        return _not_applicable(*share, limit, reason), _not_applicable(*size, largest_limit, reason)
    codes = sum(point.n for point in points)
    worst = points[_lowest([-point.mismatch for point in points])]
    largest = max(points, key=lambda point: point.max_lsb)
    return (
        _at_most(*share, worst.mismatch, limit, codes, worst.point),
        _at_most(*size, largest.max_lsb, largest_limit, codes, largest.point),
    )


def part_limit(quantization: float | None, margin: float, gates: Gates, *, half: bool) -> float:
    """The SQNR in dB that is asked of a part (a block, a site) of which quantization alone leaves ``quantization``.

    ``margin`` above that: the part's own error is then small against quantization's. Where nothing is quantized, what
    the arithmetic gives. Half precision cannot give more than ``block_sqnr_half`` of anything.
    """
    arithmetic = gates.block_sqnr_half if half else gates.block_sqnr
    if quantization is None:
        return arithmetic
    return min(quantization + margin, arithmetic) if half else quantization + margin


def _block_gate(
    name: str,
    blocks: tuple[BlockAgreement, ...] | Skipped,
    found: Measurements,
    gates: Gates,
    *,
    half: bool,
    least: float = -math.inf,
) -> GateResult:
    costs = {error.block: error.quantization for error in found.block_errors}
    if isinstance(blocks, Skipped):
        return _not_measured(f"{name}, worst SQNR", _PART, gates.block_sqnr, blocks)
    parts = [_Part(block.block, block.sqnr, costs.get(block.block), block.n) for block in blocks]
    limits = [max(least, part_limit(part.quantization, gates.block_margin, gates, half=half)) for part in parts]
    return _part_gate(f"{name}, worst SQNR", parts, limits, gates)


def _site_gate(found: Measurements, gates: Gates) -> GateResult:
    name, sites = "sites of the engine, worst SQNR", found.engine_sites
    if isinstance(sites, Skipped):
        # its blocks and latents are judged all the same: this one says which site
        return _not_applicable(name, _PART, gates.block_sqnr, sites.reason)
    parts = [_Part(site.site, site.sqnr, site.quantization, site.n) for site in sites]
    limits = [part_limit(part.quantization, gates.site_margin, gates, half=found.engine_half) for part in parts]
    return _part_gate(name, parts, limits, gates)


@dataclass(frozen=True)
class _Part:
    name: str
    sqnr: float
    quantization: float | None
    n: int


def _part_gate(name: str, parts: Sequence[_Part], limits: Sequence[float], gates: Gates) -> GateResult:
    """Of the part that is furthest below its limit, or least above."""
    if not parts:
        return _not_applicable(name, _PART, gates.block_sqnr, "there are none")
    index = _lowest([part.sqnr - limit for part, limit in zip(parts, limits, strict=True)])
    worst = parts[index]
    return _at_least(name, _PART, worst.sqnr, limits[index], worst.n, worst.name)


def _end_to_end_gates(found: Measurements, gates: Gates) -> tuple[GateResult, ...]:
    return (
        _change_gate(found, gates),
        _branch_gate(found, gates),
        _latent_gate(found, gates),
        _guidance_gate(found, gates),
    )


def _branch_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "error of its own, worse CFG branch", "dB below quantization's at least", gates.branch_margin
    if not found.quantized:
        return _not_applicable(name, asks, limit, _FLOAT)
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    room = found.end_to_end.room
    medians = [float(np.median(room[branch::2])) for branch in range(2)]
    worse = _lowest(medians)
    return _at_least(name, asks, medians[worse], limit, len(room[worse::2]), branch_of(worse))


def _latent_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "error of its own, worst latent", "dB below quantization's at least", gates.latent_margin
    if not found.quantized:
        return _not_applicable(name, asks, limit, _FLOAT)
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    room = found.end_to_end.room
    worst = _lowest(room.tolist())
    where = f"row {found.end_to_end.rows[worst]}, {branch_of(worst)}"
    return _at_least(name, asks, float(room[worst]), limit, len(room), where)


def _guidance_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "guidance, engine against fake-quant, median SQNR", "dB at least", gates.guidance_sqnr
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    guidance = found.end_to_end.guidance
    if guidance is None:
        return _not_measured(name, asks, limit, Skipped("measured by an earlier version"))
    return _at_least(name, asks, float(np.median(guidance)), limit, len(guidance), "difference of the CFG branches")


def _change_gate(found: Measurements, gates: Gates) -> GateResult:
    limit = gates.sqnr_to_fp_change_half if found.engine_half else gates.sqnr_to_fp_change_fp32
    name, asks = "SQNR to FP, engine less fake-quant", "dB of change at most"
    if not found.quantized:
        return _not_applicable(name, asks, limit, _FLOAT)
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    change = found.end_to_end.change
    return _at_most(name, asks, abs(float(np.mean(change))), limit, len(change))


def _picture_gates(found: Measurements, gates: Gates) -> tuple[GateResult, GateResult, GateResult]:
    return _psnr_gate(found, gates), _shift_gate(found, gates), _accuracy_gate(found, gates)


def _psnr_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks = "pictures, median PSNR", "dB at least"
    if gates.median_psnr is None:
        return _not_applicable(name, asks, None, _OFF)
    if isinstance(found.pictures, Skipped):
        return _not_measured(name, asks, gates.median_psnr, found.pictures)
    psnr = found.pictures.similarity.psnr
    return _at_least(name, asks, float(np.median(psnr)), gates.median_psnr, len(psnr))


def _shift_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks = "pictures, median PSNR above a one-pixel shift", "dB at least, the shift's"
    if not gates.beats_pixel_shift:
        return _not_applicable(name, asks, None, _OFF)
    if isinstance(found.pictures, Skipped):
        return _not_measured(name, asks, None, found.pictures)
    psnr = found.pictures.similarity.psnr
    return _at_least(name, asks, float(np.median(psnr)), float(np.median(found.pictures.pixel_shift.psnr)), len(psnr))


def _accuracy_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "attribute accuracy lost", "at most", gates.attribute_accuracy_drop
    if limit is None:
        return _not_applicable(name, asks, None, _OFF)
    if isinstance(found.pictures, Skipped):
        return _not_measured(name, asks, limit, found.pictures)
    if isinstance(found.pictures.accuracy, Skipped):
        return _not_applicable(name, asks, limit, found.pictures.accuracy.reason)
    reference, candidate = found.pictures.accuracy
    return _at_most(name, asks, reference.value - candidate.value, limit, candidate.n)


def _lowest(values: Sequence[float]) -> int:
    """Where the lowest is; what is no number is lower than any."""
    return int(np.where(np.isnan(values), -np.inf, values).argmin())


def _at_most(name: str, asks: str, value: float, limit: float, n: int, where: str = "") -> GateResult:
    return _decided(GateResult(name, asks, value, limit, n, "passed" if value <= limit else "failed", where=where))


def _at_least(name: str, asks: str, value: float, limit: float, n: int, where: str = "") -> GateResult:
    return _decided(GateResult(name, asks, value, limit, n, "passed" if value >= limit else "failed", where=where))


def _decided(result: GateResult) -> GateResult:
    if result.value is not None and math.isfinite(result.value) and result.n:
        return result
    return replace(result, value=None, status="failed", reason="the measured value is not a number")


def _not_measured(name: str, asks: str, limit: float | None, skipped: Skipped) -> GateResult:
    return GateResult(name, asks, None, limit, 0, "not measured", skipped.reason)


def _not_applicable(name: str, asks: str, limit: float | None, reason: str) -> GateResult:
    return GateResult(name, asks, None, limit, 0, "not applicable", reason)
