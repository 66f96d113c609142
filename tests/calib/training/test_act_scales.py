from __future__ import annotations

import torch

from s2p_deploy.calib.training.act_scales import ActScales


def test_a_static_point_has_one_scale_and_the_others_one_per_row() -> None:
    scales = ActScales(torch.tensor([[1.0, 2.0], [4.0, 2.0], [16.0, 2.0]]), [False, True])
    with torch.no_grad():
        scales.static[1] = torch.tensor(3.0).log()
        scales.rows[1, 1] = 99.0
    torch.testing.assert_close(scales(torch.tensor([2, 0, 2])).scales, torch.tensor([[16.0, 3], [1, 3], [16, 3]]))
    torch.testing.assert_close(scales.table(), torch.tensor([[1.0, 3], [4, 3], [16, 3]]))
    assert not scales.table().requires_grad


def test_the_simulated_parts_follow_their_rows_and_are_not_trained() -> None:
    offsets, relaxed = torch.tensor([[0.5], [-1.0]]), torch.tensor([True, False])
    scales = ActScales(torch.ones(2, 1), [False], offsets, relaxed)
    grids = scales(torch.tensor([1, 0, 1]))
    assert grids.offsets is not None
    assert grids.relaxed is not None
    assert grids.offsets.tolist() == [[-1.0], [0.5], [-1.0]]
    assert grids.relaxed.tolist() == [False, True, False]
    assert [name for name, _ in scales.named_parameters()] == ["rows", "static"]
    assert ActScales(torch.ones(2, 1), [False])(torch.tensor([0])).offsets is None
