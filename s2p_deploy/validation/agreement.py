"""Teacher-forced comparison: parts of the graph, fed what the fake-quant denoiser fed its own; no error piles up.

Codes per act point say whether quantizers agree; blocks say whether everything between them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import InputQuantizer
from s2p_deploy.engines import runner_for_subgraph
from s2p_deploy.export import GraphParts
from s2p_deploy.export.regions import block_modules
from s2p_deploy.progress import silent
from s2p_deploy.validation.measurements import BlockAgreement, PointCodes
from s2p_deploy.validation.metrics import pooled_sqnr_db
from s2p_deploy.validation.reference import Border, reference_calls

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import Lowerings, Runner
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import ActPoint, ExportedGraph
    from s2p_deploy.validation.latents import ValidationLatents
    from s2p_deploy.validation.reference import ReferenceCall

REFERENCE = ("onnxruntime", "reference")


@dataclass(frozen=True)
class Part:
    """A part of the graph that can run: which of its inputs is the activation, its output, and the types it takes."""

    runner: Runner
    entry: str
    output: str
    types: dict[str, np.dtype[Any]]

    def infer(self, call: ReferenceCall, activation: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[Any]:
        """The part's output for one call of the reference."""
        given = {
            **call.latents.inputs(),
            "act_scales": scales,
            "time_projections": call.time_projections,
            self.entry: activation,
        }
        cast = {name: given[name].astype(kind, copy=False) for name, kind in self.types.items()}
        return self.runner.infer(cast)[self.output]


def code_agreement(
    fake_quant: FakeQuantDenoiser, graph: ExportedGraph, latents: ValidationLatents, progress: Progress = silent
) -> tuple[PointCodes, ...]:
    """Integer codes of every act point, the graph's (ONNX Runtime, optimization off) against fake-quant's."""
    points = {point.name: point for point in graph.plan.act_points}
    cuts = GraphParts(graph)
    parts = {name: _site_part(cuts, point) for name, point in points.items()}
    differing, largest, counts = (dict.fromkeys(points, 0) for _ in range(3))
    borders = {name: Border(point.sites[0], point.sites[0]) for name, point in points.items()}
    done = 0
    for call in reference_calls(fake_quant, latents, borders):
        for name, point in points.items():
            activation = call.entering[name]
            gap = np.abs(
                parts[name].infer(call, activation, graph.scales.scales).astype(np.int16)
                - _reference_codes(fake_quant, point, activation, call.latents.rows)
            )
            differing[name] += int(np.count_nonzero(gap))
            largest[name] = max(largest[name], int(gap.max()))
            counts[name] += gap.size
        done += len(call.latents)
        progress("codes", done, len(latents))
    return tuple(PointCodes(name, differing[name] / counts[name], largest[name], counts[name]) for name in points)


def block_agreement(  # noqa: PLR0913 - what is compared, on what, and how it runs
    fake_quant: FakeQuantDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    backend: str,
    hint: str,
    progress: Progress = silent,
    *,
    lowerings: Lowerings | None = None,
) -> tuple[BlockAgreement, ...]:
    """Outputs of every block through a backend's own prepare and compile, against fake-quant's for the same input.

    ``lowerings`` are the engine's (None: the graph's own).
    """
    modules = block_modules([block.block for block in graph.blocks])
    borders = {block.block: Border(modules[block.block][0], modules[block.block][-1]) for block in graph.blocks}
    cuts = GraphParts(graph)
    parts = {
        block.block: _part(cuts.block(block.block), block.input, block.output, backend, hint, lowerings)
        for block in graph.blocks
    }
    signal, noise = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)
    done = 0
    for call in reference_calls(fake_quant, latents, borders):
        for name, part in parts.items():
            expected = call.leaving[name].astype(np.float64)
            found = part.infer(call, call.entering[name], graph.scales.scales)
            signal[name] += float(np.square(expected).sum())
            noise[name] += float(np.square(found - expected).sum())
        done += len(call.latents)
        progress(f"blocks, {backend}", done, len(latents))
    return tuple(BlockAgreement(name, pooled_sqnr_db(signal[name], noise[name]), len(latents)) for name in parts)


def _site_part(cuts: GraphParts, point: ActPoint) -> Part:
    site = next(site for site in cuts.graph.sites if site.site == point.sites[0])
    assert site.codes is not None  # a site of an act point has codes
    return _part(cuts.site(site.site), site.input, site.codes, *REFERENCE)


def _part(
    model: onnx.ModelProto, entry: str, output: str, backend: str, hint: str, lowerings: Lowerings | None = None
) -> Part:
    from onnx.helper import tensor_dtype_to_np_dtype

    types = {value.name: tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    return Part(runner_for_subgraph(model, backend, hint, lowerings), entry, output, types)


def _reference_codes(
    fake_quant: FakeQuantDenoiser, point: ActPoint, activation: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.int16]:
    site = point.sites[0]
    scale = fake_quant.site_scale(site, torch.from_numpy(rows))
    quantizer = fake_quant.site(site).get_submodule("input_quantizer")
    assert isinstance(quantizer, InputQuantizer)  # a site of an act point has one,
    assert scale is not None  # and its scales
    return quantizer.codes(torch.from_numpy(activation), scale).numpy().astype(np.int16)
