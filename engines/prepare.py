"""The part of ``prepare`` that all backends share: read the canonical graph with care, apply the passes, write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines.lowerings import RUNTIME_Q, STATIC, choose_lowerings
from s2p_deploy.engines.onnx_files import read_onnx, write_onnx
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4
from s2p_deploy.engines.passes.runtime_quantize import RuntimeQuantize
from s2p_deploy.engines.passes.static_points import StaticPoints
from s2p_deploy.engines.passes.unread_columns import UnreadColumns
from s2p_deploy.engines.support import support_of
from s2p_deploy.engines.verified_bytes import verified_copy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import BuildOptions
    from s2p_deploy.engines.passes.expand_int4 import Int4Use
    from s2p_deploy.records import ExportedGraph, TensorSpec

PREPARED = "denoiser.onnx"


def backend_lowerings(graph: ExportedGraph, backend: str, options: BuildOptions) -> Lowerings:
    """What the installed version of a backend gets for every act point: :func:`choose_lowerings` with its verdicts."""
    return choose_lowerings(graph, options, support_of(backend))


def prepare_graph(graph: ExportedGraph, folder: Path, backend: Backend, options: BuildOptions) -> Path:
    """Writes the canonical graph in the backend's form to ``folder``; the weights stream through.

    Raises:
        IntegrityError: the graph's external data is not beside it, or is cut short.
        InputError: the backend refuses the lowering that ``options`` ask for.
    """
    path = folder / PREPARED
    with verified_copy(graph, folder) as onnx_file:
        model = read_onnx(onnx_file)
        backend.prepare_model(model, backend_lowerings(graph, backend.name, options), options.hint)
        write_onnx(model, path)
    return path


def apply_passes(model: ir.Model, lowerings: Lowerings, keep_int4: Callable[[Int4Use], bool]) -> None:
    """Gives a canonical graph, or a part of one, the chosen form in place. INT4 that ``keep_int4`` refuses expands."""
    ExpandInt4(keep_int4)(model)
    StaticPoints(lowerings.columns(STATIC))(model)
    RuntimeQuantize(lowerings.columns(RUNTIME_Q))(model)
    UnreadColumns()(model)


def prepared_inputs(graph: ExportedGraph, prepared: Path) -> tuple[TensorSpec, ...]:
    """The graph's inputs that a prepared graph still has."""
    left = {value.name for value in read_onnx(prepared).graph.inputs}
    return tuple(spec for spec in graph.inputs if spec.name in left)


def weight_only(use: Int4Use) -> bool:
    """Packed INT4 where the activation is floating point: it is dequantized before the operator anyway."""
    return not use.quantized_activation


def weight_only_or_matmul(use: Int4Use) -> bool:
    """Also MatMul beside INT8 activations."""
    return weight_only(use) or use.op == "MatMul"


def any_use(_use: Int4Use) -> bool:
    """Packed INT4 wherever the backend takes it."""
    return True
