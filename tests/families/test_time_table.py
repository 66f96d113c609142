from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.families import time_table_from_unet
from s2p_deploy.numerics import INT4, INT8

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def test_quantized_time_layers_come_near_the_exact_table(tiny_unet: UNet2DConditionModel) -> None:
    rows = 50
    exact = time_table_from_unet(tiny_unet, rows)
    fine, coarse = (time_table_from_unet(tiny_unet, rows, quantized=fmt) for fmt in (INT8, INT4))
    assert exact.slices == fine.slices == coarse.slices
    errors = [float(((table.projections - exact.projections) ** 2).mean()) for table in (fine, coarse)]
    assert 0 < errors[0] < errors[1] / 20, "eight bits against four"
    assert time_table_from_unet(tiny_unet, rows).projections.tobytes() == exact.projections.tobytes(), "nothing changed"


@torch.no_grad()
def test_inputs_of_time_layers_share_one_grid_over_all_rows(tiny_unet: UNet2DConditionModel) -> None:
    path = "mid_block.resnets.0"
    embedding = tiny_unet.time_embedding
    for linear in (embedding.linear_1, embedding.linear_2, tiny_unet.get_submodule(path).time_emb_proj):
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[0, 0] = 1.0  # so that row t gives SiLU(SiLU(cos t)) in the first column
    exact, found = (
        table.projections[:, table.slices[path][0]]
        for table in (time_table_from_unet(tiny_unet, 40, quantized=fmt) for fmt in (None, INT8))
    )
    step = float(exact.max()) / 127
    assert found / step == pytest.approx((found / step).round(), abs=1e-3), "multiples of the largest row's 127th part"
    assert found == pytest.approx(exact, abs=2 * step)
    assert found.max() == pytest.approx(float(exact.max()), rel=1e-4)
