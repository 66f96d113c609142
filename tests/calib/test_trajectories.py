from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from s2p_deploy.calib.trajectories import (
    PromptWalk,
    Sample,
    Sampler,
    call_indices,
    encode_prompts,
    in_parts,
    sampler_of,
    slot_queues,
    uniform_calls,
    walk_trajectories,
)
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, IndexedDenoiser, denoiser_of, indexed_denoiser_of, load_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt, PromptSet, TimestepTable
from s2p_deploy.timesteps import timestep_table_of
from tests.small_pipelines import sibling

STEPS, GUIDANCE = 6, 2.5


def stored_calls(recipe: Recipe, prompt: Prompt, calls: int, count: int) -> tuple[int, ...]:
    dataset = recipe.dataset.model_copy(update={"samples_per_prompt": count})
    return uniform_calls(recipe.model_copy(update={"dataset": dataset}), prompt, calls)


def walks_of(pipe: StableDiffusionPipeline, prompts: PromptSet, count: int) -> list[PromptWalk]:
    recipe = Recipe.load("w4a8")
    texts = encode_prompts(pipe, prompts, 256)
    calls = len(pipe.scheduler.timesteps)
    distinct = texts.distinct
    return [
        PromptWalk(prompt, stored_calls(recipe, prompt, calls, count), distinct[cond], distinct[uncond])
        for prompt, cond, uncond in zip(prompts.prompts, texts.cond, texts.uncond, strict=True)
    ]


def schedule_table(pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, steps: int) -> TimestepTable:
    return timestep_table_of(pipe.scheduler, steps, fractional=bool(float_denoiser.added_width))


def own_sampler(pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, steps: int = STEPS) -> Sampler:
    return sampler_of(pipe, schedule_table(pipe, float_denoiser, steps), steps)


def queues_of(plans: list[PromptWalk]) -> tuple[tuple[int, ...], ...]:
    return slot_queues({index: plan.length for index, plan in enumerate(plans)}, 2, 0)


def walked(
    pipe: StableDiffusionPipeline,
    float_denoiser: IndexedDenoiser,
    plans: list[PromptWalk],
    queues: Sequence[Sequence[int]] | None = None,
) -> dict[int, list[Sample]]:
    steps = walk_trajectories(
        float_denoiser, own_sampler(pipe, float_denoiser), plans, queues or queues_of(plans), guidance_scale=GUIDANCE
    )
    return {index: points for index, points in steps if points is not None}


def test_a_batch_is_cut_into_calls() -> None:
    sizes: list[int] = []

    def denoise(sample: Tensor, index: Tensor, texts: Tensor, added: Tensor) -> Tensor:
        assert len(sample) == len(index) == len(texts) == len(added)
        sizes.append(len(sample))
        return sample + index.view(-1, 1)

    inputs = torch.randn(5, 2), torch.arange(5), torch.zeros(5, 3), torch.zeros(5, 0)
    assert torch.equal(in_parts(denoise, 2)(*inputs), in_parts(denoise, None)(*inputs))
    assert sizes == [2, 2, 1, 5]


def test_calls_are_drawn_from_the_prompt_alone(recipe: Recipe) -> None:
    first = stored_calls(recipe, Prompt("a", "x"), 51, 8)
    assert first == stored_calls(recipe, Prompt("a", "another text"), 51, 8)
    assert first != stored_calls(recipe, Prompt("b", "x"), 51, 8)
    assert list(first) == sorted(set(first))
    assert len(first) == 8
    assert stored_calls(recipe, Prompt("a", "x"), 5, 8) == (0, 1, 2, 3, 4)


def test_calls_are_drawn_uniformly(recipe: Recipe) -> None:
    """One call of each of 4000 prompts."""
    counts = np.bincount([stored_calls(recipe, Prompt(str(n), ""), 50, 1)[0] for n in range(4000)], minlength=50)
    assert (np.abs(counts - 80) < 5 * 80**0.5).all()  # five deviations of a count of 80


def test_a_prompt_goes_where_a_slot_is_free_first_the_longest_first() -> None:
    # 5, 4, 3, 3, 1: slot A gets 5, B 4; B is free first, gets 3 (until 7); A gets 3 (until 8); B gets 1.
    queues = slot_queues({10: 3, 11: 5, 12: 1, 13: 4, 14: 3}, 2, 0)
    assert sorted(queues) == [(11, 14), (13, 10, 12)]


def test_no_slot_gets_the_longest_of_every_shard() -> None:
    plans = [slot_queues({0: 9, 1: 1}, 4, shard) for shard in range(40)]
    assert {queues.index((0,)) for queues in plans} == {0, 1, 2, 3}
    assert slot_queues({0: 9, 1: 1}, 4, 7) == slot_queues({0: 9, 1: 1}, 4, 7)


def test_pndm_calls_one_row_twice(pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser) -> None:
    pipe.scheduler.set_timesteps(50)
    rows = own_sampler(pipe, float_denoiser, 50).indices
    assert len(rows) == 51
    assert len(set(rows)) == 50
    assert rows[1] == rows[2]


