"""Adds the timestep-indexed scales: the graph input, a Gather, and every quantizer's two ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Sequence


ACT_SCALES = "act_scales"


@dataclass(frozen=True)
class QuantizerScales:
    """The numbers that a lowering needs of one quantizer: the reference scale c, of the graph's dtype, and two ratios.

    c/s and s/c at each sample's timestep, in the graph's dtype: [batch, 1, 1, 1] or [batch, 1, 1], as the tensor asks.
    """

    reference_scale: float
    to_reference: ir.Value
    from_reference: ir.Value


@dataclass(frozen=True)
class QuantizerSpec:
    """One column of the table: its name, its reference_scale, and the rank (3 or 4) of the tensor that it scales."""

    name: str
    reference_scale: float
    rank: int


class GatherScales(ir.passes.InPlacePass):
    """Takes the ratios of all quantizers at once, in float32, and casts them to the graph's dtype once.

        s = Gather(act_scales [timesteps, quantizers], timestep_index)   [batch, quantizers]
        to_reference = Cast(c / s),  from_reference = Cast(s / c)       then one Split each into columns

    Quantizers are taken in two groups by the rank of their tensors, so that a column needs no Reshape of its own.
    One Gather and few Splits build faster than a Gather per quantizer (TensorRT-RTX, SD v1-4: 54 s against 89 s).

    Requires: a graph input ``timestep_index``. Ensures: ``scales`` holds every quantizer's ratios.
    """

    def __init__(self, quantizers: tuple[QuantizerSpec, ...], timesteps: int | str, dtype: ir.DataType) -> None:
        super().__init__()
        self.quantizers, self.timesteps, self.dtype = quantizers, timesteps, dtype
        self.scales: dict[str, QuantizerScales] = {}

    def requires(self, model: ir.Model) -> None:
        """Checks the requirement."""
        if "timestep_index" not in {value.name for value in model.graph.inputs}:
            raise ir.passes.PreconditionError("the graph has no input timestep_index")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the input and the nodes; changes nothing where there is no quantizer."""
        if not self.quantizers:
            return ir.passes.PassResult(model, modified=False)
        graph = model.graph
        table = ir.Value(
            name=ACT_SCALES,
            shape=ir.Shape([self.timesteps, len(self.quantizers)]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.insert(3, table)
        timestep_index = next(value for value in graph.inputs if value.name == "timestep_index")
        gather = _node("Gather", [table, timestep_index], f"{ACT_SCALES}/of_timestep", axis=0)
        nodes = [gather]
        for rank in sorted({quantizer.rank for quantizer in self.quantizers}):
            nodes += self._group(graph, gather.outputs[0], rank)
        first = next(iter(graph))
        graph.insert_before(first, nodes)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        if set(self.scales) != {quantizer.name for quantizer in self.quantizers}:
            raise ir.passes.PostconditionError(f"{model.graph.name}: activation quantizers without ratios")

    def _group(self, graph: ir.Graph, scales: ir.Value, rank: int) -> list[ir.Node]:
        """Makes the nodes of the ratios of all quantizers of one rank; fills ``scales``."""
        columns = [index for index, quantizer in enumerate(self.quantizers) if quantizer.rank == rank]
        group = [self.quantizers[index] for index in columns]
        prefix = f"{ACT_SCALES}/rank{rank}"
        trailing = (1,) * (rank - 2)
        picked = constant(f"{prefix}/columns", np.asarray(columns, np.int64))
        axes = constant(f"{prefix}/axes", np.arange(2, rank, dtype=np.int64))
        stored = np.asarray([quantizer.reference_scale for quantizer in group], np.float32)
        reference_scales = constant(f"{prefix}/reference_scales", stored.reshape(-1, *trailing))
        for value in (picked, axes, reference_scales):
            graph.initializers.add(value)
        select = _node("Gather", [scales, picked], f"{prefix}/select", axis=1)
        shape = _node("Unsqueeze", [select.outputs[0], axes], f"{prefix}/scales")
        column_scales = shape.outputs[0]
        nodes, ratios = [select, shape], []
        for name, pair in (
            ("to_reference", [reference_scales, column_scales]),
            ("from_reference", [column_scales, reference_scales]),
        ):
            made = self._ratios(pair, f"{prefix}/{name}", [f"{p.name}/input_quantizer/{name}" for p in group])
            for value in made[-1].outputs:
                value.shape = ir.Shape([_batch(graph), 1, *trailing])
            nodes += made
            ratios.append(made[-1].outputs)
        for quantizer, to_reference, from_reference in zip(group, *ratios, strict=True):
            self.scales[quantizer.name] = QuantizerScales(quantizer.reference_scale, to_reference, from_reference)
        return nodes

    def _ratios(self, pair: list[ir.Value], prefix: str, names: list[str]) -> list[ir.Node]:
        """Makes nodes that divide in float32, cast once and split into columns.

        Split goes by number: sizes as an input would leave the graph file where there are many, and ONNX Runtime
        refuses sizes in external data.
        """
        nodes = [_node("Div", pair, prefix)]
        if self.dtype != ir.DataType.FLOAT:
            nodes.append(_node("Cast", nodes[-1].outputs, f"{prefix}/cast", to=self.dtype.value))
        split = ir.node(
            "Split",
            [nodes[-1].outputs[0]],
            {"axis": 1, "num_outputs": len(names)},
            num_outputs=len(names),
            name=f"{prefix}/split",
        )
        for value, name in zip(split.outputs, names, strict=True):
            value.name, value.dtype = name, self.dtype
        return [*nodes, split]


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    return node


def _batch(graph: ir.Graph) -> ir.SymbolicDim | int:
    """Returns the batch dimension as the graph's first input names it."""
    shape = graph.inputs[0].shape
    assert shape is not None  # the contract's inputs have shapes
    return shape[0]
