"""Per site: how its weights are stored, its activations coded, and what the backend reports to compute it in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.records import SitePrecision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.records import Engine, ExportedGraph, GraphSite, PrecisionPlan

UNKNOWN = "unknown"
_ON_CPU = "fp32"
_BITS = {"int8": 8, "int4": 4}


def storage_bits(prepared: Path) -> dict[str, int]:
    """Bits per value of every weight tensor of a prepared graph."""
    tensors = read_onnx(prepared).graph.initializers.items()
    return {name: value.const_value.dtype.bitwidth for name, value in tensors if value.const_value is not None}


def site_precisions(
    graph: ExportedGraph, lowerings: Lowerings, storage: Mapping[str, int], compute: Mapping[str, str]
) -> tuple[SitePrecision, ...]:
    """One entry per site. ``storage`` maps the graphs' tensors to bits, ``compute`` ONNX nodes to types.

    Sites of ``text.onnx`` are computed by ONNX Runtime on the CPU: their products are float32 ones there.
    """
    chosen = lowerings.by_point
    floating = 32 if graph.dtype == "fp32" else 16
    return tuple(
        SitePrecision(
            site=site.site,
            op=site.op,
            lowering=_lowering(site, chosen),
            weight_storage_bits=floating if site.weight is None else storage[site.weight],
            activation_bits=_BITS.get(site.activations, floating),
            compute=_ON_CPU if site.graph == "text" else compute.get(site.node, UNKNOWN),
        )
        for site in graph.sites
    )


def sites_not_int8(engine: Engine, plan: PrecisionPlan) -> tuple[str, ...]:
    """Sites that the plan wants computed in integers and that the engine's backend does not report as int8.

    Integers are wanted where both weights and activations are quantized.
    """
    compute = {site.site: site.compute for site in engine.sites}
    planned = (site.site for site in plan.sites if site.act_point is not None and site.weights != "none")
    return tuple(site for site in planned if compute.get(site, UNKNOWN) != "int8")


def _lowering(site: GraphSite, chosen: Mapping[str, str]) -> str:
    if site.act_point is not None:
        return chosen[site.act_point]
    return "float" if site.weight is None else "weight_only"
