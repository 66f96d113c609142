from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2p_deploy.records import ScaleTable
from s2p_deploy.validation.figures import (
    HEAT,
    LINE,
    characteristic,
    drawable,
    quantizer_scales,
    read_training_log,
    scales_figures,
    training_figures,
)

ROWS = np.arange(10)
TABLE = ScaleTable(
    np.stack([0.1 + 0 * ROWS, 0.1 * 2.0 ** (-ROWS / 3), 0.1 * 2.0**-ROWS], axis=1).astype(np.float32),
    ("still", "slow", "fast"),
    tuple(range(0, 10, 3)),
)


def test_every_quantizer_has_its_line_and_the_heat_map_its_id() -> None:
    drawn = scales_figures(TABLE, (9, 0))
    assert set(re.findall(rf'id="({LINE}\d+)"', drawn["lines"])) == {f"{LINE}{column}" for column in range(3)}
    assert f'id="{HEAT}"' in drawn["scales"]
    for row in (0, 9):
        assert f">{row}</text>" in drawn["scales"]


def test_the_quantizers_that_stand_out_change_most_middling_and_least() -> None:
    assert characteristic(TABLE) == (2, 1, 0)
    assert [quantizer.color is not None for quantizer in quantizer_scales(TABLE)] == [True] * 3


def test_a_quantizer_says_how_far_its_scale_goes_over_the_trained_timesteps() -> None:
    still, _, fast = quantizer_scales(TABLE)
    assert still.swing == pytest.approx(1)
    assert fast.swing == pytest.approx(2**9)
    assert (fast.low, fast.high) == pytest.approx((0.1 / 2**9, 0.1))
    heights = [float(pair.split(",")[1]) for pair in fast.spark.split()]
    assert len(heights) == 4
    assert heights == sorted(heights, reverse=True)  # from noise to picture the scale grows: the line climbs


@pytest.mark.parametrize(
    "table",
    [
        replace(TABLE, calibrated=(0,)),
        ScaleTable(TABLE.scales[:, :1], ("still",), TABLE.calibrated),
        ScaleTable(TABLE.scales[:, :0], (), TABLE.calibrated),
    ],
)
def test_nothing_over_time_is_not_drawn(table: ScaleTable) -> None:
    assert not drawable(table)
    assert quantizer_scales(table) == []


ITERATIONS: list[dict[str, Any]] = [{"kind": "iteration", "iteration": i, "loss": 1 / (i + 1)} for i in range(3)]
MEASURED: list[dict[str, Any]] = [
    {"kind": "timesteps", "iteration": i, "timestep_indices": [1, 501], "sqnr_db": [10 + i, 40 + i]} for i in (0, 3)
]
SELECTIONS: list[dict[str, Any]] = [{"kind": "selection", "iteration": 0, "error": 0.1, "best": True}]


def test_nothing_to_draw_without_training(tmp_path: Path) -> None:
    assert read_training_log(tmp_path) == []
    assert training_figures(MEASURED[:1]) == {}


def test_what_is_drawn_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in MEASURED + ITERATIONS))
    found = training_figures(read_training_log(tmp_path))
    assert set(found) == {"loss", "rows"}
    assert "before training" in found["rows"]
    assert "after" in found["rows"]
    assert "held-out trajectories" not in found["loss"]
    assert "held-out trajectories" in training_figures(ITERATIONS + MEASURED + SELECTIONS)["loss"]


def test_oscillation_is_drawn_where_it_was_counted() -> None:
    counted = [line | {"oscillating": 5, "frozen": line["iteration"]} for line in ITERATIONS]
    assert "frozen" in training_figures(counted + MEASURED)["oscillation"]
