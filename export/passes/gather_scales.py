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


@dataclass(frozen=True)
class Reach:
    """By how much image prompts enlarge what some quantizers read: s becomes s + reach · factor.

    Attributes:
        value: the graph's input [batch, attentions]; zeros change no bit.
        columns: the attention of each quantizer.
        factors: one over the largest code, times what lies between the attention and its quantizer.
    """

    value: ir.Value
    columns: dict[str, int]
    factors: dict[str, float]


class GatherScales(ir.passes.InPlacePass):
    """Takes the ratios of all quantizers at once, in float32, and casts them to the graph's dtype once.

        s = Gather(act_scales [timesteps, quantizers], timestep_index)   [batch, quantizers]
        to_reference = Cast(c / s),  from_reference = Cast(s / c)       then one Split each into columns

    Quantizers are taken in groups by the rank of their tensors, so that a column needs no Reshape of its own, and those
    with a ``reach`` by themselves, so that nothing else depends on it.
    One Gather and few Splits build faster than a Gather per quantizer (TensorRT-RTX, SD v1-4: 54 s against 89 s).

    Requires: a graph input ``timestep_index``. Ensures: ``scales`` holds every quantizer's ratios.
    """

    def __init__(
        self,
        quantizers: tuple[QuantizerSpec, ...],
        timesteps: int | str,
        dtype: ir.DataType,
        reach: Reach | None = None,
    ) -> None:
        super().__init__()
        self.quantizers, self.timesteps, self.dtype, self.reach = quantizers, timesteps, dtype, reach
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
        growing = set() if self.reach is None else set(self.reach.columns)
        for rank, grows in sorted({(each.rank, each.name in growing) for each in self.quantizers}):
            columns = [
                number
                for number, each in enumerate(self.quantizers)
                if (each.rank, each.name in growing) == (rank, grows)
            ]
            nodes += self._group(graph, gather.outputs[0], columns, self.reach if grows else None)
        first = next(iter(graph))
        graph.insert_before(first, nodes)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        if set(self.scales) != {quantizer.name for quantizer in self.quantizers}:
            raise ir.passes.PostconditionError(f"{model.graph.name}: activation quantizers without ratios")

    def _group(self, graph: ir.Graph, scales: ir.Value, columns: list[int], reach: Reach | None) -> list[ir.Node]:
        """Makes the nodes of the ratios of quantizers of one rank; fills ``scales``."""
        group = [self.quantizers[index] for index in columns]
        rank = group[0].rank
        prefix = f"{ACT_SCALES}/rank{rank}" + ("" if reach is None else "/growing")
        trailing = (1,) * (rank - 2)
        picked = constant(f"{prefix}/columns", np.asarray(columns, np.int64))
        axes = constant(f"{prefix}/axes", np.arange(2, rank, dtype=np.int64))
        stored = np.asarray([quantizer.reference_scale for quantizer in group], np.float32)
        reference_scales = constant(f"{prefix}/reference_scales", stored.reshape(-1, *trailing))
        for value in (picked, axes, reference_scales):
            graph.initializers.add(value)
        nodes, ratios = [_node("Gather", [scales, picked], f"{prefix}/select", axis=1)], []
        if reach is not None:
            nodes += self._grown(graph, nodes[-1].outputs[0], [quantizer.name for quantizer in group], reach)
        nodes.append(_node("Unsqueeze", [nodes[-1].outputs[0], axes], f"{prefix}/scales"))
        column_scales = nodes[-1].outputs[0]
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

    def _grown(self, graph: ir.Graph, scales: ir.Value, names: list[str], reach: Reach) -> list[ir.Node]:
        """Makes nodes that add to scales [batch, quantizers] what the reach asks for, in float32."""
        prefix = f"{ACT_SCALES}/reach"
        picked = constant(f"{prefix}/columns", np.asarray([reach.columns[name] for name in names], np.int64))
        factors = constant(f"{prefix}/factors", np.asarray([reach.factors[name] for name in names], np.float32))
        for value in (picked, factors):
            graph.initializers.add(value)
        nodes, own = [], reach.value
        if self.dtype != ir.DataType.FLOAT:
            nodes.append(_node("Cast", [own], f"{prefix}/cast", to=ir.DataType.FLOAT.value))
            own = nodes[-1].outputs[0]
        nodes.append(_node("Gather", [own, picked], f"{prefix}/select", axis=1))
        nodes.append(_node("Mul", [nodes[-1].outputs[0], factors], f"{prefix}/steps"))
        return [*nodes, _node("Add", [scales, nodes[-1].outputs[0]], f"{prefix}/scales")]

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
