from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from s2p_deploy.calib.dataset import encode_texts
from s2p_deploy.calib.trajectories import Itinerary, StoredPoint, call_rows, choose_calls, slot_queues, walk
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, HotDenoiser, load_pipeline
from s2p_deploy.records import Prompt, PromptSet

STEPS, GUIDANCE = 6, 2.5


def itineraries(pipe: StableDiffusionPipeline, prompts: PromptSet, points: int) -> list[Itinerary]:
    texts = encode_texts(pipe, prompts)
    calls = len(call_rows(pipe.scheduler))
    return [
        Itinerary(prompt, choose_calls(prompt, calls, points), texts.states[cond], texts.states[uncond])
        for prompt, cond, uncond in zip(prompts.prompts, texts.cond, texts.uncond, strict=True)
    ]


def walked(
    pipe: StableDiffusionPipeline, hot: HotDenoiser, plans: list[Itinerary], **options: object
) -> dict[int, list[StoredPoint]]:
    steps = walk(hot, pipe.scheduler, plans, guidance_scale=GUIDANCE, width=2, **options)
    return {index: points for index, points in steps if points is not None}


def test_calls_are_drawn_from_the_prompt_alone() -> None:
    first = choose_calls(Prompt("a", "x"), 51, 8)
    assert first == choose_calls(Prompt("a", "another text"), 51, 8) != choose_calls(Prompt("b", "x"), 51, 8)
    assert list(first) == sorted(set(first))
    assert len(first) == 8
    assert choose_calls(Prompt("a", "x"), 5, 8) == (0, 1, 2, 3, 4)


def test_a_prompt_goes_where_a_slot_is_free_first() -> None:
    # Slot 0 is busy until 3; slot 1 until 1, then 2, then 4; so prompt 4 goes to slot 0.
    assert slot_queues([3, 1, 1, 2, 1], 2) == ((0, 4), (1, 2, 3))


def test_pndm_calls_one_row_twice(pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler.set_timesteps(50)
    rows = call_rows(pipe.scheduler)
    assert len(rows) == 51
    assert len(set(rows)) == 50
    assert rows[1] == rows[2]


def test_a_fractional_schedule_is_refused(pipe: StableDiffusionPipeline) -> None:
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    with pytest.raises(InputError, match="EulerDiscreteScheduler asks for the fractional timestep"):
        call_rows(scheduler)


def test_a_walk_is_the_stock_pipelines(
    base: BasePipeline, pipe: StableDiffusionPipeline, hot: HotDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    points = walked(pipe, hot, itineraries(pipe, prompts.first(3), 100))[2]
    seen = []
    stock = load_pipeline(base)
    stock.unet.register_forward_hook(lambda _, args, output: seen.append((args[0][0], int(args[1]), output[0])))
    prompt = prompts.prompts[2]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.noise_seed))
    stock(prompt.text, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise, output_type="latent")

    assert [point.row for point in points] == [row for _, row, _ in seen]
    for point, (latents, _, (uncond, cond)) in zip(points, seen, strict=True):
        assert relative_error(point.latents, latents) < 2e-3  # the walk feeds float16-rounded latents
        assert relative_error(point.cond, cond) < 2e-3
        assert relative_error(point.uncond, uncond) < 2e-3


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference).norm() / reference.norm())


@torch.no_grad()
def test_the_stored_answer_belongs_to_the_stored_input(
    pipe: StableDiffusionPipeline, hot: HotDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    plans = itineraries(pipe, prompts.first(3), 2)
    for index, points in walked(pipe, hot, plans).items():
        for point in points:
            rows = torch.tensor([point.row])
            answer = hot(point.latents[None].float(), rows, plans[index].cond_text[None])[0]
            assert relative_error(answer, point.cond.float()) < 4e-4  # float16's rounding


def test_skipping_some_prompts_changes_no_bit_of_the_others(
    pipe: StableDiffusionPipeline, hot: HotDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    plans = itineraries(pipe, prompts, 3)
    whole = walked(pipe, hot, plans)
    rest = walked(pipe, hot, plans, skip={0, 1, 4})
    assert set(whole) == set(range(6))
    assert set(rest) == {2, 3, 5}
    for index, points in rest.items():
        for point, expected in zip(points, whole[index], strict=True):
            assert point.row == expected.row
            for name in ("latents", "cond", "uncond"):
                assert torch.equal(getattr(point, name), getattr(expected, name))


def test_a_walk_stops_at_its_last_stored_call(
    pipe: StableDiffusionPipeline, hot: HotDenoiser, prompts: PromptSet
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    plans = itineraries(pipe, prompts, 1)
    calls = []
    hot.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    walked(pipe, hot, plans)
    busiest = max(sum(plans[i].length for i in queue) for queue in slot_queues([plan.length for plan in plans], 2))
    assert calls == [4] * busiest
