from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from s2p_deploy.export.weight_codes import storage_type, usable_weight_scale, weight_codes
from s2p_deploy.numerics import INT4, INT8, LEVELS3, LEVELS9


def test_codes_by_hand() -> None:
    weight = np.asarray([[0.5, -0.26, 3.0], [10.0, -20.0, 5.0]], np.float32)
    scale = np.asarray([[0.1], [1.0]], np.float32)
    np.testing.assert_array_equal(weight_codes(weight, scale, INT8), [[5, -3, 30], [10, -20, 5]])
    four = weight_codes(weight, scale, INT4)
    assert four.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(four.astype(np.int8), [[5, -3, 7], [7, -8, 5]])
    three = weight_codes(weight, scale, LEVELS3)
    assert three.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(three.astype(np.int8), [[1, -1, 1], [1, -1, 1]])


def test_what_fits_into_four_bits_is_stored_in_four() -> None:
    assert storage_type(INT8) == ir.DataType.INT8
    assert storage_type(INT4) == storage_type(LEVELS9) == ir.DataType.INT4


def test_scales_of_zero_channels_stay_above_zero_in_half_precision() -> None:
    scale = np.asarray([1e-19, 0.5], np.float32)
    half = usable_weight_scale(scale, ir.DataType.FLOAT16).astype(np.float16)
    assert half[0] > 0
    assert half[1] == 0.5
    np.testing.assert_array_equal(usable_weight_scale(scale, ir.DataType.FLOAT), scale)
