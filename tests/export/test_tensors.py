from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.export.tensors import lazy, reshaped


def test_int4_is_packed_two_per_byte_low_nibble_first() -> None:
    value = lazy("w", (2, 2), ir.DataType.INT4, lambda: np.asarray([[1, -1], [7, -8]], np.int8).astype(ml_dtypes.int4))
    assert value.const_value is not None
    assert value.const_value.tobytes() == bytes([0xF1, 0x87])


def test_data_is_read_when_it_is_written_and_not_before() -> None:
    calls: list[int] = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.arange(4, dtype=np.float32)

    value = reshaped(lazy("w", (4,), ir.DataType.FLOAT16, make), (1, 4, 1, 1))
    assert not calls
    assert value.const_value is not None
    assert value.const_value.numpy().shape == (1, 4, 1, 1)
    assert value.const_value.numpy().dtype == np.float16
    assert len(calls) == 2


def test_a_weight_beyond_half_precision_is_refused() -> None:
    value = lazy("conv_in.weight", (1,), ir.DataType.FLOAT16, lambda: np.asarray([1e6], np.float32))
    assert value.const_value is not None
    with pytest.raises(InputError, match=r"conv_in\.weight has a value that is not finite in FLOAT16"):
        value.const_value.tobytes()
