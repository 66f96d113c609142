"""``export_graph``: the way from a calibrated model to the canonical graph on disk.

The denoiser is traced on the meta device, its nodes are named and located, and quantizers are put in; weights are read
from safetensors one at a time while the finished graph is written.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir
import torch

from s2p_deploy.context import Context
from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export.float_networks import check_time_path, conditioning_model, time_path_model
from s2p_deploy.export.graph_contract import check_graph
from s2p_deploy.export.lora_targets import LoraRequest, lora_targets
from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.passes.float32_layers import Float32Layers
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec
from s2p_deploy.export.passes.hoisted_text import HoistedText
from s2p_deploy.export.passes.image_attention import ImageAttention
from s2p_deploy.export.passes.lora_branches import LoraBranches
from s2p_deploy.export.passes.names import ReadableNames, StripMetadata
from s2p_deploy.export.passes.open_sizes import OpenSizes
from s2p_deploy.export.passes.time_projections import TimeProjections
from s2p_deploy.export.passes.transposed_keys import TransposedKeys
from s2p_deploy.export.passes.weights import DirectWeights, StoredWeights
from s2p_deploy.export.quantization import overflowing_layers, usable_reference_scales
from s2p_deploy.export.regions import LayerNode, conditions, inside, locate_layers, module_path, tapped
from s2p_deploy.export.tensors import DTYPES, stored_bytes, write_model
from s2p_deploy.export.tracing import OPSET, trace_denoiser
from s2p_deploy.families import family_of_config, latent_shape_of
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import (
    ExportedGraph,
    GraphBlock,
    GraphDescription,
    GraphLayer,
    GraphTap,
    TensorSpec,
    TimeTable,
    check_vacant,
    write_artifact,
)
from s2p_deploy.records.exported_graph import (
    CONDITIONING_FILE,
    GRAPH_FILE,
    MOST_CHUNKS,
    TEXT_FILE,
    LatentSizes,
    QuantizerRange,
    TextChunks,
)
from s2p_deploy.records.files import check_room
from s2p_deploy.records.image_slots import MOST_IMAGE_ADAPTERS, MOST_IMAGE_TOKENS
from s2p_deploy.records.precision_plan import PLAN_FILE, write_plan
from s2p_deploy.records.scale_table import SCALES_FILE, TIMESTEPS_FILE, write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import json_data, json_text

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from s2p_deploy.export.tracing import Sizes
    from s2p_deploy.families import Block, Tap, TimePath
    from s2p_deploy.records import CalibratedModel
    from s2p_deploy.records.image_slots import ImageSlots
    from s2p_deploy.records.optional_inputs import LoraSlots

DType = Literal["fp32", "fp16"]
TimeTableForm = Literal["constant", "input"]
TextProjectionsForm = Literal["graph", "input"]
ONNX_FILE, WRITE = "denoiser.onnx", "write weights"
_TORCH = {"fp32": torch.float32, "fp16": torch.float16}
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
    check_vacant(out, replace=replace)
    _check_exportable(calibrated, time_table, text_projections)
    text = None if chunks is None else _text_chunks(calibrated, *chunks)
    form: TimeTableForm = time_table or ("input" if calibrated.added_width else "constant")
    if form == "input" and not calibrated.added_width:
        check_time_path(time_path, calibrated)
    config = calibrated.denoiser_config()
    graph = _canonical_graph(
        calibrated,
        config,
        dtype,
        form,
        text_projections,
        sizes,
        open_tokens=text is not None,
        lora=lora,
        controlnet=controlnet,
        image_attention=None if images is None else _image_attention(config, *images, DTYPES[dtype]),
    )
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
        (folder / GRAPH_FILE).write_text(json_text(_description(graph, dtype)), encoding="utf-8")
        write_scale_table(calibrated.scales, folder / SCALES_FILE)
        write_plan(calibrated.plan, folder / PLAN_FILE)
        write_timestep_table(calibrated.timesteps, folder / TIMESTEPS_FILE)
        opened = {"latents": _latent_sizes(config)} if sizes == "dynamic" else {}
        opened |= {} if text is None else {"chunks": json_data(text)}
        opened |= {} if graph.lora is None else {"lora": json_data(graph.lora)}
        opened |= {} if graph.images is None else {"images": json_data(graph.images)}
        return {
            "dtype": dtype,
            "opset": OPSET,
            "added_width": calibrated.added_width,
            "lowering": "rescale",
            "layers": len(calibrated.plan.layers),
            "quantizers": _quantizer_ranges(calibrated, graph.reference_scales),
            "denoiser_config": config,
            "time_table": form,
            "text_projections": text_projections,
            "float32_layers": list(graph.float32_layers),
        } | opened

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


@dataclass(frozen=True)
class _CanonicalGraph:
    """The canonical graph in memory (its weights not read yet), and the places of layers and blocks in it.

    ``float32_layers`` are those that a half-precision graph computes in float32. Where the products of the text are an
    input, ``text_model`` computes them, and ``text`` names the tensors that are its columns.
    """

    model: ir.Model
    layers: tuple[GraphLayer, ...]
    blocks: tuple[GraphBlock, ...]
    reference_scales: dict[str, float]
    float32_layers: tuple[str, ...] = ()
    text_model: ir.Model | None = None
    text: tuple[GraphTap, ...] = ()
    lora: LoraSlots | None = None
    images: ImageSlots | None = None


def _text_chunks(calibrated: CalibratedModel, fewest: int, most: int) -> TextChunks:
    """Makes the record of chunks as long as the text that a model was calibrated on. Raises InputError for others."""
    if not 1 <= fewest <= most <= MOST_CHUNKS:
        raise InputError(f"{fewest} to {most} chunks of text: 1 to {MOST_CHUNKS} are possible, ascending")
    return TextChunks(calibrated.tokens, fewest, most)


def _image_attention(config: dict[str, Any], tokens: int, adapters: int, dtype: ir.DataType) -> ImageAttention:
    """Makes the pass that lets a graph take image prompts. Raises InputError where it cannot, or not so many."""
    for given, most, what in (
        (tokens, MOST_IMAGE_TOKENS, "tokens of an image prompt"),
        (adapters, MOST_IMAGE_ADAPTERS, "IP-Adapters at once"),
    ):
        if not 1 <= given <= most:
            raise InputError(f"{given} {what}: 1 to {most} are possible")
    if family_of_config(config).component != "unet":
        raise InputError(
            "no IP-Adapter can act on this denoiser, which has no cross-attention: leave --image-tokens out"
        )
    return ImageAttention(tokens, adapters, dtype)


def _canonical_graph(  # noqa: PLR0913 - an export's own arguments
    calibrated: CalibratedModel,
    config: dict[str, Any],
    dtype: DType,
    time_table: TimeTableForm,
    text_projections: TextProjectionsForm,
    sizes: Sizes,
    *,
    open_tokens: bool,
    lora: LoraRequest | None,
    controlnet: bool,
    image_attention: ImageAttention | None,
) -> _CanonicalGraph:
    """Makes the canonical graph: traced, named, located, quantized, lowered."""
    kind, plan, source = DTYPES[dtype], calibrated.plan, calibrated.time_source()
    traced = trace_denoiser(
        config,
        source,
        calibrated.transforms,
        tokens=calibrated.tokens,
        dtype=_TORCH[dtype],
        sizes=sizes,
        open_tokens=open_tokens,
        controlnet=controlnet,
    )
    model, direct = traced.model, DirectWeights()
    _run(model, FoldConstants(), *([OpenSizes()] if sizes == "dynamic" or open_tokens else []))
    if sizes == "dynamic":
        for value in model.graph.inputs:
            if value.name in traced.optional:
                value.shape = ir.Shape(traced.optional[value.name])
    if isinstance(source, TimeTable):
        _run(model, TimeProjections(source.projections, time_table, kind))
    _run(model, direct, TransposedKeys(), ReadableNames())
    layers = locate_layers(model.graph, plan.layers)
    for layer in layers:
        if layer.output not in model.graph.outputs:
            layer.output.name = f"{layer.plan.name}/output"
    # blocks and layers are described before quantizers change what they read
    blocks = _blocks(model.graph, traced.blocks, layers)
    described = tuple(_describe(layer, calibrated) for layer in layers)
    branches = None if lora is None else LoraBranches(lora_targets(calibrated, layers, lora), lora.rank, kind)
    reference_scales = usable_reference_scales(calibrated.scales, dtype)
    counts = {layer.plan.name: _weights_per_channel(layer) for layer in layers}
    overflowing = overflowing_layers(calibrated, counts, reference_scales) if dtype == "fp16" else frozenset()
    full = [layer for layer in layers if layer.plan.name in overflowing]
    ranks = {
        layer.plan.activation_quantizer: 4 if layer.plan.op == "conv" else len(layer.input.shape or ())
        for layer in layers
    }
    scales = GatherScales(
        tuple(QuantizerSpec(name, reference_scales[name], ranks[name]) for name in calibrated.scales.quantizers),
        "timesteps" if time_table == "input" else len(calibrated.scales.scales),
        kind,
    )
    _run(model, StoredWeights(direct.keys, calibrated.tensor, kind, layers, calibrated.weight_scales()), scales)
    _run(model, *(adapters for adapters in (branches, image_attention) if adapters is not None))
    for quantizer in plan.activation_quantizers:
        fmt = format_by_name(quantizer.activations)
        assert fmt is not None  # an activation quantizer has a format
        members = [layer for layer in layers if layer.plan.activation_quantizer == quantizer.name]
        lower_rescale(model.graph, quantizer.name, fmt, members, scales.scales[quantizer.name])
    _run(model, Float32Layers(full))
    _put_last(model.graph, traced.optional)
    graph = _CanonicalGraph(
        model,
        described,
        blocks,
        reference_scales,
        tuple(layer.plan.name for layer in full),
        lora=None if branches is None else branches.slots,
        images=None if image_attention is None else image_attention.slots,
    )
    if text_projections == "input":
        graph = _with_text_apart(graph, layers)
    _run(model, StripMetadata())
    return graph


def _with_text_apart(whole: _CanonicalGraph, layers: tuple[LayerNode, ...]) -> _CanonicalGraph:
    hoisted = HoistedText([layer.node for layer in layers])
    made_by = {str(value.name): module_path(node) for node in whole.model.graph for value in node.outputs}
    _run(whole.model, hoisted)
    assert hoisted.text_graph is not None  # it was made
    _run(hoisted.text_graph, StripMetadata())
    apart = {layer.plan.name for layer in layers if layer.node in hoisted.moved}
    return dataclasses.replace(
        whole,
        layers=tuple(
            dataclasses.replace(layer, graph="text") if layer.name in apart else layer for layer in whole.layers
        ),
        text_model=hoisted.text_graph,
        text=tuple(GraphTap(made_by[str(v.name)], "output", str(v.name)) for v in hoisted.columns),
    )


def _put_last(graph: ir.Graph, optional: Collection[str]) -> None:
    """Moves inputs behind the others."""
    moved = [value for value in graph.inputs if value.name in optional]
    for value in moved:
        graph.inputs.remove(value)
    graph.inputs.extend(moved)


def _run(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    for transformation in passes:
        transformation(model)


def _blocks(graph: ir.Graph, blocks: tuple[Block, ...], layers: tuple[LayerNode, ...]) -> tuple[GraphBlock, ...]:
    ignored = conditions(graph)

    def taps(wanted: tuple[Tap, ...]) -> tuple[GraphTap, ...]:
        located = ((tap, tapped(graph, tap, ignored)) for tap in wanted)
        return tuple(GraphTap(tap.module, tap.side, str(value.name)) for tap, value in located if value is not None)

    return tuple(
        GraphBlock(
            block.name,
            taps(block.entering),
            taps(block.leaving),
            tuple(layer.plan.name for layer in layers if inside(layer.plan.name, block.modules)),
        )
        for block in blocks
    )


def _weights_per_channel(layer: LayerNode) -> int:
    assert layer.weight.shape is not None  # parameters have shapes
    shape = layer.weight.shape.numpy()
    return math.prod(shape) // shape[0 if layer.plan.op == "conv" else -1]


def _describe(layer: LayerNode, calibrated: CalibratedModel) -> GraphLayer:
    plan = layer.plan
    quantizer = calibrated.plan.quantizer(plan.activation_quantizer) if plan.activation_quantizer else None
    return GraphLayer(
        name=plan.name,
        op=plan.op,
        node=str(layer.node.name),
        input=str(layer.input.name),
        codes=f"{quantizer.name}/input_quantizer/codes" if quantizer else None,
        weight=f"{plan.name}/weight_quantizer/codes" if plan.weights != "none" else None,
        output=str(layer.output.name),
        activation_quantizer=plan.activation_quantizer,
        weights=plan.weights,
        activations=quantizer.activations if quantizer else "none",
    )


def _description(graph: _CanonicalGraph, dtype: DType) -> GraphDescription:
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
