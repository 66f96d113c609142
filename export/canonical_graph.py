"""The canonical graph in memory: traced, named, located, quantized, lowered; no weight is read yet."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.lora_targets import LoraRequest, lora_targets
from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.passes.float32_layers import Float32Layers
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec, Reach
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
from s2p_deploy.export.tensors import DTYPES
from s2p_deploy.export.tracing import trace_denoiser
from s2p_deploy.families import family_of_config
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import (
    GraphBlock,
    GraphLayer,
    GraphTap,
    TimeTable,
)
from s2p_deploy.records.optional_inputs import MOST_IMAGE_ADAPTERS, MOST_IMAGE_TOKENS, is_optional

if TYPE_CHECKING:
    from collections.abc import Collection

    from s2p_deploy.export.lora_targets import LoraRequest
    from s2p_deploy.export.tracing import Sizes
    from s2p_deploy.families import Block, Tap
    from s2p_deploy.records import CalibratedModel, LayerPlan, PrecisionPlan
    from s2p_deploy.records.optional_inputs import ImageSlots, LoraSlots

DType = Literal["fp32", "fp16"]
TimeTableForm = Literal["constant", "input"]
TextProjectionsForm = Literal["graph", "input"]
_READER = ".to_out.0"
_TORCH = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class GraphForm:
    """What a graph takes and in which type; the values are those of :func:`s2p_deploy.export.export_graph`."""

    dtype: DType
    time_table: TimeTableForm
    text_projections: TextProjectionsForm = "graph"
    sizes: Sizes = "fixed"
    open_tokens: bool = False
    lora: LoraRequest | None = None
    controlnet: bool = False
    images: tuple[int, int] | None = None


@dataclass(frozen=True)
class CanonicalGraph:
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


def canonical_graph(calibrated: CalibratedModel, form: GraphForm) -> CanonicalGraph:
    """Makes the canonical graph of a calibrated model.

    Raises:
        InputError: a ratio of scales is out of the type's range; a layer can have no low-rank branch; image prompts are
            out of range, or the denoiser has no cross-attention.
        GraphContractError: a planned layer is not in the denoiser.
    """
    kind, plan, config = DTYPES[form.dtype], calibrated.plan, calibrated.denoiser_config()
    attention = None if form.images is None else _image_attention(calibrated, config, *form.images, kind)
    model, blocks, weights = _traced(calibrated, config, form)
    layers = locate_layers(model.graph, plan.layers)
    for layer in layers:
        if layer.output not in model.graph.outputs:
            layer.output.name = f"{layer.plan.name}/output"
    # blocks and layers are described before quantizers change what they read
    described_blocks = _blocks(model.graph, blocks, layers)
    described = tuple(_describe(layer, calibrated) for layer in layers)
    reference_scales = usable_reference_scales(calibrated.scales, form.dtype)
    counts = {layer.plan.name: _weights_per_channel(layer) for layer in layers}
    overflowing = overflowing_layers(calibrated, counts, reference_scales) if form.dtype == "fp16" else frozenset()
    full = [layer for layer in layers if layer.plan.name in overflowing]
    if attention is not None:
        _run(model, attention)
    branches = None
    if form.lora is not None:  # they read what attention adds to, as the layers do
        branches = LoraBranches(lora_targets(calibrated, layers, form.lora), form.lora.rank, kind)
    scales = _gathered_scales(calibrated, layers, reference_scales, form, attention)
    _run(model, StoredWeights(weights, calibrated.tensor, kind, layers, calibrated.weight_scales()), scales)
    if branches is not None:
        _run(model, branches)
    for quantizer in plan.activation_quantizers:
        fmt = format_by_name(quantizer.activations)
        assert fmt is not None  # an activation quantizer has a format
        members = [layer for layer in layers if layer.plan.activation_quantizer == quantizer.name]
        lower_rescale(model.graph, quantizer.name, fmt, members, scales.scales[quantizer.name])
    _run(model, Float32Layers(full))
    _put_last(model.graph, [str(value.name) for value in model.graph.inputs if is_optional(str(value.name))])
    graph = CanonicalGraph(
        model,
        described,
        described_blocks,
        reference_scales,
        tuple(layer.plan.name for layer in full),
        lora=None if branches is None else branches.slots,
        images=None if attention is None else attention.slots,
    )
    if form.text_projections == "input":
        graph = _with_text_apart(graph, layers, () if branches is None else branches.sums)
    _run(model, StripMetadata())
    return graph


def _traced(
    calibrated: CalibratedModel, config: dict[str, Any], form: GraphForm
) -> tuple[ir.Model, tuple[Block, ...], dict[ir.Value, tuple[str, bool]]]:
    """Traces the denoiser and names what is in it; returns its blocks, and which parameter every initializer is."""
    source = calibrated.time_source()
    traced = trace_denoiser(
        config,
        source,
        calibrated.transforms,
        tokens=calibrated.tokens,
        dtype=_TORCH[form.dtype],
        sizes=form.sizes,
        open_tokens=form.open_tokens,
        controlnet=form.controlnet,
    )
    model, direct = traced.model, DirectWeights()
    _run(model, FoldConstants(), *([OpenSizes()] if form.sizes == "dynamic" or form.open_tokens else []))
    if form.sizes == "dynamic":
        for value in model.graph.inputs:
            if value.name in traced.optional:
                value.shape = ir.Shape(traced.optional[value.name])
    if isinstance(source, TimeTable):
        _run(model, TimeProjections(source.projections, form.time_table, DTYPES[form.dtype]))
    _run(model, direct, TransposedKeys(), ReadableNames())
    return model, traced.blocks, direct.keys


def _gathered_scales(
    calibrated: CalibratedModel,
    layers: tuple[LayerNode, ...],
    reference_scales: dict[str, float],
    form: GraphForm,
    attention: ImageAttention | None,
) -> GatherScales:
    """Makes the pass that adds the timestep-indexed scales."""
    ranks = {
        layer.plan.activation_quantizer: 4 if layer.plan.op == "conv" else len(layer.input.shape or ())
        for layer in layers
    }
    return GatherScales(
        tuple(QuantizerSpec(name, reference_scales[name], ranks[name]) for name in calibrated.scales.quantizers),
        "timesteps" if form.time_table == "input" else len(calibrated.scales.scales),
        DTYPES[form.dtype],
        None if attention is None else _reach(calibrated, attention),
    )


def _reach(calibrated: CalibratedModel, attention: ImageAttention) -> Reach | None:
    """Says how the reach of image prompts enlarges the grids behind the attentions."""
    if attention.reach is None:
        return None
    assert attention.slots is not None  # the pass ran
    readers = _readers_of_attention(calibrated.plan)
    columns, factors = {}, {}
    for number, slot in enumerate(attention.slots.layers):
        if slot.quantizer is None:
            continue
        fmt = format_by_name(calibrated.plan.quantizer(slot.quantizer).activations)
        assert fmt is not None  # an activation quantizer has a format
        smoothed = readers[slot.layer].name.rpartition(".")[0]
        gain = 1.0
        if smoothed in calibrated.transforms.smoothed:
            gain /= float(calibrated.tensor(f"network.{smoothed}.factor").min())
        columns[slot.quantizer], factors[slot.quantizer] = number, gain / fmt.qmax
    return Reach(attention.reach, columns, factors)


def _readers_of_attention(plan: PrecisionPlan) -> dict[str, LayerPlan]:
    """Finds the layer that reads each attention's result, by the attention's path as diffusers names it."""
    return {layer.name.partition(_READER)[0]: layer for layer in plan.layers if _READER in layer.name}


def _image_attention(
    calibrated: CalibratedModel, config: dict[str, Any], tokens: int, adapters: int, dtype: ir.DataType
) -> ImageAttention:
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
    readers = _readers_of_attention(calibrated.plan)
    quantizers = {path: layer.activation_quantizer for path, layer in readers.items() if layer.activation_quantizer}
    return ImageAttention(tokens, adapters, dtype, quantizers)


def _with_text_apart(whole: CanonicalGraph, layers: tuple[LayerNode, ...], sums: tuple[ir.Node, ...]) -> CanonicalGraph:
    """Divides the graph; ``sums`` are those of layers' results and their low-rank branches."""
    hoisted = HoistedText([*(layer.node for layer in layers), *sums])
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
