from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s2p_deploy.errors import InputError
from s2p_deploy.records import TimestepTable
from s2p_deploy.records.timestep_table import read_timestep_table, write_timestep_table
from s2p_deploy.timesteps import angles_from_alphas, rows_of_timesteps, spread_over_rows

ROWS = 200
BETAS = hnp.arrays(np.float64, 50, elements=st.floats(1e-5, 0.5))


def table_of(calibrated: tuple[int, ...], rows: int = ROWS) -> TimestepTable:
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, rows))
    return TimestepTable("DDIMScheduler", {"steps_offset": 1}, len(calibrated), calibrated, angles_from_alphas(alphas))


@st.composite
def tables_with_scales(draw: st.DrawFn) -> tuple[TimestepTable, np.ndarray]:
    calibrated = sorted(draw(st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=20)))
    scales = hnp.arrays(np.float32, (len(calibrated), 3), elements=st.floats(2**-40, 2**40, width=32))
    return table_of(tuple(calibrated)), draw(scales)


def test_angles_by_hand() -> None:
    # alpha^2 = 1: no noise; 1/2: as much noise as signal; 0: noise alone
    assert angles_from_alphas(np.array([1.0, 0.5, 0.0])) == pytest.approx([0, np.pi / 4, np.pi / 2])


@given(BETAS)
def test_angles_are_finite_and_rise_with_the_row(betas: np.ndarray) -> None:
    angles = angles_from_alphas(np.cumprod(1 - betas))
    assert np.isfinite(angles).all()
    assert ((angles >= 0) & (angles <= np.pi / 2)).all()
    assert (np.diff(angles) >= 0).all()


@given(tables_with_scales())
def test_calibrated_rows_keep_every_bit(case: tuple[TimestepTable, np.ndarray]) -> None:
    table, scales = case
    full = spread_over_rows(scales, table)
    assert full.dtype == np.float32
    assert full.shape == (ROWS, 3)
    assert full[list(table.calibrated)].tobytes() == scales.tobytes()


@given(tables_with_scales())
def test_other_rows_lie_between_their_neighbours(case: tuple[TimestepTable, np.ndarray]) -> None:
    table, scales = case
    full = spread_over_rows(scales, table)
    first, last = table.calibrated[0], table.calibrated[-1]
    assert (full[:first] == scales[0]).all()
    assert (full[last:] == scales[-1]).all()
    for below, (start, stop) in enumerate(zip(table.calibrated, table.calibrated[1:], strict=False)):
        low, high = np.minimum(*scales[below : below + 2]), np.maximum(*scales[below : below + 2])
        assert (full[start:stop] >= low * (1 - 1e-5)).all()
        assert (full[start:stop] <= high * (1 + 1e-5)).all()


def test_interpolation_is_linear_in_log_scale_over_the_angle() -> None:
    table = TimestepTable("X", {}, 2, (0, 2), np.array([0.0, 0.25, 1.0]))
    full = spread_over_rows(np.float32([[1], [16]]), table)
    assert full[:, 0] == pytest.approx([1, 2, 16])  # a quarter of the way from 2^0 to 2^4


def test_a_model_without_act_points_has_no_columns() -> None:
    assert spread_over_rows(np.ones((2, 0), np.float32), table_of((3, 5))).shape == (ROWS, 0)


def test_scales_must_match_the_calibrated_rows() -> None:
    with pytest.raises(InputError, match="3 rows of scales for 2"):
        spread_over_rows(np.ones((3, 1), np.float32), table_of((3, 5)))


def test_the_table_covers_six_per_cent_beyond_either_end() -> None:
    assert table_of((50, 100)).covered == (38, 112)
    assert table_of((1, 195)).covered == (0, 199)


@given(st.lists(st.integers(38, 112), min_size=1))
def test_an_integer_timestep_is_its_row(timesteps: list[int]) -> None:
    for kind in (np.int64, np.float32, np.float64):
        rows = rows_of_timesteps(np.asarray(timesteps, kind), table_of((50, 100)))
        assert rows.dtype == np.int64
        assert rows.tolist() == timesteps


@pytest.mark.parametrize("timestep", [37, 113, -1, 1e9, np.inf])
def test_a_timestep_outside_is_refused(timestep: float) -> None:
    with pytest.raises(InputError, match=r"outside the calibrated table \(38 to 112\)"):
        rows_of_timesteps([60, timestep], table_of((50, 100)))


@pytest.mark.parametrize("timestep", [60.5, np.nan])
def test_a_fractional_timestep_is_refused(timestep: float) -> None:
    with pytest.raises(InputError, match="--time-table input"):
        rows_of_timesteps([60, timestep], table_of((50, 100)))


def test_the_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = table_of((50, 100))
    write_timestep_table(table, tmp_path / "t.json")
    read = read_timestep_table(tmp_path / "t.json")
    assert np.array_equal(read.angle, table.angle)
    assert read.to_json() == table.to_json()
