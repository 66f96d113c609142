"""Asks every backend to build small quantized patterns, and to run them where it can; writes the support tables.

    python -m tools.check_backends [BACKEND ...] [--out engines/support]

A maintainer runs it on a machine with the backends of a release, with a GPU where there is one; the tables ship in
``engines/support`` and decide how graphs are lowered. Every pattern is one product, quantized in every way that has a
name, with its right answer.

With x the activation, s the timestep's scale (runtime data) and c a constant:

    rescale          x·(c/s) → Q(c) → DQ(c) → op → ·(s/c) → + bias    per-sample scales; the exported graph's form
    runtime_q        Q(x, s) → DQ(c) → op → ·(s/c) → + bias           s gathered from the table by the step index
    runtime_q_input  the same, s an input of the graph
    static           Q(x, c) → DQ(c) → op → + bias
    q_runtime        Q(x, s) → DQ(c) → op → + bias
    dq_runtime       Q(x, c) → DQ(s) → op → + bias
    qdq_runtime      Q(x, s) → DQ(s) → op → + bias
    float            x → op → + bias

Every ratio is a power of two and no x lies halfway between two codes: codes are exact in every dtype, and only the sum
of products rounds. With the first timestep's scale half of all x clip, with the second's none: else an engine that
takes the wrong one would compute nearly the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from s2p_deploy.child_process import ChildEndedError, ChildProcess, Ended, Limits, native_errors, serve
from s2p_deploy.context import Progress, silent
from s2p_deploy.engines.backend import CompileRequest, backend_by_name, backend_names, usable_backend
from s2p_deploy.engines.options import BuildOptions
from s2p_deploy.engines.support import Finding, Pattern, SupportTable, Verdict, key_of, shipped_folder
from s2p_deploy.errors import EngineBuildError, S2PError
from s2p_deploy.records import Execution, ShapeProfile, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import Backend

OPSET = 21  # the first with INT4 and blocks
_IR_VERSION = 10
LOWERINGS = ("rescale", "runtime_q", "runtime_q_input", "static", "q_runtime", "dq_runtime", "qdq_runtime", "float")
OPS = ("conv", "matmul")
WEIGHTS = ("int8", "int4", "int4_block", "none")
OUTPUT = "y"

ROW_SCALES = (1 / 128, 1 / 8)
REFERENCE_SCALE = 1 / 32
BATCH = 2
_SHAPES = {"conv": (64, 16, 16), "matmul": (77, 256)}  # one sample of x
_WEIGHTS = {"conv": (64, 64, 3, 3), "matmul": (256, 128)}
_OUT_AXIS = {"conv": 0, "matmul": 1}
_BLOCK = {"conv": (1, 32), "matmul": (0, 64)}  # axis and size of an INT4 block
_PER_SAMPLE = {"rescale"}
_FLOATS: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}

CPU_LIMITS = Limits(60.0, 6 * 2**30)  # a pattern takes under a second, and under 1 GiB
GPU_LIMITS = Limits(600.0)  # the first use of a GPU is slow, and CUDA reserves more memory than it uses
WORKER = (str(Path(__file__).resolve()), "--serve")
_MAX_DETAIL = 300
_TOLERANCE = 0.05  # of the largest value: bf16 was off by 0.02, the other timestep's scale would be by 0.37
_PROFILE = ShapeProfile(1, BATCH, 2 * BATCH)


def main() -> int:
    """Checks the named backends, or all that are installed, and writes a table of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backends", nargs="*", metavar="BACKEND")
    parser.add_argument("--out", type=Path, default=shipped_folder())
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(attempt_in_child)
        return 0
    try:
        for name in options.backends or installed_backends():
            table = check_backend(name, progress=_print_progress)
            path = options.out / table.key.file_name
            path.write_text(table_text(table), encoding="utf-8")
            print(path)
    except S2PError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def installed_backends() -> list[str]:
    """Lists the backends whose library is installed."""
    return [name for name in backend_names() if backend_by_name(name).capabilities().missing is None]


