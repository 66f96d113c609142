"""Expands INT4 weights to the INT8 container, wherever a backend cannot use them packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Int4Use:
    """Use of an INT4 weight in the graph.

    The operator behind its DequantizeLinear (``Conv``, ``MatMul``, ...), and whether that operator's other operand is
    dequantized too (W4A8) or floating point (weight-only, W4A16).
    """

    op: str
    quantized_activation: bool


class ExpandInt4(ir.passes.InPlacePass):
    """Makes every INT4 initializer INT8 with the same codes, but those whose uses ``keep`` all accepts.

        q in [-8, 7] is the same integer in either type, and DequantizeLinear gives q * scale for both

    so results do not change by a bit; only the storage does (one byte per weight instead of half of one). Data is read
    when the model is written, one tensor at a time.

    Requires: INT4 initializers are read by DequantizeLinear alone. Ensures: what is still INT4, ``keep`` accepts.
    """

    def __init__(self, keep: Callable[[Int4Use], bool]) -> None:
        super().__init__()
        self.keep = keep

    def requires(self, model: ir.Model) -> None:
        """Checks the precondition."""
        for weight in _int4_weights(model):
            for reader, _ in weight.uses():
                if reader.op_type != "DequantizeLinear":
                    raise ir.passes.PreconditionError(f"INT4 weight {weight.name} is read by a {reader.op_type}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the tensors."""
        chosen = [weight for weight in _int4_weights(model) if not self._kept(weight)]
        for weight in chosen:
            _expand(weight)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        """Checks the postcondition."""
        for weight in _int4_weights(model):
            if not self._kept(weight):
                raise ir.passes.PostconditionError(f"{weight.name} is still INT4")

    def _kept(self, weight: ir.Value) -> bool:
        return all(self.keep(use) for use in _uses(weight))


def _int4_weights(model: ir.Model) -> list[ir.Value]:
    values = model.graph.initializers.values()
    return [value for value in values if value.const_value is not None and value.const_value.dtype == ir.DataType.INT4]


def _expand(weight: ir.Value) -> None:
    packed = weight.const_value
    assert packed is not None  # _int4_weights gives no others
    name = weight.name or ""
    shape = ir.Shape(packed.shape.numpy())
    weight.const_value = ir.LazyTensor(
        lambda: ir.Tensor(packed.numpy().astype(np.int8), name=name), ir.DataType.INT8, shape, name=name
    )
    weight.type = ir.TensorType(ir.DataType.INT8)


def _uses(weight: ir.Value) -> Iterator[Int4Use]:
    for dequantize, _ in weight.uses():
        for node, _ in dequantize.outputs[0].uses():
            yield Int4Use(node.op_type, _has_quantized_activation(node, dequantize))


def _has_quantized_activation(node: ir.Node, dequantize: ir.Node) -> bool:
    producers = (value.producer() for value in node.inputs if value is not None)
    return any(p is not None and p is not dequantize and p.op_type == "DequantizeLinear" for p in producers)
