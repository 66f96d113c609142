"""How each quantized layer is lowered for a backend: chosen from records, applied by passes, reported per layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4, Int4Use
from s2p_deploy.engines.passes.runtime_quantize import RuntimeQuantize
from s2p_deploy.engines.passes.static_quantizers import StaticQuantizers
from s2p_deploy.engines.passes.unread_columns import UnreadColumns
from s2p_deploy.engines.support import Pattern, support_of
from s2p_deploy.errors import InputError
from s2p_deploy.records import LayerPrecision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.options import BuildOptions
    from s2p_deploy.engines.support import SupportTable
    from s2p_deploy.records import Engine, ExportedGraph, GraphLayer, PrecisionPlan

RESCALE, RUNTIME_Q, STATIC = "rescale", "runtime_q", "static"
# in an engine's content: activation quantizer -> lowering, and a bool
RECORDED, MIXED_TIMESTEPS = "lowerings", "mixed_timesteps"
UNKNOWN = "unknown"
_ON_CPU = "fp32"
_BITS = {"int8": 8, "int4": 4}
_REFUSED = frozenset({"fails", "crashes", "wrong"})
_OPS = {"conv": "conv", "linear": "matmul", "Conv": "conv", "MatMul": "matmul"}


@dataclass(frozen=True)
class QuantizerLowering:
    """Lowering of one activation quantizer, with the tensor of its codes and its column of the scale table."""

    quantizer: str
    codes: str
    column: int
    lowering: str


@dataclass(frozen=True)
class Lowerings:
    """Lowerings of all activation quantizers of a graph; empty: all stay as exported (``rescale``)."""

    quantizers: tuple[QuantizerLowering, ...] = ()

    @property
    def by_quantizer(self) -> dict[str, str]:
        """Activation quantizer -> lowering."""
        return {quantizer.quantizer: quantizer.lowering for quantizer in self.quantizers}

    @property
    def mixed_timesteps(self) -> bool:
        """True where the samples of a batch may be at different timesteps."""
        return all(quantizer.lowering != RUNTIME_Q for quantizer in self.quantizers)

    def columns(self, lowering: str) -> dict[str, int]:
        """Codes -> column of the quantizers with a lowering."""
        return {quantizer.codes: quantizer.column for quantizer in self.quantizers if quantizer.lowering == lowering}


def choose_lowerings(graph: ExportedGraph, options: BuildOptions, support: SupportTable) -> Lowerings:
    """Chooses the lowering of every activation quantizer.

    ``static`` where the quantizer's scales vary by no more than ``options.static_tolerance`` over the timesteps; else
    ``options.lowering``; with ``auto`` that is ``rescale``, or ``runtime_q`` where ``support`` says that the backend
    refuses the first and takes the second. Scales that grow with image prompts, each sample's its own, leave
    ``rescale`` alone.

    Raises:
        InputError: the backend refuses the lowering of ``options``.
    """
    columns = dict(zip(graph.scales.quantizers, graph.scales.scales.T, strict=True))
    members: dict[str, list[GraphLayer]] = {name: [] for name in graph.scales.quantizers}
    for layer in graph.layers:
        if layer.activation_quantizer is not None:
            members[layer.activation_quantizer].append(layer)
    growing = () if graph.images is None else graph.images.quantizers
    only_rescale = replace(options, static_tolerance=-1.0, lowering="rescale")
    return _lowerings(
        graph,
        {
            name: _lowering_of(layers, columns[name], only_rescale if name in growing else options, support)
            for name, layers in members.items()
        },
    )


def recorded_lowerings(engine: Engine, graph: ExportedGraph) -> Lowerings:
    """Returns the lowerings that an engine of ``graph`` was built with."""
    return _lowerings(graph, engine.lowerings)


def variation(column: NDArray[np.float32]) -> float:
    """Returns how much one quantizer's scales vary over the timesteps: largest over smallest, less one."""
    return float(column.max()) / float(column.min()) - 1


def int4_rule(
    support: SupportTable,
    lowerings: Lowerings,
    *,
    wanted: Callable[[Int4Use], bool],
    untried: Callable[[Int4Use], bool],
) -> Callable[[Int4Use], bool]:
    """Makes the rule for INT4 weights that stay packed: ``wanted`` uses that the backend takes.

    Where the support table says nothing, ``untried`` decides.
    """
    quantized = set(lowerings.by_quantizer.values()) or {RESCALE}

    def keep(use: Int4Use) -> bool:
        forms = quantized if use.quantized_activation else {"float"}
        activations = "int8" if use.quantized_activation else "none"
        verdicts = {support.verdict(Pattern(form, _OPS.get(use.op, use.op), "int4", activations)) for form in forms}
        if verdicts & _REFUSED:
            return False
        return untried(use) if "unknown" in verdicts else wanted(use)

    return keep


