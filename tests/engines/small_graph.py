"""A hand-made graph in the form of the exported one: two quantized layers, a weight-only and a floating conv."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from s2p_deploy.engines import BuildOptions, ShapeProfile
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.records import (
    ActivationQuantizer,
    Base,
    ExportedGraph,
    GraphDescription,
    GraphLayer,
    LayerPlan,
    PrecisionPlan,
    ScaleTable,
    TensorSpec,
    TimestepTable,
    write_artifact,
)
from s2p_deploy.records.artifacts import file_digest
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import json_text

if TYPE_CHECKING:
    from pathlib import Path

ROWS, CHANNELS, SIZE, TOKENS = 1000, 32, 8, 6
REFERENCE_SCALE = 0.03
POINTS = ("conv", "to_q")
CALIBRATED = (1, 501, 981)
FLOATS = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}
CODES = {"int8": (TensorProto.INT8, 127), "int4": (TensorProto.INT4, 7)}


class GraphWriter:
    """Collects nodes and initializers of one dtype."""

    def __init__(self, dtype: str, weights: str) -> None:
        self.onnx_type, self.numpy_type = FLOATS[dtype]
        self.code_type, self.code_max = CODES[weights]
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: int | list[int]) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name or output, **attributes))
        return output

    def weight(self, layer: str, shape: tuple[int, ...], spread: float, axis: int) -> str:
        """Integer codes behind a DequantizeLinear."""
        values = self.random.standard_normal(shape) * spread
        scale = np.abs(values).max(axis=tuple(i for i in range(len(shape)) if i != axis), keepdims=True) / self.code_max
        codes = np.clip(np.round(values / scale), -self.code_max - 1, self.code_max).astype(np.int8)
        name = f"{layer}/weight_quantizer/codes"
        self.initializers.append(helper.make_tensor(name, self.code_type, shape, codes.flatten().tolist()))
        stored = self.constant(f"{layer}/weight_quantizer/scale", scale.reshape(-1).astype(self.numpy_type))
        node = f"{layer}/weight_quantizer/DequantizeLinear"
        return self.op("DequantizeLinear", [name, stored], f"{layer}/weight", node, axis=axis)

    def quantized(self, layer: str, source: str, scale: str, rank: int) -> tuple[str, str]:
        """The codes' values for ``source``, and the ratio that undoes the scale: lowering rescale."""
        shape = self.constant(f"{layer}/shape", np.asarray([-1] + [1] * (rank - 1)))
        reference_scale = self.constant(f"{layer}/centre_fp32", np.float32(REFERENCE_SCALE))
        step = self.constant(f"{layer}/reference_scale", self.numpy_type(REFERENCE_SCALE))
        zero = self.constant(f"{layer}/zero", np.int8(0))
        s = self.op("Reshape", [scale, shape], f"{layer}/scale")
        to = self.op("Cast", [self.op("Div", [reference_scale, s], f"{layer}/c_s")], f"{layer}/to", to=self.onnx_type)
        back = self.op(
            "Cast", [self.op("Div", [s, reference_scale], f"{layer}/s_c")], f"{layer}/back", to=self.onnx_type
        )
        scaled = self.op("Mul", [source, to], f"{layer}/scaled")
        codes = self.op(
            "QuantizeLinear", [scaled, step, zero], f"{layer}/codes", f"{layer}/input_quantizer/QuantizeLinear"
        )
        node = f"{layer}/input_quantizer/DequantizeLinear"
        return self.op("DequantizeLinear", [codes, step, zero], f"{layer}/input", node), back

    def bias(self, layer: str, source: str, shape: tuple[int, ...]) -> str:
        value = (self.random.standard_normal(shape) * 0.1).astype(self.numpy_type)
        return self.op("Add", [source, self.constant(f"{layer}/bias", value)], f"{layer}/output")


