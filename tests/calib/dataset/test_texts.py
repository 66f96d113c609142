from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib.dataset.texts import encode_texts, texts_once
from s2p_deploy.records import Prompt, PromptSet

PROMPTS = PromptSet((Prompt("a", "a red circle"), Prompt("b", "a blue square", "blurry"), Prompt("c", "a red circle")))


def test_texts_are_encoded_once_each(pipe: StableDiffusionPipeline) -> None:
    texts = encode_texts(pipe, PROMPTS)
    assert len(texts.states) == 4  # two prompts, one negative, the empty text
    assert texts.cond.tolist() == [0, 2, 0]
    assert texts.uncond.tolist() == [1, 3, 1]
    expected, _ = pipe.encode_prompt("blurry", "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(texts.states[3], expected[0], rtol=1e-4, atol=1e-5)


def test_stored_texts_are_read_again(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "texts.safetensors"
    first = texts_once(pipe, PROMPTS, path)
    made = path.stat().st_mtime_ns
    again = texts_once(pipe, PROMPTS, path)
    assert path.stat().st_mtime_ns == made
    assert torch.equal(again.states, first.states)
    assert again.uncond.tolist() == [1, 3, 1]
