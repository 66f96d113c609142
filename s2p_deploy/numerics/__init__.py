"""The one definition of the quantizers' arithmetic, imported by training, parity and export. Imports only torch."""

from s2p_deploy.numerics.fake_quantize import dequantize, fake_quantize, quantize
from s2p_deploy.numerics.formats import (
    INT4,
    INT8,
    INT10,
    LEVELS3,
    LEVELS5,
    LEVELS9,
    IntegerFormat,
    format_by_name,
)
from s2p_deploy.numerics.packing import codes_per_byte, pack_codes, unpack_codes
from s2p_deploy.numerics.scales import (
    affine_grid,
    full_range,
    least_squares_weight_scale,
    max_scale,
    max_weight_scale,
    mse_best_range,
    mse_best_scale,
    weight_scale_shape,
)

__all__ = [
    "INT4",
    "INT8",
    "INT10",
    "LEVELS3",
    "LEVELS5",
    "LEVELS9",
    "IntegerFormat",
    "affine_grid",
    "codes_per_byte",
    "dequantize",
    "fake_quantize",
    "format_by_name",
    "full_range",
    "least_squares_weight_scale",
    "max_scale",
    "max_weight_scale",
    "mse_best_range",
    "mse_best_scale",
    "pack_codes",
    "quantize",
    "unpack_codes",
    "weight_scale_shape",
]
