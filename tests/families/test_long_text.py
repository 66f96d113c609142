"""Prompts longer than the text encoder reads at once: how they are divided, and what the chunks become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2p_deploy.families import divide_text, load_pipeline, long_prompt_embeds, resolve_base
from tests.small_pipelines import sibling, t5_base

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

SHORT = "a small red circle at the top left, white background"
LONG = ", ".join([SHORT, "a large blue square at the bottom right", "a small green triangle at the top right"] * 2)
ROOM = 22  # tokens of the bundled tokenizer beside those that begin and end a text
WORDS = (
    "a",
    "small",
    "red",
    "circle",
    "top",
    "left,",
    "white",
    "background",
    "unheard",
    "日本",
    "x" * 60,
    "it's",
    "3.5",
)


@pytest.fixture(scope="module")
def shapes() -> DiffusionPipeline:
    return load_pipeline(resolve_base("shapes"))


@pytest.fixture(scope="module")
def sdxl() -> DiffusionPipeline:
    return load_pipeline(sibling("sdxl"))


def tokens(pipe: DiffusionPipeline, text: str) -> list[int]:
    return list(pipe.tokenizer(text, add_special_tokens=False).input_ids)


def framed(pipe: DiffusionPipeline, text: str, count: int) -> torch.Tensor:
    """Chunks of a text's tokens as weighting tools frame them, by hand: begin, up to 22 tokens, end, and padding."""
    tokenizer, ids, rows = pipe.tokenizer, tokens(pipe, text), []
    for at in range(count):
        chunk = ids[ROOM * at : ROOM * (at + 1)]
        row = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (ROOM + 2 - len(row)))
    return torch.tensor(rows)


@given(st.lists(st.sampled_from(WORDS), max_size=60))
@settings(max_examples=30)
def test_chunks_hold_all_words_in_order_and_each_is_read_whole(shapes: DiffusionPipeline, words: list[str]) -> None:
    text = " ".join(words)
    chunks = divide_text(shapes, text)
    assert "".join("".join(chunks).split()) == "".join(words)
    assert all(len(tokens(shapes, chunk)) <= ROOM for chunk in chunks)
    if len(tokens(shapes, text)) <= ROOM:
        assert chunks == [text]
    plain = [word for word in words if len(tokens(shapes, word)) <= ROOM]
    if plain == words:
        assert " ".join(chunks).split() == words
        sizes = [len(tokens(shapes, chunk)) for chunk in chunks]
        firsts = [len(tokens(shapes, chunk.split()[0])) for chunk in chunks[1:]]
        assert all(size + first > ROOM for size, first in zip(sizes, firsts, strict=False)), "as long as can be"


def test_a_text_that_is_read_whole_stays_as_it_is(shapes: DiffusionPipeline) -> None:
    assert divide_text(shapes, "  " + SHORT) == ["  " + SHORT]
    assert divide_text(shapes, "") == [""]
    assert divide_text(shapes, "red " * ROOM) == ["red " * ROOM]
    assert divide_text(shapes, "red " * (ROOM + 1)) == [("red " * ROOM).strip(), "red"]


def test_a_word_that_nobody_reads_whole_is_divided(shapes: DiffusionPipeline) -> None:
    chunks = divide_text(shapes, "日" * 50 + " red")
    assert "".join(chunks).replace(" ", "") == "日" * 50 + "red"
    assert len(chunks) > 1
    assert all(len(tokens(shapes, chunk)) <= ROOM for chunk in chunks)


def test_a_short_prompt_is_encoded_as_the_pipeline_does(shapes: DiffusionPipeline) -> None:
    found = long_prompt_embeds(shapes, SHORT, "blue")
    expected = shapes.encode_prompt(SHORT, "cpu", 1, True, negative_prompt="blue")
    assert list(found) == ["prompt_embeds", "negative_prompt_embeds"]
    for one, other in zip(found.values(), expected, strict=True):
        assert torch.equal(one, other)


