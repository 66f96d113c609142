"""Puts low-rank branches beside layers: LoRAs as inputs of the graph, off where none is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.tensors import constant
from s2p_deploy.records.optional_inputs import LORA_DOWN, LORA_STRENGTHS, LORA_UP, LoraSlot, LoraSlots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.export.regions import LayerNode


@dataclass(frozen=True)
class LoraTarget:
    """A layer that gets a branch, before any lowering.

    Attributes:
        layer: its node.
        path: its path as diffusers names it.
        read: what it reads, before a shift or a smoothing of its own.
        shift: reads the constant [in] that a norm in front subtracts already; None where nothing is lacking.
    """

    layer: LayerNode
    path: str
    read: ir.Value
    shift: Callable[[], NDArray[np.float32]] | None = None

    @property
    def is_conv(self) -> bool:
        """Tells a convolution from a linear layer."""
        return self.layer.plan.op == "conv"

    @property
    def weight(self) -> tuple[int, ...]:
        """Returns the shape of the weight: [out, in, height, width], or [in, out] of a linear layer."""
        assert self.layer.weight.shape is not None  # parameters have shapes
        return tuple(self.layer.weight.shape.numpy())


class LoraBranches(ir.passes.InPlacePass):
    """Adds a branch of ``rank`` ranks to each target, before quantizers change what its layer reads.

        y + (((x A) ⊙ g) B)     g = lora_strengths [batch, rank], A and B out of lora_down and lora_up

    Linear layers that read one tensor share one product: their down matrices lie side by side, [in, layers * rank].
    Both packed inputs are flat, so that an engine has two to bind, however many layers it has. Where a norm in front
    subtracts a shift k, the branch reads x - k and adds kA back.

    ``slots`` says where each matrix lies.

    Requires: targets have distinct paths. Ensures: ``slots`` has every target.
    """

    def __init__(self, targets: Sequence[LoraTarget], rank: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.targets, self.rank, self.dtype = targets, rank, dtype
        self.slots: LoraSlots | None = None

    def requires(self, _model: ir.Model) -> None:
        """Checks the requirement."""
        if len({target.path for target in self.targets}) != len(self.targets):
            raise ir.passes.PreconditionError("two targets have one path")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Adds the inputs and the branches."""
        branches = _Branches(model.graph, self.rank, self.dtype)
        groups: dict[ir.Value, list[LoraTarget]] = {}
        for target in self.targets:
            # a convolution has a kernel of its own, so it shares with none
            groups.setdefault(target.layer.output if target.is_conv else target.read, []).append(target)
        self.slots = LoraSlots(self.rank, tuple(slot for group in groups.values() for slot in branches.add(group)))
        branches.finish()
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        if self.slots is None or {slot.layer for slot in self.slots.layers} != {each.path for each in self.targets}:
            raise ir.passes.PostconditionError(f"{model.graph.name}: layers without a low-rank branch")