def small_model(dtype: str = "fp32", weights: str = "int8") -> onnx.ModelProto:
    """conv_in (weight-only) -> conv (quantized) -> SiLU -> to_q (quantized) -> attention with the text -> conv_out."""
    g = GraphWriter(dtype, weights)
    rows = g.op("Gather", ["act_scales", "timestep_index"], "row_scales", axis=0)
    g.nodes.append(helper.make_node("Split", [rows, g.constant("ones", np.ones(2, np.int64))], ["s0", "s1"], axis=1))
    first = g.op(
        "Conv", ["sample", g.weight("conv_in", (CHANNELS, 4, 3, 3), 0.3, 0)], "x", "conv_in/Conv", pads=[1] * 4
    )
    data, back = g.quantized("conv", first, "s0", 4)
    weight = g.weight("conv", (CHANNELS, CHANNELS, 3, 3), 0.1, 0)
    product = g.op("Conv", [data, weight], "conv/product", "conv/Conv", pads=[1] * 4)
    y = g.bias("conv", g.op("Mul", [product, back], "conv/rescaled"), (CHANNELS, 1, 1))
    y = g.op("Mul", [y, g.op("Sigmoid", [y], "gate")], "silu")
    flat = g.op("Reshape", [y, g.constant("flat", np.asarray([0, CHANNELS, SIZE * SIZE]))], "flattened")
    tokens = g.op("Transpose", [flat], "tokens", perm=[0, 2, 1])
    data, back = g.quantized("to_q", tokens, "s1", 3)
    product = g.op("MatMul", [data, g.weight("to_q", (CHANNELS, CHANNELS), 0.2, 1)], "to_q/product", "to_q/MatMul")
    query = g.bias("to_q", g.op("Mul", [product, back], "to_q/rescaled"), (CHANNELS,))
    keys = g.op("Transpose", ["encoder_hidden_states"], "keys", perm=[0, 2, 1])
    share = g.op("Softmax", [g.op("MatMul", [query, keys], "logits")], "share", axis=-1)
    mixed = g.op("MatMul", [share, "encoder_hidden_states"], "mixed")
    back_to_image = g.constant("image", np.asarray([0, CHANNELS, SIZE, SIZE]))
    image = g.op("Reshape", [g.op("Transpose", [mixed], "mixed_t", perm=[0, 2, 1]), back_to_image], "mixed_image")
    kernel = (g.random.standard_normal((4, CHANNELS, 3, 3)) * 0.1).astype(g.numpy_type)
    total = g.op("Add", [image, y], "sum")
    g.op("Conv", [total, g.constant("conv_out.weight", kernel)], "noise_pred", "conv_out/Conv", pads=[1] * 4)
    return _model(g)


def small_graph(folder: Path, dtype: str = "fp32", weights: str = "int8") -> ExportedGraph:
    """The small model as an artifact, its weights in external data."""

    def fill(out: Path) -> dict[str, Any]:
        model = small_model(dtype, weights)
        convert_model_to_external_data(model, location="denoiser.onnx.data", size_threshold=0)
        onnx.save(model, out / "denoiser.onnx")
        described = GraphDescription(
            dtype=dtype, inputs=_inputs(dtype), outputs=_outputs(dtype), layers=_layers(weights), blocks=()
        )
        (out / "graph.json").write_text(
            json_text(described),
            encoding="utf-8",
        )
        write_scale_table(ScaleTable(small_scales(), POINTS, CALIBRATED), out / "act_scales.safetensors")
        write_plan(_plan(weights), out / "plan.yaml")
        angle = np.linspace(0.03, 1.5, ROWS)
        write_timestep_table(TimestepTable("DDIMScheduler", {}, 3, CALIBRATED, angle), out / "timesteps.json")
        low, high = small_scales().min(0), small_scales().max(0)
        quantizers = {
            n: {"reference_scale": REFERENCE_SCALE, "lowest": float(a), "highest": float(b)}
            for n, a, b in zip(POINTS, low, high, strict=True)
        }
        return {"denoiser_config": {"in_channels": 4, "sample_size": SIZE}, "quantizers": quantizers}

    write_artifact(folder, kind="ExportedGraph", base=Base("small", "0" * 64), recipe={"name": weights}, fill=fill)
    return ExportedGraph.open(folder)