def test_chunks_are_framed_one_by_one_and_the_negative_prompt_gets_as_many(shapes: DiffusionPipeline) -> None:
    """Where chunks end between words, those of the token ids are the same."""
    text = " ".join(["red"] * (3 * ROOM + 5))
    found = long_prompt_embeds(shapes, text, "blue square")
    with torch.no_grad():
        for kind, own in (("prompt_embeds", text), ("negative_prompt_embeds", "blue square")):
            states = shapes.text_encoder(framed(shapes, own, 4))[0]
            torch.testing.assert_close(found[kind], states.flatten(0, 1)[None], atol=1e-5, rtol=0)
    assert found["prompt_embeds"].shape == (1, 4 * (ROOM + 2), 128)


def test_unguided_there_is_no_negative_prompt_and_chunks_are_filled_up(shapes: DiffusionPipeline) -> None:
    found = long_prompt_embeds(shapes, SHORT, "x " * 200, guided=False, fewest=2)
    assert list(found) == ["prompt_embeds"]
    empty = long_prompt_embeds(shapes, "", guided=False)["prompt_embeds"]
    assert torch.equal(found["prompt_embeds"][:, ROOM + 2 :], empty)


def test_sdxl_has_the_first_chunks_pooled_text_and_zeros_for_no_negative_prompt(sdxl: DiffusionPipeline) -> None:
    found = long_prompt_embeds(sdxl, LONG)
    first = divide_text(sdxl, LONG)[0]
    states, zeros, pooled, zero_pooled = sdxl.encode_prompt(first, do_classifier_free_guidance=True)
    length = states.shape[1]
    assert found["prompt_embeds"].shape[1] == len(divide_text(sdxl, LONG)) * length
    torch.testing.assert_close(found["prompt_embeds"][:, :length], states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, atol=1e-5, rtol=0)
    assert torch.equal(found["negative_pooled_prompt_embeds"], zero_pooled)
    assert not found["negative_prompt_embeds"].any()
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_empty_chunks_of_sdxls_negative_prompt_are_no_zeros(sdxl: DiffusionPipeline) -> None:
    found = long_prompt_embeds(sdxl, LONG, "blue")["negative_prompt_embeds"]
    length = found.shape[1] // len(divide_text(sdxl, LONG))
    empty, *_ = sdxl.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(found[:, length : 2 * length], empty, atol=1e-5, rtol=0)


def test_sd3_has_chunks_of_clip_and_then_one_text_of_the_third_encoder(tmp_path: Path) -> None:
    pipe = load_pipeline(t5_base(tmp_path / "pipeline"))
    chunks = divide_text(pipe, LONG)
    found = long_prompt_embeds(pipe, LONG, "blue", max_sequence_length=30)
    own = pipe.tokenizer.model_max_length
    third = -(-len(pipe.tokenizer_3(LONG).input_ids) // 30) * 30
    states = found["prompt_embeds"]
    assert third > 30, "more than the third encoder reads at once"
    assert states.shape == (1, len(chunks) * own + third, pipe.transformer.config.joint_attention_dim)
    assert found["negative_prompt_embeds"].shape == states.shape
    options: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": third}
    whole, _, pooled, _ = pipe.encode_prompt(chunks[0], None, LONG, **options)
    torch.testing.assert_close(states[:, :own], whole[:, :own], atol=1e-5, rtol=0)
    torch.testing.assert_close(states[:, -third:], whole[:, own:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, atol=1e-5, rtol=0)


def test_sd3_without_the_third_encoder_has_its_zeros_once() -> None:
    pipe = load_pipeline(sibling("sd3"))
    states = long_prompt_embeds(pipe, LONG, max_sequence_length=8)["prompt_embeds"]
    assert states.shape[1] == len(divide_text(pipe, LONG)) * pipe.tokenizer.model_max_length + 8
    assert not states[:, -8:].any()
    assert states[:, :-8].any(2).all()


def test_a_textual_inversion_of_several_vectors_counts_as_many_tokens(shapes: DiffusionPipeline) -> None:
    pipe = load_pipeline(resolve_base("shapes"))
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<many>": torch.randn(6, width, generator=torch.Generator().manual_seed(1))})
    assert divide_text(pipe, "<many> " * 4) == ["<many> <many> <many>", "<many>"]
    assert divide_text(shapes, "red " * 4) == ["red " * 4]