def check_backend(
    backend: str,
    *,
    patterns: Sequence[Pattern] = (),
    limits: Limits | None = None,
    worker: Sequence[str] = WORKER,
    progress: Progress = silent,
) -> SupportTable:
    """Builds every pattern with a backend in every dtype that it builds from, in child processes.

    A child that dies costs only the pattern it was at. A pattern that takes too long gets no finding: a slow machine
    must not become a verdict that ships.

    Args:
        backend: its name.
        patterns: what to build (empty: every pattern).
        limits: of one pattern (None: those of a CPU or of a GPU, by where the backend executes).
        worker: arguments of the Python that answers with :class:`Outcome` as JSON.
        progress: told about every pattern.

    Raises:
        InputError: there is no such backend. MissingEnvironmentError: its library is missing.
        EngineBuildError: a child died before it came to a pattern.
    """
    chosen = usable_backend(backend)
    dtypes, execution, key = chosen.capabilities().dtypes, fastest_execution(chosen), key_of(backend)
    limits = limits or (GPU_LIMITS if key.device.startswith("sm_") else CPU_LIMITS)
    tasks = [(pattern, dtype) for dtype in dtypes for pattern in patterns or all_patterns()]
    findings: list[Finding] = []
    child: ChildProcess | None = None
    try:
        for done, (pattern, dtype) in enumerate(tasks):
            progress(f"check {backend}", done, len(tasks))
            if child is None:
                child = started(worker, limits)
            message = {"backend": backend, "pattern": asdict(pattern), "dtype": dtype, "execution": asdict(execution)}
            try:
                outcome = Outcome(**child.request(message))
                # a native library's own words, where there are any, say more than the exception that followed
                native = native_errors(child.log.splitlines()) if outcome.verdict == "fails" else []
                outcome = replace(outcome, detail=native[0].strip()[:_MAX_DETAIL]) if native else outcome
            except ChildEndedError as error:
                child.close()
                child = None
                if error.ended.code is None:
                    print(f"{pattern} in {dtype}: no end in {limits.timeout_s:g} s, no verdict", file=sys.stderr)
                    continue
                outcome = outcome_of_death(error.ended, limits)
            findings.append(Finding(pattern, dtype, **asdict(outcome)))
    finally:
        if child is not None:
            child.close()
    progress(f"check {backend}", len(tasks), len(tasks))
    return SupportTable(key, execution, tuple(findings))


def fastest_execution(backend: Backend) -> Execution:
    """Returns the last precision and optimization on the default provider: they rewrite graphs the most."""
    able = backend.capabilities()
    precision, provider, optimization = (
        names[at] if names else None
        for names, at in ((able.precisions, -1), (able.providers, 0), (able.optimizations, -1))
    )
    return Execution(precision, provider, optimization)


def table_text(table: SupportTable) -> str:
    """Returns the JSON text of a table, one finding per line; the same findings give the same text."""
    data = asdict(table)
    findings = ",\n".join(json.dumps(finding) for finding in data.pop("findings"))
    return f'{json.dumps(data)[:-1]}, "findings": [\n{findings}\n]}}\n'


def started(worker: Sequence[str], limits: Limits) -> ChildProcess:
    """Starts a child and waits until it is ready, so that its start does not count as a pattern's time."""
    child = ChildProcess(worker, limits)
    try:
        child.request({})
    except ChildEndedError as error:
        child.close()
        summary = f"the check could not start: it {error.ended.summary(limits)}"
        raise EngineBuildError(error.ended.with_tail(summary)) from error
    return child


@dataclass(frozen=True)
class Outcome:
    """The result of one attempt."""

    verdict: Verdict
    detail: str = ""
    compute: str = "unknown"


def outcome_of_death(ended: Ended, limits: Limits) -> Outcome:
    """Judges an attempt that its process did not survive."""
    detail = ended.summary(limits)
    crashed = ended.code is not None and ended.code < 0 and "memory" not in detail
    return Outcome("crashes" if crashed else "fails", detail[:_MAX_DETAIL])


