"""Which lowering every act point gets, and which INT4 weights stay packed: decided from records, never from a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.engines.passes.expand_int4 import Int4Use
from s2p_deploy.engines.support import Pattern
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.engines.options import BuildOptions
    from s2p_deploy.engines.support import Support
    from s2p_deploy.records import Engine, ExportedGraph, GraphSite

RESCALE, RUNTIME_Q, STATIC = "rescale", "runtime_q", "static"
RECORDED, MIXED_ROWS = "lowerings", "mixed_rows"  # in an engine's content: act point -> lowering, and a bool
_REFUSED = frozenset({"fails", "crashes", "wrong"})
_OPS = {"conv": "conv", "linear": "matmul", "Conv": "conv", "MatMul": "matmul"}


@dataclass(frozen=True)
class PointLowering:
    """One act point: the tensor of its codes, its column of the scale table, and its lowering."""

    point: str
    codes: str
    column: int
    lowering: str


@dataclass(frozen=True)
class Lowerings:
    """The lowering of every act point of a graph. Empty: all stay as the canonical graph has them (``rescale``)."""

    points: tuple[PointLowering, ...] = ()

    @property
    def by_point(self) -> dict[str, str]:
        """Act point -> lowering."""
        return {point.point: point.lowering for point in self.points}

    @property
    def mixed_rows(self) -> bool:
        """Whether the samples of a batch may be on different rows."""
        return all(point.lowering != RUNTIME_Q for point in self.points)

    def columns(self, lowering: str) -> dict[str, int]:
        """Codes -> column of the points with a lowering."""
        return {point.codes: point.column for point in self.points if point.lowering == lowering}


def choose_lowerings(graph: ExportedGraph, options: BuildOptions, support: Support) -> Lowerings:
    """The lowering of every act point.

    ``static`` where the point's scales vary by no more than ``options.static_tolerance`` over the rows; else what
    ``options.lowering`` asks for; with ``auto`` that is ``rescale``, or ``runtime_q`` where the backend was seen to
    refuse the first and to take the second.

    Raises:
        InputError: the backend was seen to refuse the lowering that was asked for.
    """
    columns = dict(zip(graph.scales.points, graph.scales.scales.T, strict=True))
    members: dict[str, list[GraphSite]] = {name: [] for name in graph.scales.points}
    for site in graph.sites:
        if site.act_point is not None:
            members[site.act_point].append(site)
    return _lowerings(
        graph, {name: _lowering(sites, columns[name], options, support) for name, sites in members.items()}
    )


def recorded_lowerings(engine: Engine, graph: ExportedGraph) -> Lowerings:
    """What an engine was built with. ``graph`` is the one it was built from."""
    return _lowerings(graph, engine.manifest.content.get(RECORDED, {}))


def variation(column: NDArray[np.float32]) -> float:
    """How much the scales of one act point vary over the rows: largest over smallest, less one."""
    return float(column.max()) / float(column.min()) - 1


def int4_rule(
    support: Support, lowerings: Lowerings, *, wanted: Callable[[Int4Use], bool], untried: Callable[[Int4Use], bool]
) -> Callable[[Int4Use], bool]:
    """Which uses of INT4 weights stay packed: ``wanted`` ones that the backend was seen to take.

    Where the probe says nothing, ``untried`` decides.
    """
    quantized = set(lowerings.by_point.values()) or {RESCALE}

    def keep(use: Int4Use) -> bool:
        forms = quantized if use.quantized_activation else {"float"}
        activations = "int8" if use.quantized_activation else "none"
        verdicts = {_verdict(support, Pattern(form, _OPS.get(use.op, use.op), "int4", activations)) for form in forms}
        if verdicts & _REFUSED:
            return False
        return untried(use) if "unknown" in verdicts else wanted(use)

    return keep


def _lowerings(graph: ExportedGraph, by_point: Mapping[str, str]) -> Lowerings:
    codes = {site.act_point: site.codes for site in graph.sites}
    return Lowerings(
        tuple(
            PointLowering(name, str(codes[name]), column, by_point[name])
            for column, name in enumerate(graph.scales.points)
            if name in by_point
        )
    )


def _lowering(sites: list[GraphSite], column: NDArray[np.float32], options: BuildOptions, support: Support) -> str:
    def verdicts(lowering: str) -> set[str]:
        return {_verdict(support, Pattern(lowering, _OPS[s.op], _stored(s), "int8")) for s in sites}

    if variation(column) <= options.static_tolerance and not verdicts(STATIC) & _REFUSED:
        return STATIC
    if options.lowering == "auto":
        forced = verdicts(RESCALE) & _REFUSED and verdicts(RUNTIME_Q) == {"builds"}
        return RUNTIME_Q if forced else RESCALE
    refused = sorted(verdicts(options.lowering) & _REFUSED)
    if refused:
        raise InputError(
            f"lowering {options.lowering} of {sites[0].site}: with this version the backend {_SAID[refused[0]]}; "
            "choose another --lowering"
        )
    return options.lowering


_SAID = {"fails": "refuses it", "crashes": "crashes on it", "wrong": "computes it wrong"}


def _stored(site: GraphSite) -> str:
    """Weights as a quantized site has them where INT4 is expanded: every backend can do that."""
    return "none" if site.weight is None else "int8"


def _verdict(support: Support, pattern: Pattern) -> str:
    return support.verdicts.get(pattern, "unknown")