def small_scales() -> np.ndarray:
    """Scales that double from the first row to the last, around the graph's reference_scale."""
    column = np.geomspace(REFERENCE_SCALE / 2**0.5, REFERENCE_SCALE * 2**0.5, ROWS)
    return np.stack([column, column[::-1]], 1).astype(np.float32)


def small_inputs(batch: int = 3, seed: int = 1, dtype: str = "fp32") -> dict[str, np.ndarray]:
    """Inputs per step, on mixed rows."""
    random = np.random.default_rng(seed)
    kind = FLOATS[dtype][1]
    return {
        "sample": random.standard_normal((batch, 4, SIZE, SIZE)).astype(kind),
        "timestep_index": np.asarray([(1, 501, 981, 700)[i % 4] for i in range(batch)], np.int64),
        "encoder_hidden_states": random.standard_normal((batch, TOKENS, CHANNELS)).astype(kind),
    }


def on_the_gpu(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Inputs as a pipeline on a GPU has them: all there, but the rows."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return {name: value if name == "timestep_index" else value.cuda() for name, value in tensors.items()}


def _model(g: GraphWriter) -> onnx.ModelProto:
    kind = g.onnx_type
    inputs = [
        helper.make_tensor_value_info("sample", kind, ["batch", 4, SIZE, SIZE]),
        helper.make_tensor_value_info("timestep_index", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("encoder_hidden_states", kind, ["batch", TOKENS, CHANNELS]),
        helper.make_tensor_value_info("act_scales", TensorProto.FLOAT, [ROWS, 2]),
    ]
    outputs = [helper.make_tensor_value_info("noise_pred", kind, ["batch", 4, SIZE, SIZE])]
    graph = helper.make_graph(g.nodes, "small", inputs, outputs, g.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    name = FLOATS[dtype][1].__name__
    return (
        TensorSpec("sample", name, ("batch", 4, SIZE, SIZE)),
        TensorSpec("timestep_index", "int64", ("batch",)),
        TensorSpec("encoder_hidden_states", name, ("batch", TOKENS, CHANNELS)),
        TensorSpec("act_scales", "float32", (ROWS, 2)),
    )


def _outputs(dtype: str) -> tuple[TensorSpec, ...]:
    return (TensorSpec("noise_pred", FLOATS[dtype][1].__name__, ("batch", 4, SIZE, SIZE)),)


def _layers(weights: str) -> tuple[GraphLayer, ...]:
    def codes(layer: str) -> str:
        return f"{layer}/weight_quantizer/codes"

    return (
        GraphLayer("conv_in", "conv", "conv_in/Conv", "sample", None, codes("conv_in"), "x", None, weights, "none"),
        GraphLayer(
            "conv", "conv", "conv/Conv", "x", "conv/codes", codes("conv"), "conv/output", "conv", weights, "int8"
        ),
        GraphLayer(
            "to_q",
            "linear",
            "to_q/MatMul",
            "tokens",
            "to_q/codes",
            codes("to_q"),
            "to_q/output",
            "to_q",
            weights,
            "int8",
        ),
        GraphLayer("conv_out", "conv", "conv_out/Conv", "sum", None, None, "noise_pred", None, "none", "none"),
    )


def _plan(weights: str) -> PrecisionPlan:
    layers = tuple(LayerPlan(s.name, s.op, s.weights, s.activation_quantizer, "test") for s in _layers(weights))
    return PrecisionPlan(
        layers, (ActivationQuantizer("conv", "int8", ("conv",)), ActivationQuantizer("to_q", "int8", ("to_q",)))
    )


def build_options(mode: str, profile: ShapeProfile | None = None) -> BuildOptions:
    """Options of a build with OpenVINO's precision or ONNX Runtime's optimization of that name."""
    profile = profile or ShapeProfile()
    if mode in {"f32", "bf16"}:
        return BuildOptions(precision=mode, profile=profile)
    return BuildOptions(optimization=mode, profile=profile)


def read_back(path: Path) -> ir.Model:
    """Reads an ONNX file as an artifact's whose files are what they are now."""
    digests = {file.name: file_digest(file) for file in path.parent.iterdir() if file.is_file()}
    return read_onnx(path.parent, path.name, digests)
