from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from sibling_pipelines import sibling

from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, kind_of, load_pipeline, with_denoiser
from s2p_deploy.pipeline import (
    EngineDenoiser,
    EngineTransformer,
    Schedule,
    call_arguments,
    engine_denoiser,
    generate,
    initial_noise,
    with_schedule,
)
from s2p_deploy.records import Prompt, TimestepTable
from s2p_deploy.timesteps import timestep_table_of
from tests.tiny_pipeline import tiny_base

PROMPT = "a small red circle at the top left, white background"
TABLE = TimestepTable("PNDMScheduler", {}, 50, (1, 501, 940), np.linspace(0.1, 1.5, 1000))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipeline(tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline"))


@pytest.fixture(scope="module")
def denoiser(base: StableDiffusionPipeline) -> EngineDenoiser:
    """The FP UNet behind the runner's interface: what the pipeline draws must not change by a bit."""
    runner = TorchRunner(lambda *inputs: base.unet(*inputs, return_dict=False)[0])
    return EngineDenoiser(runner, base.unet.config, TABLE)


def draw(pipe: StableDiffusionPipeline, **options: object) -> np.ndarray:
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent"} | options
    noise = initial_noise([7] * (3 if "num_images_per_prompt" in options else 1), pipe.unet.config)
    return pipe(PROMPT, latents=noise, **arguments).images.numpy()


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return initial_noise(range(batch), {"sample_size": 8, "in_channels": 4}), torch.ones(batch, 24, 128)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"num_images_per_prompt": 3},
        {"negative_prompt": "a large blue square"},
        {"guidance_rescale": 0.5},
    ],
)
def test_a_stock_pipeline_draws_the_same_with_the_denoiser_in_place(
    base: StableDiffusionPipeline, denoiser: EngineDenoiser, options: dict[str, Any]
) -> None:
    pipe = with_denoiser(base, denoiser)
    assert type(pipe) is StableDiffusionPipeline
    pictures = draw(pipe, **options)
    assert len(pictures) == options.get("num_images_per_prompt", 1)
    np.testing.assert_array_equal(pictures, draw(base, **options))


@pytest.mark.parametrize("name", ["pndm", "ddim", "unipc", "euler", "heun"])
def test_every_named_scheduler_runs_and_draws_the_same(
    base: StableDiffusionPipeline, denoiser: EngineDenoiser, name: str
) -> None:
    schedule, prompt = Schedule(5, name), Prompt("id", PROMPT)
    pictures = [
        np.asarray(generate(pipe, prompt, schedule=schedule, guidance_scale=2.5))
        for pipe in (base, with_denoiser(base, denoiser))
    ]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("schedule", [Schedule(10, "unipc"), Schedule(25, "pndm"), Schedule(10, "euler")])
def test_few_steps_stay_on_the_table_of_fifty(
    base: StableDiffusionPipeline, denoiser: EngineDenoiser, schedule: Schedule
) -> None:
    """Integer timesteps inside the rows that 50 PNDM steps calibrate."""
    table = TimestepTable("PNDMScheduler", {}, 50, tuple(range(1, 982, 20)), np.linspace(0.1, 1.5, 1000))
    asked: list[np.ndarray] = []

    def answer(sample: torch.Tensor, rows: torch.Tensor, _text: torch.Tensor) -> torch.Tensor:
        asked.append(rows.numpy())
        return sample

    engine = EngineDenoiser(TorchRunner(answer), base.unet.config, table)
    picture = generate(with_denoiser(base, engine), Prompt("id", PROMPT), schedule=schedule, guidance_scale=2.0)
    assert picture.size == (64, 64)
    scheduler = with_schedule(base, schedule).scheduler
    scheduler.set_timesteps(schedule.steps)
    assert [int(rows[0]) for rows in asked] == scheduler.timesteps.tolist()
    first, last = table.covered
    assert all(first <= rows.min() and rows.max() <= last for rows in asked)


