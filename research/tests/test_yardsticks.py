"""Yardsticks: gains over the namesake, shares of the same pictures, and floors that differ in rounding alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.pipeline import Schedule
from s2p_deploy.shapes.scenes import Scene, SceneObject, render
from s2p_research.results_page import read_tables
from s2p_research.yardsticks import BF16, SAME, RoundedDenoiser, Task, compared_row, lines_of, table_of


def row(name: str, psnr: float, same: int = 1, task: str = "ddim:20@2") -> dict[str, Any]:
    return {"task": task, "name": name, "psnr": [psnr, psnr, psnr], "same": [same, same, 0]}


def test_gains_are_over_the_first_name_in_the_same_place() -> None:
    rows = [row(BF16, 60.0), row("a", 40.0), row("b", 43.0), row("a", 41.0), row("b", 42.0)]
    found = {line[0]: line for line in lines_of(rows, "ddim:20@2")}
    assert found["b, 1"][4] == "3.00 (3.00 to 3.00)"
    assert found["b, 2"][4] == "1.00 (1.00 to 1.00)"
    assert found["b, mean of all"][4] == "2.00 (2.00 to 2.00)"
    assert found["a, 1"][4] == found[BF16][4] == ""
    assert found[BF16][1:4] == ["60.00 (60.00 to 60.00)", "60.00 (60.00 to 60.00)", "60.0"]


def test_a_share_counts_pictures() -> None:
    (line,) = lines_of([row("a", 40.0)], "ddim:20@2")
    assert line[0] == "a"
    assert line[5].startswith("67 % (0 % to")


def test_other_tasks_are_left_out(tmp_path: Path) -> None:
    rows = [row("a", 40.0), row("a", 30.0, task="own@7.5")]
    found = {"kind": "Yardsticks", "pictures": 3, "prompts": "p", "source": "s", "same": SAME, "rows": rows}
    text = table_of(found)
    assert "DDIM, 20 steps, guidance 2:" in text
    assert "own schedule, guidance 7.5:" in text
    assert [line.split(" | ")[1][:5] for line in text.splitlines() if line.startswith("| a")] == ["40.00", "30.00"]
    (tmp_path / "some.json").write_text(json.dumps(found))
    assert read_tables([tmp_path / "some.json"]) == {"some": text}


def test_the_same_picture_is_close_and_reads_alike() -> None:
    task = Task.of("pndm:50@7.5", Schedule(50, max_sequence_length=8))
    assert (task.schedule, task.guidance_scale) == (Schedule(50, "pndm", max_sequence_length=8), 7.5)
    scenes = [Scene((SceneObject("small", colour, "circle", "top left"),), "white") for colour in ("red", "blue")]
    first, second = (render(scene).astype(np.float32)[None] / 255 for scene in scenes)
    assert compared_row(task, "a", first, first)["same"] == [1]
    assert compared_row(task, "a", first, second)["same"] == [0]
    far = np.clip(first + 0.03, 0, 1)  # reads alike, at 30 dB
    assert compared_row(task, "a", first, far)["same"] == [0]
    assert compared_row(task, "a", first, far)["psnr"][0] < SAME


def test_own_is_the_schedule_that_was_calibrated() -> None:
    own = Schedule(28, max_sequence_length=8)
    assert Task.of("own@3.5", own).schedule == own


def test_a_rounded_denoiser_returns_float32_of_bfloat16_products() -> None:
    layer = torch.nn.Linear(16, 4)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    found = RoundedDenoiser(layer)(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, layer(x))
    assert found.detach().numpy() == pytest.approx(layer(x).detach().numpy(), abs=0.02)
