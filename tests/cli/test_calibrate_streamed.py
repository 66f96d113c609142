"""``calibrate`` with recipes that look at no activation: no prompts, and a plain word about what they are good for."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.records import CalibratedModel
from tests.cli.commands import Chain, Run


@pytest.mark.parametrize(("recipe", "said"), [("ptq-stream", True), ("fp", False)])
def test_no_prompts_are_needed_and_default_scales_are_owned_up_to(
    run: Run, tmp_path: Path, recipe: str, said: bool
) -> None:
    command = ["calibrate", "shapes", "--recipe", recipe, "--out", tmp_path / "model"]
    made, again = run(*command), run(*command, "--json")
    assert (made.code, again.code) == (0, 0), made.err
    assert ("draw no pictures" in made.out) is said
    assert ("draw no pictures" in again.data.get("note", "")) is said
    assert again.data["path"] == str(tmp_path / "model")


def test_a_recipe_that_walks_prompts_asks_for_them(run: Run, tmp_path: Path) -> None:
    made = run("calibrate", "shapes", "--recipe", "w8a8", "--out", tmp_path / "model")
    assert made.code == 2
    assert "recipe w8a8 walks prompts: pass --prompts FILE" in made.err
    assert list(tmp_path.iterdir()) == []


def test_scales_are_taken_from_a_calibrated_model(run: Run, chain: Chain, tmp_path: Path) -> None:
    made = run(
        *("calibrate", "shapes", "--recipe", "ptq-stream", "--set", "scales.activations=given"),
        *("--set", "sampling.steps=5", "--from", chain.calib, "--out", tmp_path / "model"),
    )
    assert made.code == 0, made.err
    assert "draw no pictures" not in made.out
    given, taken = CalibratedModel.open(chain.calib), CalibratedModel.open(tmp_path / "model")
    assert taken.scales.quantizers == given.scales.quantizers
    assert (taken.scales.scales == given.scales.scales).all()
