from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.calib import dataset_request, generate_dataset
from s2p_deploy.calib.trajectories import FloatPipeline
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe, checked_recipe
from s2p_deploy.records import LatentDataset, Prompt, PromptSet
from s2p_research.calibrate import normal_calls
from s2p_research.recipe import ResearchRecipe


def stored_calls(prompt: Prompt, calls: int, count: int) -> tuple[int, ...]:
    return normal_calls(ResearchRecipe.load("ptq4dm", {"dataset": {"samples_per_prompt": count}}), prompt, calls)


def test_calls_are_drawn_from_the_prompt_alone() -> None:
    first = stored_calls(Prompt("a", "x"), 51, 8)
    assert first == stored_calls(Prompt("a", "another text"), 51, 8)
    assert first != stored_calls(Prompt("b", "x"), 51, 8)
    assert list(first) == sorted(set(first))
    assert len(first) == 8
    assert stored_calls(Prompt("a", "x"), 5, 8) == (0, 1, 2, 3, 4)


def test_normal_calls_lean_towards_the_picture() -> None:
    """N(20, 12.5^2) of 50 timesteps, whose tails pile up on both ends."""
    timesteps = np.array([49 - stored_calls(Prompt(str(n), ""), 50, 1)[0] for n in range(4000)])
    assert timesteps.mean() == pytest.approx(20, abs=0.7)
    assert np.mean(np.abs(timesteps - 20) <= 12) == pytest.approx(0.683, abs=0.03)
    assert np.mean(timesteps == 0) == pytest.approx(0.059, abs=0.015)  # Phi((0.5 - 20) / 12.5)
    assert np.mean(timesteps == 49) == pytest.approx(0.011, abs=0.007)  # 1 - Phi((48.5 - 20) / 12.5)


def test_normal_calls_are_distinct_up_to_all_but_one() -> None:
    chosen = stored_calls(Prompt("a", ""), 51, 50)
    assert len(set(chosen)) == 50
    assert set(chosen) <= set(range(51))


def test_normal_timesteps_are_another_dataset(
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    source: FloatPipeline,
    dataset: LatentDataset,
    tmp_path: Path,
) -> None:
    data = recipe.model_dump(mode="json")
    data["dataset"]["timesteps"] = "normal"
    request = dataset_request(base, checked_recipe(data, "test", ResearchRecipe), prompts, tmp_path / "d")
    made = generate_dataset(replace(request, stored_calls=normal_calls), source)
    assert made.manifest.recipe["dataset"]["timesteps"] == "normal"
    assert made.timestep_indices.shape == dataset.timestep_indices.shape
    assert made.timestep_indices.tolist() != dataset.timestep_indices.tolist()
