"""``export_graph``: the way from a calibrated model to the canonical graph on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.passes.fill_weights import FillWeights
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.readable_names import ReadableNames
from s2p_deploy.export.passes.scale_rows import PointSpec, ScaleRows
from s2p_deploy.export.passes.strip_metadata import StripMetadata
from s2p_deploy.export.passes.time_projections import TimeProjections
from s2p_deploy.export.passes.transposed_keys import TransposedKeys
from s2p_deploy.export.passes.weight_quantizers import WeightQuantizers
from s2p_deploy.export.regions import SiteNode, block_border, block_modules, conditions, locate_sites
from s2p_deploy.export.scopes import inside
from s2p_deploy.export.tensors import DTYPES
from s2p_deploy.export.tracing import OPSET, trace_denoiser
from s2p_deploy.numerics import format_by_name
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records import ExportedGraph, GraphBlock, GraphSite, TensorSpec, write_artifact
from s2p_deploy.records.exported_graph import graph_json
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.timestep_table import write_timestep_table

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.records import CalibratedModel, ScaleTable

GRAPH_FILE, DATA_FILE = "denoiser.onnx", "denoiser.onnx.data"
DType = Literal["fp32", "fp16"]
TimeTableForm = Literal["constant", "input"]
_TORCH = {"fp32": torch.float32, "fp16": torch.float16}
_INLINE_UP_TO = 1024  # bytes; scales, zero points and shapes stay readable in the graph file


@dataclass(frozen=True)
class CanonicalGraph:
    """The canonical graph in memory (its weights not read yet), and where sites and blocks are in it."""

    model: ir.Model
    sites: tuple[GraphSite, ...]
    blocks: tuple[GraphBlock, ...]


def export_graph(  # noqa: PLR0913 - what and where, then options
    calibrated: CalibratedModel,
    out: Path,
    *,
    dtype: DType = "fp32",
    time_table: TimeTableForm = "constant",
    replace: bool = False,
    progress: Progress = silent,
) -> ExportedGraph:
    """Writes the canonical graph of a calibrated model.

    Args:
        calibrated: what to export; its weights are read one tensor at a time.
        out: folder of the artifact.
        dtype: type of all floating-point tensors but the scales, which stay float32 until their ratios are taken.
        time_table: ``constant`` keeps the projected time features of every row in the graph; ``input`` makes the row's
            features an input and the rows of ``act_scales`` dynamic.
        replace: whether an artifact at ``out`` may be replaced.
        progress: told about every tensor written.

    Raises:
        InputError: ``out`` exists; a ratio of scales or a weight is out of the range of ``dtype``.
        GraphContractError: a planned site is not in the denoiser, or the graph breaks its own contract.
    """
    graph = canonical_graph(calibrated, dtype, time_table)

    def fill(folder: Path) -> dict[str, Any]:
        _write_model(graph.model, folder, progress)
        check_graph(folder / GRAPH_FILE, calibrated.plan)
        inputs, outputs = (_specs(values) for values in (graph.model.graph.inputs, graph.model.graph.outputs))
        text = graph_json(dtype=dtype, inputs=inputs, outputs=outputs, sites=graph.sites, blocks=graph.blocks)
        (folder / "graph.json").write_text(text, encoding="utf-8")
        write_scale_table(calibrated.scales, folder / "act_scales.safetensors")
        write_plan(calibrated.plan, folder / "plan.yaml")
        write_timestep_table(calibrated.timesteps, folder / "timesteps.json")
        return _content(calibrated, dtype, time_table)

    write_artifact(
        out,
        kind="ExportedGraph",
        base=calibrated.manifest.base,
        recipe=calibrated.manifest.recipe,
        parents={"calib": (calibrated.folder, calibrated.manifest)},
        fill=fill,
        replace=replace,
    )
    return ExportedGraph.open(out)


def canonical_graph(calibrated: CalibratedModel, dtype: DType, time_table: TimeTableForm) -> CanonicalGraph:
    """The canonical graph, its initializers still to be read. See :func:`export_graph`."""
    kind, plan, weights = DTYPES[dtype], calibrated.plan, calibrated.folder / "weights.safetensors"
    table = calibrated.time_table()
    traced = trace_denoiser(denoiser_config(calibrated), table, tokens=calibrated.tokens, dtype=_TORCH[dtype])
    model = traced.model
    _run(
        model,
        FoldConstants(),
        TimeProjections(table.projections, time_table, kind),
        FillWeights(weights, kind),
        TransposedKeys(),
        ReadableNames(),
    )
    sites = locate_sites(model.graph, plan.sites)
    _name_outputs(model.graph, sites)
    blocks = _blocks(model.graph, traced.blocks, sites)
    described = tuple(_describe(site, calibrated) for site in sites)
    centres = usable_centres(calibrated.scales, dtype)
    points = _point_specs(calibrated, sites, centres)
    rows = ScaleRows(points, "rows" if time_table == "input" else len(calibrated.scales.scales), kind)
    _run(model, WeightQuantizers(sites, weights, calibrated.weight_scales(), kind), rows)
    for point in plan.act_points:
        fmt = format_by_name(point.activations)
        assert fmt is not None  # an act point has a format
        members = [site for site in sites if site.plan.act_point == point.name]
        lower_rescale(model.graph, point.name, fmt, members, rows.scales[point.name])
    _run(model, StripMetadata())
    return CanonicalGraph(model, described, blocks)


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


def usable_centres(scales: ScaleTable, dtype: DType) -> dict[str, float]:
    """The constant c of every act point, rounded to ``dtype``: ratios are taken against the rounded number, so that what
    Q and DQ divide and multiply by is what the ratios assume.

    Raises:
        InputError: c, or a ratio c/s or s/c of some row, is zero, subnormal or infinite in ``dtype``.
    """
    limits = np.finfo(np.float16 if dtype == "fp16" else np.float32)
    centres = scales.centres.astype(limits.dtype).astype(np.float32)
    smallest, largest = float(limits.tiny), float(limits.max)
    for name, centre, column in zip(scales.points, centres, scales.scales.T, strict=True):
        lowest, highest = float(column.min()), float(column.max())
        numbers = (float(centre), float(centre) / highest, highest / float(centre) if centre else np.inf)
        numbers += (float(centre) / lowest, lowest / float(centre) if centre else 0.0)
        if not all(smallest <= number <= largest for number in numbers):
            raise InputError(
                f"act point {name}: scales {lowest:g} to {highest:g} leave the range of {dtype} (centre {centre:g}): use fp32"
            )
    return {name: float(centre) for name, centre in zip(scales.points, centres, strict=True)}


def _run(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    for transformation in passes:
        transformation(model)


def _name_outputs(graph: ir.Graph, sites: tuple[SiteNode, ...]) -> None:
    """A site's result is called ``<site>/output``, unless it is the graph's."""
    for site in sites:
        if site.output not in graph.outputs:
            site.output.name = f"{site.plan.site}/output"


def _blocks(graph: ir.Graph, blocks: tuple[str, ...], sites: tuple[SiteNode, ...]) -> tuple[GraphBlock, ...]:
    ignored = conditions(graph)
    found = []
    for block, modules in block_modules(blocks).items():
        entering, leaving = block_border(graph, block, modules, ignored)
        members = tuple(site.plan.site for site in sites if inside(site.plan.site, modules))
        found.append(GraphBlock(block, str(entering.name), str(leaving.name), members))
    return tuple(found)


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


def _write_model(model: ir.Model, folder: Path, progress: Progress) -> None:
    """Writes the graph and its one external data file, tensor by tensor, and checks it as ONNX."""
    ir.save(
        model,
        folder / GRAPH_FILE,
        external_data=DATA_FILE,
        size_threshold_bytes=_INLINE_UP_TO,
        callback=lambda _tensor, info: progress("write weights", info.index + 1, info.total),
    )
    onnx.checker.check_model(str(folder / GRAPH_FILE), full_check=True)


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(value.name, value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d.value) for d in value.shape))
        for value in values
    )


def _content(calibrated: CalibratedModel, dtype: DType, time_table: TimeTableForm) -> dict[str, Any]:
    """What the manifest says of the graph; ``points`` gives every act point's centre and range of scales."""
    centres = usable_centres(calibrated.scales, dtype)
    columns = dict(zip(calibrated.scales.points, calibrated.scales.scales.T, strict=True))
    return {
        "dtype": dtype,
        "opset": OPSET,
        "time_table": time_table,
        "lowering": "rescale",
        "sites": len(calibrated.plan.sites),
        "points": {
            name: {"centre": centre, "lowest": float(columns[name].min()), "highest": float(columns[name].max())}
            for name, centre in centres.items()
        },
        "denoiser_config": denoiser_config(calibrated),
    }
