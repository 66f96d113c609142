from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from sibling_pipelines import sibling

from s2p_deploy.calib.dataset.texts import encode_prompts, texts_once
from s2p_deploy.families import encode_texts, load_pipeline
from s2p_deploy.records import Prompt, PromptSet

PROMPTS = PromptSet((Prompt("a", "a red circle"), Prompt("b", "a blue square", "blurry"), Prompt("c", "a red circle")))


def test_texts_are_encoded_once_each(pipe: StableDiffusionPipeline) -> None:
    texts = encode_prompts(pipe, PROMPTS, 256)
    assert texts.distinct.states.shape == (4, 24, 128)  # two prompts, one negative, the empty text
    assert texts.distinct.added_cond.shape == (4, 0)
    assert texts.cond.tolist() == [0, 1, 0]
    assert texts.uncond.tolist() == [2, 3, 2]
    expected, _ = pipe.encode_prompt("blurry", "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(texts.distinct.states[3], expected[0], rtol=1e-4, atol=1e-5)


def test_stored_texts_are_read_again(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "texts.safetensors"
    first = texts_once(pipe, PROMPTS, 256, path)
    made = path.stat().st_mtime_ns
    again = texts_once(pipe, PROMPTS, 256, path)
    assert path.stat().st_mtime_ns == made
    assert torch.equal(again.distinct.states, first.distinct.states)
    assert again.distinct.added_cond.shape == (4, 0)
    assert again.uncond.tolist() == [2, 3, 2]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_pooled_text_is_stored_beside_the_states(name: str, tmp_path: Path) -> None:
    pipe = load_pipeline(sibling(name))
    texts = encode_prompts(pipe, PROMPTS, 5)
    for index, (text, negative) in enumerate((("a red circle", False), ("a blue square", False), ("", True))):
        expected = encode_texts(pipe, [text], negative=negative, max_sequence_length=5)
        torch.testing.assert_close(texts.distinct.states[index], expected.states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(texts.distinct.added_cond[index], expected.added_cond[0], rtol=1e-4, atol=1e-5)
    texts_once(pipe, PROMPTS, 5, tmp_path / "texts.safetensors")
    stored = texts_once(pipe, PROMPTS, 5, tmp_path / "texts.safetensors")
    assert torch.equal(stored.distinct.states, texts.distinct.states)
    assert torch.equal(stored.distinct.added_cond, texts.distinct.added_cond)


def test_a_text_that_is_also_a_negative_prompt_is_encoded_as_either() -> None:
    pipe = load_pipeline(sibling("sdxl"))
    texts = encode_prompts(pipe, PromptSet((Prompt("a", ""),)), 5)
    assert (texts.cond.tolist(), texts.uncond.tolist()) == ([0], [1])
    assert texts.distinct.states[0].any()
    assert not texts.distinct.states[1].any(), "zeros, as the pipeline takes it"
