"""Parity, teacher-forced: parts of a graph or engine are fed the reference's activations, so that no error piles up.

Codes per activation quantizer show whether quantizers agree; blocks, whether everything between them does; layers,
which one is at fault. Beside them, what quantization itself costs each: an error is large or small against that. Tables
(scales, time features, products of the text) are compared with the calibrated model's own, index by index: a table
that belongs to another schedule, or is shifted, may leave every product of the network right.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import InputQuantizer
from s2p_deploy.context import silent
from s2p_deploy.engines import PreparedSubgraphs, recorded_lowerings
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.runner import TEXT_PROJECTIONS
from s2p_deploy.families import Tap
from s2p_deploy.metrics import pooled_sqnr_db
from s2p_deploy.records import Execution, Skipped
from s2p_deploy.validation.measurements import (
    NOT_CUT,
    BlockAgreement,
    BlockError,
    LayerAgreement,
    QuantizerCodes,
    TableGap,
)
from s2p_deploy.validation.reference import (
    ReferenceCall,
    branch_of,
    forced_outputs,
    reference_calls,
    time_features,
    to_numpy,
    unquantized_denoiser,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.context import Progress
    from s2p_deploy.engines import BoundRunner, RunnableSubgraph, Subgraphs
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import (
        ActivationQuantizer,
        CalibratedModel,
        ExportedGraph,
        GraphLayer,
        GraphTap,
        PrecisionPlan,
        ScaleTable,
        TensorSpec,
    )
    from s2p_deploy.validation.chain import Chain
    from s2p_deploy.validation.reference import ValidationLatents

    _Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]
    Measure = Callable[[str, Callable[[], Any]], Any]

REFERENCE = ("onnxruntime", Execution(optimization="reference"))  # ONNX Runtime, unoptimized: what parity is asked of
TIME_TABLE = "time_projections"
_NO_FEATURES = np.zeros((0, 0), np.float32)  # a layer reads no time features
_LAYER_LATENTS = 16  # a layer is one product: flips do not grow in it, and few latents say as much as many


def measure_parity(  # noqa: PLR0913 - the engine, the reference and what is kept
    chain: Chain,
    fake_quant: FakeQuantDenoiser,
    latents: ValidationLatents,
    runner: BoundRunner | Skipped,
    parts: Subgraphs | None,
    *,
    measure: Measure = lambda _name, make: make(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures tables, codes, blocks and layers of a graph and of its engine on the reference's own inputs.

    Args:
        chain: the engine and what it was made from.
        fake_quant: its model; it computes where it is.
        latents: inputs of the reference.
        runner: the engine, loaded; or why it cannot run here.
        parts: cuts parts out of the engine's files; None where they cannot be cut, or the engine cannot run here.
        measure: called with the name of every field and what measures it; may take it from a checkpoint.
        progress: told about every part.

    Returns:
        Fields of :class:`Measurements`.
    """
    engine, graph = chain.engine, chain.graph
    unquantized = unquantized_denoiser(chain.calibrated).to(fake_quant.device)
    reference = PreparedSubgraphs(graph, *REFERENCE)

    def engine_blocks() -> tuple[BlockAgreement, ...] | Skipped:
        if isinstance(runner, Skipped):
            return runner
        # an engine whose files cannot be cut is stood in for by blocks compiled anew from the graph
        cut = parts or PreparedSubgraphs(graph, engine.backend, engine.execution, recorded_lowerings(engine, graph))
        stage, scales = f"blocks, {engine.backend}", engine.scales.scales
        return block_agreement(fake_quant, graph, latents, cut, scales=scales, stage=stage, progress=progress)

    def engine_layers() -> tuple[LayerAgreement, ...] | Skipped:
        if isinstance(runner, Skipped):
            return runner
        if parts is None:
            return NOT_CUT
        some, scales = latents.spread(_LAYER_LATENTS), engine.scales.scales
        return layer_agreement(fake_quant, unquantized, graph, some, parts, scales=scales, progress=progress)

    makers: dict[str, Callable[[], Any]] = {
        "tables": lambda: table_gaps(chain, fake_quant, latents, runner, parts, reference),
        "quantizers": lambda: code_agreement(fake_quant, graph, latents, progress),
        "block_errors": lambda: block_errors(fake_quant, unquantized, graph, latents, progress),
        "graph_blocks": lambda: block_agreement(fake_quant, graph, latents, reference, progress=progress),
        "engine_blocks": engine_blocks,
        "engine_layers": engine_layers,
    }
    kind = {
        "quantized": not chain.recipe.is_float,
        "graph_half": graph.dtype == "fp16",
        "engine_half": chain.half,
    }
    return kind | {name: measure(name, make) for name, make in makers.items()}


