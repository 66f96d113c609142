"""A pipeline's text encoder and autoencoder without PyTorch: as diffusers and transformers call them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from s2p_deploy.engines.component_engines import build_component_engines
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline, long_prompt_embeds, with_components
from s2p_deploy.pipeline import EngineAutoencoder, EngineTextEncoder, auxiliary_components
from s2p_deploy.records import ShapeProfile, Span
from tests.small_pipelines import FACTOR, WIDTH, shared_small_base, shared_small_components, t5_base, whole_denoiser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from s2p_deploy.records import ComponentEngines
    from tests.shared_folder import SharedFolder

PROMPT = "a small red circle at the top left, white background"
IDS = torch.tensor([[272, 5, 9, 40, *[273] * 20], [272, 7, *[273] * 22]])


@pytest.fixture(scope="module")
def floating(shared: SharedFolder) -> StableDiffusionPipeline:
    return load_pipeline(shared_small_base(shared))


@pytest.fixture(scope="module")
def parts(shared: SharedFolder) -> ComponentEngines:
    return shared_small_components(shared, "onnxruntime")


@pytest.fixture(scope="module")
def pipe(floating: StableDiffusionPipeline, parts: ComponentEngines) -> StableDiffusionPipeline:
    return with_components(floating, {"unet": whole_denoiser(floating, 4), **auxiliary_components(parts)})


def drawn(pipe: DiffusionPipeline, **options: object) -> np.ndarray:
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"} | options
    return pipe(PROMPT, generator=torch.Generator().manual_seed(5), **asked).images


def test_a_stock_pipeline_draws_the_same_without_a_pytorch_network(
    floating: StableDiffusionPipeline, pipe: StableDiffusionPipeline
) -> None:
    assert type(pipe.text_encoder) is EngineTextEncoder
    assert type(pipe.vae) is EngineAutoencoder
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not sum(parameter.numel() for part in networks for parameter in part.parameters())
    for options in ({}, {"num_images_per_prompt": 2, "negative_prompt": "blue"}):
        np.testing.assert_allclose(drawn(pipe, **options), drawn(floating, **options), atol=1e-3)


def test_a_picture_goes_in_as_well(floating: StableDiffusionPipeline, pipe: StableDiffusionPipeline) -> None:
    side = 8 * FACTOR
    start = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    found = []
    for one in (floating, pipe):
        changed = StableDiffusionImg2ImgPipeline(**one.components, requires_safety_checker=False)
        changed.set_progress_bar_config(disable=True)
        found.append(drawn(changed, image=start, strength=0.5))
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


def test_a_text_encoder_gives_what_transformers_gives(
    floating: StableDiffusionPipeline, pipe: StableDiffusionPipeline
) -> None:
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        expected = floating.text_encoder(IDS, attention_mask=mask, output_hidden_states=True)
    found = pipe.text_encoder(IDS, attention_mask=mask, output_hidden_states=True)
    assert type(found) is type(expected)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in (
        (found[0], expected[0]),
        (found.pooler_output, expected.pooler_output),
        (found.hidden_states[-2], expected.hidden_states[-2]),
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert pipe.text_encoder(IDS).hidden_states is None
    assert isinstance(pipe.text_encoder(IDS, return_dict=False), tuple)
    assert pipe.text_encoder.config.hidden_size == 128


def test_what_a_text_encoder_cannot_take_is_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="cannot take a mask"):
        pipe.text_encoder(IDS, attention_mask=(IDS != 273).long())
    with pytest.raises(InputError, match="cannot take inputs_embeds"):
        pipe.text_encoder(IDS, inputs_embeds=[1])
    with pytest.raises(InputError, match="takes 24 tokens, got 3"):
        pipe.text_encoder(IDS[:, :3])
    with pytest.raises(InputError, match="leave clip_skip out"):
        drawn(pipe, clip_skip=1)


def test_a_text_encoder_learns_no_new_tokens_and_the_tokenizer_stays(pipe: StableDiffusionPipeline) -> None:
    before = len(pipe.tokenizer)
    with pytest.raises(InputError, match="knows no new tokens: load textual inversions into PyTorch's text encoder"):
        pipe.load_textual_inversion({"<mine>": torch.randn(2, 128)})
    assert len(pipe.tokenizer) == before


def test_a_long_prompt_is_encoded_in_chunks_too(
    floating: StableDiffusionPipeline, pipe: StableDiffusionPipeline
) -> None:
    found, expected = (long_prompt_embeds(one, ", ".join([PROMPT] * 4), "blue") for one in (pipe, floating))
    assert found["prompt_embeds"].shape == (1, 3 * 24, 128)
    for name, states in expected.items():
        torch.testing.assert_close(found[name], states, atol=1e-4, rtol=0)


def test_an_autoencoder_gives_what_diffusers_gives(
    floating: StableDiffusionPipeline, pipe: StableDiffusionPipeline
) -> None:
    """Of any size."""
    picture, latents = torch.rand(2, 3, 12 * FACTOR, 8 * FACTOR), torch.randn(2, 4, 12, 8)
    with torch.no_grad():
        expected, decoded = floating.vae.encode(picture).latent_dist, floating.vae.decode(latents).sample
    found = pipe.vae.encode(picture).latent_dist
    torch.testing.assert_close(found.mode(), expected.mode(), atol=1e-4, rtol=0)
    sampled = [one.sample(torch.Generator().manual_seed(1)) for one in (found, expected)]
    torch.testing.assert_close(*sampled, atol=1e-4, rtol=0)
    torch.testing.assert_close(pipe.vae.decode(latents, return_dict=False)[0], decoded, atol=1e-4, rtol=0)
    assert pipe.vae.config.scaling_factor == floating.vae.config.scaling_factor


def test_parts_follow_the_pipelines_dtype_and_are_copied_with_it(pipe: StableDiffusionPipeline) -> None:
    encoder, autoencoder = copy.deepcopy(pipe.text_encoder).to(torch.float16), copy.deepcopy(pipe.vae)
    assert encoder.dtype == encoder(IDS)[0].dtype == torch.float16
    assert autoencoder.runners == pipe.vae.runners
    assert autoencoder.to(torch.bfloat16).decode(torch.randn(1, 4, 8, 8).bfloat16()).sample.dtype == torch.bfloat16
    assert autoencoder.config.force_upcast is False


def test_a_batch_above_an_engines_largest_is_computed_in_slices(
    pipe: StableDiffusionPipeline, parts: ComponentEngines
) -> None:
    """Both outputs whose batch comes first and states of all layers, whose batch is second."""
    sized = replace(parts, profile=ShapeProfile(1, 1, 2, height=Span(8, 8, 8), width=Span(8, 8, 8)))
    encoder = EngineTextEncoder(pipe.text_encoder.runners, pipe.text_encoder.config, sized)
    autoencoder = EngineAutoencoder(pipe.vae.runners, pipe.vae.config, sized)
    ids, latents = IDS.repeat(3, 1)[:5], torch.randn(5, 4, 8, 8)
    whole = pipe.text_encoder(ids, output_hidden_states=True)
    sliced = encoder(ids, output_hidden_states=True)
    for one, other in zip((*sliced.hidden_states, sliced[0]), (*whole.hidden_states, whole[0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.decode(latents).sample, pipe.vae.decode(latents).sample, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="takes latents of height 8 and width 8, got 8x16"):
        autoencoder.decode(torch.randn(1, 4, 8, 16))
    with pytest.raises(InputError, match="takes latents of height 8 and width 8, got 16x8"):
        autoencoder.encode(torch.randn(1, 3, 16 * FACTOR, 8 * FACTOR))


def test_decoding_in_tiles_is_refused_and_switching_it_off_is_not(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="pictures are decoded whole: leave tiling off"):
        pipe.vae.enable_tiling()
    pipe.vae.disable_tiling()


def test_one_picture_is_decoded_at_a_time_where_that_is_asked_for(pipe: StableDiffusionPipeline) -> None:
    autoencoder, latents, seen = copy.deepcopy(pipe.vae), torch.randn(3, 4, 8, 8), []
    inner = autoencoder.runners["vae_decoder"]

    class Watched(type(inner)):  # type: ignore[misc]  # of the backend's class
        def __init__(self) -> None:
            pass

        def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            seen.append(len(inputs["latents"]))
            return inner.infer(inputs)

    autoencoder.runners["vae_decoder"] = Watched()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_slicing()
    sliced = copy.deepcopy(autoencoder).decode(latents).sample
    autoencoder.disable_slicing()
    autoencoder.decode(latents)
    assert seen == [3, 1, 1, 1, 3]
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_t5_encoder_gives_its_last_states_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("t5")
    base = t5_base(folder / "pipeline")
    floating = load_pipeline(base)
    components = auxiliary_components(build_component_engines(base, folder / "parts", backend="onnxruntime"))
    assert set(components) == {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
    for count in (8, 20):
        with torch.no_grad():
            expected = floating.text_encoder_3(IDS[:, :count])[0]
        states = components["text_encoder_3"](IDS[:, :count])[0]
        assert states.shape == (2, count, WIDTH)
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="last states alone"):
        components["text_encoder_3"](IDS, output_hidden_states=True)
    with torch.no_grad():
        projected = floating.text_encoder(IDS, output_hidden_states=True)
    record = components["text_encoder"](IDS, output_hidden_states=True)
    torch.testing.assert_close(record.text_embeds, projected.text_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(record[0], projected[0], atol=1e-4, rtol=0)
