"""Parts of a canonical graph as models of their own, so that a part can be fed the reference's own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.errors import GraphContractError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx

    from s2p_deploy.records import ExportedGraph, GraphBlock, GraphSite


def block_subgraph(graph: ExportedGraph, block: str, onnx_file: Path | None = None) -> onnx.ModelProto:
    """One block with its weights inside.

    Inputs: the block's activation under its own name, then those graph inputs that it needs (``step_index``,
    ``act_scales``, ``encoder_hidden_states``, ``time_projections``). Output: the block's activation.

    Args:
        graph: says where the block is.
        block: a name of ``graph.blocks``.
        onnx_file: another file with the same tensor names, such as a backend's prepared graph.

    Raises:
        InputError: there is no such block. GraphContractError: the file does not hold the block's tensors.
    """
    found = _named(graph.blocks, block)
    return _extract(onnx_file or graph.onnx_file, found.input, [found.output])


def site_subgraph(graph: ExportedGraph, site: str, onnx_file: Path | None = None) -> onnx.ModelProto:
    """One site with its quantizers and weights: as :func:`block_subgraph`, with the codes of its activation (INT8) as a
    second output where its activation is quantized."""
    found = next((item for item in graph.sites if item.site == site), None)
    if found is None:
        raise InputError(f"{graph.folder} has no site {site}")
    outputs = [found.output, found.codes] if found.codes else [found.output]
    return _extract(onnx_file or graph.onnx_file, found.input, outputs)


def _named(blocks: Sequence[GraphBlock], name: str) -> GraphBlock:
    found = next((item for item in blocks if item.block == name), None)
    if found is None:
        raise InputError(f"no block {name}: use one of {', '.join(item.block for item in blocks)}")
    return found


def _extract(file: Path, entry: str, outputs: Sequence[str]) -> onnx.ModelProto:
    """The nodes between ``entry`` (and graph inputs) and ``outputs``, as a model with its weights inside."""
    model = ir.load(file)
    values = ir.convenience.create_value_mapping(model.graph)
    missing = [name for name in (entry, *outputs) if name not in values]
    if missing:
        raise GraphContractError(f"{file} has no tensor {missing[0]}")
    start, ends = values[entry], [values[name] for name in outputs]
    inputs = [start, *(v for v in _reached_inputs(model.graph, start, ends) if v is not start)]
    part = ir.convenience.extract(model.graph, inputs, ends)
    extracted = ir.Model(part, ir_version=model.ir_version, producer_name=model.producer_name)
    ir.external_data.load_to_model(extracted)
    return ir.to_proto(extracted)


def _reached_inputs(graph: ir.Graph, start: ir.Value, ends: Sequence[ir.Value]) -> list[ir.Value]:
    """Graph inputs that ``ends`` depend on other than through ``start``, in the graph's order."""
    pending, seen = list(ends), {start}
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None:
            pending.extend(v for v in producer.inputs if v is not None)
    return [value for value in graph.inputs if value in seen]
