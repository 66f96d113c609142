"""Zero points of the rows between calibrated ones (simulation only)."""

from __future__ import annotations

import numpy as np
import torch

from s2p_deploy.calib.model_files import _simulation
from s2p_deploy.calib.quantization.scale_start import StartingGrids
from s2p_deploy.records import TimestepTable
from s2p_deploy.timesteps import spread_over_rows

TABLE = TimestepTable("none", {}, 2, (1.0, 3.0), np.linspace(0.2, 1.0, 5))


def test_offsets_between_calibrated_rows_interpolate_on_their_own_grid() -> None:
    scales = np.array([[0.01], [0.04]], np.float32)
    grids = StartingGrids(torch.from_numpy(scales), offsets=torch.tensor([[-1.0], [-5.0]]))
    rows = spread_over_rows(scales, TABLE)
    found = _simulation(grids, TABLE, rows)
    assert np.allclose(found.offsets[[0, 1]], -1.0)  # held below the first, to a step of the grid
    assert np.allclose(found.offsets[[3, 4]], -5.0, atol=0.02)
    assert np.allclose(found.offsets[2], -3.0, atol=0.01)
    assert np.allclose(np.round(found.offsets / rows) * rows, found.offsets, atol=1e-6)
    assert found.relaxed == ()


def test_a_row_is_relaxed_as_the_calibrated_one_below() -> None:
    scales = np.array([[0.01], [0.04]], np.float32)
    grids = StartingGrids(torch.from_numpy(scales), relaxed=torch.tensor([True, False]))
    found = _simulation(grids, TABLE, spread_over_rows(scales, TABLE))
    assert found.relaxed == (0, 1, 2)
    assert not found.offsets.any()
