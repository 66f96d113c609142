"""Gates: limits that the recipe fixed before the run, and the verdict. Nothing that is not a number ever passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.records import GateResult
from s2p_deploy.validation.numbers import Skipped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records.validation_report import Verdict
    from s2p_deploy.validation.measurements import BlockAgreement, Measurements

_OFF = "switched off in the recipe"
_FLOAT = "nothing is quantized"


def judge(found: Measurements, gates: Gates) -> tuple[GateResult, ...]:
    """The result of every gate."""
    return (
        *_code_gates(found, gates),
        _block_gate("blocks of the graph", found.graph_blocks, gates, half=found.graph_half),
        _block_gate("blocks of the engine", found.engine_blocks, gates, half=found.engine_half),
        _change_gate(found, gates),
        *_picture_gates(found, gates),
    )


def verdict_of(results: Iterable[GateResult]) -> Verdict:
    """``failed`` where a gate failed, ``not verified`` where one could not be measured or none applied."""
    statuses = {result.status for result in results}
    if "failed" in statuses:
        return "failed"
    return "passed" if "passed" in statuses and "not measured" not in statuses else "not verified"


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
    worst = float(np.max([point.mismatch for point in points]))
    largest = max(point.max_lsb for point in points)
    return _at_most(*share, worst, limit, codes), _at_most(*size, largest, largest_limit, codes)


def _block_gate(name: str, blocks: tuple[BlockAgreement, ...] | Skipped, gates: Gates, *, half: bool) -> GateResult:
    name, asks, limit = f"{name}, worst SQNR", "dB at least", gates.block_sqnr
    if isinstance(blocks, Skipped):
        return _not_measured(name, asks, limit, blocks)
    worst = float(np.min([block.sqnr for block in blocks]))
    if half:
        reason = f"computes in half precision; measured {worst:.1f} dB"
        return _not_applicable(name, asks, limit, reason)
    return _at_least(name, asks, worst, limit, blocks[0].n)


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


def _at_most(name: str, asks: str, value: float, limit: float, n: int) -> GateResult:
    return _decided(name, asks, value, limit, n, met=value <= limit)


def _at_least(name: str, asks: str, value: float, limit: float, n: int) -> GateResult:
    return _decided(name, asks, value, limit, n, met=value >= limit)


def _decided(name: str, asks: str, value: float, limit: float, n: int, *, met: bool) -> GateResult:
    if not math.isfinite(value) or n == 0:
        return GateResult(name, asks, None, limit, n, "failed", "the measured value is not a number")
    return GateResult(name, asks, value, limit, n, "passed" if met else "failed")


def _not_measured(name: str, asks: str, limit: float | None, skipped: Skipped) -> GateResult:
    return GateResult(name, asks, None, limit, 0, "not measured", skipped.reason)


def _not_applicable(name: str, asks: str, limit: float | None, reason: str) -> GateResult:
    return GateResult(name, asks, None, limit, 0, "not applicable", reason)
