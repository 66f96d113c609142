"""Gates: limits that the recipe fixed before the run, the verdict, and both as JUnit XML.

Nothing that is not a number ever passes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np

from s2p_deploy.metrics import STATISTICS, picture_statistic
from s2p_deploy.records import GateResult, Skipped
from s2p_deploy.validation.reference import branch_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records.validation_report import Verdict
    from s2p_deploy.validation.measurements import BlockAgreement, Measurements, TableGap

_OFF = "switched off in the recipe"
_FLOAT = "nothing is quantized"
_MODULE = "dB at least, above what quantization leaves"
_ELEMENTS = {"failed": "failure", "not measured": "error", "not applicable": "skipped"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 has no way to write the rest


def judge(found: Measurements, gates: Gates) -> tuple[GateResult, ...]:
    """Judges measurements by gates; returns the result of every gate."""
    least = -math.inf if found.graph_half else gates.block_sqnr  # its arithmetic is fake-quant's, node by node
    return (
        *(_table_gate(table, gates) for table in found.tables),
        *_code_gates(found, gates),
        _block_gate("blocks of the graph", found.graph_blocks, found, gates, half=found.graph_half, least=least),
        _block_gate("blocks of the engine", found.engine_blocks, found, gates, half=found.engine_half),
        _layer_gate(found, gates),
        _change_gate(found, gates),
        _branch_gate(found, gates),
        _latent_gate(found, gates),
        _guidance_gate(found, gates),
        *_picture_gates(found, gates),
        _shift_gate(found, gates),
        _accuracy_gate(found, gates),
    )


def verdict_of(results: Iterable[GateResult]) -> Verdict:
    """Decides: ``failed`` where a gate failed, ``not verified`` where one could not be measured or none applied."""
    statuses = {result.status for result in results}
    if "failed" in statuses:
        return "failed"
    return "passed" if "passed" in statuses and "not measured" not in statuses else "not verified"


def junit_xml(gates: Sequence[GateResult], suite: str) -> str:
    """Writes gates as a JUnit file's text; ``suite`` names what was judged.

    A gate that failed is a failure, one that could not be measured an error, one that asks nothing is skipped.
    """
    statuses = [gate.status for gate in gates]
    counts = {
        "tests": len(gates),
        "failures": statuses.count("failed"),
        "errors": statuses.count("not measured"),
        "skipped": statuses.count("not applicable"),
    }
    root = ET.Element("testsuites")
    node = ET.SubElement(root, "testsuite", {"name": _text(suite)} | {name: str(n) for name, n in counts.items()})
    for gate in gates:
        case = ET.SubElement(node, "testcase", {"name": _text(gate.name), "classname": "s2p_deploy.gates"})
        if gate.status in _ELEMENTS:
            ET.SubElement(case, _ELEMENTS[gate.status], {"message": _text(_reason(gate))})
        else:
            ET.SubElement(case, "system-out").text = _text(_reason(gate))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _table_gate(table: TableGap, gates: Gates) -> GateResult:
    """Judges a table; a scale table is in float32 and copied, so it is asked to be equal."""
    limit = gates.table_difference_half if table.half else gates.table_difference_fp32
    limit = gates.scale_difference if table.kind == "scales" else limit
    asks = "relative difference at most"
    if not table.n:
        return _not_applicable(table.table, asks, limit, "it has no columns")
    where = table.where if table.difference else ""  # of no difference, no place is the worst
    return _at_most(table.table, asks, table.difference, limit, table.n, where)


def _code_gates(found: Measurements, gates: Gates) -> tuple[GateResult, GateResult]:
    share = ("codes that differ, worst activation quantizer", "fraction at most")
    size = ("largest code difference", "LSB at most")
    limit = gates.layer_code_mismatch_fp16 if found.graph_half else gates.layer_code_mismatch_fp32
    largest_limit = gates.layer_code_max_lsb
    quantizers = found.quantizers
    if isinstance(quantizers, Skipped):
        return _not_measured(*share, limit, quantizers), _not_measured(*size, largest_limit, quantizers)
    if not quantizers:
        reason = "no activation is quantized"
        return _not_applicable(*share, limit, reason), _not_applicable(*size, largest_limit, reason)
    codes = sum(quantizer.n for quantizer in quantizers)
    worst = quantizers[_lowest([-quantizer.mismatch for quantizer in quantizers])]
    largest = max(quantizers, key=lambda quantizer: quantizer.max_lsb)
    return (
        _at_most(*share, worst.mismatch, limit, codes, worst.quantizer),
        _at_most(*size, largest.max_lsb, largest_limit, codes, largest.quantizer),
    )


def module_limit(quantization: float | None, margin: float, gates: Gates, *, half: bool) -> float:
    """Computes the SQNR in dB that a module (a block, a layer) must have.

    That is ``margin`` above ``quantization``, what quantization alone leaves of it: its own error is then small against
    quantization's. Where nothing is quantized, it is what the arithmetic gives. Half precision cannot give more than
    ``block_sqnr_half`` of anything.
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
        return _not_measured(f"{name}, worst SQNR", _MODULE, gates.block_sqnr, blocks)
    modules = [_ModuleSqnr(block.block, block.sqnr, costs.get(block.block), block.n) for block in blocks]
    limits = [max(least, module_limit(module.quantization, gates.block_margin, gates, half=half)) for module in modules]
    return _module_gate(f"{name}, worst SQNR", modules, limits, gates)


