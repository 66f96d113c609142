"""``export_graph``: the way from a calibrated model to the canonical graph on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export.canonical import DType, TimeTableForm, canonical_graph, denoiser_config
from s2p_deploy.export.centres import usable_centres
from s2p_deploy.export.conditioning import check_time_path, write_conditioning
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.tracing import OPSET
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records import ExportedGraph, TensorSpec, check_vacant, write_artifact
from s2p_deploy.records.exported_graph import CONDITIONING_FILE, graph_json
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.timestep_table import write_timestep_table

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import TimePath
    from s2p_deploy.records import CalibratedModel

GRAPH_FILE, DATA_FILE = "denoiser.onnx", "denoiser.onnx.data"
_INLINE_UP_TO = 1024  # bytes; scales, zero points and shapes stay readable in the graph file


def export_graph(  # noqa: PLR0913 - an export has these arguments, all but two by keyword
    calibrated: CalibratedModel,
    out: Path,
    *,
    dtype: DType = "fp32",
    time_table: TimeTableForm = "constant",
    time_path: TimePath | None = None,
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
        time_path: with ``input``, what computes the features: of the pipeline that the model was calibrated from.
        replace: whether an artifact at ``out`` may be replaced.
        progress: told about every tensor written.

    Raises:
        InputError: ``out`` exists; a ratio of scales or a weight is out of the range of ``dtype``; ``time_path`` is
            missing, or not that of the model's time table.
        GraphContractError: a planned site is not in the denoiser, or the graph breaks its own contract.
    """
    check_vacant(out, replace=replace)
    if out.exists() and not replace:
        raise InputError(f"{out} exists: choose another --out, or pass --force to replace it")
    if time_table == "input":
        check_time_path(time_path, calibrated)
    graph = canonical_graph(calibrated, dtype, time_table)

    def fill(folder: Path) -> dict[str, Any]:
        _write_model(graph.model, folder, progress)
        check_graph(folder / GRAPH_FILE, calibrated.plan)
        inputs = tuple(_spec(value) for value in graph.model.graph.inputs)
        outputs = tuple(_spec(value) for value in graph.model.graph.outputs)
        text = graph_json(dtype=dtype, inputs=inputs, outputs=outputs, sites=graph.sites, blocks=graph.blocks)
        (folder / "graph.json").write_text(text, encoding="utf-8")
        write_scale_table(calibrated.scales, folder / "act_scales.safetensors")
        write_plan(calibrated.plan, folder / "plan.yaml")
        write_timestep_table(calibrated.timesteps, folder / "timesteps.json")
        if time_table == "input" and time_path is not None:
            write_conditioning(time_path, folder / CONDITIONING_FILE)
        return _content(calibrated, dtype, time_table) | {"full_sites": list(graph.full_sites)}

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


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise GraphContractError(f"{value.name} has no type or no shape")
    return TensorSpec(
        str(value.name), value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in value.shape)
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
