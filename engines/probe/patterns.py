"""The patterns that the probe tries: one product, quantized in every way that has a name, with its right answer.

With x the activation, s the row's scale (runtime data) and c a constant:

    rescale          x·(c/s) → Q(c) → DQ(c) → op → ·(s/c) → + bias    per-sample rows; the exported graph's form
    runtime_q        Q(x, s) → DQ(c) → op → ·(s/c) → + bias           s gathered from the table by the step index
    runtime_q_input  the same, s an input of the graph
    static           Q(x, c) → DQ(c) → op → + bias
    q_runtime        Q(x, s) → DQ(c) → op → + bias
    dq_runtime       Q(x, c) → DQ(s) → op → + bias
    qdq_runtime      Q(x, s) → DQ(s) → op → + bias
    float            x → op → + bias

Every ratio is a power of two and no x lies halfway between two codes: codes are exact in every dtype, and only the sum
of products rounds. With the first row's scale half of all x clip, with the second's none: else an engine that takes the
wrong row would compute nearly the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.probe.graph import Graph
from s2p_deploy.engines.support import Pattern
from s2p_deploy.records import TensorSpec

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

LOWERINGS = ("rescale", "runtime_q", "runtime_q_input", "static", "q_runtime", "dq_runtime", "qdq_runtime", "float")
OPS = ("conv", "matmul")
WEIGHTS = ("int8", "int4", "int4_block", "none")
OUTPUT = "y"

ROW_SCALES = (1 / 128, 1 / 8)
CENTRE = 1 / 32
BATCH = 2
_SHAPES = {"conv": (64, 16, 16), "matmul": (77, 256)}  # one sample of x
_WEIGHTS = {"conv": (64, 64, 3, 3), "matmul": (256, 128)}
_OUT_AXIS = {"conv": 0, "matmul": 1}
_BLOCK = {"conv": (1, 32), "matmul": (0, 64)}  # axis and size of an INT4 block
_PER_SAMPLE = {"rescale"}
_FLOATS: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Trial:
    """Inputs of one run, and what must come out (float64)."""

    inputs: dict[str, NDArray[Any]]
    expected: NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A pattern as a graph, the name of its product node, its inputs, and two runs on different rows of scales."""

    model: onnx.ModelProto
    node: str
    inputs: tuple[TensorSpec, ...]
    trials: tuple[Trial, Trial]


def all_patterns() -> tuple[Pattern, ...]:
    """Every lowering x operator x weight format; activations are INT8 but in ``float``."""
    every = product(LOWERINGS, OPS, WEIGHTS)
    return tuple(Pattern(low, op, weights, "none" if low == "float" else "int8") for low, op, weights in every)


def build_patterns() -> tuple[Pattern, ...]:
    """The patterns that ``prepare`` asks about."""
    used = {"rescale", "runtime_q", "static", "float"}
    return tuple(p for p in all_patterns() if p.lowering in used and p.weights != "int4_block")


def case_of(pattern: Pattern, dtype: str) -> Case:
    """The graph of a pattern in ``fp32`` or ``fp16`` and its trials. Only the weights' values are random, and fixed."""
    g = Graph(_FLOATS[dtype])
    weight, values = _weight(g, pattern)
    data, back = _quantized(g, pattern)
    node = g.product(pattern.op, data, weight)
    result = g.op("Mul", [node, back]) if back is not None else node
    bias = _bias(pattern.op).astype(g.dtype)
    g.op("Add", [result, g.constant(bias)], output=OUTPUT)
    specs = _inputs(pattern, dtype)
    model = g.model(specs, TensorSpec(OUTPUT, g.dtype.name, ("batch", *_output_shape(pattern.op))))
    rows = ((0, 1), (1, 0)) if pattern.lowering in _PER_SAMPLE else ((0, 0), (1, 1))
    first, second = (_trial(pattern, dtype, values, np.asarray(r)) for r in rows)
    return Case(model, node, specs, (first, second))


def _quantized(g: Graph, pattern: Pattern) -> tuple[str, str | None]:
    """The product's data operand, and what its result is multiplied with (None: nothing)."""
    if pattern.lowering == "float":
        return "x", None
    centre, scale = g.constant(g.dtype.type(CENTRE)), _runtime_scale(g, pattern)
    if pattern.lowering == "static" or scale is None:
        return g.dequantize(g.quantize("x", centre), centre), None
    if pattern.lowering == "rescale":
        scaled = g.op("Mul", ["x", g.ratio(CENTRE, scale)])
        return g.dequantize(g.quantize(scaled, centre), centre), g.ratio(scale, CENTRE)
    narrow = g.cast(scale)
    back = g.ratio(scale, CENTRE) if pattern.lowering.startswith("runtime_q") else None
    codes = g.quantize("x", centre if pattern.lowering == "dq_runtime" else narrow)
    return g.dequantize(codes, narrow if pattern.lowering in {"dq_runtime", "qdq_runtime"} else centre), back