def _layer_gate(found: Measurements, gates: Gates) -> GateResult:
    name, layers = "layers of the engine, worst SQNR", found.engine_layers
    if isinstance(layers, Skipped):
        # its blocks and latents are judged all the same: this one says which layer
        return _not_applicable(name, _MODULE, gates.block_sqnr, layers.reason)
    modules = [_ModuleSqnr(layer.name, layer.sqnr, layer.quantization, layer.n) for layer in layers]
    limits = [
        module_limit(module.quantization, gates.layer_margin, gates, half=found.engine_half) for module in modules
    ]
    return _module_gate(name, modules, limits, gates)


@dataclass(frozen=True)
class _ModuleSqnr:
    name: str
    sqnr: float
    quantization: float | None
    n: int


def _module_gate(name: str, modules: Sequence[_ModuleSqnr], limits: Sequence[float], gates: Gates) -> GateResult:
    """Judges the module that is furthest below its limit, or least above."""
    if not modules:
        return _not_applicable(name, _MODULE, gates.block_sqnr, "there are none")
    index = _lowest([module.sqnr - limit for module, limit in zip(modules, limits, strict=True)])
    worst = modules[index]
    return _at_least(name, _MODULE, worst.sqnr, limits[index], worst.n, worst.name)


def _branch_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "error of its own, worse CFG branch", "dB below quantization's at least", gates.branch_margin
    if not found.quantized:
        return _not_applicable(name, asks, limit, _FLOAT)
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    room = found.end_to_end.room
    branches = [room[0::2], room[1::2]] if found.end_to_end.guided else [room]
    medians = [float(np.median(branch)) for branch in branches]
    worse = _lowest(medians)
    where = branch_of(worse, guided=found.end_to_end.guided)
    return _at_least(name, asks, medians[worse], limit, len(branches[worse]), where)


def _latent_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "error of its own, worst latent", "dB below quantization's at least", gates.latent_margin
    if not found.quantized:
        return _not_applicable(name, asks, limit, _FLOAT)
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    room = found.end_to_end.room
    worst = _lowest(room.tolist())
    where = (
        f"timestep index {found.end_to_end.timestep_indices[worst]}, {branch_of(worst, guided=found.end_to_end.guided)}"
    )
    return _at_least(name, asks, float(room[worst]), limit, len(room), where)


def _guidance_gate(found: Measurements, gates: Gates) -> GateResult:
    name, asks, limit = "guidance, engine against fake-quant, median SQNR", "dB at least", gates.guidance_sqnr
    if isinstance(found.end_to_end, Skipped):
        return _not_measured(name, asks, limit, found.end_to_end)
    guidance = found.end_to_end.guidance
    if guidance is None:
        return _not_measured(name, asks, limit, Skipped("measured by an earlier version"))
    if not found.end_to_end.guided:
        return _not_applicable(name, asks, limit, "this pipeline predicts with the prompt alone")
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


def _picture_gates(found: Measurements, gates: Gates) -> Iterator[GateResult]:
    """Judges every statistic of the pictures' metrics that has a limit; the median of PSNR also where it has none."""
    pictures, perceptual = found.pictures, found.perceptual
    lpips = perceptual if isinstance(perceptual, Skipped) else perceptual.lpips
    values: dict[str, NDArray[np.float64] | Skipped] = {
        "psnr": pictures if isinstance(pictures, Skipped) else pictures.similarity.psnr,
        "ssim": pictures if isinstance(pictures, Skipped) else pictures.similarity.ssim,
        "lpips": lpips,
    }
    for metric, measured in values.items():
        asks = "at most" if metric == "lpips" else "dB at least" if metric == "psnr" else "at least"
        for at, words in STATISTICS.items():
            name, limit = f"pictures, {words} {metric.upper()}", getattr(gates, f"{at}_{metric}")
            if limit is None:
                if (at, metric) == ("median", "psnr"):
                    yield _not_applicable(name, asks, None, _OFF)
            elif isinstance(measured, Skipped):
                yield _not_measured(name, asks, limit, measured)
            elif metric == "lpips":
                yield _at_most(name, asks, -picture_statistic(-measured, at), limit, len(measured))
            else:
                yield _at_least(name, asks, picture_statistic(measured, at), limit, len(measured))


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
    """Finds the lowest; what is no number is lower than any."""
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


def _reason(gate: GateResult) -> str:
    limit = "" if gate.limit is None else f" {gate.limit:.6g}"
    found = "nothing" if gate.value is None else f"{gate.value:.6g} (n = {gate.n})"
    where = f" at {gate.where}" if gate.where else ""
    return f"found {found}{where}, asks {gate.asks}{limit}" + (f": {gate.reason}" if gate.reason else "")


def _text(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
