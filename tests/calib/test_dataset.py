from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib import generate_dataset
from s2p_deploy.calib.dataset import encode_texts
from s2p_deploy.errors import IntegrityError
from s2p_deploy.families import BasePipeline, HotDenoiser
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, Prompt, PromptSet


def test_what_a_dataset_holds(dataset: LatentDataset, recipe: Recipe, prompts: PromptSet) -> None:
    assert dataset.latents.shape == dataset.cond.shape == dataset.uncond.shape == (18, 4, 8, 8)
    assert dataset.latents.dtype == np.float16
    assert dataset.prompt.tolist() == [index for index in range(6) for _ in range(3)]
    assert set(dataset.rows.tolist()) <= set(range(1000))
    assert dataset.texts.shape == (7, 24, 128)  # six prompts and the empty one
    assert sorted(dataset.manifest.files) == [*(f"shard-{n:05d}.safetensors" for n in range(3)), "texts.safetensors"]
    content = dataset.manifest.content
    assert (content["points"], content["width"], content["prompts"]) == (18, 2, prompts.digest)
    assert content["sampling"] == {"scheduler": "PNDMScheduler", "steps": 6, "guidance_scale": 2.5}


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    *,
    base: BasePipeline,
    pipe: StableDiffusionPipeline,
    hot: HotDenoiser,
    prompts: PromptSet,
    recipe: Recipe,
    dataset: LatentDataset,
    file_bytes: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "dataset"
    shards = tmp_path / "dataset.shards"

    def interrupt(stage: str, done: int, total: int) -> None:
        if len(list(shards.glob("shard-*"))) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(pipe, hot, base.base, prompts, recipe, out=out, progress=interrupt)
    (first,) = shards.glob("shard-*")
    written = first.stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    generate_dataset(
        pipe, hot, base.base, prompts, recipe, out=out, progress=lambda _, done, total: seen.append((done, total))
    )
    assert first.stat().st_mtime_ns == written
    assert seen[0][0] > 0
    assert seen[-1][0] == seen[-1][1]
    assert file_bytes(out) == file_bytes(dataset.folder)


def test_a_whole_dataset_is_opened_and_checked(
    base: BasePipeline,
    pipe: StableDiffusionPipeline,
    hot: HotDenoiser,
    prompts: PromptSet,
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    out = tmp_path / "dataset"
    first = generate_dataset(pipe, hot, base.base, prompts.first(2), recipe, out=out)
    again = generate_dataset(pipe, hot, base.base, prompts.first(2), recipe, out=out)
    assert again.manifest.digest == first.manifest.digest
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match="shard-00000"):
        generate_dataset(pipe, hot, base.base, prompts.first(2), recipe, out=out)


def test_texts_are_encoded_once_each(pipe: StableDiffusionPipeline) -> None:
    prompts = PromptSet(
        (Prompt("a", "a red circle"), Prompt("b", "a blue square", "blurry"), Prompt("c", "a red circle"))
    )
    texts = encode_texts(pipe, prompts)
    assert len(texts.states) == 4  # two prompts, one negative, the empty text
    assert texts.cond.tolist() == [0, 2, 0]
    assert texts.uncond.tolist() == [1, 3, 1]
    expected, _ = pipe.encode_prompt("blurry", "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(texts.states[3], expected[0], rtol=1e-4, atol=1e-5)
