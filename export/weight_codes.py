"""Weights as integer codes: how training quantizes them, and how ONNX stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from s2p_deploy.numerics import INT4, IntegerFormat, quantize, weight_scale_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALLEST_HALF = 2.0**-24  # a scale must stay above zero after it is rounded to FP16


def usable_weight_scale(scale: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """Weight scales that stay above zero when rounded to ``dtype`` (channels of zeros have scales near 1e-19)."""
    return scale if dtype == ir.DataType.FLOAT else np.maximum(scale, np.float32(_SMALLEST_HALF))


def storage_type(fmt: IntegerFormat) -> ir.DataType:
    """The ONNX type that holds a format's codes: INT4 where they fit into it."""
    return ir.DataType.INT4 if INT4.qmin <= fmt.qmin and fmt.qmax <= INT4.qmax else ir.DataType.INT8


def weight_codes(weight: NDArray[np.float32], scale: NDArray[np.float32], fmt: IntegerFormat) -> NDArray[np.generic]:
    """Integer codes of a weight [out, ...] by its scale [out, 1, ...], as training quantizes it."""
    tensor = torch.from_numpy(weight)
    codes = quantize(tensor, torch.from_numpy(scale).view(weight_scale_shape(tensor)), fmt)
    return codes.numpy().astype(storage_type(fmt).numpy())
