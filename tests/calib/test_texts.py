from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib.dataset import _texts_once, dataset_request
from s2p_deploy.calib.trajectories import FloatPipeline, encode_prompts, load_float_pipeline
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, encode_texts, load_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt, PromptSet
from tests.small_pipelines import sibling

PROMPTS = PromptSet((Prompt("a", "a red circle"), Prompt("b", "a blue square", "blurry"), Prompt("c", "a red circle")))


def test_texts_are_encoded_once_each(pipe: StableDiffusionPipeline) -> None:
    texts = encode_prompts(pipe, PROMPTS, 256)
    assert texts.distinct.states.shape == (4, 24, 128)  # two prompts, one negative, the empty text
    assert texts.distinct.added_cond.shape == (4, 0)
    assert texts.cond.tolist() == [0, 1, 0]
    assert texts.uncond.tolist() == [2, 3, 2]
    expected, _ = pipe.encode_prompt("blurry", "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(texts.distinct.states[3], expected[0], rtol=1e-4, atol=1e-5)


def test_stored_texts_are_read_again(base: BasePipeline, recipe: Recipe, source: FloatPipeline, tmp_path: Path) -> None:
    request = replace(dataset_request(base, recipe, PROMPTS, tmp_path / "dataset"), prompts=PROMPTS)
    request.work.mkdir()
    first = _texts_once(request, source)
    path = request.texts
    made = path.stat().st_mtime_ns
    again = _texts_once(request, source)
    assert path.stat().st_mtime_ns == made
    assert torch.equal(again.distinct.states, first.distinct.states)
    assert again.distinct.added_cond.shape == (4, 0)
    assert again.uncond.tolist() == [2, 3, 2]


def test_states_that_float16_cannot_hold_are_refused_before_anything_is_written(
    base: BasePipeline, recipe: Recipe, source: FloatPipeline, tmp_path: Path
) -> None:
    request = replace(dataset_request(base, recipe, PROMPTS, tmp_path / "dataset"), prompts=PROMPTS)
    request.work.mkdir()
    broken = replace(source, pipe=load_pipeline(base))
    with torch.no_grad():
        broken.pipe.text_encoder.get_submodule("final_layer_norm").weight.fill_(1e6)
    with pytest.raises(InputError, match="a text encoder's states are not finite in float16, though"):
        _texts_once(request, broken)
    assert not request.texts.exists()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_pooled_text_is_stored_beside_the_states(name: str, recipe: Recipe, tmp_path: Path) -> None:
    source = load_float_pipeline(sibling(name), 6)
    pipe = source.pipe
    texts = encode_prompts(pipe, PROMPTS, 5)
    for index, (text, negative) in enumerate((("a red circle", False), ("a blue square", False), ("", True))):
        expected = encode_texts(pipe, [text], negative=negative, max_sequence_length=5)
        torch.testing.assert_close(texts.distinct.states[index], expected.states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(texts.distinct.added_cond[index], expected.added_cond[0], rtol=1e-4, atol=1e-5)
    sampling = recipe.sampling.model_copy(update={"max_sequence_length": 5})
    request = dataset_request(sibling(name), recipe.model_copy(update={"sampling": sampling}), PROMPTS, tmp_path / "d")
    request.work.mkdir()
    _texts_once(request, source)
    stored = _texts_once(request, source)
    assert torch.equal(stored.distinct.states, texts.distinct.states.half())
    assert torch.equal(stored.distinct.added_cond, texts.distinct.added_cond)


def test_a_text_that_is_also_a_negative_prompt_is_encoded_as_either() -> None:
    pipe = load_pipeline(sibling("sdxl"))
    texts = encode_prompts(pipe, PromptSet((Prompt("a", ""),)), 5)
    assert (texts.cond.tolist(), texts.uncond.tolist()) == ([0], [1])
    assert texts.distinct.states[0].any()
    assert not texts.distinct.states[1].any(), "zeros, as the pipeline takes it"
