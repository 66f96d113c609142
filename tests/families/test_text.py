from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from s2p_deploy.families import (
    BasePipeline,
    EncodedText,
    encode_texts,
    indexed_denoiser_of,
    load_pipeline,
    resolve_base,
    text_tokens,
)
from s2p_deploy.timesteps import timestep_table_of
from tests.small_pipelines import sibling

TEXTS = ["a small red circle at the top left, white background", "", "a large blue square, black background"]


@pytest.fixture(scope="module")
def sdxl() -> DiffusionPipeline:
    return load_pipeline(sibling("sdxl"))


@pytest.fixture(scope="module")
def sd3() -> DiffusionPipeline:
    return load_pipeline(sibling("sd3"))


def encoded(pipe: DiffusionPipeline, *, negative: bool, texts: list[str] = TEXTS, length: int = 5) -> EncodedText:
    return encode_texts(pipe, texts, negative=negative, max_sequence_length=length)


def test_sdxl_has_states_of_both_encoders_and_pooled_text_with_size_ids(sdxl: DiffusionPipeline) -> None:
    found = encoded(sdxl, negative=False)
    states, _, pooled, _ = sdxl.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    assert torch.equal(found.states, states)
    assert torch.equal(found.added_cond[:, :-6], pooled)
    size = sdxl.default_sample_size * sdxl.vae_scale_factor
    ids = sdxl._get_add_time_ids((size, size), (0, 0), (size, size), torch.float32, pooled.shape[1])
    assert torch.equal(found.added_cond[:, -6:], ids.expand(3, -1))


def test_an_empty_negative_prompt_of_sdxl_is_zeros(sdxl: DiffusionPipeline) -> None:
    """As its pipeline takes it, where no negative prompt is given."""
    assert sdxl.config.force_zeros_for_empty_prompt
    found, plain = encoded(sdxl, negative=True), encoded(sdxl, negative=False)
    _, states, _, pooled = sdxl.encode_prompt(["a"], do_classifier_free_guidance=True)
    assert torch.equal(found.states[1:2], states)
    assert torch.equal(found.added_cond[1:2, :-6], pooled)
    assert not found.states[1].any()
    assert not found.added_cond[1, :-6].any()
    assert torch.equal(found.added_cond[:, -6:], plain.added_cond[:, -6:]), "sizes stay"
    for index in (0, 2):
        assert torch.equal(found.states[index], plain.states[index])
        assert torch.equal(found.added_cond[index], plain.added_cond[index])
    assert plain.states[1].any(), "an empty prompt is no negative one"


def test_an_empty_negative_prompt_is_encoded_where_the_pipeline_says_so(sdxl: DiffusionPipeline) -> None:
    other = load_pipeline(sibling("sdxl"))
    other.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(encoded(other, negative=True).states, encoded(sdxl, negative=False).states)


def test_sd3_has_zeros_in_the_place_of_the_third_encoder(sd3: DiffusionPipeline) -> None:
    found = encoded(sd3, negative=True)
    states, _, pooled, _ = sd3.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=5
    )
    assert torch.equal(found.states, states)
    assert torch.equal(found.added_cond, pooled)
    own = sd3.tokenizer.model_max_length
    assert found.states.shape[1] == text_tokens(sd3, 5) == own + 5
    assert found.states[:, :own].any()
    assert not found.states[:, own:].any()
    assert found.states[1, :own].any(), "an empty negative prompt has states"


def test_others_have_states_alone() -> None:
    pipe = load_pipeline(sibling("sd2"))
    found = encoded(pipe, negative=True)
    states, _ = pipe.encode_prompt(TEXTS, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(found.states, states)
    assert found.added_cond.shape == (3, 0)
    assert found.states.shape[1] == text_tokens(pipe, 256)


def test_texts_are_picked_and_put_together() -> None:
    text = EncodedText(torch.arange(12.0).view(3, 2, 2), torch.arange(3.0).view(3, 1))
    assert len(text) == 3
    assert text[torch.tensor([2, 0])].added_cond.flatten().tolist() == [2, 0]
    assert text[1].states.tolist() == [[4, 5], [6, 7]]
    joined = (EncodedText.cat([text[:1], text[1:]]), EncodedText.stack([text[index] for index in range(3)]))
    for same in joined:
        assert torch.equal(same.states, text.states)
        assert torch.equal(same.added_cond, text.added_cond)


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    """The small SD3 with a third encoder, a T5 of random weights, saved and resolved as a user's pipeline is."""
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})]
    pieces = [(f"\u2581{word}" if word.isalpha() else word, -1.0) for word in words]
    core = Tokenizer(models.Unigram(pieces, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    end = core.token_to_id("</s>")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words) + 100, d_model=256, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    pipe = load_pipeline(sibling("sd3"))
    whole = StableDiffusion3Pipeline(
        **pipe.components
        | {
            "text_encoder_3": T5EncoderModel(config).eval(),
            "tokenizer_3": T5TokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>"),
        }
    )
    folder = tmp_path_factory.mktemp("t5") / "pipeline"
    whole.save_pretrained(folder)
    return resolve_base(str(folder))


@torch.no_grad()
def test_sd3_with_its_third_encoder(with_t5: BasePipeline, sd3: DiffusionPipeline) -> None:
    pipe = load_pipeline(with_t5)
    found, without = encoded(pipe, negative=False), encoded(sd3, negative=False)
    states, _, pooled, _ = pipe.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=5
    )
    assert torch.equal(found.states, states)
    assert torch.equal(found.added_cond, pooled)
    assert found.states.shape == without.states.shape, "an engine takes both"
    assert torch.equal(found.states[:, :-5], without.states[:, :-5])
    assert found.states[:, -5:].abs().amin((1, 2)).gt(0).any()


@torch.no_grad()
def test_the_denoiser_reads_the_third_encoders_tokens(with_t5: BasePipeline) -> None:
    """Its float_denoiser form answers as diffusers' network does, and otherwise than with zeros in their place."""
    pipe = load_pipeline(with_t5)
    text = encoded(pipe, negative=False)
    sample, rows = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3, 3])
    timesteps = torch.from_numpy(timestep_table_of(pipe.scheduler, 6, fractional=True).timesteps).float()
    expected = pipe.transformer(sample, text.states, text.added_cond, timesteps[rows]).sample
    float_denoiser = indexed_denoiser_of(pipe, 6)
    assert torch.equal(float_denoiser(sample, rows, text.states, text.added_cond), expected)
    zeros = torch.cat([text.states[:, :-5], torch.zeros_like(text.states[:, -5:])], 1)
    assert not torch.equal(float_denoiser(sample, rows, zeros, text.added_cond), expected)
