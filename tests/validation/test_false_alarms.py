"""The benchmark of false alarms, on the tiny chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.engines.false_alarms import alarms, half_of, judged, most_alarms, opened, some_of
from s2p_deploy.records import PromptSet
from s2p_deploy.validation import Chain
from tests.validation.spoiled_chains import doubled, with_engine


def test_a_right_engine_passes_with_other_latents_and_prompts(chain: Chain, prompts: PromptSet) -> None:
    with opened(chain) as right:
        results = [judged(right, prompts, seed, latents=8, pictures=0) for seed in range(3)]
    assert [alarms(result) for result in results] == [[], [], []]
    values = [[one.value for one in result if one.name.startswith("error of its own")] for result in results]
    assert values[0] != values[1] != values[2]  # other latents were looked at


def test_a_wrong_engine_fails_with_every_seed(chain: Chain, prompts: PromptSet, tmp_path: Path) -> None:
    wrong = with_engine(chain, tmp_path / "engine", doubled("mid_block.resnets.0.conv2"))
    with opened(wrong) as right:
        assert all(alarms(judged(right, prompts, seed, latents=8, pictures=0)) for seed in range(2))


def test_every_seed_has_its_own_samples_prompts_and_noise(chain: Chain, prompts: PromptSet) -> None:
    assert chain.dataset is not None
    first, second = (half_of(chain.dataset, np.random.default_rng(seed)) for seed in range(2))
    assert len(first.timestep_indices) == len(second.timestep_indices) == len(chain.dataset.timestep_indices) // 2
    assert not np.array_equal(first.latents, second.latents)
    one, other = (some_of(prompts, 3, np.random.default_rng(0), seed) for seed in range(2))
    assert [prompt.text for prompt in one.prompts] == [prompt.text for prompt in other.prompts]
    assert not {prompt.id for prompt in one.prompts} & {prompt.id for prompt in other.prompts}


def test_the_bound_is_that_of_a_binomial() -> None:
    assert most_alarms(0, 10) == pytest.approx(1 - 0.05 ** (1 / 10))
    assert most_alarms(10, 10) == 1.0
    assert 0.1 < most_alarms(1, 20) < 0.25
