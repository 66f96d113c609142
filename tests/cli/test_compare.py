from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Run, quick_settings
from tests.small_pipelines import tiny_base

DRAWN = "a small red circle at the top left, white background\na small blue circle at the top left, gray background\n"


@pytest.fixture
def command(tmp_path: Path, prompts_file: Path) -> list[object]:
    """Everything but the recipes."""
    tiny_base(tmp_path / "pipeline")
    (tmp_path / "drawn.txt").write_text(DRAWN, encoding="utf-8")
    model = ["--model", tmp_path / "pipeline", "--prompts", prompts_file, "--held-out", tmp_path / "drawn.txt"]
    return [*model, "--pictures", 2, "--out", tmp_path / "out", *quick_settings("training.iterations=0")]


def test_presets_are_compared_and_calibrations_are_used_again(run: Run, command: list[object], tmp_path: Path) -> None:
    done = run("compare", "fp", "w8a8", "w4a8", *command)
    assert done.code == 0
    for text in ("Pictures of 2 held-out prompts", "w4a8", "SQNR", "comparison.json"):
        assert text in done.out
    plain, eight, four = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert plain["psnr"]["value"] > 80  # floating point comes back as itself
    assert plain["sqnr"]["value"] > eight["sqnr"]["value"] > four["sqnr"]["value"] > 0
    assert plain["weight_bits"] == 16 > eight["weight_bits"] > four["weight_bits"]
    assert plain["size"] > eight["size"] > four["size"]
    assert eight["worst_psnr"] <= eight["psnr_tenth"]["value"] <= eight["psnr"]["value"]
    calibrated = tmp_path / "out" / "w8a8" / "calib" / "manifest.json"
    before = calibrated.stat().st_mtime_ns
    again = run("compare", "w8a8", *command, "--json")
    assert again.data["recipes"] == [eight]
    assert calibrated.stat().st_mtime_ns == before


def test_a_training_prompt_is_refused(run: Run, command: list[object], prompts_file: Path) -> None:
    done = run("compare", "fp", *command, "--held-out", prompts_file)
    assert done.code == 2
    assert "is also a training prompt" in done.err


def test_two_recipes_of_one_name_are_refused(run: Run, command: list[object]) -> None:
    done = run("compare", "fp", "fp", *command)
    assert done.code == 2
    assert "two recipes are named 'fp'" in done.err


def test_an_unknown_recipe_stops_everything(run: Run, command: list[object], tmp_path: Path) -> None:
    done = run("compare", "fp", "nothing", *command)
    assert done.code == 2
    assert "unknown recipe 'nothing'" in done.err
    assert not (tmp_path / "out").exists()
