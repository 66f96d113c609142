from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Run, quick_settings
from tests.small_pipelines import tiny_base

BROKEN = """
name: broken
weights: int8
activations: int8
rules: [{match: no_such_layer, weights: int4}]
dataset: {prompts: 2, samples_per_prompt: 2}
training: {iterations: 0}
"""
DRAWN = "a small red circle at the top left, white background\na small blue circle at the top left, gray background\n"


@pytest.fixture
def command(tmp_path: Path, prompts_file: Path) -> list[object]:
    """Everything but the recipes."""
    tiny_base(tmp_path / "pipeline")
    (tmp_path / "drawn.txt").write_text(DRAWN, encoding="utf-8")
    model = ["--model", tmp_path / "pipeline", "--prompts", prompts_file, "--held-out", tmp_path / "drawn.txt"]
    counts = ["--pictures", 2, "--latents-prompts", 1, "--schedule", "unipc:3", "--out", tmp_path / "out"]
    return [*model, *counts, *quick_settings("training.iterations=0")]


def test_recipes_are_compared_and_a_failure_is_told_at_the_end(run: Run, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text(BROKEN, encoding="utf-8")
    done = run("compare", tmp_path / "broken.yaml", "fp", "w8a8", *command)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("s2p-deploy: 1 of 3 recipes failed: broken:")
    for text in ("one-pixel shift of FP", "floating point", "unipc, 3 steps", "w8a8", "comparison.html"):
        assert text in done.out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert found["command"].startswith(f"python -m s2p_research compare {tmp_path / 'broken.yaml'} fp w8a8 --model")
    assert found["command"].endswith("--set training.iterations=0 --out DIR")
    again = run("compare", "fp", "w8a8", *command, "--json")
    assert again.code == 0
    assert [recipe["name"] for recipe in again.data["recipes"]] == ["fp", "w8a8"]
    assert Path(again.data["page"]).is_file()
    assert "calib" not in again.err  # nothing was calibrated again


@pytest.mark.parametrize("schedule", ["unipc", "unipc:", "unipc:x", "unipc:0", ":5", "magic:5", "unipc:²", "unipc:-3"])
def test_a_schedule_must_be_a_name_and_steps(run: Run, command: list[object], schedule: str) -> None:
    done = run("compare", "fp", *command, "--schedule", schedule, "--json")
    assert done.code == 2
    assert "must be NAME:STEPS" in done.data["error"]["message"]


def test_an_unknown_recipe_stops_everything(run: Run, command: list[object], tmp_path: Path) -> None:
    done = run("compare", "fp", "nothing", *command)
    assert done.code == 2
    assert "unknown recipe 'nothing'" in done.err
    assert not (tmp_path / "out").exists()