def test_a_fractional_schedule_is_refused(pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    with pytest.raises(InputError, match="EulerDiscreteScheduler has the fractional timestep"):
        schedule_table(pipe, float_denoiser, 7)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_fractional_calls_have_rows_where_the_time_path_stays(name: str) -> None:
    pipe = load_pipeline(sibling(name))
    float_denoiser = indexed_denoiser_of(pipe, 7)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=True)
    table = schedule_table(pipe, float_denoiser, 7)
    pipe.scheduler.set_timesteps(7)
    rows = call_indices(pipe.scheduler, table)
    assert table.timesteps[list(rows)] == pytest.approx(pipe.scheduler.timesteps.numpy(), abs=1e-3)
    assert len(set(rows)) == 7


def test_a_walk_is_the_stock_pipelines(
    base: BasePipeline, pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    points = walked(pipe, float_denoiser, walks_of(pipe, prompts.first(3), 100))[2]
    seen = []
    stock = load_pipeline(base)
    stock.unet.register_forward_hook(lambda _, args, output: seen.append((args[0][0], int(args[1]), output[0])))
    prompt = prompts.prompts[2]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.noise_seed))
    stock(prompt.text, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise, output_type="latent")

    assert [point.timestep_index for point in points] == [row for _, row, _ in seen]
    for point, (latents, _, (uncond, cond)) in zip(points, seen, strict=True):
        assert relative_error(point.latents, latents) < 2e-3  # the walk feeds float16-rounded latents
        assert relative_error(point.cond, cond) < 2e-3
        assert relative_error(point.uncond, uncond) < 2e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_walk_of_another_family_is_the_stock_pipelines(name: str, prompts: PromptSet) -> None:
    """Its texts, pooled texts, sizes, and for SDXL zeros in the place of the negative prompt that nobody gave."""
    pipe, stock = (load_pipeline(sibling(name)) for _ in range(2))
    seen: list[tuple[torch.Tensor, float, torch.Tensor]] = []

    def keep(_module: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: tuple[Any, ...]) -> None:
        latents, timestep = (args[0], args[1]) if args else (given["hidden_states"], given["timestep"][0])
        seen.append((latents[0], float(timestep), output[0]))

    denoiser_of(stock).register_forward_hook(keep, with_kwargs=True)
    prompt = prompts.prompts[2]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.noise_seed))
    asked = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    padded = {"max_sequence_length": 256} if name == "sd3" else {}
    stock(prompt.text, latents=noise, **asked, **padded)

    float_denoiser = indexed_denoiser_of(pipe, STEPS).eval()
    pipe.scheduler.set_timesteps(STEPS)
    table = schedule_table(pipe, float_denoiser, STEPS)
    points = walked(pipe, float_denoiser, walks_of(pipe, prompts.first(3), 100))[2]
    assert table.timesteps[[point.timestep_index for point in points]] == pytest.approx(
        [t for _, t, _ in seen], abs=1e-3
    )
    for point, (latents, _, (uncond, cond)) in zip(points, seen, strict=True):
        assert relative_error(point.latents, latents) < 2e-3
        assert relative_error(point.cond, cond) < 2e-3
        assert relative_error(point.uncond, uncond) < 2e-3


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference).norm() / reference.norm())


@torch.no_grad()
def test_the_stored_answer_belongs_to_the_stored_input(
    pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    plans = walks_of(pipe, prompts.first(3), 2)
    for index, points in walked(pipe, float_denoiser, plans).items():
        for point in points:
            rows = torch.tensor([point.timestep_index])
            answer = float_denoiser(point.latents[None].float(), rows, plans[index].cond.states[None])[0]
            assert relative_error(answer, point.cond.float()) < 4e-4  # float16's rounding


def test_a_slots_bits_do_not_depend_on_its_neighbors(
    pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet
) -> None:
    """Other prompts beside it, idle slots, another turn in its own queue: only which slot it is decides."""
    pipe.scheduler.set_timesteps(STEPS)
    plans = walks_of(pipe, prompts, 3)
    whole = walked(pipe, float_denoiser, plans, [(0, 1, 4), (2, 3, 5)])
    for queues in ([(4,), (5, 3, 2)], [(1, 0), ()], [(), (3,)]):
        for index, points in walked(pipe, float_denoiser, plans, queues).items():
            for point, expected in zip(points, whole[index], strict=True):
                assert point.timestep_index == expected.timestep_index
                for name in ("latents", "cond", "uncond"):
                    assert torch.equal(getattr(point, name), getattr(expected, name))


def test_a_walk_stops_at_its_last_stored_call(
    pipe: StableDiffusionPipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    plans = walks_of(pipe, prompts, 1)
    calls = []
    float_denoiser.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    walked(pipe, float_denoiser, plans)
    assert calls == [4] * max(sum(plans[index].length for index in queue) for queue in queues_of(plans))
