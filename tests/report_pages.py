"""Report pages of small real measurements, hostile wherever a name comes from outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import Base, ExportedGraph, LayerPrecision, PrecisionPlan, Prompt, PromptSet, Skipped
from s2p_deploy.validation import Chain
from s2p_deploy.validation.checkpoint import Spent
from s2p_deploy.validation.measurements import BlockAgreement, EndToEnd, Measurements, QuantizerCodes
from s2p_deploy.validation.pictures import GeneratedPictures, PicturePairs, compare_pictures
from s2p_deploy.validation.report import EngineSummary, ReportData, ScheduleOrigins, Validated, report_data
from s2p_deploy.validation.report_page import render_html

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' & {{ 7 * 7 }} </style> \u2028 <!-- $"


@dataclass(frozen=True)
class Generated:
    """Both pipelines' pictures of the same prompts."""

    prompts: PromptSet
    reference: GeneratedPictures
    candidate: GeneratedPictures

    @property
    def pairs(self) -> PicturePairs:
        return PicturePairs.of(self.prompts, self.reference, self.candidate)


def generated(count: int = 2) -> Generated:
    """Pictures of noise, one of a hostile prompt."""
    rng = np.random.default_rng(0)
    prompts = PromptSet((Prompt("bad", HOSTILE), *(Prompt(f"p{index}", f"cat {index}") for index in range(1, count))))
    pictures = rng.random((count, 32, 32, 3)).astype(np.float32)
    noise = rng.random((count, 1, 1, 1)) * rng.standard_normal(pictures.shape)
    trajectories = rng.standard_normal((2, 3, count, 4, 8, 8)).astype(np.float32)
    both = pictures, np.clip(pictures + noise, 0, 1).astype(np.float32)
    timesteps = (901.0, 501.0, 1.0)
    return Generated(
        prompts, *(GeneratedPictures(p, t, timesteps, 1.5) for p, t in zip(both, trajectories, strict=True))
    )


def measurements(quantizer: str = "conv_in", pictures: Generated | None = None) -> Measurements:
    """Something of everything, ``quantizer`` being the activation quantizer whose codes were compared."""
    both = pictures or generated()
    level = np.linspace(30, 40, 8)
    blocks = (BlockAgreement(HOSTILE, 90.0, 8), BlockAgreement("mid_block.resnets.0", 60.0, 8))
    compared = compare_pictures(both.reference, both.candidate, both.prompts, Schedule(3), 2.5)
    return Measurements(
        quantized=True,
        graph_half=False,
        engine_half=False,
        quantizers=(QuantizerCodes(quantizer, 1.25e-5, 1, 800_000),),
        graph_blocks=blocks,
        engine_blocks=blocks,
        end_to_end=EndToEnd(np.arange(8) * 100, level, level - 0.1, level, level, 0.05),
        pictures=compared,
        other_schedules=(replace(compared, schedule=Schedule(20, "ddim")),),
    )


def data_of(found: Measurements, chain: Chain, **changes: object) -> ReportData:
    """A report's content, hostile wherever a name comes from outside."""
    validated = Validated(generated().prompts, found, None, {}, HOSTILE, Spent(1, 2.0))
    data = report_data(chain, validated, chain.recipe.validation.gates)
    layers = tuple(LayerPrecision(layer.name, "conv", HOSTILE, 8, 8, "int8") for layer in chain.graph.plan.layers)
    engine = EngineSummary(
        backend="onnxruntime",
        precision=HOSTILE,
        provider=HOSTILE,
        optimization=HOSTILE,
        dtype="fp32",
        environment={"device": HOSTILE},
        layers=layers,
    )
    origins = ScheduleOrigins(scheduler=HOSTILE, steps=3, calibrated=2, interpolated=17, clamped=0)
    hostile = {
        "recipe": data.recipe.model_copy(update={"name": HOSTILE}),
        "base": Base(HOSTILE, "2" * 64),
        "engine": engine,
        "sizes": {"engine": 1_000_000, "base_denoiser": 4_000_000},
        "digests": {"engine": "0" * 64, "prompts": "1" * 64},
        "versions": {"torch": "2"},
        "scale_origins": (origins,),
    }
    return data.model_copy(update=hostile | changes)


def page_of(chain: Chain, graph: ExportedGraph | None = None, count: int = 2, **changes: object) -> str:
    """The page of ``count`` pictures, with parts of the measurements changed."""
    pictures = generated(count)
    found = replace(measurements(chain.graph.plan.activation_quantizers[0].name, pictures), **changes)
    pairs = None if isinstance(found.pictures, Skipped) else pictures.pairs
    return render_html(data_of(found, chain), graph or chain.graph, pairs)


def hostile_graph(graph: ExportedGraph) -> ExportedGraph:
    """The graph with a hostile name for every layer, activation quantizer and rule, and sensitivities."""
    quantizers = {name: f"{name}.{HOSTILE}" for name in graph.scales.quantizers}
    layers = tuple(
        replace(
            layer,
            name=f"{layer.name}.{HOSTILE}",
            activation_quantizer=quantizers.get(layer.activation_quantizer or ""),
            rule=HOSTILE,
            sensitivity=s,
        )
        for layer, s in zip(graph.plan.layers, np.geomspace(1e-6, 1e-1, len(graph.plan.layers)).tolist(), strict=True)
    )
    activation_quantizers = tuple(
        replace(quantizer, name=quantizers[quantizer.name]) for quantizer in graph.plan.activation_quantizers
    )
    scales = replace(graph.scales, quantizers=tuple(quantizers.values()))
    return replace(graph, plan=PrecisionPlan(layers, activation_quantizers), scales=scales)
