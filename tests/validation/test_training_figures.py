from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2p_deploy.validation.training_figures import read_training_log, training_figures

ITERATIONS: list[dict[str, Any]] = [{"kind": "iteration", "iteration": i, "loss": 1 / (i + 1)} for i in range(3)]
ROWS: list[dict[str, Any]] = [
    {"kind": "rows", "iteration": i, "rows": [1, 501], "sqnr_db": [10 + i, 40 + i]} for i in (0, 3)
]
SELECTIONS: list[dict[str, Any]] = [{"kind": "selection", "iteration": 0, "error": 0.1, "best": True}]


def test_nothing_to_draw_without_training(tmp_path: Path) -> None:
    assert read_training_log(tmp_path) == []
    assert training_figures(ROWS[:1]) == {}


def test_what_is_drawn_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ROWS + ITERATIONS))
    found = training_figures(read_training_log(tmp_path))
    assert set(found) == {"loss", "rows"}
    assert "before training" in found["rows"]
    assert "after" in found["rows"]
    assert "held-out trajectories" not in found["loss"]
    assert "held-out trajectories" in training_figures(ITERATIONS + ROWS + SELECTIONS)["loss"]


def test_oscillation_is_drawn_where_it_was_counted() -> None:
    counted = [line | {"oscillating": 5, "frozen": line["iteration"]} for line in ITERATIONS]
    assert "frozen" in training_figures(counted + ROWS)["oscillation"]
