"""The canonical graph of a calibrated model, made in memory: traced, named, located, quantized, lowered."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.centres import usable_centres
from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.overflow import overflowing_sites
from s2p_deploy.export.passes.fill_weights import FillWeights
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.full_sites import FullSites
from s2p_deploy.export.passes.hoisted_text import HoistedText
from s2p_deploy.export.passes.open_sizes import OpenSizes
from s2p_deploy.export.passes.readable_names import ReadableNames
from s2p_deploy.export.passes.scale_rows import PointSpec, ScaleRows
from s2p_deploy.export.passes.strip_metadata import StripMetadata
from s2p_deploy.export.passes.time_projections import TimeProjections
from s2p_deploy.export.passes.transposed_keys import TransposedKeys
from s2p_deploy.export.passes.weight_quantizers import WeightQuantizers
from s2p_deploy.export.regions import SiteNode, conditions, locate_sites, tapped
from s2p_deploy.export.scopes import inside, module_path
from s2p_deploy.export.tensors import DTYPES, stored_bytes
from s2p_deploy.export.tracing import trace_denoiser
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import GraphBlock, GraphSite, GraphTap, TimeTable

if TYPE_CHECKING:
    from s2p_deploy.export.tracing import Sizes
    from s2p_deploy.families import Block, Tap
    from s2p_deploy.records import CalibratedModel

DType = Literal["fp32", "fp16"]
TimeTableForm = Literal["constant", "input"]
TextProjectionsForm = Literal["graph", "input"]
_TORCH = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class CanonicalGraph:
    """The canonical graph in memory (its weights not read yet), and where sites and blocks are in it.

    ``full_sites`` are those that a half-precision graph computes in float32. Where the products of the text are an
    input, ``text_model`` computes them, and ``text`` says where its columns come from; where the time features are an
    input, ``conditioning`` does.
    """

    model: ir.Model
    sites: tuple[GraphSite, ...]
    blocks: tuple[GraphBlock, ...]
    full_sites: tuple[str, ...] = ()
    text_model: ir.Model | None = None
    text: tuple[GraphTap, ...] = ()
    conditioning: ir.Model | None = None

    @property
    def bytes(self) -> int:
        """Of all weights as they are stored."""
        parts = (self.model, self.text_model, self.conditioning)
        return sum(stored_bytes(model) for model in parts if model is not None)


def canonical_graph(
    calibrated: CalibratedModel,
    dtype: DType,
    time_table: TimeTableForm,
    text_projections: TextProjectionsForm = "graph",
    sizes: Sizes = "fixed",
) -> CanonicalGraph:
    """The canonical graph, its initializers still to be read. See :func:`export_graph`."""
    _refuse_simulation(calibrated)
    if text_projections == "input":
        _refuse_quantized_text(calibrated)
    kind, plan = DTYPES[dtype], calibrated.plan
    source = calibrated.time_source()
    config, transforms = denoiser_config(calibrated), calibrated.transforms
    traced = trace_denoiser(config, source, transforms, tokens=calibrated.tokens, dtype=_TORCH[dtype], sizes=sizes)
    model = traced.model
    _run(model, FoldConstants(), *([OpenSizes()] if sizes == "dynamic" else []))
    if isinstance(source, TimeTable):
        _run(model, TimeProjections(source.projections, time_table, kind))
    _run(
        model,
        FillWeights(calibrated.tensor, kind),
        TransposedKeys(),
        ReadableNames(),
    )
    sites = locate_sites(model.graph, plan.sites)
    _name_outputs(model.graph, sites)
    blocks = _blocks(model.graph, traced.blocks, sites)
    described = tuple(_describe(site, calibrated) for site in sites)
    centres = usable_centres(calibrated.scales, dtype)
    counts = {site.plan.site: _weights_per_channel(site) for site in sites}
    overflowing = overflowing_sites(calibrated, counts, centres) if dtype == "fp16" else frozenset()
    full = [site for site in sites if site.plan.site in overflowing]
    points = _point_specs(calibrated, sites, centres)
    rows = ScaleRows(points, "rows" if time_table == "input" else len(calibrated.scales.scales), kind)
    _run(model, WeightQuantizers(sites, calibrated.tensor, calibrated.weight_scales(), kind), rows)
    for point in plan.act_points:
        fmt = format_by_name(point.activations)
        assert fmt is not None  # an act point has a format
        members = [site for site in sites if site.plan.act_point == point.name]
        lower_rescale(model.graph, point.name, fmt, members, rows.scales[point.name])
    _run(model, FullSites(full))
    made = CanonicalGraph(model, described, blocks, tuple(site.plan.site for site in full))
    if text_projections == "input":
        made = _with_text_apart(made, sites)
    _run(model, StripMetadata())
    return made


def denoiser_config(calibrated: CalibratedModel) -> dict[str, Any]:
    """The denoiser's diffusers configuration.

    Raises:
        InputError: it cannot be read.
    """
    file = calibrated.folder / "denoiser_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: make the calibrated model again") from error
    return config


def _refuse_simulation(calibrated: CalibratedModel) -> None:
    if calibrated.simulation is not None:
        reason = calibrated.manifest.content["simulation_only"]
        raise InputError(
            f"{calibrated.folder} exists in simulation only: no engine has {reason}; calibrate without, to export"
        )


def _refuse_quantized_text(calibrated: CalibratedModel) -> None:
    """The scales of a quantized text are looked up by the timestep, though they are the same for all of them."""
    quantized = [point for point in calibrated.plan.act_points if not point.timestep_dependent]
    if quantized:
        raise InputError(
            f"{quantized[0].sites[0]} reads the text in {quantized[0].activations}, so it is computed in every step: "
            "export with --text-projections graph, or calibrate with the rule {match: text, activations: none}"
        )


def _with_text_apart(whole: CanonicalGraph, sites: tuple[SiteNode, ...]) -> CanonicalGraph:
    hoisted = HoistedText([site.node for site in sites])
    made_by = {str(value.name): module_path(node) for node in whole.model.graph for value in node.outputs}
    _run(whole.model, hoisted)
    assert hoisted.text_graph is not None  # it was made
    _run(hoisted.text_graph, StripMetadata())
    apart = {site.plan.site for site in sites if site.node in hoisted.moved}
    return replace(
        whole,
        sites=tuple(replace(site, graph="text") if site.site in apart else site for site in whole.sites),
        text_model=hoisted.text_graph,
        text=tuple(GraphTap(made_by[str(v.name)], "output", str(v.name)) for v in hoisted.columns),
    )


def _run(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    for transformation in passes:
        transformation(model)


def _name_outputs(graph: ir.Graph, sites: tuple[SiteNode, ...]) -> None:
    """A site's result is called ``<site>/output``, unless it is the graph's."""
    for site in sites:
        if site.output not in graph.outputs:
            site.output.name = f"{site.plan.site}/output"


def _blocks(graph: ir.Graph, blocks: tuple[Block, ...], sites: tuple[SiteNode, ...]) -> tuple[GraphBlock, ...]:
    ignored = conditions(graph)

    def taps(wanted: tuple[Tap, ...]) -> tuple[GraphTap, ...]:
        found = ((tap, tapped(graph, tap, ignored)) for tap in wanted)
        return tuple(GraphTap(tap.module, tap.side, str(value.name)) for tap, value in found if value is not None)

    return tuple(
        GraphBlock(
            block.name,
            taps(block.entering),
            taps(block.leaving),
            tuple(site.plan.site for site in sites if inside(site.plan.site, block.modules)),
        )
        for block in blocks
    )


def _weights_per_channel(site: SiteNode) -> int:
    assert site.weight.shape is not None  # parameters have shapes
    shape = site.weight.shape.numpy()
    return math.prod(shape) // shape[0 if site.plan.op == "conv" else -1]


def _describe(site: SiteNode, calibrated: CalibratedModel) -> GraphSite:
    plan = site.plan
    point = calibrated.plan.point(plan.act_point) if plan.act_point else None
    return GraphSite(
        site=plan.site,
        op=plan.op,
        node=str(site.node.name),
        input=str(site.input.name),
        codes=f"{point.name}/input_quantizer/codes" if point else None,
        weight=f"{plan.site}/weight_quantizer/codes" if plan.weights != "none" else None,
        output=str(site.output.name),
        act_point=plan.act_point,
        weights=plan.weights,
        activations=point.activations if point else "none",
    )


def _point_specs(
    calibrated: CalibratedModel, sites: tuple[SiteNode, ...], centres: dict[str, float]
) -> tuple[PointSpec, ...]:
    """Points in the order of the table's columns, with the rank of the tensor that each scales."""
    ranks = {site.plan.act_point: 4 if site.plan.op == "conv" else len(site.input.shape or ()) for site in sites}
    return tuple(PointSpec(name, centres[name], ranks[name]) for name in calibrated.scales.points)
