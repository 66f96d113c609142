"""Teacher-forced comparison: parts of a graph or engine, fed what fake-quant fed its own; no error piles up.

Codes per act point say whether quantizers agree; blocks, whether everything between them does; sites, which one is at
fault. Beside them, what quantization itself costs each: an error is large or small against that.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import InputQuantizer
from s2p_deploy.engines import PreparedParts
from s2p_deploy.engines.runner import TEXT_PROJECTIONS
from s2p_deploy.families import Tap
from s2p_deploy.progress import silent
from s2p_deploy.validation.measurements import BlockAgreement, BlockError, PointCodes, SiteAgreement
from s2p_deploy.validation.metrics import pooled_sqnr_db
from s2p_deploy.validation.reference import ReferenceCall, forced_outputs, reference_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import EnginePart, EngineParts
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import ActPoint, ExportedGraph, GraphSite, GraphTap, PrecisionPlan
    from s2p_deploy.validation.latents import ValidationLatents

    _Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]

REFERENCE = ("onnxruntime", "reference")
_NOT_READ = np.zeros((0, 0), np.float32)  # a site's time features


@dataclass(frozen=True)
class Part:
    """A part of a graph or an engine, and where the activations that it reads are seen.

    ``scales`` float32 [rows, points] are bound to it; ``text`` is where the products of the text are seen, in the order
    in which the graph takes them.
    """

    part: EnginePart
    entering: dict[str, Tap]
    scales: NDArray[np.float32]
    text: tuple[Tap, ...] = ()

    def infer(self, call: ReferenceCall) -> dict[str, NDArray[Any]]:
        """The part's outputs for one call of the reference."""
        given = {
            **call.latents.inputs(),
            "act_scales": self.scales,
            "time_projections": call.time_projections,
            **{tensor: call.seen[tap] for tensor, tap in self.entering.items()},
        }
        types = self.part.types
        if TEXT_PROJECTIONS in types:
            given[TEXT_PROJECTIONS] = np.concatenate([call.seen[tap] for tap in self.text], -1)
        return self.part.runner.infer({name: given[name].astype(kind, copy=False) for name, kind in types.items()})


