"""What TensorRT's engine inspector says each ONNX node is computed in. It needs a GPU to open the engine."""

from __future__ import annotations

import json
import re

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
_PRODUCT = re.compile(r"/(?:Conv|MatMul|Gemm)(?:_\d+)?$")
_TYPES = (
    ("Int8", "int8"),
    ("Half", "fp16"),
    ("FP16", "fp16"),
    ("BFloat16", "bf16"),
    ("Float", "fp32"),
    ("FP32", "fp32"),
)


def compute_types(information: str) -> dict[str, str]:
    """ONNX node -> type of the data operand, for layers that hold exactly one convolution or matrix product.

    A fused region with several products (a "foreign node") says nothing about any one of them: those are left out.
    """
    found: dict[str, str] = {}
    for layer in json.loads(information).get("Layers", []):
        if not isinstance(layer, dict):  # names only: the engine was built without detailed profiling
            continue
        products = [name for name in _ONNX_LAYER.findall(layer.get("Metadata", "")) if _PRODUCT.search(name)]
        inputs = layer.get("Inputs", [])
        if len(products) == 1 and inputs:
            kind = _type_of(str(inputs[0].get("Format/Datatype", "")))
            if kind is not None:
                found[products[0]] = kind
    return found


def _type_of(text: str) -> str | None:
    return next((kind for word, kind in _TYPES if text.startswith(word)), None)
