"""``export_graph``: the way from a calibrated model to the canonical graph on disk.

The denoiser is traced on the meta device, its nodes are named and located, and quantizers are put in; weights are read
from safetensors one at a time while the finished graph is written.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from s2p_deploy.context import Context
from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export.canonical_graph import GraphForm, canonical_graph
from s2p_deploy.export.float_networks import check_time_path, conditioning_model, time_path_model
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.export.tensors import stored_bytes, write_model
from s2p_deploy.export.tracing import OPSET
from s2p_deploy.families import family_of_config, latent_shape_of
from s2p_deploy.records import (
    ExportedGraph,
    GraphDescription,
    TensorSpec,
    check_vacant,
    write_artifact,
)
from s2p_deploy.records.artifacts import copy_verified
from s2p_deploy.records.exported_graph import (
    CONDITIONING_FILE,
    CONTROL_FILE,
    GRAPH_FILE,
    MOST_CHUNKS,
    TEXT_FILE,
    GraphContent,
    LatentSizes,
    QuantizerRange,
    TextChunks,
)
from s2p_deploy.records.files import check_room
from s2p_deploy.records.precision_plan import PLAN_FILE, write_plan
from s2p_deploy.records.scale_table import SCALES_FILE, TIMESTEPS_FILE, write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import flaw_of, json_data, json_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from s2p_deploy.export.canonical_graph import CanonicalGraph, DType, TextProjectionsForm, TimeTableForm
    from s2p_deploy.export.tracing import Sizes
    from s2p_deploy.families import TimePath
    from s2p_deploy.records import CalibratedModel

ONNX_FILE, WRITE = "denoiser.onnx", "write weights"
_CONDITIONING_INSIDE = 2**25  # bytes of the time path's weights that stay inside its graph file


def export_graph(  # noqa: PLR0913 - an export has these arguments, all but two by keyword
    calibrated: CalibratedModel,
    out: Path,
    *,
    dtype: DType = "fp32",
    time_table: TimeTableForm | None = None,
    time_path: TimePath | None = None,
    text_projections: TextProjectionsForm = "graph",
    sizes: Sizes = "fixed",
    chunks: tuple[int, int] | None = None,
    lora: LoraRequest | None = None,
    controlnet: bool = False,
    images: tuple[int, int] | None = None,
    replace: bool = False,
    context: Context = Context(),
) -> ExportedGraph:
    """Writes the canonical graph of a calibrated model.

    Args:
        calibrated: what to export; its weights are read one tensor at a time.
        out: folder of the artifact.
        dtype: type of all floating-point tensors but the scales, which stay float32 until their ratios are taken.
        time_table: ``constant`` keeps the projected time features of every timestep in the graph; ``input`` makes a
            sample's features an input and the number of timesteps of ``act_scales`` dynamic. None: ``constant`` where
            the model has such a table, ``input`` where its features depend on the prompt too.
        time_path: computes the features with ``input`` in place of a table: of the pipeline that the model was
            calibrated from.
        text_projections: ``graph`` computes the products of the text in every step; ``input`` makes them an input,
            which ``text.onnx`` computes once per prompt.
        sizes: ``fixed`` takes latents of the trained size; ``dynamic`` any whose height and width are multiples of what
            the network's levels or patches ask for.
        chunks: the fewest and most chunks of text that the graph takes, each as long as the calibrated one; it stays
            open for any number of tokens in between (None: one chunk).
        lora: the layers that get low-rank branches, whose matrices are inputs (None: none).
        controlnet: whether the residuals of a ControlNet are inputs.
        images: the most tokens of an image prompt, and how many of these act at once, each of its own IP-Adapter (None:
            the graph takes none).
        replace: whether an artifact at ``out`` may be replaced.
        context: its progress is called after every tensor that is written.

    Raises:
        InputError: ``out`` exists; its disk has no room; a ratio of scales or a weight is out of the range of
            ``dtype``; the model has no such form; ``chunks`` are no such numbers; ``time_path`` is missing, or not that
            of the model's time table; a layer that ``lora`` wants can have no branch; ``images`` are out of range, or
            the denoiser has no cross-attention.
        GraphContractError: a planned layer is not in the denoiser, or the graph breaks its own contract.
    """
    check_vacant(out, "ExportedGraph", replace=replace, inputs={"calibrated model": calibrated.folder})
    _check_exportable(calibrated, time_table, text_projections)
    _check_adapters(calibrated, {"--lora-rank": lora, "--controlnet": controlnet, "--image-tokens": images})
    text = None if chunks is None else _text_chunks(calibrated, *chunks)
    form: TimeTableForm = time_table or ("input" if calibrated.added_width else "constant")
    if form == "input" and not calibrated.added_width:
        check_time_path(time_path, calibrated)
    config = calibrated.denoiser_config()
    graph_form = GraphForm(dtype, form, text_projections, sizes, text is not None, lora, controlnet, images)
    graph = canonical_graph(calibrated, graph_form)
    description = json_text(_description(graph, dtype))
    content = _content(calibrated, graph, graph_form, text)
    _check_readable(calibrated, content, description)
    conditioning = None
    if form == "input" and calibrated.added_width:
        conditioning = conditioning_model(calibrated, config, half=dtype == "fp16")
    elif form == "input" and time_path is not None:
        conditioning = time_path_model(time_path)
    models = {ONNX_FILE: graph.model, TEXT_FILE: graph.text_model, CONDITIONING_FILE: conditioning}
    check_room(out, sum(stored_bytes(model) for model in models.values() if model is not None))

    def fill(folder: Path) -> dict[str, Any]:
        for name, model in models.items():
            if model is not None:
                stage, inside = ("write conditioning", _CONDITIONING_INSIDE) if model is conditioning else (WRITE, 0)
                write_model(model, folder / name, context.progress, stage, one_file_up_to=inside)
        # what was written is checked, not what is in memory
        check_graph(
            folder / ONNX_FILE, calibrated.plan, [layer.name for layer in graph.layers if layer.graph == "text"]
        )
        (folder / GRAPH_FILE).write_text(description, encoding="utf-8")
        write_scale_table(calibrated.scales, folder / SCALES_FILE)
        write_plan(calibrated.plan, folder / PLAN_FILE)
        write_timestep_table(calibrated.timesteps, folder / TIMESTEPS_FILE)
        if CONTROL_FILE in calibrated.manifest.files:
            copy_verified(calibrated, CONTROL_FILE, folder / CONTROL_FILE)
        return content

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


def _check_exportable(
    calibrated: CalibratedModel, time_table: TimeTableForm | None, text_projections: TextProjectionsForm
) -> None:
    """Raises InputError where the model has no such form."""
    calibrated.require_deployable()
    if calibrated.added_width and time_table == "constant":
        raise InputError(
            f"the time features of {calibrated.folder} depend on the prompt too, they cannot be constant:"
            " export with --time-table input"
        )
    # the scales of a quantized text are looked up by the timestep, though they are the same for all of them
    quantized = [quantizer for quantizer in calibrated.plan.activation_quantizers if not quantizer.timestep_dependent]
    if text_projections == "input" and quantized:
        raise InputError(
            f"{quantized[0].layers[0]} reads the text in {quantized[0].activations}, so it is computed in every step: "
            "export with --text-projections graph, or calibrate with the rule {match: text, activations: none}"
        )


def _check_adapters(calibrated: CalibratedModel, asked: Mapping[str, object]) -> None:
    """Raises InputError where inputs for adapters are asked for, by option, of a ControlNet."""
    given = [option for option, value in asked.items() if value]
    if given and family_of_config(calibrated.denoiser_config()).component == "controlnet":
        raise InputError(
            f"{calibrated.folder} is a ControlNet's calibration, and adapters act on the denoiser: leave {given[0]} out"
        )


def _text_chunks(calibrated: CalibratedModel, fewest: int, most: int) -> TextChunks:
    """Makes the record of chunks as long as the text that a model was calibrated on. Raises InputError for others."""
    if not 1 <= fewest <= most <= MOST_CHUNKS:
        raise InputError(f"{fewest} to {most} chunks of text: 1 to {MOST_CHUNKS} are possible, ascending")
    return TextChunks(calibrated.tokens, fewest, most)


def _content(
    calibrated: CalibratedModel, graph: CanonicalGraph, form: GraphForm, text: TextChunks | None
) -> dict[str, Any]:
    """Makes the graph's own part of its manifest, JSON-ready."""
    config = calibrated.denoiser_config()
    opened = {"latents": _latent_sizes(config)} if form.sizes == "dynamic" else {}
    opened |= {} if text is None else {"chunks": json_data(text)}
    opened |= {} if graph.lora is None else {"lora": json_data(graph.lora)}
    opened |= {} if graph.images is None else {"images": json_data(graph.images)}
    return {
        "dtype": form.dtype,
        "opset": OPSET,
        "added_width": calibrated.added_width,
        "lowering": "rescale",
        "layers": len(calibrated.plan.layers),
        "quantizers": _quantizer_ranges(calibrated, graph.reference_scales),
        "denoiser_config": config,
        "time_table": form.time_table,
        "text_projections": form.text_projections,
        "float32_layers": list(graph.float32_layers),
    } | opened


