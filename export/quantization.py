"""Numbers of a quantized graph: integer codes of weights, reference scales of activations, and what FP16 can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.numerics import INT4, IntegerFormat, format_by_name, quantize, weight_scale_shape
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from s2p_deploy.records import CalibratedModel, LayerPlan, ScaleTable

_SMALLEST_HALF = 2.0**-24  # a scale must stay above zero after it is rounded to FP16
# The largest FP16 number, less 1 %: c and the weights are rounded to FP16, and so is the sum.
HALF_RANGE = 65504 * 0.99


def usable_weight_scale(scale: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """Returns weight scales that stay above zero in ``dtype`` (channels of zeros have scales near 1e-19)."""
    return scale if dtype == ir.DataType.FLOAT else np.maximum(scale, np.float32(_SMALLEST_HALF))


def storage_type(fmt: IntegerFormat) -> ir.DataType:
    """Returns the ONNX type that holds a format's codes: INT4 where they fit into it."""
    return ir.DataType.INT4 if INT4.qmin <= fmt.qmin and fmt.qmax <= INT4.qmax else ir.DataType.INT8


def weight_codes(weight: NDArray[np.float32], scale: NDArray[np.float32], fmt: IntegerFormat) -> NDArray[np.generic]:
    """Quantizes a weight [out, ...] by its scale [out, 1, ...] to integer codes, as training does."""
    tensor = torch.from_numpy(weight)
    codes = quantize(tensor, torch.from_numpy(scale).view(weight_scale_shape(tensor)), fmt)
    return codes.numpy().astype(storage_type(fmt).numpy())


def usable_reference_scales(scales: ScaleTable, dtype: Literal["fp32", "fp16"]) -> dict[str, float]:
    """Returns the constant c of every activation quantizer, rounded to ``dtype``.

    Ratios are taken against the rounded number: what Q and DQ divide and multiply by is what the ratios assume.

    Raises:
        InputError: c, or a ratio c/s or s/c of some timestep, is zero, subnormal or infinite in ``dtype``.
    """
    limits = np.finfo(np.float16 if dtype == "fp16" else np.float32)
    with np.errstate(over="ignore"):
        reference_scales = scales.reference_scales.astype(limits.dtype).astype(np.float32)
    for name, reference_scale, column in zip(scales.quantizers, reference_scales, scales.scales.T, strict=True):
        ends = np.asarray([column.min(), column.max()], np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.concatenate([[reference_scale], reference_scale / ends, ends / reference_scale])
        if not ((numbers >= limits.tiny) & (numbers <= limits.max)).all():
            raise InputError(
                f"activation quantizer {name}: its scales {ends[0]:g} to {ends[1]:g} leave the range of {dtype}:"
                " use --dtype fp32"
            )
    return {
        name: float(reference_scale) for name, reference_scale in zip(scales.quantizers, reference_scales, strict=True)
    }


def overflowing_layers(
    calibrated: CalibratedModel, sizes: Mapping[str, int], reference_scales: Mapping[str, float]
) -> frozenset[str]:
    """Finds the layers whose product may overflow FP16, by a bound that holds for any input.

    Weights are read one at a time, and only where their scales leave doubt.

    ``sizes`` is the number of weights per output channel of every layer, ``reference_scales`` c of every activation
    quantizer.

    The product of codes |q| <= -qmin, the quantizer's constant c and weights w is at most

        -qmin * c * max over output channels of sum |w|

    whatever the input and the timestep: values before the multiplication by s/c do not depend on s.
    """
    scales = calibrated.weight_scales()
    overflowing = set()
    for layer in (layer for layer in calibrated.plan.layers if layer.activation_quantizer is not None):
        name, quantizer = layer.name, calibrated.plan.quantizer(str(layer.activation_quantizer))
        fmt = format_by_name(quantizer.activations)
        assert fmt is not None  # an activation quantizer has a format
        largest = HALF_RANGE / (-fmt.qmin * reference_scales[quantizer.name])
        if name in scales and _sum_at_most(layer, sizes[name], scales[name]) <= largest:
            continue
        weight = calibrated.tensor(parameter_name(f"{name}.weight"))
        if _largest_sum(weight, layer, scales.get(name)) > largest:
            overflowing.add(name)
    return frozenset(overflowing)


def _sum_at_most(plan: LayerPlan, size: int, scale: NDArray[np.float32]) -> float:
    """Returns a bound of sum |w| over a channel, from the number of weights and their scales alone."""
    fmt = format_by_name(plan.weights)
    assert fmt is not None  # it has scales
    return size * max(-fmt.qmin, fmt.qmax) * float(scale.max())


def _largest_sum(weight: NDArray[np.float32], plan: LayerPlan, scale: NDArray[np.float32] | None) -> float:
    """Returns the largest sum |w| over the output channels of a weight [out, ...], quantized by ``scale``."""
    fmt = format_by_name(plan.weights)
    values = weight
    if fmt is not None and scale is not None:
        codes = weight_codes(weight, scale, fmt).astype(np.float32)
        values = codes * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return float(np.abs(values).reshape(len(values), -1).sum(1, dtype=np.float64).max())
