from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import ScaleTable, TimestepTable
from s2p_deploy.records.scale_table import (
    read_scale_table,
    read_timestep_table,
    timestep_table_from_bytes,
    write_scale_table,
    write_timestep_table,
)

TABLE = {
    "scheduler_class": "DDIMScheduler",
    "scheduler_config": {},
    "steps": 3,
    "calibrated": [0, 2],
    "angle": [0.0, 0.5, 1.0, 1.5],
}
POSITIVE = st.floats(2**-60, 2**60, width=32)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    table = ScaleTable(np.float32([[0.1, 2.0], [0.3, 4.0]]), ("conv_in", "mid: attn [q, k]"), (1,))
    write_scale_table(table, tmp_path / "act_scales.safetensors")
    read = read_scale_table(tmp_path / "act_scales.safetensors")
    assert np.array_equal(read.scales, table.scales)
    assert (read.quantizers, read.calibrated) == (table.quantizers, table.calibrated)


def test_a_table_without_points(tmp_path: Path) -> None:
    table = ScaleTable(np.ones((3, 0), np.float32), (), (0,))
    write_scale_table(table, tmp_path / "s")
    assert read_scale_table(tmp_path / "s").quantizers == ()
    assert table.reference_scales.shape == (0,)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_a_bad_scale_is_named(tmp_path: Path, value: float) -> None:
    scales = np.ones((4, 2), np.float32)
    scales[2, 1] = value
    save_file(
        {"act_scales": scales, "calibrated": np.zeros(1, np.int64)}, tmp_path / "s", metadata={"quantizers": "a\nb"}
    )
    with pytest.raises(InputError, match="b at timestep index 2 is"):
        read_scale_table(tmp_path / "s")


@pytest.mark.parametrize("scales", [np.ones((4, 2)), np.ones((4, 3), np.float32), np.ones(2, np.float32)])
def test_type_and_shape_are_checked(scales: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"float32 \[timesteps, 2\]"):
        ScaleTable(scales, ("a", "b"), ())


def test_a_foreign_file_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"not safetensors")
    save_file({"act_scales": np.ones((1, 1), np.float32)}, tmp_path / "t")
    for name in ("s", "t", "missing"):
        with pytest.raises(InputError, match="no scale table"):
            read_scale_table(tmp_path / name)


def test_reference_scale_by_hand() -> None:
    table = ScaleTable(np.float32([[1, 5], [4, 5], [16, 5]]), ("a", "b"), (0, 1, 2))
    assert table.reference_scales.tolist() == [4.0, 5.0]


@given(hnp.arrays(np.float32, (5, 3), elements=POSITIVE))
def test_reference_scales_lie_between_the_extremes(scales: np.ndarray) -> None:
    table = ScaleTable(scales, ("a", "b", "c"), ())
    assert table.reference_scales.dtype == np.float32
    assert np.isfinite(table.reference_scales).all()
    assert (table.reference_scales >= scales.min(0) * (1 - 1e-6)).all()
    assert (table.reference_scales <= scales.max(0) * (1 + 1e-6)).all()


def table_of(change: dict[str, object]) -> TimestepTable:
    return timestep_table_from_bytes(json.dumps(TABLE | change).encode(), Path("t"))


def test_timesteps_have_indices(tmp_path: Path) -> None:
    assert len(table_of({})) == 4
    further = {"calibrated": [0, 1.5, 2.25], "fractional": [1.5, 2.25]}
    assert table_of(further).calibrated_indices == (0, 4, 5)
    assert table_of({"calibrated": [0, 1.5], "fractional": [0, 1.5, 3]}).calibrated_indices == (0, 1)
    assert table_of(further | {"flow_matching": True, "calibrated": [1.5]}).calibrated_indices == (0,)
    for table in (table_of({}), table_of(further)):
        write_timestep_table(table, tmp_path / "timesteps.json")
        read = read_timestep_table(tmp_path / "timesteps.json")
        assert (read.timesteps.tolist(), read.angle.tolist()) == (table.timesteps.tolist(), table.angle.tolist())
        assert (read.fractional is None) == (table.fractional is None)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": True},
        {"calibrated": []},
        {"calibrated": [2, 0]},
        {"calibrated": [0, 4]},
        {"calibrated": [-1]},
        {"calibrated": [0.5]},
        {"calibrated": [0, 2], "flow_matching": True},
        {"fractional": [1.5, 0.5]},
        {"fractional": [0.5, 0.5]},
        {"fractional": [1.0]},
        {"fractional": [-0.5]},
        {"fractional": [0.0, 1.5]},
        {"fractional": [0.0, 1.5], "calibrated": [0, 1]},
        {"fractional": [float("nan")]},
        {"fractional": [float("inf")]},
        {"angle": []},
        {"angle": [0.0, 0.5, 1.0, 9.0]},
        {"angle": [1.0, 0.5, 1.0, 1.5]},
        {"angle": [0.0, 0.5, 1.0, float("nan")]},
        {"scheduler_config": []},
        {"scheduler_class": 1},
    ],
)
def test_nonsense_in_a_timestep_table_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="t is damaged"):
        table_of(change)
