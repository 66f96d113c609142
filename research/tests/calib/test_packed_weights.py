from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.errors import IntegrityError
from s2p_research.packed_weights import PackedWeight, format_of, read_packed_weights, write_packed_weights

# codes -1 0 1 / 1 1 0: digits 0 1 2 2 2 | 1
PACKED = PackedWeight(np.asarray([237, 1], np.uint8), (2, 3), "levels3")


def test_round_trip_and_values(tmp_path: Path) -> None:
    file = tmp_path / "low_bit.safetensors"
    assert read_packed_weights(file) == {}
    write_packed_weights({"mid_block.conv": PACKED}, file)
    (found,) = read_packed_weights(file).values()
    assert (found.shape, found.format) == (PACKED.shape, PACKED.format)
    values = found.values(np.asarray([[2.0], [0.5]], np.float32))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-2.0, 0.0, 2.0], [0.5, 0.5, 0.0]])


def test_nothing_packed_is_no_file(tmp_path: Path) -> None:
    write_packed_weights({}, tmp_path / "low_bit.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(IntegrityError, match="format 'levels7'"):
        format_of(PackedWeight(PACKED.codes, PACKED.shape, "levels7"))