def _check_readable(calibrated: CalibratedModel, content: dict[str, Any], description: str) -> None:
    """Raises InputError where a graph's records are none that :meth:`ExportedGraph.open` reads."""
    problem = flaw_of(GraphContent, json.dumps(content)) or flaw_of(GraphDescription, description)
    if problem:
        raise InputError(
            f"a graph of {calibrated.folder} could not be read again, so it is not written ({problem}): leave adapters"
            " out, or take smaller ones"
        )


def _description(graph: CanonicalGraph, dtype: DType) -> GraphDescription:
    inputs, outputs = (tuple(map(_spec, values)) for values in (graph.model.graph.inputs, graph.model.graph.outputs))
    return GraphDescription(
        dtype=dtype, inputs=inputs, outputs=outputs, layers=graph.layers, blocks=graph.blocks, text=graph.text
    )


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise GraphContractError(f"{value.name} has no type or no shape")
    return TensorSpec(
        str(value.name), value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    )


def _quantizer_ranges(calibrated: CalibratedModel, reference_scales: dict[str, float]) -> dict[str, Any]:
    """Returns every quantizer's reference scale, and the range of scales that was checked, JSON-ready."""
    columns = dict(zip(calibrated.scales.quantizers, calibrated.scales.scales.T, strict=True))
    ranges = {
        name: QuantizerRange(reference_scale, float(columns[name].min()), float(columns[name].max()))
        for name, reference_scale in reference_scales.items()
    }
    return {name: json_data(scales) for name, scales in ranges.items()}


def _latent_sizes(config: dict[str, Any]) -> dict[str, Any]:
    _, height, width = latent_shape_of(config)
    family = family_of_config(config)
    sizes: dict[str, Any] = json_data(
        LatentSizes(height, width, family.size_multiple(config), family.size_limit(config))
    )
    return sizes