def test_the_denoiser_reads_a_timestep_in_every_form(denoiser: EngineDenoiser) -> None:
    sample, text = inputs()
    forms = [501, 501.0, torch.tensor(501), torch.tensor(501.0), torch.tensor([501, 501]), torch.tensor([501.0])]
    outputs = [denoiser(sample, form, text, return_dict=False)[0] for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(denoiser(sample, 1, text).sample, outputs[0])


def test_samples_of_one_batch_may_be_on_different_timesteps(denoiser: EngineDenoiser) -> None:
    sample, text = inputs()
    together = denoiser(sample, torch.tensor([1, 940]), text).sample
    alone = [denoiser(sample, t, text).sample[index] for index, t in enumerate((1, 940))]
    torch.testing.assert_close(together, torch.stack(alone))


def test_the_output_is_memory_of_its_own(denoiser: EngineDenoiser) -> None:
    sample, text = inputs()
    before = sample.clone()
    first = denoiser(sample, 1, text).sample
    kept = first.clone()
    denoiser(-sample, 940, text)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(sample, before)


def test_the_output_is_in_the_dtype_of_the_sample(denoiser: EngineDenoiser) -> None:
    sample, text = inputs()
    assert denoiser(sample.half(), 1, text.half()).sample.dtype == torch.float16
    assert denoiser(sample.bfloat16(), 1, text.bfloat16()).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("timestep", [500.5, 1000, torch.tensor([1, 2, 3]), float("nan")])
def test_a_timestep_without_a_row_is_refused(denoiser: EngineDenoiser, timestep: torch.Tensor | float) -> None:
    sample, text = inputs()
    with pytest.raises(InputError):
        denoiser(sample, timestep, text)


@pytest.mark.parametrize(
    "condition",
    [
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"added_cond_kwargs": {"image_embeds": torch.ones(1)}},
        {"timestep_cond": torch.ones(2, 8)},
        {"class_labels": torch.zeros(2)},
        {"down_block_additional_residuals": (torch.ones(1),)},
        {"mid_block_additional_residual": torch.ones(1)},
    ],
)
def test_what_changes_the_network_is_refused_by_name(denoiser: EngineDenoiser, condition: dict[str, Any]) -> None:
    sample, text = inputs()
    with pytest.raises(InputError, match=next(iter(condition))):
        denoiser(sample, 1, text, **condition)


def test_conditions_that_ask_for_nothing_are_taken(denoiser: EngineDenoiser) -> None:
    sample, text = inputs()
    asked = denoiser(sample, 1, text, timestep_cond=None, cross_attention_kwargs={}, added_cond_kwargs=None).sample
    assert torch.equal(asked, denoiser(sample, 1, text).sample)


def test_another_picture_size_is_refused(base: StableDiffusionPipeline, denoiser: EngineDenoiser) -> None:
    with pytest.raises(InputError, match="leave height and width out"):
        with_denoiser(base, denoiser)(PROMPT, height=32, width=32, num_inference_steps=2)


def test_a_pipeline_with_an_engine_is_not_saved_without_it(
    base: StableDiffusionPipeline, denoiser: EngineDenoiser, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="an engine is not saved with a pipeline"):
        with_denoiser(base, denoiser).save_pretrained(tmp_path / "saved")


def test_adapters_are_refused(base: StableDiffusionPipeline, denoiser: EngineDenoiser) -> None:
    pipe = with_denoiser(base, denoiser)
    with pytest.raises(InputError, match="FreeU"):
        pipe.enable_freeu(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="LoRA"):  # what load_lora_weights calls, where PEFT is installed
        pipe.unet.load_lora_adapter({"layer.lora_A.weight": torch.ones(1)}, prefix=None)


def test_the_new_pipeline_has_a_scheduler_of_its_own(base: StableDiffusionPipeline, denoiser: EngineDenoiser) -> None:
    pipe = with_denoiser(base, denoiser)
    assert pipe.scheduler is not base.scheduler
    assert pipe.scheduler.config == base.scheduler.config
    assert base.unet is not pipe.unet


def test_latents_are_not_clipped_as_pictures(base: StableDiffusionPipeline) -> None:
    scheduler = with_schedule(base, Schedule(5, "ddim")).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.clip_sample is False
    assert scheduler.config.beta_end == base.scheduler.config.beta_end


def test_an_unknown_scheduler_is_refused(base: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="unknown scheduler 'magic': use one of"):
        with_schedule(base, Schedule(5, "magic"))


def test_noise_depends_on_the_seed_alone() -> None:
    config = {"sample_size": [8, 6], "in_channels": 4}
    noise = initial_noise([3, 5], config)
    assert noise.shape == (2, 4, 8, 6)
    assert torch.equal(noise[1:], initial_noise([5], config))
    assert torch.equal(noise[:1], torch.randn((1, 4, 8, 6), generator=torch.Generator().manual_seed(3)))


