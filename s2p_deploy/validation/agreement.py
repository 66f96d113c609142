"""Teacher-forced comparison: parts of the graph, fed what the fake-quant denoiser fed its own; no error piles up.

Codes per act point say whether quantizers agree; blocks say whether everything between them does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import InputQuantizer
from s2p_deploy.engines import runner_for_subgraph
from s2p_deploy.engines.runner import TEXT_PROJECTIONS
from s2p_deploy.export import GraphParts
from s2p_deploy.families import Tap
from s2p_deploy.progress import silent
from s2p_deploy.validation.measurements import BlockAgreement, PointCodes
from s2p_deploy.validation.metrics import pooled_sqnr_db
from s2p_deploy.validation.reference import reference_calls

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import Lowerings, Runner
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import ActPoint, ExportedGraph, GraphTap
    from s2p_deploy.validation.latents import ValidationLatents
    from s2p_deploy.validation.reference import ReferenceCall

REFERENCE = ("onnxruntime", "reference")


@dataclass(frozen=True)
class Part:
    """A part of the graph that can run: where the activations that it reads are seen, and the types it takes.

    ``text`` is where the products of the text are seen, in the order in which the graph takes them.
    """

    runner: Runner
    entering: dict[str, Tap]
    types: dict[str, np.dtype[Any]]
    text: tuple[Tap, ...] = ()

    def infer(self, call: ReferenceCall, scales: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The part's outputs for one call of the reference."""
        given = {
            **call.latents.inputs(),
            "act_scales": scales,
            "time_projections": call.time_projections,
            **{tensor: call.seen[tap] for tensor, tap in self.entering.items()},
        }
        if TEXT_PROJECTIONS in self.types:
            given[TEXT_PROJECTIONS] = np.concatenate([call.seen[tap] for tap in self.text], -1)
        return self.runner.infer({name: given[name].astype(kind, copy=False) for name, kind in self.types.items()})


def code_agreement(
    fake_quant: FakeQuantDenoiser, graph: ExportedGraph, latents: ValidationLatents, progress: Progress = silent
) -> tuple[PointCodes, ...]:
    """Integer codes of every act point, the graph's (ONNX Runtime, optimization off) against fake-quant's."""
    points = {point.name: point for point in graph.plan.act_points}
    cuts = GraphParts(graph)
    parts = {name: _site_part(cuts, point) for name, point in points.items()}
    differing, largest, counts = (dict.fromkeys(points, 0) for _ in range(3))
    sites = {site.site: site for site in graph.sites}
    codes = {name: str(sites[point.sites[0]].codes) for name, point in points.items()}
    taps = {name: Tap(point.sites[0], "input") for name, point in points.items()}
    done = 0
    for call in reference_calls(fake_quant, latents, taps.values()):
        for name, point in points.items():
            found = parts[name].infer(call, graph.scales.scales)[codes[name]].astype(np.int16)
            gap = np.abs(found - _reference_codes(fake_quant, point, call.seen[taps[name]], call.latents.rows))
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
    """Outputs of every block through a backend's own prepare and compile, against fake-quant's for the same inputs.

    A block with two outputs has one figure for both. ``lowerings`` are the engine's (None: the graph's own).
    """
    cuts = GraphParts(graph)
    entering = {block.block: {tap.tensor: _tap(tap) for tap in block.entering} for block in graph.blocks}
    leaving = {block.block: {tap.tensor: _tap(tap) for tap in block.leaving} for block in graph.blocks}
    text = tuple(map(_tap, graph.text))
    parts = {
        name: replace(_part(cuts.block(name), taps, backend, hint, lowerings), text=text)
        for name, taps in entering.items()
    }
    every = (*text, *(tap for taps in (*entering.values(), *leaving.values()) for tap in taps.values()))
    signal, noise = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)
    done = 0
    for call in reference_calls(fake_quant, latents, every):
        for name, part in parts.items():
            found = part.infer(call, graph.scales.scales)
            for tensor, tap in leaving[name].items():
                expected = call.seen[tap].astype(np.float64)
                signal[name] += float(np.square(expected).sum())
                noise[name] += float(np.square(found[tensor] - expected).sum())
        done += len(call.latents)
        progress(f"blocks, {backend}", done, len(latents))
    return tuple(BlockAgreement(name, pooled_sqnr_db(signal[name], noise[name]), len(latents)) for name in parts)


def _site_part(cuts: GraphParts, point: ActPoint) -> Part:
    site = next(site for site in cuts.graph.sites if site.site == point.sites[0])
    return _part(cuts.site(site.site), {site.input: Tap(site.site, "input")}, *REFERENCE)


def _tap(tap: GraphTap) -> Tap:
    return Tap(tap.module, tap.side)


def _part(
    model: onnx.ModelProto, entering: dict[str, Tap], backend: str, hint: str, lowerings: Lowerings | None = None
) -> Part:
    from onnx.helper import tensor_dtype_to_np_dtype

    types = {value.name: tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    return Part(runner_for_subgraph(model, backend, hint, lowerings), entering, types)


def _reference_codes(
    fake_quant: FakeQuantDenoiser, point: ActPoint, activation: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.int16]:
    site = point.sites[0]
    scale = fake_quant.site_scale(site, torch.from_numpy(rows))
    quantizer = fake_quant.site(site).get_submodule("input_quantizer")
    assert isinstance(quantizer, InputQuantizer)  # a site of an act point has one,
    assert scale is not None  # and its scales
    return quantizer.codes(torch.from_numpy(activation), scale).numpy().astype(np.int16)