def _lowerings(graph: ExportedGraph, by_quantizer: Mapping[str, str]) -> Lowerings:
    codes = {layer.activation_quantizer: layer.codes for layer in graph.layers}
    return Lowerings(
        tuple(
            QuantizerLowering(name, str(codes[name]), column, by_quantizer[name])
            for column, name in enumerate(graph.scales.quantizers)
            if name in by_quantizer
        )
    )


def _lowering_of(
    layers: list[GraphLayer], column: NDArray[np.float32], options: BuildOptions, support: SupportTable
) -> str:
    def verdicts(lowering: str) -> set[str]:
        # INT4 counts as INT8 here: every backend can expand it
        stored = {(layer.op, "none" if layer.weight is None else "int8") for layer in layers}
        return {support.verdict(Pattern(lowering, _OPS[op], weights, "int8")) for op, weights in stored}

    if variation(column) <= options.static_tolerance and not verdicts(STATIC) & _REFUSED:
        return STATIC
    if options.lowering == "auto":
        forced = verdicts(RESCALE) & _REFUSED and verdicts(RUNTIME_Q) == {"builds"}
        return RUNTIME_Q if forced else RESCALE
    refused = sorted(verdicts(options.lowering) & _REFUSED)
    if refused:
        raise InputError(
            f"lowering {options.lowering} of {layers[0].name}: with this version the backend {_SAID[refused[0]]}; "
            "choose another --lowering"
        )
    return options.lowering


_SAID = {"fails": "refuses it", "crashes": "crashes on it", "wrong": "computes it wrong"}


def lowered_model(graph: ExportedGraph, backend: Backend, options: BuildOptions) -> tuple[ir.Model, Lowerings]:
    """Reads the canonical graph and gives it a backend's form; weights are read when the model is written or compiled.

    Raises:
        IntegrityError: the graph's external data is not beside it, is cut short, or was changed.
        InputError: the backend refuses the lowering of ``options``.
    """
    lowerings = choose_lowerings(graph, options, support_of(backend.name))
    model = read_onnx(graph.folder, graph.onnx_file.name, graph.manifest.files)
    backend.prepare_model(model, lowerings, options.execution)
    return model, lowerings


def apply_passes(model: ir.Model, lowerings: Lowerings, keep_int4: Callable[[Int4Use], bool]) -> None:
    """Gives a canonical graph, or a subgraph, the chosen form in place. INT4 that ``keep_int4`` refuses expands."""
    ExpandInt4(keep_int4)(model)
    StaticQuantizers(lowerings.columns(STATIC))(model)
    RuntimeQuantize(lowerings.columns(RUNTIME_Q))(model)
    UnreadColumns()(model)


def weight_only(use: Int4Use) -> bool:
    """Keeps INT4 packed where the activation is floating point: it is dequantized before the operator anyway."""
    return not use.quantized_activation


def weight_only_or_matmul(use: Int4Use) -> bool:
    """Keeps INT4 packed in MatMul beside INT8 activations too."""
    return weight_only(use) or use.op == "MatMul"


def any_use(_use: Int4Use) -> bool:
    """Keeps INT4 packed wherever the backend takes it."""
    return True


def storage_bits(model: ir.Model) -> dict[str, int]:
    """Returns the bits per value of every constant of a graph."""
    tensors = model.graph.initializers.items()
    return {name: value.const_value.dtype.bitwidth for name, value in tensors if value.const_value is not None}


def layer_precisions(
    graph: ExportedGraph, lowerings: Lowerings, storage: Mapping[str, int], compute: Mapping[str, str]
) -> tuple[LayerPrecision, ...]:
    """Describes every layer. ``storage`` maps the graphs' tensors to bits, ``compute`` ONNX nodes to types.

    Layers of ``text.onnx`` are computed by ONNX Runtime on the CPU: their products are float32 ones there.
    """
    chosen = lowerings.by_quantizer
    floating = 32 if graph.dtype == "fp32" else 16
    return tuple(
        LayerPrecision(
            name=layer.name,
            op=layer.op,
            lowering=_lowering(layer, chosen),
            weight_storage_bits=floating if layer.weight is None else storage[layer.weight],
            activation_bits=_BITS.get(layer.activations, floating),
            compute=_ON_CPU if layer.graph == "text" else compute.get(layer.node, UNKNOWN),
        )
        for layer in graph.layers
    )


def layers_not_int8(engine: Engine, plan: PrecisionPlan) -> tuple[str, ...]:
    """Lists the layers that the plan wants computed in integers and that the engine's backend does not report as int8.

    Integers are wanted where both weights and activations are quantized.
    """
    compute = {layer.name: layer.compute for layer in engine.layers}
    planned = (
        layer.name for layer in plan.layers if layer.activation_quantizer is not None and layer.weights != "none"
    )
    return tuple(layer for layer in planned if compute.get(layer, UNKNOWN) != "int8")


def _lowering(layer: GraphLayer, chosen: Mapping[str, str]) -> str:
    if layer.activation_quantizer is not None:
        return chosen[layer.activation_quantizer]
    return "float" if layer.weight is None else "weight_only"