def attempt_in_child(
    message: dict[str, Any], one: Callable[[Backend, Pattern, str, Execution], Outcome] | None = None
) -> dict[str, Any]:
    """Attempts the pattern of a message; an empty message is answered at once. ``one`` makes the attempt."""
    if not message:
        return {}
    backend, pattern = usable_backend(message["backend"]), Pattern(**message["pattern"])
    try:
        outcome = (one or attempt)(backend, pattern, message["dtype"], Execution(**message["execution"]))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome("fails", _first_line(error))
    return asdict(outcome)


def attempt(backend: Backend, pattern: Pattern, dtype: str, execution: Execution) -> Outcome:
    """Builds a pattern as an engine is built, and where the backend executes here, runs it."""
    case = case_of(pattern, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "engine"
        folder.mkdir()
        options = BuildOptions(**asdict(execution), profile=_PROFILE)
        example = case.trials[0].inputs
        compiled = backend.compile(
            CompileRequest(ir.from_proto(case.model), case.inputs, options, folder, Path(name), example)
        )
    compute = compiled.compute.get(case.node, "unknown")
    error = largest_error(backend, case, execution) if backend.capabilities().executes else 0.0
    if error <= _TOLERANCE:  # not so for NaN
        return Outcome("builds", compute=compute)
    return Outcome("wrong", f"results are off by {error:.2g} of the largest value", compute)


def largest_error(backend: Backend, case: Case, execution: Execution) -> float:
    """Returns the largest error over both trials, relative to the largest value that is expected."""
    errors = []
    with backend.runner_from_model(ir.from_proto(case.model), execution) as runner:
        for trial in case.trials:
            output = runner.infer(trial.inputs)[OUTPUT].astype(np.float64)
            errors.append(np.abs(output - trial.expected).max() / np.abs(trial.expected).max())
    return float(np.max(errors))  # NaN if any is


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)[:_MAX_DETAIL]


def _print_progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done}/{total}", file=sys.stderr)


@dataclass(frozen=True)
class Trial:
    """Inputs of one run, and what must come out (float64)."""

    inputs: dict[str, NDArray[Any]]
    expected: NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A pattern as a graph, the name of its product node, its inputs, and two runs on scales of different timesteps."""

    model: onnx.ModelProto
    node: str
    inputs: tuple[TensorSpec, ...]
    trials: tuple[Trial, Trial]


def all_patterns() -> tuple[Pattern, ...]:
    """Lists every lowering x operator x weight format; activations are INT8 but in ``float``."""
    every = product(LOWERINGS, OPS, WEIGHTS)
    return tuple(Pattern(low, op, weights, "none" if low == "float" else "int8") for low, op, weights in every)


def build_patterns() -> tuple[Pattern, ...]:
    """Lists the patterns whose support ``prepare`` looks up."""
    used = {"rescale", "runtime_q", "static", "float"}
    return tuple(p for p in all_patterns() if p.lowering in used and p.weights != "int4_block")


def case_of(pattern: Pattern, dtype: str) -> Case:
    """Makes the graph of a pattern in ``fp32`` or ``fp16`` and its trials. Only weights are random, and seeded."""
    g = PatternGraph(_FLOATS[dtype])
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


def _quantized(g: PatternGraph, pattern: Pattern) -> tuple[str, str | None]:
    """Returns the product's data operand, and what its result is multiplied with (None: nothing)."""
    if pattern.lowering == "float":
        return "x", None
    reference_scale, scale = g.constant(g.dtype.type(REFERENCE_SCALE)), _runtime_scale(g, pattern)
    if pattern.lowering == "static" or scale is None:
        return g.dequantize(g.quantize("x", reference_scale), reference_scale), None
    if pattern.lowering == "rescale":
        scaled = g.op("Mul", ["x", g.ratio(REFERENCE_SCALE, scale)])
        return g.dequantize(g.quantize(scaled, reference_scale), reference_scale), g.ratio(scale, REFERENCE_SCALE)
    narrow = g.cast(scale)
    back = g.ratio(scale, REFERENCE_SCALE) if pattern.lowering.startswith("runtime_q") else None
    codes = g.quantize("x", reference_scale if pattern.lowering == "dq_runtime" else narrow)
    return g.dequantize(codes, narrow if pattern.lowering in {"dq_runtime", "qdq_runtime"} else reference_scale), back


