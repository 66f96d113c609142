"""Parts of a canonical graph as models of their own, so that a part can be fed the reference's own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.errors import GraphContractError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from s2p_deploy.records import ExportedGraph


def block_subgraph(graph: ExportedGraph, block: str, source: Path | ir.Model | None = None) -> onnx.ModelProto:
    """One block with its weights inside.

    Inputs: the block's activation under its own name, then those graph inputs that it needs (``step_index``,
    ``act_scales``, ``encoder_hidden_states``, ``time_projections``). Output: the block's activation.

    Args:
        graph: says where the block is.
        block: a name of ``graph.blocks``.
        source: another file with the same tensor names, such as a backend's prepared graph; or a model that was read
            already, where many parts are cut from one (it is not changed).

    Raises:
        InputError: there is no such block. GraphContractError: the file does not hold the block's tensors.
    """
    found = next((item for item in graph.blocks if item.block == block), None)
    if found is None:
        raise InputError(f"no block {block}: use one of {', '.join(item.block for item in graph.blocks)}")
    return _extract(source or graph.onnx_file, found.input, [found.output])


def site_subgraph(graph: ExportedGraph, site: str, source: Path | ir.Model | None = None) -> onnx.ModelProto:
    """One site with its quantizers and weights, otherwise as :func:`block_subgraph`.

    Where the site's activation is quantized, its codes (INT8) are a second output.
    """
    found = next((item for item in graph.sites if item.site == site), None)
    if found is None:
        raise InputError(f"no site {site} in the plan of {graph.folder}")
    outputs = [found.output, found.codes] if found.codes else [found.output]
    return _extract(source or graph.onnx_file, found.input, outputs)


def _extract(source: Path | ir.Model, entry: str, outputs: Sequence[str]) -> onnx.ModelProto:
    """The nodes between ``entry`` (and graph inputs) and ``outputs``, as a model with its weights inside."""
    model = source if isinstance(source, ir.Model) else ir.load(source)
    values = ir.convenience.create_value_mapping(model.graph)
    missing = [name for name in (entry, *outputs) if name not in values]
    if missing:
        raise GraphContractError(f"{source if isinstance(source, Path) else 'the graph'} has no tensor {missing[0]}")
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
