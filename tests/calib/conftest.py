"""A Stable Diffusion pipeline whose UNet runs in a millisecond: the bundled text encoder, random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import FloatPipeline, load_float_pipeline
from s2p_deploy.families import (
    BasePipeline,
    IndexedDenoiser,
    indexed_denoiser,
    load_pipeline,
    time_table_of,
)
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import LatentDataset, Prompt, PromptSet
from tests.small_pipelines import tiny_base
from tests.training_states import new_state

TEXTS = ("a large red circle", "a small blue square", "a large green triangle", "two circles", "a red square", "a disc")


THREADS = 1  # kernels this small wait for each other longer than they compute


def pytest_runtest_setup() -> None:
    torch.set_num_threads(THREADS)  # after the same hook for all tests, before fixtures of any scope


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def pipe(base: BasePipeline) -> StableDiffusionPipeline:
    return load_pipeline(base)


@pytest.fixture
def float_denoiser(pipe: StableDiffusionPipeline) -> IndexedDenoiser:
    return indexed_denoiser(pipe.unet, time_table_of(pipe.unet, 1000)).eval()


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    return PromptSet(tuple(Prompt(f"p{index}", text) for index, text in enumerate(TEXTS)))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """W4A8 at the smallest size that still has several shards, slots and checkpoints: PNDM's 6 steps are 7 calls."""
    data = {
        "name": "tiny",
        "weights": "int4",
        "activations": "int8",
        "rules": [
            {"match": "conv_in", "weights": "int8", "activations": "none"},
            {"match": "text", "activations": "none"},
        ],
        "sampling": {"steps": 6, "guidance_scale": 2.5},
        "dataset": {"prompts": 6, "samples_per_prompt": 3, "width": 2, "prompts_per_shard": 2},
        "training": {"iterations": 6, "batch": 4, "save_minutes": 0},
        "scales": {"latents": 8},
    }
    return recipe_from_data(data, "test")


@pytest.fixture(scope="session")
def dataset(
    base: BasePipeline, prompts: PromptSet, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> LatentDataset:
    from s2p_deploy.calib import dataset_request, generate_dataset

    return generate_dataset(dataset_request(base, recipe, prompts, tmp_path_factory.mktemp("latents") / "dataset"))


@pytest.fixture(scope="session")
def source(base: BasePipeline, recipe: Recipe) -> FloatPipeline:
    """Not for tests that change its denoiser."""
    return load_float_pipeline(base, recipe.sampling.steps)


@pytest.fixture(scope="session")
def untrained(base: BasePipeline, recipe: Recipe, dataset: LatentDataset) -> TrainingState:
    return new_state(base, recipe, dataset)


@pytest.fixture
def state(untrained: TrainingState) -> TrainingState:
    return copy.deepcopy(untrained)


@pytest.fixture(scope="session")
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Gives every file below a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