def _runtime_scale(g: PatternGraph, pattern: Pattern) -> str | None:
    """Gathers the timestep's float32 scale: one number, or [batch, 1, ...] per sample; None where it is not used."""
    if pattern.lowering == "static":
        return None
    if pattern.lowering == "runtime_q_input":
        return g.op("Reshape", ["scale", g.constant(np.zeros(0, np.int64))])
    if pattern.lowering in _PER_SAMPLE:
        shape = np.asarray([-1] + [1] * len(_SHAPES[pattern.op]))
        return g.op("Reshape", [g.op("Gather", ["act_scales", "timestep_index"], axis=0), g.constant(shape)])
    row = g.op("Gather", ["timestep_index", g.constant(np.int64(0))], axis=0)
    return g.op("Reshape", [g.op("Gather", ["act_scales", row], axis=0), g.constant(np.zeros(0, np.int64))])


def _weight(g: PatternGraph, pattern: Pattern) -> tuple[str, NDArray[np.float64]]:
    """Returns the product's weight operand, and its values."""
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
        "timestep_index": rows.astype(np.int64),
    }
    return Trial({spec.name: given[spec.name] for spec in _inputs(pattern, dtype)}, expected)


def _as_quantized(lowering: str, x: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes what the lowering makes of x before the product, in real arithmetic."""
    if lowering == "float":
        return x
    coded = REFERENCE_SCALE if lowering in {"static", "dq_runtime"} else s
    decoded = REFERENCE_SCALE if lowering in {"static", "q_runtime"} else s
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
    return (x, table, TensorSpec("timestep_index", "int64", ("batch",)))


class PatternGraph:
    """Collects nodes and initializers; floating values have ``dtype`` unless said otherwise."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Adds an initializer of the value's own dtype."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def codes(self, values: NDArray[Any], kind: str) -> str:
        """Adds an initializer of integer codes, ``int8`` or ``int4`` (two per byte)."""
        name = f"codes_{len(self._constants)}"
        onnx_type = onnx.TensorProto.INT4 if kind == "int4" else onnx.TensorProto.INT8
        flat = values.astype(np.int8).flatten().tolist()
        self._constants.append(helper.make_tensor(name, onnx_type, values.shape, flat))
        return name

    def op(self, kind: str, inputs: list[str], output: str = "", **attributes: int | list[int]) -> str:
        """Any operator with one output."""
        name = output or f"{kind}_{len(self._nodes)}"
        node = helper.make_node(kind, inputs, [name], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return name

    def cast(self, value: str) -> str:
        """To the graph's floating type."""
        return self.op("Cast", [value], to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def ratio(self, above: str | float, below: str | float) -> str:
        """Computes a quotient of float32 values, cast once. Numbers become constants."""
        names = [v if isinstance(v, str) else self.constant(np.float32(v)) for v in (above, below)]
        return self.cast(self.op("Div", names))

    def quantize(self, value: str, scale: str) -> str:
        """INT8 codes of a value."""
        return self.op("QuantizeLinear", [value, scale, self.constant(np.int8(0))])

    def dequantize(self, codes: str, scale: str, axis: int = 1, block: int = 0) -> str:
        """Codes times a scale: of the tensor, per channel along ``axis``, or per ``block`` values along it."""
        return self.op("DequantizeLinear", [codes, scale], axis=axis, block_size=block)  # 0: no blocks

    def product(self, op: str, data: str, weight: str) -> str:
        """Adds a 3x3 convolution that keeps the size, or a matrix product."""
        return self.op("Conv", [data, weight], pads=[1] * 4) if op == "conv" else self.op("MatMul", [data, weight])

    def model(self, inputs: tuple[TensorSpec, ...], output: TensorSpec) -> onnx.ModelProto:
        """Returns the finished model, checked against the standard."""
        graph = helper.make_graph(
            self._nodes, "pattern", list(map(_value_info, inputs)), [_value_info(output)], self._constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        onnx.checker.check_model(model)
        return model


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)


if __name__ == "__main__":
    sys.exit(main())
