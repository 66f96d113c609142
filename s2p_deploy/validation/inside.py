"""What is measured with the reference's own inputs: tables, codes, blocks and sites of a graph and of its engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines import PreparedParts, recorded_lowerings
from s2p_deploy.families import Tap
from s2p_deploy.validation.agreement import REFERENCE, block_agreement, block_errors, code_agreement, site_agreement
from s2p_deploy.validation.measurements import NOT_CUT
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.reference import unquantized_denoiser
from s2p_deploy.validation.tables import constant_time_gap, given_time_gap, scale_gap, text_gap

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import BoundRunner, EngineParts
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.validation.chain import Chain
    from s2p_deploy.validation.latents import ValidationLatents
    from s2p_deploy.validation.measurements import BlockAgreement, SiteAgreement, TableGap

    Found = Callable[[str, Callable[[], Any]], Any]

_SITE_LATENTS = 16  # a site is one product: flips do not grow in it, and few latents say as much as many


@dataclass(frozen=True)
class Inside:
    """A chain, looked at from inside, on ``latents``.

    ``fake_quant`` is its model, ``runner`` its engine, loaded, and ``parts`` what is cut out of the engine's files
    (None where nothing can be cut out of them, or the engine cannot run here).
    """

    chain: Chain
    fake_quant: FakeQuantDenoiser
    latents: ValidationLatents
    runner: BoundRunner | Skipped
    parts: EngineParts | None
    progress: Progress

    @cached_property
    def unquantized(self) -> HotDenoiser:
        """The model before anything is quantized."""
        return unquantized_denoiser(self.chain.calibrated)

    @cached_property
    def reference(self) -> PreparedParts:
        """Parts of the graph, unoptimized: what parity is asked of."""
        return PreparedParts(self.chain.graph, *REFERENCE)

    def measured(self, found: Found) -> dict[str, Any]:
        """Fields of :class:`Measurements`; ``found`` may keep each one by its name."""
        chain, graph, progress = self.chain, self.chain.graph, self.progress
        return {
            "quantized": not chain.recipe.is_float,
            "graph_half": graph.dtype == "fp16",
            "engine_half": chain.half,
            "tables": found("tables", self._tables),
            "points": found("points", lambda: code_agreement(self.fake_quant, graph, self.latents, progress)),
            "block_errors": found(
                "block_errors",
                lambda: block_errors(self.fake_quant, self.unquantized, graph, self.latents, progress),
            ),
            "graph_blocks": found(
                "graph_blocks",
                lambda: block_agreement(self.fake_quant, graph, self.latents, self.reference, progress=progress),
            ),
            "engine_blocks": found("engine_blocks", self._engine_blocks),
            "engine_sites": found("engine_sites", self._engine_sites),
        }

    def _engine_blocks(self) -> tuple[BlockAgreement, ...] | Skipped:
        """Cut out of the engine's files, or, where those cannot be cut, compiled anew from the graph."""
        if isinstance(self.runner, Skipped):
            return self.runner
        engine, graph = self.chain.engine, self.chain.graph
        parts = self.parts or PreparedParts(graph, engine.backend, engine.hint, recorded_lowerings(engine, graph))
        return block_agreement(
            self.fake_quant,
            graph,
            self.latents,
            parts,
            scales=engine.scales.scales,
            stage=f"blocks, {engine.backend}",
            progress=self.progress,
        )

    def _engine_sites(self) -> tuple[SiteAgreement, ...] | Skipped:
        if isinstance(self.runner, Skipped):
            return self.runner
        if self.parts is None:
            return NOT_CUT
        return site_agreement(
            self.fake_quant,
            self.unquantized,
            self.chain.graph,
            self.latents.spread(_SITE_LATENTS),
            self.parts,
            scales=self.chain.engine.scales.scales,
            progress=self.progress,
        )

    def _tables(self) -> tuple[TableGap, ...]:
        chain, calibrated = self.chain, self.chain.calibrated
        engine, graph = chain.engine, chain.graph
        gaps: list[TableGap | None] = [
            scale_gap("scale table of the graph", graph.scales, calibrated.scales),
            scale_gap("scale table of the engine", engine.scales, calibrated.scales),
            constant_time_gap("time table of the graph", self.reference, calibrated, half=graph.dtype == "fp16"),
        ]
        half = engine.dtype == "fp16"
        if self.parts is not None:
            gaps.append(constant_time_gap("time table of the engine", self.parts, calibrated, half=half))
        if not isinstance(self.runner, Skipped):
            given = (self.runner, self.fake_quant, self.latents)
            text = tuple(Tap(tap.module, tap.side) for tap in graph.text)
            gaps.append(given_time_gap("time features of the engine", *given, half=half))
            gaps.append(text_gap("text projections of the engine", *given, text, half=half))
        return tuple(gap for gap in gaps if gap is not None)