def table_gaps(
    chain: Chain,
    fake_quant: FakeQuantDenoiser,
    latents: ValidationLatents,
    runner: BoundRunner | Skipped,
    parts: Subgraphs | None,
    reference: Subgraphs,
) -> tuple[TableGap, ...]:
    """Compares every table that the graph and the engine carry with the calibrated model's."""
    calibrated, engine, graph = chain.calibrated, chain.engine, chain.graph
    half = engine.dtype == "fp16"
    gaps: list[TableGap | None] = [
        scale_gap("scale table of the graph", graph.scales, calibrated.scales),
        scale_gap("scale table of the engine", engine.scales, calibrated.scales),
        constant_time_gap("time table of the graph", reference, calibrated, half=graph.dtype == "fp16"),
    ]
    if parts is not None:
        gaps.append(constant_time_gap("time table of the engine", parts, calibrated, half=half))
    if not isinstance(runner, Skipped):
        text = tuple(map(_tap, graph.text))
        gaps.append(given_time_gap("time features of the engine", runner, fake_quant, latents, half=half))
        gaps.append(text_gap("text projections of the engine", runner, fake_quant, latents, text, half=half))
    return tuple(gap for gap in gaps if gap is not None)


@dataclass(frozen=True)
class Part:
    """A part of a graph or an engine, and where the reference has the activations that it reads.

    ``scales`` float32 [timesteps, quantizers] are bound to it; ``text`` is where the reference has the products of the
    text, in the order in which the graph takes them. ``optional`` are inputs for adapters, none of which acts.
    """

    part: RunnableSubgraph
    entering: dict[str, Tap]
    scales: NDArray[np.float32]
    text: tuple[Tap, ...] = ()
    optional: tuple[TensorSpec, ...] = ()

    def infer(self, call: ReferenceCall) -> dict[str, NDArray[Any]]:
        """Runs the part on one call of the reference; returns its outputs by tensor."""
        given: dict[str, NDArray[Any]] = {
            **call.latents.inputs(),
            "act_scales": self.scales,
            "time_projections": call.time_projections,
            **{tensor: call.seen[tap] for tensor, tap in self.entering.items()},
        }
        types, (batch, _, height, width) = self.part.types, call.latents.sample.shape
        sizes = {"batch": batch, "height": height, "width": width, "tokens": call.latents.text.shape[1]}
        given |= {spec.name: np.zeros(shape_at(spec, sizes)) for spec in self.optional if spec.name in types}
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
) -> tuple[QuantizerCodes, ...]:
    """Compares every activation quantizer's codes: the graph's (ONNX Runtime, unoptimized) with fake-quant's."""
    quantizers = {quantizer.name: quantizer for quantizer in graph.plan.activation_quantizers}
    layers = {layer.name: layer for layer in graph.layers}
    firsts = {name: layers[quantizer.layers[0]] for name, quantizer in quantizers.items()}
    codes = {name: str(layer.codes) for name, layer in firsts.items()}
    taps = {name: Tap(layer.name, "input") for name, layer in firsts.items()}
    cuts, scales = PreparedSubgraphs(graph, *REFERENCE), graph.scales.scales
    parts = {
        name: Part(
            cuts.between([layer.input], [codes[name]]),
            {layer.input: taps[name]},
            scales,
            optional=graph.optional_inputs,
        )
        for name, layer in firsts.items()
    }
    differing, largest, counts = (dict.fromkeys(quantizers, 0) for _ in range(3))
    done = 0
    for call in reference_calls(fake_quant, latents, taps.values()):
        for name, quantizer in quantizers.items():
            found = parts[name].infer(call)[codes[name]].astype(np.int16)
            gap = np.abs(
                found - _reference_codes(fake_quant, quantizer, call.seen[taps[name]], call.latents.timestep_indices)
            )
            differing[name] += int(np.count_nonzero(gap))
            largest[name] = max(largest[name], int(gap.max()))
            counts[name] += gap.size
        done += len(call.latents)
        progress("codes", done, len(latents))
    return tuple(
        QuantizerCodes(name, differing[name] / counts[name], largest[name], counts[name]) for name in quantizers
    )