def _runtime_scale(g: Graph, pattern: Pattern) -> str | None:
    """The row's scale in float32: one number, or [batch, 1, ...] for per-sample rows; None where it is not used."""
    if pattern.lowering == "static":
        return None
    if pattern.lowering == "runtime_q_input":
        return g.op("Reshape", ["scale", g.constant(np.zeros(0, np.int64))])
    if pattern.lowering in _PER_SAMPLE:
        shape = np.asarray([-1] + [1] * len(_SHAPES[pattern.op]))
        return g.op("Reshape", [g.op("Gather", ["act_scales", "step_index"], axis=0), g.constant(shape)])
    row = g.op("Gather", ["step_index", g.constant(np.int64(0))], axis=0)
    return g.op("Reshape", [g.op("Gather", ["act_scales", row], axis=0), g.constant(np.zeros(0, np.int64))])


def _weight(g: Graph, pattern: Pattern) -> tuple[str, NDArray[np.float64]]:
    """The product's weight operand, and its values."""
    shape = _WEIGHTS[pattern.op]
    if pattern.weights == "none":
        values = _codes(shape, 127) / 256
        return g.constant(values.astype(g.dtype)), values
    axis, size = _BLOCK[pattern.op] if pattern.weights == "int4_block" else (_OUT_AXIS[pattern.op], 0)
    codes = _codes(shape, 127 if pattern.weights == "int8" else 7)
    parts = tuple(n // size if i == axis else n for i, n in enumerate(shape)) if size else (shape[axis],)
    scale = 2.0 ** -(np.arange(np.prod(parts)).reshape(parts) % 3 + (7 if pattern.weights == "int8" else 3))
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    spread = np.repeat(scale, size, axis) if size else scale.reshape(along)
    kind = "int8" if pattern.weights == "int8" else "int4"
    stored = g.codes(codes, kind)
    return g.dequantize(stored, g.constant(scale.astype(g.dtype)), axis=axis, block=size), codes * spread


def _trial(pattern: Pattern, dtype: str, weight: NDArray[np.float64], rows: NDArray[np.int64]) -> Trial:
    x = _activation(pattern.op)
    s = np.asarray(ROW_SCALES)[rows].reshape([-1] + [1] * (x.ndim - 1))
    data = _as_quantized(pattern.lowering, x, s)
    expected = _product(pattern.op, data, weight) + _bias(pattern.op)
    given: dict[str, NDArray[Any]] = {
        "x": x.astype(_FLOATS[dtype]),
        "scale": np.asarray(ROW_SCALES, np.float32)[rows[:1]],
        "act_scales": np.asarray(ROW_SCALES, np.float32)[:, None],
        "step_index": rows.astype(np.int64),
    }
    return Trial({spec.name: given[spec.name] for spec in _inputs(pattern, dtype)}, expected)


def _as_quantized(lowering: str, x: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the lowering makes of x before the product, in real arithmetic."""
    if lowering == "float":
        return x
    coded = CENTRE if lowering in {"static", "dq_runtime"} else s
    decoded = CENTRE if lowering in {"static", "q_runtime"} else s
    return np.clip(np.round(x / coded), -128, 127) * decoded


def _product(op: str, x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    if op == "matmul":
        return x @ weight
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    result: NDArray[np.float64] = np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    return result


@cache
def _activation(op: str) -> NDArray[np.float64]:
    """Odd multiples of 1/512 in (-2, 2): none is halfway between two codes, and float16 has them all."""
    odd = np.random.default_rng(1).integers(-512, 512, (BATCH, *_SHAPES[op])) * 2 + 1
    return odd / 512


@cache
def _codes(shape: tuple[int, ...], top: int) -> NDArray[np.float64]:
    return np.random.default_rng(2).integers(-top - 1, top + 1, shape).astype(np.float64)


def _bias(op: str) -> NDArray[np.float64]:
    values = np.linspace(-2, 2, _WEIGHTS[op][_OUT_AXIS[op]]).astype(np.float16).astype(np.float64)
    return values.reshape((-1, 1, 1) if op == "conv" else (-1,))


def _output_shape(op: str) -> tuple[int, ...]:
    return (64, 16, 16) if op == "conv" else (77, 128)


def _inputs(pattern: Pattern, dtype: str) -> tuple[TensorSpec, ...]:
    x = TensorSpec("x", _FLOATS[dtype].name, ("batch", *_SHAPES[pattern.op]))
    if pattern.lowering in {"static", "float"}:
        return (x,)
    if pattern.lowering == "runtime_q_input":
        return (x, TensorSpec("scale", "float32", (1,)))
    table = TensorSpec("act_scales", "float32", (len(ROW_SCALES), 1))
    return (x, table, TensorSpec("step_index", "int64", ("batch",)))
