"""Adds the timestep-indexed scales: the graph input, each sample's row of it, and every point's pair of ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ACT_SCALES = "act_scales"


@dataclass(frozen=True)
class PointScales:
    """What a lowering needs of one act point: the centre c (a number of the graph's dtype) and two ratios.

    c/s and s/c of each sample's row, in the graph's dtype: [batch, 1, 1, 1] or [batch, 1, 1], as the tensor asks.
    """

    centre: float
    to_centre: ir.Value
    from_centre: ir.Value


@dataclass(frozen=True)
class PointSpec:
    """One column of the table: its name, its centre, and the rank (3 or 4) of the tensor that it scales."""

    name: str
    centre: float
    rank: int


class ScaleRows(ir.passes.InPlacePass):
    """Ratios for all points at once, in float32, cast to the graph's dtype once.

        s = Gather(act_scales [rows, points], step_index)        [batch, points]
        to_centre = Cast(c / s),  from_centre = Cast(s / c)      then one Split each into columns

    Points are taken in two groups by the rank of their tensors, so that a column needs no Reshape of its own.
    One Gather and few Splits build faster than a Gather per point (TensorRT-RTX, SD v1-4: 54 s against 89 s).

    Requires: a graph input ``step_index``. Ensures: ``scales`` holds every point's ratios.
    """

    def __init__(self, points: tuple[PointSpec, ...], rows: int | str, dtype: ir.DataType) -> None:
        super().__init__()
        self.points, self.rows, self.dtype = points, rows, dtype
        self.scales: dict[str, PointScales] = {}

    def requires(self, model: ir.Model) -> None:
        """Checks the requirement."""
        if "step_index" not in {value.name for value in model.graph.inputs}:
            raise ir.passes.PreconditionError("the graph has no input step_index")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the input and the nodes; changes nothing where there is no point."""
        if not self.points:
            return ir.passes.PassResult(model, modified=False)
        graph = model.graph
        table = ir.Value(
            name=ACT_SCALES, shape=ir.Shape([self.rows, len(self.points)]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        graph.inputs.insert(3, table)
        step_index = next(value for value in graph.inputs if value.name == "step_index")
        gather = _node("Gather", [table, step_index], f"{ACT_SCALES}/rows", axis=0)
        nodes = [gather]
        for rank in sorted({point.rank for point in self.points}):
            nodes += self._group(graph, gather.outputs[0], rank)
        first = next(iter(graph))
        graph.insert_before(first, nodes)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        if set(self.scales) != {point.name for point in self.points}:
            raise ir.passes.PostconditionError(f"{model.graph.name}: act points without ratios")

    def _group(self, graph: ir.Graph, rows: ir.Value, rank: int) -> list[ir.Node]:
        """Nodes that make the ratios of all points of one rank; fills ``scales``."""
        columns = [index for index, point in enumerate(self.points) if point.rank == rank]
        group = [self.points[index] for index in columns]
        prefix = f"{ACT_SCALES}/rank{rank}"
        trailing = (1,) * (rank - 2)
        picked = constant(f"{prefix}/columns", np.asarray(columns, np.int64))
        axes = constant(f"{prefix}/axes", np.arange(2, rank, dtype=np.int64))
        centres = constant(f"{prefix}/centres", _centres(group).reshape(-1, *trailing))
        for value in (picked, axes, centres):
            graph.initializers.add(value)
        select = _node("Gather", [rows, picked], f"{prefix}/select", axis=1)
        shape = _node("Unsqueeze", [select.outputs[0], axes], f"{prefix}/scales")
        scales = shape.outputs[0]
        nodes, ratios = [select, shape], []
        for name, pair in (("to_centre", [centres, scales]), ("from_centre", [scales, centres])):
            made = self._ratios(pair, f"{prefix}/{name}", [f"{p.name}/input_quantizer/{name}" for p in group])
            for value in made[-1].outputs:
                value.shape = ir.Shape([_batch(graph), 1, *trailing])
            nodes += made
            ratios.append(made[-1].outputs)
        for point, to_centre, from_centre in zip(group, *ratios, strict=True):
            self.scales[point.name] = PointScales(point.centre, to_centre, from_centre)
        return nodes

    def _ratios(self, pair: list[ir.Value], prefix: str, names: list[str]) -> list[ir.Node]:
        """Divide in float32, cast once, split into columns.

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


def _centres(points: list[PointSpec]) -> NDArray[np.float32]:
    return np.asarray([point.centre for point in points], np.float32)


def _batch(graph: ir.Graph) -> ir.SymbolicDim | int:
    """The batch dimension as the graph's first input names it."""
    shape = graph.inputs[0].shape
    assert shape is not None  # the contract's inputs have shapes
    return shape[0]
