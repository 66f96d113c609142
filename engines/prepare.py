"""The part of ``prepare`` that all backends share: read the canonical graph with care, apply the passes, write it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines.onnx_files import read_onnx, write_onnx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from s2p_deploy.engines.passes.expand_int4 import Int4Use
    from s2p_deploy.records import ExportedGraph

PREPARED = "denoiser.onnx"


def prepare_graph(graph: ExportedGraph, folder: Path, passes: Callable[[ir.Model], None]) -> Path:
    """Writes the canonical graph, changed by ``passes`` in place, to ``folder``; the weights stream through.

    Raises:
        IntegrityError: the graph's external data is not beside it, or is cut short.
    """
    model = read_onnx(graph.onnx_file)
    passes(model)
    path = folder / PREPARED
    write_onnx(model, path)
    return path


def weight_only(use: Int4Use) -> bool:
    """Keeps INT4 packed where the activation is floating point: it is dequantized before the operator anyway."""
    return not use.quantized_activation


def weight_only_or_matmul(use: Int4Use) -> bool:
    """Also where TensorRT-RTX takes INT4 weights with INT8 activations: MatMul (its Conv refuses them)."""
    return weight_only(use) or use.op == "MatMul"
