"""What the report says of every layer: formats, what the backend computes in, sensitivity, codes, scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from s2p_deploy.records import PrecisionPlan, SitePlan
    from s2p_deploy.validation.figures_scales import PointScales

FLOATING = "none"  # what a plan calls a format that is not quantized
_LEAST_BAR = 0.04  # of the strip's height: a site that hardly matters still shows


@dataclass(frozen=True)
class Layer:
    """One site. ``activations`` is the act point's format; ``stored_bits``, ``lowering`` and ``compute`` the engine's.

    ``bar`` in (0, 1] is the sensitivity on a logarithmic axis; None where the plan has none. ``mismatch`` and
    ``max_lsb`` are those of the site's act point; ``sqnr`` in dB is of the site cut out of the engine, where it was.
    """

    site: str
    op: str
    weights: str
    activations: str
    rule: str
    stored_bits: int | None
    lowering: str
    compute: str
    sensitivity: float | None
    bar: float | None
    mismatch: float | None
    max_lsb: int | None
    sqnr: float | None
    scales: PointScales | None


@dataclass(frozen=True)
class Group:
    """Neighbouring sites of one part of the network, for the axis below the strips."""

    name: str
    count: int


def layers_of(data: Mapping[str, Any], plan: PrecisionPlan, scales: Iterable[PointScales]) -> list[Layer]:
    """Every site of the plan in module order; ``data`` is that of ``report.json``."""
    precisions = {site["site"]: site for site in data["engine"].get("sites", ())}
    codes = _by(data["graph_numbers"]["points"], "point")
    alone = _by(data["engine_numbers"].get("sites", ()), "site")
    formats = {point.name: point.activations for point in plan.act_points}
    lines = {point.name: point for point in scales}
    bars = _bars(plan.sites)
    return [
        _layer(
            site,
            formats,
            precisions.get(site.site, {}) | alone.get(site.site, {}) | codes.get(site.act_point or "", {}),
            lines,
            bar,
        )
        for site, bar in zip(plan.sites, bars, strict=True)
    ]


def _layer(
    site: SitePlan,
    formats: Mapping[str, str],
    known: Mapping[str, Any],
    lines: Mapping[str, PointScales],
    bar: float | None,
) -> Layer:
    return Layer(
        site=site.site,
        op=site.op,
        weights=site.weights,
        activations=formats.get(site.act_point or "", FLOATING),
        rule=site.rule,
        stored_bits=known.get("weight_storage_bits"),
        lowering=known.get("lowering", ""),
        compute=known.get("compute", ""),
        sensitivity=site.sensitivity,
        bar=bar,
        mismatch=known.get("mismatch"),
        max_lsb=known.get("max_lsb"),
        sqnr=known.get("sqnr"),
        scales=lines.get(site.act_point or ""),
    )


def _by(found: Any, key: str) -> dict[str, Any]:  # noqa: ANN401 - JSON: a list, or why there is none
    return {} if isinstance(found, dict) else {entry[key]: entry for entry in found}


def groups_of(layers: Sequence[Layer]) -> list[Group]:
    """Runs of sites in the same part: ``down_blocks.0``, ``mid_block``, ``time_embedding``."""
    return [Group(name, len(list(run))) for name, run in groupby(_part(layer.site) for layer in layers)]


def _part(site: str) -> str:
    first, *rest = site.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _bars(sites: Sequence[SitePlan]) -> list[float | None]:
    """Heights between the smallest and the largest sensitivity above zero, logarithmic."""
    logs = [None if s.sensitivity is None else math.log10(max(s.sensitivity, 1e-30)) for s in sites]
    above = [math.log10(s.sensitivity) for s in sites if s.sensitivity is not None and s.sensitivity > 0]
    if not above:
        return [None if log is None else _LEAST_BAR for log in logs]
    low, reach = min(above), max(max(above) - min(above), 1e-9)
    return [None if log is None else _LEAST_BAR + (1 - _LEAST_BAR) * max(0.0, log - low) / reach for log in logs]
