"""``export_graph``: the way from a calibrated model to the canonical graph on disk."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export.canonical import DType, TextProjectionsForm, TimeTableForm, canonical_graph, denoiser_config
from s2p_deploy.export.centres import usable_centres
from s2p_deploy.export.conditioning import (
    check_time_path,
    conditioning_model,
    time_path_model,
    write_conditioning,
)
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.tracing import OPSET
from s2p_deploy.families import kind_of_config, latent_shape_of
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records import ExportedGraph, TensorSpec, check_vacant, write_artifact
from s2p_deploy.records.disk_room import check_room, writing
from s2p_deploy.records.exported_graph import CONDITIONING_FILE, TEXT_FILE, graph_json
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.timestep_table import write_timestep_table

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.export.canonical import CanonicalGraph
    from s2p_deploy.export.tracing import Sizes
    from s2p_deploy.families import TimePath
    from s2p_deploy.records import CalibratedModel, PrecisionPlan

GRAPH_FILE = "denoiser.onnx"
_INLINE_UP_TO = 1024  # bytes; scales, zero points and shapes stay readable in the graph file


def export_graph(  # noqa: PLR0913 - an export has these arguments, all but two by keyword
    calibrated: CalibratedModel,
    out: Path,
    *,
    dtype: DType = "fp32",
    time_table: TimeTableForm | None = None,
    time_path: TimePath | None = None,
    text_projections: TextProjectionsForm = "graph",
    sizes: Sizes = "fixed",
    replace: bool = False,
    progress: Progress = silent,
) -> ExportedGraph:
    """Writes the canonical graph of a calibrated model.

    Args:
        calibrated: what to export; its weights are read one tensor at a time.
        out: folder of the artifact.
        dtype: type of all floating-point tensors but the scales, which stay float32 until their ratios are taken.
        time_table: ``constant`` keeps the projected time features of every row in the graph; ``input`` makes the row's
            features an input and the rows of ``act_scales`` dynamic. None: ``constant`` where the model has such a
            table, ``input`` where its features depend on the prompt too.
        time_path: with ``input`` in place of a table, what computes the features: of the pipeline that the model was
            calibrated from.
        text_projections: ``graph`` computes the products of the text in every step; ``input`` makes them an input,
            which ``text.onnx`` computes once per prompt.
        sizes: ``fixed`` takes latents of the trained size; ``dynamic`` any whose height and width are multiples of what
            the network's levels or patches ask for.
        replace: whether an artifact at ``out`` may be replaced.
        progress: told about every tensor written.

    Raises:
        InputError: ``out`` exists; its disk has no room; a ratio of scales or a weight is out of the range of
            ``dtype``; the model has no such form; ``time_path`` is missing, or not that of the model's time table.
        GraphContractError: a planned site is not in the denoiser, or the graph breaks its own contract.
    """
    check_vacant(out, replace=replace)
    form = _form(calibrated, time_table)
    if form == "input" and not calibrated.added_width:
        check_time_path(time_path, calibrated)
    graph = canonical_graph(calibrated, dtype, form, text_projections, sizes)
    if form == "input":
        graph = _with_conditioning(graph, calibrated, time_path, dtype)
    check_room(out, graph.bytes)

    def fill(folder: Path) -> dict[str, Any]:
        _write_graph(graph, calibrated.plan, dtype, folder, progress)
        _write_tables(calibrated, folder)
        forms = {"time_table": form, "text_projections": text_projections, "full_sites": list(graph.full_sites)}
        return _content(calibrated, dtype) | forms | (_open_latents(calibrated) if sizes == "dynamic" else {})

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


def _form(calibrated: CalibratedModel, asked: TimeTableForm | None) -> TimeTableForm:
    if calibrated.added_width and asked == "constant":
        raise InputError(
            f"the time features of {calibrated.folder} depend on the prompt too, they cannot be constant:"
            " export with --time-table input"
        )
    return asked or ("input" if calibrated.added_width else "constant")


def _write_graph(graph: CanonicalGraph, plan: PrecisionPlan, dtype: DType, folder: Path, progress: Progress) -> None:
    """Writes the models, and ``graph.json``, which describes them; the denoiser is held to its contract."""
    write_model(graph.model, folder / GRAPH_FILE, progress)
    if graph.text_model is not None:
        write_model(graph.text_model, folder / TEXT_FILE, progress)
    check_graph(folder / GRAPH_FILE, plan, [site.site for site in graph.sites if site.graph == "text"])
    if graph.conditioning is not None:
        write_conditioning(graph.conditioning, folder / CONDITIONING_FILE, progress)
    described = graph_json(
        dtype=dtype,
        inputs=tuple(_spec(value) for value in graph.model.graph.inputs),
        outputs=tuple(_spec(value) for value in graph.model.graph.outputs),
        sites=graph.sites,
        blocks=graph.blocks,
        text=graph.text,
    )
    (folder / "graph.json").write_text(described, encoding="utf-8")


def _with_conditioning(
    graph: CanonicalGraph, calibrated: CalibratedModel, time_path: TimePath | None, dtype: DType
) -> CanonicalGraph:
    if calibrated.added_width:
        half = dtype == "fp16"
        return dataclasses.replace(
            graph, conditioning=conditioning_model(calibrated, denoiser_config(calibrated), half=half)
        )
    assert time_path is not None  # it was checked
    return dataclasses.replace(graph, conditioning=time_path_model(time_path))


def _write_tables(calibrated: CalibratedModel, folder: Path) -> None:
    write_scale_table(calibrated.scales, folder / "act_scales.safetensors")
    write_plan(calibrated.plan, folder / "plan.yaml")
    write_timestep_table(calibrated.timesteps, folder / "timesteps.json")


def write_model(model: ir.Model, file: Path, progress: Progress, stage: str = "write weights") -> None:
    """Writes a graph and its one external data file, tensor by tensor, and checks it as ONNX.

    Raises:
        InputError: the disk is full.
    """
    with writing(file):
        ir.save(
            model,
            file,
            external_data=f"{file.name}.data",
            size_threshold_bytes=_INLINE_UP_TO,
            callback=lambda _tensor, info: progress(stage, info.index + 1, info.total),
        )
    onnx.checker.check_model(str(file), full_check=True)


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise GraphContractError(f"{value.name} has no type or no shape")
    return TensorSpec(
        str(value.name), value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    )


def _open_latents(calibrated: CalibratedModel) -> dict[str, Any]:
    config = denoiser_config(calibrated)
    _, height, width = latent_shape_of(config)
    kind = kind_of_config(config)
    bounds = {"multiple": kind.size_multiple(config), "largest": kind.size_limit(config)}
    return {"latents": {"height": height, "width": width} | bounds}


def _content(calibrated: CalibratedModel, dtype: DType) -> dict[str, Any]:
    """What the manifest says of the graph; ``points`` gives every act point's centre and range of scales."""
    centres = usable_centres(calibrated.scales, dtype)
    columns = dict(zip(calibrated.scales.points, calibrated.scales.scales.T, strict=True))
    return {
        "dtype": dtype,
        "opset": OPSET,
        "added_cond": calibrated.added_width,
        "lowering": "rescale",
        "sites": len(calibrated.plan.sites),
        "points": {
            name: {"centre": centre, "lowest": float(columns[name].min()), "highest": float(columns[name].max())}
            for name, centre in centres.items()
        },
        "denoiser_config": denoiser_config(calibrated),
    }
