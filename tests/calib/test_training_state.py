from __future__ import annotations

import torch

from s2p_deploy.calib.training_state import ActScales


def test_a_static_point_has_one_scale_and_the_others_one_per_row() -> None:
    scales = ActScales(torch.tensor([[1.0, 2.0], [4.0, 2.0], [16.0, 2.0]]), [False, True])
    with torch.no_grad():
        scales.static[1] = torch.tensor(3.0).log()
        scales.by_timestep[1, 1] = 99.0
    torch.testing.assert_close(scales(torch.tensor([2, 0, 2])), torch.tensor([[16.0, 3], [1, 3], [16, 3]]))
    torch.testing.assert_close(scales.table(), torch.tensor([[1.0, 3], [4, 3], [16, 3]]))
    assert not scales.table().requires_grad