def block_agreement(  # noqa: PLR0913 - what is compared, on what, and options by keyword
    fake_quant: FakeQuantDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    parts: Subgraphs,
    *,
    scales: NDArray[np.float32] | None = None,
    stage: str = "blocks",
    progress: Progress = silent,
) -> tuple[BlockAgreement, ...]:
    """Compares the output of every block of a graph or engine with fake-quant's for the same inputs.

    A block with two outputs has one figure for both.

    Args:
        fake_quant: the reference.
        graph: says where the blocks are.
        latents: what the reference is run on.
        parts: what the blocks are cut out of.
        scales: float32 [timesteps, quantizers] that are bound to it (None: the graph's).
        stage: for ``progress``.
        progress: told after every few latents.
    """
    bound = graph.scales.scales if scales is None else scales
    leaving = {block.block: _taps(block.leaving) for block in graph.blocks}
    text = tuple(map(_tap, graph.text))
    blocks = {
        block.block: Part(
            parts.between(list(_taps(block.entering)), list(leaving[block.block])),
            _taps(block.entering),
            bound,
            text,
            graph.optional_inputs,
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
    unquantized: IndexedDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    progress: Progress = silent,
) -> tuple[BlockError, ...]:
    """Measures what quantization costs every block: fake-quant against ``unquantized``, fed the same inputs."""
    entering = {tap for block in graph.blocks for tap in _taps(block.entering).values()}
    leaving = {block.block: tuple(_taps(block.leaving).values()) for block in graph.blocks}
    quantized = _quantized_layers(graph.plan)
    powers = {block.block: _Powers() for block in graph.blocks if quantized & set(block.layers)}
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


def layer_agreement(  # noqa: PLR0913 - what is compared, on what, and options by keyword
    fake_quant: FakeQuantDenoiser,
    unquantized: IndexedDenoiser,
    graph: ExportedGraph,
    latents: ValidationLatents,
    parts: Subgraphs,
    *,
    scales: NDArray[np.float32],
    progress: Progress = silent,
) -> tuple[LayerAgreement, ...]:
    """Compares every layer of an engine with fake-quant's for the same inputs, and measures what quantization costs it.

    Nothing is kept of a layer once it was compared. Where a backend computes a part of a layer's columns by itself
    (SplitLinears), the first part is compared. Arguments as :func:`block_agreement`.
    """
    layers = tuple(layer for layer in graph.layers if layer.graph == "denoiser")
    cuts = {
        layer.name: Part(
            parts.between([layer.input], [layer.output]),
            {layer.input: Tap(layer.name, "input")},
            scales,
            optional=graph.optional_inputs,
        )
        for layer in layers
    }
    quantized = _quantized_layers(graph.plan)
    found, own = ({layer.name: _Powers() for layer in layers} for _ in range(2))
    done = 0
    for part in latents.parts():
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hook = _comparing(layer, cuts[layer.name], part, found[layer.name])
                hooks.callback(fake_quant.layer(layer.name).register_forward_hook(hook).remove)
                if layer.name in quantized:
                    twin = unquantized.network.get_submodule(layer.name)
                    hook = _beside(twin, own[layer.name])
                    hooks.callback(fake_quant.layer(layer.name).register_forward_hook(hook).remove)
            fake_quant(*part.arguments(fake_quant.device))
        done += len(part)
        progress("layers", done, len(latents))
    return tuple(
        LayerAgreement(name, found[name].sqnr(), own[name].sqnr() if name in quantized else None, len(latents))
        for name in cuts
    )


def _comparing(layer: GraphLayer, part: Part, latents: ValidationLatents, powers: _Powers) -> _Hook:
    def compare(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        call = ReferenceCall(latents, _NO_FEATURES, {part.entering[layer.input]: to_numpy(args[0])})
        found = part.infer(call)[layer.output]
        powers.add(to_numpy(output)[..., : found.shape[-1]], found)

    return compare


def _beside(twin: torch.nn.Module, powers: _Powers) -> _Hook:
    def compare(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        powers.add(to_numpy(output), to_numpy(twin(args[0])))

    return compare


def _quantized_layers(plan: PrecisionPlan) -> set[str]:
    return {layer.name for layer in plan.layers if layer.weights != "none" or layer.activation_quantizer is not None}


def _borders(graph: ExportedGraph) -> list[Tap]:
    return [tap for block in graph.blocks for tap in map(_tap, (*block.entering, *block.leaving))]


def _taps(taps: tuple[GraphTap, ...]) -> dict[str, Tap]:
    """Converts taps of the graph to taps of modules, by tensor."""
    return {tap.tensor: _tap(tap) for tap in taps}


def _tap(tap: GraphTap) -> Tap:
    return Tap(tap.module, tap.side)


def _reference_codes(
    fake_quant: FakeQuantDenoiser,
    quantizer: ActivationQuantizer,
    activation: NDArray[np.float32],
    indices: NDArray[np.int64],
) -> NDArray[np.int16]:
    layer = quantizer.layers[0]
    scale = fake_quant.layer_scale(layer, torch.from_numpy(indices).to(fake_quant.device))
    module = fake_quant.layer(layer).get_submodule("input_quantizer")
    assert isinstance(module, InputQuantizer)  # a layer of an activation quantizer has one,
    assert scale is not None  # and its scales
    return to_numpy(module.codes(torch.from_numpy(activation).to(scale.device), scale)).astype(np.int16)


def scale_gap(name: str, table: ScaleTable, expected: ScaleTable) -> TableGap:
    """Compares two scale tables; not a number where their shapes or activation quantizers differ."""
    if table.quantizers != expected.quantizers or table.scales.shape != expected.scales.shape:
        return TableGap("scales", name, float("nan"), "other activation quantizers or timesteps", expected.scales.size)
    if not expected.scales.size:
        return TableGap("scales", name, 0.0, "", 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.abs(table.scales.astype(np.float64) / expected.scales - 1)
    index, quantizer = np.unravel_index(_largest(gap), gap.shape)
    return TableGap(
        "scales", name, float(gap[index, quantizer]), f"{table.quantizers[quantizer]}, timestep index {index}", gap.size
    )


def constant_time_gap(name: str, parts: Subgraphs, calibrated: CalibratedModel, *, half: bool) -> TableGap | None:
    """Compares the constant time table, where there is one."""
    found = parts.constant(TIME_TABLE)
    return None if found is None else _time_gap(name, found, calibrated.time_table().projections, half=half)


def given_time_gap(
    name: str, engine: BoundRunner, fake_quant: FakeQuantDenoiser, latents: ValidationLatents, *, half: bool
) -> TableGap | None:
    """Compares the time features that an engine takes as an input, at the latents' timesteps; None if it has none."""
    if engine.features is None:
        return None
    expected = time_features(fake_quant, latents)
    found = engine.features.of(latents.timestep_indices, latents.added_cond if latents.added_cond.shape[1] else None)
    return _time_gap(name, found, expected, half=half, indices=latents.timestep_indices)


def text_gap(
    name: str,
    engine: BoundRunner,
    fake_quant: FakeQuantDenoiser,
    latents: ValidationLatents,
    taps: tuple[Tap, ...],
    *,
    half: bool,
) -> TableGap | None:
    """Compares the products of the text that an engine takes as an input; None if it has none."""
    if engine.texts is None:
        return None
    gaps = [
        _gaps(
            engine.texts.of(call.latents.text.astype(engine.texts.spec.dtype)),
            np.concatenate([call.seen[tap] for tap in taps], -1),
        )
        for call in reference_calls(fake_quant, latents, taps)
    ]
    gap = np.concatenate(gaps)
    worst = _largest(gap)
    return TableGap("text", name, float(gap[worst]), branch_of(worst, guided=latents.guided), len(gap), half)


def _time_gap(
    name: str,
    found: NDArray[np.floating],
    expected: NDArray[np.float32],
    *,
    half: bool,
    indices: NDArray[np.int64] | None = None,
) -> TableGap:
    if found.shape != expected.shape:
        return TableGap("time", name, float("nan"), f"shape {list(found.shape)}", len(expected), half)
    gap = _gaps(found, expected)
    worst = _largest(gap)
    index = worst if indices is None else int(indices[worst])
    return TableGap("time", name, float(gap[worst]), f"timestep index {index}", len(gap), half)


def _gaps(found: NDArray[np.floating], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Computes the relative error float64 [n] of every sample of [n, ...]."""
    wanted = expected.reshape(len(expected), -1).astype(np.float64)
    error = np.linalg.norm(found.reshape(len(found), -1) - wanted, axis=1)
    gaps: NDArray[np.float64] = error / np.maximum(np.linalg.norm(wanted, axis=1), np.finfo(np.float64).tiny)
    return gaps


def _largest(values: NDArray[np.float64]) -> int:
    """Finds the largest; what is no number is larger than any."""
    return int(np.where(np.isnan(values), np.inf, values).argmax())
