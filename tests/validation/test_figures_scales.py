from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from s2p_deploy.records import ScaleTable
from s2p_deploy.validation.figures_scales import HEAT, LINE, characteristic, drawable, point_scales, scales_figures

ROWS = np.arange(10)
TABLE = ScaleTable(
    np.stack([0.1 + 0 * ROWS, 0.1 * 2.0 ** (-ROWS / 3), 0.1 * 2.0**-ROWS], axis=1).astype(np.float32),
    ("still", "slow", "fast"),
    tuple(range(0, 10, 3)),
)


def test_every_point_has_its_line_and_the_heat_map_its_id() -> None:
    drawn = scales_figures(TABLE, (9, 0))
    assert set(re.findall(rf'id="({LINE}\d+)"', drawn["lines"])) == {f"{LINE}{column}" for column in range(3)}
    assert f'id="{HEAT}"' in drawn["scales"]
    for row in (0, 9):
        assert f">{row}</text>" in drawn["scales"]


def test_the_points_that_stand_out_change_most_middling_and_least() -> None:
    assert characteristic(TABLE) == (2, 1, 0)
    assert [point.color is not None for point in point_scales(TABLE)] == [True] * 3


def test_a_point_says_how_far_its_scale_goes_over_the_trained_rows() -> None:
    still, _, fast = point_scales(TABLE)
    assert still.swing == pytest.approx(1)
    assert fast.swing == pytest.approx(2**9)
    assert (fast.low, fast.high) == pytest.approx((0.1 / 2**9, 0.1))
    heights = [float(pair.split(",")[1]) for pair in fast.spark.split()]
    assert len(heights) == 4
    assert heights == sorted(heights, reverse=True)  # from noise to picture the scale grows: the line climbs


@pytest.mark.parametrize(
    "table",
    [
        replace(TABLE, trained=(0,)),
        ScaleTable(TABLE.scales[:, :1], ("still",), TABLE.trained),
        ScaleTable(TABLE.scales[:, :0], (), TABLE.trained),
    ],
)
def test_nothing_over_time_is_not_drawn(table: ScaleTable) -> None:
    assert not drawable(table)
    assert point_scales(table) == []
