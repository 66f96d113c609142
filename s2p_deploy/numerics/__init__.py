"""The one definition of the quantizers' arithmetic, imported by training, parity and export. Imports only torch."""

from s2p_deploy.numerics.fake_quantize import dequantize, fake_quantize, quantize
from s2p_deploy.numerics.formats import (
    INT4,
    INT8,
    IntegerFormat,
    format_by_name,
)
from s2p_deploy.numerics.scales import (
    least_squares_weight_scale,
    max_scale,
    max_weight_scale,
    mse_best_scale,
    weight_scale_shape,
)

__all__ = [
    "INT4",
    "INT8",
    "IntegerFormat",
    "dequantize",
    "fake_quantize",
    "format_by_name",
    "least_squares_weight_scale",
    "max_scale",
    "max_weight_scale",
    "mse_best_scale",
    "quantize",
    "weight_scale_shape",
]
