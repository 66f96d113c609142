"""Zero points and 10-bit activations of the timesteps between calibrated ones."""

from __future__ import annotations

import numpy as np
import torch

from s2p_deploy.records import TimestepTable
from s2p_deploy.timesteps import interpolate_scales
from s2p_research.grids import SimulatedActScales, simulation_of

TABLE = TimestepTable("none", {}, 2, (1.0, 3.0), np.linspace(0.2, 1.0, 5))


def test_offsets_between_calibrated_rows_interpolate_on_their_own_grid() -> None:
    scales = np.array([[0.01], [0.04]], np.float32)
    fixed = torch.tensor([[[-1.0, 0.0]], [[-5.0, 0.0]]])
    rows = interpolate_scales(scales, TABLE)
    found = simulation_of(fixed, TABLE, rows)
    assert np.allclose(found.offsets[[0, 1]], -1.0)  # clamped below the first, to a step of the grid
    assert np.allclose(found.offsets[[3, 4]], -5.0, atol=0.02)
    assert np.allclose(found.offsets[2], -3.0, atol=0.01)
    assert np.allclose(np.round(found.offsets / rows) * rows, found.offsets, atol=1e-6)
    assert found.relaxed == ()


def test_a_row_is_relaxed_as_the_calibrated_one_below() -> None:
    scales = np.array([[0.01], [0.04]], np.float32)
    fixed = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]])
    found = simulation_of(fixed, TABLE, interpolate_scales(scales, TABLE))
    assert found.relaxed == (0, 1, 2)
    assert not found.offsets.any()


def test_the_fixed_parts_follow_their_timesteps_and_are_not_trained() -> None:
    grids = torch.tensor([[[1.0, 0.5, 1.0]], [[1.0, -1.0, 0.0]]])
    scales = SimulatedActScales(grids, [False])
    torch.testing.assert_close(scales(torch.tensor([1, 0, 1])), grids[[1, 0, 1]])
    assert [name for name, _ in scales.named_parameters()] == ["by_timestep", "static"]
    assert scales.table().tolist() == [[1.0], [1.0]]