class _Branches:
    """The branches of a graph while they are added."""

    def __init__(self, graph: ir.Graph, rank: int, dtype: ir.DataType) -> None:
        self._graph, self._rank, self._dtype = graph, rank, dtype
        self._first = next(iter(graph))  # what depends on inputs alone is put before it
        self._down, self._up = (ir.Value(name=name, type=ir.TensorType(dtype)) for name in (LORA_DOWN, LORA_UP))
        strengths = ir.Value(name=LORA_STRENGTHS, type=ir.TensorType(dtype), shape=ir.Shape(["batch", rank]))
        graph.inputs.extend((self._down, self._up, strengths))
        self._down_size = self._up_size = 0
        gates = (("tokens", [1], ("batch", 1, rank)), ("pixels", [2, 3], ("batch", rank, 1, 1)))
        self._tokens, self._pixels = (
            self._early("Unsqueeze", [strengths, self._integers(f"{name}/axes", axes)], name, shape)
            for name, axes, shape in ((f"{LORA_STRENGTHS}/{kind}", axes, shape) for kind, axes, shape in gates)
        )

    def add(self, group: Sequence[LoraTarget]) -> list[LoraSlot]:
        """Adds the branches of layers that read one tensor, and returns their slots."""
        start, products = self._down_size, self._products(group)
        slots = []
        for number, (target, product) in enumerate(zip(group, products, strict=True)):
            name, conv = f"{target.path}/lora", target.is_conv
            inputs, outputs = (target.weight[1:], target.weight[0]) if conv else (target.weight[:1], target.weight[1])
            place = LoraSlot(
                target.path,
                target.layer.plan.op,
                inputs,
                outputs,
                start + number * self._rank,
                len(group),
                self._up_size,
            )
            up = self._up_matrix((outputs, self._rank, 1, 1) if conv else (self._rank, outputs), f"{name}/up")
            gate = self._pixels if conv else self._tokens
            gated = _node("Mul", [product, gate], f"{name}/gated", like=product)
            branch = _node("Conv" if conv else "MatMul", [gated.outputs[0], up], f"{name}/branch", like=product)
            self._add_to_result(target.layer, [gated, branch], name)
            slots.append(place)
        return slots

    def finish(self) -> None:
        """Gives the packed inputs their sizes."""
        self._down.shape, self._up.shape = ir.Shape([self._down_size]), ir.Shape([self._up_size])

    def _products(self, group: Sequence[LoraTarget]) -> list[ir.Value]:
        """Multiplies what a group reads with its down matrices, and gives every layer its part."""
        target, name = group[0], f"{group[0].path}/lora"
        read, conv, ranks = target.read, target.is_conv, self._rank * len(group)
        shape = (ranks, *target.weight[1:]) if conv else (target.weight[0], ranks)
        matrix = self._down_matrix(shape, f"{name}/down")
        if conv:
            nodes = [ir.node("Conv", [read, matrix], target.layer.node.attributes, name=f"{name}/product")]
            nodes[0].outputs[0].name, nodes[0].outputs[0].type = f"{name}/product", read.type
        else:
            nodes = [_node("MatMul", [read, matrix], f"{name}/product", like=read)]
        if target.shift is not None:
            trailing = (1, 1) if conv else ()
            lacking = target.shift().astype(self._dtype.numpy()).reshape(1, -1, *trailing)
            shift = constant(f"{name}/shift", lacking)
            self._graph.initializers.add(shift)
            nodes.append(_node("Conv" if conv else "MatMul", [shift, matrix], f"{name}/shift_product", like=read))
            nodes.append(_node("Add", [node.outputs[0] for node in nodes], f"{name}/whole_product", like=read))
        if len(group) > 1:
            parts = {"axis": -1, "num_outputs": len(group)}
            split = ir.node("Split", nodes[-1].outputs[:1], parts, num_outputs=len(group), name=f"{name}/split")
            for number, value in enumerate(split.outputs):
                value.name, value.type = f"{name}/split/{number}", read.type
            nodes.append(split)
        producer = read.producer()
        if producer is None:
            self._graph.insert_before(self._first, nodes)
        else:
            self._graph.insert_after(producer, nodes)
        return list(nodes[-1].outputs)

    def _add_to_result(self, layer: LayerNode, branch: Sequence[ir.Node], name: str) -> None:
        """Adds a branch to a layer's result; what read the result reads the sum, under the result's name."""
        result = layer.output
        readers, result_name, producer = list(result.uses()), str(result.name), result.producer()
        assert producer is not None  # a node computes it
        total = _node("Add", [result, branch[-1].outputs[0]], f"{name}/sum", like=result)
        total.outputs[0].shape = result.shape
        self._graph.insert_after(producer, [*branch, total])
        for reader, index in readers:
            reader.replace_input_with(index, total.outputs[0])
        if result in self._graph.outputs:
            self._graph.outputs[self._graph.outputs.index(result)] = total.outputs[0]
        result.name, total.outputs[0].name = f"{layer.plan.name}/without_lora", result_name

    def _down_matrix(self, shape: tuple[int, ...], name: str) -> ir.Value:
        """Takes the next numbers of ``lora_down`` as a matrix."""
        start, self._down_size = self._down_size, self._down_size + math.prod(shape)
        return self._matrix(self._down, start, shape, name)

    def _up_matrix(self, shape: tuple[int, ...], name: str) -> ir.Value:
        """Takes the next numbers of ``lora_up`` as a matrix."""
        start, self._up_size = self._up_size, self._up_size + math.prod(shape)
        return self._matrix(self._up, start, shape, name)

    def _matrix(self, packed: ir.Value, start: int, shape: tuple[int, ...], name: str) -> ir.Value:
        size = math.prod(shape)
        ends = [self._integers(f"{name}/{end}", [at]) for end, at in (("start", start), ("stop", start + size))]
        flat = self._early("Slice", [packed, *ends], f"{name}/flat", (size,))
        return self._early("Reshape", [flat, self._integers(f"{name}/shape", shape)], name, shape)

    def _early(self, op: str, inputs: Sequence[ir.Value], name: str, shape: Sequence[int | str]) -> ir.Value:
        """Makes a node at the graph's start, of inputs alone."""
        node = _node(op, inputs, name, like=self._down)
        node.outputs[0].shape = ir.Shape(shape)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _integers(self, name: str, values: Sequence[int]) -> ir.Value:
        value = constant(name, np.asarray(values, np.int64))
        self._graph.initializers.add(value)
        return value


def _node(op: str, inputs: Sequence[ir.Value], name: str, *, like: ir.Value) -> ir.Node:
    """Makes a node whose one value has its name, and the type of ``like``."""
    node = ir.node(op, inputs, name=name)
    node.outputs[0].name, node.outputs[0].type = name, like.type
    return node
