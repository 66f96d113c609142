from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from s2p_deploy.errors import InputError
from s2p_deploy.records import ScaleTable
from s2p_deploy.records.scale_table import read_scale_table, write_scale_table

POSITIVE = st.floats(2**-60, 2**60, width=32)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    table = ScaleTable(np.float32([[0.1, 2.0], [0.3, 4.0]]), ("conv_in", "mid: attn [q, k]"), (1,))
    write_scale_table(table, tmp_path / "act_scales.safetensors")
    read = read_scale_table(tmp_path / "act_scales.safetensors")
    assert np.array_equal(read.scales, table.scales)
    assert (read.points, read.trained) == (table.points, table.trained)


def test_a_table_without_points(tmp_path: Path) -> None:
    table = ScaleTable(np.ones((3, 0), np.float32), (), (0,))
    write_scale_table(table, tmp_path / "s")
    assert read_scale_table(tmp_path / "s").points == ()
    assert table.centres.shape == (0,)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_a_bad_scale_is_named(tmp_path: Path, value: float) -> None:
    scales = np.ones((4, 2), np.float32)
    scales[2, 1] = value
    save_file({"act_scales": scales, "trained": np.zeros(1, np.int64)}, tmp_path / "s", metadata={"points": "a\nb"})
    with pytest.raises(InputError, match="b at row 2 is"):
        read_scale_table(tmp_path / "s")


@pytest.mark.parametrize("scales", [np.ones((4, 2)), np.ones((4, 3), np.float32), np.ones(2, np.float32)])
def test_type_and_shape_are_checked(scales: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"float32 \[rows, 2\]"):
        ScaleTable(scales, ("a", "b"), ())


def test_a_foreign_file_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"not safetensors")
    save_file({"act_scales": np.ones((1, 1), np.float32)}, tmp_path / "t")
    for name in ("s", "t", "missing"):
        with pytest.raises(InputError, match="no scale table"):
            read_scale_table(tmp_path / name)


def test_centre_by_hand() -> None:
    table = ScaleTable(np.float32([[1, 5], [4, 5], [16, 5]]), ("a", "b"), (0, 1, 2))
    assert table.centres.tolist() == [4.0, 5.0]


@given(hnp.arrays(np.float32, (5, 3), elements=POSITIVE))
def test_centres_lie_between_the_extremes(scales: np.ndarray) -> None:
    table = ScaleTable(scales, ("a", "b", "c"), ())
    assert table.centres.dtype == np.float32
    assert np.isfinite(table.centres).all()
    assert (table.centres >= scales.min(0) * (1 - 1e-6)).all()
    assert (table.centres <= scales.max(0) * (1 + 1e-6)).all()
