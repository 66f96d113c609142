from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from s2p_deploy.families import load_pipeline
from s2p_deploy.metrics import PSNR_CEILING
from s2p_deploy.pipeline import Schedule, generate
from s2p_deploy.records import Number, Prompt, PromptSet, Skipped
from s2p_deploy.shapes.classifier import SceneClassifier
from s2p_deploy.shapes.scenes import parse, render
from s2p_deploy.validation import Chain, picture_psnr, pictures

SCHEDULE = Schedule(4)


@pytest.fixture(scope="module")
def pipe(chain: Chain) -> StableDiffusionPipeline:
    return load_pipeline(chain.base)


def rendered(prompts: PromptSet) -> np.ndarray:
    return np.stack([render(parse(prompt.text)) for prompt in prompts.prompts]).astype(np.float32) / 255


def test_a_generated_holds_what_the_pipeline_draws_alone(pipe: StableDiffusionPipeline, prompts: PromptSet) -> None:
    generated = pictures.generate_pictures(pipe, prompts, SCHEDULE, 2.5)
    alone = generate(pipe, prompts.prompts[1], schedule=SCHEDULE, guidance_scale=2.5)
    gap = np.abs(pictures.to_bytes(generated.pictures)[1].astype(int) - np.asarray(alone))
    assert gap.max() <= 1  # another batch size rounds otherwise
    assert generated.trajectory.shape == (5, 3, 4, 8, 8)  # PNDM: 4 steps are 5 calls
    assert len(generated.timesteps) == 5
    assert generated.timesteps[0] == max(generated.timesteps)


def test_batches_do_not_change_which_picture_is_whose(
    pipe: StableDiffusionPipeline, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = pictures.generate_pictures(pipe, prompts, SCHEDULE, 2.5)
    monkeypatch.setattr(pictures, "BATCH", 2)
    told: list[tuple[str, int, int]] = []
    apart = pictures.generate_pictures(
        pipe, prompts, SCHEDULE, 2.5, stage="few", progress=lambda *what: told.append(what)
    )
    np.testing.assert_allclose(apart.pictures, together.pictures, atol=1e-3)
    np.testing.assert_allclose(apart.trajectory, together.trajectory, atol=1e-3)
    assert told == [("few", 2, 3), ("few", 3, 3)]


def test_a_negative_prompt_is_used(pipe: StableDiffusionPipeline) -> None:
    texts = [Prompt("one", "a circle", negative) for negative in ("", "a large red square")]
    drawn = [pictures.generate_pictures(pipe, PromptSet((prompt,)), SCHEDULE, 2.5).trajectory for prompt in texts]
    assert not np.array_equal(*drawn)


def test_equal_generateds_are_equal_in_every_number(pipe: StableDiffusionPipeline, prompts: PromptSet) -> None:
    generated = pictures.generate_pictures(pipe, prompts, SCHEDULE, 2.5)
    found = pictures.compare_pictures(generated, generated, prompts, SCHEDULE, 2.5)
    assert found.similarity.psnr.tolist() == [PSNR_CEILING] * 3
    assert found.step_error.shape == (5, 3)
    assert not found.step_error.any()
    assert np.all(found.pixel_shift.psnr < PSNR_CEILING)
    assert isinstance(found.accuracy, tuple)
    assert found.accuracy[0] == found.accuracy[1]


def test_psnr_between_two_denoisers(pipe: StableDiffusionPipeline, chain: Chain, prompts: PromptSet) -> None:
    other = load_pipeline(chain.base).unet
    with torch.no_grad():
        other.conv_out.weight.mul_(1.01)
    found = picture_psnr(pipe, pipe.unet, other, prompts, SCHEDULE, 2.5)
    assert found.shape == (3,)
    assert np.all(found < PSNR_CEILING)
    assert np.all(picture_psnr(pipe, pipe.unet, pipe.unet, prompts, SCHEDULE, 2.5) == PSNR_CEILING)


def test_a_pixel_shift_is_the_mean_of_four_directions() -> None:
    """A picture of one bright column: moved along it nothing changes, moved across it two of four columns do."""
    picture = np.zeros((1, 16, 16, 3), np.float32)
    picture[:, :, 8] = 1.0
    across = -10 * np.log10(2 / 16)
    assert pictures.pixel_shift(picture).psnr[0] == pytest.approx((2 * PSNR_CEILING + 2 * across) / 4)


def test_accuracy_reads_pictures_that_show_their_captions(prompts: PromptSet) -> None:
    right = rendered(prompts)
    found = pictures.accuracies(right, right[::-1].copy(), prompts)
    assert isinstance(found, tuple)
    assert (found[0].value, found[0].n) == (1.0, 3)
    assert found[1].value < 1.0  # first and last are swapped: two colours are wrong


def test_accuracy_is_skipped_for_other_prompts_and_sizes(prompts: PromptSet) -> None:
    found = pictures.accuracies(rendered(prompts), rendered(prompts), PromptSet((Prompt("x", "a cat"),)))
    assert isinstance(found, Skipped)
    small = rendered(prompts)[:, ::2, ::2]
    assert isinstance(pictures.accuracies(small, small, prompts), Skipped)


def test_feature_distance_needs_weights_and_two_pictures(tmp_path: Path, prompts: PromptSet) -> None:
    shown = rendered(prompts)
    weights = tmp_path / "classifier.safetensors"
    assert isinstance(pictures.feature_distance(shown, shown, None), Skipped)
    assert isinstance(pictures.feature_distance(shown, shown, weights), Skipped)
    torch.manual_seed(0)
    save_file(SceneClassifier().state_dict(), weights)
    assert isinstance(pictures.feature_distance(shown[:1], shown[:1], weights), Skipped)
    same, other = (pictures.feature_distance(shown, second, weights) for second in (shown, 1 - shown))
    assert isinstance(same, Number)
    assert isinstance(other, Number)
    assert same.value == pytest.approx(0.0, abs=1e-6)
    assert other.value > same.value + 1e-4
    assert other.n == 3


def test_pictures_are_compared_a_batch_at_a_time_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.random.default_rng(0).random((2, 5, 16, 16, 3), np.float32)
    whole = pictures.similarity(first, second)
    monkeypatch.setattr(pictures, "BATCH", 2)
    parts = pictures.similarity(first, second)
    for name, values in vars(whole).items():
        assert values.shape == (5,)
        np.testing.assert_array_equal(getattr(parts, name), values)