class _Powers:
    """Sums of squares of a signal and of what differs from it."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, expected: NDArray[np.float32], found: NDArray[Any]) -> None:
        wanted = expected.astype(np.float64)
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(found - wanted).sum())

    def sqnr(self) -> float:
        return pooled_sqnr_db(self._signal, self._noise)


def code_agreement(
    fake_quant: FakeQuantDenoiser, graph: ExportedGraph, latents: ValidationLatents, progress: Progress = silent
) -> tuple[PointCodes, ...]:
    """Integer codes of every act point, the graph's (ONNX Runtime, optimization off) against fake-quant's."""
    points = {point.name: point for point in graph.plan.act_points}
    sites = {site.site: site for site in graph.sites}
    firsts = {name: sites[point.sites[0]] for name, point in points.items()}
    codes = {name: str(site.codes) for name, site in firsts.items()}
    taps = {name: Tap(site.site, "input") for name, site in firsts.items()}
    cuts, scales = PreparedParts(graph, *REFERENCE), graph.scales.scales
    parts = {
        name: Part(cuts.between([site.input], [codes[name]]), {site.input: taps[name]}, scales)
        for name, site in firsts.items()
    }
    differing, largest, counts = (dict.fromkeys(points, 0) for _ in range(3))
    done = 0
    for call in reference_calls(fake_quant, latents, taps.values()):
        for name, point in points.items():
            found = parts[name].infer(call)[codes[name]].astype(np.int16)
            gap = np.abs(found - _reference_codes(fake_quant, point, call.seen[taps[name]], call.latents.rows))
            differing[name] += int(np.count_nonzero(gap))
            largest[name] = max(largest[name], int(gap.max()))
            counts[name] += gap.size
        done += len(call.latents)
        progress("codes", done, len(latents))
    return tuple(PointCodes(name, differing[name] / counts[name], largest[name], counts[name]) for name in points)


def block_agreement(  # noqa: PLR0913 - what is compared, on what, and options by keyword
    fake_quant: FakeQuantDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    parts: EngineParts,
    *,
    scales: NDArray[np.float32] | None = None,
    stage: str = "blocks",
    progress: Progress = silent,
) -> tuple[BlockAgreement, ...]:
    """Outputs of every block of a graph or engine against fake-quant's for the same inputs.

    A block with two outputs has one figure for both.

    Args:
        fake_quant: the reference.
        graph: says where the blocks are.
        latents: what the reference is run on.
        parts: what the blocks are cut out of.
        scales: float32 [rows, points] that are bound to it (None: the graph's).
        stage: for ``progress``.
        progress: told after every few latents.
    """
    bound = graph.scales.scales if scales is None else scales
    leaving = {block.block: _taps(block.leaving) for block in graph.blocks}
    text = tuple(map(_tap, graph.text))
    blocks = {
        block.block: Part(
            parts.between(list(_taps(block.entering)), list(leaving[block.block])), _taps(block.entering), bound, text
        )
        for block in graph.blocks
    }
    powers = {name: _Powers() for name in blocks}
    done = 0
    for call in reference_calls(fake_quant, latents, (*text, *_borders(graph))):
        for name, part in blocks.items():
            found = part.infer(call)
            for tensor, tap in leaving[name].items():
                powers[name].add(call.seen[tap], found[tensor])
        done += len(call.latents)
        progress(stage, done, len(latents))
    return tuple(BlockAgreement(name, powers[name].sqnr(), len(latents)) for name in blocks)


def block_errors(
    fake_quant: FakeQuantDenoiser,
    unquantized: HotDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    progress: Progress = silent,
) -> tuple[BlockError, ...]:
    """What quantization costs every block: fake-quant against ``unquantized``, whose blocks get the same inputs."""
    entering = {tap for block in graph.blocks for tap in _taps(block.entering).values()}
    leaving = {block.block: tuple(_taps(block.leaving).values()) for block in graph.blocks}
    quantized = _quantized_sites(graph.plan)
    powers = {block.block: _Powers() for block in graph.blocks if quantized & set(block.sites)}
    every = {tap for name in powers for tap in leaving[name]}
    done = 0
    for call in reference_calls(fake_quant, latents, _borders(graph)):
        found = forced_outputs(unquantized, call, entering, every)
        for name, sums in powers.items():
            for tap in leaving[name]:
                sums.add(call.seen[tap], found[tap])
        done += len(call.latents)
        progress("what quantization costs", done, len(latents))
    return tuple(
        BlockError(block.block, powers[block.block].sqnr() if block.block in powers else None) for block in graph.blocks
    )


def site_agreement(  # noqa: PLR0913 - what is compared, on what, and options by keyword
    fake_quant: FakeQuantDenoiser,
    unquantized: HotDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    parts: EngineParts,
    *,
    scales: NDArray[np.float32],
    progress: Progress = silent,
) -> tuple[SiteAgreement, ...]:
    """Results of every site of an engine against fake-quant's for the same inputs, and what quantization costs it.

    Nothing is kept of a site once it was compared. Where a backend computes a part of a site's columns apart
    (SplitLinears), the first part is compared. Arguments as :func:`block_agreement`.
    """
    sites = tuple(site for site in graph.sites if site.graph == "denoiser")
    cuts = {
        site.site: Part(parts.between([site.input], [site.output]), {site.input: Tap(site.site, "input")}, scales)
        for site in sites
    }
    quantized = _quantized_sites(graph.plan)
    found, own = ({site.site: _Powers() for site in sites} for _ in range(2))
    done = 0
    for part in latents.parts():
        with ExitStack() as hooks, torch.no_grad():
            for site in sites:
                hook = _comparing(site, cuts[site.site], part, found[site.site])
                hooks.callback(fake_quant.site(site.site).register_forward_hook(hook).remove)
                if site.site in quantized:
                    twin = unquantized.network.get_submodule(site.site)
                    hook = _beside(twin, own[site.site])
                    hooks.callback(fake_quant.site(site.site).register_forward_hook(hook).remove)
            fake_quant(*(torch.from_numpy(value) for value in part.inputs().values()))
        done += len(part)
        progress("sites", done, len(latents))
    return tuple(
        SiteAgreement(name, found[name].sqnr(), own[name].sqnr() if name in quantized else None, len(latents))
        for name in cuts
    )


def _comparing(site: GraphSite, part: Part, latents: ValidationLatents, powers: _Powers) -> _Hook:
    def compare(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        call = ReferenceCall(latents, _NOT_READ, {part.entering[site.input]: args[0].numpy()})
        found = part.infer(call)[site.output]
        powers.add(output.numpy()[..., : found.shape[-1]], found)

    return compare


def _beside(twin: torch.nn.Module, powers: _Powers) -> _Hook:
    def compare(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        powers.add(output.numpy(), twin(args[0]).numpy())

    return compare


def _quantized_sites(plan: PrecisionPlan) -> set[str]:
    return {site.site for site in plan.sites if site.weights != "none" or site.act_point is not None}


def _borders(graph: ExportedGraph) -> list[Tap]:
    return [tap for block in graph.blocks for tap in map(_tap, (*block.entering, *block.leaving))]


def _taps(taps: tuple[GraphTap, ...]) -> dict[str, Tap]:
    """By tensor."""
    return {tap.tensor: _tap(tap) for tap in taps}


def _tap(tap: GraphTap) -> Tap:
    return Tap(tap.module, tap.side)


def _reference_codes(
    fake_quant: FakeQuantDenoiser, point: ActPoint, activation: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.int16]:
    site = point.sites[0]
    scale = fake_quant.site_scale(site, torch.from_numpy(rows))
    quantizer = fake_quant.site(site).get_submodule("input_quantizer")
    assert isinstance(quantizer, InputQuantizer)  # a site of an act point has one,
    assert scale is not None  # and its scales
    return quantizer.codes(torch.from_numpy(activation), scale).numpy().astype(np.int16)