def test_a_picture_depends_on_its_seed_or_its_prompts_id(base: StableDiffusionPipeline) -> None:
    def picture(prompt_id: str, seed: int | None) -> np.ndarray:
        prompt = Prompt(prompt_id, PROMPT)
        return np.asarray(generate(base, prompt, schedule=Schedule(3), guidance_scale=2.0, seed=seed))

    np.testing.assert_array_equal(picture("one", 4), picture("two", 4))
    np.testing.assert_array_equal(picture("one", None), picture("two", Prompt("one", PROMPT).noise_seed))
    assert not np.array_equal(picture("one", None), picture("two", None))


def whole_denoiser(pipe: DiffusionPipeline, steps: int) -> EngineDenoiser:
    """The pipeline's own denoiser behind the runner's interface, on the rows of its scheduler."""
    network = denoiser_of(pipe)
    table = timestep_table_of(pipe.scheduler, steps, fractional=True)
    kind, timesteps = kind_of(network), torch.from_numpy(table.timesteps).float()

    def answer(sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return kind.answer(network, sample, timesteps[rows], text, added)

    return engine_denoiser(TorchRunner(answer), network.config, table)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a large blue square"}, {"guidance_scale": 1.0}], ids=str)
def test_stock_pipelines_of_other_families_draw_the_same(name: str, options: dict[str, Any]) -> None:
    base, steps = load_pipeline(sibling(name)), 4
    pipe = with_denoiser(base, whole_denoiser(base, steps))
    assert type(pipe) is type(base)
    arguments = {"guidance_scale": 2.5, "num_inference_steps": steps, "output_type": "latent"} | options
    noise = initial_noise([7], denoiser_of(base).config)
    expected, found = (one(PROMPT, latents=noise, **arguments).images.numpy() for one in (base, pipe))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(*(draw_of(one, Prompt("id", PROMPT), steps) for one in (base, pipe)))


def draw_of(pipe: DiffusionPipeline, prompt: Prompt, steps: int) -> np.ndarray:
    return np.asarray(generate(pipe, prompt, schedule=Schedule(steps), guidance_scale=2.5))


def test_a_transformer_stands_where_a_transformer_stood() -> None:
    sd3, sdxl = (load_pipeline(sibling(name)) for name in ("sd3", "sdxl"))
    assert type(whole_denoiser(sd3, 4)) is EngineTransformer
    assert type(whole_denoiser(sdxl, 4)) is EngineDenoiser


def test_what_changes_the_network_is_refused_in_every_family() -> None:
    sdxl, sd3 = (whole_denoiser(load_pipeline(sibling(name)), 4) for name in ("sdxl", "sd3"))
    sample = initial_noise([1], sdxl.config)
    added = {"text_embeds": torch.ones(1, 96), "time_ids": torch.ones(1, 6)}
    text = torch.ones(1, 24, 224)
    assert sdxl(sample, 1, text, added_cond_kwargs=added).sample.shape == sample.shape
    with pytest.raises(InputError, match="cannot take image_embeds"):
        sdxl(sample, 1, text, added_cond_kwargs=added | {"image_embeds": torch.ones(1, 3)})
    with pytest.raises(InputError, match="cannot take timestep_cond"):
        sdxl(sample, 1, text, added_cond_kwargs=added, timestep_cond=torch.ones(1, 2))
    with pytest.raises(InputError, match="needs the pooled text"):
        sdxl(sample, 1, text)
    timestep = torch.tensor(sd3.timesteps.calibrated[:1])
    for name in ("joint_attention_kwargs", "block_controlnet_hidden_states", "skip_layers"):
        with pytest.raises(InputError, match=f"cannot take {name}"):
            sd3(sample, torch.ones(1, 30, 256), torch.ones(1, 224), timestep, **{name: [1]})


def test_no_negative_prompt_is_none_where_no_prompt_has_any(base: StableDiffusionPipeline) -> None:
    """SDXL takes zeros then, not the states of an empty text."""
    plain, other = Prompt("a", "x"), Prompt("b", "y", "blurry")
    schedule = Schedule(5, max_sequence_length=7)
    assert call_arguments(base, [plain], schedule, 2.0)["negative_prompt"] is None
    assert call_arguments(base, [plain, other], schedule, 2.0)["negative_prompt"] == ["", "blurry"]
    assert "max_sequence_length" not in call_arguments(base, [plain], schedule, 2.0)
    assert call_arguments(load_pipeline(sibling("sd3")), [plain], schedule, 2.0)["max_sequence_length"] == 7
