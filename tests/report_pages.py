"""Report pages of small real measurements, hostile wherever a name comes from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import ExportedGraph, PrecisionPlan, Prompt, PromptSet
from s2p_deploy.validation import Chain
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.measurements import BlockAgreement, EndToEnd, Measurements, PointCodes
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.pictures import Drawing, compare_drawings
from s2p_deploy.validation.report import render_html
from s2p_deploy.validation.report_pictures import Drawings
from s2p_deploy.validation.summary import plain, summary

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' & {{ 7 * 7 }} </style> \u2028 <!-- $"


def drawings_of(count: int = 2) -> Drawings:
    """Pictures of noise, one of a hostile prompt."""
    rng = np.random.default_rng(0)
    prompts = PromptSet((Prompt("bad", HOSTILE), *(Prompt(f"p{index}", f"cat {index}") for index in range(1, count))))
    pictures = rng.random((count, 32, 32, 3)).astype(np.float32)
    noise = rng.random((count, 1, 1, 1)) * rng.standard_normal(pictures.shape)
    trajectories = rng.standard_normal((2, 3, count, 4, 8, 8)).astype(np.float32)
    both = pictures, np.clip(pictures + noise, 0, 1).astype(np.float32)
    timesteps = (901.0, 501.0, 1.0)
    return Drawings(prompts, *(Drawing(p, t, timesteps, 1.5) for p, t in zip(both, trajectories, strict=True)))


def measurements(point: str = "conv_in", drawings: Drawings | None = None) -> Measurements:
    """Something of everything, ``point`` being the act point whose codes were compared."""
    drawings = drawings or drawings_of()
    level = np.linspace(30, 40, 8)
    blocks = (BlockAgreement(HOSTILE, 90.0, 8), BlockAgreement("mid_block.resnets.0", 60.0, 8))
    compared = compare_drawings(drawings.reference, drawings.candidate, drawings.prompts, Schedule(3), 2.5)
    return Measurements(
        quantized=True,
        graph_half=False,
        engine_half=False,
        points=(PointCodes(point, 1.25e-5, 1, 800_000),),
        graph_blocks=blocks,
        engine_blocks=blocks,
        end_to_end=EndToEnd(np.arange(8) * 100, level, level - 0.1, level, level, 0.05),
        pictures=compared,
        other_schedules=(replace(compared, schedule=Schedule(20, "ddim")),),
    )


def data_of(found: Measurements, chain: Chain) -> dict[str, Any]:
    """What report.json would hold, hostile wherever a name comes from outside."""
    gates = judge(found, chain.recipe.validation.gates)
    bits = {"weight_storage_bits": 8, "activation_bits": 8}
    sites = [bits | {"site": site.site, "lowering": HOSTILE, "compute": "int8"} for site in chain.graph.plan.sites]
    return summary(found) | plain(
        {
            "gates": gates,
            "verdict": verdict_of(gates),
            "recipe": {"name": HOSTILE, "block_sqnr": 50.0},
            "base": {"source": HOSTILE},
            "engine": {
                "backend": "onnxruntime",
                "hint": HOSTILE,
                "environment": {"device": HOSTILE},
                "sites": sites,
            },
            "sizes": {"engine": 1_000_000, "base_denoiser": 4_000_000},
            "digests": {"engine": "0" * 64},
            "versions": {"torch": "2"},
            "command": HOSTILE,
            "rows": [{"scheduler": HOSTILE, "steps": 3, "calibrated": 2, "interpolated": 17, "held": 0}],
        }
    )


def page_of(chain: Chain, graph: ExportedGraph | None = None, count: int = 2, **changes: object) -> str:
    """The page of ``count`` pictures, with parts of the measurements changed."""
    drawings = drawings_of(count)
    found = replace(measurements(chain.graph.plan.act_points[0].name, drawings), **changes)
    pairs = None if isinstance(found.pictures, Skipped) else drawings.pairs
    return render_html(data_of(found, chain), graph or chain.graph, pairs)


def hostile_graph(graph: ExportedGraph) -> ExportedGraph:
    """The graph with a hostile name for every site, act point and rule, and sensitivities."""
    points = {name: f"{name}.{HOSTILE}" for name in graph.scales.points}
    sites = tuple(
        replace(
            site, site=f"{site.site}.{HOSTILE}", act_point=points.get(site.act_point or ""), rule=HOSTILE, sensitivity=s
        )
        for site, s in zip(graph.plan.sites, np.geomspace(1e-6, 1e-1, len(graph.plan.sites)).tolist(), strict=True)
    )
    act_points = tuple(replace(point, name=points[point.name]) for point in graph.plan.act_points)
    scales = replace(graph.scales, points=tuple(points.values()))
    return replace(graph, plan=PrecisionPlan(sites, act_points), scales=scales)
