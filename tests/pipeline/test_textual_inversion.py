"""Textual inversions loaded into a pipeline with an engine: the text encoder knows the tokens, the engine need not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from s2p_deploy.families import load_pipeline, resolve_base, with_denoiser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s2p_deploy.pipeline import EngineUNet

TOKENS = {"<one>": 1, "<three>": 3}


@pytest.fixture
def pipe(base: StableDiffusionPipeline, denoiser: EngineUNet, tmp_path: Path) -> Iterator[StableDiffusionPipeline]:
    """With an engine in it, and tokens of one and of three vectors from files."""
    pipe = with_denoiser(base, denoiser)
    random = torch.Generator().manual_seed(1)
    for token, vectors in TOKENS.items():
        save_file({token: torch.randn(vectors, 128, generator=random)}, tmp_path / f"{vectors}.safetensors")
        pipe.load_textual_inversion(tmp_path / f"{vectors}.safetensors")
    yield pipe
    pipe.unload_textual_inversion()


def drawn(pipe: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    return pipe(prompt, num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np").images


def test_new_tokens_change_pictures_as_they_do_in_floating_point(
    pipe: StableDiffusionPipeline, base: StableDiffusionPipeline
) -> None:
    assert pipe.maybe_convert_prompt("<three>", pipe.tokenizer) == "<three> <three>_1 <three>_2"
    plain = drawn(pipe, "a red circle")
    for token in TOKENS:
        found = drawn(pipe, f"a {token} circle")
        np.testing.assert_array_equal(found, drawn(base, f"a {token} circle"))
        assert np.abs(found - plain).max() > 1e-3


def test_unloaded_tokens_are_words_again(pipe: StableDiffusionPipeline) -> None:
    own = load_pipeline(resolve_base("shapes")).tokenizer
    pipe.unload_textual_inversion()
    assert pipe.tokenizer("a <one> circle").input_ids == own("a <one> circle").input_ids
    assert pipe.text_encoder.get_input_embeddings().weight.shape[0] == len(pipe.tokenizer)
