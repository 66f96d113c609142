from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from s2p_deploy.calib.trajectories import Sampler
from s2p_deploy.families import EncodedText
from s2p_deploy.records import Base, LatentDataset, Manifest
from s2p_deploy.validation.reference import choose_latents, latents_of_trajectory, stored_predictions, trajectory_inputs


def dataset(points: int = 10) -> LatentDataset:
    """Point i: latents full of i, row 100 * i, prompt i % 2; texts: 0 empty, 1 and 2 those of the prompts."""
    order = np.random.default_rng(0).permutation(points)
    latents = order.reshape(-1, 1, 1, 1).astype(np.float16) * np.ones((1, 4, 2, 2), np.float16)
    texts = np.arange(3, dtype=np.float32).reshape(3, 1, 1) * np.ones((1, 5, 6), np.float32)
    return LatentDataset(
        Path(),
        Manifest("LatentDataset", Base("", ""), {}, {}),
        latents=latents,
        timestep_indices=order * 100,
        cond=latents,
        uncond=latents,
        prompt=order % 2,
        texts=texts,
        added_cond=10 * texts[:, 0, :2],
        cond_text=np.array([1, 2]),
        uncond_text=np.array([0, 0]),
    )


def test_latents_are_spread_over_the_timesteps_with_both_branches_side_by_side() -> None:
    chosen = choose_latents(dataset(), 6)
    assert chosen.timestep_indices.tolist() == [0, 0, 400, 400, 900, 900]
    assert chosen.sample[:, 0, 0, 0].tolist() == [0, 0, 4, 4, 9, 9]
    assert chosen.text[:, 0, 0].tolist() == [0, 1, 0, 1, 0, 2]
    assert chosen.added_cond.tolist() == [[10 * text] * 2 for text in (0, 1, 0, 1, 0, 2)]
    assert chosen.sample.dtype == chosen.text.dtype == chosen.added_cond.dtype == np.float32


def test_without_guidance_every_sample_has_the_branch_of_its_prompt_alone() -> None:
    chosen = choose_latents(replace(dataset(), guided=False), 3)
    assert chosen.timestep_indices.tolist() == [0, 400, 900]
    assert chosen.text[:, 0, 0].tolist() == [1, 1, 2]
    assert not chosen.guided
    assert not chosen.first(2).guided
    assert stored_predictions(replace(dataset(), guided=False), 3)[:, 0, 0, 0].tolist() == [0, 4, 9]


def test_an_added_condition_is_an_input_only_where_there_is_one() -> None:
    chosen = choose_latents(dataset(), 6)
    assert list(chosen.inputs()) == ["sample", "timestep_index", "encoder_hidden_states", "added_cond"]
    without = replace(chosen, added_cond=chosen.added_cond[:, :0])
    assert list(without.inputs()) == ["sample", "timestep_index", "encoder_hidden_states"]


def test_at_least_as_many_as_asked_and_never_more_than_there_are() -> None:
    assert len(choose_latents(dataset(), 5)) == 6
    assert len(choose_latents(dataset(), 1000)) == 20


def test_parts_hold_all_in_order_and_few_of_large_ones() -> None:
    chosen = choose_latents(dataset(), 1000)
    parts = list(chosen.parts())
    assert [len(part) for part in parts] == [16, 4]
    assert np.concatenate([part.timestep_indices for part in parts]).tolist() == chosen.timestep_indices.tolist()
    assert np.concatenate([part.added_cond for part in parts]).tolist() == chosen.added_cond.tolist()
    texts = EncodedText(torch.zeros(2, 5, 6), torch.zeros(2, 0))
    large = latents_of_trajectory(np.zeros((2, 2, 4, 64, 64), np.float32), np.array([5, 1]), texts, texts, 8)
    assert {len(part) for part in large.parts()} == {2}


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_what_is_seen_is_scaled_as_the_sampler_scales_it(scheduler: SchedulerMixin) -> None:
    scheduler.set_timesteps(5)
    sampler = Sampler(scheduler, tuple(range(5)))
    walking, latents = sampler.copy(), sampler.start(torch.randn(2, 4, 2, 2))
    given, after = [], []
    for call in range(5):
        given.append(walking.net_input(latents, call))
        latents = walking.step(0.5 * given[-1], call, latents, torch.Generator())
        after.append(latents)
    found = trajectory_inputs(sampler, torch.stack(after).numpy())
    np.testing.assert_allclose(found, torch.stack(given[1:]).numpy(), rtol=1e-6)


def test_a_walk_gives_what_every_call_saw() -> None:
    """Two prompts, two calls at timesteps 500 and 100."""
    seen = np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1, 1) * np.ones((1, 1, 4, 2, 2), np.float32)
    cond = EncodedText(torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([[10.0], [20.0]]))
    uncond = EncodedText(torch.zeros(2, 1, 1), torch.tensor([[3.0], [4.0]]))
    chosen = latents_of_trajectory(seen, np.array([500, 100]), cond, uncond, 8)
    assert chosen.timestep_indices.tolist() == [500, 500, 500, 500, 100, 100, 100, 100]
    assert chosen.sample[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert chosen.text[:, 0, 0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2]
    assert chosen.added_cond[:, 0].tolist() == [3, 10, 4, 20, 3, 10, 4, 20]
    alone = latents_of_trajectory(seen, np.array([500, 100]), cond, None, 4)
    assert alone.timestep_indices.tolist() == [500, 500, 100, 100]
    assert alone.text[:, 0, 0].tolist() == [1, 2, 1, 2]
    assert not alone.guided
